import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_iet.cli import main
from lightning_iet.search import grid_points, read_sweep

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
        ({"method": "random", "parameters": {"a": {"min": "1e-5", "max": 0.1}}}, r"as text: write 1\.0e-5"),
        ({"method": "bayes", "parameters": {"a": {"min": 0.1, "max": "2E3"}}}, r"as text: write 2\.0e\+3"),
        ({"method": "random", "parameters": {"a": {"min": 1, "max": "much"}}}, r"'max': 'much', 'min': 1\}\.$"),
        ({"run_cap": "1e2"}, r"`run_cap`, an integer ≥ 1, but got '1e2'\. YAML reads 1e2 as text: write 1\.0e\+2"),
        ({"run_cap": 0}, "`run_cap`, an integer ≥ 1, but got 0"),
        ({"run_cap": True}, "`run_cap`, an integer ≥ 1, but got True"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3}}, "but got `early_terminate`. All runs go to their"),
        ({"controller": {"type": "local"}}, "but got `controller`"),
        ({"paramters": {}}, "but got `paramters`"),
        ({"metric": {"name": "eval/fid", "target": 3}}, "only, but got `target`"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_sweep(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_what_yaml_reads_as_text_is_passed_on_as_it_stands(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({**SWEEP, "parameters": {}}).replace("parameters: {}", "parameters: {lr: {values: [1e-4]}}")
    )
    sweep = read_sweep(path)
    assert sweep.arguments(next(grid_points(sweep.parameters)))[-1] == "--lr=1e-4"


@pytest.mark.parametrize(
    ("text", "place"), [("method: grid\nmetric: [1, 2\nb: 3\n", "line 3"), ("method:\n\tgrid\n", "line 2")]
)
def test_an_error_of_yaml_names_file_and_line(tmp_path, text, place):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=place) as error:
        read_sweep(path)
    assert f"Sweep '{path}' expected YAML, but got" in str(error.value)


def test_what_wandb_itself_reads_is_accepted(tmp_path):
    sweep = read_sweep(
        written(tmp_path, name="x", program="train.py", project="p", entity="e", description="d", run_cap=3)
    )
    assert (sweep.name, sweep.cap) == ("x", 3)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="expected YAML"):
        read_sweep(tmp_path / "broken.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_of_our_files_is_one_that_the_command_line_takes(path, capsys, monkeypatch):
    """All values one after another, as an agent of W&B writes them and as we do; the last one of each holds."""
    sweep = read_sweep(path)
    values = {name: kind.values or (kind.low, 1 / 3, kind.high) for name, kind in sweep.parameters.items()}
    theirs = [f"--{name}={value}" for name in values for value in values[name]]
    program, *ours = sweep.arguments({name: values[name][-1] for name in values})
    assert program == "lightning-iet"
    config = parsed([ours[0], *theirs, *ours[1:]], capsys, monkeypatch)
    for name in values:
        assert entry_of(config, name) == values[name][-1]


@pytest.mark.parametrize("spelling", [str, json.dumps])
def test_values_of_any_kind_reach_the_command_line(spelling, capsys, monkeypatch):
    """As W&B's agent writes them, in Python's way, and as we do."""
    values = {
        "agc.threshold": 1e-05, "evaluation.use_ema": False, "evaluation.sampler": "ddpm", "trainer.max_epochs": 3,
        "evaluation.measures": ["mifid", "precision_recall"],
        "model.init_args.unet.init_args.block_out_channels": [8, 16],
        "model.init_args.optimizer.init_args.betas": [0.5, 0.9],
    }  # fmt: skip
    written = {name: value if isinstance(value, str) else spelling(value) for name, value in values.items()}
    command = ["fit", "--config=configs/digits/agc.yaml", *(f"--{name}={text}" for name, text in written.items())]
    config = parsed(command, capsys, monkeypatch)
    for name, value in values.items():
        assert entry_of(config, name) == value


def parsed(command, capsys, monkeypatch):
    """The configuration that a command of the repository's folder comes to."""
    monkeypatch.chdir(FOLDER.parents[1])
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])
    with pytest.raises(SystemExit) as end:
        main([*command, "--print_config"])
    assert end.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def entry_of(config, name):
    for key in name.split("."):
        config = config[key]
    return config
