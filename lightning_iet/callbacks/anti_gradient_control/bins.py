"""Which entry of the loss bank a timestep belongs to, whatever timesteps look like in somebody's project."""

import torch
from torch import Tensor

from lightning_iet.functional.binning import bin_index, equal_probability_edges

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
