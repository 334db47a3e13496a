"""The evaluation that ends every run: it decides when images are drawn and scored, and who hears of it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import lightning.pytorch as pl
import rich
import torch
from torch import Tensor

from lightning_iet.callbacks.anti_gradient_control import AntiGradientControl
from lightning_iet.callbacks.loss_history import LossHistory
from lightning_iet.callbacks.parameter_averaging import ParameterAveragingCallback
from lightning_iet.metrics import feature_extractor, frechet_distance
from lightning_iet.tools.assessment import Assessor, Closeness, Scores, fingerprint
from lightning_iet.tools.drawing import draw_images
from lightning_iet.tools.report import METRICS_FILE, Report, report_table, write_pictures, write_report
from lightning_iet.tools.run_folder import check_writable, run_folder
from lightning_iet.utilities.random import isolated_rng

__all__ = ["Evaluation"]

_SETS = ("train_set", "control_set", "reference_set")
_DEV_RUN = {"num_samples": 4, "num_inference_steps": 2}  # enough to see that the evaluation of the real run will work


class Evaluation(pl.Callback):
    """Draws images and tells how good they are, and whether they are copies of training images.

    At the end of training it prints a table, in which each figure stands beside that of held-out real images, and writes
    into the run folder: ``samples.png``; ``nearest.png``, the generated images closest to a training image beside it;
    ``curves.png``, loss and skip rate; ``mq.png``; and ``metrics.json`` with all figures and settings. The run's loggers
    get ``eval/fid``, ``eval/memorized_fraction`` and ``eval/mq_0.15`` … (as shares of the images), each also with
    ``_control``, and ``eval/fid_train``, the FID of the training images themselves.

    The training course is the same with and without it: random generators and training modes are put back. It works on
    the average of the shards, behind all other callbacks. Several processes draw a part each; the first one scores all.

    The data module needs ``train_set``, ``control_set`` and ``reference_set``, the module
    ``sample(num, *, seed, start, batch_size, sampler, num_inference_steps, use_ema)``, as
    :class:`~lightning_iet.DiffusionModule` has it.

    Args:
        num_samples: images to draw; 0 switches the evaluation off. The control has at most as many, for FID depends on
            the number. *(our choice: 512, which small runs can afford; 50,000 is usual for published FIDs, 65,536 for
            published MQ)*
        every_n_epochs: also evaluate after every so many epochs, for the loggers only. ``None`` = at the end alone.
        sampler: ``"ddim"`` or ``"ddpm"``, the ancestral sampler (published MQ uses it, with 1,000 steps, raw weights).
        num_inference_steps: denoiser calls per image.
        use_ema: draw with the averaged weights, where the module keeps them.
        seed: of the images.
        features: features of FID: ``"digits"``, a small classifier in this package, or ``"inception"``.
        feature_weights: a local file with the weights of ``features``.
        download: whether weights may be downloaded when there is no file.
        k: nearest training images in the mean of MQ.
        num_pairs: images that ``nearest.png`` shows.
        batch_size: at most so many images are drawn at once.

    Raises:
        ValueError: an argument is out of range; or, before training starts, sets are missing or too small, ``k`` exceeds
            the training set, or the run folder cannot be written.
        TypeError: before training starts: the module cannot draw images.

    Example:
        >>> from lightning_iet import DigitsDataModule
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
        features: Literal["digits", "inception"] = "digits",
        feature_weights: Path | None = None,
        download: bool = False,
        k: int = 50,
        num_pairs: int = 16,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        if num_samples < 0 or num_samples == 1:
            raise ValueError(
                f"Argument `num_samples` expected an integer ≥ 2, or 0 for no evaluation, but got {num_samples}."
            )
        for name, value in (
            ("every_n_epochs", every_n_epochs),
            ("num_inference_steps", num_inference_steps),
            ("num_pairs", num_pairs),
            ("batch_size", batch_size),
        ):
            if value is not None and value < 1:
                raise ValueError(f"Argument `{name}` expected an integer ≥ 1, but got {value}.")
        if sampler not in ("ddim", "ddpm"):
            raise ValueError(f"Argument `sampler` expected 'ddim' or 'ddpm', but got {sampler!r}.")
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
        self.num_pairs = num_pairs
        self.batch_size = batch_size

        self.report: Report | None = None
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.history = LossHistory()
        self._outcome: _Outcome | None = None
        self._seconds = 0.0  # of training alone, up to `_since`
        self._since: float | None = None

    # --- when ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Go behind all other callbacks: there the weights are final, and the last checkpoint is written."""
        if stage == "fit":
            trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]  # type: ignore[attr-defined]
            self._start_afresh()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out whether the evaluation can work, before hours of training go into it."""
        if not self.num_samples:
            return
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            remedy = "Give another one with `--trainer.default_root_dir`, or as `save_dir` of the logger."
            check_writable(run_folder(trainer), argument="default_root_dir", remedy=remedy)
        check_module(pl_module, num_inference_steps=self.num_inference_steps)
        self._assessor = self._make_assessor(trainer)
        with undisturbed(pl_module):
            check_images(self._sample(pl_module, num_inference_steps=1)(1), self._assessor.train)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the batch's losses into the curve."""
        self.history.add(outputs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the epoch's curve, and evaluate if it is time."""
        self.history.end_epoch(trainer.strategy)
        due = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and self.num_samples and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._stop_clock()
            with average_of_shards(trainer):
                self._outcome = self._evaluate(trainer, pl_module)
            pl_module.log_dict(trainer.strategy.broadcast(self._values()), sync_dist=True)
            self._since = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the final model, and leave the result in the run folder."""
        self._stop_clock()
        if not self.num_samples:
            return
        if self._outcome is None or self._outcome.step != trainer.global_step:
            self._outcome = self._evaluate(trainer, pl_module)
        if trainer.is_global_zero:
            self.report = self._make_report(trainer)
            self._publish(trainer)
        trainer.strategy.barrier("evaluation")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the images."""
        self._outcome = None
        self.__dict__.pop("_assessor", None)

    def state_dict(self) -> dict[str, Any]:
        """The curve and the seconds so far, for a run that goes on."""
        return {"loss_by_epoch": self.history.values(), "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was."""
        self.history.load(state_dict["loss_by_epoch"])
        self._seconds = state_dict["seconds"]

    # --- what ------------------------------------------------------------------------------------------------------

    def _make_assessor(self, trainer: pl.Trainer) -> Assessor:
        with isolated_rng(seed=self.seed):
            return Assessor(
                *held_out_sets(getattr(trainer, "datamodule", None)),
                fid=frechet_distance(self.features, weights=self.feature_weights, download=self.download),
                k=self.k,
                num_control=self._num(trainer),
            )

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule) -> "_Outcome":
        """Draws images on all processes, and scores them on the first."""
        began = time.monotonic()
        steps = min(self.num_inference_steps, _DEV_STEPS) if _is_dev_run(trainer) else self.num_inference_steps
        with undisturbed(module):
            sample = self._sample(module, num_inference_steps=steps)
            images = draw_images(
                trainer, sample, self._num(trainer), batch_size=self.batch_size, device=module.device
            )
            if not trainer.is_global_zero:
                return _Outcome(trainer.global_step)
            assessor = self._assessor.to(module.device)
            closeness = assessor.closeness(images)
            scores = assessor.scores(images, closeness)
            return _Outcome(trainer.global_step, images, closeness, scores, time.monotonic() - began)
