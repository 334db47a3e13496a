"""Find out whether a generator copies its training images."""

from pathlib import Path
from typing import Any

from lightning_iet.audit.findings import Findings
from lightning_iet.tools.audit_job import AuditJob

__all__ = ["audit"]


def audit(generated: Path, train: Path, *, held_out: Path | None = None, **options: Any) -> Findings:
    """Find out whether generated images are copies of training images.

    Each of the three sets of images is a folder (with folders in it) of files that Pillow reads, a .npy or .npz file,
    a WebDataset .tar or a folder of such shards, or a Hugging Face data set (a folder of save_to_disk, or Parquet).

    Prints a table and writes report.html (one file that needs no network), pairs.csv (every generated image with its
    nearest training images), metrics.json and two pictures. An audit that is interrupted goes on when the same command
    is given again; several processes of torchrun share the work and find the same figures.

    Args:
        generated: The images to judge.
        train: The images that may have been copied.
        held_out: Real images that the generator was not trained on: what the figures look like without copies.
        options: Those of :class:`~lightning_iet.tools.audit_job.AuditJob`.

    Returns:
        The figures, as in metrics.json.

    Raises:
        FileNotFoundError: If there are no such images.
        ValueError: If images cannot be used, or the report cannot be written.
    """
    job = AuditJob(**options)
    with job.images({"generated": generated, "train": train, "held_out": held_out}) as sets:
        return job.finish(sets)
