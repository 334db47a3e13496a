"""What a command imports before it does anything: decided by names, for times depend on the machine."""

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


def imported(code):
    """Names of top-level modules that a fresh interpreter has imported after some code."""
    wrapped = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint()\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["audi"], []])
def test_a_page_of_text_imports_nothing_heavy(arguments):
    assert not HEAVY & imported(f"from lightning_iet.cli import main; main({arguments!r})")


@pytest.mark.parametrize("command", ["audit", "compare"])
def test_tools_for_images_and_figures_import_no_training(command):
    modules = imported(f"from lightning_iet.cli import main; main(['{command}', '--help'])")
    assert not TRAINING & modules
    assert "jsonargparse" in modules


@pytest.mark.parametrize(
    "code",
    [
        "from lightning_iet.cli import main; main(['sample', '--help'])",
        "from lightning_iet.cli import main; main(['export', '--help'])",
        "from lightning_iet import DiffusionModule",
    ],
)
def test_a_model_is_read_under_one_name_of_lightning(code):
    modules = imported(code)
    assert "lightning" in modules
    assert "pytorch_lightning" not in modules


@pytest.mark.parametrize("module", ["functional.memorization", "functional.neighbors", "functional.averaging"])
def test_functions_need_torch_alone(module):
    modules = imported(f"import lightning_iet.{module}")
    assert "torch" in modules
    assert not (HEAVY - {"torch", "numpy"}) & modules


def test_metrics_need_no_lightning():
    modules = imported("from lightning_iet.metrics import MemorizedQuantity")
    assert "torchmetrics" in modules
    assert not {"lightning", "pytorch_lightning", "diffusers"} & modules


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
