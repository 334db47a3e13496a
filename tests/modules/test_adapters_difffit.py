import copy
import re

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from lightning_iet.modules.adapters import Selection, add_difffit, fold_difffit, remove_difffit, select_parameters
from tests.helpers.unets import seeded, small_dit, small_sd_unet

LAYERS = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")] + ["ff.net.2"]
OFFSETS = [f"{layer}.difffit_offset" for layer in LAYERS]
BRANCHES = [f"attn{i}.to_out.0.difffit_branch_offset" for i in (1, 2)]


def block(seed=0):
    return seeded(
        BasicTransformerBlock, seed, dim=8, num_attention_heads=2, attention_head_dim=4, cross_attention_dim=6
    ).double()


def inputs():
    return torch.randn(2, 5, 8).double(), torch.randn(2, 3, 6).double()


def attention(layer, hidden, context, scales):
    """Attention of diffusers' kind with DiffFit's scales, head by head and row by row."""
    q, k, v = (
        (projection(source)) * scale
        for projection, source, scale in (
            (layer.to_q, hidden, scales["q"]),
            (layer.to_k, context, scales["k"]),
            (layer.to_v, context, scales["v"]),
        )
    )
    output = torch.zeros_like(q)
    for image in range(len(q)):
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            for row in range(q.shape[1]):
                weights = torch.stack([q[image, row, part] @ key[part] / 2 for key in k[image]]).softmax(0)
                output[image, row, part] = sum(
                    weight * value[part] for weight, value in zip(weights, v[image], strict=True)
                )
    return layer.to_out[0](output) * scales["out"]


def naive(network, hidden, context, offsets, branches):
    """A transformer block, branch by branch: h + γ_attn · γ_fnn · to_out(…), as published."""
    layers = {name: 1 + offset for name, offset in offsets.items()}
    for number, source in ((1, None), (2, context)):
        norm, layer = getattr(network, f"norm{number}"), getattr(network, f"attn{number}")
        scales = {name: layers[f"attn{number}.to_{name}"] for name in "qkv"}
        scales["out"] = layers[f"attn{number}.to_out.0"]
        normed = norm(hidden)
        branch = attention(layer, normed, normed if source is None else source, scales)
        hidden = hidden + (1 + branches[number]) * branch
    return hidden + layers["ff.net.2"] * network.ff(network.norm3(hidden))


@pytest.mark.parametrize("published", [False, True])
def test_scales_are_those_of_a_naive_block(published):
    network, (hidden, context) = block(), inputs()
    plain = copy.deepcopy(network)
    add_difffit(network, OFFSETS + BRANCHES * published)
    parameters = dict(network.named_parameters())
    assert sum(parameters[name].numel() for name in OFFSETS + BRANCHES * published) == (11 if published else 9) * 8
    for name in OFFSETS + BRANCHES * published:
        torch.nn.init.normal_(parameters[name])
    offsets = {layer: parameters[f"{layer}.difffit_offset"] for layer in LAYERS}
    zero = torch.zeros(8).double()
    branches = {i: parameters[BRANCHES[i - 1]] if published else zero for i in (1, 2)}
    expected = naive(plain, hidden, context, offsets, branches)
    torch.testing.assert_close(network(hidden, encoder_hidden_states=context), expected)


def test_zero_offsets_are_the_pretrained_block_bit_for_bit():
    network, (hidden, context) = block(), inputs()
    before = network(hidden, encoder_hidden_states=context)
    add_difffit(network, OFFSETS + BRANCHES)
    assert torch.equal(network(hidden, encoder_hidden_states=context), before)
    network = network.bfloat16()
    assert network(hidden.bfloat16(), encoder_hidden_states=context.bfloat16()).dtype == torch.bfloat16


def test_folded_block_computes_the_same_and_loads_into_a_stock_one():
    network, (hidden, context) = block().float(), [tensor.float() for tensor in inputs()]
    add_difffit(network, OFFSETS + BRANCHES)
    for name, parameter in network.named_parameters():
        if "difffit" in name:
            torch.nn.init.normal_(parameter)
    expected = network(hidden, encoder_hidden_states=context)
    fold_difffit(network)
    stock = block(seed=1).float()
    assert stock.load_state_dict(network.state_dict(), strict=True)  # trap: published loads γ with strict=False
    assert list(network.state_dict()) == list(stock.state_dict())
    for other in (network, stock):
        torch.testing.assert_close(other(hidden, encoder_hidden_states=context), expected, rtol=1e-5, atol=1e-5)


def test_removed_scales_leave_the_old_block():
    network, (hidden, context) = block(), inputs()
    before = network(hidden, encoder_hidden_states=context)
    add_difffit(network, OFFSETS)
    torch.nn.init.normal_(network.ff.net[2].difffit_offset)
    remove_difffit(network)
    assert torch.equal(network(hidden, encoder_hidden_states=context), before)
    assert not any(layer._forward_hooks for layer in network.modules())


def test_convolutions_are_scaled_by_channel():
    network = nn.Sequential(nn.Conv2d(2, 3, 1))
    images = torch.rand(2, 2, 4, 4)
    before = network(images)
    add_difffit(network, ["0.difffit_offset"])
    network[0].difffit_offset.data.copy_(torch.tensor([0.0, 1.0, -1.0]))
    expected = before * torch.tensor([1.0, 2.0, 0.0]).reshape(1, 3, 1, 1)
    assert torch.equal(network(images), expected)
    fold_difffit(network)
    torch.testing.assert_close(network(images), expected)


def test_copies_have_scales_of_their_own():
    network, (hidden, context) = block(), inputs()
    add_difffit(network, OFFSETS)
    duplicate = copy.deepcopy(network)
    before = duplicate(hidden, encoder_hidden_states=context)
    torch.nn.init.normal_(network.ff.net[2].difffit_offset)
    assert torch.equal(duplicate(hidden, encoder_hidden_states=context), before)
    assert not torch.equal(network(hidden, encoder_hidden_states=context), before)


@pytest.mark.parametrize(
    ("parameter", "got"),
    [("ff.net.2.scale", "'ff.net.2.scale'"), ("norm1.nothing", "'norm1.nothing'"), ("ff.difffit_offset", "'ff.diff")],
)
def test_other_names_are_refused(parameter, got):
    with pytest.raises(ValueError, match=re.escape(got)):
        add_difffit(block(), [parameter])


def test_weight_decay_pulls_to_the_pretrained_network():
    # Trap: published γ decays to 0, and takes the attention with it.
    network = small_sd_unet()
    select_parameters(network, Selection("difffit", granularity="attention", rest=False))
    offsets = [parameter for name, parameter in network.named_parameters() if "difffit" in name]
    for offset in offsets:
        torch.nn.init.ones_(offset)
    optimizer = torch.optim.AdamW(offsets, lr=0.1, weight_decay=1.0)
    for _ in range(100):
        for offset in offsets:
            offset.grad = torch.zeros_like(offset)
        optimizer.step()
    assert all(offset.abs().max() < 1e-4 for offset in offsets)


def test_a_transformer_of_diffusers_takes_scales():
    network = small_dit()
    _, trained = select_parameters(network, Selection("difffit"))
    assert sum("difffit_offset" in name for name in trained) == 3 * 5  # q, k, v, out, feed-forward of each block
