"""The report of an evaluation: metrics.json, the table in the terminal, the plots."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import rich
from rich.table import Table

from lightning_iet.evaluation.verdict import fid_note, telling_thresholds, verdict
from lightning_iet.plots import image_grid, memorized_quantity_curve, nearest_pairs, save_figure, training_curves
from lightning_iet.utilities.files import METRICS, run_folder, write_json
from lightning_iet.utilities.fingerprints import hash_images
from lightning_iet.utilities.text import counted, percent, say, three_digits

if TYPE_CHECKING:  # a comparison of runs reads reports, and needs neither Lightning nor metrics
    import lightning.pytorch as pl

    from lightning_iet.evaluation.assessment import Assessment, Assessor, Scores

PLOTS = ("samples.png", "nearest.png", "curves.png", "mq.png")
Report: TypeAlias = dict[str, Any]  # what metrics.json holds, see make_report


def make_report(
    assessor: "Assessor",
    scores: "Scores",
    *,
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
    curves: Mapping[str, Any],
    course: Sequence[Mapping[str, Any]] = (),
) -> Report:
    """Gather all measures of a run.

    Args:
        assessor: what has measured the generated images.
        scores: scores of the generated images.
        settings: of the evaluation.
        run: what is known of the training, of :func:`~lightning_iet.callbacks.evaluation.describe_run`.
        curves: what ``curves.png`` shows, of :func:`~lightning_iet.callbacks.evaluation.curves_of_run`.
        course: step and scores of every evaluation of the run, the last one included.

    Returns:
        Plain numbers and text: ``kind`` and ``version``; ``verdict``, a sentence; ``settings``, with the limit of
        ``d1 / d2`` and the number of FID's features; ``data``, sizes and fingerprints of the real sets (of the
        ``num_held_out`` images, ``num_control`` are compared with generated ones); ``run``;
        ``generated`` and ``control``, where ``mq`` are shares and ``mq_count`` are numbers of images; ``train``, the
        FID of the training images themselves; ``curves``; and ``course``.
    """
    train, reference = assessor.train, assessor.reference
    report: Report = {
        "kind": "evaluation",
        "version": version("lightning-iet"),
        "settings": {**settings, "ratio": assessor.limit, "feature_dimensions": assessor.feature_dimensions},
        "data": {
            "num_train": len(train),
            "num_control": assessor.control.num_images,
            "num_held_out": assessor.num_held_out,
            "num_reference": len(reference),
            "image_shape": list(train.shape[1:]),
            "train_sha256": hash_images(train),
            "reference_sha256": hash_images(reference),
            "near_duplicates": assessor.duplicates.images,
            "groups_of_near_duplicates": len(assessor.duplicates.members),
        },
        "run": run,
        "generated": _score_entries(scores),
        "control": _score_entries(assessor.control),
        "train": {"num_images": len(train), "fid": assessor.train_fid},
        "curves": curves,
        "course": list(course),
    }
    return {"kind": report.pop("kind"), "version": report.pop("version"), "verdict": verdict(report), **report}


def _score_entries(scores: "Scores") -> dict[str, Any]:
    counts = {threshold: round(share * scores.num_images) for threshold, share in scores.mq.items()}
    return asdict(scores) | {"mq_count": counts}


def report_table(report: Report) -> Table:
    """Lay the measures of a run, as ``metrics.json`` holds them, out beside those of its held-out control."""
    generated, control, data, settings = (report[part] for part in ("generated", "control", "data", "settings"))
    num = generated["num_images"]
    table = Table(title="Quality and memorization", caption=_caption(report), caption_justify="left")
    table.add_column("")
    table.add_column(f"{num:,} generated", justify="right")
    table.add_column(f"{control['num_images']:,} held out\n(control)", justify="right", style="dim")
    table.add_column("good is")
    floor = "near control"
    if settings["features"] is not None:
        table.add_row("FID", three_digits(generated["fid"]), three_digits(control["fid"]), "low")
        table.add_row(f"FID of the {data['num_train']:,} training images", "", three_digits(report["train"]["fid"]), "")
        table.add_section()
    fractions = (percent(part["memorized_fraction"]) for part in (generated, control))
    table.add_row(f"memorized, d1/d2 < {settings['ratio']:.2f}", *fractions, floor)
    if repeated := data.get("near_duplicates"):
        groups, others = data["groups_of_near_duplicates"], data["num_train"] - repeated
        for key, what in (
            ("copied_fraction_of_repeated", f"copies of the {counted(groups, 'image')} with near-duplicates"),
            ("copied_fraction_of_others", f"copies of the {counted(others, 'other')}"),
        ):
            table.add_row(what, *(percent(part[key]) for part in (generated, control)), floor)
    for level in telling_thresholds(generated["mq"], control["mq"]):
        shares = (f"{round(s * num):,} ({percent(s)})" for s in (generated["mq"][level], control["mq"][level]))
        table.add_row(f"MQ < {level}", *shares, floor)
    if generated["further"]:
        table.add_section()
        for name, figure in generated["further"].items():
            table.add_row(name.replace("_", " "), three_digits(figure), three_digits(control["further"].get(name)), "")
    threshold, criterion = report["run"]["threshold"], report["run"].get("criterion")
    if threshold or criterion:
        table.add_section()
        how = f"threshold {threshold:g}" if threshold else f"by {criterion}"
        if (lowest := report["run"].get("lowest_weights")) is None:
            table.add_row(f"skipped by AGC, {how}", percent(report["run"]["skip_rate"]), "", "")
        else:
            what = "drawn by weight" if report["run"].get("weigh") == "draws" else "weights of losses"
            table.add_row(f"AGC by record, {what}: lowest tenth", percent(lowest), "", "")
    if best := report["run"].get("best_without_copies"):
        table.add_row(f"best without copies: step {best['step']:,}, FID", three_digits(best["fid"]), "", "")
    if (gap := report["run"].get("gap")) is not None:
        table.add_row("training loss under that of unseen images", percent(gap), "", "near 0")
    return table


def print_report(report: Report) -> None:
    """Print the verdict, and the table under it."""
    console = rich.get_console()
    console.print(f"\n[bold]{report['verdict']}[/bold]", highlight=False)
    console.print(report_table(report))


def write_pictures(
    report: Report, folder: Path, *, assessor: "Assessor", assessment: "Assessment", num_pairs: int
) -> None:
    """Write the four plots of a run into its folder; ``num_pairs`` images are shown in ``nearest.png``."""
    settings, run, curves = report["settings"], report["run"], report["curves"]
    shown = assessment.images[:64]
    title = f"{len(shown)} of {len(assessment.images):,} generated images ({_sampling(settings)})"
    figures = {"samples.png": image_grid(shown, title=title)}
    ratios = assessment.closeness.copy_ratio
    closest = ratios.argsort(stable=True)[:num_pairs]
    nearest = assessment.closeness.nearest[closest]
    words: dict[str, Any] = {} if assessment.closeness.distinct_ratio is None else _distinct_words(settings["ratio"])
    figures["nearest.png"] = nearest_pairs(
        assessment.images[closest],
        assessor.train[nearest],
        ratios[closest].tolist(),
        [assessor.name(index) for index in nearest.tolist()],
        limit=settings["ratio"],
        **words,
    )
    figures["curves.png"] = training_curves(
        curves["loss_by_epoch"],
        validation=curves["validation_loss"],
        round_epochs=curves["round_epochs"],
        weights=curves["weights_by_epoch"],
        skip_rate=curves["skip_rate_by_timestep"] if run["threshold"] or run.get("criterion") else None,
        loss_by_timestep=curves["loss_by_timestep"],
        threshold=run["threshold"],
        num_timesteps=run["num_timesteps"] or 1000,
    )
    generated, control = (
        {float(threshold): share for threshold, share in report[part]["mq"].items()}
        for part in ("generated", "control")
    )
    figures["mq.png"] = memorized_quantity_curve(generated, control, k=settings["k"])
    for file, figure in figures.items():
        save_figure(figure, folder / file)


def _distinct_words(limit: float) -> dict[str, str]:
    """What ``nearest.png`` says of ratios in which near-duplicates count as one image."""
    return {
        "label": "ratio",
        "title": "Generated images closest to a training image, by the ratio of the distance to it over that to the "
        f"next one that shows something else (near-duplicates count once); below {limit:.2f} (colour) counts as a copy",
    }


def read_metrics(file: Path, *, kind: str) -> dict[str, Any]:
    """Read a ``metrics.json``.

    Args:
        file: The file.
        kind: What has to have written it, ``"evaluation"`` or ``"audit"``; files of versions that wrote no kind pass.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds something else.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("kind", kind) != kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected the measures of an {kind}, but got {found!r}")
    return content


def named_figures(generated: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, Any]:
    """Name the measures of generated images, and those of held-out ones with ``_control``, as loggers do.

    Args:
        generated: their entry in a report, or :class:`~lightning_iet.evaluation.assessment.Scores` as a dictionary.
        control: likewise.

    Example:
        >>> scores = {"fid": 1.0, "memorized_fraction": 0.1, "mq": {"0.15": 0.2}, "further": {"mifid": 2.0}}
        >>> list(named_figures(scores, {"mq": {}, "further": {"mifid": 3.0}}))
        ['fid', 'memorized_fraction', 'mq_0.15', 'mifid', 'mifid_control']
    """
    found: dict[str, Any] = {}
    for suffix, part in (("", generated), ("_control", control)):
        shares = ("fid", "memorized_fraction", "copied_fraction")
        found |= {f"{name}{suffix}": part[name] for name in shares if name in part}
        found |= {f"mq_{threshold}{suffix}": share for threshold, share in part["mq"].items()}
        found |= {f"{name}{suffix}": number for name, number in part["further"].items()}
    return found


def _caption(report: Report) -> str:
    settings, num_reference = report["settings"], report["data"]["num_reference"]
    fid = (
        "No FID: no feature network was found or asked for; --evaluation.features names one."
        if settings["features"] is None
        else f"FID in {settings['features']} features, against {num_reference:,} further held-out images; that "
        "of the training images is what copying alone would give."
    )
    note = fid_note(report)
    return (
        f"Generated by {_sampling(settings)}. {fid} {f'{note} ' if note else ''}MQ < 0.3: so many images lie nearer to "
        f"one training image than 0.3 times the mean of the {settings['k']} nearest (squared distances); thresholds "
        "that tell nothing are left out. Held-out images show what is usual; their counts are scaled to the number of "
        "generated images. Far fewer than theirs is no merit: such images are unlike the data."
    )


def _sampling(settings: Mapping[str, Any]) -> str:
    weights = "EMA" if settings["use_ema"] else "raw"
    return f"{settings['sampler']}, {settings['num_inference_steps']} steps, {weights} weights, seed {settings['seed']}"


def publish(
    trainer: "pl.Trainer",
    report: Report,
    *,
    assessor: "Assessor",
    assessment: "Assessment",
    num_pairs: int | None,
) -> None:
    """Print the table and write the files of a run; of a ``fast_dev_run`` nothing is kept.

    Args:
        trainer: its run folder, and its loggers, which get the plots if they take any.
        report: of :func:`make_report`.
        assessor: what has measured the generated images.
        assessment: these images and their measures.
        num_pairs: number of generated images to show beside their nearest training image; None = make no plots.
    """

    def write(folder: Path) -> None:
        write_json(folder / METRICS, report)
        if num_pairs is not None:
            write_pictures(report, folder, assessor=assessor, assessment=assessment, num_pairs=num_pairs)

    console = rich.get_console()
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        with TemporaryDirectory() as temporary:
            write(Path(temporary))
        console.print(f"fast_dev_run: the evaluation of {len(assessment.images)} images worked; nothing is kept.")
        return
    from lightning_iet.utilities.lightning import log_image  # a comparison of runs needs no Lightning

    print_report(report)  # first, because the plots take a while
    folder = run_folder(trainer)
    write(folder)
    plots = () if num_pairs is None else PLOTS
    for plot in plots:
        log_image(trainer, f"eval/{Path(plot).stem}", folder / plot)
    gaps = sorted(path.name for path in folder.glob("gap*.png"))  # of anti-gradient control
    files = ", ".join((METRICS, *plots, *gaps))
    say(f"Written to {folder}: {files}")
