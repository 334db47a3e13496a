import json
import re
import shlex
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as torchrun_arguments

from lightning_iet.cli import main
from tests.helpers.digit_models import fresh_model, save_checkpoint, save_pipeline
from tests.helpers.image_folders import random_pixels, write_images

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "audit.md"
LIGHT = ["--num-samples", "20", "--num-inference-steps", "2", "--loss-timesteps", "2"]  # the last one counts


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


COMMANDS = [shlex.split(block.replace("\\\n", "")) for block in blocks("bash")]


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = random_pixels(60)
    for name, pixels in (("samples", train[:4]), ("train", train), ("held_out", random_pixels(60, seed=2))):
        write_images(tmp_path / name, pixels)
    names = {"generated": train[:4], "train": train}
    exec(compile("\n".join(blocks("python")), str(PAGE), "exec"), names)  # our own page
    printed = capsys.readouterr().out
    assert "copies The generator copies: 4 of 4 generated images" in printed
    assert printed.splitlines()[-1].startswith("The generator copies: 4 of 4 generated images")
    assert names["copies"] == [f"{number:05d}.png" for number in range(4)]
    assert names["quantity"] == 1


def main_in(folder, arguments):
    with chdir(folder):  # the process will serve other tests
        main(arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_of_the_page_run(tmp_path, monkeypatch, command, processes, warm):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("samples", "train", "held_out")):
        write_images(tmp_path / name, random_pixels(60, seed=seed))
    save_checkpoint(fresh_model(), tmp_path / "last.ckpt")
    save_pipeline(fresh_model(), tmp_path / "ddpm")
    program, *arguments = command + (LIGHT if "audit-model" in command else [])
    if program == "torchrun" and "audit-model" in command:
        launch = torchrun_arguments(arguments)  # torchrun itself is what the other such command shows
        assert launch.standalone
        assert (launch.module, launch.training_script) == (True, "lightning_iet")
        processes(int(launch.nproc_per_node)).run(main_in, tmp_path, launch.training_script_args)
    elif program == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", *arguments]
        subprocess.run(launch, check=True, timeout=200, capture_output=True)
    else:
        assert program == "lightning-iet"
        main(arguments)
    out = tmp_path / command[command.index("--out") + 1]
    files = re.findall(r"^\| `(.*?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert (out / files[0]).is_file()
    measured = json.loads((out / "metrics.json").read_text())["membership"] is not None
    assert measured == ("audit-model" in command)
    assert not list(tmp_path.glob("*.partial"))
