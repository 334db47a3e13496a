"""What docs/howto/text-to-image.md shows works, and the configurations mean what they say."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from lightning_iet.cli import main
from lightning_iet.modules import TextToImageModule
from tests.helpers.models import quiet_trainer
from tests.helpers.text_to_image import CaptionedData, make_module, save_pipelines

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "howto" / "text-to-image.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [shlex.split(line)[1:] for line in SHELL.splitlines() if line.startswith("lightning-iet ")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "fit"], ids=lambda command: command[3])
def test_every_option_is_known(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])
    with pytest.raises(SystemExit) as stop:
        main([*command, "--print_config"])
    assert not stop.value.code
    settings = yaml.safe_load(capsys.readouterr().out)
    given = dict(zip(command[3::2], command[4::2], strict=True))
    for option in ("image_size", "lora_rank", "gradient_checkpointing", "cache_text", "pretrained"):
        if f"--model.{option}" in given:
            assert settings["model"]["init_args"][option] == yaml.safe_load(given[f"--model.{option}"])


@pytest.mark.parametrize("rank", [2, None])
def test_images_are_drawn_and_the_model_handed_on(tmp_path, monkeypatch, rank):
    folders = save_pipelines(tmp_path, ["sd1"])
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(make_module(folders["sd1"], lora_rank=rank), CaptionedData(2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    monkeypatch.chdir(tmp_path)
    sample, export = (next(c for c in COMMANDS if c[0] == name) for name in ("sample", "export"))
    main([*sample, "--num_inference_steps", "1"])
    assert len(list(Path("samples").glob("*.png"))) == 8
    main(export)
    StableDiffusionPipeline.from_pretrained("my-model")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    folders["sd1"].rename("models")
    exec(code.replace("models/sd-2.1", "models"), {"TextToImageModule": TextToImageModule})


def settings_of(method):
    return yaml.safe_load((ROOT / "configs" / "paper" / f"laion10k_{method}.yaml").read_text())


def test_the_four_runs_differ_in_the_methods_alone():
    rest = []
    for method, shards in {"iet": (4, 0.0), "agc": (1, 0.8), "iet_agc": (4, 0.8), "baseline": (1, 0.0)}.items():
        settings = settings_of(method)
        assert (settings["averaging"].pop("num_shards"), settings["agc"].pop("threshold")) == shards
        assert settings["trainer"]["logger"]["init_args"].pop("name") == f"paper/laion10k_{method}"
        rest.append(settings)
    assert all(settings == rest[0] for settings in rest)
    assert rest[0]["averaging"]["every_n_train_steps"] == 2000
    assert rest[0]["data"]["init_args"]["batch_size"] == 8
    # 25 rounds of 2,000 steps, in epochs of a quarter of the images.
    assert rest[0]["trainer"]["max_epochs"] == round(25 * 2000 / -(-2500 // 8))


def test_the_module_has_the_published_optimizer_by_default():
    optimizer = TextToImageModule(synthetic=True, image_size=16).configure_optimizers()
    assert type(optimizer) is torch.optim.AdamW
    assert (
        optimizer.defaults["lr"] == settings_of("iet")["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 2.5e-6
    )
