"""What each measure of the audit finds of copies that were planted, and what it takes for copies wrongly.

    python -m benchmarks.planted_copies --out docs/measures/planted-copies.csv

Fashion-MNIST: 20,000 training images; 10,000 held-out images in the place of generated ones, of which 1 %, 0.1 % and
0.01 % are replaced by copies of training images, changed in one way; 5,000 further held-out images as the control.
Images are judged one by one, so that each set of copies is searched for once and counted in every mixture.

``--table FILE`` writes the table into the documentation, between its two marks, from the CSV file alone.
"""

import argparse
import csv
import gzip
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.core import find_copies
from lightning_iet.audit.features import build_features
from lightning_iet.audit.findings import below
from lightning_iet.audit.reading import ImageSet, image_set
from lightning_iet.audit.search import Invariance, References, nearest_references, views
from lightning_iet.audit.statistics import excess, share
from lightning_iet.functional.duplicates import find_duplicates, without_self

DATA = Path("/usr/share/datasets/fashion-mnist")
TRAIN, CONTROL, TOTAL = 20_000, 5_000, 10_000
LEVELS = (0.01, 0.001, 0.0001)
MEASURES = {  # name: (invariance, ratio, threshold)
    "identical": ("none", "identical", 0.0),
    "d1/d2 < 1/3": ("none", "nearest", 1 / 3),
    "d1/d2 < 1/3, near-duplicates once": ("none", "distinct", 1 / 3),
    "MQ < 0.15": ("none", "mean", 0.15),
    "MQ < 0.3": ("none", "mean", 0.3),
    "d1/d2 < 1/3, near-duplicates once, flip": ("flip", "distinct", 1 / 3),
    "d1/d2 < 1/3, near-duplicates once, shift": ("shift", "distinct", 1 / 3),
}
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def shifted(images: Tensor) -> Tensor:
    """Move by one pixel to the right; what comes in is black, as the border is."""
    moved = images.roll(1, dims=-1)
    moved[..., 0] = 0
    return moved


def reencoded(images: Tensor) -> Tensor:
    """Through JPEG of quality 75."""
    return torch.stack([torch.from_numpy(_jpeg(image[0].numpy()))[None] for image in images])


def _jpeg(pixels: np.ndarray) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=75)
    with Image.open(file) as image:
        return np.array(image)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda images: images,
    "mirrored": lambda images: images.flip(-1),
    "shifted by 1 pixel": shifted,
    "JPEG, quality 75": reencoded,
    "brightness × 0.8": lambda images: (images.float() * 0.8).round().to(torch.uint8),
}


def load(kind: str) -> Tensor:
    """Read Fashion-MNIST as Debian packages it."""
    raw = gzip.decompress((DATA / f"{kind}-images-idx3-ubyte.gz").read_bytes())
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy())


def judge(sets: dict[str, ImageSet], train: ImageSet, cache: BlockCache) -> dict[str, dict[str, Tensor]]:
    """For every measure and set, which images it takes for copies."""
    features = build_features("pixels")
    references = References.of(features.rows(train.pixels), train.sha256)

    def search(images: ImageSet, invariance: Invariance, k: int, name: str):
        return nearest_references(
            images, references, k=k, features=features, views=views(invariance), cache=cache, argument=name
        )

    itself = search(train, "none", 51, "train")
    duplicates = find_duplicates(*without_self(itself.sq_distances, itself.indices))
    print(f"{duplicates.images} training images have a near-duplicate, in {len(duplicates.members)} groups", flush=True)
    found: dict[str, dict[str, Tensor]] = {measure: {} for measure in MEASURES}
    for invariance in dict.fromkeys(invariance for invariance, _, _ in MEASURES.values()):
        for name, images in sets.items():
            neighbors = search(images, invariance, 50, f"{name} ({invariance})")
            copies = find_copies(images, train, neighbors, views=views(invariance), duplicates=duplicates)
            for measure, (of, ratio, threshold) in MEASURES.items():
                if of == invariance:
                    flags = copies.identical if ratio == "identical" else below(copies.ratios[ratio], threshold)
                    found[measure][name] = flags
            print(f"{name}, {invariance}: done", flush=True)
    return found


def measure_all(cache: Path) -> list[dict[str, object]]:
    """Work out one row for each measure, change and share of copies."""
    images, test = load("train"), load("t10k")
    train = image_set(images[:TRAIN], location="train")
    control = images[50_000 : 50_000 + CONTROL]
    planted = images[torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0))[: round(LEVELS[0] * TOTAL)]]
    sets = {"generated": test[:TOTAL], "control": control} | {name: f(planted) for name, f in CHANGES.items()}
    found = judge({name: image_set(pixels, location=name) for name, pixels in sets.items()}, train, BlockCache(cache))
    return [
        _row(measure, change, round(level * TOTAL), flags)
        for measure, flags in found.items()
        for change in CHANGES
        for level in LEVELS
    ]


def _row(measure: str, change: str, planted: int, flags: dict[str, Tensor]) -> dict[str, object]:
    """Replace the first images of the generated ones by the first of the copies."""
    hits, false = int(flags[change][:planted].sum()), int(flags["generated"][planted:].sum())
    control = share(int(flags["control"].sum()), len(flags["control"]))
    larger = excess(share(hits + false, len(flags["generated"])), control)
    return {
        "measure": measure,
        "change": change,
        "planted": planted,
        "found": hits,
        "false_positives": false,
        "of": len(flags["generated"]) - planted,
        "control": control.count,
        "of_control": control.total,
        "p_value": f"{larger.p_value:.2g}",
    }


def table(rows: Sequence[dict[str, str]]) -> str:
    """Lay out the rows as Markdown: a line for each measure, a column for each change."""
    changes = list(dict.fromkeys(row["change"] for row in rows))
    lines = [["measure", *changes, "false positives", "control"]]
    for measure in dict.fromkeys(row["measure"] for row in rows):
        own = [row for row in rows if row["measure"] == measure]
        cells = [", ".join(_cell(row) for row in own if row["change"] == change) for change in changes]
        least = own[-1]  # the mixture with the fewest copies
        control = f"{least['control']} of {int(least['of_control']):,}"
        lines.append([measure, *cells, f"{least['false_positives']} of {int(least['of']):,}", control])
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(row: dict[str, str]) -> str:
    """How many of the planted copies were found; bold where the audit would speak of copying."""
    text = f"{row['found']}/{row['planted']}"
    certain = row["measure"] == "identical" and row["found"] != "0" and row["control"] == "0"
    return f"**{text}**" if certain or float(row["p_value"]) < 0.01 else text


def write_table(source: Path, target: Path) -> None:
    """Put the table of a CSV file between the marks of a page."""
    with source.open(newline="", encoding="utf-8") as file:
        text = table(list(csv.DictReader(file)))
    head, _, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    target.write_text(head + BEGIN + text + END + tail, encoding="utf-8")


def main() -> None:
    """Measure, write the CSV file, and the table if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("planted-copies.csv"), help="CSV file (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="page to write the table of an existing CSV file into")
    parser.add_argument("--cache", type=Path, help="folder to keep finished work in")
    args = parser.parse_args()
    if args.table:
        write_table(args.out, args.table)
        return
    with TemporaryDirectory() as folder:
        rows = measure_all(args.cache or Path(folder))
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table([{name: str(value) for name, value in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
