"""Timesteps: which entry of the loss bank they belong to, and what is counted, logged and plotted by them."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_iet.functional.anti_gradient import is_finite
from lightning_iet.functional.binning import bin_index, equal_probability_edges
from lightning_iet.plots import loss_gap, save_figure
from lightning_iet.utilities.files import run_folder
from lightning_iet.utilities.lightning import log_image, log_values

_SAMPLES_PER_BIN = 10


class TimestepBins:
    """Bins of the timesteps, of one kind for a whole run, told from its first batch.

    - *discrete*: integers in [0, ``num_timesteps``), also as whole floating-point numbers. One bin each, or
      ``num_bins`` equal ones;
    - *continuous*: anything else. Bins of equal probability under the training distribution, learnt from the first
      ``10 * num_bins`` timesteps: the bins are the quantiles of what was seen so far, and stay as they are after that
      *(our choice: AGC is at work from the first batch on, and a bin's place in the order hardly moves)*.

    Looking up a bin never waits for the device; only :meth:`inspect`, once per fit, does.

    Args:
        num_timesteps: Number of timesteps of the noise schedule.
        num_bins: Number of bins; default: ``num_timesteps``.

    Attributes:
        continuous: The kind; None before the first batch.
        edges: Inner edges of the continuous bins, shape (num_bins - 1,), float32.

    Example:
        >>> bins = TimestepBins(num_timesteps=1000, num_bins=2)
        >>> sigmas = torch.tensor([0.1, 0.2, 5.0, 80.0])
        >>> bins.inspect(sigmas)
        >>> bins.index(sigmas)
        tensor([0, 0, 1, 1])
    """

    def __init__(self, num_timesteps: int, num_bins: int | None = None) -> None:
        self.num_timesteps = num_timesteps
        self.num_bins = num_timesteps if num_bins is None else num_bins
        self.continuous: bool | None = None
        self.edges = torch.zeros(self.num_bins - 1)
        self._samples = torch.zeros(_SAMPLES_PER_BIN * self.num_bins)
        self._num_samples = 0

    def inspect(self, timesteps: Tensor) -> None:
        """Look at the first batch on the host: settle the kind, and refuse values that cannot be timesteps.

        Raises:
            ValueError: If a value is not finite, or a discrete timestep is out of range.
        """
        values = timesteps.detach().double().cpu()
        if not values.isfinite().all():
            raise ValueError("Argument `timesteps` expected finite numbers, but got NaN or infinity. Draw others.")
        if self.continuous is None:
            whole = bool((values == values.round()).all()) and float(values.max()) > 1
            self.continuous = timesteps.is_floating_point() and not whole
        outside = values[(values < 0) | (values >= self.num_timesteps)]
        if not self.continuous and len(outside):
            raise self.range_error(f"{outside[0]:g}")

    def range_error(self, found: str) -> ValueError:
        """What to raise when timesteps are out of range."""
        return ValueError(
            f"Argument `timesteps` expected values in [0, {self.num_timesteps}), but got {found}."
            " Set `num_timesteps` of AntiGradientControl to that of the noise schedule."
        )

    def index(self, timesteps: Tensor) -> Tensor:
        """Bins of a training batch, (B,), integers; continuous ones are learnt from it first."""
        if self.continuous:
            self._learn(timesteps.detach())
        return self.locate(timesteps)

    def locate(self, timesteps: Tensor) -> Tensor:
        """Bins of a batch from which nothing is learnt, (B,), integers."""
        if self.continuous:
            return bin_index(timesteps.detach(), self.edges)
        steps = timesteps.long().clamp(0, self.num_timesteps - 1)
        return steps if self.num_bins == self.num_timesteps else steps * self.num_bins // self.num_timesteps

    def out_of_range(self, timesteps: Tensor) -> Tensor:
        """Number of discrete timesteps outside [0, num_timesteps), scalar; :meth:`index` takes them for the nearest."""
        outside = (timesteps < 0) | (timesteps >= self.num_timesteps)
        return torch.zeros_like(outside[:1]).sum() if self.continuous else outside.sum()

    def _learn(self, timesteps: Tensor) -> None:
        start, room = self._num_samples, len(self._samples) - self._num_samples
        if room <= 0:
            return
        news = timesteps[:room]
        self._num_samples += len(news)  # counted on the host: nobody waits
        self._samples[start : self._num_samples] = news
        self.edges.copy_(equal_probability_edges(self._samples[: self._num_samples], self.num_bins))

    def to(self, device: torch.device) -> "TimestepBins":
        """Move to a device, into tensors of its own."""
        self.edges = self.edges.to(device, copy=True)
        self._samples = self._samples.to(device, copy=True)
        return self

    def describe(self) -> str:
        """A few words for the log."""
        if self.continuous:
            return f"{self.num_bins} bins of equal probability, learnt from the first {len(self._samples)} timesteps"
        kind = "one per timestep" if self.num_bins == self.num_timesteps else f"of {self.num_timesteps} timesteps"
        return f"{self.num_bins} bins, {kind}"

    def shard_state(self) -> dict[str, Tensor]:
        """References to what shards do not share: each learns its bins from its own first batches."""
        return {"edges": self.edges, "samples": self._samples, "num_samples": torch.tensor(self._num_samples)}

    def load_shard_state(self, state: dict[str, Tensor]) -> None:
        """Put another shard's bins in place, by reference."""
        self.edges, self._samples = state["edges"], state["samples"]
        self._num_samples = int(state["num_samples"])


class TimestepStatistics(nn.Module):
    """Counts and sums by T timesteps (or bins of them) that stay on the device.

    A sample whose loss is NaN or infinite is not counted *(our choice: one of them would spoil every sum for good)*.

    Attributes:
        seen: Samples by timestep, shape (T,), int64.
        skipped: Those of them that were left out of the loss, shape (T,), int64.
        loss_sum: Sum of their losses, left out or not, shape (T,), float32.
        unseen: Unseen images by timestep, shape (T,), int64.
        unseen_loss_sum: Sum of their losses, shape (T,), float32.
        out_of_range: Samples whose timestep is not in [0, T), scalar, int64.

    Example:
        >>> statistics = TimestepStatistics(4)
        >>> statistics.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), keep=torch.tensor([True, False]))
        >>> statistics.skip_rate()
        tensor(0.5000)
        >>> statistics.mean_by_timestep("loss_sum", num_bins=2)
        tensor([2., nan])
    """

    seen: Tensor
    skipped: Tensor
    loss_sum: Tensor
    unseen: Tensor
    unseen_loss_sum: Tensor
    out_of_range: Tensor

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        for name in ("seen", "skipped", "unseen"):
            self.register_buffer(name, torch.zeros(num_timesteps, dtype=torch.long))
        for name in ("loss_sum", "unseen_loss_sum"):
            self.register_buffer(name, torch.zeros(num_timesteps))
        self.register_buffer("out_of_range", torch.zeros((), dtype=torch.long))

    def update(self, losses: Tensor, timesteps: Tensor, *, keep: Tensor) -> None:
        """Count a batch: losses without graph, timesteps in [0, T), and which samples stay in the loss; all (B,)."""
        finite = is_finite(losses)
        self.seen.index_add_(0, timesteps, finite.long())
        self.skipped.index_add_(0, timesteps, (finite & ~keep).long())
        self.loss_sum.index_add_(0, timesteps, torch.where(finite, losses, 0).float())

    def update_unseen(self, losses: Tensor, timesteps: Tensor) -> None:
        """Count a batch of unseen images: losses without graph, and timesteps in [0, T); both (B,)."""
        finite = is_finite(losses)
        self.unseen.index_add_(0, timesteps, finite.long())
        self.unseen_loss_sum.index_add_(0, timesteps, torch.where(finite, losses, 0).float())

    def add(self, other: "TimestepStatistics") -> None:
        """Add the sums of another, in place."""
        for total, buffer in zip(self.buffers(), other.buffers(), strict=True):
            total += buffer

    def copy_to(self, device: torch.device) -> "TimestepStatistics":
        """Make a copy on a device; it shares no memory with this one."""
        copied = TimestepStatistics(len(self.seen)).to(device)
        copied.load_state_dict(self.state_dict())
        return copied

    def reset(self) -> None:
        """Set every sum to zero, in place."""
        for buffer in self.buffers():
            buffer.zero_()

    def skip_rate(self) -> Tensor:
        """Share of samples left out, scalar in [0, 1]; 0 if none was seen."""
        return self.skipped.sum() / self.seen.sum().clamp(min=1)

    def mean_by_timestep(self, name: str, num_bins: int) -> Tensor:
        """Divide a sum, ``"skipped"``, ``"loss_sum"`` or ``"unseen_loss_sum"``, by its number of samples in equal bins.

        Returns:
            Float tensor of shape (num_bins,) on the CPU, at most (T,), smallest timesteps first; NaN where no sample
            was seen.

        Raises:
            ValueError: If ``num_bins`` is less than 1.
        """
        if num_bins < 1:
            raise ValueError(f"Argument `num_bins` expected at least 1, but got {num_bins}.")
        counted = "unseen" if name == "unseen_loss_sum" else "seen"
        total, number = self.by_timestep((name, counted), num_bins)
        return (total / number).float()

    def by_timestep(self, names: Sequence[str], num_bins: int) -> Tensor:
        """Add up these buffers in equal bins of the timestep, by :func:`in_bands`; float64, on the CPU."""
        return in_bands(torch.stack([self.get_buffer(name).cpu().double() for name in names]), num_bins)


def in_bands(sums: Tensor, num_bands: int) -> Tensor:
    """Sum the columns of a (k, T) tensor within equal ranges of the timestep; returns (k, min(num_bands, T)).

    Example:
        >>> in_bands(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2)
        tensor([[3., 7.]])
    """
    rows, num_timesteps = sums.shape
    num_bands = min(num_bands, num_timesteps)
    return sums.new_zeros(rows, num_bands).index_add(1, torch.arange(num_timesteps) * num_bands // num_timesteps, sums)


def named_by_band(means: Mapping[str, Tensor]) -> dict[str, float]:
    """Name the values of each band, ``name/bin_0`` …, but NaN, for loggers.

    Example:
        >>> named_by_band({"loss": torch.tensor([0.5, float("nan"), 0.25])})
        {'loss/bin_0': 0.5, 'loss/bin_2': 0.25}
    """
    rows = {name: enumerate(values.tolist()) for name, values in means.items()}
    return {f"{name}/bin_{band}": value for name, row in rows.items() for band, value in row if not isnan(value)}


_SUMS = ("seen", "loss_sum", "skipped", "unseen", "unseen_loss_sum")
NUM_BANDS = 10
_MAX_ROWS = 128


class GapHistory:
    r"""Sums of each epoch in ten equal bands of the timestep; of long runs, of several epochs together.

    The *gap* in a band is :math:`1 - \bar{l}_\text{train} / \bar{l}_\text{unseen}`: 0 where the model denoises its
    training images no better than images that it does not train on, 1 where it has memorised them.

    Attributes:
        rows: Sums, shape (n, 5, bands), float64, on the CPU; at most 128 rows.
        width: Number of epochs in a row; the last row may not be full yet.

    Example:
        >>> statistics = TimestepStatistics(4)
        >>> statistics.update(torch.ones(4), torch.arange(4), keep=torch.ones(4).bool())
        >>> statistics.update_unseen(torch.full((4,), 2.0), torch.arange(4))
        >>> history = GapHistory()
        >>> history.add(statistics)
        >>> history.gap()
        tensor([0.5000, 0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.rows = torch.zeros(0, len(_SUMS), 0, dtype=torch.float64)
        self.width = 1
        self._filled = 0  # epochs in the last row; 0 = the next epoch begins one

    @classmethod
    def of(cls, epoch: TimestepStatistics) -> "GapHistory":
        """The history of a single epoch."""
        history = cls()
        history.add(epoch)
        return history

    def add(self, epoch: TimestepStatistics) -> None:
        """Add the sums of an epoch of all processes."""
        sums = epoch.by_timestep(_SUMS, NUM_BANDS)
        if not self._filled:
            self.rows = torch.cat([self.rows.reshape(-1, *sums.shape), torch.zeros_like(sums)[None]])
        self.rows[-1] += sums
        self._filled = (self._filled + 1) % self.width
        if len(self.rows) == _MAX_ROWS and not self._filled:
            self.rows = self.rows.unflatten(0, (-1, 2)).sum(1)
            self.width *= 2

    def means(self) -> dict[str, Tensor]:
        """Training loss, unseen loss and skip rate in each row and band, (n, bands); NaN where nothing was seen."""
        seen, losses, skipped, unseen, unseen_losses = self.rows.unbind(1)
        return {"training_loss": losses / seen, "unseen_loss": unseen_losses / unseen, "skip_rate": skipped / seen}

    def gap(self, rows: int = 1) -> Tensor:
        """The gap in each band over the last rows, (bands,); NaN where nothing was seen."""
        seen, losses, _, unseen, unseen_losses = self.rows[-rows:].sum(0)
        return 1 - (losses / seen) / (unseen_losses / unseen)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"rows": self.rows.clone(), "width": self.width, "filled": self._filled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.rows, self.width = state_dict["rows"].cpu().clone(), state_dict["width"]
        self._filled = state_dict["filled"]


def gap_metrics(epoch: GapHistory) -> tuple[Tensor | None, dict[str, float]]:
    """Return what is logged of a single epoch.

    The mean gap over all bands where both losses are known (None where nowhere), and training loss, unseen loss and
    skip rate by band, without those where nothing was seen.
    """
    gaps = epoch.gap()
    known = gaps[gaps.isfinite()]
    by_band = named_by_band({name: means[0] for name, means in epoch.means().items()})
    return (known.mean().float() if len(known) else None), by_band


def log_gap(trainer: pl.Trainer, module: pl.LightningModule, epoch: GapHistory, *, prefix: str) -> None:
    """Log the gap of an epoch, also for the progress bar and other callbacks, and its losses by band."""
    gap, by_band = gap_metrics(epoch)
    if gap is not None:
        module.log(f"{prefix}gap", gap, prog_bar=True)
    log_values(trainer, {f"{prefix}{name}": value for name, value in by_band.items()})


def plot_gap(trainer: pl.Trainer, history: GapHistory, *, prefix: str, num_timesteps: int) -> None:
    """Plot the losses of a run over time into its folder, and for loggers that take pictures.

    Nothing is plotted without a logger. The prefix ``agc/`` makes ``gap.png``, ``agc/model.unet/``
    ``gap-model.unet.png``.
    """
    if not trainer.loggers or trainer.fast_dev_run or not len(history.rows):  # type: ignore[attr-defined]
        return
    figure = loss_gap(**history.means(), epochs_per_row=history.width, num_timesteps=num_timesteps)
    _, *which, _ = prefix.split("/")
    path = run_folder(trainer) / f"{'-'.join(['gap', *which])}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    rank_zero_info(f"AntiGradientControl: training and unseen losses over time are plotted in {path}")
    log_image(trainer, f"{prefix}gap", path)
