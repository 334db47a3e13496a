"""Find out whether a generator copies its training images."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_iet.audit.cache import BlockCache, all_or_none, process_group, rank
from lightning_iet.audit.core import Audit, Settings, audit_images
from lightning_iet.audit.features import Features, build_features
from lightning_iet.audit.findings import Findings, make_findings
from lightning_iet.audit.reading import ImageSet, read_images
from lightning_iet.audit.report import write_report
from lightning_iet.audit.search import Invariance
from lightning_iet.audit.verdict import findings_table
from lightning_iet.data.decoding import Fit, Size
from lightning_iet.data.sources import open_source
from lightning_iet.evaluation.membership import Membership
from lightning_iet.utilities.devices import usable_device
from lightning_iet.utilities.files import (
    FILES,
    METRICS,
    check_apart,
    check_free,
    check_writable,
    remedies,
    whole_folder,
)


@dataclass(frozen=True, kw_only=True)
class AuditJob:
    """Options of an audit.

    Args:
        out: Folder for the report.
        features: What distances are measured in: pixels, or a network: efficientnet, sscd, clip, inception,
            clean-inception, digits, or a TorchScript file (.ts).
        weights: The network's weight file.
        resize: Size to bring all images to, such as 64 or 64x48 (width x height); without it all must have one size.
        fit: Whether resizing stretches an image or crops its middle.
        invariance: Versions of a generated image that are compared too: mirrored (twice the time), shifted by one
            pixel (9 times), both (18 times).
        k: Neighbours in the mean of the memorized quantity.
        ratio: An image counts as a copy if its nearest training image is nearer than this times the next.
        duplicates: Look for near-duplicates inside the training set.
        pairs: Generated images, nearest to training images first, that the report shows.
        strict: Refuse images that cannot be read, instead of listing them.
        overwrite: Replace an earlier report.
        cache: Folder to keep finished work in, for further audits; by default it lies in OUT.partial until the report
            is written.
        workers: Processes that decode images; by default one for each core.
        device: "cpu", "cuda", "cuda:1" ...; "auto" = a GPU if there is one.

    Raises:
        ValueError: For values out of range, or if the report cannot be written.
    """

    out: Path = Path("audit")
    features: str = "pixels"
    weights: Path | None = None
    resize: str | None = None
    fit: Fit = "stretch"
    invariance: Invariance = "none"
    k: int = 50
    ratio: float = 1 / 3
    duplicates: bool = True
    pairs: int = 100
    strict: bool = False
    overwrite: bool = False
    cache: Path | None = None
    workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Find out now what would end a long job later."""
        for name in ("pairs", "workers"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"Argument `{name}` expected an integer ≥ 0, but got {value}.")
        _ = self.size, self.settings, self.on
        check_free(self.folder, overwrite=self.overwrite)
        if self.cache is not None and Path(self.cache).exists() and not Path(self.cache).is_dir():
            raise ValueError(f"Argument `cache` expected a folder, but got '{self.cache}', which is something else.")
        check_writable(self.folder, argument="out", remedy="Give another folder with --out.", make=False)

    @cached_property
    def folder(self) -> Path:
        """The report's folder, absolute, so that `.` has a name."""
        return Path(os.path.abspath(self.out))

    @cached_property
    def blocks(self) -> BlockCache:
        """Where finished work goes."""
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        return BlockCache(partial if self.cache is None else Path(self.cache))

    @cached_property
    def settings(self) -> Settings:
        """What counts as a copy."""
        return Settings(k=self.k, ratio=self.ratio, invariance=self.invariance, duplicates=self.duplicates)

    @cached_property
    def size(self) -> Size | None:
        """Height and width that images are brought to, from ``64`` or ``64x48``, which is width x height."""
        if self.resize is None:
            return None
        match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", self.resize)
        if match is None:
            raise ValueError(
                f"Argument `resize` expected a size such as 64 or 64x48 (width x height), but got '{self.resize}'."
            )
        return int(match[2] or match[1]), int(match[1])

    @cached_property
    def on(self) -> str:
        """The device."""
        return usable_device(self.device)

    @cached_property
    def network(self) -> Features:
        """What distances are measured in."""
        return build_features(self.features, weights=self.weights, device=self.on)

    @contextmanager
    def images(self, given: Mapping[str, Path | None]) -> Iterator[dict[str, ImageSet]]:
        """Read images; when the block has ended well, finished work is no longer kept.

        Args:
            given: where they are, by the names of the arguments.

        Yields:
            The images, without those that were not given.
        """
        paths = {name: Path(path) for name, path in given.items() if path is not None}
        check_apart({"out": self.folder, "cache": self.blocks.folder}, paths)
        sources = {name: open_source(path, argument=name) for name, path in paths.items()}
        _ = self.network
        reading: dict[str, Any] = {"size": self.size, "fit": self.fit, "strict": self.strict, "workers": self.workers}
        with process_group(), remedies(self.blocks.folder):
            yield {
                name: read_images(source, self.blocks, argument=name, location=str(paths[name]), **reading)
                for name, source in sources.items()
            }
            done = rank() == 0
        if self.cache is None and done:
            self.blocks.clear()

    def finish(
        self,
        sets: Mapping[str, ImageSet],
        *,
        settings: Mapping[str, Any] | None = None,
        membership: Membership | None = None,
    ) -> Findings:
        """Compare the images, and write the report on the first process.

        Args:
            sets: ``"generated"``, ``"train"`` and perhaps ``"held_out"`` images.
            settings: further settings to put on record.
            membership: what the generator's loss gives away, if it was measured.

        Returns:
            The figures, on every process.
        """
        found = audit_images(**sets, features=self.network, cache=self.blocks, settings=self.settings)
        reading = {"resize": self.resize, "fit": self.fit}
        findings = make_findings(found, settings=reading | dict(settings or {}), membership=membership)
        with all_or_none():
            if rank() == 0:
                self._publish(found, findings)
        return findings

    def _publish(self, found: Audit, findings: Findings) -> None:
        with whole_folder(self.folder, check=lambda: check_free(self.folder, overwrite=self.overwrite)) as folder:
            write_report(found, findings, folder, pairs=self.pairs)
        console = Console()
        console.print(findings_table(findings))
        for name, facts in findings.sets.items():
            if facts.skipped:
                console.print(
                    f"{name}: {len(facts.skipped)} of {facts.found} could not be read, see {METRICS}", style="bold"
                )
        line = f"Written to {self.out}: {', '.join(FILES)}"
        console.print(line, style="dim", soft_wrap=True, highlight=False, markup=False)


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
        options: Those of :class:`~lightning_iet.tools.audit.AuditJob`.

    Returns:
        The figures, as in metrics.json.

    Raises:
        FileNotFoundError: If there are no such images.
        ValueError: If images cannot be used, or the report cannot be written.
    """
    job = AuditJob(**options)
    with job.images({"generated": generated, "train": train, "held_out": held_out}) as sets:
        return job.finish(sets)
