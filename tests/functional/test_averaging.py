import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.functional.averaging import (
    LOCAL_CHUNK,
    NETWORK_CHUNK,
    PartialMeans,
    _exchange_in_slots,
    average_,
    fold_weights,
    weighted_average,
)


def naive_average(tensors, sizes):
    """Σ n_k x_k / n, in float64, element by element of the definition."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, size in zip(tensors, sizes, strict=True):
        total += size * tensor.double()
    return total / sum(sizes)


@given(st.integers(1, 6), st.data())
def test_equals_a_float64_reference(num_shards, data):
    sizes = data.draw(st.lists(st.integers(1, 1000), min_size=num_shards, max_size=num_shards))
    tensors = [torch.randn(3, 5, generator=torch.Generator().manual_seed(k)) for k in range(num_shards)]
    torch.testing.assert_close(
        weighted_average(tensors, sizes).double(), naive_average(tensors, sizes), rtol=1e-6, atol=1e-6
    )
    double = [tensor.double() for tensor in tensors]
    torch.testing.assert_close(weighted_average(double, sizes), naive_average(tensors, sizes), rtol=1e-13, atol=1e-13)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=10), st.sampled_from([torch.float32, torch.bfloat16]))
def test_identical_models_average_to_themselves_bit_for_bit(sizes, dtype):
    tensor = torch.randn(LOCAL_CHUNK + 3).to(dtype)
    assert torch.equal(weighted_average([tensor.clone() for _ in sizes], sizes), tensor)


def test_the_average_lies_in_every_copy_and_chunks_do_not_show():
    copies = [torch.randn(2 * LOCAL_CHUNK + 7) for _ in range(3)]
    expected = naive_average(copies, [1, 2, 3])
    average_(copies, [1, 2, 3])
    for copy in copies:
        torch.testing.assert_close(copy.double(), expected, rtol=1e-6, atol=1e-6)


def test_into_leaves_the_copies_alone():
    copies = [torch.zeros(4), torch.ones(4)]
    target = torch.empty(4)
    average_(copies, [1, 1], into=[target])
    assert target.tolist() == [0.5] * 4
    assert [copy.tolist() for copy in copies] == [[0.0] * 4, [1.0] * 4]


def test_half_precision_is_averaged_in_float32():
    copies = [torch.full((1,), 256.0).bfloat16()] + [torch.full((1,), 257.0).bfloat16() + 1 for _ in range(7)]
    expected = naive_average(copies, [1] * 8).bfloat16()
    assert weighted_average(copies, [1] * 8).item() == expected.item()


@pytest.mark.parametrize("sizes", [[], [1, 0], [-1]])
def test_weights_must_be_positive(sizes):
    with pytest.raises(ValueError, match="Argument `sizes` expected one number > 0 per shard"):
        fold_weights(sizes)


def test_sizes_must_match_the_copies():
    with pytest.raises(ValueError, match="expected 2 shards on each of 1 processes, but got 3"):
        average_([torch.zeros(1), torch.zeros(1)], [1, 1, 1])
    with pytest.raises(ValueError, match="expected flat tensors"):
        average_([torch.zeros(1, 1)], [1])


def shard_weights(shard, length):
    return torch.randn(length, generator=torch.Generator().manual_seed(shard))


def average_on_processes(num_shards, length, sizes):
    """What every process ends up with: the copies of its shards after the averaging."""
    dist.init_process_group("gloo")
    per_process = num_shards // dist.get_world_size()
    first = dist.get_rank() * per_process
    copies = [shard_weights(shard, length) for shard in range(first, first + per_process)]
    average_(copies, sizes, group=dist.group.WORLD)
    return copies


@pytest.mark.parametrize("length", [5, 3 * NETWORK_CHUNK + 11])
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_processes_gives_the_same_bits(processes, world_size, length):
    sizes = [3, 1, 4, 1]
    alone = [shard_weights(shard, length) for shard in range(4)]
    average_(alone, sizes)
    for copies in processes(world_size).run(average_on_processes, 4, length, sizes):
        for copy in copies:
            assert torch.equal(copy, alone[0])


def bytes_sent(length):
    """Bytes that this process sends in one averaging, counted at the calls."""
    dist.init_process_group("gloo")
    sent = 0
    original = dist.isend

    def counting(tensor, *args, **kwargs):
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        return original(tensor, *args, **kwargs)

    dist.isend = counting
    try:
        average_([torch.randn(length)], [1] * dist.get_world_size(), group=dist.group.WORLD)
    finally:
        dist.isend = original
    return sent


@pytest.mark.parametrize("world_size", [2, 4])
def test_bytes_sent_are_those_of_an_all_reduce(processes, world_size):
    length = 2 * NETWORK_CHUNK
    sent = processes(world_size).run(bytes_sent, length)
    assert sum(sent) / world_size == 2 * 4 * length * (world_size - 1) / world_size


def slots_on_processes(num_shards, length, sizes):
    """The way in which NCCL exchanges messages, over gloo."""
    dist.init_process_group("gloo")
    per_process = num_shards // dist.get_world_size()
    first = dist.get_rank() * per_process
    copies = [shard_weights(shard, length) for shard in range(first, first + per_process)]
    weights = fold_weights(sizes)[first : first + per_process]
    _exchange_in_slots(PartialMeans(copies, weights, copies, dist.group.WORLD))
    return copies


@pytest.mark.parametrize("world_size", [2, 4])
def test_messages_in_step_give_the_same_bits(processes, world_size):
    sizes, length = [3, 1, 4, 1], 3 * NETWORK_CHUNK + 11
    alone = [shard_weights(shard, length) for shard in range(4)]
    average_(alone, sizes)
    for copies in processes(world_size).run(slots_on_processes, 4, length, sizes):
        for copy in copies:
            assert torch.equal(copy, alone[0])


def distances_on_processes(num_shards, length, sizes, in_place):
    world_size = dist.init_process_group("gloo") or dist.get_world_size()
    per_process = num_shards // world_size
    first = dist.get_rank() * per_process
    copies = [shard_weights(shard, length) for shard in range(first, first + per_process)]
    squared = torch.zeros(per_process, dtype=torch.float64)
    into = None if in_place else [torch.empty(length)]
    group = dist.group.WORLD if world_size > 1 else None
    average_(copies, sizes, into=into, group=group, squared_distances=squared)
    return squared.tolist(), copies[0] if in_place else into[0]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_distances_from_the_average_are_those_of_a_loop(processes, world_size, in_place):
    sizes, length = [3, 1, 4, 1], NETWORK_CHUNK + 11
    alone = [shard_weights(shard, length) for shard in range(4)]
    mean = naive_average(alone, sizes)
    expected = [((shard.double() - mean) ** 2).sum().item() for shard in alone]
    average_(alone, sizes)
    results = processes(world_size).run(distances_on_processes, 4, length, sizes, in_place)
    measured = [distance for squared, _ in results for distance in squared]
    assert measured == pytest.approx(expected, rel=1e-5)
    # Measuring changes no bit.
    assert all(torch.equal(average, alone[0]) for _, average in results)
