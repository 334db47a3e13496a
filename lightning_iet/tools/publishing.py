"""Where the result of a run goes: the terminal, the run folder, the loggers."""

from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import rich
from torch import Tensor

from lightning_iet.tools.assessment import Assessment
from lightning_iet.tools.report import METRICS_FILE, PICTURES, Report, report_table, write_pictures, write_report
from lightning_iet.tools.run_folder import run_folder

__all__ = ["publish"]


def publish(trainer: pl.Trainer, report: Report, *, assessment: Assessment, train: Tensor, num_pairs: int) -> None:
    """Prints the table and writes the files of a run; of a ``fast_dev_run`` nothing is kept.

    Args:
        trainer: its run folder, and its loggers, which get the pictures if they take any.
        report: of :func:`~lightning_iet.tools.report.make_report`.
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


def _write(report: Report, folder: Path, *, assessment: Assessment, train: Tensor, num_pairs: int) -> None:
    write_report(report, folder)
    write_pictures(report, folder, assessment=assessment, train=train, num_pairs=num_pairs)
