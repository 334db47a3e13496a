import copy

import pytest
import torch
from torch import nn

from lightning_iet.functional.parameter_groups import find_groups
from lightning_iet.modules.adapters import Selection, add_lora, fold_adapters, fold_lora, remove_lora, select_parameters
from tests.helpers.unets import small_sd_unet

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Stranger(nn.Module):
    """A network that is none of diffusers'."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(3, 3), "conv": nn.Conv2d(3, 2, 3)})] * 1)

    def forward(self, x):
        return self.blocks[0]["conv"](self.blocks[0]["to_q"](x).movedim(-1, 1))


def call(network):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return network(torch.randn(2, 4, 8, 8), torch.tensor([3, 70]), torch.randn(2, 3, 8)).sample


def test_adapters_count_as_said_and_start_as_the_pretrained_network():
    network = small_sd_unet()
    before = call(network)
    groups, trained = select_parameters(network, Selection("lora", lora_rank=3))
    assert torch.equal(call(network), before)
    parameters = dict(network.named_parameters())
    assert {name: parameters[name].numel() for name in trained} == dict(groups.numel)
    assert trained == {name for name, parameter in parameters.items() if parameter.requires_grad}
    widths = [8] * 4 + [16] * 2 + [16] + [16] * 3 + [8] * 6
    expected = sum(3 * (4 * (d + d) + 2 * (d + d) + 2 * (8 + d)) for d in widths)
    assert groups.count() == expected


@pytest.mark.parametrize("make", [small_sd_unet, Stranger])
def test_folded_and_removed_adapters(make):
    network = make()
    stock = copy.deepcopy(network)
    targets = TARGETS if make is small_sd_unet else ("to_q", "conv")
    run = call if make is small_sd_unet else lambda net: net(torch.ones(1, 4, 4, 3))
    before = run(network)
    add_lora(network, rank=2, alpha=4.0, targets=targets)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = run(network)
    assert not torch.allclose(expected, before, atol=1e-3)
    other = copy.deepcopy(network)
    fold_lora(network)
    stock.load_state_dict(network.state_dict(), strict=True)
    for folded in (network, stock):
        torch.testing.assert_close(run(folded), expected, rtol=1e-5, atol=1e-5)
    remove_lora(other)
    assert torch.equal(run(other), before)


def test_layer_is_that_of_the_formula():
    network = Stranger()
    weight, bias = network.blocks[0]["to_q"].weight.detach().clone(), network.blocks[0]["to_q"].bias
    add_lora(network, rank=2, alpha=6.0, targets=["to_q"])
    layer = network.blocks[0]["to_q"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer(x), x @ (weight + 6.0 / 2 * b @ a).T + bias)


def test_mask_puts_adapters_only_where_it_is_one():
    network = small_sd_unet()
    bits = find_groups(small_sd_unet(), "lora").bits
    mask = "".join("1" if name == "mid_block.attentions.0" else "0" for name in bits)
    _, trained = select_parameters(network, Selection("lora", mask))
    assert {name.split(".transformer_blocks")[0] for name in trained} == {"mid_block.attentions.0"}
    assert {name for name, _ in network.named_parameters() if "lora_" in name} == trained
    fold_adapters(network)
    small_sd_unet().load_state_dict(network.state_dict(), strict=True)


def test_without_peft_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-iet\[text-to-image\]"):
        add_lora(Stranger(), rank=2, targets=["to_q"])
    with pytest.raises(ModuleNotFoundError, match=r"lightning-iet\[text-to-image\]"):
        Selection("lora").check()


def test_names_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"`lora_targets` expected ends of names of layers of Stranger"):
        add_lora(Stranger(), rank=2, targets=["nowhere"])
