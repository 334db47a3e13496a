import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_iet.audit import disguises
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.disguises import FLIPS, find_disguised, find_flipped, find_moved, moved_rows, undo
from lightning_iet.audit.reading import image_set
from lightning_iet.functional import registration
from tests.helpers.image_folders import random_pixels
from tests.helpers.phantoms import eight_bits, moved, phantoms


def flipped(image, flip):
    """The image whose value at x, y is that of the given one at the place that the map says, pixel by pixel."""
    size = image.shape[-1]
    found = torch.empty_like(image)
    for row in range(size):
        for column in range(size):
            x, y = 2 * column - size + 1, 2 * row - size + 1
            u, v = flip[0][0] * x + flip[0][1] * y, flip[1][0] * x + flip[1][1] * y
            found[..., row, column] = image[..., (v + size - 1) // 2, (u + size - 1) // 2]
    return found


def naive(images, train):
    """Every image in every flip against every training image: sqrt(1 - c²) of the channels' mean, by numpy's rule."""
    distances, nearest = [], []
    for image in images:
        found = []
        for other in train:
            least = 1.0
            for flip in FLIPS:
                pair = torch.stack([image.double().mean(0).flatten(), flipped(other.double().mean(0), flip).flatten()])
                least = min(least, math.sqrt(max(0, 1 - float(torch.corrcoef(pair)[0, 1]) ** 2)))
            found.append(least)
        distances.append(sorted(found)[:2])
        nearest.append(found.index(min(found)))
    return distances, nearest


def searched(folder, images, train, *, kind):
    sets = image_set(images, location="a"), image_set(train, location="b")
    return find_flipped(*sets, kind=kind, cache=BlockCache(folder), argument="generated")


@pytest.mark.parametrize("channels", [1, 3])
def test_recoloured_matches_equal_those_of_a_naive_search(tmp_path, channels):
    images, train = random_pixels(7, channels=channels), random_pixels(12, seed=1, channels=channels)
    found, candidates = searched(tmp_path, images, train, kind="recoloured")
    distances, nearest = naive(images, train)
    assert found.indices.tolist() == nearest
    assert found.distances.tolist() == pytest.approx([first for first, _ in distances], abs=1e-4)
    assert found.ratios.tolist() == pytest.approx([first / second for first, second in distances], abs=1e-4)
    assert torch.equal(candidates[:, 0], found.indices)


@pytest.mark.parametrize("channels", [1, 3])
def test_degraded_matches_equal_those_of_a_naive_search_at_8_x_8_pixels(tmp_path, channels):
    images, train = eight_bits(phantoms(5, channels=channels)), eight_bits(phantoms(12, seed=1, channels=channels))
    images[3] = train[4].flip(-1)
    found, candidates = searched(tmp_path, images, train, kind="degraded")
    small = [F.interpolate(part.double() / 255, (8, 8), mode="bilinear", antialias=True) for part in (images, train)]
    distances, nearest = naive(*small)
    assert found.indices.tolist() == candidates[:, 0].tolist() == nearest
    assert found.distances.tolist() == pytest.approx([first for first, _ in distances], abs=1e-3)
    # No two training images are so alike that they count as one.
    assert found.ratios.tolist() == pytest.approx([first / second for first, second in distances], abs=5e-3)


@given(st.integers(0, 7), st.floats(0.2, 1), st.booleans(), st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_a_recoloured_copy_is_its_originals(tmp_path_factory, flip, contrast, inverted, seed):
    train = eight_bits(phantoms(20, seed=seed))
    copy = contrast * flipped(train[4:5].float() / 255, FLIPS[flip])
    copy = 1 - copy if inverted else copy
    sets = image_set(eight_bits(copy), location="a"), image_set(train, location="b")
    found, _ = find_flipped(
        *sets, kind="recoloured", cache=BlockCache(tmp_path_factory.mktemp("c")), argument="generated"
    )
    assert int(found.indices) == 4
    assert float(found.ratios) < 0.15
    undone, noise = undo(sets[0].pixels, train[found.indices], found.maps)
    assert float(noise) > 40
    assert int((undone.int() - sets[0].pixels.int()).abs().max()) <= 3


def test_images_that_are_not_square_are_not_turned_by_90_degrees(tmp_path):
    train = eight_bits(phantoms(20, size=24))[..., :16]
    copies = torch.stack([train[3], train[4].flip(-1), train[5].flip(-1, -2)])
    sets = image_set(copies, location="a"), image_set(train, location="b")
    found, _ = find_flipped(*sets, kind="recoloured", cache=BlockCache(tmp_path), argument="generated")
    assert found.indices.tolist() == [3, 4, 5]
    assert float(found.ratios.max()) < 0.01
    assert found.maps[:, :, :2].tolist() == [[[1, 0], [0, 1]], [[-1, 0], [0, 1]], [[-1, 0], [0, -1]]]


@pytest.mark.parametrize("kind", ["recoloured", "degraded"])
def test_images_whose_thumbnails_are_square_are_not_turned_either(tmp_path, kind):
    """64 x 48 pixels are searched for at 32 x 32 and 8 x 8: a turn there would be a turn and a stretch."""
    train = eight_bits(phantoms(20, size=64))[..., :48]
    turned = train[3:4].mT.float()
    stretched = F.interpolate(turned, (64, 48), mode="bilinear", antialias=True).round().to(torch.uint8)
    copies = torch.cat([stretched, train[4:5].flip(-1), train[5:6].flip(-1, -2)])
    found, _ = searched(tmp_path, copies, train, kind=kind)
    assert found.indices.tolist()[1:] == [4, 5]
    assert float(found.distances[0]) > 0.3
    assert float(found.distances[1:].max()) < 0.01
    assert bool((found.maps[:, 0, 0] != 0).all())


def test_images_of_one_colour_are_like_nothing(tmp_path):
    train = eight_bits(phantoms(20))
    train[3] = 0
    images = torch.cat([torch.full_like(train[:1], shade) for shade in (0, 7, 255)])
    sets = image_set(images, location="a"), image_set(train, location="b")
    found, candidates = find_flipped(*sets, kind="recoloured", cache=BlockCache(tmp_path), argument="generated")
    assert found.distances.tolist() == found.ratios.tolist() == [1, 1, 1]
    again = find_moved(*sets, candidates, cache=BlockCache(tmp_path), argument="generated")
    assert again.distances.tolist() == again.ratios.tolist() == [1, 1, 1]
    assert bool(again.maps.isfinite().all())


def test_a_moved_copy_is_its_originals(tmp_path):
    train = phantoms(40)
    changes = [{"dx": 4 / 24}, {"angle": 8}, {"zoom": 1.12}, {"dx": -0.15, "dy": 0.1}]
    copies = torch.cat([moved(train[7:8], **change) for change in changes])
    sets = image_set(eight_bits(copies), location="a"), image_set(eight_bits(train), location="b")
    candidates = torch.zeros(len(copies), 1, dtype=torch.int64)
    found = find_moved(*sets, candidates, cache=BlockCache(tmp_path), argument="generated")
    assert found.indices.tolist() == [7] * 4
    assert float(found.ratios.max()) < 0.4
    assert float(found.maps[0, 0, 2]) == pytest.approx(4 / 24, abs=0.02)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_small_training_sets_have_few_candidates(tmp_path, count):
    train = eight_bits(phantoms(count))
    sets = image_set(train[:2].flip(-1), location="a"), image_set(train, location="b")
    found, candidates = find_flipped(*sets, kind="recoloured", cache=BlockCache(tmp_path), argument="generated")
    assert found.indices.tolist() == [0, 1]
    again = find_moved(*sets, candidates, cache=BlockCache(tmp_path), argument="generated")
    assert again.indices.tolist() == [0, 1]
    assert float(again.ratios.max()) < 0.1


def test_near_duplicates_count_once(tmp_path):
    """The next image is the next that shows something else, mirrored and darker duplicates aside."""
    train = eight_bits(phantoms(30))
    train[10], train[11] = train[2].flip(-1), train[2] // 2
    noise = torch.randint(-6, 7, train[2:3].shape, generator=torch.Generator().manual_seed(0))
    copy = (train[2:3].int() + noise).clamp(0, 255).to(torch.uint8)
    found, _ = searched(tmp_path, copy, train, kind="recoloured")
    assert int(found.indices) in (2, 10, 11)
    assert float(found.ratios) < 0.4


def noisy(image, count, *, seed=0):
    noise = torch.randint(-6, 7, (count, *image.shape[1:]), generator=torch.Generator().manual_seed(seed))
    return (image.int() + noise).clamp(0, 255).to(torch.uint8)


def test_copies_of_an_image_with_more_near_duplicates_than_candidates_are_found(tmp_path):
    """All candidates show one image: the ratio is that to the next image of another group."""
    train, times = eight_bits(phantoms(100)), 60
    train[:times] = noisy(train[:1], times)
    group = torch.arange(100)
    group[:times] = 0
    copies = torch.cat([noisy(train[:1], 2, seed=1).flip(-1), noisy(train[70:71], 1, seed=2)])
    sets = image_set(copies, location="a"), image_set(train, location="b")
    found = find_disguised(*sets, group=group, cache=BlockCache(tmp_path), argument="generated")
    for matches in found.values():
        assert bool((matches.indices[:2] < times).all())
        assert float(matches.ratios.max()) < 0.5
    once = image_set(train[[0, *range(times, 100)]], location="c")
    expected = find_disguised(sets[0], once, cache=BlockCache(tmp_path), argument="generated")
    for name in ("recoloured", "degraded"):  # the next image is the same one as where the image stands once
        following, others = (part[name].distances / part[name].ratios for part in (found, expected))
        assert following.tolist() == pytest.approx(others.tolist(), rel=1e-5)


@pytest.mark.parametrize("members", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[0, 1], [2, 3], [4, 5]]])
def test_the_most_alike_of_a_row_are_never_all_of_one_group_where_there_is_another(members):
    group = torch.empty(6, dtype=torch.int64)
    for number, part in enumerate(members):
        group[part] = number
    likeness = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
    found = disguises._most_alike(likeness, 3, group)
    for row, chosen in zip(likeness.tolist(), found.tolist(), strict=True):
        order = sorted(range(6), key=lambda place, row=row: -row[place])
        expected, others = order[:3], [place for place in order if group[place] != group[order[0]]]
        if len(group[expected].unique()) == 1 and others:
            expected[2:] = others[:1]
        assert chosen[: 2 if not others else 3] == expected[: 2 if not others else 3]


def test_features_do_not_depend_on_the_mirror_or_the_order_of_channels(tmp_path):
    pixels = random_pixels(3, channels=3, size=24)
    rows = [
        moved_rows(image_set(part, location="x"), cache=BlockCache(tmp_path), argument="x", device="cpu")
        for part in (pixels, pixels.flip(-1).contiguous(), pixels.flip(1).contiguous())
    ]
    assert torch.allclose(rows[0][1], rows[1][1], atol=1e-4)  # amplitudes of an image and its mirror image together
    for number in (1, 2):
        assert torch.allclose(rows[0][number], rows[2][number], atol=1e-5)
    for part in rows[0]:
        assert torch.allclose(torch.linalg.vector_norm(part, dim=1), torch.ones(3), atol=1e-5)


def test_undoing_fits_each_channel_by_all_channels():
    original = random_pixels(4, channels=3)
    weights = torch.tensor([[0.2, 0.5, 0.1], [0.6, 0.1, 0.2], [0.1, 0.1, 0.7]])
    mixed = (torch.einsum("ij,bjhw->bihw", weights, original.float()) + 10).round().to(torch.uint8)
    undone, noise = undo(mixed, original, torch.eye(2, 3).expand(4, 2, 3))
    assert float(noise.min()) > 45
    assert int((undone.int() - mixed.int()).abs().max()) <= 1
    unlike = undo(random_pixels(4, seed=9, channels=3), original, torch.eye(2, 3).expand(4, 2, 3))[1]
    assert float(unlike.max()) < 15


@pytest.mark.parametrize("level", [0, 128, 255])
def test_large_images_of_one_colour_are_undone(level):
    """Their channels are equal, and their sums so large that a small constant on the diagonal is rounded away."""
    original = torch.full((1, 3, 1024, 1025), level, dtype=torch.uint8)
    image = torch.tensor([7, 200, level], dtype=torch.uint8).view(1, 3, 1, 1).expand_as(original)
    undone, noise = undo(image, original, torch.eye(2, 3)[None])
    assert torch.equal(undone, image)
    assert noise.tolist() == [torch.inf]


def test_disguises_are_undone_exactly_whatever_the_precision_of_matrix_products():
    original = random_pixels(4, seed=9, channels=3)
    image = (255 - original).flip(-1)
    maps = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]]).expand(4, 2, 3)
    torch.set_float32_matmul_precision("medium")
    try:
        assert undo(image, original, maps)[1].tolist() == [torch.inf] * 4
    finally:
        torch.set_float32_matmul_precision("highest")


def test_many_images_are_undone_a_few_at_a_time(monkeypatch):
    from lightning_iet.audit import disguises

    images, originals = random_pixels(7), random_pixels(7, seed=1)
    maps = torch.eye(2, 3) + 0.1 * torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    whole = undo(images, originals, maps)
    monkeypatch.setattr(disguises, "_VALUES", 3 * images[0].numel())
    for one, other in zip(whole, undo(images, originals, maps), strict=True):
        assert torch.equal(one, other)


def test_finished_blocks_are_kept(tmp_path, monkeypatch):
    from lightning_iet.audit import disguises

    sets = image_set(eight_bits(phantoms(5, seed=3)), location="a"), image_set(eight_bits(phantoms(20)), location="b")
    cache = BlockCache(tmp_path)
    first, candidates = find_flipped(*sets, kind="recoloured", cache=cache, argument="generated")
    moved_first = find_moved(*sets, candidates, cache=cache, argument="generated")
    for name in ("_network", "register", "_correlated"):
        monkeypatch.setattr(disguises, name, None)
    again, _ = find_flipped(*sets, kind="recoloured", cache=cache, argument="generated")
    moved_again = find_moved(*sets, candidates, cache=cache, argument="generated")
    for one, other in zip((*first, *moved_first), (*again, *moved_again), strict=True):
        assert torch.equal(one, other)


def test_moved_copies_may_be_looked_for_among_some_images_only(tmp_path):
    """The others get a ratio of 1, and what the other searches found stays as it was."""
    train = phantoms(30)
    images = torch.cat([moved(train[3:5], dx=4 / 24), train[8:10].flip(-1)])
    sets = image_set(eight_bits(images), location="a"), image_set(eight_bits(train), location="b")
    shared = {"cache": BlockCache(tmp_path), "argument": "planted"}
    whole, part = (
        find_disguised(*sets, **shared, moved=moved) for moved in (True, torch.tensor([True, True, False, False]))
    )
    for kind in ("recoloured", "degraded"):
        alone, _ = find_flipped(*sets, kind=kind, **shared)
        for one, other, third in zip(part[kind], whole[kind], alone, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, third)
    for one, other in zip(part["moved"], whole["moved"], strict=True):
        assert torch.equal(one[:2], other[:2])
    assert part["moved"].ratios[2:].tolist() == part["moved"].distances[2:].tolist() == [1, 1]
    assert list(find_disguised(*sets, **shared, moved=torch.zeros(4, dtype=torch.bool))) == ["recoloured", "degraded"]


@pytest.mark.parametrize("shape", [(96, 72), (80, 80)])
def test_large_images_are_found_as_they_are_without_shrinking_them_first(tmp_path, monkeypatch, shape):
    """Grey versions that were made once, in blocks, give the same matches as versions that are made when asked for."""
    train = eight_bits(F.interpolate(phantoms(10), shape, mode="bilinear"))
    images = torch.cat([train[4:6].flip(-1), 255 - train[7:8], eight_bits(moved(train[9:] / 255, dx=0.1)), train[:1]])
    sets = image_set(images, location="a"), image_set(train, location="b")
    monkeypatch.setattr(disguises, "BLOCK", 4)
    found = find_disguised(*sets, cache=BlockCache(tmp_path / "a"), argument="generated")
    monkeypatch.setattr(disguises, "_greys", lambda images, *_, **__: disguises._Greys(images.pixels, {}))
    expected = find_disguised(*sets, cache=BlockCache(tmp_path / "b"), argument="generated")
    assert found["recoloured"].indices.tolist() == [4, 5, 7, found["recoloured"].indices[3], 0]
    assert found["moved"].indices.tolist()[3] == 9
    for kind, matches in expected.items():
        for own, other in zip(found[kind], matches, strict=True):
            assert torch.equal(own, other)


def test_how_many_are_worked_on_together_changes_no_bit(tmp_path, monkeypatch):
    """Candidates one by one, pairs three at a time, and grey images when asked for give the same as all at once."""
    train = phantoms(20, channels=3)
    images = torch.cat([moved(train[3:6], dx=4 / 24), 0.7 * train[8:10].flip(-1), phantoms(3, seed=5, channels=3)])
    train[17:] = train[3]
    sets = image_set(eight_bits(images), location="a"), image_set(eight_bits(train), location="b")
    group = torch.arange(20).where(torch.arange(20) < 17, 3)
    shared = {"argument": "generated", "group": group}
    whole = find_disguised(*sets, cache=BlockCache(tmp_path / "whole"), **shared)
    for module, name, value in (
        (disguises, "_PIXELS", 1),
        (disguises, "_VALUES", 5000),
        (registration, "_PIXELS", 2000),
    ):
        monkeypatch.setattr(module, name, value)
    parts = find_disguised(*sets, cache=BlockCache(tmp_path / "parts"), **shared)
    for kind, matches in whole.items():
        for own, other in zip(parts[kind], matches, strict=True):
            assert torch.equal(own, other)


def next_that_differs(found, train, group):
    """The distance to the first candidate that is of another group and looks unlike the nearest, one by one."""
    following = []
    for row, maps, distances in zip(found.indices, found.maps, found.distances, strict=True):
        limit = float(distances.square().mean().sqrt()) / 3
        grid = F.affine_grid(maps, [len(maps), 1, *train.shape[2:]], align_corners=False)
        seen = F.grid_sample(train[row], grid, padding_mode="border", align_corners=False)[:, 0]
        inside = ((grid[..., 0].abs() <= 1 + 1e-4) & (grid[..., 1].abs() <= 1 + 1e-4)).flatten(1)
        following.append(1.0)
        for i in range(1, len(row)):
            both = torch.stack([image.flatten()[inside[0] & inside[i]].double() for image in (seen[0], seen[i])])
            apart = math.sqrt(max(0, 1 - float(torch.corrcoef(both)[0, 1]) ** 2))
            if group[row[i]] != group[row[0]] and apart >= limit:
                following[-1] = float(distances[i])
                break
    return following


def test_the_ratio_is_that_to_the_next_image_that_shows_something_else():
    draw = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(13, 1, 4, 4, generator=draw), (16, 20), mode="bicubic").clamp(0, 1)
    share = torch.linspace(0, 0.25, 12)[:, None, None, None]
    train = (1 - share) * smooth[:1] + share * smooth[1:]  # more and more unlike the first
    group = torch.tensor([0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 10, 11])
    indices = torch.stack([torch.randperm(12, generator=draw)[:5] for _ in range(80)])
    indices[:3] = torch.tensor([[0, 1, 0, 1, 0], [3, 4, 0, 1, 2], [4, 3, 3, 4, 3]])
    maps = torch.eye(2, 3) + 0.3 * torch.randn(80, 1, 2, 3, generator=draw).expand(-1, 5, -1, -1)
    maps = maps + 0.03 * torch.randn(maps.shape, generator=draw)  # each candidate is known in another place
    maps[:3] = maps[:3, :1]
    distances = (0.05 + 0.9 * torch.rand(80, 5, generator=draw)).sort(dim=1).values
    greys = disguises._Greys((255 * train).byte(), {(16, 20): train})
    found = disguises._Candidates(distances, indices, maps)
    following = next_that_differs(found, train, group)
    assert following[0] == following[2] == 1
    assert 5 < sum(next != float(row[1]) for next, row in zip(following, distances, strict=True)) < 70
    matches = disguises._nearest(greys, found, (16, 20), group)
    assert matches.ratios.tolist() == pytest.approx((distances[:, 0] / torch.tensor(following)).tolist())
    assert torch.equal(matches.indices, indices[:, 0])


def test_a_training_image_of_one_colour_is_as_unlike_as_can_be(tmp_path):
    train = random_pixels(2, channels=1)
    train[1] = 80
    found, _ = searched(tmp_path, random_pixels(4, seed=1, channels=1), train, kind="recoloured")
    assert found.indices.tolist() == [0, 0, 0, 0]
    assert torch.equal(found.ratios, found.distances)
