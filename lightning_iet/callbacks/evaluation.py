"""The evaluation at the end of a run, and during it: when images are sampled and measured, and what is logged."""

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, isnan
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from lightning_iet.callbacks.anti_gradient_control.reference import HeldOutImages
from lightning_iet.callbacks.interruptions import ended_by_sigterm, final_evaluation
from lightning_iet.callbacks.parameter_averaging.callback import ParameterAveragingCallback
from lightning_iet.evaluation.assessment import (
    Assessment,
    Assessor,
    Scores,
    check_captions,
    check_images,
    check_losses,
    check_schedule,
    check_settings,
    real_sets,
    sample_on_all_processes,
)
from lightning_iet.evaluation.measures import Measure, MembershipMeasure, TextNorm, check_measures
from lightning_iet.evaluation.report import Report, make_report, print_report, publish
from lightning_iet.evaluation.sampling import find_sample
from lightning_iet.evaluation.verdict import copies_exceed
from lightning_iet.functional.checks import check_at_least
from lightning_iet.metrics.features import best_features
from lightning_iet.metrics.frechet import frechet_distance
from lightning_iet.utilities.checkpoints import next_epoch, took_last_batch
from lightning_iet.utilities.errors import arguments_called
from lightning_iet.utilities.files import check_writable, run_folder
from lightning_iet.utilities.lightning import (
    Position,
    find_callback,
    isolated_module,
    loss_of,
    num_shards_of,
    order_callbacks,
)


class RunHistory:
    """Mean loss of all samples of each epoch (also of those that anti-gradient control skips), and a stop watch.

    Sums stay on the device of their process until they are asked for.

    Attributes:
        validation: Loss of held-out images by the number of epochs before it, where a module logs ``val/loss``.

    Example:
        >>> from lightning.pytorch.strategies import SingleDeviceStrategy
        >>> history = RunHistory()
        >>> history.add({"loss": torch.tensor(9.0), "sample_loss": torch.tensor([1.0, 2.0])}, epoch=0)
        >>> history.add({"loss": torch.tensor(3.0)}, epoch=0)
        >>> history.losses(SingleDeviceStrategy())
        [2.0]
    """

    def __init__(self) -> None:
        self.validation: dict[int, float] = {}
        self._sums: dict[int, Tensor] = {}  # by epoch, (2,): sum and number of the losses of this process
        self._earlier: dict[int, list[float]] = {}  # the same of all processes, before the run was taken up again
        self._seconds = 0.0
        self._since: float | None = None

    def add(self, outputs: Any, *, epoch: int, accumulated: int = 1) -> None:
        """Add what a training step returned: ``sample_loss`` (B,) where there is one, else ``loss``.

        ``accumulated`` is the number of batches whose gradients are accumulated.
        """
        losses = outputs.get("sample_loss") if isinstance(outputs, Mapping) else None
        losses = loss_of(outputs, accumulated) if losses is None else losses
        if isinstance(losses, Tensor):
            losses = losses.detach().float()
            batch = torch.stack([losses.sum(), torch.ones_like(losses).sum()])
            before = self._sums.get(epoch)
            self._sums[epoch] = batch if before is None else before.to(batch.device) + batch
        elif outputs is None:
            # A step in which this process waits for others: its epoch counts, so that all processes have the same.
            self._sums.setdefault(epoch, torch.zeros(2))

    def losses(self, strategy: Strategy) -> list[float]:
        """Return the mean loss of each epoch over all processes; every process has to call this."""
        return [total / number for total, number in self._totals(strategy).values() if number]

    def _totals(self, strategy: Strategy) -> dict[int, list[float]]:
        totals = dict(self._earlier)
        if self._sums:
            local = torch.stack([total.to(strategy.root_device) for total in self._sums.values()])
            sums = strategy.reduce(local, reduce_op="sum").tolist()
            for epoch, (total, number) in zip(self._sums, sums, strict=True):
                before = totals.get(epoch, [0.0, 0.0])
                totals[epoch] = [before[0] + total, before[1] + number]
        return totals

    def start(self) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Stop the clock, for what is not training."""
        self._seconds, self._since = self.seconds(), None

    def seconds(self) -> float:
        """Return the seconds between starts and pauses so far."""
        return self._seconds + (0 if self._since is None else time.monotonic() - self._since)

    def state_dict(self, strategy: Strategy) -> dict[str, Any]:
        """Return plain numbers of all processes; every process has to call this."""
        return {"losses": self._totals(strategy), "seconds": self.seconds(), "validation": dict(self.validation)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, in the middle of an epoch too."""
        self._earlier, self._seconds = dict(state_dict["losses"]), state_dict["seconds"]
        self.validation = dict(state_dict.get("validation", {}))


def describe_run(trainer: pl.Trainer, history: RunHistory) -> dict[str, Any]:
    """Return the training's length and shards, and the skip rate of anti-gradient control (threshold 0: it was off).

    With weights also the mean of the tenth that counts least; with a reference to unseen images also the gap, see
    :meth:`~lightning_iet.callbacks.AntiGradientControl.gap`.
    """
    agc, averaging = find_callback(trainer, AntiGradientControl), find_callback(trainer, ParameterAveragingCallback)
    weights = {} if agc is None else agc.weights_by_epoch()
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": history.seconds(),
        "processes": trainer.world_size,
        "num_shards": num_shards_of(trainer, averaging),
        "threshold": 0.0 if agc is None or agc.criterion != "ratio" else agc.threshold,
        "criterion": None if agc is None or agc.is_off else agc.criterion,
        "skip_rate": 0.0 if agc is None else float(agc.skip_rate()),
        "weigh": agc.weigh if agc is not None and weights else None,
        "lowest_weights": weights[max(weights)][1] if weights else None,
        "num_timesteps": None if agc is None else agc.num_timesteps,
        "reference": "training" if agc is None else agc.reference,
        "gap": None if agc is None or isnan(agc.gap()) else agc.gap(),
    }


def _round_epochs(trainer: pl.Trainer) -> float | None:
    """Return the number of epochs between two averagings of the shards; None with a single shard."""
    averaging = find_callback(trainer, ParameterAveragingCallback)
    shards = num_shards_of(trainer, averaging)
    if averaging is None or shards == 1:
        return None
    if averaging.every_n_train_steps is None:
        return averaging.every_n_epochs
    epochs, steps = trainer.current_epoch, trainer.global_step  # optimizer steps of a process are those of its shards
    in_a_round = averaging.every_n_train_steps / trainer.accumulate_grad_batches * max(shards // trainer.world_size, 1)
    return in_a_round * epochs / steps if epochs and steps else None


def curves_of_run(trainer: pl.Trainer, history: RunHistory) -> Mapping[str, Any]:
    """Return losses, rounds and weights by epoch, and with anti-gradient control skip rate and loss by timestep."""
    agc = find_callback(trainer, AntiGradientControl)
    return {
        "loss_by_epoch": history.losses(trainer.strategy),
        "validation_loss": dict(history.validation),
        "round_epochs": _round_epochs(trainer),
        "weights_by_epoch": None if agc is None else agc.weights_by_epoch() or None,
        "skip_rate_by_timestep": None if agc is None else agc.skip_rate_by_timestep().tolist(),
        "loss_by_timestep": None if agc is None else agc.loss_by_timestep().tolist(),
        "unseen_loss_by_timestep": None if agc is None else agc.unseen_loss_by_timestep().tolist(),
    }


BEST = "best_without_copies.ckpt"
_USUAL_K = 50  # published
_SETTINGS = ("num_samples", "sampler", "num_inference_steps", "use_ema", "seed", "features", "k")


class Evaluation(pl.Callback):
    """Sample images, and measure how good they are and whether they are copies of training images.

    At the end of training it prints a verdict in a sentence, and a table in which each measure stands beside that of
    held-out real images, and
    writes into the run folder ``metrics.json`` with all measures and settings, and four plots: ``samples.png``;
    ``nearest.png``, the generated images closest to a training image, beside it; ``curves.png``, loss and skip rate;
    and ``mq.png``. The run's loggers get ``eval/fid``, ``eval/memorized_fraction`` and ``eval/mq_0.15`` … (as shares of
    the images), each also with ``_control``, and ``eval/fid_train``, the FID of the training images themselves; at the
    end also ``eval/skip_rate``, the share of all samples that anti-gradient control skipped. Those that take images,
    as Weights & Biases does, get ``eval/samples``, ``eval/nearest``, ``eval/curves`` and ``eval/mq``.

    Training has the same result with and without it: random generators and training modes are put back. It measures
    the average of the shards, after all other callbacks. Several processes sample a part of the images each. With
    ``fast_dev_run`` it measures a few images, as a test, and keeps nothing.

    The data module needs ``train_set``, ``control_set`` and ``reference_set``; the module needs
    ``sample(num, *, seed, start, batch_size, sampler, num_inference_steps, use_ema)``, as
    :class:`~lightning_iet.DiffusionModule` has it, or a pipeline of diffusers that needs no input (or its parts, a
    ``UNet2DModel`` and a scheduler), which is found by itself. Another module is refused with the lines to write.

    Args:
        num_samples: Images to sample; 0 switches the evaluation off. The control has at most as many, since FID depends
            on the number. *(our choice: 512, which small runs can afford; 50,000 is usual for published FIDs, and
            65,536 was published for MQ)*
        every_n_epochs: Evaluate also after every so many epochs, for the loggers and for ``course`` in
            ``metrics.json``. ``None`` = at the end alone.
        every_n_steps: Likewise after every so many optimizer steps.
        keep_best: Keep the checkpoint of the least FID at these evaluations, among those whose images copy no more than
            held-out ones do (by ``copied_fraction``; one image more is let through), as ``best_without_copies.ckpt``.
        patience: With ``keep_best``, end training after so many evaluations without a better one. ``None`` = never.
        sampler: ``"ddim"``; ``"ddpm"``, the ancestral sampler (published MQ: with 1,000 steps, raw weights); or
            ``"own"``, the module's own scheduler, which flow matching and EDM use for ``"ddim"`` too.
        num_inference_steps: Denoiser calls per image.
        use_ema: Sample with the averaged weights, where the module has them.
        seed: Of the images.
        features: Features of FID: ``"auto"``, the best that is installed; ``"none"``, for no FID; ``"digits"``, a
            small classifier in this package, ``"inception"``, ``"efficientnet"``, or another of
            :func:`~lightning_iet.metrics.feature_extractor`.
        feature_weights: A local file with the weights of ``features``.
        download: Whether these may be downloaded when there is no file.
        k: Nearest training images in the mean of MQ; ``None`` = 50, or all where there are fewer.
        measures: Further measures, each logged as ``eval/…`` (``eval/precision``, ``eval/mifid``,
            ``eval/membership_inference_auc`` …) and, where it is one of images, also for the control. Those that
            compare features do it in ``features``.
        measure_weights: Files for measures with a network of their own, ``clean_fid`` and ``sscd_similarity``.
        num_pairs: Images that ``nearest.png`` shows.
        pictures: Whether to make the four plots, which takes seconds.
        batch_size: At most so many images are sampled at once.

    Attributes:
        report: What ``metrics.json`` holds, once training has ended.

    Raises:
        ValueError: An argument is out of range; or, before training starts, sets are missing or too small, ``k``
            exceeds the training set, or the run folder cannot be written.
        TypeError: Before training starts: the module cannot sample images.

    Example:
        >>> evaluation = Evaluation(256, every_n_epochs=10, k=20)
        >>> trainer = pl.Trainer(callbacks=[evaluation], accelerator="cpu", logger=False)  # then trainer.fit(…)
        >>> evaluation.num_samples
        256
    """

    position = Position.EVALUATION

    def __init__(
        self,
        num_samples: int = 512,
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        keep_best: bool = False,
        patience: int | None = None,
        sampler: Literal["ddim", "ddpm", "own"] = "ddim",
        num_inference_steps: int = 50,
        use_ema: bool = True,
        seed: int = 0,
        features: str = "auto",
        feature_weights: Path | None = None,
        download: bool = False,
        k: int | None = 50,
        measures: Sequence[Measure] = (),
        measure_weights: Mapping[str, Path] | None = None,
        num_pairs: int = 16,
        pictures: bool = True,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        check_settings(
            num_samples, sampler, every_n_epochs=every_n_epochs, every_n_steps=every_n_steps,
            num_inference_steps=num_inference_steps, num_pairs=num_pairs, batch_size=batch_size, patience=patience,
        )  # fmt: skip
        check_at_least(0, seed=seed)
        needs = (
            ("keep_best", keep_best, "every_n_epochs", every_n_epochs),
            ("patience", patience, "keep_best", keep_best),
        )
        for name, value, needed, beside in needs:
            if value and not beside:
                raise ValueError(f"Argument `{name}` expected `{needed}` as well, but got none. Set both.")
        self.keep_best = keep_best
        self.patience = patience
        self.num_samples = num_samples
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.sampler = sampler
        self.num_inference_steps = num_inference_steps
        self.use_ema = use_ema
        self.seed = seed
        self.features = features
        self.feature_weights = feature_weights
        self.download = download
        self.k = k
        self.measures = list(check_measures(measures))
        self.measure_weights = measure_weights
        self.num_pairs = num_pairs
        self.pictures = pictures
        self.batch_size = batch_size
        self.report: Report | None = None
        self._features: str | None = None
        self._says = ""  # of the sampling, where the module has no method for it
        self._history = RunHistory()
        self._outcome: _Outcome | None = None
        self._course: list[dict[str, Any]] = []  # step and scores of each evaluation
        self._best: dict[str, Any] = {}
        self._waited = 0
        self._judged: int | None = None  # step of the evaluation that was last compared with the best
        self._resumed: tuple[int, bool] | None = None  # epochs before a checkpoint, and whether it is of an epoch's end

    # --- when ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Move behind all other callbacks: there the weights are final, and the last checkpoint is written."""
        if stage == "fit":
            order_callbacks(trainer)
            self._history = RunHistory()
            self._course = []
            self._best, self._waited, self._judged = {}, 0, None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether the evaluation can work, before hours of training go into it."""
        if not self.num_samples:
            return
        if trainer.is_global_zero and not _is_dev_run(trainer):
            remedy = "Give another one with `--trainer.default_root_dir`, or as `save_dir` of the logger."
            check_writable(run_folder(trainer), argument="default_root_dir", remedy=remedy)
        if said := self._prepare(trainer, pl_module):
            rank_zero_info(said)
        if self.keep_best and self._features is None:
            raise ValueError("Argument `keep_best` expected features for FID, but got none. Name some as `features`.")
        with isolated_module(pl_module):
            check_images(self._sample(1, start=0, batch_size=1, num_inference_steps=1), self._assessor.train)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; make up for an evaluation that was due when the checkpoint of a resumed run was written."""
        self._history.start()
        if self._resumed is not None and self._is_owed(trainer, *self._resumed):
            self._evaluate_in_between(trainer, pl_module)
            self._log(trainer, self._figures())
            if self.keep_best and self._is_owed_of_epoch(*self._resumed):
                self._keep_if_best(trainer, epoch=self._resumed[0], is_saved=True)

    def _is_owed(self, trainer: pl.Trainer, epoch: int, at_end: bool) -> bool:
        """Whether the evaluation of the step that a checkpoint holds is missing: it comes after the checkpoint."""
        step = trainer.global_step
        if not self.num_samples or _is_dev_run(trainer) or any(point["step"] == step for point in self._course):
            return False
        of_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        return step > 0 and (of_steps or self._is_owed_of_epoch(epoch, at_end))

    def _is_owed_of_epoch(self, epoch: int, at_end: bool) -> bool:
        return at_end and self.every_n_epochs is not None and epoch % self.every_n_epochs == 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the batch's losses into the curve, and evaluate if it is time."""
        self._history.add(outputs, epoch=trainer.current_epoch, accumulated=trainer.accumulate_grad_batches)
        if not self.num_samples or self.every_n_steps is None or _is_dev_run(trainer):
            return
        step = trainer.global_step
        evaluated = self._outcome is not None and self._outcome.step == step  # a step of several batches counts once
        if step and step % self.every_n_steps == 0 and not evaluated:
            self._evaluate_in_between(trainer, pl_module)
            self._log(trainer, self._figures())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate if it is time."""
        if not self.num_samples or self.every_n_epochs is None or _is_dev_run(trainer):
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        if self._outcome is None or self._outcome.step != trainer.global_step:
            self._evaluate_in_between(trainer, pl_module)
        assert self._outcome is not None  # noqa: S101
        pl_module.log_dict(self._figures(), sync_dist=True)
        if self.keep_best:
            self._history.pause()
            self._keep_if_best(trainer, epoch=trainer.current_epoch + 1)
            self._history.start()

    def _evaluate_in_between(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate while training goes on."""
        self._history.pause()
        # A progress bar may just have summed values over processes, on the first one alone. All processes ask for them
        # now, the others for the first time, or the next exchange between processes would mix both up.
        _ = trainer.callback_metrics
        averaging = find_callback(trainer, ParameterAveragingCallback)
        engine = None if averaging is None else averaging.engine
        with nullcontext() if engine is None else engine.average_shown():  # a round may still be going on
            self._outcome = self._evaluate(trainer, pl_module)
        self._history.start()

    def _figures(self) -> dict[str, float]:
        """Measures of the last evaluation, by the names that loggers know."""
        assert self._outcome is not None  # noqa: S101
        return self._assessor.named(self._outcome.assessment.scores)

    def _log(self, trainer: pl.Trainer, figures: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(figures), step=trainer.global_step)

    def _keep_if_best(self, trainer: pl.Trainer, *, epoch: int, is_saved: bool = False) -> None:
        """Keep a checkpoint that is better than all before without copying; stop when none has come for long.

        ``epoch`` is the number of epochs that the evaluated weights have had; ``is_saved``: whether the checkpoint from
        which the run goes on holds them.
        """
        assert self._outcome is not None  # noqa: S101
        if self._judged == trainer.global_step:  # Lightning may end an epoch again that a checkpoint was saved in
            return
        self._judged = trainer.global_step
        if not self._improves(self._outcome.assessment.scores, trainer, epoch=epoch):
            self._waited += 1
        else:
            self._waited = 0
            if not is_saved:
                trainer.save_checkpoint(self._best["file"], weights_only=False)
            elif trainer.is_global_zero:
                Path(self._best["file"]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(trainer.ckpt_path), self._best["file"])
        if self.patience is not None and self._waited >= self.patience:
            trainer.should_stop = True

    def _improves(self, scores: Scores, trainer: pl.Trainer, *, epoch: int) -> bool:
        """Note scores as the best if they are better than all before without copying, and say whether they are."""
        control = self._assessor.control.copied_fraction
        if copies_exceed(scores.copied_fraction, control, scores.num_images):
            return False
        if scores.fid >= self._best.get("fid", inf):
            return False
        file = run_folder(trainer) / "checkpoints" / BEST
        self._best = {"step": trainer.global_step, "epoch": epoch, "fid": scores.fid}
        self._best |= {"copied_fraction": scores.copied_fraction, "file": str(file)}
        return True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the final model, and leave the result in the run folder."""
        self._history.pause()
        if not self.num_samples:
            return
        bar = getattr(trainer.progress_bar_callback, "progress", None)
        if isinstance(bar, Progress):  # Lightning's, which would redraw itself under all that is still to be printed
            bar.stop()
        with final_evaluation(trainer):
            self._conclude(trainer, pl_module)

    def _conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate, unless the last step has been, and write and print the report."""
        if self._outcome is None or self._outcome.step != trainer.global_step:
            self._outcome = self._evaluate(trainer, pl_module)
        assessment = self._outcome.assessment
        run = {**describe_run(trainer, self._history), "evaluation_seconds": self._outcome.seconds}
        if self.keep_best:
            run["best_without_copies"] = self._best or None
        self.report = make_report(
            self._assessor,
            assessment.scores,
            settings=self._settings(trainer),
            run=run,
            curves=curves_of_run(trainer, self._history),
            course=self._course,
        )
        self._log(trainer, {**self._figures(), "eval/skip_rate": run["skip_rate"]})
        if trainer.is_global_zero:
            publish(
                trainer, self.report, assessor=self._assessor, assessment=assessment,
                num_pairs=self.num_pairs if self.pictures else None,
            )  # fmt: skip

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the loss for the curve; of `validate`, print the table of a checkpoint."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show(trainer, pl_module)
        elif not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            self._history.validation[trainer.current_epoch + 1] = float(trainer.callback_metrics["val/loss"])

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table of a checkpoint."""
        self._show(trainer, pl_module)

    def _show(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate a model that is not trained here, and print the table; nothing is written."""
        if not self.num_samples:
            return
        self._prepare(trainer, module)
        with ended_by_sigterm(trainer):
            scores = self._evaluate(trainer, module).assessment.scores
        run = {"threshold": 0.0, "skip_rate": 0.0}
        self.report = make_report(self._assessor, scores, settings=self._settings(trainer), run=run, curves={})
        if trainer.is_global_zero:
            print_report(self.report)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the images."""
        self._outcome = None
        for name in ("_assessor", "_membership", "_text_norm", "_sample"):
            self.__dict__.pop(name, None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save curve and time so far; all processes take part."""
        checkpoint["evaluation"] = {**self._history.state_dict(trainer.strategy), "course": self._course}
        if self.keep_best:
            checkpoint["evaluation"] |= {"best": self._best, "waited": self._waited, "judged": self._judged}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore them."""
        if "loops" in checkpoint:
            self._resumed = next_epoch(checkpoint), took_last_batch(checkpoint)
        if "evaluation" in checkpoint:
            self._history.load_state_dict(checkpoint["evaluation"])
            self._course = list(checkpoint["evaluation"].get("course", []))
            self._best = dict(checkpoint["evaluation"].get("best", {}))
            self._waited = checkpoint["evaluation"].get("waited", 0)
            self._judged = checkpoint["evaluation"].get("judged")

    # --- what ------------------------------------------------------------------------------------------------------

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        """Get ready to sample the module and to measure; return what to say of the sampling."""
        check_schedule(module, num_inference_steps=self.num_inference_steps)
        found, self._says = find_sample(module)
        self._sample = partial(found, seed=self.seed, sampler=self.sampler, use_ema=self.use_ema)
        with isolated_module(module):
            self._assessor = self._make_assessor(trainer)
        return self._says

    def _make_assessor(self, trainer: pl.Trainer) -> Assessor:
        train, control, reference = real_sets(getattr(trainer, "datamodule", None))
        agc = find_callback(trainer, AntiGradientControl)
        reference_images = None if agc is None else agc.held_out_while_training(trainer)
        if isinstance(reference_images, HeldOutImages) and reference_images.dataset is control:
            control = reference_images.others()  # those whose losses steer the training are no control any more
        if "membership_inference" in self.measures:
            check_losses(trainer.lightning_module)
            self._membership = MembershipMeasure(train, control)
        if "text_norm" in self.measures:
            check_captions(trainer.lightning_module)
            self._text_norm = TextNorm(train, control)
        return Assessor(
            train,
            control,
            reference,
            fid=self._fid(train),
            k=min(_USUAL_K, len(train)) if self.k is None else self.k,  # type: ignore[arg-type]
            num_control=self._num(trainer),
            further=self.measures,
            measure_weights=self.measure_weights,
        )

    def _fid(self, train: Dataset[Any]) -> FrechetInceptionDistance | None:
        """Build the Fréchet distance in the features that were asked for."""
        name: str | None = self.features
        if name == "auto":
            name = best_features(tuple(train[0][0].shape))
        self._features = None if name == "none" else name
        if self._features is None:
            if self.feature_weights is not None:
                raise ValueError(
                    f"Argument `features` expected the network of `feature_weights`, '{self.feature_weights}', but got "
                    f"'{self.features}', for which there is none."
                )
            return None
        with arguments_called(name="features", weights="feature_weights"):
            return frechet_distance(self._features, weights=self.feature_weights, download=self.download)

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule) -> "_Outcome":
        """Sample a part of the images on each process; then each process measures all of them, and none waits."""
        began = time.monotonic()
        steps = min(self.num_inference_steps, 2) if _is_dev_run(trainer) else self.num_inference_steps
        sample = partial(self._sample, num_inference_steps=steps)
        with isolated_module(module):
            num, device = self._num(trainer), module.device
            images = sample_on_all_processes(trainer, sample, num, batch_size=self.batch_size, device=device)
            check_images(images, self._assessor.train)
            assessment = self._assessor.to(device).assess(images)
            if "membership_inference" in self.measures:
                assessment.scores.further.update(self._membership(module, use_ema=self.use_ema))
            if "text_norm" in self.measures:
                assessment.scores.further.update(self._text_norm(module, use_ema=self.use_ema))
        self._course.append({"step": trainer.global_step, **asdict(assessment.scores)})
        return _Outcome(trainer.global_step, assessment, time.monotonic() - began)

    def _settings(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Return the settings that were used: with the features that ``"auto"`` has found, and the weights it has."""
        # A method `sample` of one's own may keep an average under another name; parts are sampled as they are trained.
        averaged = self.use_ema and not self._says and getattr(trainer.lightning_module, "ema", self) is not None
        used = {"num_samples": self._num(trainer), "use_ema": averaged, "features": self._features}
        used["k"] = self._assessor.k
        return {name: getattr(self, name) for name in _SETTINGS} | used

    def _num(self, trainer: pl.Trainer) -> int:
        """Number of images; a few in a ``fast_dev_run``."""
        return min(self.num_samples, 4) if _is_dev_run(trainer) else self.num_samples


@dataclass(frozen=True)
class _Outcome:
    """One evaluation: after which step, its result, and how long it took."""

    step: int
    assessment: Assessment
    seconds: float


def _is_dev_run(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
