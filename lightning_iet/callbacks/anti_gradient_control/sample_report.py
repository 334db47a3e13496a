"""Which training images the model is about to copy: a table of all, and a picture of the first."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iet.callbacks.anti_gradient_control.sample_record import SampleCounts, SampleRecords, TrainingSet
from lightning_iet.data.samples import Samples, labels_of, name_of
from lightning_iet.data.shard_sampler import ShardSampler
from lightning_iet.functional.sharding import to_assignment
from lightning_iet.plots import captioned_grid, save_figure
from lightning_iet.utilities.files import run_folder, write_atomically
from lightning_iet.utilities.random import isolated_rng

_SHOWN = 24


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
    lowest record, where there are records, else with the highest skip rate.

    Args:
        trainer: At the end of a fit.
        data: The training set.
        counts: Of all processes.
        records: Likewise; ``None`` = none are kept.
        suffix: Added to the names of the files, where there are several callbacks.
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
    images = _images(data.dataset, order[:_SHOWN].tolist())
    if images:
        captions = [_caption(columns, int(index)) for index in order[: len(images)]]
        what = "lowest records" if records is not None else "highest skip rates"
        figure = captioned_grid(
            images, captions, title=f"Training images with the {what}: those closest to being copied"
        )
        save_figure(figure, picture)
        found += f", those that are closest to being copied in {picture}"
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image("/".join(["agc", *suffix, "most_skipped"]), [str(picture)])
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
    digits = {"skip_rate": 4, "record": 4, "weight": 4}
    lists = {name: values[order].tolist() for name, values in columns.items()}
    for name, number in digits.items():
        if name in lists:
            lists[name] = ["" if value != value else round(value, number) for value in lists[name]]
    indices = order.tolist()
    with write_atomically(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "name", *lists])
        for row, index in enumerate(indices):
            writer.writerow([index, _name(dataset, index), *(values[row] for values in lists.values())])


def _name(dataset: Any, index: int) -> str:
    """The name of a sample's file, where it is known."""
    if isinstance(dataset, Samples):
        return name_of(dataset.source, int(dataset.indices[index]))
    return name_of(dataset, index)


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


def _caption(columns: Mapping[str, Tensor], index: int) -> str:
    r"""Skip rate and record of a sample; with weights by record, under which no sample is skipped, its weight.

    Example:
        >>> columns = {"skip_rate": torch.zeros(2), "record": torch.tensor([-1.5, 0.25]), "weight": torch.ones(2)}
        >>> _caption(columns, 0)
        '0: skipped 0%\nrecord -1.50'
        >>> _caption(columns | {"weight": torch.tensor([0.125, 1.0])}, 0)
        '0: weight 0.12\nrecord -1.50'
    """
    rate = float(columns["skip_rate"][index])
    if rate != rate:
        caption = f"{index}: not drawn"
    elif "weight" in columns and bool((columns["weight"] < 1).any()):
        caption = f"{index}: weight {float(columns['weight'][index]):.2f}"
    else:
        caption = f"{index}: skipped {rate:.0%}"
    return f"{caption}\nrecord {float(columns['record'][index]):.2f}" if "record" in columns else caption
