import copy
import functools
import re

import pytest
import torch
from torch import nn

from lightning_iet.functional.parameter_groups import find_groups, trained_parameters
from lightning_iet.modules.adapters import (
    Selection,
    fold_adapters,
    parameter_groups,
    remove_adapters,
    select_parameters,
)
from tests.helpers.unets import small_dit, small_pixel_unet, small_sd_unet

FAMILIES = ("all", "attention", "norm", "bias", "norm_bias", "svdiff", "difffit", "lora")
NETWORKS = {"sd": small_sd_unet, "pixels": small_pixel_unet, "dit": small_dit}


def call(network):
    generator = torch.Generator().manual_seed(1)
    channels = network.config.in_channels
    images, times = torch.randn(2, channels, 8, 8, generator=generator), torch.tensor([3, 70])
    if "Condition" in type(network).__name__:
        return network(images, times, torch.randn(2, 3, 8, generator=generator)).sample
    if "Transformer" in type(network).__name__:
        return network(images, times, class_labels=torch.tensor([1, 2])).sample
    return network(images, times).sample


@functools.cache
def pretrained(name, seed=0):
    """A network, of which tests change copies, and what it predicts."""
    network = NETWORKS[name](seed=seed).eval()
    with torch.no_grad():
        return network, call(network)


def parameters_of(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def train(network, steps=2):
    """Steps with all that could move a frozen parameter: weight decay and momentum."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        call(network).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("pixels", family) for family in FAMILIES),
        *(("dit", family) for family in FAMILIES if family != "norm"),  # its norms have no parameters of their own
        *(("sd", family) for family in ("attention", "svdiff", "difffit", "lora")),
    ],
)
def test_training_moves_what_is_selected_and_nothing_else(name, family):
    stock, before = pretrained(name)
    alternating = ("10" * len(bits := find_groups(stock, family).bits))[: len(bits)]
    for mask in (alternating, None) if name == "pixels" else (alternating,):
        network = copy.deepcopy(stock)
        groups, trained = select_parameters(network, Selection(family, mask))
        assert torch.equal(call(network), before)  # zero adapters
        assert trained == trained_parameters(groups, mask)
        parameters = dict(network.named_parameters())
        assert {n for n, p in parameters.items() if p.requires_grad} == trained
        assert {n: parameters[n].numel() for n in trained} == {n: groups.numel[n] for n in trained}
        at_first = parameters_of(network)
        train(network)
        moved = {n for n, p in network.named_parameters() if not torch.equal(p, at_first[n])}
        assert moved <= trained
        used = {n for n in trained if network.get_parameter(n).grad is not None}
        assert moved >= {n for n in used if network.get_parameter(n).grad.abs().sum() > 0}
        assert moved

        expected = call(network)
        fold_adapters(network)
        assert {n: p.shape for n, p in network.state_dict().items()} == {
            n: p.shape for n, p in stock.state_dict().items()
        }
        other = copy.deepcopy(pretrained(name, seed=1)[0])
        other.load_state_dict(network.state_dict(), strict=True)
        torch.testing.assert_close(call(other), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ones_are_the_family_bit_for_bit(family):
    ends = []
    for mask in (None, "1"):
        torch.manual_seed(0)
        network = small_pixel_unet()
        if mask is not None:
            mask *= len(find_groups(network, family).bits)
        select_parameters(network, Selection(family, mask))
        train(network)
        ends.append(network.state_dict())
    assert list(ends[0]) == list(ends[1])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("family", ["svdiff", "difffit", "lora"])
def test_removed_adapters_leave_the_pretrained_network(family):
    network, before = copy.deepcopy(pretrained("sd"))
    names = list(network.state_dict())
    _, trained = select_parameters(network, Selection(family))
    for name, parameter in network.named_parameters():
        if name in trained and ("shift" in name or "difffit" in name or "lora" in name):
            torch.nn.init.normal_(parameter)
    remove_adapters(network)
    assert torch.equal(call(network), before)
    assert list(network.state_dict()) == names
    select_parameters(network, Selection(family))  # and may be selected again


def test_masks_leave_adapters_out():
    network = small_pixel_unet()
    bits = find_groups(network, "svdiff").bits
    mask = "".join("1" if bit == "mid_block.attentions.0" else "0" for bit in bits)
    _, trained = select_parameters(network, Selection("svdiff", mask))
    assert all(name.startswith("mid_block.attentions.0.") for name in trained)
    assert {name for name, _ in network.named_parameters() if name.endswith("shift")} == trained


def test_five_lines_of_plain_pytorch():
    unet = small_pixel_unet()
    groups, trained = select_parameters(unet, Selection("svdiff"))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
    call(unet).square().mean().backward()
    optimizer.step()
    fold_adapters(unet)
    assert len(trained) == len(groups.numel)
    small_pixel_unet().load_state_dict(unet.state_dict(), strict=True)


def test_published_mask_of_zeros_still_trains_the_rest():
    groups, trained = select_parameters(small_sd_unet(), Selection("svdiff", "0" * 13, granularity="published"))
    assert trained == frozenset(groups.rest)
    assert any(".transformer_blocks." in name and "attentions.2" in name for name in trained)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection("bias", "0000"), "at least one 1, but got '0000' without the rest"),
        (Selection("bias", "000", rest=False), "at least one 1, but got '000' without the rest"),
        (Selection("bias", "01"), "expected 3 or 4 characters"),
    ],
)
def test_selections_under_which_nothing_trains(selection, message):
    network = small_dit()
    with pytest.raises(ValueError, match=re.escape(message)):
        select_parameters(network, selection)
    assert all(parameter.requires_grad for name, parameter in network.named_parameters() if "pos_embed" not in name)


def test_what_was_frozen_beside_trained_parts_stays_frozen():
    network = small_dit()
    network.proj_out_2.requires_grad_(False)  # as a table of positions would be
    _, trained = select_parameters(network, Selection("bias"))
    assert "proj_out_2.bias" not in trained
    assert not network.proj_out_2.bias.requires_grad
    whole = small_dit().requires_grad_(False)  # as a pipeline for inference comes
    _, trained = select_parameters(whole, Selection("bias"))
    assert "proj_out_2.bias" in trained
    part = small_dit()
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))
    with pytest.raises(ValueError, match="all of whose parameters are frozen while others are trained"):
        select_parameters(part, Selection("bias"))


@pytest.mark.parametrize("family", ["svdiff", "difffit", "lora"])
def test_a_layer_that_was_frozen_gets_no_adapter(family):
    network = small_pixel_unet()
    frozen = [network.conv_in, network.mid_block.attentions[0].to_q, network.mid_block.attentions[0].group_norm]
    for layer in frozen:
        layer.requires_grad_(False)
    names = {name for name, layer in network.named_modules() if any(layer is one for one in frozen)}
    expected = {
        name
        for name in trained_parameters(find_groups(network, family))
        if not any(name.startswith(f"{layer}.") for layer in names)
    }
    groups, trained = select_parameters(network, Selection(family))
    assert trained == expected
    assert expected < set(trained_parameters(groups))
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == expected
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in frozen]
    train(network, steps=1)
    for layer, old in zip(frozen, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in layer.state_dict().items())
        assert set(layer.state_dict()) == {"weight", "bias"}


def test_shifts_of_norms_are_a_group_of_their_own():
    network = small_pixel_unet()
    select_parameters(network, Selection("svdiff"))
    fast, slow = parameter_groups(network, norm_lr_scale=0.01)
    assert (fast["lr_scale"], slow["lr_scale"]) == (1.0, 0.01)
    norms = {
        id(layer.parametrizations.weight[0].shift)
        for layer in network.modules()
        if isinstance(layer, nn.GroupNorm) and hasattr(layer, "parametrizations")
    }
    assert {id(parameter) for parameter in slow["params"]} == norms
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in fast["params"]} == trained - norms
    other = small_pixel_unet()
    select_parameters(other, Selection("bias"))
    assert len(parameter_groups(other)) == 1


def test_specification_is_plain_and_makes_the_same_selection():
    for selection in (
        Selection(),
        Selection("lora", "01", lora_rank=2, lora_alpha=3.0, lora_targets=("a",)),
        Selection("bias", groups={"a": "b"}, rest=False),
    ):
        plain = selection.specification()
        assert Selection(**plain) == selection
        assert all(isinstance(value, str | int | float | bool | list | dict | None) for value in plain.values())


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection("svdif"), "`family` expected one of"),
        (Selection("bias", "0a"), "`mask` expected a string of 0 and 1, but got '0a'"),
        (Selection("bias", ""), "`mask` expected a string of 0 and 1, but got ''"),
        (Selection("norm", granularity="published"), "`granularity` expected 'block' or 'attention'"),
        (Selection("lora", lora_rank=0), "`lora_rank` expected an integer ≥ 1, but got 0"),
    ],
)
def test_what_is_wrong_without_a_network(selection, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        selection.check()
