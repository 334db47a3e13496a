"""Look at a training set before training: near-duplicates, outliers, and which method suits it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import ImageSet, Reading, read_images
from lightning_iet.data.decoding import Fit, parse_size
from lightning_iet.data.duplicates import write_groups
from lightning_iet.data.sources import open_source
from lightning_iet.functional.checks import check_at_least
from lightning_iet.functional.duplicates import Duplicates, find_duplicates, without_self
from lightning_iet.functional.neighbors import nearest_neighbors
from lightning_iet.plots import CAPTION, captioned_grid, save_figure
from lightning_iet.utilities.files import check_writable, printable, write_atomically
from lightning_iet.utilities.text import counted, say

RATIOS = (0.2, 1 / 3, 0.45)
"""Thresholds at which near-duplicates are counted: strict, usual, loose."""
FEW = 1_000  # images below which a model learns its training set by heart within hours
UNEVEN = 0.01  # share of images with a near-duplicate from which a set counts as uneven
OUTLIER = 3.0  # times the median distance to the nearest other image
SHOWN = 8  # groups, and images of each, in the plot


@dataclass(frozen=True)
class Inspection:
    """What there is to say about a training set.

    Attributes:
        images: number of images.
        size: channels, height and width.
        unreadable: images that could not be read.
        duplicates: for each threshold the number of groups, of images in them, and the size of the largest.
        outliers: names of images whose nearest other image is unusually far.
        advice: which method suits them, and its options.
    """

    images: int
    size: tuple[int, int, int]
    unreadable: int
    duplicates: dict[str, dict[str, int]]
    outliers: list[str]
    advice: str


def inspect(
    train: Path,
    *,
    out: Path = Path("inspection"),
    image_size: int | str | None = None,
    fit: Fit = "crop",
    ratio: float = 1 / 3,
    k: int = 50,
) -> Inspection:
    """Look at training images before training, and say which method suits them.

    Finds near-duplicates, which a model learns by heart first, and images unlike all others, which it learns by heart
    late. Writes duplicates.csv (every image with a near-duplicate, by group), duplicates.png (the largest groups),
    and inspection.json.

    Args:
        train: Folder of images, or whatever else `lightning-iet audit` reads.
        out: Folder for the results; files of the same names in it are replaced.
        image_size: Size to bring all images to, such as 64 or 64x48 (width x height); without it all must have one.
        fit: Whether resizing crops the middle of an image of another shape, or stretches it; by default as training
            does. (An audit wants it said, for a wrong guess hides copies.)
        ratio: Two images are near-duplicates if they are nearer than this times the usual distance around them.
        k: Images around an image that say what is usual there.

    Returns:
        What was found.

    Raises:
        ValueError: For settings out of range, a folder that cannot be written, or images that cannot be compared.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"Argument `ratio` expected a number in (0, 1], but got {ratio}. The usual one is 1/3.")
    check_at_least(1, k=k)
    size = parse_size(image_size)
    folder = Path(out)
    check_writable(folder, argument="out", remedy="Give another folder with --out.", make=False)
    with TemporaryDirectory() as work:
        images = read_images(
            open_source(train, argument="train"),
            BlockCache(Path(work)),
            argument="train",
            location=str(train),
            reading=Reading(size=size, fit=fit),
        )
        return inspect_images(images, folder, ratio=ratio, k=k)


def inspect_images(images: ImageSet, folder: Path, *, ratio: float = 1 / 3, k: int = 50) -> Inspection:
    """Inspect images that have been read; see :func:`inspect`.

    Args:
        images: at least three.
        folder: for the results.
        ratio: threshold of near-duplicates.
        k: images around an image; ``N - 1`` where there are fewer.

    Raises:
        ValueError: if there are fewer than three images.
    """
    if len(images) < 3:
        raise ValueError(f"Argument `train` expected at least three images, but got {len(images)}.")
    neighbors = min(k, len(images) - 1) + 1
    sq_distances, indices = without_self(*nearest_neighbors(images.pixels, images.pixels, neighbors))
    usual = [value for value in RATIOS if f"{value:.2f}" != f"{ratio:.2f}"]  # one row for what reads alike
    by_ratio = {value: find_duplicates(sq_distances, indices, ratio=value) for value in sorted([*usual, ratio])}
    found, nearest = by_ratio[ratio], sq_distances[:, 0].sqrt()
    order = nearest.argsort(descending=True)  # outliers, the farthest first
    channels, height, width = images.pixels.shape[1:]
    inspection = Inspection(
        images=len(images),
        size=(channels, height, width),
        unreadable=len(images.skipped),
        duplicates={
            f"{value:.2f}": {"groups": len(groups.members), "images": groups.images, "largest": groups.largest}
            for value, groups in by_ratio.items()
        },
        outliers=[images.names[i] for i in order[nearest[order] > OUTLIER * nearest.median()].tolist()],
        advice=advise(len(images), found),
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(inspection, found, images, folder)
    _print(inspection, folder, marked=f"{ratio:.2f}")
    return inspection


def advise(number: int, found: Duplicates) -> str:
    """Say what docs/howto/uneven-data.md advises for a training set.

    Example:
        >>> from lightning_iet.functional.duplicates import duplicate_groups
        >>> images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> advise(5_000, duplicate_groups(images)).partition(":")[0]
        'Even, and many images'
    """
    extra = found.images - len(found.members)
    if found.images >= max(2, UNEVEN * number):
        return (
            f"Uneven: {found.images} of {number} images have a near-duplicate. Leave {extra} of them out with "
            "--data.duplicates drop (or count each group once: balance), and guard what that misses with "
            "--agc.criterion record --agc.weigh draws (where 64 images are held out, also --agc.reference held_out "
            "--agc.reference_images 64)."
        )
    if number < FEW:
        return (
            f"Even, but few: {number} images are learnt by heart in a short time. Stop in time (--evaluation.keep_best "
            "true --evaluation.every_n_epochs N --evaluation.patience 3)."
        )
    return f"Even, and many images: hardly any of {number} has a near-duplicate. Train as usual, and audit the result."


def _write(inspection: Inspection, found: Duplicates, images: ImageSet, folder: Path) -> None:
    with write_atomically(folder / "inspection.json") as path:
        path.write_text(json.dumps({"kind": "inspection", **asdict(inspection)}, indent=1) + "\n")
    write_groups(found, images.names, folder / "duplicates.csv")
    shown = [group[:SHOWN] for group in found.members[:SHOWN]]
    if not shown:
        (folder / "duplicates.png").unlink(missing_ok=True)
        return
    columns = max(map(len, shown))
    blank = torch.ones_like(images.pixels[0], dtype=torch.float)
    places = [group[i] if i < len(group) else None for group in shown for i in range(columns)]
    figure = captioned_grid(
        [blank if place is None else images.pixels[place] / 255 for place in places],
        ["" if place is None else _caption(images.names[place]) for place in places],
        title=_title(found),
        columns=columns,
    )
    save_figure(figure, folder / "duplicates.png")


def _caption(name: str) -> str:
    """Return a name that fits over an image: without folders where it is long."""
    return printable(name if len(name) <= CAPTION else name.rpartition("/")[2])


def _title(found: Duplicates) -> str:
    """Say what duplicates.png shows, and what of it is left out."""
    groups, largest = len(found.members), max(map(len, found.members))
    left_out = [f"the {SHOWN} largest of {groups:,} groups"] if groups > SHOWN else []
    left_out += [f"at most {SHOWN} images of each (the largest has {largest:,})"] if largest > SHOWN else []
    shown = f"\nShown are {', '.join(left_out)}; duplicates.csv lists all" if left_out else ""
    return f"Near-duplicates in the training set: each row is one group{shown}"


def _print(inspection: Inspection, folder: Path, *, marked: str) -> None:
    console = Console()
    channels, height, width = inspection.size
    left_out = f", {inspection.unreadable} could not be read" if inspection.unreadable else ""
    console.print(f"{inspection.images} images, {channels} x {height} x {width}{left_out}", highlight=False)
    table = Table("threshold", "groups of near-duplicates", "images in them", "largest group")
    for ratio, counts in inspection.duplicates.items():
        cells = (f"{ratio} (used)" if ratio == marked else ratio, *map(str, counts.values()))
        table.add_row(*cells)
    console.print(table)
    if inspection.outliers:
        names = ", ".join(map(printable, inspection.outliers[:5]))
        more = " …" if len(inspection.outliers) > 5 else ""
        say(f"{counted(len(inspection.outliers), 'image')} unlike all others: {names}{more}")
    console.print(inspection.advice, style="bold", highlight=False, markup=False)
    written = ("duplicates.csv", "duplicates.png", "inspection.json")
    say(f"Written to {folder}: {', '.join(name for name in written if (folder / name).exists())}", style="dim")
