"""What ParameterAveragingCallback refuses: settings that cannot work with shards, and checkpoints of other runs."""

from collections.abc import Mapping
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_iet.functional.sharding import num_replicas
from lightning_iet.shards.groups import shortened
from lightning_iet.shards.layout import weight_averagings
from lightning_iet.utilities.lightning import find_callbacks, lightning_classes


def check_split(in_data: int | None, num_shards: int, trainer: Trainer) -> None:
    """Refuse data that are not split as the run is, and numbers of processes that do not fit it.

    Args:
        in_data: Number of shards into which the data are split; ``None`` if they are not.
        num_shards: Number of shards of the run, K.
        trainer: About to train.

    Raises:
        MisconfigurationException: If the numbers of shards differ.
        ValueError: If neither K nor the number of processes divides the other.
    """
    if in_data not in (None, num_shards):
        raise MisconfigurationException(
            f"Argument `num_shards` expected the same value in ShardedDataModule and in ParameterAveragingCallback, "
            f"but got {in_data} and {num_shards}."
        )
    if num_shards > 1:
        num_replicas(num_shards, trainer.world_size)
        if in_data is None and num_shards != trainer.world_size:
            _refuse(
                f"data split into {num_shards} shards, but the run has {trainer.world_size} process(es) and no "
                f"ShardedDataModule. Wrap the data module: ShardedDataModule(datamodule, num_shards={num_shards})."
            )


def check_trainer(trainer: Any, module: LightningModule, *, round_steps: int | None = None) -> None:
    """Refuse settings of the trainer and the module under which shards would not stay apart.

    Args:
        trainer: About to train.
        module: What it trains.
        round_steps: Length of a round, where it is counted in steps of a shard.

    Raises:
        MisconfigurationException: Naming the setting, and what to use instead.
    """
    if not module.automatic_optimization and trainer.world_size > 1:
        _refuse(
            "automatic optimization, but the module sets automatic_optimization=False: under DDP it turns gradient "
            "synchronisation back on after each forward. Use automatic optimization, one process, or num_shards=1."
        )
    if (round_steps or 0) % trainer.accumulate_grad_batches:
        raise MisconfigurationException(
            f"Argument `every_n_train_steps` expected a multiple of accumulate_grad_batches "
            f"({trainer.accumulate_grad_batches}), but got {round_steps}: gradients would be summed over two shards."
        )
    strategy = trainer.strategy
    if not isinstance(strategy, lightning_classes("strategies.DDPStrategy", "strategies.SingleDeviceStrategy")):
        _refuse(
            f"the strategy 'auto' or 'ddp', but got {type(strategy).__name__}, which spreads one model over processes. "
            "Use --trainer.strategy ddp, or num_shards=1."
        )
    ddp = getattr(strategy, "_ddp_kwargs", {})
    if ddp.get("static_graph"):
        _refuse(
            "DDP without static_graph, but got static_graph=True, which cannot leave gradients unsynchronised. "
            "Use DDPStrategy(static_graph=False)."
        )
    if ddp.get("process_group") is not None:
        _refuse("DDP without a process_group, but got one: it makes the groups itself. Use DDPStrategy().")
    if getattr(strategy, "_layer_sync", None) is not None:
        _refuse(
            "sync_batchnorm=False, but got True: batch statistics would mix the shards of all processes. "
            "Use Trainer(sync_batchnorm=False)."
        )
    if trainer.max_steps != -1 and not trainer.fast_dev_run:
        _refuse(
            f"max_steps=-1, but got {trainer.max_steps}: a process counts the steps of all its shards, so the run "
            "would end in the middle of a shard. Use max_epochs."
        )
    if trainer.overfit_batches:
        _refuse(
            f"overfit_batches=0, but got {trainer.overfit_batches}: it replaces the shards' samplers. "
            "Use a smaller data set, or num_shards=1."
        )
    mixing = lightning_classes("callbacks.StochasticWeightAveraging", "callbacks.GradientAccumulationScheduler")
    if callback := next(iter(find_callbacks(trainer, *mixing)), None):
        _refuse(
            f"no callback that mixes the weights or gradients of shards, but got {type(callback).__name__}. "
            "Use EMAWeightAveraging(), Trainer(accumulate_grad_batches=…)."
        )
    if (count := len(weight_averagings(trainer))) > 1:
        _refuse(
            f"at most one WeightAveraging callback, but got {count}: each would put its own average into the "
            "checkpoint. Use one."
        )


def limit_per_shard(trainer: Any, num_shards: int) -> int | None:
    """Return the batches of an epoch that `limit_train_batches` leaves to each shard; ``None`` = all.

    The limit is for the batches of all shards together, so that a run is the same on any number of processes.

    Raises:
        MisconfigurationException: If the limit leaves nothing to some shard, or is a share.
    """
    limit, least = trainer.limit_train_batches, num_shards * trainer.accumulate_grad_batches
    if not isinstance(limit, int):
        if limit == 1.0:
            return None
        _refuse(f"limit_train_batches as a number of batches, but got the share {limit}. Use an integer.")
    if limit < least and not trainer.fast_dev_run:
        _refuse(
            f"limit_train_batches to leave a step to each of the {num_shards} shards, at least {least}, but got "
            f"{limit}. Use a larger limit, or fewer shards."
        )
    return max(limit // num_shards, 1)


def check_schedulers(trainer: Trainer) -> None:
    """Refuse learning-rate schedules that cannot be kept apart by shard.

    Raises:
        MisconfigurationException: For schedules that need a metric, whose frequency spans shards, or that a module
            with manual optimization steps itself.
    """
    configs = trainer.lr_scheduler_configs
    if configs and not trainer.lightning_module.automatic_optimization:
        _refuse(
            f"no LR schedules under manual optimization, but got {len(configs)}: which shard steps them, and when, "
            "cannot be seen. Set the learning rate in training_step, or use automatic optimization."
        )
    for config in configs:
        name = type(config.scheduler).__name__
        if config.reduce_on_plateau:
            _refuse(
                f"LR schedules that step by themselves, but got {name}: its metric is one of the average, not of a "
                "shard. Use a schedule by step or epoch, or num_shards=1."
            )
        if config.interval == "step" and config.frequency != 1:
            _refuse(
                f"LR schedules by step with frequency=1, but got {config.frequency} for {name}: Lightning counts the "
                "steps of all shards of a process. Use frequency=1."
            )


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse to continue a run other than that of the checkpoint.

    Args:
        saved: Identity of the run in the checkpoint: a readable name and a value for each thing that must not change.
        current: Identity of this run.

    Raises:
        MisconfigurationException: Naming the first difference and both values.
    """
    for name, value in current.items():
        if name in saved and saved[name] != value:
            raise MisconfigurationException(
                f"The checkpoint expected the {name} {shortened(saved[name])}, but got {shortened(value)}. "
                "Resume with the settings and data of the run that wrote it, or start afresh without `ckpt_path`."
            )


def _refuse(reason: str) -> NoReturn:
    raise MisconfigurationException(f"ParameterAveragingCallback expected {reason}")
