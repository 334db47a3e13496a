"""Where the result of a run goes: the terminal, the run folder, the loggers."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import rich
import torch
from rich.table import Table
from torch import Tensor

from lightning_iet.plots import image_grid, memorized_quantity_curve, nearest_pairs, save_figure, training_curves
from lightning_iet.utilities.files import run_folder, write_atomically

if TYPE_CHECKING:  # a comparison of runs reads reports, and needs neither Lightning nor metrics
    import lightning.pytorch as pl

    from lightning_iet.evaluation.assessment import Assessment, Assessor, Scores

METRICS_FILE = "metrics.json"
PICTURES = ("samples.png", "nearest.png", "curves.png", "mq.png")
Facts: TypeAlias = Mapping[str, Any]
Report: TypeAlias = dict[str, Any]  # what metrics.json holds, see make_report


def make_report(
    assessor: "Assessor",
    scores: "Scores",
    *,
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
    curves: Mapping[str, Any],
) -> Report:
    """Gathers all figures of a run.

    Args:
        assessor: what the generated images were scored by.
        scores: scores of the generated images.
        settings: of the evaluation.
        run: facts about the training, of :func:`~lightning_iet.callbacks.evaluation.facts_of_run`.
        curves: what ``curves.png`` shows, of :func:`~lightning_iet.callbacks.evaluation.curves_of_run`.

    Returns:
        A dict of plain numbers and text: ``version``; ``settings``, with the limit of ``d1 / d2``; ``data``, sizes and
        fingerprints of the real sets; ``run``; ``generated`` and ``control``, where ``mq`` are shares and ``mq_count``
        are numbers of images; ``train``, the FID of the training images themselves; and ``curves``.
    """
    train, reference = assessor.train, assessor.reference
    return {
        "version": version("lightning-iet"),
        "settings": {**settings, "ratio": assessor.limit},
        "data": {
            "num_train": len(train),
            "num_control": assessor.control.num_images,
            "num_reference": len(reference),
            "image_shape": list(train.shape[1:]),
            "train_sha256": fingerprint(train),
            "reference_sha256": fingerprint(reference),
        },
        "run": run,
        "generated": _score_entries(scores),
        "control": _score_entries(assessor.control),
        "train": {"num_images": len(train), "fid": assessor.train_fid},
        "curves": curves,
    }


def fingerprint(images: Tensor) -> str:
    """Names a set of images by its content (8 bits per value), so that runs on different sets are told apart.

    Example:
        >>> fingerprint(torch.zeros(2, 1, 2, 2))
        '...'
    """
    content = images.mul(255).round().to(torch.uint8).cpu().numpy()
    return hashlib.sha256(f"{content.shape}".encode() + content.tobytes()).hexdigest()[:16]


def _score_entries(scores: "Scores") -> dict[str, Any]:
    counts = {threshold: round(share * scores.num_images) for threshold, share in scores.mq.items()}
    return asdict(scores) | {"mq_count": counts}


def report_table(report: Report) -> Table:
    """Lays the figures of a run out beside those of its held-out control.

    Args:
        report: what ``metrics.json`` holds.

    Returns:
        A table to print with :mod:`rich`.
    """
    generated, control, data, settings = (report[part] for part in ("generated", "control", "data", "settings"))
    num = generated["num_images"]
    table = Table(title="Quality and memorization", caption=_caption(settings, data), caption_justify="left")
    table.add_column("")
    table.add_column(f"{num:,} generated", justify="right")
    table.add_column(f"{control['num_images']:,} held out\n(control)", justify="right", style="dim")
    table.add_column("better")
    table.add_row("FID", format_fid(generated["fid"]), format_fid(control["fid"]), "lower")
    table.add_row(f"FID of the {data['num_train']:,} training images", "", format_fid(report["train"]["fid"]), "")
    table.add_section()
    fractions = (format_share(part["memorized_fraction"]) for part in (generated, control))
    table.add_row(f"memorized, d1/d2 < {settings['ratio']:.2f}", *fractions, "lower")
    for level, share in generated["mq"].items():
        shares = (f"{round(s * num):,} ({format_share(s)})" for s in (share, control["mq"][level]))
        table.add_row(f"MQ < {level}", *shares, "lower")
    if generated["further"]:
        table.add_section()
        for name, figure in generated["further"].items():
            table.add_row(name.replace("_", " "), format_fid(figure), format_fid(control["further"].get(name)), "")
    if threshold := report["run"]["threshold"]:
        table.add_section()
        table.add_row(f"skipped by AGC, threshold {threshold:g}", format_share(report["run"]["skip_rate"]), "", "")
    if (gap := report["run"].get("gap")) is not None:
        table.add_row("training loss under that of unseen images", format_share(gap), "", "lower")
    return table


def write_pictures(report: Report, folder: Path, *, assessment: "Assessment", train: Tensor, num_pairs: int) -> None:
    """Writes the four pictures of a run.

    Args:
        report: of :func:`make_report`.
        folder: the folder of the run, which exists.
        assessment: the generated images and what they are worth.
        train: the training images, ``(M, C, H, W)``.
        num_pairs: number of images that ``nearest.png`` shows.
    """
    settings, run, curves = report["settings"], report["run"], report["curves"]
    shown = assessment.images[:64]
    title = f"{len(shown)} of {len(assessment.images):,} generated images ({_drawn(settings)})"
    figures = {"samples.png": image_grid(shown, title=title)}
    ratios, nearest = assessment.closeness.ratio, assessment.closeness.nearest
    closest = ratios.argsort(stable=True)[:num_pairs]
    figures["nearest.png"] = nearest_pairs(
        assessment.images[closest],
        train[nearest[closest]],
        ratios[closest].tolist(),
        nearest[closest].tolist(),
        limit=settings["ratio"],
    )
    figures["curves.png"] = training_curves(
        curves["loss_by_epoch"],
        skip_rate=curves["skip_rate_by_timestep"] if run["threshold"] else None,
        loss_by_timestep=curves["loss_by_timestep"],
        threshold=run["threshold"],
        num_timesteps=run["num_timesteps"] or 1000,
    )
    generated, control = (
        {float(threshold): share for threshold, share in report[part]["mq"].items()}
        for part in ("generated", "control")
    )
    figures["mq.png"] = memorized_quantity_curve(generated, control, k=settings["k"])
    for name, figure in figures.items():
        save_figure(figure, folder / name)


def write_report(report: Report, folder: Path) -> None:
    """Writes ``metrics.json`` atomically; numbers that are not finite become ``null``, as JSON knows none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report({"run": {"skip_rate": float("nan")}}, Path(folder))
        ...     json.loads(Path(folder, METRICS_FILE).read_text())
        {'run': {'skip_rate': None}}
    """
    with write_atomically(folder / METRICS_FILE) as path:
        path.write_text(json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")


def format_fid(fid: float | None) -> str:
    """Three digits, which is more than an FID is worth.

    Example:
        >>> [format_fid(value) for value in (1.4, 0.01234, 123.4, None)]
        ['1.40', '0.0123', '123', '–']
    """
    return "–" if fid is None else f"{fid:#.3g}".rstrip(".")


def format_share(share: float | None) -> str:
    """A share in percent.

    Example:
        >>> [format_share(value) for value in (0.914, 0.0, 0.0004, None)]
        ['91.4%', '0.0%', '0.04%', '–']
    """
    if share is None:
        return "–"
    return f"{share:.2%}" if 0 < share < 0.001 else f"{share:.1%}"


def _caption(settings: Facts, data: Facts) -> str:
    return (
        f"Generated by {_drawn(settings)}. FID in {settings['features']} features, against {data['num_reference']:,}"
        " further held-out images; that of the training images is what copying alone would give. Memorization is lower,"
        " the better, down to the control, whose counts are scaled to the number of generated images."
    )


def _drawn(settings: Facts) -> str:
    weights = "EMA" if settings["use_ema"] else "raw"
    return f"{settings['sampler']}, {settings['num_inference_steps']} steps, {weights} weights, seed {settings['seed']}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def publish(trainer: "pl.Trainer", report: Report, *, assessment: "Assessment", train: Tensor, num_pairs: int) -> None:
    """Prints the table and writes the files of a run; of a ``fast_dev_run`` nothing is kept.

    Args:
        trainer: its run folder, and its loggers, which get the pictures if they take any.
        report: of :func:`~lightning_iet.evaluation.report.make_report`.
        assessment: the generated images and what they are worth.
        train: the training images, ``(M, C, H, W)``.
        num_pairs: number of generated images to show beside their nearest training image.
    """
    console = rich.get_console()
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        with TemporaryDirectory() as temporary:
            _write(report, Path(temporary), assessment=assessment, train=train, num_pairs=num_pairs)
        console.print(f"fast_dev_run: the evaluation of {len(assessment.images)} images worked; nothing is kept.")
        return
    console.print(report_table(report))  # first, for drawing the pictures takes a while
    folder = run_folder(trainer)
    _write(report, folder, assessment=assessment, train=train, num_pairs=num_pairs)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):  # Weights & Biases
            for picture in PICTURES:
                logger.log_image(f"eval/{Path(picture).stem}", [str(folder / picture)])
    files = ", ".join((METRICS_FILE, *PICTURES))
    console.print(f"Written to {folder}: {files}", soft_wrap=True, highlight=False)


def _write(report: Report, folder: Path, *, assessment: "Assessment", train: Tensor, num_pairs: int) -> None:
    write_report(report, folder)
    write_pictures(report, folder, assessment=assessment, train=train, num_pairs=num_pairs)
