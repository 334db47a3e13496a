"""How often each training sample was drawn, and how often anti-gradient control left it out of the loss."""

import torch
from torch import Tensor, nn


class SampleCounts(nn.Module):
    """Counts by sample that stay on the device, of the whole run and since samples were last exchanged between shards.

    Args:
        num_samples: Number of training samples, n.

    Attributes:
        seen: Draws of each sample since the last exchange, shape (n,), int32.
        skipped: Those of them that were left out of the loss, shape (n,), int32.
        seen_in_all: Draws since the run began, shape (n,), int32.
        skipped_in_all: Those of them that were left out, shape (n,), int32.
        out_of_range: Number of indices that were not in [0, n), scalar, int64; they count nowhere.

    Example:
        >>> counts = SampleCounts(3)
        >>> counts.update(torch.tensor([2, 0, 2]), keep=torch.tensor([False, True, True]))
        >>> counts.skip_rate()
        tensor([0.0000,    nan, 0.5000])
    """

    seen: Tensor
    skipped: Tensor
    seen_in_all: Tensor
    skipped_in_all: Tensor
    out_of_range: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        for name in ("seen", "skipped", "seen_in_all", "skipped_in_all"):
            self.register_buffer(name, torch.zeros(num_samples, dtype=torch.int32))
        self.register_buffer("out_of_range", torch.zeros((), dtype=torch.long))

    def update(self, index: Tensor, *, keep: Tensor, exempt: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            index: The sample of each row, shape (B,), integers in [0, n); a sample may occur several times.
            keep: Which rows stay in the loss, boolean, shape (B,).
            exempt: Rows that do not count, boolean, shape (B,); ``None`` = all count.
        """
        counts = torch.ones_like(keep) if exempt is None else ~exempt
        inside = (index >= 0) & (index < len(self.seen))
        self.out_of_range += (~inside).sum()
        counts = counts & inside
        index = index.long().clamp(0, len(self.seen) - 1)
        drawn, left_out = counts.int(), (counts & ~keep).int()
        for seen, skipped in ((self.seen, self.skipped), (self.seen_in_all, self.skipped_in_all)):
            seen.index_add_(0, index, drawn)
            skipped.index_add_(0, index, left_out)

    def skip_rate(self) -> Tensor:
        """Share of a sample's draws that were left out since the run began, shape (n,); NaN where it was not drawn."""
        return self.skipped_in_all / self.seen_in_all

    def most_skipped(self, share: float = 0.01) -> Tensor:
        """Mean skip rate of the most skipped samples, scalar.

        Args:
            share: Which share of the samples that were drawn; at least one.

        Returns:
            In [0, 1]; NaN if none was drawn. It waits for the device.
        """
        rates = self.skip_rate()
        rates = rates[rates.isfinite()]
        number = max(1, round(share * len(rates)))
        return rates.topk(min(number, len(rates))).values.mean()

    def end_exchange(self) -> None:
        """Start the counts since the last exchange anew, in place."""
        self.seen.zero_()
        self.skipped.zero_()
