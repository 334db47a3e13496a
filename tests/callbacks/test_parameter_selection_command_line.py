"""``--selection.*``: fitting, planning, resuming, and what goes wrong, in one line each."""

import sys

import pytest
import torch
import yaml

from lightning_iet.callbacks.parameter_selection import write_mask
from lightning_iet.cli import main
from lightning_iet.functional.parameter_groups import find_groups
from tests.helpers.launched import TINY, weights
from tests.helpers.models import tiny_unet

BITS = find_groups(tiny_unet(), "svdiff").bits


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])
    few = {"class_path": "DigitsDataModule", "init_args": {"num_train": 8, "batch_size": 4}}
    config = TINY | {"averaging": {"num_shards": 1}, "data": few, "trainer": TINY["trainer"] | {"max_epochs": 1}}
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    config["trainer"]["callbacks"] = [saving]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))


def fit(*options, command="fit"):
    main([command, "--config", "tiny.yaml", *options])


def error(capsys, *options, command="fit"):
    with pytest.raises(SystemExit) as stop:
        fit(*options, command=command)
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-iet")]
    return line


def shifts(state):
    return {name.removeprefix("unet.") for name in state if name.startswith("unet.") and name.endswith("shift")}


@pytest.mark.parametrize("option", ["command line", "configuration", "file"])
def test_a_mask_is_given_in_three_ways(tmp_path, option):
    mask = "01" + "0" * (len(BITS) - 2)  # a leading zero: neither a number nor an octal one
    groups = find_groups(tiny_unet(), "svdiff")
    if option == "command line":
        fit("--selection.family", "svdiff", "--selection.mask", mask)
    elif option == "configuration":
        config = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
        config["selection"] = {"family": "svdiff", "mask": mask}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
        fit()
    else:
        fit("--selection.file", str(write_mask(tmp_path / "mask.json", groups, mask)))
    assert shifts(weights(tmp_path)) == set(groups.groups[1].parameters)


def test_a_neutral_selection_is_in_every_run_and_changes_nothing(tmp_path):
    fit()
    state = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert "ParameterSelection" not in state["callbacks"]
    assert "selection" not in state["specification"]


def test_a_run_goes_on_with_its_selection_only(tmp_path, capsys):
    fit("--selection.family", "svdiff")
    resume = ("--ckpt_path", "last", "--trainer.max_epochs", "2")
    message = error(capsys, *resume)
    assert "expected a selection under which 'svdiff' by block trains, but got one under which everything" in message
    assert "under which 'bias' by block does" in error(capsys, *resume, "--selection.family", "bias")
    fit(*resume, "--selection.family", "svdiff")
    assert shifts(weights(tmp_path))


def test_a_callback_that_copies_the_module_comes_later(tmp_path):
    config = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    config["model"]["init_args"]["ema_decay"] = 0.0
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    config["trainer"]["callbacks"].append(average)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    fit("--selection.family", "svdiff")
    assert shifts(weights(tmp_path))


def test_a_plan_says_what_trains_and_what_it_takes(capsys):
    groups = find_groups(tiny_unet(), "svdiff")
    fit("--selection.family", "svdiff", "--measure_steps", "1", command="plan")
    output = " ".join(capsys.readouterr().out.split())
    assert f"{groups.count():,} ({100 * groups.share():.3g} % of the" in output  # denoiser, as the log has it
    assert "bases" in output
    assert "TFLOP" in output
    assert "measured peak" in output
    fit("--selection.family", "bias", command="plan")
    output = " ".join(capsys.readouterr().out.split())
    assert f"{find_groups(tiny_unet(), 'bias').count():,} (" in output
    assert "SV-DIFF" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--selection.family", "svdiff", "--selection.mask", "01"],
            f"--selection.mask expected {len(BITS) - 1} or {len(BITS)}",
        ),
        (["--selection.family", "bias", "--selection.mask", "0b1"], "--selection.mask expected a string of 0 and 1"),
        (
            ["--selection.family", "svdiff", "--selection.granularity", "published"],
            "lacks 'down_blocks.0.attentions.0'",
        ),
        (["--selection.file", "none.json"], "--selection.file expected a file of a mask, but got 'none.json'"),
        (
            ["--selection.family", "bias", "--selection.denoiser", "net"],
            "--selection.denoiser expected the name of a module",
        ),
    ],
)
def test_what_goes_wrong_is_one_line(capsys, options, message):
    assert message in error(capsys, *options)
