from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from lightning_iet.audit import search
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.features import Features, build_features
from lightning_iet.audit.search import References, comparison_seconds, distinct_ratios, nearest_references, views
from lightning_iet.functional import duplicates
from tests.helpers.image_folders import random_set


def find(images, train, cache, *, k, invariance="none", features=None):
    features = features or build_features("pixels")
    references = References.of(features.rows(train.pixels), train.sha256)
    return nearest_references(
        images, references, k=k, features=features, views=views(invariance), cache=cache, argument="generated"
    )


def naive(images, train, k, invariance):
    """Every image in every version against every training image, one by one."""
    versions = list(views(invariance).values())
    found = []
    for image in images:
        least = []
        for index, other in enumerate(train):
            distances = [
                float(((view(image[None])[0].double() - other.double()) / 255).square().sum()) for view in versions
            ]
            least.append((min(distances), index, distances.index(min(distances))))
        found.append(sorted(least)[:k])
    return found


@pytest.mark.parametrize("invariance", ["none", "flip", "shift", "flip+shift"])
def test_neighbours_equal_those_of_a_naive_search(tmp_path, invariance, monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 4)
    images, train = random_set(9), random_set(12, seed=1)
    found = find(images, train, BlockCache(tmp_path), k=5, invariance=invariance)
    expected = torch.tensor(naive(images.pixels, train.pixels, 5, invariance), dtype=torch.float64)
    assert torch.allclose(found.sq_distances.double(), expected[..., 0], rtol=1e-4)
    assert torch.equal(found.indices, expected[..., 1].long())
    assert torch.equal(found.views, expected[..., 2].long())


@pytest.mark.parametrize("sizes", [(12,), (11, 1), (5, 4, 2, 1)])
def test_ratios_to_what_shows_something_else_look_as_far_as_it_takes(tmp_path, sizes):
    """Where all references show the same thing, the farthest stands for the others."""
    images, train, cache = random_set(9), random_set(12, seed=1), BlockCache(tmp_path)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    features = build_features("pixels")
    rows, references = features.rows(images.pixels), References.of(features.rows(train.pixels), train.sha256)
    options = {"features": features, "views": views("flip"), "cache": cache, "argument": "generated", "rows": rows}
    near = nearest_references(images, references, k=2, **options)
    found = distinct_ratios(near, group, images, references, **options)
    for ratio, ordered in zip(found.tolist(), naive(images.pixels, train.pixels, 12, "flip"), strict=True):
        others = [distance for distance, index, _ in ordered if group[index] != group[ordered[0][1]]]
        assert ratio == pytest.approx((ordered[0][0] / (others or [ordered[-1][0]])[0]) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("sizes", [(60,), (50, 6, 4)])
def test_few_neighbours_are_listed_at_once_and_none_are_kept(tmp_path, sizes, monkeypatch):
    """A list is as long as the largest group: of many images there are parts of it, and ratios alone are stored."""
    monkeypatch.setattr(duplicates, "LISTED", 100)
    images, train, cache = random_set(40), random_set(60, seed=1), BlockCache(tmp_path)
    images.pixels[10:30] = 7  # equal images are searched for once
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    features = build_features("pixels")
    rows, references = features.rows(images.pixels), References.of(features.rows(train.pixels), train.sha256)
    options = {"features": features, "views": views("flip"), "cache": cache, "argument": "generated", "rows": rows}
    near = nearest_references(images, references, k=2, **options)
    before, lists = set(tmp_path.iterdir()), []

    def counted(queries, references, k, **kwargs):
        lists.append((len(queries), k))
        return _search(queries, references, k, **kwargs)

    monkeypatch.setattr(search, "search_rows", counted)
    monkeypatch.setattr(duplicates, "search_rows", counted)
    found = distinct_ratios(near, group, images, references, **options)
    assert max(number * k for number, k in lists) <= 100
    members = group[near.indices]
    is_open = (members == members[:, :1]).all(dim=1)
    assert is_open[10:30].all()
    stored = [load(path.read_bytes()[:-32]) for path in set(tmp_path.iterdir()) - before]
    assert sum(block["ratios"].numel() for block in stored) == int(is_open.sum()) - 19
    assert {name for block in stored for name in block} == {"ratios"}
    lists.clear()
    assert torch.equal(distinct_ratios(near, group, images, references, **options), found)
    assert not lists  # they are kept
    for place in is_open.nonzero().flatten().tolist():
        (ordered,) = naive(images.pixels[place][None], train.pixels, 60, "flip")
        others = [distance for distance, index, _ in ordered if group[index] != group[ordered[0][1]]]
        assert float(found[place]) == pytest.approx((ordered[0][0] / (others or [ordered[-1][0]])[0]) ** 0.5, rel=1e-4)


@given(st.integers(0, 1000))
def test_a_version_of_a_training_image_is_found_as_that_version(tmp_path_factory, seed):
    train = random_set(10, seed=seed)
    versions = views("flip+shift")
    mirrored = random_set(1)
    pixels = train.pixels[3:4].flip(-1)
    cache = BlockCache(tmp_path_factory.mktemp("cache"))
    found = find(type(mirrored)(pixels, ["0"], "x", str(seed)), train, cache, k=2, invariance="flip+shift")
    assert (float(found.sq_distances[0, 0]), int(found.indices[0, 0])) == (0, 3)
    assert list(versions)[int(found.views[0, 0])] == "mirrored"


def test_finished_blocks_are_not_searched_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 4)
    images, train, cache = random_set(9), random_set(12, seed=1), BlockCache(tmp_path)
    first = find(images, train, cache, k=5)
    blocks = sorted(tmp_path.iterdir())
    assert len(blocks) == 3
    blocks[1].unlink()
    calls = []
    monkeypatch.setattr(search, "search_rows", lambda *args, **kwargs: calls.append(1) or _search(*args, **kwargs))
    again = find(images, train, cache, k=5)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    find(images, train, cache, k=4)
    find(images, random_set(12, seed=2), cache, k=5)
    find(random_set(9, seed=3), train, cache, k=5)
    assert len(calls) == 10  # other settings and other images are other work
    monkeypatch.setattr(search, "VERSION", search.VERSION + 1)
    find(images, train, cache, k=5)
    assert len(calls) == 13  # and so is another search


_search = search.search_rows


def test_features_that_are_not_finite_are_refused(tmp_path):
    def broken(images):
        rows = images.flatten(1).float()
        return torch.where(rows.sum(1, keepdim=True) == 0, torch.nan, rows)

    images = random_set(6)
    images.pixels[4] = 0
    with pytest.raises(ValueError, match=r"^Argument `features` .*'net', .* 1 of 6 generated images, the first '4'"):
        find(images, random_set(12, seed=1), BlockCache(tmp_path), k=5, features=Features("net", "1", broken))


def test_the_time_of_a_comparison_is_that_of_some_pairs_times_all(tmp_path, monkeypatch):
    """Of those whose blocks are missing in the cache."""
    monkeypatch.setattr(search, "BLOCK", 8)
    monkeypatch.setattr(search, "TRIED", (3, 4))
    ticks = count()
    monkeypatch.setattr(search, "perf_counter", lambda: 6.0 * next(ticks))
    sets = {"train": random_set(40), "generated": random_set(20, seed=1), "held_out": random_set(5, seed=2)}
    pixels, cache = build_features("pixels"), BlockCache(tmp_path)
    shared = {"k": 5, "invariance": "none", "within": False}

    def seconds(**changes):
        return comparison_seconds(sets, pixels, cache, **shared | changes)

    assert seconds() == 6.0 / 12 * 25 * 40
    monkeypatch.setattr(search, "ENOUGH", 13.0)
    assert seconds() == 3 * 6.0 / (3 * 12) * 25 * 40  # of three searches, behind one that is not timed
    monkeypatch.setattr(search, "ENOUGH", 0.0001)
    assert seconds(invariance="flip+shift") == 6.0 / 12 * 18 * 25 * 40
    assert seconds(within=True) == 6.0 / 12 * 65 * 40
    find(sets["generated"], sets["train"], cache, k=5)
    assert seconds(within=True) == 6.0 / 12 * 45 * 40
    find(sets["train"], sets["train"], cache, k=6)
    assert seconds(within=True) == 0  # 200 pairs are left: the trial is not worth it
    assert seconds(k=6) == 6.0 / 12 * 25 * 40
    network = Features("net", "1", lambda images: images.flatten(1).float())
    assert comparison_seconds(sets, network, cache, **shared) == 0
