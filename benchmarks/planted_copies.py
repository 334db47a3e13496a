"""What the audit finds of copies that were planted, by kind, beside other tools for near-duplicates.

    python -m benchmarks.planted_copies --out docs/measures/planted-copies.csv
    python -m benchmarks.planted_copies --out docs/measures/planted-copies.csv --page docs/measures/planted-copies.md \
        --figure docs/images/planted_copies.png
    python -m benchmarks.planted_copies --simulate
    python -m benchmarks.planted_copies --near-duplicates 200

Two sets: Fashion-MNIST as Debian packages it, and crops of the photographs that scikit-learn and scikit-image ship,
training images from the left half of each, all others from the right half. Training images are changed in one way and
searched for, among innocent images that nobody copied and with held-out images as the control. A copy is found if it is
called one, and of the right training image. At last 200 audits of images without copies are counted: of 600
images by all searches; and of 2,400, lest one image among few decides, by all but the slow search for moved copies.

The others, where they are installed (``pip install imagededup cleanvision``): imagededup's PHash and CNN, the latter
with the features of EfficientNet-Lite0 at 112 pixels, since its own weights would have to be fetched; and cleanvision.
Their thresholds are their own defaults. The second command writes the table and the figure from the CSV file alone.
"""

import argparse
import csv
import gzip
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.core import Copies, Settings, audit_images, find_copies, measure_noise
from lightning_iet.audit.disguises import Matches, find_disguised
from lightning_iet.audit.evidence import discover, is_noticed, noticeable, telling_searches, weigh
from lightning_iet.audit.features import build_features
from lightning_iet.audit.findings import make_findings
from lightning_iet.audit.reading import ImageSet, image_set
from lightning_iet.audit.search import References, nearest_references, views
from lightning_iet.evaluation.verdict import SIGNIFICANT

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
TRAIN, HELD_OUT, INNOCENT, EACH = 1000, 400, 200, 20
AUDITS = 200  # of images without copies
POOL = 2400  # images that nobody copied, searched for by all but the search for moved copies
SIZES = {"60 to 300": (60, 300), "1,000": (1000, 1000)}  # least and largest number of images in a set of such audits
LEVEL = 0.05  # share of false finds that is promised
INNOCENTS, WITHOUT = "innocent images called copies", "audits without copies:"
TAILS = (12.0, 8.0, 6.0, 4.0)  # exponents of four simulated searches
SIMULATED, CORRELATIONS, COPIED = 1000, (0.0, 0.6, 0.95), (0, 4, 10)  # audits, and what is simulated of each
SIDE = 64  # pixels of the crops of photographs
NETWORK_SIDE = 112  # of the network beside imagededup's CNN
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
METHODS = {
    "audit": "the audit: named",
    "audit, noticed": "the audit: noticed",
    "pixels": "d1/d2 < 1/3 of pixels",
    "imagededup PHash": "imagededup, PHash",
    "imagededup CNN": "imagededup, CNN",
    "cleanvision": "cleanvision",
}


# --- changes ----------------------------------------------------------------------------------------------------------


def _rounded(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


def linear(scale: float, shift: float = 0) -> Callable[[Tensor], Tensor]:
    """Return ``scale * x + shift`` of values from 0 to 255."""
    return lambda images: _rounded(scale * images.float() + shift)


def gamma(exponent: float) -> Callable[[Tensor], Tensor]:
    """Return a change of gamma."""
    return lambda images: _rounded(255 * (images.float() / 255) ** exponent)


def saved(kind: str, **options: object) -> Callable[[Tensor], Tensor]:
    """Return saving in a format and reading again."""

    def change(images: Tensor) -> Tensor:
        found = []
        for image in images:
            file, array = BytesIO(), image.permute(1, 2, 0).numpy()
            Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, kind, **options)
            with Image.open(file) as read:
                again = np.array(read.convert("L" if array.shape[2] == 1 else "RGB"))
            found.append(torch.from_numpy(again.reshape(array.shape)).permute(2, 0, 1))
        return torch.stack(found)

    return change


def moved(angle: float = 0, zoom: float = 1, dx: float = 0, dy: float = 0) -> Callable[[Tensor], Tensor]:
    """Return turning by degrees, zooming, and shifting by shares of the width and the height."""
    cos, sin = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    theta = torch.tensor([[[cos, -sin, 2 * dx], [sin, cos, 2 * dy]]])

    def change(images: Tensor) -> Tensor:
        grid = F.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return _rounded(F.grid_sample(images.float(), grid, "bicubic", "border", align_corners=False))

    return change


def cropped(share: float) -> Callable[[Tensor], Tensor]:
    """Return cropping a share of the width and the height, and enlarging what is left."""

    def change(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        top, left = round(height * share / 2), round(width * share / 2)
        middle = images[..., top : height - top, left : width - left].float()
        return _rounded(F.interpolate(middle, (height, width), mode="bicubic", antialias=True))

    return change


def blurred(deviation: float) -> Callable[[Tensor], Tensor]:
    """Return a Gaussian blur, by pixels of an image of 28 pixels."""

    def change(images: Tensor) -> Tensor:
        own = deviation * images.shape[-1] / 28
        return gaussian_blur(images, [2 * math.ceil(3 * own) + 1] * 2, [own, own])

    return change


def noisy(deviation: float) -> Callable[[Tensor], Tensor]:
    """Return Gaussian noise."""
    return lambda images: _rounded(
        images + deviation * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    )


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda images: images,
    "mirrored": lambda images: images.flip(-1),
    "upside down": lambda images: images.flip(-2),
    "turn 90°": lambda images: images.rot90(1, (-2, -1)),
    "brightness × 0.7": linear(0.7),
    "brightness × 1.3": linear(1.3),
    "contrast × 0.5": linear(0.5, 64),
    "inverted": linear(-1, 255),
    "gamma 1.5": gamma(1.5),
    "gamma 0.67": gamma(0.67),
    "red and blue exchanged": lambda images: images.flip(1),
    "grey": lambda images: _rounded(images.float().mean(dim=1, keepdim=True)).expand_as(images).contiguous(),
    "JPEG 75": saved("jpeg", quality=75),
    "JPEG 40": saved("jpeg", quality=40),
    "WebP 60": saved("webp", quality=60),
    "noise 8": noisy(8),
    "noise 20": noisy(20),
    "blur 0.7": blurred(0.7),
    "blur 1.2": blurred(1.2),
    "shift 4 %": moved(dx=0.04),
    "shift 10 %": moved(dx=0.1, dy=-0.06),
    "turn 5°": moved(angle=5),
    "turn 12°": moved(angle=-12),
    "zoom 1.1": moved(zoom=1.1),
    "zoom 0.9": moved(zoom=0.9),
    "crop 15 %": cropped(0.15),
    "crop 30 %": cropped(0.3),
    "mirrored, × 0.7": lambda images: linear(0.7)(images.flip(-1)),
    "mirrored, shift 6 %": lambda images: moved(dx=0.06)(images.flip(-1)),
    "turn 6°, zoom 1.1, JPEG 75": lambda images: saved("jpeg", quality=75)(moved(angle=6, zoom=1.1)(images)),
}


# --- images -----------------------------------------------------------------------------------------------------------


def fashion_mnist() -> tuple[Tensor, Tensor]:
    """Return training images and others, uint8, shape ``(N, 1, 28, 28)``."""
    found = []
    for kind in ("train", "t10k"):
        raw = gzip.decompress((FASHION_MNIST / f"{kind}-images-idx3-ubyte.gz").read_bytes())
        found.append(torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy()))
    return found[0], found[1]


def photographs() -> tuple[Tensor, Tensor]:
    """Return crops of the left and of the right halves of photographs, uint8, shape ``(N, 3, 64, 64)``."""
    names = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "ihc", "motorcycle_left", "retina", "rocket")
    folders = [Path(find_spec("sklearn.datasets").submodule_search_locations[0]) / "images"]
    if find_spec("skimage") is not None:
        folders.append(Path(find_spec("skimage.data").submodule_search_locations[0]))
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in (".png", ".jpg")]
    files = [file for file in files if file.parent.name == "images" or file.stem in names]
    generator, halves = np.random.default_rng(0), ([], [])
    for file in files:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
        width, height = picture.size
        for half, crops in enumerate(halves):
            for _ in range(math.ceil(6000 / len(files))):
                side = int(generator.integers(min(width // 2, height) // 5, min(width // 2, height) // 2))
                left = half * (width // 2) + int(generator.integers(0, width // 2 - side + 1))
                top = int(generator.integers(0, height - side + 1))
                crop = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                crops.append(np.asarray(crop))
    return tuple(
        torch.from_numpy(np.stack(crops)[generator.permutation(len(crops))]).permute(0, 3, 1, 2).contiguous()
        for crops in halves
    )


SETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"Fashion-MNIST": fashion_mnist, "photographs": photographs}


# --- methods: of each image the training image that it is called a copy of, -1 for none -------------------------------


def by_audit(train: Tensor, sets: dict[str, Tensor], cache: Path) -> Iterator[dict[str, object]]:
    """Search for all images, and judge what was found."""
    references, found = image_set(train, location="train"), {}
    images = {name: image_set(pixels, location=name) for name, pixels in sets.items()}
    for name, part in images.items():
        found[name] = _searched(part, references, BlockCache(cache), name)
        print(f"{name}: searched", flush=True)
    yield from judged(references, images, found)


def judged(train: ImageSet, images: dict[str, ImageSet], found: dict[str, Copies]) -> Iterator[dict[str, object]]:
    """Audit the innocent images and the copies of one kind together, for each kind; and innocent images alone.

    An image is *named* as the audit of its kind names it. It is *noticed* if it would be, alone among innocent images.
    """
    found = dict(found)
    found = {name: measure_noise(part, images[name], train) for name, part in found.items()}
    held_out, innocent = found.pop("held out"), found.pop("innocent")
    wrongly = torch.zeros(len(innocent.blank), dtype=torch.bool)
    for name, copies in found.items():
        evidence = weigh(_joined([innocent, copies]), held_out, level=LEVEL)
        wrongly |= evidence.named[: len(wrongly)]
        shown = replace(copies, search=evidence.search[len(wrongly) :])
        yield row("audit", name, shown.sources.where(evidence.named[len(wrongly) :], -1))
        shown = replace(copies, search=telling_searches(copies, held_out, evidence.noticed_below))
        noticed = is_noticed(copies.search_ratios, evidence.noticed_below)
        yield row("audit, noticed", name, shown.sources.where(noticed, -1))
        yield row("pixels", name, copies.neighbors.indices[:, 0].where(copies.ratios["nearest"] < 1 / 3, -1))
    yield row("audit", INNOCENTS, torch.where(wrongly, 0, -1))
    below = noticeable(held_out.search_ratios, len(innocent.blank))
    yield row("audit, noticed", INNOCENTS, torch.where(is_noticed(innocent.search_ratios, below), 0, -1))
    yield row("pixels", INNOCENTS, torch.where(innocent.ratios["nearest"] < 1 / 3, 0, -1))
    yield from audits_without_copies(_joined([innocent, held_out]), WITHOUT, (60, (HELD_OUT + INNOCENT) // 2))


def audits_without_copies(pool: Copies, words: str, sizes: tuple[int, int]) -> Iterator[dict[str, object]]:
    """Audit random parts of images that nobody copied against each other, and count what is said of them.

    Args:
        pool: what the searches found of the images.
        words: what the rows are called, before the verdict.
        sizes: the least and the largest number of images in a part.
    """
    verdicts = []
    for seed in range(AUDITS):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pool.blank), generator=generator)
        generated, held_out = torch.randint(sizes[0], sizes[1] + 1, (2,), generator=generator).tolist()
        sets = [_part(pool, order[:generated]), _part(pool, order[generated : generated + held_out])]
        evidence = weigh(*sets, level=LEVEL)
        copies = bool(evidence.named.any()) or evidence.scan.p_value < SIGNIFICANT
        verdicts.append("copies" if copies else "open" if bool(evidence.noticed.any()) else "none")
    for verdict in ("copies", "open"):
        numbers = {"planted": 0, "images": AUDITS, "found": verdicts.count(verdict)}
        yield {"method": "audit", "change": f"{words} {verdict}", **numbers}


def simulated(audits: int, *, correlation: float, copied: int, held_out: int = 1000) -> tuple[float, float, float]:
    """Audit 20 images by four searches whose ratios are powers of numbers that depend on one another.

    The numbers are even, those of an image are joined by a normal distribution. A copy has a ratio of 0.2 or 0.1 of an
    innocent one's in one of the first two searches, turn about.

    Args:
        audits: how many.
        correlation: of the searches, in [0, 1).
        copied: copies among the 20 images.
        held_out: held-out images.

    Returns:
        The share of audits that name an innocent image, the mean share of innocent images among those named, and the
        share of copies that are named.
    """
    wrong, false, found = 0, 0.0, 0
    for seed in range(audits):
        generator = torch.Generator().manual_seed(seed)
        common, own = (torch.randn(20 + held_out, count, generator=generator) for count in (1, len(TAILS)))
        normal = correlation**0.5 * common + (1 - correlation) ** 0.5 * own
        ratios = torch.special.ndtr(normal) ** (1 / torch.tensor(TAILS))
        ratios[: copied // 2, 0] *= 0.2
        ratios[copied // 2 : copied, 1] *= 0.1
        named = discover(ratios[:20], ratios[20:], level=LEVEL)[0]
        wrong += bool(named[copied:].any())
        false += int(named[copied:].sum()) / max(1, int(named.sum()))
        found += int(named[:copied].sum())
    return wrong / audits, false / audits, found / max(1, audits * copied)


def near_duplicates(audits: int, cache: Path) -> Counter[str]:
    """Audit images of Fashion-MNIST that nobody copied, where the training set repeats a tenth of its images.

    The repeated ones are a little darker, shifted in brightness, noisy or saved as JPEG, in turn. Training, generated
    and held-out images (150, 60 and 60) are other ones in each audit, by all searches but that for moved copies.

    Args:
        audits: how many.
        cache: folder for finished work.

    Returns:
        How many verdicts are of each level.
    """
    train, others = fashion_mnist()
    changes = (linear(0.99), linear(1, 2), noisy(2), saved("jpeg", quality=90))
    levels: Counter[str] = Counter()
    for seed in range(audits):
        generator = torch.Generator().manual_seed(seed)
        own = train[torch.randperm(len(train), generator=generator)[:150]].clone()
        own[135:] = torch.cat([changes[number % 4](own[number : number + 1]) for number in range(15)])
        drawn = others[torch.randperm(len(others), generator=generator)[:120]]
        sets = {"generated": drawn[:60], "train": own, "held_out": drawn[60:]}
        sets = {name: image_set(pixels, location=name) for name, pixels in sets.items()}
        with TemporaryDirectory(dir=cache) as folder:
            found = audit_images(
                **sets,
                features=build_features("pixels"),
                cache=BlockCache(Path(folder)),
                settings=Settings(moved=False),
            )
        levels[make_findings(found).verdict.level] += 1
    return levels


def wider_audits(train: Tensor, others: Tensor, cache: Path) -> Iterator[dict[str, object]]:
    """Audit parts of a larger pool of images that nobody copied, without the search for moved copies."""
    images, references = image_set(others, location="pool"), image_set(train, location="train")
    found = _searched(images, references, BlockCache(cache), "pool", moved=False)
    found = measure_noise(found, images, references)
    for words, sizes in SIZES.items():
        yield from audits_without_copies(found, f"{WITHOUT} {words} of {len(others):,}:", sizes)


def _searched(images: ImageSet, train: ImageSet, cache: BlockCache, name: str, *, moved: bool = True) -> Copies:
    features = build_features("pixels")
    references = References.of(features.rows(train.pixels), train.sha256)
    options = {"views": views("none"), "cache": cache, "argument": name}
    near = nearest_references(images, references, k=50, features=features, **options)
    matches = find_disguised(images, train, cache=cache, argument=name, moved=moved)
    return find_copies(images, train, near, matches, views=views("none"))


JUDGED = (
    "search_ratios",
    "search_distances",
    "search_sources",
    "search_noise",
    "identical",
    "blank",
    "variance",
    "content",
    "search",
)  # what a verdict depends on


def _joined(parts: Sequence[Copies]) -> Copies:
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in JUDGED}
    neighbors = type(parts[0].neighbors)(*map(torch.cat, zip(*(part.neighbors for part in parts), strict=True)))
    matches = {
        name: Matches(*map(torch.cat, zip(*(part.matches[name] for part in parts), strict=True)))
        for name in parts[0].matches
    }
    return replace(parts[0], neighbors=neighbors, matches=matches, **fields)


def _part(copies: Copies, places: Tensor) -> Copies:
    return replace(copies, **{name: getattr(copies, name)[places] for name in JUDGED})


def by_phash(train: Tensor, sets: dict[str, Tensor]) -> Iterator[dict[str, object]]:
    """Find duplicates by imagededup's perceptual hashes."""
    if find_spec("imagededup") is None:
        return
    from imagededup.methods import PHash

    method, (names, images) = PHash(verbose=False), _named(train, sets)
    encoded = {name: method.encode_image(image_array=_array(image)) for name, image in zip(names, images, strict=True)}
    pairs = method.find_duplicates(encoding_map=encoded, scores=True)
    yield from _rows("imagededup PHash", sets, {name: _best(pairs[name], True) for name in names})
    print("PHash: done", flush=True)


def by_cnn(train: Tensor, sets: dict[str, Tensor]) -> Iterator[dict[str, object]]:
    """Find duplicates by imagededup's cosine similarity of a network's features."""
    if find_spec("imagededup") is None:
        return
    from imagededup.methods import CNN
    from imagededup.utils import CustomModel

    from lightning_iet.metrics.features import EfficientNetFeatures

    network, (names, images) = EfficientNetFeatures(size=NETWORK_SIDE), _named(train, sets)
    method = CNN(verbose=False, model_config=CustomModel("efficientnet", network, transform=lambda image: image))
    with torch.inference_mode():
        encoded = torch.cat([network(part) for part in images.split(64)]).numpy()
    pairs = method.find_duplicates(encoding_map=dict(zip(names, encoded, strict=True)), scores=True, num_sim_workers=0)
    yield from _rows("imagededup CNN", sets, {name: _best(pairs[name], False) for name in names})
    print("CNN: done", flush=True)


def _best(pairs: Sequence[tuple[str, float]], smallest: bool) -> int:
    """Position of the training image that a tool is surest of; -1 if there is none."""
    own = [(score if smallest else -score, int(name.split()[1])) for name, score in pairs if name.startswith("train")]
    return min(own)[1] if own else -1


def by_cleanvision(train: Tensor, sets: dict[str, Tensor]) -> Iterator[dict[str, object]]:
    """Find groups of near and exact duplicates in a folder."""
    if find_spec("cleanvision") is None:
        return
    from cleanvision import Imagelab

    names, images = _named(train, sets)
    called = dict.fromkeys(names, -1)
    with TemporaryDirectory() as folder:
        for name, image in zip(names, images, strict=True):
            Image.fromarray(_array(image)).save(Path(folder) / f"{name}.png")
        lab = Imagelab(data_path=folder)
        lab.find_issues({"near_duplicates": {}, "exact_duplicates": {}}, n_jobs=1, verbose=False)
        for issue in ("near_duplicates", "exact_duplicates"):
            for group in lab.info[issue]["sets"]:
                members = [Path(path).stem for path in group]
                originals = [int(name.split()[1]) for name in members if name.startswith("train ")]
                for name in members if originals else []:
                    own = int(name.split()[1])  # to its favour: any training image of the group may be meant
                    called[name] = own if own in originals else originals[0]
    yield from _rows("cleanvision", sets, called)
    print("cleanvision: done", flush=True)


def _named(train: Tensor, sets: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """All images under names that tell their set, by its position, and their place in it."""
    names = [f"train {index}" for index in range(len(train))]
    names += [f"set{number} {index}" for number, images in enumerate(sets.values()) for index in range(len(images))]
    return names, torch.cat([train, *sets.values()])


def _rows(method: str, sets: dict[str, Tensor], called: dict[str, int]) -> Iterator[dict[str, object]]:
    for number, (name, images) in enumerate(sets.items()):
        found = torch.tensor([called[f"set{number} {index}"] for index in range(len(images))])
        yield row(method, INNOCENTS if name == "innocent" else name, found)


def row(method: str, change: str, called: Tensor) -> dict[str, object]:
    """Count the images that are called copies, and of planted ones those whose original is the right one.

    Args:
        method: the method.
        change: what was done to the copies, or that there are none.
        called: of each image the training image that it is called a copy of, -1 for none; copy ``i`` is one of ``i``.
    """
    planted = change in CHANGES
    found = called == torch.arange(len(called)) if planted else called >= 0
    counts = {"planted": len(called) if planted else 0, "images": len(called), "found": int(found.sum())}
    return {"method": method, "change": change, **counts}


def _array(image: Tensor) -> np.ndarray:
    array = image.permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[2] == 1 else array


# --- table and figure -------------------------------------------------------------------------------------------------


def measure(cache: Path) -> Iterator[dict[str, object]]:
    """Work out one row for each set, method and change; ``planted`` is 0 for images that nobody copied."""
    for title, load in SETS.items():
        train, others = load()
        train, pool, others = train[:TRAIN], others[:POOL], others[: HELD_OUT + INNOCENT]
        sets = {"held out": others[:HELD_OUT], "innocent": others[HELD_OUT:]}
        for name, change in CHANGES.items():
            if train.shape[1] == 3 or name not in ("red and blue exchanged", "grey"):
                sets[name] = change(train[:EACH])
        searched = {name: images for name, images in sets.items() if name != "held out"}
        yield from ({"set": title, **figures} for figures in wider_audits(train, pool, cache))
        yield from ({"set": title, **figures} for figures in by_audit(train, sets, cache))
        for other in (by_phash, by_cnn, by_cleanvision):
            yield from ({"set": title, **figures} for figures in other(train, searched))


def table(rows: Sequence[dict[str, str]]) -> str:
    """Lay out the rows as Markdown: for each set a line for each change, a column for each method."""
    text = ""
    for title in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == title]
        methods = [name for name in METHODS if any(row["method"] == name for row in own)]
        cells = {(row["method"], row["change"]): row for row in own}
        text += f"\n**{title}**\n\n| | {' | '.join(METHODS[name] for name in methods)} |\n"
        text += f"| --- |{' ---: |' * len(methods)}\n"
        for change in dict.fromkeys(row["change"] for row in own if int(row["planted"])):
            found = [cells[name, change] for name in methods]
            text += f"| {change} | " + " | ".join(f"{row['found']} of {row['planted']}" for row in found) + " |\n"
        found = [cells[method, INNOCENTS] for method in methods]
        text += f"| **{INNOCENTS}** | " + " | ".join(f"{row['found']} of {row['images']}" for row in found) + " |\n"
        said = [cells["audit", f"{WITHOUT} {verdict}"] for verdict in ("copies", "open")]
        text += (
            f"\nOf {said[0]['images']} audits of {title} without copies, {said[0]['found']} spoke of copies, and "
            f"{said[1]['found']} were *not decided*.\n"
        )
        for words in SIZES:
            wider = [row for row in own if row["change"].startswith(f"{WITHOUT} {words} of")]
            if wider:
                found = {row["change"].rpartition(" ")[2]: row["found"] for row in wider}
                text += (
                    f"With {words} images in each set, of {POOL:,}, and without the search for moved copies: "
                    f"{found['copies']} and {found['open']} of {wider[0]['images']}.\n"
                )
    return text


def write_table(source: Path, page: Path) -> None:
    """Put the table of a CSV file between the marks of a page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(head + BEGIN + table(read(source)) + END + rest.partition(END)[2], encoding="utf-8")


def write_figure(source: Path, picture: Path) -> None:
    """Draw the share of planted copies that is found, by kind."""
    from matplotlib.figure import Figure

    rows = read(source)
    titles = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(11, 7.5), dpi=120, facecolor="white", layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0], titles, strict=True):
        own = [row for row in rows if row["set"] == title and int(row["planted"])]
        for method, colour, marker in (
            ("imagededup PHash", "#8a8a8a", "x"),
            ("imagededup CNN", "#8a8a8a", "+"),
            ("pixels", "#1a6390", "o"),
            ("audit, noticed", "#e9b697", "D"),
            ("audit", "#b8480f", "D"),
        ):
            points = [(100 * int(r["found"]) / int(r["planted"]), r["change"]) for r in own if r["method"] == method]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=colour, label=METHODS[method], markersize=6)
        axes.set(title=title, xlabel="planted copies found, in %", xlim=(-4, 104))
        axes.grid(axis="both", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(picture)


def read(source: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with source.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Measure and write the CSV file, or write the table and the figure of an existing one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("planted-copies.csv"), help="CSV file (default: %(default)s)")
    parser.add_argument("--page", type=Path, help="page to write the table of an existing CSV file into")
    parser.add_argument("--figure", type=Path, help="picture to draw from an existing CSV file")
    parser.add_argument("--simulate", action="store_true", help="count false finds in simulated audits, nothing else")
    parser.add_argument(
        "--near-duplicates", type=int, metavar="AUDITS", help="audit innocent images beside repeated training images"
    )
    parser.add_argument("--cache", type=Path, help="folder to keep finished work in")
    args = parser.parse_args()
    if args.simulate:
        for correlation, copied in product(CORRELATIONS, COPIED):
            wrong, false, found = simulated(SIMULATED, correlation=correlation, copied=copied)
            print(f"{correlation=} {copied=}: {wrong:.3f} with a false find, {false:.3f} false, {found:.3f} found")
        return
    if args.near_duplicates:
        with TemporaryDirectory() as folder:
            levels = near_duplicates(args.near_duplicates, args.cache or Path(folder))
        print(f"{args.near_duplicates:,} audits: {', '.join(f'{levels[n]:,} {n}' for n in sorted(levels))}")
        return
    if args.page or args.figure:
        if args.page:
            write_table(args.out, args.page)
        if args.figure:
            write_figure(args.out, args.figure)
        return
    with TemporaryDirectory() as folder:
        rows: list[dict[str, object]] = list(measure(args.cache or Path(folder)))
    if args.out.exists():  # what other tools found, where they are not installed now
        measured = {(row["set"], row["method"]) for row in rows}
        rows += [dict(row) for row in read(args.out) if (row["set"], row["method"]) not in measured]
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table([{name: str(value) for name, value in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
