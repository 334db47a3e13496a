import sys
from pathlib import Path

import pytest
import yaml

from lightning_iet.cli import main
from lightning_iet.sweeps import grid_points, read_sweep

FOLDER = Path(__file__).parents[2] / "configs" / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))
SWEEP = {
    "method": "grid",
    "metric": {"name": "eval/fid"},
    "command": ["${env}", "lightning-iet", "fit", "${args}"],
    "parameters": {"agc.threshold": {"values": [0.3, 0.5]}, "seed_everything": {"value": 1}},
}


def written(tmp_path, **changes):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **changes}))
    return path


def test_a_grid_is_every_combination(tmp_path):
    sweep = read_sweep(written(tmp_path))
    assert list(grid_points(sweep.parameters)) == [
        {"agc.threshold": 0.3, "seed_everything": 1},
        {"agc.threshold": 0.5, "seed_everything": 1},
    ]
    assert sweep.arguments({"agc.threshold": 0.3}) == ["lightning-iet", "fit", "--agc.threshold=0.3"]
    assert (sweep.name, sweep.metric, sweep.maximize, sweep.cap) == ("sweep", "eval/fid", False, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "anneal"}, "`method` grid, random or bayes, but got 'anneal'"),
        ({"metric": {"goal": "minimize"}}, "`metric` with a `name`"),
        ({"metric": {"name": "x", "goal": "less"}}, "`metric` with a `name` and a `goal`"),
        ({"command": None}, r"a list `command` with \$\{args\}"),
        ({"command": ["lightning-iet", "${program}", "${args}"]}, r"as its only variable"),
        ({"command": ["lightning-iet", "fit"]}, r"a list `command` with \$\{args\}"),
        ({"parameters": {}}, "`parameters`"),
        ({"parameters": {"a": {"values": []}}}, "parameter `a` with a list of values"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, "parameter `a` with values, but got"),
        ({"parameters": {"a": {"parameters": {}}}}, "parameter `a` with value, values"),
        ({"method": "random", "parameters": {"a": {"min": 1, "max": 0}}}, "min < max"),
        ({"method": "random", "parameters": {"a": {"min": 0, "max": 1, "distribution": "beta"}}}, "a uniform"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_sweep(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="expected YAML"):
        read_sweep(tmp_path / "broken.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_option_of_our_files_is_one_of_the_command_line(path, capsys, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    sweep = read_sweep(path)
    point = {name: kind.values[-1] if kind.values else kind.high for name, kind in sweep.parameters.items()}
    program, *arguments = sweep.arguments(point)
    assert program == "lightning-iet"
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    for name, value in point.items():
        entry = config
        for key in name.split("."):
            entry = entry[key]
        assert entry == value
