import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from lightning_iet.cli import COMMANDS, OF_THE_TRAINER, main, tool
from lightning_iet.cli.tools import run_tool


def options(first: Path, *, held_out: Path | None = None, strict: bool = False, in_turn: bool = True, k: int = 5):
    """Something to do."""
    seen.append({"first": first, "held_out": held_out, "strict": strict, "in_turn": in_turn, "k": k})


def folders(runs: Sequence[Path], *, strict: bool = False):
    """Something with folders."""
    seen.append({"runs": runs, "strict": strict})


seen = []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--first a", {}),
        ("--first a --held-out b-c_d", {"held_out": Path("b-c_d")}),
        ("--first a --held_out b-c_d", {"held_out": Path("b-c_d")}),
        ("--first a --held-out=b-c=d", {"held_out": Path("b-c=d")}),
        ("--first a --strict", {"strict": True}),
        ("--strict --first a", {"strict": True}),
        ("--first a --strict true --k 3", {"strict": True, "k": 3}),
        ("--first a --strict=True", {"strict": True}),
        ("--first a --in-turn", {}),
        ("--first a --in-turn false", {"in_turn": False}),
        ("--first a --in_turn=no", {"in_turn": False}),
    ],
)
def test_options_of_tools_in_either_spelling(arguments, expected):
    seen.clear()
    run_tool(options, arguments.split())
    neutral = {"first": Path("a"), "held_out": None, "strict": False, "in_turn": True, "k": 5}
    assert seen == [neutral | expected]


def renamed(*, num_samples: int = 1, image_size: str | None = None, num_workers: int | None = None, num_pairs: int = 9,
            feature_weights: Path | None = None, trials: int = 1):  # fmt: skip
    """Something whose options had other names."""
    seen.append([num_samples, image_size, num_workers, num_pairs, feature_weights, trials])


def test_former_names_of_options_go_on_working_and_are_told(capsys):
    seen.clear()
    run_tool(
        renamed, ["--num", "3", "--resize", "64x48", "--workers=0", "--pairs", "5", "--weights", "w.pt", "--count", "2"]
    )
    assert seen == [[3, "64x48", 0, 5, Path("w.pt"), 2]]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "lightning-iet: --num is called --num-samples today."
    assert len(told) == 6


def test_a_former_name_is_no_option_of_a_tool_that_never_had_it(capsys):
    with pytest.raises(SystemExit) as ended:
        run_tool(folders, ["runs", "--workers", "0"])
    assert ended.value.code == 2
    assert "There is no option --workers" in capsys.readouterr().err


def test_an_option_has_one_type_in_all_tools():
    tools = [tool(name) for group in COMMANDS.values() for name in group if name not in OF_THE_TRAINER]
    found = {}
    for one in tools:
        for name, parameter in inspect.signature(one).parameters.items():
            kinds = get_args(parameter.annotation) if type(None) in get_args(parameter.annotation) else None
            found.setdefault(name, set()).add(frozenset(kinds or [parameter.annotation]) - {type(None)})
    several = {name for name, kinds in found.items() if len(kinds) > 1}
    assert not several


@pytest.mark.parametrize("arguments", ["--strict a b", "a b --strict", "a b --strict=true", "--strict true a b"])
def test_a_switch_takes_no_folder_for_its_value(arguments):
    seen.clear()
    run_tool(folders, arguments.split())
    assert seen == [{"runs": [Path("a"), Path("b")], "strict": True}]


@pytest.mark.parametrize("arguments", ["--first a --strict maybe", "--first a --held-outs b", "--first a --k", ""])
def test_bad_options_of_tools_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run_tool(options, arguments.split())
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_of_tools_shows_one_spelling(capsys):
    for name in ("audit-model", "audit_model"):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith("usage: lightning-iet audit-model ")
        for option in ("--held-out", "--num-inference-steps", "--overwrite", "--image-size"):
            assert option in text
        assert not re.search(r"--\w*_", text)
