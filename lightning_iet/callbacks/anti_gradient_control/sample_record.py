"""The records of a run: how often each training sample was skipped, which are known too well, and a table of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from lightning_iet.callbacks.anti_gradient_control.losses.error_capture import tensors_in
from lightning_iet.data.augmentation import as_it_is, layers
from lightning_iet.data.duplicates import FirstOfGroups, OncePerGroup, Repeated
from lightning_iet.data.images import IndexedImages
from lightning_iet.data.samples import Samples, WithIndex, labels_of, name_of
from lightning_iet.data.shard_sampler import ShardSampler, StreamedSamples
from lightning_iet.functional.sample_record import (
    draw_by_weight,
    pace_of_draws,
    typical_record,
    update_log_weights,
    update_record,
)
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import to_assignment
from lightning_iet.plots import captioned_grid, save_figure
from lightning_iet.utilities.files import run_folder, write_csv
from lightning_iet.utilities.lightning import log_image
from lightning_iet.utilities.random import isolated_rng

_DRAW_SEED = 5  # tells these seeds from those of other draws


class SampleCounts(nn.Module):
    """How often each of n samples was drawn, and how often it was left out of the loss; stays on the device.

    Each process counts what it sees itself; :meth:`share` adds up the counts of all processes.

    Attributes:
        out_of_range: Number of indices that were not in [0, n), scalar, int64; they count nowhere.

    Example:
        >>> counts = SampleCounts(3)
        >>> counts.update(torch.tensor([2, 0, 2]), keep=torch.tensor([False, True, True]))
        >>> counts.skip_rate()
        tensor([0.0000,    nan, 0.5000])
    """

    shared: Tensor
    own: Tensor
    at_exchange: Tensor
    out_of_range: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        for name in ("shared", "own", "at_exchange"):  # rows: draws, and those of them that were left out
            self.register_buffer(name, torch.zeros(2, num_samples, dtype=torch.int32))
        self.register_buffer("out_of_range", torch.zeros((), dtype=torch.long), persistent=False)

    def update(self, index: Tensor, *, keep: Tensor, exempt: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            index: The sample of each row, shape (B,), integers in [0, n); a sample may occur several times.
            keep: Which rows stay in the loss, boolean, shape (B,).
            exempt: Rows that do not count, boolean, shape (B,); ``None`` = all count.
        """
        counts = (index >= 0) & (index < self.own.shape[1])
        self.out_of_range.add_((~counts).sum())
        if exempt is not None:
            counts = counts & ~exempt
        index = index.long().clamp(0, self.own.shape[1] - 1)
        drawn, left_out = self.own  # a row at a time: adding to columns goes through the samples one by one
        drawn.index_add_(0, index, counts.int())
        left_out.index_add_(0, index, (counts & ~keep).int())

    def share(self, num_processes: int) -> None:
        """Add up the counts of all processes. Takes part on every process."""
        if num_processes > 1:
            dist.all_reduce(self.own)
        self.shared += self.own
        self.own.zero_()

    @property
    def seen(self) -> Tensor:
        """Draws of each sample since the run began, shape (n,), int32."""
        return self.shared[0] + self.own[0]

    @property
    def skipped(self) -> Tensor:
        """Those of them that were left out of the loss, shape (n,), int32."""
        return self.shared[1] + self.own[1]

    def since_exchange(self) -> tuple[Tensor, Tensor]:
        """Draws, and those that were left out, since samples were last exchanged; both (n,), int32."""
        seen, skipped = self.shared + self.own - self.at_exchange
        return seen, skipped

    def end_exchange(self) -> None:
        """Begin the counts since the last exchange anew."""
        self.at_exchange.copy_(self.shared + self.own)

    def skip_rate(self) -> Tensor:
        """Share of a sample's draws that were left out since the run began, shape (n,); NaN where it was not drawn."""
        return self.skipped / self.seen

    def most_skipped(self, share: float = 0.01) -> Tensor:
        """Mean skip rate of the most skipped samples, scalar in [0, 1]; NaN if none was drawn. Waits for the device.

        Args:
            share: Which share of the samples that were drawn; at least one of them.
        """
        return extreme_mean(self.skip_rate(), share)


class SampleRecords(nn.Module):
    """The record of each of n samples, see :mod:`lightning_iet.functional.sample_record`, and its weight.

    A record belongs to the sample: with several processes, each of them updates the records of its own shards' samples,
    and :meth:`share` gives everyone all of them.

    Attributes:
        record: Shape (n,), float32.
        log_weights: Shape (n,), float32; at most 0.
        drawn: Which samples have been drawn, shape (n,), boolean.
    """

    record: Tensor
    log_weights: Tensor
    drawn: Tensor

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        self.register_buffer("record", torch.zeros(num_samples))
        self.register_buffer("log_weights", torch.zeros(num_samples))
        self.register_buffer("drawn", torch.zeros(num_samples, dtype=torch.bool))

    def update(self, index: Tensor, scores: Tensor, decay: float, *, absent: Tensor) -> Tensor:
        """Take in a batch of draws; return the new record of each draw's sample, (B,)."""
        index = index.long().clamp(0, len(self.record) - 1)  # others are counted, and raise at the end of the epoch
        self.drawn.index_fill_(0, index, True)
        return update_record(self.record, index, scores, decay, absent=absent)

    def typical(self, members: Tensor | None) -> Tensor:
        """The median record of the samples that have been drawn, scalar; of ``members`` alone, if they are given."""
        if members is None:
            return typical_record(self.record, self.drawn)
        return typical_record(self.record.index_select(0, members), self.drawn.index_select(0, members))

    def weights(self) -> Tensor:
        """The weight of each sample, in (0, 1], shape (n,)."""
        return self.log_weights.exp()

    def update_weights(
        self, index: Tensor, record: Tensor, typical: float | Tensor, rate: float | Tensor, **options: Any
    ) -> Tensor:
        """Move the weights of a batch by :func:`update_log_weights`; return the new weight of each draw, (B,)."""
        index = index.long().clamp(0, len(self.record) - 1)
        return update_log_weights(self.log_weights, index, record, typical, rate, **options)

    def share(self, num_processes: int, own: Tensor | None) -> None:
        """Take the rows of every process's own samples, see :func:`share_rows`. Takes part on every process."""
        share_rows([self.record, self.log_weights, self.drawn], num_processes, own)


def share_rows(tables: Sequence[Tensor], num_processes: int, own: Tensor | None) -> None:
    """Give every process, in place, the rows of all processes' own samples in tables of shape (n,).

    Each row has one owner; ``own`` are those of this process, ``None`` = all processes hold the same rows already.
    """
    if num_processes == 1 or own is None:
        return
    for table in tables:
        mine = torch.zeros_like(table).index_copy(0, own, table.index_select(0, own))
        wide = mine if mine.is_floating_point() else mine.int()
        dist.all_reduce(wide)
        table.copy_(wide)


def extreme_mean(values: Tensor, share: float, *, largest: bool = True) -> Tensor:
    """Mean of the largest or smallest values that are not NaN, at least one; NaN if there is none.

    Example:
        >>> extreme_mean(torch.tensor([1.0, 4.0, float("nan"), 3.0]), 0.5, largest=False)
        tensor(2.)
    """
    values = values[values.isfinite()]
    number = min(max(1, round(share * len(values))), len(values))
    return values.topk(number, largest=largest).values.mean()


class SampleDraws(nn.Module):
    """By which table the n samples of an epoch are drawn, where weights act on draws; belongs to all processes alike.

    Attributes:
        draw_table: The sample that is read in each place, shape (n,), int64; in the first epoch each its own.
        draw_pace: How long the steps of each sample's weight are, shape (n,), float32.
        draw_group: Shard of each sample, shape (n,), int64; places are given to samples of the same shard.
        draw_clock: Seed of the run, and number of epochs that have ended, int64.
    """

    draw_table: Tensor
    draw_pace: Tensor
    draw_group: Tensor
    draw_clock: Tensor

    def __init__(self, num_samples: int, *, seed: int = 0) -> None:
        super().__init__()
        self.register_buffer("draw_table", torch.arange(num_samples))
        self.register_buffer("draw_pace", torch.ones(num_samples))
        self.register_buffer("draw_group", torch.zeros(num_samples, dtype=torch.long))
        self.register_buffer("draw_clock", torch.tensor([seed, 0]))

    def pace(self, index: Tensor) -> Tensor:
        """How long the weight's step is of each draw's sample, shape (B,)."""
        return self.draw_pace.index_select(0, index.long().clamp(0, len(self.draw_pace) - 1))

    def renew(self, records: SampleRecords, *, epochs_ended: int) -> None:
        """Draw the samples of the next epoch by their weights; those that have never been drawn keep their place.

        Random numbers depend on the seed of the run and ``epochs_ended``; records are the same on every process.
        """
        self.draw_clock[1] = epochs_ended
        seed, drawn, weights = int(self.draw_clock[0]), records.drawn.cpu(), records.weights().cpu()
        table, pace, groups = torch.arange(len(drawn)), torch.ones_like(weights), self.draw_group.cpu()
        for group in groups.unique().tolist():
            members = ((groups == group) & drawn).nonzero()[:, 0]
            if len(members):
                generator = torch.Generator().manual_seed(derive_seed(seed, epochs_ended, group, _DRAW_SEED))
                table[members] = members[draw_by_weight(weights[members], generator=generator)]
                pace[members] = pace_of_draws(weights[members])
        self.draw_table.copy_(table)
        self.draw_pace.copy_(pace)

    def share(self, num_processes: int) -> None:
        """Draw by the table of the first process: records may differ in the last bit. Takes part on every process."""
        if num_processes > 1:
            for values in (self.draw_table, self.draw_pace):
                dist.broadcast(values, src=0)


# --- which sample a row of a batch is --------------------------------------------------------------------------------


_WITH_INDEX = (WithIndex, Samples, IndexedImages, Repeated, OncePerGroup, FirstOfGroups)


@dataclass(frozen=True)
class TrainingSet:
    """The training set of a run, below what shards put around it."""

    dataset: Dataset[Any]
    """Map-style."""
    sampler: Any
    """Of the loader."""
    yields_index: bool
    """Whether its samples are known to carry their index."""

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def training_set(loader: Any) -> TrainingSet | None:
    """The data set behind a training loader; None if it is a stream, or of no known length."""
    dataset = getattr(loader, "dataset", None)
    found = list(layers(dataset))
    if any(isinstance(layer, IterableDataset | StreamedSamples) for layer in found):
        return None
    # Shards read whole batches through layers of their own, which have no length.
    sized = [layer for layer in found if hasattr(layer, "__len__")]
    indexed = [layer for layer in found if isinstance(layer, _WITH_INDEX)]
    if not sized:
        return None
    return TrainingSet((indexed or [as_it_is(sized[0])])[0], getattr(loader, "sampler", None), bool(indexed))


def count_samples(trainer: pl.Trainer, batch: Any) -> int:
    """Number of samples in a batch: the length on which its tensors agree; 0 if that cannot be told."""
    found = list(tensors_in(batch))
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in found}
    # Without batches of the loader, a lone tensor may be one sample.
    is_batched = getattr(trainer.train_dataloader, "batch_sampler", None) is not None or len(found) > 1
    return lengths.pop() if len(lengths) == 1 and is_batched else 0


_SHOWN = 24
FEW_DRAWS = 50  # draws of an image below which one skip may be chance (our choice)


def write_sample_report(
    trainer: pl.Trainer,
    data: TrainingSet,
    counts: SampleCounts,
    records: SampleRecords | None,
    *,
    suffix: Sequence[str] = (),
) -> None:
    """Write ``skips.csv`` and ``skips.png`` into the run folder; nothing without a logger, or if nothing was skipped.

    The table has a row for each training sample, the images that the model is most about to copy first: those with the
    lowest record, where there are records, else with the highest skip rate. Counts and records are of all processes;
    ``suffix`` is added to the names of the files, where there are several callbacks.
    """
    if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    columns = sample_columns(data, counts, records)
    if not bool(columns["seen"].any()) or (records is None and not bool(columns["skipped"].any())):
        return
    order = rank_samples(columns)
    folder = run_folder(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = (folder / f"{'-'.join(['skips', *suffix])}.{kind}" for kind in ("csv", "png"))
    _write_table(table, data.dataset, columns, order)
    found = f"AntiGradientControl: skips by training sample are in {table}"
    shown = order[:_SHOWN]
    if records is None:
        shown = shown[columns["skipped"][shown] > 0]  # a rate of 0 says nothing
    images = _images(data.dataset, shown.tolist())
    if images:
        captions = [_caption(columns, index) for index in shown.tolist()]
        figure = captioned_grid(images, captions, title=_title(columns, len(images)))
        save_figure(figure, picture)
        found += f", those that are closest to being copied in {picture}"
        log_image(trainer, "/".join(["agc", *suffix, "most_skipped"]), picture)
    rank_zero_info(found)


def sample_columns(data: TrainingSet, counts: SampleCounts, records: SampleRecords | None) -> dict[str, Tensor]:
    """What is known of each sample, by column, each of shape (n,), on the CPU."""
    columns = {"seen": counts.seen, "skipped": counts.skipped, "skip_rate": counts.skip_rate()}
    if records is not None:
        columns |= {"record": records.record, "weight": records.weights()}
    if isinstance(data.sampler, ShardSampler):
        columns["shard"] = to_assignment(data.sampler.shards, len(data))
    labels = labels_of(data.dataset)
    if labels is not None and len(labels) == len(data):
        columns["label"] = labels
    return {name: values.detach().cpu() for name, values in columns.items()}


def rank_samples(columns: Mapping[str, Tensor]) -> Tensor:
    """Order the samples by how close they are to being copied; those that were never drawn come last.

    Example:
        >>> seen, skipped = torch.tensor([4, 4, 0, 2]), torch.tensor([1, 3, 0, 0])
        >>> rank_samples({"seen": seen, "skipped": skipped, "skip_rate": skipped / seen})
        tensor([1, 0, 3, 2])
    """
    score = -columns["record"] if "record" in columns else columns["skip_rate"].nan_to_num(0)
    score = torch.where(columns["seen"] > 0, score, -torch.inf)
    return score.argsort(descending=True, stable=True)


def _write_table(path: Path, dataset: Dataset[Any], columns: Mapping[str, Tensor], order: Tensor) -> None:
    lists: dict[str, list[Any]] = {"sample": order.tolist()}
    lists["name"] = [name_of(dataset, index) for index in lists["sample"]]
    lists |= {name: values[order].tolist() for name, values in columns.items()}
    for name in {"skip_rate", "record", "weight"} & set(lists):
        lists[name] = ["" if value != value else round(value, 4) for value in lists[name]]
    write_csv(path, [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)])


def _images(dataset: Any, indices: Sequence[int]) -> list[Tensor]:
    """The images of some samples, (C, H, W) in [0, 1]; none where samples hold no images."""
    with isolated_rng(seed=0):
        images = [image_of(dataset[index]) for index in indices]
    return [image for image in images if image is not None] if all(image is not None for image in images) else []


def image_of(sample: Any) -> Tensor | None:
    """The first image in a sample, (C, H, W) in [0, 1]; None if there is none.

    Images in [-1, 1], and with any other range, are scaled to [0, 1].

    Example:
        >>> image_of((torch.full((1, 2, 2), 255, dtype=torch.uint8), 7)).max()
        tensor(1.)
    """
    entries = (
        sample.values() if isinstance(sample, Mapping) else sample if isinstance(sample, list | tuple) else [sample]
    )
    for entry in entries:
        if isinstance(entry, Tensor) and entry.ndim == 3 and entry.shape[0] in (1, 3, 4):
            image = entry.detach().cpu()
            if image.dtype == torch.uint8:
                return image / 255
            image = image.float()
            low, high = (float(value) for value in image.aminmax())
            if low < 0 or high > 1:
                low, high = (-1, 1) if low >= -1 and high <= 1 else (low, high)
                image = (image - low) / max(high - low, 1e-8)
            return image
    return None


def _title(columns: Mapping[str, Tensor], shown: int) -> str:
    """Say what skips.png shows, and what of it is left to chance.

    Example:
        >>> columns = {"seen": torch.tensor([12, 12, 12]), "skipped": torch.tensor([1, 0, 2])}
        >>> print(_title(columns, 2))
        Training images closest to being copied, with the highest skip rates: the 2 of 3 that were skipped at all
        Each was drawn about 12 times: an image that was skipped once may have been so by chance
    """
    drawn = columns["seen"] > 0
    times, total = int(columns["seen"][drawn].float().median()), len(drawn)
    if "record" in columns:
        what = f"with the lowest records: {shown:,} of {total:,}"
    else:
        skipped = int((columns["skipped"] > 0).sum())
        some = f"{shown:,} of {skipped:,} that were skipped, of {total:,}"
        what = f"with the highest skip rates: {some}"
        if shown == skipped:
            what = f"with the highest skip rates: the {shown:,} of {total:,} that were skipped at all"
    title = f"Training images closest to being copied, {what}"
    if "record" not in columns and times < FEW_DRAWS:
        drawn_times = "once" if times == 1 else f"about {times:,} times"
        title += f"\nEach was drawn {drawn_times}: an image that was skipped once may have been so by chance"
    return title


def _caption(columns: Mapping[str, Tensor], index: int) -> str:
    r"""Return how often a sample was skipped, and its record; with weights, under which none is skipped, its weight.

    Example:
        >>> counts = {"seen": torch.tensor([12, 0]), "skipped": torch.tensor([1, 0])}
        >>> _caption(counts, 0), _caption(counts, 1)
        ('0\nskipped 1 of 12', '1\nnot drawn')
        >>> columns = counts | {"record": torch.tensor([-1.5, 0.25]), "weight": torch.ones(2)}
        >>> _caption(columns, 0)
        '0\nskipped 1 of 12\nrecord -1.50'
        >>> _caption(columns | {"weight": torch.tensor([0.125, 1.0])}, 0)
        '0\nweight 0.12\nrecord -1.50'
    """
    seen, skipped = (int(columns[name][index]) for name in ("seen", "skipped"))
    if not seen:
        caption = f"{index}\nnot drawn"
    elif "weight" in columns and bool((columns["weight"] < 1).any()):
        caption = f"{index}\nweight {float(columns['weight'][index]):.2f}"
    else:
        caption = f"{index}\nskipped {skipped:,} of {seen:,}"
    return f"{caption}\nrecord {float(columns['record'][index]):.2f}" if "record" in columns else caption
