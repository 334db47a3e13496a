import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_iet.shards import FlatLayout, shard_tensors


def tensors():
    return {
        "vector": nn.Parameter(torch.randn(5)),
        "images": nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        "double": torch.randn(3, dtype=torch.float64),
        "scalar": torch.randn(()),
        "empty": torch.empty(0),
    }


def test_a_flat_copy_holds_values_shapes_and_memory_formats():
    live = tensors()
    layout = FlatLayout(live)
    views = layout.views(layout.flatten())
    for name, tensor in live.items():
        assert torch.equal(views[name], tensor.detach())
        assert views[name].stride() == tensor.stride()
        if tensor.numel():
            assert views[name].data_ptr() % 64 == layout.flatten()[tensor.dtype].data_ptr() % 64
    assert layout.nbytes == sum(flat.nbytes for flat in layout.flatten().values())


def test_installing_exchanges_pointers_and_training_changes_the_copy():
    live = tensors()
    layout = FlatLayout(live)
    first, second = layout.flatten(), layout.flatten()
    layout.install(first)
    assert layout.holds(first)
    assert not layout.holds(second)
    with torch.no_grad():
        live["vector"].fill_(7)
    assert layout.views(first)["vector"].tolist() == [7.0] * 5
    layout.install(second)
    assert live["vector"].tolist() != [7.0] * 5
    live["vector"].data = live["vector"].data.clone()
    assert not layout.holds(second)


def test_release_gives_memory_of_its_own():
    live = tensors()
    layout = FlatLayout(live)
    layout.install(layout.flatten())
    values = {name: tensor.detach().clone() for name, tensor in live.items()}
    layout.release()
    for name, tensor in live.items():
        assert torch.equal(tensor.detach(), values[name])
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert live["images"].is_contiguous(memory_format=torch.channels_last)


def test_an_expanded_buffer_becomes_dense():
    expanded = torch.ones(1).expand(3)
    layout = FlatLayout({"expanded": expanded})
    assert layout.views(layout.flatten())["expanded"].tolist() == [1.0] * 3


def test_what_training_changes_is_found_and_what_is_frozen_is_left_out():
    module = nn.Module()
    module.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.frozen = nn.Linear(2, 2).requires_grad_(False)
    module.ema = AveragedModel(module.net).requires_grad_(False)
    floats, counters = shard_tensors(module)
    assert "net.0.weight" in floats
    assert "net.1.running_var" in floats
    assert "ema.module.0.weight" in floats
    assert "frozen.weight" not in floats
    assert sorted(counters) == ["ema.module.1.num_batches_tracked", "ema.n_averaged", "net.1.num_batches_tracked"]


def test_tied_weights_are_held_once():
    module = nn.Module()
    module.a = nn.Linear(2, 2)
    module.b = nn.Linear(2, 2)
    module.b.weight = module.a.weight
    floats, _ = shard_tensors(module)
    assert sorted(floats) == ["a.bias", "a.weight", "b.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_have_a_flat_copy_of_their_own(dtype):
    layout = FlatLayout({"a": torch.ones(3), "b": torch.ones(3, dtype=dtype)})
    assert set(layout.flatten()) == {torch.float32, dtype}
