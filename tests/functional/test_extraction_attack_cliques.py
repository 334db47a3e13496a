from itertools import combinations

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional import extraction_attack as cliques
from lightning_iet.functional.extraction_attack import disjoint_cliques


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
