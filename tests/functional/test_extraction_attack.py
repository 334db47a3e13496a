from itertools import combinations

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional import extraction_attack as cliques
from lightning_iet.functional import extraction_attack as extraction
from lightning_iet.functional import extraction_attack as module
from lightning_iet.functional.extraction_attack import (
    disjoint_cliques,
    extraction_attack,
    near_duplicates,
    tiled_distances,
)


def naive_distance(x, y, grid=4):
    """Tile by tile; a pixel belongs to tile number side * grid // length along each side."""
    sums, counts = [0.0] * grid**2, [0] * grid**2
    channels, height, width = x.shape
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                tile = (i * grid // height) * grid + j * grid // width
                sums[tile] += (x[c, i, j].item() - y[c, i, j].item()) ** 2
                counts[tile] += 1
    return max(total / count for total, count in zip(sums, counts, strict=True)) ** 0.5


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 8), (2, 5, 7), (1, 9, 6)])
def test_distance_equals_the_loop_over_tiles(shape):
    images, others = torch.rand(2, 5, *shape)
    expected = [naive_distance(x, y) for x, y in zip(images.double(), others.double(), strict=True)]
    assert tiled_distances(images, others).tolist() == pytest.approx(expected, rel=1e-5)


def test_one_tile_is_the_root_mean_square():
    images, others = torch.rand(2, 5, 3, 6, 6)
    expected = (images - others).square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(tiled_distances(images, others, grid=1), expected)


@given(seed=st.integers(0, 1000), eps=st.sampled_from([0.1013, 0.3013, 0.4513, 0.6013]), uint8=st.booleans())
def test_pairs_equal_the_double_loop(seed, eps, uint8):
    draw = torch.Generator().manual_seed(seed)
    images, others = (torch.randint(256, (n, 1, 4, 4), dtype=torch.uint8, generator=draw) for n in (9, 7))
    images[4:] = images[:5] // 2
    if not uint8:
        images, others = images / 255, others / 255
    unit = [each / 255 if uint8 else each for each in (images, others)]
    within = [[i, j] for i in range(9) for j in range(i + 1, 9) if naive_distance(unit[0][i], unit[0][j]) <= eps]
    between = [[i, j] for i in range(9) for j in range(7) if naive_distance(unit[0][i], unit[1][j]) <= eps]
    assert near_duplicates(images, eps=eps).tolist() == within
    assert near_duplicates(images, others, eps=eps).tolist() == between


def test_blocks_do_not_matter(monkeypatch):
    images, others = torch.rand(20, 1, 4, 4), torch.rand(30, 1, 4, 4)
    within, between = near_duplicates(images, eps=0.7), near_duplicates(images, others, eps=0.7)
    assert len(within) > 10
    monkeypatch.setattr(module, "_FLOATS", 70)
    assert torch.equal(near_duplicates(images, eps=0.7), within)
    assert torch.equal(near_duplicates(images, others, eps=0.7), between)


def noisy(image, num, draw, scale=0.1):
    """Copies with noise of at most ``scale``: any two differ by less than twice that."""
    noise = scale * (2 * torch.rand(num, *image.shape, generator=draw) - 1)
    return (image + noise).clamp(0, 1)


def test_planted_cliques_are_found_and_only_those():
    draw = torch.Generator().manual_seed(0)
    train = torch.rand(40, 3, 8, 8, generator=draw)
    train[31] = train[7] + 0.01  # a near duplicate in the training set
    generated = torch.rand(60, 3, 8, 8, generator=draw)
    generated[10:22] = noisy(train[7], 12, draw)
    generated[30:44] = noisy(torch.rand(3, 8, 8, generator=draw), 14, draw)  # again and again, but no training image
    generated[50:59] = noisy(train[20], 9, draw)  # one too few
    found = extraction_attack(generated, train.clamp(0, 1), eps=0.2, min_size=10)
    assert [(clique.members.tolist(), clique.train.tolist()) for clique in found] == [
        (list(range(30, 44)), []),
        (list(range(10, 22)), [7, 31]),
    ]


@given(seed=st.integers(0, 1000))
def test_the_order_of_the_images_does_not_matter(seed):
    draw = torch.Generator().manual_seed(seed)
    generated = torch.rand(25, 1, 4, 4, generator=draw)
    generated[:6], generated[6:10] = generated[0].clone(), generated[24].clone()
    order = torch.randperm(25, generator=draw)
    sizes = [len(clique.members) for clique in extraction_attack(generated, generated[:1], eps=0.01, min_size=3)]
    permuted = extraction_attack(generated[order], generated[:1], eps=0.01, min_size=3)
    assert sizes == [len(clique.members) for clique in permuted] == [6, 5]


@given(seed=st.integers(0, 1000))
def test_the_order_does_not_matter_where_cliques_overlap(seed):
    """Greys of which 0.1 and 0.2 could go with either side: how many cliques there are depends on who goes where."""
    greys = torch.tensor([0.0, 0.0, 0.1, 0.19, 0.2, 0.3, 0.3])
    counts = set()
    for order in (torch.arange(7), torch.randperm(7, generator=torch.Generator().manual_seed(seed))):
        images = (greys[order] * 255).round().byte().reshape(7, 1, 1, 1).expand(7, 1, 4, 4)
        for converted in (images, images / 255):
            found = extraction_attack(converted, torch.zeros(1, 1, 4, 4), eps=0.1005, min_size=3)
            counts.add((len(found), *(len(clique.members) for clique in found)))
    assert len(counts) == 1


@pytest.mark.parametrize("num", [4480, 6000])
def test_thousands_of_equal_images_are_one_clique(num):
    generated = torch.zeros(num, 1, 4, 4)
    (clique,) = extraction_attack(generated, torch.cat([generated[:2], generated[:1] + 0.5]))
    assert (clique.members.tolist(), clique.train.tolist()) == (list(range(num)), [0, 1])


def test_equal_images_count_as_often_as_they_stand_there():
    images = torch.tensor([0.5, 0.0, 0.5, 0.05, 0.9, 0.5]).reshape(6, 1, 1, 1).expand(6, 1, 4, 4)
    found = extraction_attack(images, images[:1], eps=0.1, min_size=2)
    assert [(clique.members.tolist(), clique.train.tolist()) for clique in found] == [([0, 2, 5], [0]), ([1, 3], [])]


def test_the_training_set_is_searched_once_for_all_cliques(monkeypatch):
    calls = []
    search = extraction.near_duplicates
    monkeypatch.setattr(extraction, "near_duplicates", lambda *a, **k: calls.append(len(a)) or search(*a, **k))
    train = torch.rand(30, 1, 8, 8)
    found = extraction_attack(train[:5].repeat_interleave(10, dim=0), train)
    assert [clique.train.tolist() for clique in found] == [[0], [1], [2], [3], [4]]
    assert calls == [1, 2]


@pytest.mark.parametrize(("grey", "eps"), [(0.7, 0.15), (0.8, 0.15), (0.9, 0.002), (1 / 3, 0.001)])
def test_large_images_of_one_colour_are_near_duplicates_up_to_eps(grey, eps):
    """The rounding of a product of 786,432 equal terms all goes one way."""
    image = torch.full((1, 3, 512, 512), grey)
    for share, expected in ((0.999, 1), (1.001, 0)):
        other = torch.full((1, 3, 512, 512), grey + share * eps)
        assert len(near_duplicates(image, other, eps=eps)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_single(dtype):
    draw = torch.Generator().manual_seed(0)
    images = (torch.rand(100, 1, 8, 8, generator=draw) * 0.8).to(dtype)
    others = (images.float() + 0.15 + 0.001 * torch.randn(100, 1, 8, 8, generator=draw)).clamp(0, 1).to(dtype)
    torch.testing.assert_close(
        tiled_distances(images, others), tiled_distances(images.float(), others.float()), rtol=0, atol=0
    )
    found = near_duplicates(images, others)
    assert torch.equal(found, near_duplicates(images.float(), others.float()))
    tiny = torch.full((1, 1, 8, 8), 2e-4, dtype=dtype)
    assert tiled_distances(tiny, 0 * tiny).item() == pytest.approx(tiny[0, 0, 0, 0].item())


def test_a_small_difference_on_a_large_background_is_a_difference():
    images = torch.ones(2, 1, 32, 32)
    images[0, 0, :4, :4] = 0  # the whole image differs by 0.125, its first tile by 0.5
    assert len(near_duplicates(images, eps=0.15)) == 0
    assert len(near_duplicates(images, eps=0.15, grid=1)) == 1


def test_too_many_pairs_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(module, "_PAIRS", 40)
    with pytest.raises(
        ValueError, match=r"Argument `eps` expected .* with more than 40 pairs .* every image once only"
    ) as caught:
        near_duplicates(torch.zeros(10, 1, 4, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "kwargs", "message"),
    [
        (torch.rand(5, 1, 4, 4), {"eps": 0.0}, r"Argument `eps` expected a number in \(0, 1\], but got 0.0"),
        (torch.rand(5, 1, 4, 4), {"eps": torch.nan}, r"Argument `eps` expected a number in \(0, 1\], but got nan"),
        (torch.rand(3, 2, 4, 4), {}, r"images of one size, but got \(3, 2, 4, 4\) and \(5, 1, 4, 4\)"),
        (
            torch.rand(5, 1, 4, 4),
            {"grid": 5, "eps": 1.0},
            "Argument `grid` expected a number from 1 to .* 4, but got 5",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(images, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        near_duplicates(images, torch.rand(5, 1, 4, 4), **kwargs)
    assert "\n" not in str(caught.value)


def edges_of(*groups):
    pairs = sorted({pair for group in groups for pair in combinations(sorted(group), 2)})
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def random_graph(seed, num, density):
    adjacent = torch.rand(num, num, generator=torch.Generator().manual_seed(seed)) < density
    return adjacent.triu(diagonal=1).nonzero()


def as_sets(found):
    return [set(clique.tolist()) for clique in found]


def test_groups_that_stand_apart_are_found_the_largest_first():
    groups = [{1, 5, 9}, {2, 3, 4, 30}, {7, 8}]
    assert as_sets(disjoint_cliques(edges_of(*groups), min_size=2)) == [{2, 3, 4, 30}, {1, 5, 9}, {7, 8}]
    assert as_sets(disjoint_cliques(edges_of(*groups), min_size=4)) == [{2, 3, 4, 30}]
    assert disjoint_cliques(edges_of(*groups), min_size=5) == []


def test_a_chain_is_no_clique():
    chain = torch.stack([torch.arange(20), torch.arange(1, 21)], dim=1)
    assert disjoint_cliques(chain, min_size=3) == []


def test_overlapping_cliques_share_no_image():
    found = disjoint_cliques(edges_of({0, 1, 2, 3, 4}, {3, 4, 5, 6, 7, 8}), min_size=2)
    assert as_sets(found) == [{3, 4, 5, 6, 7, 8}, {0, 1, 2}]


def assert_disjoint_cliques(found, pairs, min_size):
    graph = nx.Graph(pairs.tolist())
    assert all(graph.has_edge(*pair) for clique in found for pair in combinations(clique, 2))
    assert all(len(clique) >= min_size for clique in found)
    assert sum(map(len, found)) == len(set().union(*found))


@given(seed=st.integers(0, 1000), density=st.sampled_from([0.1, 0.4, 0.8]), min_size=st.integers(2, 5))
def test_the_first_is_the_largest_of_all_maximal_cliques_and_none_is_left(seed, density, min_size):
    pairs = random_graph(seed, 14, density)
    found = as_sets(disjoint_cliques(pairs, min_size=min_size))
    assert_disjoint_cliques(found, pairs, min_size)
    largest = max(map(len, nx.find_cliques(nx.Graph(pairs.tolist()))), default=0)
    assert (len(found[0]) if found else 0) == (largest if largest >= min_size else 0)
    left = nx.Graph(pairs.tolist())
    left.remove_nodes_from(set().union(*found))
    assert max(map(len, nx.find_cliques(left)), default=0) < min_size


@given(seed=st.integers(0, 1000), density=st.sampled_from([0.1, 0.4, 0.8]))
def test_large_tangles_still_give_cliques(seed, density):
    pairs = random_graph(seed, 20, density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cliques, "_EXACT", 0)
        found = as_sets(disjoint_cliques(pairs, min_size=3))
    assert_disjoint_cliques(found, pairs, 3)
    largest = max(map(len, nx.find_cliques(nx.Graph(pairs.tolist()))), default=0)
    assert largest < 3 or len(found[0]) > largest / 2


def test_a_clique_in_a_large_tangle_is_found():
    pairs = torch.cat([random_graph(0, 300, 0.05), edges_of(range(40, 70))]).unique(dim=0)
    assert as_sets(disjoint_cliques(pairs, min_size=10)) == [set(range(40, 70))]


def heaviest(pairs, sizes):
    """The weight of the heaviest clique, from all maximal ones."""
    graph = nx.Graph(pairs.tolist())
    graph.add_nodes_from(range(len(sizes)))
    return max(sum(sizes[node].item() for node in clique) for clique in nx.find_cliques(graph))


@given(seed=st.integers(0, 1000), density=st.sampled_from([0.0, 0.1, 0.4, 0.8]), min_size=st.integers(2, 9))
def test_nodes_count_as_often_as_their_image_stands_there(seed, density, min_size):
    pairs = random_graph(seed, 14, density)
    sizes = torch.randint(1, 5, (14,), generator=torch.Generator().manual_seed(seed))
    found = disjoint_cliques(pairs, min_size=min_size, sizes=sizes)
    weights = [sizes[clique].sum().item() for clique in found]
    assert weights == sorted(weights, reverse=True)
    assert all(weight >= min_size for weight in weights)
    largest = heaviest(pairs, sizes)
    assert (weights[0] if weights else 0) == (largest if largest >= min_size else 0)
    graph = nx.Graph(pairs.tolist())
    assert all(graph.has_edge(*pair) for clique in found for pair in combinations(clique.tolist(), 2))
    assert sum(map(len, found)) == len(set().union(*as_sets(found)))


@pytest.mark.parametrize("steps", [0, 50, 1000])
def test_a_search_that_takes_too_long_ends_with_cliques(steps, monkeypatch):
    """Groups of five, each a ring of strangers, all others near duplicates: branch and bound cannot bound these."""
    monkeypatch.setattr(cliques, "_STEPS", steps)
    rings = nx.complement(nx.disjoint_union_all([nx.cycle_graph(5)] * 8))
    pairs = torch.tensor(sorted(rings.edges))
    found = as_sets(disjoint_cliques(pairs, min_size=10))
    assert_disjoint_cliques(found, pairs, 10)
    assert [len(clique) for clique in found] == [16, 16]


def test_the_search_is_bounded_by_its_steps_not_by_the_graph():
    rings = nx.complement(nx.disjoint_union_all([nx.cycle_graph(5)] * 10))  # three million largest cliques
    looked_at = []
    bounds = cliques._Search._bounds

    def counted(search, candidates):
        looked_at.append(candidates.bit_count())
        return bounds(search, candidates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cliques, "_STEPS", 20_000)
        patch.setattr(cliques._Search, "_bounds", counted)
        disjoint_cliques(torch.tensor(sorted(rings.edges)), min_size=10)
    assert sum(looked_at) <= 20_000 + 50


@pytest.mark.parametrize("min_size", [0, 1])
def test_single_images_are_no_cliques(min_size):
    with pytest.raises(ValueError, match=f"Argument `min_size` expected at least 2, but got {min_size}"):
        disjoint_cliques(edges_of({0, 1}), min_size=min_size)
