"""Find out whether a generator copies its training images."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from lightning_iet.audit.cache import BlockCache, all_or_none, process_group, rank, world_size
from lightning_iet.audit.core import Audit, Settings, audit_images, check_sets, same_channels
from lightning_iet.audit.features import PIXELS, Features, build_features, estimated_seconds
from lightning_iet.audit.findings import Findings, make_findings
from lightning_iet.audit.pairs import Review, apply_review, read_review
from lightning_iet.audit.reading import ImageSet, Reading, read_sets, with_channels
from lightning_iet.audit.report import write_report
from lightning_iet.audit.search import Invariance, comparison_seconds, views
from lightning_iet.audit.verdict import findings_table, remarks
from lightning_iet.data.decoding import Background, Fit, parse_size
from lightning_iet.data.formats import format_range, parse_range
from lightning_iet.data.sources import open_source
from lightning_iet.evaluation.membership import Membership
from lightning_iet.functional.checks import check_at_least
from lightning_iet.utilities.devices import usable_device
from lightning_iet.utilities.errors import arguments_called
from lightning_iet.utilities.files import FILES, check_apart, check_free, check_writable, remedies, whole_folder
from lightning_iet.utilities.text import in_words, say

AUTO = "auto"
MINUTE = 60.0
LEAST_ADVISED = 64  # pixels a side that a smaller image is advised to have at least
K = 50
"""The published number of neighbours in the mean of the memorized quantity."""
Pages = Literal["all", "first"]


@dataclass(frozen=True, kw_only=True)
class AuditJob:
    """What all audits share: options, reading, searching and publishing. The options are those of :func:`audit`."""

    out: Path
    features: str
    feature_weights: Path | None
    image_size: int | str | None
    fit: Fit | None
    range: str | None
    background: Background | None
    grey: bool
    pages: Pages
    moved: bool | None
    invariance: Invariance
    k: int | None
    ratio: float
    duplicates: bool
    false_finds: float
    review: Path | None
    title: str
    show_images: bool
    num_pairs: int
    fail_on_copies: bool | float
    strict: bool
    overwrite: bool
    cache: Path | None
    num_workers: int | None
    device: str

    def __post_init__(self) -> None:
        """Find out now what would end a long job later."""
        check_at_least(0, optional=True, num_pairs=self.num_pairs, num_workers=self.num_workers)
        if not 0 <= self.fail_on_copies <= 1:
            raise ValueError(f"Argument `fail_on_copies` expected a share from 0 to 1, but got {self.fail_on_copies}.")
        _ = self.reading, self.settings, self.on, self.reviewed
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
        return Settings(
            k=K if self.k is None else self.k,
            ratio=self.ratio,
            invariance=self.invariance,
            duplicates=self.duplicates,
            moved=False if self.moved is None and self.features == PIXELS else self.moved,
            false_finds=self.false_finds,
        )

    def settings_for(self, train: ImageSet) -> Settings:
        """What counts as a copy of these training images, which may be fewer than the usual neighbours."""
        return self.settings if self.k is not None else replace(self.settings, k=max(2, min(K, len(train))))

    @cached_property
    def reviewed(self) -> Review | None:
        """What a person has decided about pairs of an earlier audit."""
        return None if self.review is None else read_review(Path(self.review))

    @cached_property
    def reading(self) -> Reading:
        """How images are read."""
        return Reading(
            size=parse_size(self.image_size),  # ``64x48`` is width x height
            fit=self.fit,
            value_range=parse_range(self.range),
            background=self.background,
            strict=self.strict,
            workers=self.num_workers,
        )

    @cached_property
    def on(self) -> str:
        """The device."""
        return usable_device(self.device)

    @cached_property
    def network(self) -> Features:
        """What distances are measured in."""
        name = PIXELS if self.features == AUTO else self.features
        with arguments_called(name="features", weights="feature_weights"):
            return build_features(name, weights=self.feature_weights, device=self.on)

    @contextmanager
    def read(
        self, given: Mapping[str, Path | None], *, reading: Reading | None = None
    ) -> Iterator[dict[str, ImageSet]]:
        """Read images; when the block has ended well, finished work is no longer kept.

        Args:
            given: Where they are, by the names of the arguments.
            reading: How to read them, if not as the options say.

        Yields:
            The images, without those that were not given.
        """
        paths = {name: Path(path) for name, path in given.items() if path is not None}
        check_apart({"out": self.folder, "cache": self.blocks.folder}, paths)
        sources = {name: open_source(path, argument=name, pages=self.pages) for name, path in paths.items()}
        _ = self.network
        locations = {name: str(path) for name, path in paths.items()}
        is_new = self.cache is None and not self.blocks.folder.exists()
        try:
            with process_group(), remedies(self.blocks.folder):
                yield read_sets(sources, self.blocks, locations=locations, reading=reading or self.reading)
                done = rank() == 0
        except (ValueError, TypeError) as error:
            if is_new and not isinstance(error.__cause__, OSError):  # refused: there is nothing to go on with
                self.blocks.clear()
            raise
        if self.cache is None and done:
            self.blocks.clear()

    def finish(
        self,
        sets: Mapping[str, ImageSet],
        *,
        settings: Mapping[str, Any] | None = None,
        membership: Membership | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> Findings:
        """Compare the images, in grey if that is asked for, and write the report on the first process.

        Args:
            sets: ``"generated"``, ``"train"`` and perhaps ``"held_out"`` images.
            settings: Further settings to put on record.
            membership: What the generator's loss gives away, if it was measured.
            refused: By option that this command does not take, what to do instead.

        Returns:
            The figures, on every process.
        """
        if self.grey:
            sets = {name: with_channels(images, 1) for name, images in sets.items()}
        judged_by = self.settings_for(sets["train"])
        check_sets(sets, judged_by.k)
        sets = same_channels(sets)
        self._say_how_long(sets, judged_by)
        found = audit_images(**sets, features=self.network, cache=self.blocks, settings=judged_by)
        if self.reviewed is not None:
            found = apply_review(found, self.reviewed)
        options = ("image_size", "fit", "range", "background", "grey", "pages", "fail_on_copies")
        findings = make_findings(
            found,
            settings={name: getattr(self, name) for name in options}
            | {"range": format_range(self.reading.value_range), "background": self.reading.colour}
            | dict(settings or {}),
            membership=membership,
            title=self.title,
            command=_command(),
            refused=refused,
        )
        with all_or_none():
            if rank() == 0:
                self._publish(found, findings)
        return findings

    def _say_how_long(self, sets: Mapping[str, ImageSet], settings: Settings) -> None:
        """Say before they begin that a network's features, or distances of pixels, take a minute or more."""
        options: dict[str, Any] = {"invariance": self.invariance, "within": settings.duplicates}
        with all_or_none():
            network = estimated_seconds(sets, self.network, self.blocks, versions=len(views(self.invariance)))
            pixels = comparison_seconds(sets, self.network, self.blocks, k=settings.k, **options)
        network, pixels = network / world_size(), pixels / world_size()
        if max(network, pixels) < MINUTE or rank() != 0:
            return
        line = f"Features of all images by '{self.features}' will take about {in_words(network)}."
        if pixels:
            line = f"Comparing all pixels will take at most about {in_words(pixels)}"
            height, width = sets["train"].pixels.shape[2:]
            side = smaller = min(height, width)
            is_read = bool(sets["generated"].origin.sizes)  # drawn images have the size that the model gives them
            while is_read and smaller > LEAST_ADVISED and pixels * (smaller / side) ** 2 > MINUTE:
                smaller = max(LEAST_ADVISED, smaller // 2)
            share = smaller / side
            size = f"{round(width * share)}x{round(height * share)}"
            line += f"; with --image-size {size} about {in_words(pixels * share**2)}." if share < 1 else "."
        Console(stderr=True).print(line, style="dim", soft_wrap=True, highlight=False, markup=False)

    def _publish(self, found: Audit, findings: Findings) -> None:
        with whole_folder(self.folder, check=lambda: check_free(self.folder, overwrite=self.overwrite)) as folder:
            write_report(found, findings, folder, pairs=self.num_pairs, images=self.show_images)
        console = Console()
        console.print(findings_table(findings))
        for name, facts in findings.sets.items():
            for line in remarks(facts):
                console.print(f"{name}: {line}", style="bold", highlight=False, markup=False)
        for line in self._without_effect(found):
            say(line, style="bold")
        say(f"Written to {self.out}: {', '.join(name for name in FILES if (self.folder / name).exists())}", style="dim")

    def _without_effect(self, found: Audit) -> list[str]:
        """Say how many decisions count for nothing, or not for all: a sentence for each reason."""
        count, lines = 0 if self.reviewed is None else len(self.reviewed), []

        def which(part: int) -> str:
            some = f"{part:,} of the {count:,} decisions"
            if part == count:
                some = "The decision" if count == 1 else f"The {count:,} decisions"
            return f"{some} in '{self.review}'"

        if found.unused_decisions:  # of other pairs, or of files that have changed
            belongs = "belongs" if found.unused_decisions == 1 else "belong"
            lines.append(
                f"{which(found.unused_decisions)} {belongs} to no pair that these images are found in: look at the "
                "pairs, and mark them anew."
            )
        if part := found.outweighed_decisions:
            is_of = "dismisses a pair of an image that stays" if part == 1 else "dismiss pairs of images that stay"
            lines.append(
                f"{which(part)} {is_of} named or noticed beside another training image: look at that pair too."
            )
        return lines


def _command() -> str:
    """Return the command line, if this is one of an audit."""
    is_command = sys.argv[1:2] in (["audit"], ["audit-model"], ["audit_model"])
    return shlex.join(["lightning-iet", *sys.argv[1:]]) if is_command else ""


def audit(
    generated: Path,
    train: Path,
    *,
    held_out: Path | None = None,
    out: Path = Path("audit"),
    features: str = AUTO,
    feature_weights: Path | None = None,
    image_size: int | str | None = None,
    fit: Fit | None = None,
    range: str | None = None,
    background: Background | None = None,
    grey: bool = False,
    pages: Pages = "all",
    moved: bool | None = None,
    invariance: Invariance = "none",
    k: int | None = None,
    ratio: float = 1 / 3,
    duplicates: bool = True,
    false_finds: float = 0.05,
    review: Path | None = None,
    title: str = "",
    show_images: bool = True,
    num_pairs: int = 100,
    fail_on_copies: bool | float = False,
    strict: bool = False,
    overwrite: bool = False,
    cache: Path | None = None,
    num_workers: int | None = None,
    device: str = "auto",
) -> Findings:
    """Find out whether generated images are copies of training images.

    Each of the three sets of images is a folder (with folders in it) of files that Pillow reads, a .npy or .npz file,
    a WebDataset .tar or a folder of such archives, or a Hugging Face data set (a folder of save_to_disk, or Parquet).

    Looks for exact, mirrored, recoloured, degraded (blurred, noisy, compressed) and moved copies, and plants some of
    its own to see how well they are found.
    Prints a table and writes report.html (one file that needs no network), pairs.csv (every generated image with its
    nearest training images), metrics.json and two pictures. An audit that is interrupted goes on when the same command
    is given again; several processes of torchrun share the work and find the same figures.

    Args:
        generated: The images to judge.
        train: The images that may have been copied.
        held_out: Real images that the generator was not trained on: what the figures look like without copies.
        out: Folder for the report.
        features: What the published measures are taken in: pixels, or a network: efficientnet, sscd, clip, inception,
            clean-inception, digits, or a TorchScript file (.ts). auto = pixels, and moved copies are looked for by a
            small network; pixels = without it.
        feature_weights: The network's weight file.
        image_size: Size to bring all images to, such as 64 or 64x48 (width x height); without it all must have one.
        fit: Whether resizing crops the middle of an image of another shape, as `fit` does, or stretches it; without it
            such images are refused.
        range: Values of black and white in images of more than 8 bits, such as 0:4095 or -1:1; auto = 0 to the least of
            8, 10, 12, 14 and 16 bits that holds all integers, and 0:1 for floating point; full = 0:65535 for integers.
        background: Colour under transparent pixels, by default white; where the sets differ in transparency, the
            verdict is left open until a colour is named.
        grey: Leave colours aside: bring all images to grey first.
        pages: Whether every page of a file (TIFF stack, animation) is an image, or only the first.
        moved: Look for shifted, turned and zoomed copies; by default where that takes less than about 15
            minutes.
        invariance: Versions of a generated image that the published measures compare too: mirrored (twice the time),
            shifted by one pixel (9 times), both (18 times).
        k: Neighbours in the mean of the memorized quantity; by default 50, or all where there are fewer images.
        ratio: By the published measure an image counts as a copy if its nearest training image is nearer than this
            times the next.
        duplicates: Look for near-duplicates inside the training set.
        false_finds: Level of the share of innocent images among those named by comparison with held-out images.
        review: File of confirmed and dismissed pairs that was saved in the page of an earlier report.
        title: Title of the report.
        show_images: Show images in the report. Without them it holds names and figures only.
        num_pairs: Generated images, nearest to training images first, that the report shows.
        fail_on_copies: Exit with status 3 if more than this share of the images are copies (alone: any), with 4 if it
            cannot be decided.
        strict: Refuse images that cannot be read, instead of listing them.
        overwrite: Replace an earlier report.
        cache: Folder to keep finished work in, for further audits; by default it lies in OUT.partial until the report
            is written.
        num_workers: Processes that decode images; by default one for each core.
        device: "cpu", "cuda", "cuda:1" ...; "auto" = a GPU if there is one.

    Returns:
        The figures, as in metrics.json, with ``verdict``, ``pairs`` and ``metrics``.

    Raises:
        FileNotFoundError: If there are no such images.
        ValueError: If images cannot be used, an option is out of range, or the report cannot be written.
    """
    options = {name: value for name, value in locals().items() if name not in ("generated", "train", "held_out")}
    job = AuditJob(**options)
    with job.read({"generated": generated, "train": train, "held_out": held_out}) as sets:
        return job.finish(sets)
