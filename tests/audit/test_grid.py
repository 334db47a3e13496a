"""Planted copies of every kind, and none: what must never be said of them.

Never "none" where there are copies of a kind that was looked for; never "copies" where there are none.
"""

import functools
import itertools
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from lightning_iet.audit import Settings, audit_images, image_set, make_findings
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.features import build_features
from lightning_iet.audit.reading import Reading, read_sets
from lightning_iet.audit.verdict import verdict
from lightning_iet.data.sources import open_source
from tests.helpers.phantoms import eight_bits, moved, phantoms

TRAIN, GENERATED = 150, 40


def encoded(image, kind, **options):
    file = BytesIO()
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, kind, **options)
    with Image.open(file) as read:
        again = np.array(read.convert("L" if array.shape[2] == 1 else "RGB"))
    return torch.from_numpy(again.reshape(array.shape)).permute(2, 0, 1)


def saved(kind, **options):
    return lambda x: torch.stack([encoded(image, kind, **options) for image in eight_bits(x)]) / 255


def noisy(deviation):
    return lambda x: x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))


RECOLOURED = {
    "exact": lambda x: x,
    "mirrored": lambda x: x.flip(-1),
    "upside down": lambda x: x.flip(-2),
    "turned by 90 degrees": lambda x: x.rot90(1, (-2, -1)),
    "with exchanged axes": lambda x: x.mT,
    "darker": lambda x: 0.7 * x,
    "much darker": lambda x: 0.3 * x,
    "brighter": lambda x: 1.2 * x + 0.05,
    "less contrast": lambda x: 0.5 * x + 0.25,
    "inverted": lambda x: 1 - x,
    "mirrored and darker": lambda x: 0.7 * x.flip(-1),
    "gamma 1.3": lambda x: x.clamp(min=0) ** 1.3,
    "gamma 0.8": lambda x: x.clamp(min=0) ** 0.8,
    "JPEG 90": saved("jpeg", quality=90),
    "WebP": saved("webp", quality=90),
    "16 grey levels": lambda x: (x * 15).round() / 15,
    "little noise": noisy(0.01),
    "in the order BGR": lambda x: x.flip(1),
    "grey": lambda x: x.mean(dim=1, keepdim=True).expand_as(x),
}
MOVED = {
    "shifted by a pixel": lambda x: moved(x, dx=2 / 24),
    "shifted by two and a half": lambda x: moved(x, dx=5 / 24, dy=-3 / 24),
    "turned by 5 degrees": lambda x: moved(x, angle=5),
    "turned by 12 degrees": lambda x: moved(x, angle=-12),
    "zoomed in": lambda x: moved(x, zoom=1.15),
    "zoomed out": lambda x: moved(x, zoom=0.92),
    "turned, zoomed and shifted": lambda x: moved(x, angle=6, zoom=1.08, dx=0.06),
    "mirrored and shifted": lambda x: moved(x.flip(-1), dx=4 / 24),
    "darker and shifted": lambda x: moved(0.7 * x, dy=3 / 24),
    "blurred": lambda x: gaussian_blur(x, [5, 5], [0.7, 0.7]),
}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Audit a set of generated images; training and held-out images are searched for once."""
    cache, features = BlockCache(tmp_path_factory.mktemp("grid")), build_features("pixels")

    def run(generated, *, held_out, channels, moved, train=None):
        train = eight_bits(phantoms(TRAIN, channels=channels)) if train is None else train
        control = eight_bits(phantoms(held_out, seed=1, channels=channels))
        sets = {"generated": eight_bits(generated), "train": train, "held_out": control}
        sets = {name: image_set(pixels, location=name) for name, pixels in sets.items()}
        found = audit_images(**sets, features=features, cache=cache, settings=Settings(moved=moved))
        findings = make_findings(found)
        return verdict(findings), found

    return run


def images(change, copies, *, channels=1, seed=5):
    """``copies`` changed training images among innocent ones that were changed alike."""
    mixed = [phantoms(TRAIN, channels=channels)[:copies], phantoms(GENERATED - copies, seed=seed, channels=channels)]
    return change(torch.cat(mixed))


def pairwise(names):
    """Every (name, copies, channels), with numbers of held-out images so that every pair of values occurs.

    All combinations would be twice as many. But the number of held-out images only moves the limits of the searches,
    not what is searched for, so that a fault shows with one value of each other factor, or with two.
    """
    rows = itertools.product(enumerate(names), (0, 5, 30), (1, 3))
    return [
        (name, copies, channels, (60, 150)[(i + copies + channels // 2) % 2]) for (i, name), copies, channels in rows
    ]


@pytest.mark.parametrize(("name", "copies", "channels", "held_out"), pairwise(RECOLOURED))
def test_recoloured_copies(judge, name, copies, channels, held_out):
    """Half of all combinations, see ``pairwise``: 114 audits find what 228 would, in half the time."""
    words, found = judge(
        images(RECOLOURED[name], copies, channels=channels), held_out=held_out, channels=channels, moved=False
    )
    check(words, found, copies)
    if copies == 30:
        assert words.level == "copies"
        assert int(found.evidence.named[:30].sum()) >= 27


@pytest.mark.parametrize("copies", [0, 20])
@pytest.mark.parametrize("name", MOVED)
def test_moved_copies(judge, name, copies):
    words, found = judge(images(MOVED[name], copies), held_out=60, channels=1, moved=True)
    check(words, found, copies)
    if copies:
        assert int((found.evidence.named | found.evidence.noticed)[:20].sum()) >= 8


def check(words, found, copies):
    assert (words.level != "copies") if copies == 0 else (words.level in ("copies", "open")), words
    assert not found.evidence.named[copies:].any()
    named = found.evidence.named.nonzero().flatten()
    assert torch.equal(found.copies["generated"].sources[named], named)  # copy i is one of training image i


def test_innocent_images_are_innocent_whatever_the_seed(judge):
    """None of 30 audits speaks of copies, and few are open; the training set has near-duplicates."""
    train = eight_bits(phantoms(TRAIN))
    train[100:110] = eight_bits(phantoms(TRAIN)[90:100] * 0.99)
    levels = [
        judge(phantoms(60, seed=100 + seed), held_out=60, channels=1, moved=False, train=train)[0].level
        for seed in range(30)
    ]
    assert "copies" not in levels
    assert levels.count("open") <= 5  # 1.5 are expected


@pytest.mark.parametrize("repeats", [2, 5, 30])
def test_copies_of_an_image_that_stands_there_several_times(judge, repeats):
    train = eight_bits(phantoms(TRAIN))
    train[120 : 120 + repeats] = train[7]
    change = 0.8 * phantoms(TRAIN)[7:8].flip(-1)
    generated = torch.cat([change.expand(10, -1, -1, -1), phantoms(30, seed=5)])
    words, found = judge(generated, held_out=60, channels=1, moved=False, train=train)
    assert words.level == "copies"
    assert found.evidence.named[:10].all()


# --- files ------------------------------------------------------------------------------------------------------------

DEPTHS = ("8", "12", "16", "float", "float tiff")


def write(folder, pixels, depth):
    folder.mkdir()
    if depth == "float":
        np.save(folder.with_suffix(".npy"), pixels.numpy().astype(np.float32)[:, 0])
        return folder.with_suffix(".npy")
    for number, image in enumerate(pixels[:, 0].numpy()):
        if depth == "float tiff":
            Image.fromarray(image.astype(np.float32)).save(folder / f"{number:03d}.tif")
            continue
        top = {"8": 255, "12": 4095, "16": 65535}[depth]
        dtype = np.uint8 if depth == "8" else np.uint16
        Image.fromarray(np.rint(image * top).astype(dtype)).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """``files(name, depth)``: a source of images as files of a depth, written once."""
    sets = {"train": phantoms(TRAIN), "held_out": phantoms(60, seed=1)}
    sets |= {f"{copies} copies": images(lambda x: x, copies) for copies in (0, 40)}
    folder = tmp_path_factory.mktemp("depths")

    @functools.cache
    def get(name, depth):
        return open_source(write(folder / f"{name}, {depth}", sets[name], depth), argument="images")

    return get


@pytest.fixture(scope="module")
def cache_of_files(tmp_path_factory):
    return BlockCache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("copies", [0, 40])
@pytest.mark.parametrize("real", DEPTHS)
@pytest.mark.parametrize("generated", DEPTHS)
def test_depths_of_files(files, cache_of_files, generated, real, copies):
    cache = cache_of_files
    sources = {
        "generated": files(f"{copies} copies", generated),
        "train": files("train", real),
        "held_out": files("held_out", real),
    }
    read = read_sets(sources, cache, locations=dict.fromkeys(sources, "here"), reading=Reading())
    settings = Settings(moved=False)
    found = audit_images(**read, features=build_features("pixels"), cache=cache, settings=settings)
    words = verdict(make_findings(found))
    check(words, found, copies)
    if copies:
        assert (words.level, int(found.evidence.named.sum())) == ("copies", 40)
