"""Planted copies of every kind, and none: what must never be said of them.

Never "none" where there are copies of a kind that was looked for; never "copies" where there are none.
"""

import functools
import itertools
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import adjust_hue, gaussian_blur

from lightning_iet.audit import Settings, audit_images, image_set, make_findings
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.features import build_features
from lightning_iet.audit.reading import Reading, read_sets
from lightning_iet.audit.verdict import verdict
from lightning_iet.data.decoding import decode
from lightning_iet.data.sources import open_source
from tests.helpers.phantoms import eight_bits, moved
from tests.helpers.phantoms import phantoms as new_phantoms

TRAIN, GENERATED = 150, 40
phantoms = functools.cache(new_phantoms)  # nobody writes to them


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


def images(change, copies, *, channels=1, generated=GENERATED):
    """``copies`` changed training images among innocent ones that were changed alike."""
    mixed = [phantoms(TRAIN, channels=channels)[:copies], phantoms(generated - copies, seed=5, channels=channels)]
    return change(torch.cat(mixed))


COLOURED = ("in the order BGR", "grey")  # of images of one channel these change nothing


def pairwise(names):
    """(name, copies, channels, held-out images), so that every pair of values of two of them occurs.

    All combinations would be ten times as many. But the number of held-out images only moves the limits of the
    searches, not what is searched for, and few copies change the verdict, not what is found.
    """
    rows = []
    for i, name in enumerate(names):
        channels = (3, 3) if name in COLOURED else ((1, 3), (3, 1))[i % 2]
        rows += [(name, 30, channels[0], (60, 150)[i // 2 % 2]), (name, 0, channels[1], (150, 60)[i // 2 % 2])]
        if i % 3 == 0:
            rows.append((name, 5, channels[i // 3 % 2], (60, 150)[(i // 6 + 1) % 2]))
    return rows


@pytest.mark.parametrize(("name", "copies", "channels", "held_out"), pairwise(RECOLOURED))
def test_recoloured_copies(judge, name, copies, channels, held_out):
    words, found = judge(
        images(RECOLOURED[name], copies, channels=channels), held_out=held_out, channels=channels, moved=False
    )
    check(words, found, copies)
    if copies == 30:
        assert words.level == "copies"
        assert int(found.evidence.named[:30].sum()) >= 27


@pytest.mark.parametrize(
    ("names", "copies"),
    [
        *((names, 12) for names in itertools.pairwise(MOVED) if list(MOVED).index(names[0]) % 2 == 0),
        (("turned, zoomed and shifted", "blurred"), 0),
    ],
)
def test_moved_copies(judge, names, copies):
    """Every other image is changed in the first way; where twelve are copies, the other twelve are innocent."""

    def change(x):
        changed = [MOVED[name](x) for name in names]
        return torch.stack([changed[i % 2][i] for i in range(len(x))])

    words, found = judge(images(change, copies, generated=24), held_out=40, channels=1, moved=True)
    check(words, found, copies)
    for first in range(2 if copies else 0):
        assert int((found.evidence.named | found.evidence.noticed)[first:12:2].sum()) >= 3


def windowed(low, width):
    return lambda x: (x - low) / width


HIDING = {
    "a sixteenth of the range": lambda x: x / 16,
    "a quarter of the range": lambda x: x / 4,
    "half of the range, above": lambda x: 0.5 + x / 2,
    "a tenth of the range": lambda x: 0.4 + 0.1 * x,
    "twice as bright, cut off": lambda x: 2 * x,
    "a window": windowed(1 / 3, 1 / 3),
    "a narrow window": windowed(0.4, 0.1),
    "a narrower window": windowed(0.5, 0.05),
    "the low byte of 12 bits": lambda x: ((x * 4095).round() % 256) / 255,
    "solarised": lambda x: torch.where(x > 0.5, 1 - x, x),
    "32 grey levels": lambda x: (x * 31).round() / 31,
    "8 grey levels": lambda x: (x * 7).round() / 7,
    "black and white": lambda x: (x > 0.3).float(),
    "gamma 3": lambda x: x.clamp(min=0) ** 3,
    "gamma 0.3": lambda x: x.clamp(min=0) ** 0.3,
    "logarithms": lambda x: (1 + 1000 * x.clamp(min=0)).log() / math.log(1001),
    "another background": lambda x: torch.where(x.mean(dim=1, keepdim=True) < 0.06, 1.0, x),
    "every other line black": lambda x: x * (torch.arange(x.shape[-2]) % 2)[:, None],
    "much noise": noisy(0.2),
    "one channel": lambda x: x[:, :1].expand_as(x),
    "blue inverted": lambda x: torch.cat([x[:, :-1], 1 - x[:, -1:]], dim=1),
    "half of the colours": lambda x: (x + x.mean(dim=1, keepdim=True)) / 2,
    "another hue": lambda x: adjust_hue(x, 1 / 6) if x.shape[1] == 3 else x,
}


@pytest.mark.parametrize(("name", "channels"), [(name, (1, 3)[i % 2]) for i, name in enumerate(HIDING)])
def test_no_change_of_a_whole_set_hides_copies_in_silence(judge, name, channels):
    """10 of 40 are copies: they are found, or the verdict is open and says what to do about it."""
    generated = images(HIDING[name], 10, channels=channels)
    words, found = judge(generated, held_out=60, channels=channels, moved=False)
    check(words, found, 10)
    if words.level == "open":
        assert "--" in words.answer or "held-out images would decide" in words.answer


def check(words, found, copies):
    assert (words.level != "copies") if copies == 0 else (words.level in ("copies", "open")), words
    assert not found.evidence.named[copies:].any()
    named = found.evidence.named.nonzero().flatten()
    assert torch.equal(found.copies["generated"].sources[named], named)  # copy i is one of training image i


def test_innocent_images_are_innocent_whatever_the_seed(judge):
    """None of 10 audits speaks of copies, and few are open; the training set has near-duplicates."""
    train = eight_bits(phantoms(TRAIN))
    train[100:110] = eight_bits(phantoms(TRAIN)[90:100] * 0.99)
    levels = [
        judge(phantoms(60, seed=100 + seed), held_out=60, channels=1, moved=False, train=train)[0].level
        for seed in range(10)
    ]
    assert "copies" not in levels
    assert levels.count("open") <= 2  # 0.5 is expected


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
    sets |= {f"{copies} copies": images(lambda x: x, copies) for copies in (0, 20)}
    folder = tmp_path_factory.mktemp("depths")

    @functools.cache
    def get(name, depth):
        return open_source(write(folder / f"{name}, {depth}", sets[name], depth), argument="images")

    return get


@pytest.fixture(scope="module")
def cache_of_files(tmp_path_factory):
    return BlockCache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("generated", "real", "copies"),
    [
        *((depth, depth, 20) for depth in DEPTHS),
        *((generated, DEPTHS[i - 1], 20) for i, generated in enumerate(DEPTHS)),
        *((generated, DEPTHS[i - 3], 20) for i, generated in enumerate(DEPTHS)),
        *((generated, DEPTHS[i - 2], 0) for i, generated in enumerate(DEPTHS)),
    ],
)
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
        assert (words.level, int(found.evidence.named.sum())) == ("copies", 20)


def as_frames(folder, pictures, kind, **options):
    """Ten images to a file."""
    for first in range(0, len(pictures), 10):
        head, *rest = pictures[first : first + 10]
        head.save(folder / f"{first:03d}.{kind}", save_all=True, append_images=rest, **options)


def with_alpha(folder, pictures):
    """What is nearly black is transparent, over white: black is right."""
    for number, picture in enumerate(pictures):
        seen = picture.point([0] * 16 + [255] * 240)
        ground = Image.composite(picture, Image.new("L", picture.size, 255), seen)
        Image.merge("LA", (ground, seen)).save(folder / f"{number:03d}.png")


def one_by_one(folder, pictures, kind, **options):
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:03d}.{kind}", **options)


FORMS = {
    "PNG with alpha": with_alpha,
    "TIFF stacks": functools.partial(as_frames, kind="tif"),
    "GIF animations": functools.partial(as_frames, kind="gif"),
    "WebP": functools.partial(one_by_one, kind="webp", lossless=True),
    "JPEG": functools.partial(one_by_one, kind="jpg", quality=95),
}
SHAPES = {  # height and width of real images, and how they are brought to 24 x 24
    "same": ((24, 24), {}),
    "larger": ((48, 48), {"size": (24, 24)}),
    "wide, cropped": ((32, 48), {"size": (24, 24), "fit": "crop"}),
    "wide, stretched": ((32, 48), {"size": (24, 24), "fit": "stretch"}),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """``real(shape)``: 120 training images and 400 held-out ones of a shape, in arrays; written once."""
    folder = tmp_path_factory.mktemp("real")

    @functools.cache
    def get(height, width):
        sets = {name: phantoms(n, seed=seed, size=width) for name, n, seed in (("train", 120, 0), ("held_out", 400, 1))}
        for name, pixels in sets.items():
            np.save(folder / f"{name}-{height}x{width}.npy", eight_bits(pixels)[:, 0, :height].numpy())
        return {name: folder / f"{name}-{height}x{width}.npy" for name in sets}

    return get


@pytest.mark.parametrize(
    ("form", "shape", "copies"),
    [
        *((form, list(SHAPES)[i % 4], 12) for i, form in enumerate(FORMS)),
        *((form, list(SHAPES)[(i + 2) % 4], 0) for i, form in enumerate(FORMS)),
    ],
)
def test_forms_and_shapes_of_files_with_400_held_out_images(real, cache_of_files, tmp_path, form, shape, copies):
    """A form with copies and without, each beside another shape: these are of the files, those of the real images."""
    (height, width), how = SHAPES[shape]
    paths = real(height, width)
    like = {"size": how.get("size"), "fit": how.get("fit", "crop")}
    sources = [
        *np.load(paths["train"])[:copies],
        *eight_bits(phantoms(40, seed=5, size=width))[copies:, 0, :height].numpy(),
    ]
    pictures = [Image.fromarray(decode(source, **like)[..., 0]) for source in sources]
    (tmp_path / "generated").mkdir()
    FORMS[form](tmp_path / "generated", pictures)
    paths = paths | {"generated": tmp_path / "generated"}
    opened = {name: open_source(path, argument=name) for name, path in paths.items()}
    reading = Reading(**how, background="black", workers=0)
    read = read_sets(opened, cache_of_files, locations=dict.fromkeys(opened, "here"), reading=reading)
    assert {name: len(images) for name, images in read.items()} == {"train": 120, "held_out": 400, "generated": 40}
    settings = Settings(moved=False)
    found = audit_images(**read, features=build_features("pixels"), cache=cache_of_files, settings=settings)
    assert verdict(make_findings(found)).level == ("copies" if copies else "none")
    named = found.evidence.named
    assert named[:copies].all()
    assert torch.equal(found.copies["generated"].sources[:copies], torch.arange(copies))
    assert int(named[copies:].sum()) <= copies / 6  # 5 % of those named is what is promised on average, not of each
