"""Train with and without protection side by side, and show what each model copies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from lightning_iet.data.duplicates import images_of
from lightning_iet.data.known_sets import DigitsDataModule
from lightning_iet.evaluation.memorization import RATIO, measure_closeness
from lightning_iet.evaluation.report import read_metrics
from lightning_iet.functional.checks import check_at_least
from lightning_iet.functional.duplicates import duplicate_groups
from lightning_iet.modules.pretrained import load_any_module
from lightning_iet.plots import RunPairs, pairs_of_runs, save_figure
from lightning_iet.search.jobs import Job, interrupted_by_sigterm, run_jobs
from lightning_iet.utilities.files import METRICS, check_writable, free_folder
from lightning_iet.utilities.progress import progress_bar
from lightning_iet.utilities.text import say, three_digits

RUNS = {"plain": "plain training", "protected": "AGC by records"}
CONFIGS = {"plain": "digits/uneven", "protected": "digits/uneven_record"}
PICTURE = "demo.png"
_STEPS_OF_EPOCH = 19
_SHOWN = 12  # pairs of each run in the picture


def demo(*, out: Path = Path("runs/demo"), max_epochs: int = 130, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Train the same small model twice, plainly and protected, on digits of which ten occur 20 times each.

    Both runs go side by side, each on a part of the cores, for about three minutes. Prints one table of quality and
    copies, and writes demo.png: of each model the images that come closest to a training image. The runs are those of
    `lightning-iet fit --config configs/digits/uneven.yaml` and uneven_record.yaml; their folders hold all else.

    Args:
        out: Folder for both runs and the picture; one that holds files already is left as it is.
        max_epochs: Length of both runs, of 19 steps each.
        seed: Seed of initial weights, training and sampled images.

    Returns:
        What ``metrics.json`` of each run holds, by ``plain`` and ``protected``.

    Raises:
        ValueError: If ``max_epochs`` is less than 1, the folder cannot be written, or a run failed.
    """
    check_at_least(1, max_epochs=max_epochs)
    folder = free_folder(Path(out))
    check_writable(folder, argument="out", remedy="Give another folder with `--out`.")
    jobs = [
        Job(number, {}, _command(name, max_epochs, seed), folder / name, METRICS) for number, name in enumerate(RUNS)
    ]
    _train(jobs, max_epochs)
    reports = {name: read_metrics(folder / name / METRICS, kind="evaluation") for name in RUNS}
    Console().print(_table(reports))
    _draw(folder, reports)
    say(f"Written to {folder}: {PICTURE}, and a folder of each run", style="dim")
    return reports


def _command(name: str, epochs: int, seed: int) -> list[str]:
    options = {"seed_everything": seed, "trainer.max_epochs": epochs, "trainer.enable_progress_bar": "false"}
    # What is measured at the end is what is drawn, however long the run.
    saving = {"every_n_epochs": epochs, "save_on_train_epoch_end": True, "filename": "last"}
    kind = "lightning.pytorch.callbacks.ModelCheckpoint"
    options |= {
        "evaluation.seed": seed,
        "trainer.callbacks": json.dumps([{"class_path": kind, "init_args": saving}]),
    }
    return ["lightning-iet", "fit", "--config", CONFIGS[name], *(f"--{key}={value}" for key, value in options.items())]


def _train(jobs: Sequence[Job], epochs: int) -> None:
    """Run all jobs at once; a bar shows how far they are by the last step in each run's metrics.csv."""
    errors: list[str] = []

    def ended(job: Job, error: str | None) -> None:
        errors.extend([] if error is None else [error])

    total = len(jobs) * epochs * _STEPS_OF_EPOCH
    with (
        interrupted_by_sigterm(),
        progress_bar("Training two models, in steps", total, is_slow=True) as bar,
    ):
        run_jobs(
            jobs,
            len(jobs),
            ended=ended,
            waiting=lambda: bar.show(sum(_steps(job.folder / "metrics.csv") for job in jobs)),
        )
    if errors:
        raise ValueError(f"Expected both runs to finish, but got: {min(errors)}")


def _steps(file: Path) -> int:
    """The last step in a metrics.csv; 0 as long as there is none."""
    try:
        header, *lines = file.read_text().splitlines()
        return int(lines[-1].split(",")[header.split(",").index("step")])
    except (OSError, ValueError, IndexError):
        return 0


def _table(reports: dict[str, dict[str, Any]]) -> Table:
    first = reports["plain"]
    data = first["data"]
    groups, once = data["groups_of_near_duplicates"], data["num_train"] - data["near_duplicates"]
    table = Table(
        title="The same network, data and number of steps",
        caption=f"A copy lies less than a third as far from a training image as from the next that shows something"
        f" else (near-duplicates count as one image). FID against {data['num_reference']:,} held-out images.",
        caption_justify="left",
    )
    names = ("", "FID", f"copies of the {groups}\nrepeated images", f"copies of the\n{once} others")
    for name in names:
        table.add_column(name, justify="left" if not name else "right")
    for name, report in reports.items():
        table.add_row(RUNS[name], *_cells(report["generated"]))
    table.add_section()
    table.add_row("held-out images", *_cells(first["control"]), style="dim")
    return table


def _cells(scores: dict[str, Any]) -> list[str]:
    num = scores["num_images"]
    shares = (scores[f"copied_fraction_of_{kind}"] for kind in ("repeated", "others"))
    return [three_digits(scores["fid"]), *(f"{round(share * num)} of {num}" for share in shares)]


def _draw(folder: Path, reports: dict[str, dict[str, Any]]) -> None:
    """Sample the images of each run again, as its evaluation did, and draw those closest to a training image."""
    config = yaml.safe_load((folder / "plain" / "config.yaml").read_text(encoding="utf-8"))
    data = DigitsDataModule(**config["data"]["init_args"])
    data.setup("fit")
    train = images_of(data.train_set)
    duplicates = duplicate_groups(train, k=50)
    sizes = duplicates.group.bincount()[duplicates.group]
    rows = []
    for name, report in reports.items():
        settings, scores = report["settings"], report["generated"]
        options = {key: settings[key] for key in ("seed", "sampler", "num_inference_steps", "use_ema")}
        module = load_any_module(folder / name / "checkpoints" / "last.ckpt")
        images = module.sample(settings["num_samples"], batch_size=256, **options)
        closeness = measure_closeness(images, train, 50, duplicates=duplicates)
        ratios = closeness.copy_ratio
        closest = ratios.argsort(stable=True)[:_SHOWN]
        copies = round(scores["copied_fraction"] * len(images))
        are = "is a copy" if copies == 1 else "are copies"
        title = f"{RUNS[name]}: {copies} of {len(images)} images {are}; FID {three_digits(scores['fid'])}"
        nearest = closeness.nearest[closest]
        pairs = torch.stack([images[closest], train[nearest]], dim=1)
        rows.append(RunPairs(title, pairs, ratios[closest].tolist(), sizes[nearest].tolist()))
    save_figure(pairs_of_runs(rows, limit=RATIO), folder / PICTURE)
