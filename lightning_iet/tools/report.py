"""What a run leaves behind: ``metrics.json``, its table in the terminal, and its pictures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.table import Table
from torch import Tensor

from lightning_iet.tools.assessment import Closeness
from lightning_iet.tools.figures import (
    image_grid,
    memorized_quantity_curve,
    nearest_pairs,
    save_figure,
    training_curves,
)
from lightning_iet.tools.run_folder import write_atomically

__all__ = ["METRICS_FILE", "Report", "format_fid", "format_share", "report_table", "write_pictures", "write_report"]

METRICS_FILE = "metrics.json"
Report: TypeAlias = dict[str, Any]  # what metrics.json holds; every key is in the docstring of Evaluation


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
    copies = f"  of the {data['num_train']:,} training images"
    table.add_row(copies, "", format_fid(report["train"]["fid"]), "(copying alone)", end_section=True)
    fractions = (format_share(part["memorized_fraction"]) for part in (generated, control))
    table.add_row(f"memorized fraction, d1/d2 < {settings['ratio']:.2f}", *fractions, "lower, to the control")
    for threshold, share in generated["mq"].items():
        shares = (f"{round(s * num):,} ({format_share(s)})" for s in (share, control["mq"][threshold]))
        table.add_row(f"MQ < {threshold}", *shares, "lower, to the control")
    if report["run"]["skip_rate"] is not None:
        table.add_section()
        name = f"skipped by AGC, threshold {report['run']['threshold']:g}"
        table.add_row(name, format_share(report["run"]["skip_rate"]), "", "")
    return table


def write_pictures(
    report: Report, folder: Path, *, images: Tensor, train: Tensor, closeness: Closeness, num_pairs: int
) -> None:
    """Writes ``samples.png``, ``nearest.png``, ``curves.png`` and ``mq.png``.

    Args:
        report: what ``metrics.json`` holds.
        folder: the folder of the run, which exists.
        images: generated images, ``(N, C, H, W)`` in [0, 1].
        train: the training images, ``(M, C, H, W)``.
        closeness: how close each generated image is to the training images.
        num_pairs: number of images that ``nearest.png`` shows.
    """
    settings = report["settings"]
    shown = images[:64]
    title = f"{len(shown)} of {len(images):,} generated images ({_drawn(settings)})"
    save_figure(image_grid(shown, title=title), folder / "samples.png")

    closest = closeness.ratio.argsort(stable=True)[:num_pairs]
    nearest = closeness.nearest[closest]
    pairs = nearest_pairs(
        images[closest],
        train[nearest],
        closeness.ratio[closest].tolist(),
        nearest.tolist(),
        limit=settings["ratio"],
    )
    save_figure(pairs, folder / "nearest.png")

    run, curves = report["run"], report["curves"]
    save_figure(
        training_curves(
            _gaps(curves["loss_by_epoch"]) or [],
            skip_rate=_gaps(curves["skip_rate_by_timestep"]),
            loss_by_timestep=_gaps(curves["loss_by_timestep"]),
            threshold=run["threshold"],
            num_timesteps=run["num_timesteps"] or 1000,
        ),
        folder / "curves.png",
    )
    generated, control = (
        {float(threshold): share for threshold, share in report[part]["mq"].items()}
        for part in ("generated", "control")
    )
    save_figure(memorized_quantity_curve(generated, control, k=settings["k"]), folder / "mq.png")


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


def _caption(settings: dict[str, Any], data: dict[str, Any]) -> str:
    control = "Control: MQ scaled to the number of generated images."
    fid = f"FID: {settings['features']} features, against {data['num_reference']:,} further held-out images."
    return f"Generated by {_drawn(settings)}. {control} {fid}"


def _drawn(settings: dict[str, Any]) -> str:
    weights = "EMA" if settings["use_ema"] else "raw"
    return f"{settings['sampler']}, {settings['num_inference_steps']} steps, {weights} weights, seed {settings['seed']}"


def _gaps(values: Sequence[float | None] | None) -> list[float] | None:
    """Gives unknown values back the NaN that leaves a gap in a curve."""
    return None if values is None else [math.nan if value is None else value for value in values]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
