"""The evaluation that ends every run: it decides when images are drawn and scored, and who hears of it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from lightning_iet.callbacks.anti_gradient_control.reference import HeldOutImages
from lightning_iet.callbacks.parameter_averaging.callback import ParameterAveragingCallback
from lightning_iet.evaluation.assessment import (
    Assessment,
    Assessor,
    check_images,
    check_losses,
    check_module,
    check_settings,
    draw_images,
    finish_training_bar,
    real_sets,
)
from lightning_iet.evaluation.measures import Measure, Membership, check_measures
from lightning_iet.evaluation.report import Report, make_report, publish
from lightning_iet.metrics.frechet import frechet_distance
from lightning_iet.utilities.files import check_writable, run_folder
from lightning_iet.utilities.lightning import find_callback
from lightning_iet.utilities.random import isolated_module


class RunHistory:
    """Mean loss of all samples of each epoch (also of those that anti-gradient control leaves out), and a stop watch.

    Sums stay on the device, and on their process, until somebody asks for them.

    Example:
        >>> from lightning.pytorch.strategies import SingleDeviceStrategy
        >>> history = RunHistory()
        >>> history.add({"loss": torch.tensor(9.0), "sample_loss": torch.tensor([1.0, 2.0])}, epoch=0)
        >>> history.add({"loss": torch.tensor(3.0)}, epoch=0)
        >>> history.losses(SingleDeviceStrategy())
        [2.0]
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # by epoch, (2,): sum and number of the losses of this process
        self._earlier: dict[int, list[float]] = {}  # the same of all processes, before the run was taken up again
        self._seconds = 0.0
        self._since: float | None = None

    def add(self, outputs: Any, *, epoch: int) -> None:
        """Takes in what a training step returned: ``sample_loss`` (B,) where there is one, else ``loss``."""
        losses = outputs.get("sample_loss", outputs.get("loss")) if isinstance(outputs, Mapping) else None
        if isinstance(losses, Tensor):
            losses = losses.detach().float()
            batch = torch.stack([losses.sum(), torch.ones_like(losses).sum()])
            before = self._sums.get(epoch)
            self._sums[epoch] = batch if before is None else before.to(batch.device) + batch
        elif outputs is None:
            # A step in which this process waits for others: its epoch counts, so that all have the same ones.
            self._sums.setdefault(epoch, torch.zeros(2))

    def losses(self, strategy: Strategy) -> list[float]:
        """Mean loss of each epoch over all processes, every one of which has to ask."""
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
        """Lets the time run."""
        self._since = time.monotonic()

    def pause(self) -> None:
        """Stops the time, for what is not training."""
        self._seconds, self._since = self.seconds(), None

    def seconds(self) -> float:
        """Seconds between starts and pauses so far."""
        return self._seconds + (0 if self._since is None else time.monotonic() - self._since)

    def state_dict(self, strategy: Strategy) -> dict[str, Any]:
        """Plain numbers of all processes, every one of which has to ask."""
        return {"losses": self._totals(strategy), "seconds": self.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was, in the middle of an epoch too."""
        self._earlier, self._seconds = dict(state_dict["losses"]), state_dict["seconds"]


def facts_of_run(trainer: pl.Trainer, history: RunHistory) -> Mapping[str, Any]:
    """Length of the training, its shards, and the skip rate of anti-gradient control (threshold 0: it was off).

    With a reference to unseen images also the gap, see :meth:`~lightning_iet.callbacks.AntiGradientControl.gap`.
    """
    agc, averaging = find_callback(trainer, AntiGradientControl), find_callback(trainer, ParameterAveragingCallback)
    shards = 1 if averaging is None else averaging.num_shards
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": history.seconds(),
        "processes": trainer.world_size,
        "num_shards": trainer.world_size if shards is None else shards,
        "threshold": 0.0 if agc is None else agc.threshold,
        "skip_rate": 0.0 if agc is None else float(agc.skip_rate()),
        "num_timesteps": None if agc is None else agc.num_timesteps,
        "reference": "train" if agc is None else agc.reference,
        "gap": None if agc is None or isnan(agc.gap()) else agc.gap(),
    }


def curves_of_run(trainer: pl.Trainer, history: RunHistory) -> Mapping[str, list[float] | None]:
    """Loss by epoch, and skip rate and loss by timestep where anti-gradient control watched them."""
    agc = find_callback(trainer, AntiGradientControl)
    return {
        "loss_by_epoch": history.losses(trainer.strategy),
        "skip_rate_by_timestep": None if agc is None else agc.skip_rate_by_timestep().tolist(),
        "loss_by_timestep": None if agc is None else agc.loss_by_timestep().tolist(),
        "unseen_loss_by_timestep": None if agc is None else agc.unseen_loss_by_timestep().tolist(),
    }


def without_unseen(trainer: pl.Trainer, control: Dataset[Any]) -> Dataset[Any]:
    """The control images but for those by which anti-gradient control steers training: they are no control any more."""
    agc = find_callback(trainer, AntiGradientControl)
    images = None if agc is None else agc.unseen_images
    return images.others() if isinstance(images, HeldOutImages) and images.dataset is control else control


@contextmanager
def average_of_shards(trainer: pl.Trainer) -> Iterator[None]:
    """Lets the model show the average of the shard models, also where a round is still going on.

    Args:
        trainer: a trainer at work; without :class:`ParameterAveragingCallback` nothing changes.
    """
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ParameterAveragingCallback) and callback.engine is not None:
                stack.enter_context(callback.engine.average_shown())
        yield


_SETTINGS = ("num_samples", "sampler", "num_inference_steps", "use_ema", "seed", "features", "k")


class Evaluation(pl.Callback):
    """Draws images and tells how good they are, and whether they are copies of training images.

    At the end of training it prints a table, in which each figure stands beside that of held-out real images, and
    writes into the run folder ``metrics.json`` with all figures and settings, and four pictures: ``samples.png``;
    ``nearest.png``, the generated images closest to a training image, beside it; ``curves.png``, loss and skip rate;
    and ``mq.png``. The run's loggers get ``eval/fid``, ``eval/memorized_fraction`` and ``eval/mq_0.15`` … (as shares of
    the images), each also with ``_control``, and ``eval/fid_train``, the FID of the training images themselves; at the
    end also ``eval/skip_rate``, the share of all samples that anti-gradient control left out. Those that take pictures,
    as Weights & Biases does, get ``eval/samples``, ``eval/nearest``, ``eval/curves`` and ``eval/mq``.

    Training takes the same course with and without it: random generators and training modes are put back. It sees the
    average of the shards, behind all other callbacks. Several processes draw a part each; the first one scores all.
    With ``fast_dev_run`` it scores a few images, to see that it will work, and keeps nothing.

    The data module needs ``train_set``, ``control_set`` and ``reference_set``; the module needs
    ``sample(num, *, seed, start, batch_size, sampler, num_inference_steps, use_ema)``, as
    :class:`~lightning_iet.DiffusionModule` has it.

    Args:
        num_samples: images to draw; 0 switches the evaluation off. The control has at most as many, for FID depends on
            the number. *(our choice: 512, which small runs can afford; 50,000 is usual for published FIDs, and 65,536
            was published for MQ)*
        every_n_epochs: evaluate also after every so many epochs, for the loggers only. ``None`` = at the end alone.
        sampler: ``"ddim"`` or ``"ddpm"``, the ancestral sampler (published MQ: with 1,000 steps, raw weights).
        num_inference_steps: denoiser calls per image.
        use_ema: draw with the averaged weights, where the module keeps them.
        seed: of the images.
        features: features of FID: ``"digits"``, a small classifier in this package, ``"inception"``,
            ``"efficientnet"``, or another of :func:`~lightning_iet.metrics.feature_extractor`.
        feature_weights: a local file with the weights of ``features``.
        download: whether these may be downloaded when there is no file.
        k: nearest training images in the mean of MQ.
        measures: further measures, each logged as ``eval/…`` (``eval/precision``, ``eval/mifid``,
            ``eval/membership_inference_auc`` …) and, where it is one of images, also for the control. Those that
            compare features do it in ``features``.
        measure_weights: files for measures with a network of their own, ``clean_fid`` and ``sscd_similarity``.
        num_pairs: images that ``nearest.png`` shows.
        batch_size: at most so many images are drawn at once.

    Attributes:
        report: what ``metrics.json`` holds, once training has ended.

    Raises:
        ValueError: an argument is out of range; or, before training starts, sets are missing or too small, ``k``
            exceeds the training set, or the run folder cannot be written.
        TypeError: before training starts: the module cannot draw images.

    Example:
        >>> evaluation = Evaluation(256, every_n_epochs=10, k=20)
        >>> trainer = pl.Trainer(callbacks=[evaluation], accelerator="cpu", logger=False)  # then trainer.fit(…)
        >>> evaluation.num_samples
        256
    """

    def __init__(
        self,
        num_samples: int = 512,
        *,
        every_n_epochs: int | None = None,
        sampler: Literal["ddim", "ddpm"] = "ddim",
        num_inference_steps: int = 50,
        use_ema: bool = True,
        seed: int = 0,
        features: str = "digits",
        feature_weights: Path | None = None,
        download: bool = False,
        k: int = 50,
        measures: Sequence[Measure] = (),
        measure_weights: Mapping[str, Path] | None = None,
        num_pairs: int = 16,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        check_settings(
            num_samples, sampler, every_n_epochs=every_n_epochs, num_inference_steps=num_inference_steps,
            num_pairs=num_pairs, batch_size=batch_size,
        )  # fmt: skip
        self.num_samples = num_samples
        self.every_n_epochs = every_n_epochs
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
        self.batch_size = batch_size
        self.report: Report | None = None
        self._history = RunHistory()
        self._outcome: _Outcome | None = None

    # --- when ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Go behind all other callbacks: there the weights are final, and the last checkpoint is written."""
        if stage == "fit":
            others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
            self._history = RunHistory()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether the evaluation can work, before hours of training go into it."""
        if not self.num_samples:
            return
        if trainer.is_global_zero and not _is_dev_run(trainer):
            remedy = "Give another one with `--trainer.default_root_dir`, or as `save_dir` of the logger."
            check_writable(run_folder(trainer), argument="default_root_dir", remedy=remedy)
        check_module(pl_module, num_inference_steps=self.num_inference_steps)
        with isolated_module(pl_module):
            self._assessor = self._make_assessor(trainer)
            check_images(self._sample(pl_module, 1, start=0, batch_size=1, steps=1), self._assessor.train)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._history.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the batch's losses into the curve."""
        self._history.add(outputs, epoch=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate if it is time."""
        if not self._is_due(trainer):
            return
        self._history.pause()
        # A progress bar may just have had values summed over processes, on the first one alone. Everyone now asks for
        # them, the others for the first time, or the next exchange between processes would be a mix-up.
        _ = trainer.callback_metrics
        with average_of_shards(trainer):
            self._outcome = self._evaluate(trainer, pl_module)
        pl_module.log_dict(self._assessor.named(self._outcome.assessment.scores), sync_dist=True)
        self._history.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the final model, and leave the result in the run folder."""
        self._history.pause()
        if not self.num_samples:
            return
        finish_training_bar(trainer)
        if self._outcome is None or self._outcome.step != trainer.global_step:
            self._outcome = self._evaluate(trainer, pl_module)
        assessment = self._outcome.assessment
        run = {**facts_of_run(trainer, self._history), "evaluation_seconds": self._outcome.seconds}
        self.report = make_report(
            self._assessor,
            assessment.scores,
            settings={name: getattr(self, name) for name in _SETTINGS} | {"num_samples": self._num(trainer)},
            run=run,
            curves=curves_of_run(trainer, self._history),
        )
        figures = {**self._assessor.named(assessment.scores), "eval/skip_rate": run["skip_rate"]}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)
        if trainer.is_global_zero:
            publish(trainer, self.report, assessment=assessment, train=self._assessor.train, num_pairs=self.num_pairs)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the images."""
        self._outcome = None
        for name in ("_assessor", "_membership"):
            self.__dict__.pop(name, None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep curve and time so far; all processes take part."""
        checkpoint["evaluation"] = self._history.state_dict(trainer.strategy)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with them."""
        if "evaluation" in checkpoint:
            self._history.load_state_dict(checkpoint["evaluation"])

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if not self.num_samples or self.every_n_epochs is None or _is_dev_run(trainer):
            return False
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    # --- what ------------------------------------------------------------------------------------------------------

    def _make_assessor(self, trainer: pl.Trainer) -> Assessor:
        train, control, reference = real_sets(getattr(trainer, "datamodule", None))
        control = without_unseen(trainer, control)
        if "membership_inference" in self.measures:
            check_losses(trainer.lightning_module)
            self._membership = Membership(train, control)
        return Assessor(
            train,
            control,
            reference,
            fid=frechet_distance(self.features, weights=self.feature_weights, download=self.download),
            k=self.k,
            num_control=self._num(trainer),
            further=self.measures,
            measure_weights=self.measure_weights,
        )

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule) -> "_Outcome":
        """All processes draw a part of the images each; then each scores all of them, and nobody waits."""
        began = time.monotonic()
        steps = min(self.num_inference_steps, 2) if _is_dev_run(trainer) else self.num_inference_steps
        sample = partial(self._sample, module, steps=steps)
        with isolated_module(module):
            images = draw_images(trainer, sample, self._num(trainer), batch_size=self.batch_size, device=module.device)
            check_images(images, self._assessor.train)
            assessment = self._assessor.to(module.device).assess(images)
            if "membership_inference" in self.measures:
                assessment.scores.further.update(self._membership(module, use_ema=self.use_ema))
        return _Outcome(trainer.global_step, assessment, time.monotonic() - began)

    def _sample(self, module: pl.LightningModule, num: int, *, start: int, batch_size: int, steps: int) -> Tensor:
        return module.sample(  # type: ignore[operator]
            num,
            seed=self.seed,
            start=start,
            batch_size=batch_size,
            sampler=self.sampler,
            num_inference_steps=steps,
            use_ema=self.use_ema,
        )

    def _num(self, trainer: pl.Trainer) -> int:
        """Number of images: a few where a run only tries whether everything works."""
        return min(self.num_samples, 4) if _is_dev_run(trainer) else self.num_samples


@dataclass(frozen=True)
class _Outcome:
    """One evaluation: after which step, its result, and how long it took."""

    step: int
    assessment: Assessment
    seconds: float


def _is_dev_run(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
