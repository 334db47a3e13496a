import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional import exhaustive_neighbors, neighbors
from lightning_iet.functional.checks import image_rows
from lightning_iet.functional.exhaustive_neighbors import level_moments, squared_norms
from lightning_iet.functional.neighbors import nearest_neighbors, search_rows
from lightning_iet.functional.pruned_neighbors import Projection


def brute_force(queries, references, k):
    """All squared distances in float64, pair by pair; the k smallest by (distance, index)."""
    rows = []
    for query in in_unit_interval(queries):
        distances = [((query - reference) ** 2).sum().item() for reference in in_unit_interval(references)]
        rows.append(sorted((distance, index) for index, distance in enumerate(distances))[:k])
    distances = torch.tensor([[distance for distance, _ in row] for row in rows], dtype=torch.float64)
    return distances, torch.tensor([[index for _, index in row] for row in rows])


def in_unit_interval(images):
    return images.double() / 255 if images.dtype == torch.uint8 else images.double()


def assert_nearest(queries, references, k, **kwargs):
    distances, indices = nearest_neighbors(queries, references, k, **kwargs)
    expected, expected_indices = brute_force(queries, references, k)
    assert distances.dtype == torch.float32
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(indices, expected_indices)


def images(n, *shape, seed):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [1, 2, 7, 40])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 16, 16)])
def test_equals_brute_force(shape, k):
    assert_nearest(images(9, *shape, seed=1), images(40, *shape, seed=2), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_one_pixel_changed_by_one_level_has_its_distance(dtype):
    references = torch.randint(256, (60, 3, 16, 16), dtype=torch.uint8)
    references[:, 0, 0, 0] = 128
    queries = references[:20].clone()
    queries[:, 0, 0, 0] += 1
    if dtype == torch.float32:
        queries, references = queries / 255, references / 255
    distances, indices = nearest_neighbors(queries, references, 2)
    torch.testing.assert_close(distances[:, 0], torch.full((20,), (1 / 255) ** 2), rtol=1e-4, atol=0)
    assert torch.equal(indices[:, 0], torch.arange(20))


def test_a_copy_is_at_distance_zero_also_among_large_numbers():
    references = 1 - images(50, 3, 32, 32, seed=0) / 1000  # norms of 3,000, distances of 0.001
    distances, indices = nearest_neighbors(references, references, 1)
    assert torch.equal(distances, torch.zeros(50, 1))
    assert torch.equal(indices[:, 0], torch.arange(50))
    assert_nearest(references[:5], references, 50)


@pytest.mark.parametrize("ties", [True, False])
def test_many_near_copies_have_their_distances(ties):
    original = 0.25 + images(1, 3, 32, 32, seed=0) / 2
    step = (
        torch.arange(1, 41).reshape(-1, 1, 1, 1).sqrt() / 1000
    )  # squared distances of 0.003, 0.006, ...; norms of 800
    rows = image_rows(original), image_rows(original + step)
    distances, indices = search_rows(*rows, 30, ties=ties)
    expected, expected_indices = brute_force(*rows, 30)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(indices, expected_indices)


def test_equally_distant_references_come_in_the_order_of_their_indices():
    references = images(4, 1, 8, 8, seed=3).repeat(10, 1, 1, 1)  # every image ten times
    assert_nearest(references[:4], references, 40)
    assert_nearest(images(3, 1, 8, 8, seed=4), references, 17)


def test_more_duplicates_than_candidates_are_searched_again():
    references = images(1, 3, 8, 8, seed=0).expand(200, -1, -1, -1).clone()
    references[150:, 0, 0, 0] = references[150:, 0, 0, 0] / 2  # nearest to the query, and last
    query = references[-1:]
    assert_nearest(query, references, 3)
    assert_nearest(query, references, 60)


@given(
    levels=st.sampled_from([2, 5, 256]),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 6)),
    data=st.data(),
)
def test_ties_on_grids_of_pixel_values(levels, sizes, data):
    num_queries, num_references, side = sizes
    seed = data.draw(st.integers(0, 1000))
    k = data.draw(st.integers(1, num_references))
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/256: squared distances are exact in float32, so that ties are ties for both sides.
    draw = torch.randint(levels, (num_queries + num_references, 1, side, side), generator=generator) / 256
    assert_nearest(draw[:num_queries], draw[num_queries:], k)


@given(seed=st.integers(0, 1000), chunk_size=st.integers(1, 70), split=st.integers(0, 12))
def test_splits_do_not_matter(seed, chunk_size, split):
    queries, references = images(12, 1, 4, 4, seed=seed), images(60, 1, 4, 4, seed=seed + 1)
    whole = nearest_neighbors(queries, references, 20)
    chunked = nearest_neighbors(queries, references, 20, chunk_size=chunk_size)
    halves = [nearest_neighbors(half, references, 20) for half in (queries[:split], queries[split:])]
    for other in (chunked, tuple(map(torch.cat, zip(*halves, strict=True)))):
        torch.testing.assert_close(other[0], whole[0], rtol=1e-5, atol=0)
        assert torch.equal(other[1], whole[1])


def test_slices_of_few_rows_do_not_matter(monkeypatch):
    queries = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    references = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(exhaustive_neighbors, "_FLOATS", 192 * 3)
    monkeypatch.setattr(neighbors, "_TOGETHER", (2, 2))
    assert_nearest(queries, references, 20)


@pytest.mark.parametrize("is_coded", [False, True])
@pytest.mark.parametrize("length", [50, 17])
def test_squares_at_hand_are_those_of_the_rows_that_are_searched(monkeypatch, is_coded, length):
    """Of few rows at a time, of references in parts, and of those queries that codes leave for the whole search."""
    queries, references = (torch.randint(256, (n, 192), dtype=torch.uint8) for n in (7, 50))
    queries[::2] //= 2  # lengths that differ
    expected = search_rows(queries, references, 9)
    if is_coded:
        mean = references.double().mean(dim=0)
        codes = Projection(mean, torch.eye(192, 2).double())
        monkeypatch.setattr(neighbors, "plan_projection", lambda *_: codes)
    monkeypatch.setattr(neighbors, "_parts", lambda *_: [slice(i, min(i + length, 50)) for i in range(0, 50, length)])
    monkeypatch.setattr(neighbors, "_TOGETHER", (2, 3))
    of_queries, of_references = (level_moments(rows)[1] for rows in (queries, references))
    found = search_rows(queries, references, 9, squares=of_references, own_squares=of_queries)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_uint8_equals_float():
    queries = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    references = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    expected = nearest_neighbors(queries / 255, references / 255, 10)
    for q, r in ((queries, references), (queries / 255, references), (queries, references / 255)):
        distances, indices = nearest_neighbors(q, r, 10)
        torch.testing.assert_close(distances, expected[0], rtol=1e-6, atol=0)
        assert torch.equal(indices, expected[1])


def test_distances_without_ties_are_as_exact():
    queries, references = images(9, 3, 8, 8, seed=1), images(50, 3, 8, 8, seed=2)
    rows = image_rows(queries), image_rows(references)
    distances, _ = search_rows(*rows, 20, norms=squared_norms(rows[1]), ties=False)
    torch.testing.assert_close(distances.double(), brute_force(queries, references, 20)[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", [32, 64, 256])
def test_one_pixel_of_a_large_image_changed_by_one_level_has_its_distance(side):
    references = images(20, 3, side, side, seed=0)
    references[:, 0, 0, 0] = 0.5
    queries = references[:4].clone()
    queries[:, 0, 0, 0] += 1 / 255
    assert_nearest(queries, references, 3)


@pytest.mark.parametrize("side", [32, 256])
def test_images_of_one_colour_have_their_distances(side):
    references = torch.linspace(0, 1, 60).reshape(-1, 1, 1, 1).expand(-1, 3, side, side)
    queries = (references[:5] + references[1:6]) / 2.001
    assert_nearest(queries, references, 20)


def test_float64_is_not_rounded():
    references = images(30, 3, 8, 8, seed=0).double()
    assert_nearest((references[:4] + 1e-9).clamp(max=1), references, 3)


def test_progress_counts_the_queries(monkeypatch):
    monkeypatch.setattr(neighbors, "_TOGETHER", (3, 3))
    done = []
    nearest_neighbors(images(10, 1, 4, 4, seed=0), images(20, 1, 4, 4, seed=1), 2, progress=done.append)
    assert done == [3, 6, 9, 10]


def test_a_device_may_be_named_and_inputs_read_from_a_file(tmp_path):
    saved = images(50, 1, 4, 4, seed=1)
    mapped = torch.from_file(str(tmp_path / "images"), shared=True, size=saved.numel()).view_as(saved).copy_(saved)
    assert_nearest(images(5, 1, 4, 4, seed=0), mapped, 7, device="cpu")


def test_no_queries_give_no_rows():
    distances, indices = nearest_neighbors(torch.zeros(0, 1, 4, 4), torch.zeros(5, 1, 4, 4), 3)
    assert distances.shape == indices.shape == (0, 3)


def test_no_gradient_flows():
    distances, _ = nearest_neighbors(torch.rand(2, 1, 4, 4, requires_grad=True), torch.rand(5, 1, 4, 4), 3)
    assert not distances.requires_grad


@pytest.mark.parametrize("setting", ["autocast", "matmul precision"])
def test_reduced_precision_around_does_not_matter(setting):
    queries, references = images(5, 3, 16, 16, seed=1), images(60, 3, 16, 16, seed=2)
    if setting == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_nearest(queries, references, 30)
    else:
        torch.set_float32_matmul_precision("medium")
        try:
            assert_nearest(queries, references, 30)
        finally:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "Argument `k` expected a number from 1 to the number of references, 5, but got 0. Pass"),
        ({"k": 6}, "Argument `k` expected a number from 1 to the number of references, 5, but got 6. Pass"),
        ({"chunk_size": 0}, "Argument `chunk_size` expected a positive number, but got 0. Leave it out"),
        (
            {"queries": torch.zeros(2, 3, 4, 4)},
            r"Argument `queries` expected .* shape \(1, 4, 4\), but got \(3, 4, 4\)",
        ),
        ({"queries": torch.full((2, 1, 4, 4), torch.nan)}, "Argument `queries` expected values .* but got NaN"),
        ({"references": torch.full((5, 1, 4, 4), 2.0)}, "Argument `references` expected values .* from 2 to 2"),
    ],
)
def test_bad_input_is_refused_in_one_line(kwargs, message):
    arguments = {"queries": torch.zeros(2, 1, 4, 4), "references": torch.zeros(5, 1, 4, 4), "k": 1} | kwargs
    with pytest.raises(ValueError, match=message) as caught:
        nearest_neighbors(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dimension", [1, 255, 1023, 1024, 1025, 2048, 3072])
@pytest.mark.parametrize("kind", ["noise", "extremes", "near"])
def test_distances_of_8_bit_images_are_exact(monkeypatch, dimension, kind):
    """Against sums of integers, with duplicates in other chunks, parts of rows and all of one level."""
    generator = torch.Generator().manual_seed(dimension)
    references = torch.randint(256, (60, dimension), generator=generator, dtype=torch.uint8)
    queries = torch.randint(256, (6, dimension), generator=generator, dtype=torch.uint8)
    if kind == "extremes":
        references, queries = references // 128 * 255, queries * 0
        queries[::2] = 255
    if kind == "near":
        queries = (references[:6].int() + 1).clamp(max=255).to(torch.uint8)
    references[40:46] = references[:6]
    monkeypatch.setattr(exhaustive_neighbors, "_FLOATS", 7 * min(1024, dimension))
    found, indices = nearest_neighbors(queries, references, 50, chunk_size=17)
    exact = (queries[:, None].long() - references[None].long()).square().sum(dim=2).double() / 255**2
    order = exact.float().sort(dim=1, stable=True)
    assert torch.equal(found, order.values[:, :50])
    assert torch.equal(indices, order.indices[:, :50])
    pairs = torch.arange(6).repeat_interleave(60), torch.arange(60).repeat(6)
    assert torch.equal(exhaustive_neighbors.pair_distances(queries, references, *pairs), exact.flatten())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_references_of_large_images_are_converted_once(monkeypatch, dtype):
    """However large an image is, all queries pass over the references together."""
    references = (torch.rand(9, 3, 300, 300, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    references = references if dtype == torch.uint8 else references / 255
    calls = []
    nearest = exhaustive_neighbors.ExhaustiveSearch.nearest
    monkeypatch.setattr(
        exhaustive_neighbors.ExhaustiveSearch,
        "nearest",
        lambda self, rows, **rest: calls.append(len(rows)) or nearest(self, rows, **rest),
    )
    assert torch.equal(nearest_neighbors(references, references, 1)[1][:, 0], torch.arange(9))
    assert calls == [9]
