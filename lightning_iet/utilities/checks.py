"""What cannot work with shards, refused before the first step, each with its remedy."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

__all__ = ["check_schedulers", "check_trainer"]


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Refuse settings of the trainer and the module under which shards would not stay apart.

    Raises:
        MisconfigurationException: Naming the setting, and what to use instead.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "ParameterAveragingCallback expected automatic optimization, but the module sets "
            "automatic_optimization=False: under DDP it turns gradient synchronisation back on after each forward. "
            "Use automatic optimization, or num_shards=1."
        )
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        raise MisconfigurationException(
            f"ParameterAveragingCallback expected the strategy 'auto' or 'ddp', but got {type(strategy).__name__}, "
            "which spreads one model over processes. Use --trainer.strategy ddp, or num_shards=1."
        )
    if getattr(strategy, "_ddp_kwargs", {}).get("static_graph"):
        raise MisconfigurationException(
            "ParameterAveragingCallback expected DDP without static_graph, but got static_graph=True, which cannot "
            "leave gradients unsynchronised. Use DDPStrategy(static_graph=False)."
        )
    if trainer.max_steps != -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"ParameterAveragingCallback expected max_steps=-1, but got {trainer.max_steps}: a process counts the "
            "steps of all its shards, so the run would end in the middle of a shard. Use max_epochs."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging | GradientAccumulationScheduler):
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected no callback that mixes the weights or gradients of shards, but "
                f"got {type(callback).__name__}. Use DiffusionModule(ema_decay=…), Trainer(accumulate_grad_batches=…)."
            )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            f"ParameterAveragingCallback expected overfit_batches=0, but got {trainer.overfit_batches}: "  # type: ignore[attr-defined]
            "it replaces the shards' samplers. Use a smaller data set, or num_shards=1."
        )


def check_schedulers(trainer: Trainer) -> None:
    """Refuse learning-rate schedules that cannot be kept apart by shard.

    Raises:
        MisconfigurationException: For schedules that wait for a metric, or whose frequency straddles shards.
    """
    for config in trainer.lr_scheduler_configs:
        name = type(config.scheduler).__name__
        if config.reduce_on_plateau:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected LR schedules that step by themselves, but got {name}: its metric "
                "is one of the average, not of a shard. Use a schedule by step or epoch, or num_shards=1."
            )
        if config.interval == "step" and config.frequency != 1:
            raise MisconfigurationException(
                f"ParameterAveragingCallback expected LR schedules by step with frequency=1, but got {config.frequency}"
                f" for {name}: Lightning counts the steps of all shards of a process. Use frequency=1."
            )
