import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional import balls
from lightning_iet.functional.balls import ball_counts, squared_radii


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
    """On a grid of few values points often lie exactly on a ball."""
    draw = torch.Generator().manual_seed(seed)
    points, centers = (torch.randint(4, (n, 3), generator=draw) + offset for n in (9, 12))
    radii = naive_radii(centers, 2)
    inside = torch.tensor(
        [
            [sq_distance(p, c) <= r if closed else sq_distance(p, c) < r for c, r in zip(centers, radii, strict=True)]
            for p in points
        ]
    )
    of_points, of_balls = ball_counts(points, centers, radii, closed=closed)
    assert torch.equal(of_points, inside.sum(1))
    assert torch.equal(of_balls, inside.sum(0))


def test_blocks_do_not_matter(monkeypatch):
    features, points = torch.rand(20, 3), torch.rand(15, 3)
    radii = squared_radii(features, 3)
    counts = ball_counts(points, features, radii, closed=True)
    monkeypatch.setattr(balls, "_FLOATS", 45)
    torch.testing.assert_close(squared_radii(features, 3), radii)
    for found, expected in zip(ball_counts(points, features, radii, closed=True), counts, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [0, 5, 6])
def test_a_neighbour_that_does_not_exist_is_refused(k):
    with pytest.raises(ValueError, match=f"Argument `k` expected a number from 1 to .* 4, but got {k}. Pass"):
        squared_radii(torch.rand(5, 2), k)
