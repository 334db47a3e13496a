import copy
import io
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from lightning_iet.modules import svdiff as implementation
from lightning_iet.modules.adapters import add_svdiff, fold_svdiff, remove_svdiff
from lightning_iet.modules.svdiff import rebuild_bases, spectral_shifts

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "tall": (lambda: nn.Linear(3, 7), (4, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 2, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3)),
    "layer_norm": (lambda: nn.LayerNorm((2, 3)), (4, 2, 3)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "embedding": (lambda: nn.Embedding(6, 3), None),
}


def layer_of(kind, dtype=torch.float64):
    make, shape = LAYERS[kind]
    layer = make().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    inputs = torch.tensor([0, 5, 2]) if shape is None else torch.randn(shape, dtype=dtype)
    return layer, inputs


def shifted(weight, delta, *, is_norm):
    """The definition, term by term, from a decomposition of its own."""
    matrix = weight.detach().reshape(1, -1) if is_norm else weight.detach().reshape(len(weight), -1)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    total = matrix.double().clone()
    for j in range(len(s)):
        total += (max(float(s[j] + delta[j]), 0.0) - s[j]) * torch.outer(u[:, j], vh[j])
    return total.reshape(weight.shape)


@pytest.mark.parametrize("kind", LAYERS)
def test_forward_is_that_of_a_naive_product(kind):
    layer, inputs = layer_of(kind)
    plain = copy.deepcopy(layer)
    network = nn.Sequential(layer)
    add_svdiff(network, ["0"])
    (shift,) = spectral_shifts(network).values()
    rank = 1 if "norm" in kind else min(len(plain.weight), plain.weight[0].numel())
    assert shift.shift.shape == (rank,)
    torch.nn.init.normal_(shift.shift)
    shift.shift.data[-1] = -100.0  # beyond the singular value: nothing is left of it
    expected = torch.func.functional_call(
        plain, {"weight": shifted(plain.weight, shift.shift.detach(), is_norm="norm" in kind)}, (inputs,)
    )
    torch.testing.assert_close(network(inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_zero_shift_is_the_pretrained_layer_bit_for_bit(kind, dtype):
    layer, inputs = layer_of(kind, dtype)
    before = layer(inputs)
    weight = layer.weight.detach().clone()
    network = nn.Sequential(layer)
    add_svdiff(network, ["0"])
    assert torch.equal(network[0].weight, weight)
    assert torch.equal(network(inputs), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network[0].weight, weight)  # formed in float32 all the same


@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_is_that_of_the_formula_and_of_differences(kind):
    layer, inputs = layer_of(kind)
    network = nn.Sequential(layer)
    add_svdiff(network, ["0"])
    (shift,) = spectral_shifts(network).values()
    shift.shift.data.uniform_(-0.1, 0.1)

    def loss():
        return network(inputs).sin().sum()

    seen = []
    handle = shift.register_forward_hook(lambda module, args, output: output.register_hook(seen.append) and None)
    loss().backward()
    handle.remove()
    u, s, vh = shift.basis.on("cpu")
    (gradient,) = seen
    matrix = gradient.reshape(len(u), -1)
    for j in range(len(s)):
        by_formula = (u[:, j] @ matrix @ vh[j]) if s[j] + shift.shift[j] > 0 else 0.0
        step = torch.zeros_like(s)
        step[j] = 1e-6
        with torch.no_grad():
            shift.shift += step
            above = loss()
            shift.shift -= 2 * step
            by_differences = (above - loss()) / 2e-6
            shift.shift += step
        torch.testing.assert_close(shift.shift.grad[j], torch.as_tensor(by_formula))
        torch.testing.assert_close(shift.shift.grad[j], by_differences, rtol=1e-5, atol=1e-6)


def test_clamped_values_contribute_nothing_and_get_no_gradient():
    network = nn.Sequential(nn.Linear(4, 3, bias=False, dtype=torch.float64))
    add_svdiff(network, ["0"])
    (shift,) = spectral_shifts(network).values()
    u, s, vh = shift.basis.on("cpu")
    shift.shift.data.copy_(torch.tensor([0.0, -2.0, 0.0]) * s)
    torch.testing.assert_close(network[0].weight, (u[:, [0, 2]] * s[[0, 2]]) @ vh[[0, 2]])
    network(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    assert shift.shift.grad[1] == 0
    assert shift.shift.grad[0] != 0


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_shifts_average_as_weights_do(rows, columns, seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=torch.float64))
    add_svdiff(network, ["0"])
    (shift,) = spectral_shifts(network).values()
    s = shift.basis.on("cpu")[1]
    shifts = [torch.rand_like(s) * 2 - s.clamp(max=1) for _ in range(2)]  # S + δ ≥ 0
    weights = []
    for values in (*shifts, sum(shifts) / 2):
        shift.shift.data.copy_(values)
        weights.append(network[0].weight.detach())
    torch.testing.assert_close((weights[0] + weights[1]) / 2, weights[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_folded_layer_computes_the_same_under_the_old_names(kind):
    layer, inputs = layer_of(kind, torch.float32)
    stock = copy.deepcopy(layer)
    network = nn.Sequential(layer)
    add_svdiff(network, ["0"])
    (shift,) = spectral_shifts(network).values()
    torch.nn.init.normal_(shift.shift)
    expected = network(inputs)
    fold_svdiff(network)
    assert type(network[0]) is type(stock)
    assert list(network[0].state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(network(inputs), expected, rtol=1e-5, atol=1e-5)
    stock.load_state_dict(network[0].state_dict(), strict=True)
    torch.testing.assert_close(stock(inputs), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for name, parameter in network.named_parameters() if "bias" not in name)


def test_removed_shifts_leave_the_old_weight():
    network = nn.Sequential(nn.Linear(3, 3))
    weight = network[0].weight.detach().clone()
    add_svdiff(network, ["0"])
    torch.nn.init.normal_(spectral_shifts(network)["0"].shift)
    remove_svdiff(network)
    assert torch.equal(network[0].weight, weight)
    assert list(network.state_dict()) == ["0.weight", "0.bias"]


# --- bases ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decompositions(monkeypatch):
    """Count of decompositions of matrices."""
    made = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: made.append(1) or svd(*args, **kwargs))
    return made


def test_bases_are_made_once_and_belong_to_nothing(decompositions):
    network = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    add_svdiff(network, ["0", "1"])
    assert len(decompositions) == 1  # a vector is its own decomposition
    for _ in range(3):
        network(torch.rand(2, 3)).sum().backward()
    average = AveragedModel(network)
    average.update_parameters(network)
    average(torch.rand(2, 3))
    assert len(decompositions) == 1
    assert list(network.buffers()) == []
    assert list(network.state_dict()) == [
        "0.bias",
        "0.parametrizations.weight.original",
        "0.parametrizations.weight.0.shift",
        "1.bias",
        "1.parametrizations.weight.original",
        "1.parametrizations.weight.0.shift",
    ]
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if "weight" in name] == [name for name in network.state_dict() if "shift" in name]


def test_copies_share_a_basis_and_casts_leave_it_in_float32():
    network = nn.Sequential(nn.Linear(3, 3))
    add_svdiff(network, ["0"])
    duplicate = copy.deepcopy(network)
    own, other = (spectral_shifts(n)["0"] for n in (network, duplicate))
    assert own.basis is other.basis
    assert own.shift is not other.shift
    before = network[0].weight.detach()
    network.bfloat16()
    assert own.basis.on("cpu")[0].dtype == torch.float32
    assert network[0].weight.dtype == torch.bfloat16
    assert torch.equal(network[0].weight, before.bfloat16())


def test_state_dict_of_other_weights_brings_another_basis(decompositions):
    # A module is built with random weights, gets its adapters, and then the weights of a checkpoint.
    first, second = (nn.Sequential(nn.Linear(4, 3)) for _ in range(2))
    for network in (first, second):
        add_svdiff(network, ["0"])
    torch.nn.init.normal_(spectral_shifts(first)["0"].shift)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    assert len(decompositions) == 2
    second.load_state_dict(torch.load(file, weights_only=True))
    assert len(decompositions) == 3
    torch.testing.assert_close(second[0].weight, first[0].weight, rtol=0, atol=0)
    second.load_state_dict(first.state_dict())  # the same again: nothing to do
    assert len(decompositions) == 3


def test_weights_in_another_type_keep_their_basis(decompositions):
    network = nn.Sequential(nn.Linear(4, 3))
    add_svdiff(network, ["0"])
    network.load_state_dict({name: tensor.bfloat16() for name, tensor in network.state_dict().items()})
    network.bfloat16()
    assert rebuild_bases(network) == []
    assert len(decompositions) == 1
    network[0].parametrizations.weight.original.data += 1
    assert rebuild_bases(network) == ["0"]
    assert len(decompositions) == 2


def test_replaced_weights_are_decomposed_again(decompositions):
    network = nn.Sequential(nn.Linear(4, 3))
    add_svdiff(network, ["0"])
    assert rebuild_bases(network) == []
    network[0].parametrizations.weight.original.data.mul_(-1)  # as a broadcast of another process's weights would
    assert rebuild_bases(network) == ["0"]
    u, s, vh = spectral_shifts(network)["0"].basis.on("cpu")
    torch.testing.assert_close((u * s) @ vh, network[0].weight)


def test_bases_on_disk_are_read_by_the_next_run(tmp_path, decompositions):
    def adapted(seed):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm(3))
        add_svdiff(network, ["0", "1"], folder=tmp_path / "bases")
        torch.nn.init.ones_(spectral_shifts(network)["0"].shift)
        return network[0].weight.detach()

    first = adapted(0)
    assert len(decompositions) == 1
    assert len(list((tmp_path / "bases").iterdir())) == 2
    assert torch.equal(adapted(0), first)
    assert len(decompositions) == 1
    assert not torch.equal(adapted(1), first)  # another weight, another file
    assert len(decompositions) == 2
    assert all(file.suffix == ".safetensors" for file in (tmp_path / "bases").iterdir())


def test_a_row_of_zeros_has_a_basis():
    network = nn.Sequential(nn.LayerNorm(4))
    torch.nn.init.zeros_(network[0].weight)
    add_svdiff(network, ["0"])
    spectral_shifts(network)["0"].shift.data.fill_(2.0)
    torch.testing.assert_close(network[0].weight, torch.ones(4))


def test_shifts_without_memory():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(1000, 2000), nn.GroupNorm(1, 8))
    add_svdiff(network, ["0", "1"])
    assert {name: shift.shift.shape for name, shift in spectral_shifts(network).items()} == {"0": (1000,), "1": (1,)}


# --- refusals ---------------------------------------------------------------------------------------------------------


def quantised():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer)


def tied():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return nn.Sequential(first, second)


def not_finite():
    network = nn.Sequential(nn.Linear(2, 2))
    network[0].weight.data[0, 0] = float("nan")
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(parametrize_norm(nn.Linear(2, 2))), "a plain weight in '0', but got one that is param"),
        (lambda: nn.Sequential(nn.ReLU()), "embedding or normalisation layer in '0', but got ReLU"),
        (quantised, "floating-point numbers in '0', but got torch.int8: quantised"),
        (tied, "of its own in '0', but got one that '0' and '1' share"),
        (not_finite, "'0': SV-DIFF expected a weight of finite numbers"),
    ],
)
def test_layers_that_cannot_be_shifted(make, message):
    network = make()
    before = dict(network.named_parameters())
    with pytest.raises(ValueError, match=re.escape(message)):
        add_svdiff(network, ["0"])
    assert {name: id(p) for name, p in network.named_parameters()} == {name: id(p) for name, p in before.items()}


def parametrize_norm(layer):
    return torch.nn.utils.parametrizations.weight_norm(layer)


def test_file_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(implementation, "save_file", lambda tensors, path: (_ for _ in ()).throw(OSError("disk full")))
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(OSError, match="disk full"):
        add_svdiff(network, ["0"], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not parametrize.is_parametrized(network[0])


def test_adapted_layer_is_differentiable_in_its_input():
    network = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64))
    add_svdiff(network, ["0"])
    inputs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    network(inputs).sum().backward()
    expected = F.linear(torch.ones(2, 2, dtype=torch.float64), network[0].weight.detach().T)
    torch.testing.assert_close(inputs.grad, expected)


def test_folding_a_copy_leaves_the_original_alone():
    network = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    add_svdiff(network, ["0"])
    copied = copy.deepcopy(network)
    fold_svdiff(copied)
    images = torch.rand(2, 3)
    torch.testing.assert_close(network(images), copied(images))
    assert "parametrizations" in dict(network[0].named_children())
    assert "parametrizations" not in dict(copied[0].named_children())
