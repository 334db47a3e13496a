"""What a command imports before it does anything: decided by names, for times depend on the machine."""

import json
import subprocess
import sys
from importlib import import_module

import pytest

import lightning_iet
from lightning_iet.cli import COMMANDS, OF_THE_TRAINER, help_text, main, tool

HEAVY = {
    "torch",
    "numpy",
    "lightning",
    "torchmetrics",
    "diffusers",
    "transformers",
    "matplotlib",
    "scipy",
    "jsonargparse",
}
TRAINING = {"lightning", "pytorch_lightning", "diffusers", "transformers"}


IN_A_FORK = """
import json, os, sys

def names_after(code):
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            exec(code)
        except SystemExit:
            pass
        with os.fdopen(writing, "w") as file:
            json.dump(sorted({name.partition(".")[0] for name in sys.modules}), file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return json.load(file)

found = {}
for first, codes in json.loads(sys.argv[1]):
    exec(first)
    for code in codes:
        sys.stdout.flush()
        found[code] = names_after(code)
print()
print(json.dumps(found))
"""


def command(*arguments):
    return f"from lightning_iet.cli import main; main({list(arguments)!r})"


PAGES = [command("--help"), command("--version"), command("audi"), command()]
FUNCTIONS = [f"import lightning_iet.functional.{name}" for name in ("memorization", "neighbors", "averaging")]
METRICS = "from lightning_iet.metrics import MemorizedQuantity"
IMAGES = [command("audit", "--help"), command("compare", "--help")]
MODELS = [command("sample", "--help"), command("export", "--help"), "from lightning_iet import DiffusionModule"]


@pytest.fixture(scope="module")
def imported():
    """Names of the top-level modules that an interpreter has imported after some code.

    Each runs in a fork of one that has imported nothing, or what it is known to need: nothing is imported twice.
    """
    stages = [
        ("", PAGES),
        ("import torch", FUNCTIONS),
        ("import matplotlib.pyplot, rich.text, scipy.linalg, scipy.special, scipy.stats, torchvision", IMAGES),
        ("import torchmetrics", [METRICS]),
        ("import lightning.pytorch, diffusers", MODELS),
    ]
    arguments = [sys.executable, "-c", IN_A_FORK, json.dumps(stages)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return {code: set(names) for code, names in json.loads(run.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("code", PAGES)
def test_a_page_of_text_imports_nothing_heavy(code, imported):
    assert "lightning_iet" in imported[code]
    assert not HEAVY & imported[code]


@pytest.mark.parametrize("code", IMAGES)
def test_tools_for_images_and_figures_import_no_training(code, imported):
    assert not TRAINING & imported[code]
    assert "jsonargparse" in imported[code]


@pytest.mark.parametrize("code", MODELS)
def test_a_model_is_read_under_one_name_of_lightning(code, imported):
    assert {"lightning_iet", "lightning"} <= imported[code]
    assert "pytorch_lightning" not in imported[code]


@pytest.mark.parametrize("code", FUNCTIONS)
def test_functions_need_torch_alone(code, imported):
    assert {"lightning_iet", "torch"} <= imported[code]
    assert not (HEAVY - {"torch", "numpy"}) & imported[code]


def test_metrics_need_no_lightning(imported):
    assert {"lightning_iet", "torchmetrics"} <= imported[METRICS]
    assert not {"lightning", "pytorch_lightning", "diffusers"} & imported[METRICS]


@pytest.mark.parametrize("package", ["", ".audit", ".callbacks", ".data", ".metrics", ".metrics.features", ".modules"])
def test_every_exported_name_is_there(package):
    module = import_module(f"lightning_iet{package}")
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_a_name_that_is_not_exported_is_an_ordinary_error():
    with pytest.raises(AttributeError, match=r"module 'lightning_iet' has no attribute 'Nothing'"):
        _ = lightning_iet.Nothing
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from lightning_iet.metrics import Nothing")


def test_the_list_of_commands_is_complete():
    known = [command for group in COMMANDS.values() for command in group]
    assert len(known) == len(set(known))
    assert set(OF_THE_TRAINER) <= set(known)
    for command in known:
        assert f"\n  {command} " in help_text()
        if command not in OF_THE_TRAINER:
            assert tool(command).__name__ == command.replace("-", "_")
    assert max(map(len, help_text().splitlines())) <= 120


@pytest.mark.parametrize(("typed", "meant"), [("audti", "audit"), ("audit-modle", "audit-model"), ("fitt", "fit")])
def test_a_typing_error_gets_a_suggestion(typed, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main([typed])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"There is no command '{typed}'. Did you mean {meant}?" in error.splitlines()[-1]
