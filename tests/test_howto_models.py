"""What docs/howto/models.md shows works."""

import re
import shlex
from pathlib import Path

import torch

from lightning_iet import DiffusionModule
from lightning_iet.cli import COMMANDS, OF_THE_TRAINER, main, tool
from tests.helpers.digit_models import save_checkpoint
from tests.helpers.models import tiny_diffusion

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "howto" / "models.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_code_draws_our_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tiny_diffusion(), tmp_path / "last.ckpt")
    main(["export", "--ckpt", "last.ckpt", "--out", "digits-iet-agc"])
    names = {}
    for block in blocks("python"):
        exec(block, names)
    ours = DiffusionModule.load_from_checkpoint("last.ckpt").sample(2, sampler="ddpm", num_inference_steps=10)
    images = torch.tensor(names["images"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(images, ours, rtol=1e-5, atol=1e-5)


def test_the_commands_name_what_there_is():
    commands = [shlex.split(line) for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    assert {command[0] for command in commands} == {"lightning-iet"}
    for _, command, *arguments in commands:
        names = {argument for argument in arguments if argument.startswith("--")}
        assert any(command in group for group in COMMANDS.values())
        if command not in OF_THE_TRAINER:
            options = tool(command).__kwdefaults__ | {"ckpt": None, "out": None}
            assert names <= {f"--{option.replace('_', '-')}" for option in options}
        else:
            (config,) = [argument for argument in arguments if argument.endswith(".yaml")]
            assert (ROOT / config).is_file()
            known = DiffusionModule.__init__.__kwdefaults__ | {"unet": None}
            assert {name.split(".")[1] for name in names if name.startswith("--model.")} <= set(known)
