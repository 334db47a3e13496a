import json
import re
import warnings

import pytest

from lightning_iet.callbacks.parameter_selection import read_mask, write_mask
from lightning_iet.functional.parameter_groups import find_groups, trained_parameters
from lightning_iet.modules.adapters import Selection
from tests.helpers.unets import small_dit, small_pixel_unet, small_sd_unet


@pytest.mark.parametrize(
    ("family", "arguments", "mask", "rest"),
    [
        ("bias", {}, "0101", None),
        ("bias", {}, "010", False),
        ("svdiff", {"groups": {"late": r"blocks\.2", "early": r"blocks\.0"}}, "01", None),
        ("lora", {"lora_rank": 2, "lora_targets": ["to_q"]}, None, None),
    ],
)
def test_round_trip(tmp_path, family, arguments, mask, rest):
    selection = Selection(family, **arguments)
    groups = selection.find(small_dit())
    source = {"study": "one", "trial": 3, "objectives": {"eval/fid": 1.5}}
    file = write_mask(tmp_path / "new" / "mask.json", groups, mask, rest=rest, selection=selection, source=source)
    found = read_mask(file)
    assert (found.groups, found.network) == (tuple(g.name for g in groups.groups), "DiTTransformer2DModel")
    assert dict(found.source) == source
    again = found.selection.find(small_dit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.check(again)
    assert again == groups
    chosen = trained_parameters(again, found.selection.mask, rest=found.selection.rest)
    assert chosen == trained_parameters(groups, mask, rest=rest)
    assert [path.name for path in file.parent.iterdir()] == ["mask.json"]


def test_published_mask(tmp_path):
    groups = find_groups(small_sd_unet(), "svdiff", granularity="published")
    found = read_mask(write_mask(tmp_path / "mask.json", groups, "1010101010101")).selection
    assert (found.granularity, found.mask, found.rest) == ("published", "1010101010101", True)
    assert trained_parameters(groups, found.mask, rest=found.rest) == trained_parameters(groups, "1010101010101")


def test_mask_of_another_model_is_refused(tmp_path):
    file = write_mask(tmp_path / "mask.json", find_groups(small_dit(), "bias"), "0101")
    for network, message in (
        (small_dit(num_layers=2), "expected the 3 groups of DiTTransformer2DModel, but got 2 of DiTTransformer2DModel: "
                                  "group 2 is transformer_blocks.2 there, and none here"),
        (small_pixel_unet(), "group 0 is transformer_blocks.0 there, and down_blocks.0.resnets.0 here"),
    ):  # fmt: skip
        found = read_mask(file)
        with pytest.raises(ValueError, match=re.escape(message)):
            found.check(found.selection.find(network))


def test_mask_is_transferred_to_a_network_with_the_same_groups(tmp_path):
    file = write_mask(tmp_path / "mask.json", find_groups(small_sd_unet(), "svdiff"), None)
    found = read_mask(file)
    wider = small_sd_unet(cross_attention_dim=12)
    with pytest.warns(UserWarning, match="the same names .* and other shapes. It is transferred"):
        found.check(found.selection.find(wider))


def broken(content, **changes):
    return json.dumps({key: value for key, value in (content | changes).items() if value is not ...})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "", "no JSON"),
        (lambda c: "[1]", "a JSON list"),
        (lambda c: broken(c, mask=...), "one without the key 'mask'"),
        (lambda c: broken(c, colour=3), "one with the unknown key 'colour'"),
        (lambda c: broken(c, format=2), "one of format 2, where this version of lightning-iet reads 1"),
        (lambda c: broken(c, family="all of it"), "one with the unknown family 'all of it'"),
        (lambda c: broken(c, granularity="bit"), "one with the unknown granularity 'bit'"),
        (lambda c: broken(c, groups=c["groups"][:2]), "one whose mask does not name its groups in their order"),
        (lambda c: broken(c, groups=c["groups"][::-1]), "one whose mask does not name its groups in their order"),
        (lambda c: broken(c, mask=c["mask"] | {"rest": 2}), "holds other values than 0 and 1"),
        (lambda c: broken(c, mask=c["mask"] | {"rest": True}), "holds other values than 0 and 1"),
    ],
)
def test_broken_files(tmp_path, change, message):
    file = write_mask(tmp_path / "mask.json", find_groups(small_dit(), "bias"), "0101")
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_mask(file)
    assert str(file) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`file` expected a file of a mask, but got '.*none\.json'"):
        read_mask(tmp_path / "none.json")
    with pytest.raises(ValueError, match="expected 3 or 4 characters"):
        write_mask(tmp_path / "mask.json", find_groups(small_dit(), "bias"), "1")
    assert list(tmp_path.iterdir()) == []
