from dataclasses import replace

import pytest
import torch

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.disguises import find_flipped
from lightning_iet.audit.planted import KINDS, _moved, as_generated, plant, reencode
from lightning_iet.audit.reading import Origin, image_set
from tests.helpers.image_folders import random_pixels, random_set
from tests.helpers.phantoms import eight_bits, phantoms

TURNS = [lambda x, times=times: x.rot90(times, (-2, -1)) for times in range(4)]


@pytest.mark.parametrize("searched", [10, 1000, 100_000])
def test_copies_are_a_twentieth_of_the_work_and_at_least_ten_of_a_kind(searched):
    train = random_set(200)
    planted = plant(train, train, kinds=KINDS, searched=searched)
    each = max(10, min(20, searched // 100))
    assert len(planted.images) == len(planted.sources) == len(planted.kinds) == 5 * each
    assert [planted.kinds.count(kind) for kind in KINDS] == [each] * 5
    assert len(set(planted.sources.tolist())) == 5 * each
    again = plant(train, train, kinds=KINDS, searched=searched)
    assert again.images.sha256 == planted.images.sha256


def test_what_is_done_to_each_kind():
    train = image_set(eight_bits(phantoms(200, channels=3)), location="train")
    planted = plant(train, train, kinds=KINDS, searched=10)
    pixels, originals = planted.images.pixels, train.pixels[planted.sources]
    exact, mirrored, recoloured, degraded, moved = (
        torch.tensor([kind == name for name in planted.kinds]) for kind in KINDS
    )
    assert torch.equal(pixels[exact], originals[exact])
    assert torch.equal(pixels[mirrored][0], originals[mirrored][0].flip(-1))
    assert torch.equal(pixels[recoloured][5], originals[recoloured][5].flip(0))  # the order of the channels
    assert torch.equal(pixels[recoloured][2], 255 - originals[recoloured][2])
    error = (pixels[degraded].float() - originals[degraded].float()).square().mean(dim=(1, 2, 3)).sqrt()
    assert 3 < float(error.min()) <= float(error.max()) < 40
    assert not (pixels[moved] == originals[moved]).flatten(1).all(dim=1).any()


@pytest.mark.parametrize(("width", "positions"), [(24, 7), (16, 3)])
def test_mirrored_copies_take_every_position_that_is_searched_for_in_turn(tmp_path, width, positions):
    train = image_set(eight_bits(phantoms(60))[..., :width], location="train")
    planted = plant(train, train, kinds=("mirrored",), searched=10)
    found = {}
    for number, (copy, source) in enumerate(zip(planted.images.pixels, planted.sources.tolist(), strict=True)):
        versions = [turn(part) for part in (train.pixels[source], train.pixels[source].flip(-1)) for turn in TURNS]
        found[number] = [i for i, other in enumerate(versions) if torch.equal(copy, other)]
    assert all(len(versions) == 1 for versions in found.values())
    assert [0] not in found.values()  # that would be an exact copy
    assert len({versions[0] for versions in found.values()}) == positions
    assert all(found[number] == found[number + positions] for number in range(10 - positions))
    matches, _ = find_flipped(planted.images, train, kind="recoloured", cache=BlockCache(tmp_path), argument="planted")
    assert torch.equal(matches.indices, planted.sources)
    assert float(matches.distances.max()) < 1e-3


def test_images_of_one_colour_are_not_copied():
    train = random_set(60)
    train.pixels[:35] = 7
    planted = plant(train, train, kinds=KINDS, searched=10)
    assert int(planted.sources.min()) >= 35
    assert len(plant(random_set(3), train, kinds=KINDS, searched=10).images) == 15  # three of each kind


@pytest.mark.parametrize(
    ("origin", "change"),
    [
        (Origin(kinds={"PNG": 5}, sizes={"8x8": 5}), lambda x: x),
        (Origin(kinds={"JPEG": 4, "PNG": 1}), lambda x: reencode(x, quality=75)),
        (Origin(), lambda x: x),
    ],
)
def test_copies_go_through_what_generated_images_went_through(origin, change):
    pixels = random_pixels(5)
    like = replace(random_set(5, seed=1), origin=origin)
    assert torch.equal(as_generated(pixels, like), change(pixels))


def test_copies_are_as_small_and_as_coarse_as_generated_images():
    pixels = eight_bits(phantoms(5, size=32))
    small = as_generated(pixels, replace(random_set(5, size=32), origin=Origin(sizes={"8x8": 5})))
    assert small.shape == pixels.shape
    detail = [(x.float()[..., 1:] - x.float()[..., :-1]).abs().mean() for x in (small, pixels)]
    assert detail[0] < 0.7 * detail[1]
    few = as_generated(pixels, image_set(random_pixels(5, size=32) // 64 * 85, location="few"))
    assert set(few.unique().tolist()) <= {0, 85, 170, 255}


@pytest.mark.parametrize(("height", "width"), [(30, 60), (48, 24), (40, 40)])
def test_copies_are_turned_without_a_distortion(height, width):
    """Images whose values are the places of their pixels: neighbours are as far apart in a turned one as before."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([4 * x, 4 * y, 0 * x]).to(torch.uint8)
    turned = _moved(places.expand(6, -1, -1, -1))[1::3].double() / 4
    middle, reach = (height // 2, width // 2), min(height, width) // 4
    for image in turned[:, :2]:
        along_x = (image[:, middle[0], middle[1] + reach] - image[:, middle[0], middle[1] - reach]) / (2 * reach)
        along_y = (image[:, middle[0] + reach, middle[1]] - image[:, middle[0] - reach, middle[1]]) / (2 * reach)
        jacobian = torch.stack([along_x, along_y])
        assert torch.allclose(jacobian @ jacobian.T, torch.eye(2).double(), atol=0.06)
        assert abs(float(jacobian[0, 1])) > 0.01  # it was turned


def test_levels_are_counted_without_integers_of_all_pixels(monkeypatch):
    counted, bincount = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda x, **kwargs: counted.append(x.numel()) or bincount(x, **kwargs))
    pixels = random_pixels(20) // 64 * 64  # 4 levels
    found = as_generated(random_pixels(20), image_set(pixels, location=""))
    assert max(counted) == 64  # pixels of one image
    assert found.unique().tolist() == [0, 85, 170, 255]
