import functools
import re

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_iet.functional.parameter_groups import find_groups, has_blocks, trained_parameters
from lightning_iet.modules.adapters import add_svdiff
from tests.helpers.unets import CIFAR, SD15, SD21, small_dit, small_pixel_unet, small_sd_unet, without_memory

PUBLISHED_13 = [
    "down_blocks.0.attentions.0",
    "down_blocks.0.attentions.1",
    "down_blocks.1.attentions.0",
    "down_blocks.1.attentions.1",
    "down_blocks.2.attentions.0",
    "down_blocks.2.attentions.1",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.1",
    "up_blocks.2.attentions.0",
    "up_blocks.2.attentions.1",
    "up_blocks.3.attentions.0",
    "up_blocks.3.attentions.1",
]
PUBLISHED_16 = [
    *PUBLISHED_13[:9],
    "up_blocks.1.attentions.2",
    *PUBLISHED_13[9:11],
    "up_blocks.2.attentions.2",
    *PUBLISHED_13[11:],
    "up_blocks.3.attentions.2",
]
FAMILIES = ("all", "attention", "norm", "bias", "norm_bias", "svdiff", "difffit", "lora")


@pytest.fixture(scope="module")
def sd15():
    return without_memory(UNet2DConditionModel, SD15)


@pytest.fixture(scope="module")
def sd21():
    return without_memory(UNet2DConditionModel, SD21)


@functools.cache
def built(make):
    """A small network, which groups are only read from."""
    return make()


def names(groups):
    return [group.name for group in groups.groups]


def inside(groups):
    return groups.count("1" * len(groups.groups)) - sum(groups.numel[name] for name in groups.rest)


# --- Stable Diffusion -------------------------------------------------------------------------------------------------


def test_published_blocks_of_stable_diffusion(sd15, sd21):
    for network in (sd15, sd21):
        assert names(find_groups(network, "attention", granularity="published")) == PUBLISHED_16
        for family in ("svdiff", "difffit"):
            groups = find_groups(network, family, granularity="published")
            assert names(groups) == PUBLISHED_13
            assert groups.bits == tuple(PUBLISHED_13)  # rest is not searched
        assert names(find_groups(network, "all", granularity="attention")) == PUBLISHED_16


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("all", 859_520_964),
        ("attention", 267_239_360),
        ("norm", 200_320),
        ("bias", 343_684),
        ("norm_bias", 443_844),
        ("svdiff", 222_805),
    ],
)
def test_counts_of_stable_diffusion_1(sd15, family, expected):
    groups = find_groups(sd15, family)
    assert groups.count() == expected
    assert groups.total == 859_520_964
    assert groups.share() == expected / 859_520_964


def test_counts_of_stable_diffusion_2(sd21):
    assert find_groups(sd21).count() == 865_910_724
    assert find_groups(sd21, "attention").count() == 273_629_120
    assert find_groups(sd21, "svdiff").count() == 225_877
    published = find_groups(sd21, "svdiff", granularity="published")
    assert published.count("0" * 13) == 125_998


def test_counts_under_the_published_bits(sd15):
    svdiff = find_groups(sd15, "svdiff", granularity="published")
    assert (inside(svdiff), svdiff.count("0" * 13)) == (97_319, 125_486)  # trap: «zero» trains more than half
    attention = find_groups(sd15, "attention", granularity="published")
    assert (inside(attention), attention.count("0" * 16)) == (93_536_640, 173_702_720)
    # The headline of 0.019 % lies between.
    assert [round(100 * svdiff.share(mask), 4) for mask in ("0" * 13, "1" * 13)] == [0.0146, 0.0259]


def test_counts_of_difffit(sd15):
    published = find_groups(sd15, "difffit", granularity="published")
    offsets = {name: n for name, n in published.numel.items() if "difffit" in name}
    assert sum(offsets.values()) == 137_280 == 11 * (5 * 320 + 5 * 640 + 6 * 1280)
    assert published.count() == 137_280 + 443_844
    assert published.count("0" * 13) == 443_844 + 11 * (320 + 640 + 1280)  # the third of each up block: always on
    ours = find_groups(sd15, "difffit")
    assert ours.count() - 443_844 == 9 * (5 * 320 + 5 * 640 + 6 * 1280)


def test_counts_of_a_block(sd15):
    groups = find_groups(sd15, "svdiff", granularity="published")
    sizes = {group.name: sum(groups.numel[name] for name in group.parameters) for group in groups.groups}
    assert [sizes[f"down_blocks.{level}.attentions.0"] for level in range(3)] == [3203, 6403, 11779]
    whole = find_groups(sd15, "svdiff", granularity="attention")
    sizes = {group.name: sum(whole.numel[name] for name in group.parameters) for group in whole.groups}
    assert [sizes[f"down_blocks.{level}.attentions.1"] for level in range(3)] == [3844, 7684, 14340]
    assert sum(whole.numel[name] for name in whole.rest) == 79_125
    nine = "".join("1" if group.name[:13] in ("down_blocks.0", "up_blocks.3.a") else "0" for group in whole.groups)
    four = "".join("1" if group.name[:13] in ("down_blocks.1", "up_blocks.2.a") else "0" for group in whole.groups)
    mask = [a if a == "1" else b for a, b in zip(nine, four, strict=True)]
    mask[names(whole).index("up_blocks.2.attentions.2")] = "0"
    assert whole.count("".join(mask)) == 129_081


def test_blocks_of_stable_diffusion(sd15):
    found = names(find_groups(sd15, "all"))
    assert found[:5] == [
        "down_blocks.0.resnets.0",
        "down_blocks.0.attentions.0",
        "down_blocks.0.resnets.1",
        "down_blocks.0.attentions.1",
        "down_blocks.1.resnets.0",
    ]
    assert found[14:17] == ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    assert found[-1] == "up_blocks.3.attentions.2"
    assert len(found) == 16 + 8 + 2 + 12


def test_counts_of_the_network_for_cifar():
    network = without_memory(UNet2DModel, CIFAR)
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    assert names(find_groups(network, "attention")) == [
        "down_blocks.1.attentions.0",
        "down_blocks.1.attentions.1",
        "mid_block.attentions.0",
        "up_blocks.2.attentions.0",
        "up_blocks.2.attentions.1",
        "up_blocks.2.attentions.2",
    ]
    assert find_groups(network, "svdiff").count() == 26_065
    shares = [find_groups(network, family).share() for family in ("attention", "norm", "bias", "norm_bias")]
    assert [round(100 * share, 3) for share in shares] == [4.426, 0.079, 0.114, 0.154]


# --- any network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small_sd_unet, small_pixel_unet, small_dit])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["block", "attention", "published"])
def test_groups_and_rest_are_the_family_once_each(make, family, granularity):
    network = built(make)
    if granularity == "published" and (make is not small_sd_unet or family not in ("attention", "svdiff", "difffit")):
        with pytest.raises(ValueError, match="`granularity` expected 'block' or 'attention'"):
            find_groups(network, family, granularity=granularity)
        return
    if make is small_dit and family == "norm":  # its norms have no parameters of their own
        with pytest.raises(ValueError, match="with parameters in DiTTransformer2DModel, but got 'norm'"):
            find_groups(network, family, granularity=granularity)
        return
    groups = find_groups(network, family, granularity=granularity)
    members = [name for group in groups.groups for name in group.parameters] + list(groups.rest)
    assert len(members) == len(set(members))
    assert set(members) == set(groups.numel)
    assert all(group.parameters for group in groups.groups)
    for group in groups.groups:
        assert all(name.startswith(f"{group.name}.") for name in group.parameters)
    if family in ("all", "attention", "norm", "bias", "norm_bias"):
        own = dict(network.named_parameters())
        assert set(members) <= set(own)
        assert all(groups.numel[name] == own[name].numel() for name in members)
        by_name = {
            "all": lambda name: True,
            "attention": lambda name: "attentions." in name or "transformer_blocks." in name,
            "bias": lambda name: name.split(".")[-1] == "bias",
        }.get(family)
        if by_name is not None:
            assert set(members) == {name for name in own if by_name(name)}


def test_blocks_of_a_transformer():
    groups = find_groups(small_dit(), "all")
    assert names(groups) == [f"transformer_blocks.{number}" for number in range(3)]
    assert groups.bits[-1] == "rest"
    assert find_groups(small_dit(), "attention").bits == tuple(names(groups))  # there is no rest


def test_order_of_blocks_is_by_number_not_by_letter():
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1) for _ in range(12)])})
    assert names(find_groups(network)) == [f"blocks.{number}" for number in range(12)]


def test_norms_are_told_by_type_not_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"norm_out": nn.Linear(2, 2), "scaling": nn.LayerNorm(2)})])

    assert find_groups(Net(), "norm").groups[0].parameters == ("blocks.0.scaling.weight", "blocks.0.scaling.bias")


@given(st.data())
def test_random_names_are_split_without_loss(data):
    block = st.sampled_from(["down_blocks.0.resnets.{}", "up_blocks.2.attentions.{}", "mid_block.attentions.{}"])
    paths = data.draw(st.lists(st.builds(str.format, block, st.integers(0, 12)), min_size=1, max_size=8, unique=True))
    outside = data.draw(st.lists(st.sampled_from(["conv_in", "time.linear", "conv_out"]), max_size=3, unique=True))
    network = nn.Module()
    for path in [*paths, *(name for name in outside)]:
        place = network
        for part in path.split("."):
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module("proj", nn.Linear(1, 1))
    groups = find_groups(network, "all")
    assert sorted(names(groups)) == sorted(paths)
    assert {name for group in groups.groups for name in group.parameters} | set(groups.rest) == {
        name for name, _ in network.named_parameters()
    }
    stage = {"d": 0, "m": 1, "u": 2}
    order = [(stage[name[0]], int(name.split(".")[-1])) for name in names(groups)]
    assert order == sorted(order)
    mask = data.draw(st.text("01", min_size=len(groups.bits), max_size=len(groups.bits)))
    expected = {
        parameter
        for bit, (name, members) in zip(
            mask, [*((g.name, g.parameters) for g in groups.groups), ("rest", groups.rest)], strict=False
        )
        if bit == "1"
        for parameter in members
    }
    assert trained_parameters(groups, mask) == expected
    numel = dict(network.named_parameters())
    assert groups.count(mask) == sum(numel[name].numel() for name in expected)


# --- groups of one's own ----------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def test_groups_by_regular_expressions():
    groups = find_groups(mlp(), "bias", groups={"last": r"^2\.", "first": r"^0\."})
    assert [(group.name, group.parameters) for group in groups.groups] == [
        ("last", ("2.bias",)),
        ("first", ("0.bias",)),
    ]
    assert groups.rest == ("1.bias",)
    assert dict(groups.patterns) == {"last": r"^2\.", "first": r"^0\."}
    spectral = find_groups(mlp(), "svdiff", groups={"last": r"^2\."})
    assert spectral.groups[0].parameters == ("2.parametrizations.weight.0.shift",)
    assert spectral.count() == 2 + 1 + 2


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "a mapping from names to regular expressions, but got none"),
        ({"rest": "0"}, "got one called 'rest'"),
        ({"a": "("}, "expected a regular expression for 'a', but got '('"),
        ({"a": "nothing"}, "expected 'a' to match names of parameters of Sequential, such as '0.weight'"),
        ({"a": "0", "b": "weight"}, "do not overlap, but got '0.weight' in both 'a' and 'b'"),
        ({"a": r"2\.weight"}, "parameters of the family 'bias' in each group, but got none in 'a'"),
    ],
)
def test_bad_groups(groups, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_groups(mlp(), "bias", groups=groups)


def test_own_groups_of_attention_hold_attention_alone():
    unet = small_pixel_unet()
    with pytest.raises(ValueError, match="family 'attention' in each group, but got none in 'first'"):
        find_groups(unet, "attention", groups={"first": "^conv_in"})
    whole = set(trained_parameters(find_groups(unet, "attention")))
    own = find_groups(unet, "attention", groups={"mid": r"^mid_block\."})
    assert {*own.groups[0].parameters, *own.rest} == whole
    assert set(own.groups[0].parameters) == {name for name in whole if name.startswith("mid_block.")}
    dit = small_dit()
    first = find_groups(dit, "attention", groups={"a": r"blocks\.0\."})
    assert set(trained_parameters(first)) == set(trained_parameters(find_groups(dit, "attention")))
    assert {name.split(".")[1] for name in first.rest} == {"1", "2"}


# --- masks ------------------------------------------------------------------------------------------------------------


def test_mask_says_groups_and_rest():
    groups = find_groups(small_dit(), "bias")
    assert groups.bits == ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2", "rest")
    assert groups.switches("0110") == groups.switches("011", rest=False)
    assert groups.switches("0111") == groups.switches("011") == groups.switches("011", rest=True)
    assert trained_parameters(groups) == trained_parameters(groups, "1111") == frozenset(groups.numel)
    assert trained_parameters(groups, "0000") == frozenset()
    assert trained_parameters(groups, "0001") == frozenset(groups.rest)


@pytest.mark.parametrize(
    ("mask", "rest", "message"),
    [
        ("01", None, "expected 3 or 4 characters, one for each of transformer_blocks.0, transformer_blocks.1, tra"),
        ("01101", None, "but got 5: '01101'"),
        ("01x", None, "expected a string of 0 and 1, but got '01x'"),
        (11, None, "expected a string of 0 and 1, but got 11"),
        ("0110", True, "expected None with a mask of 4 characters, whose last one says it"),
    ],
)
def test_bad_masks(mask, rest, message):
    groups = find_groups(small_dit(), "bias")
    with pytest.raises(ValueError, match=re.escape(message)):
        groups.switches(mask, rest=rest)


def test_rest_of_the_published_groups_always_trains():
    groups = find_groups(small_sd_unet(), "svdiff", granularity="published")
    assert groups.switches("0" * 13)["rest"]
    with pytest.raises(ValueError, match="whose rest always trains"):
        groups.switches("0" * 13, rest=False)
    with pytest.raises(ValueError, match="expected 13 characters"):  # trap: 16 bits for 13, and 13 cut out of 16
        groups.switches("0" * 16)
    with pytest.raises(ValueError, match="expected 16 characters"):
        find_groups(small_sd_unet(), "attention", granularity="published").switches("0" * 13)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("svdif", {}, "`family` expected one of all, attention, norm, bias, norm_bias, svdiff, difffit, lora, but got"),
        ("bias", {"granularity": "bit"}, "`granularity` expected one of block, attention, published, but got 'bit'"),
        ("norm", {"granularity": "published"}, "for the family 'norm', but got 'published'"),
        ("bias", {"granularity": "attention", "groups": {"a": "."}}, "with groups of one's own, but got 'attention'"),
        ("lora", {"lora_rank": 0}, "`lora_rank` expected an integer ≥ 1, but got 0"),
        ("lora", {"lora_targets": ["nowhere"]}, "but got ['nowhere']"),
        ("lora", {"lora_targets": ["norm"]}, "expected names of linear or convolution layers"),
    ],
)
def test_bad_words(family, arguments, message):
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(1)})])})
    with pytest.raises(ValueError, match=re.escape(message)):
        find_groups(network, family, **arguments)


def test_networks_that_do_not_fit():
    assert not has_blocks(mlp())
    with pytest.raises(ValueError, match=r"denoiser with blocks .*but got Sequential.*Give `groups`"):
        find_groups(mlp())
    plain = small_pixel_unet(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    plain.mid_block.attentions = None
    with pytest.raises(ValueError, match=r"with attention blocks .*, or use granularity 'block'"):
        find_groups(plain, granularity="attention")
    with pytest.raises(ValueError, match=r"lacks 'down_blocks\.0\.attentions\.0'"):
        find_groups(small_pixel_unet(), "svdiff", granularity="published")
    with pytest.raises(ValueError, match="'difffit' on a network with diffusers' attention layers"):
        find_groups(mlp(), "difffit", groups={"a": "0"})
    with pytest.raises(ValueError, match="with parameters in ModuleDict, but got 'bias'"):
        find_groups(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1, bias=False)])}), "bias")


def test_networks_with_adapters_and_compiled_ones_are_refused():
    network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})
    add_svdiff(network, ["blocks.0"])
    with pytest.raises(ValueError, match=r"network without adapters, but got ModuleDict with some in 'blocks\.0'"):
        find_groups(network)
    compiled = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})
    compiled.compile()
    with pytest.raises(ValueError, match="not compiled yet"):
        find_groups(compiled)
    with pytest.raises(ValueError, match="not compiled yet"):
        find_groups(torch.compile(small_dit()))
    regional = small_dit()
    regional.transformer_blocks[1] = torch.compile(regional.transformer_blocks[1])
    with pytest.raises(ValueError, match="not compiled yet"):
        find_groups(regional)


def test_fingerprint_is_of_names_and_shapes():
    first, second = (find_groups(small_dit(seed=seed)).shapes for seed in (0, 1))
    assert first == second
    assert find_groups(small_dit(num_layers=2)).shapes != first
    assert find_groups(small_dit(), "svdiff").shapes == first
