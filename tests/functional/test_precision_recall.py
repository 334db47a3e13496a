import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional import precision_recall as module
from lightning_iet.functional.precision_recall import neighborhood_counts, precision_recall, squared_radii


def naive(generated, real, k):
    """Kynkäänniemi et al., section 2, point by point."""

    def share(points, centers):
        hits = 0
        for point in points:
            for i, center in enumerate(centers):
                others = [(center - other).norm() for j, other in enumerate(centers) if j != i]
                if (point - center).norm() <= sorted(others)[k - 1]:
                    hits += 1
                    break
        return hits / len(points)

    generated, real = generated.double(), real.double()
    return {"precision": share(generated, real), "recall": share(real, generated)}


def draw(seed, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 2, generator=generator) + shift, torch.randn(15, 2, generator=generator)


@given(seed=st.integers(0, 1000), k=st.integers(1, 4))
def test_equals_the_loop(seed, k):
    generated, real = draw(seed)
    found = {name: value.item() for name, value in precision_recall(generated, real, k=k).items()}
    assert found == pytest.approx(naive(generated, real, k))


@given(seed=st.integers(0, 1000))
def test_a_set_has_precision_and_recall_one_in_itself_in_any_order(seed):
    features, _ = draw(seed)
    assert precision_recall(features.flip(0), features) == {"precision": 1, "recall": 1}


@given(seed=st.integers(0, 1000))
def test_the_order_does_not_matter(seed):
    generated, real = draw(seed)
    assert precision_recall(generated.flip(0), real.roll(3, dims=0)) == precision_recall(generated, real)


@given(seed=st.integers(0, 1000))
def test_swapping_the_sets_swaps_the_figures(seed):
    generated, real = draw(seed)
    one, other = precision_recall(generated, real), precision_recall(real, generated)
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])


def test_far_away_is_nothing():
    generated, real = draw(0, shift=100)
    assert precision_recall(generated, real) == {"precision": 0, "recall": 0}


def sq_distance(x, y):
    return ((x.double() - y.double()) ** 2).sum().item()


def naive_radii(features, k):
    radii = []
    for i, x in enumerate(features):
        radii.append(sorted(sq_distance(x, y) for j, y in enumerate(features) if j != i)[k - 1])
    return torch.tensor(radii, dtype=torch.float64)


@given(seed=st.integers(0, 1000), num=st.integers(3, 15), k=st.integers(1, 2), levels=st.sampled_from([2, 1000]))
def test_radii_equal_the_loop(seed, num, k, levels):
    features = torch.randint(levels, (num, 3), generator=torch.Generator().manual_seed(seed)).float()
    torch.testing.assert_close(squared_radii(features, k), naive_radii(features, k))


@given(seed=st.integers(0, 1000), closed=st.booleans(), offset=st.sampled_from([0.0, 1000.0]))
def test_counts_equal_the_loop_also_on_the_surface(seed, closed, offset):
    """On a grid of few values points often lie exactly at a radius."""
    draw = torch.Generator().manual_seed(seed)
    points, centers = (torch.randint(4, (n, 3), generator=draw) + offset for n in (9, 12))
    radii = naive_radii(centers, 2)
    inside = torch.tensor(
        [
            [sq_distance(p, c) <= r if closed else sq_distance(p, c) < r for c, r in zip(centers, radii, strict=True)]
            for p in points
        ]
    )
    of_points, of_centers = neighborhood_counts(points, centers, radii, closed=closed)
    assert torch.equal(of_points, inside.sum(1))
    assert torch.equal(of_centers, inside.sum(0))


def test_blocks_do_not_matter(monkeypatch):
    features, points = torch.rand(20, 3), torch.rand(15, 3)
    radii = squared_radii(features, 3)
    counts = neighborhood_counts(points, features, radii, closed=True)
    monkeypatch.setattr(module, "_FLOATS", 45)
    torch.testing.assert_close(squared_radii(features, 3), radii)
    for found, expected in zip(neighborhood_counts(points, features, radii, closed=True), counts, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [0, 5, 6])
def test_a_neighbour_that_does_not_exist_is_refused(k):
    with pytest.raises(ValueError, match=f"Argument `k` expected a number from 1 to .* 4, but got {k}. Pass"):
        squared_radii(torch.rand(5, 2), k)


def test_nothing_lies_strictly_within_a_radius_of_zero():
    """Four equal images at the origin of the coordinates: float64 leaves no room for a tolerance there."""
    centers = torch.tensor([0.0, 0, 0, 0, -1, 1, -2, 2])[:, None]
    of_points, of_centers = neighborhood_counts(torch.zeros(5, 1), centers, squared_radii(centers, 3), closed=False)
    assert of_points.tolist() == [0] * 5  # those of 1 and 2 are on the surface
    assert of_centers.tolist() == [0] * 8


@given(seed=st.integers(0, 1000), far=st.sampled_from([1e5, 1e7]), closed=st.booleans())
def test_an_outlier_changes_nothing_for_the_others(seed, far, closed):
    draw = torch.Generator().manual_seed(seed)
    centers, points = torch.randn(2, 30, 4, generator=draw)
    radii = naive_radii(centers, 3)
    alone = neighborhood_counts(points, centers, radii, closed=closed)
    outlier = torch.full((1, 4), far)
    found = neighborhood_counts(
        points, torch.cat([centers, outlier]), torch.cat([radii, torch.zeros(1)]), closed=closed
    )
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1][:-1], alone[1])
    torch.testing.assert_close(squared_radii(torch.cat([centers, outlier]), 3)[:-1], radii)
