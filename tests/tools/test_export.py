import json
import sys

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from lightning_iet import DiffusionModule
from lightning_iet.cli import main
from lightning_iet.modules.adapters import Selection
from lightning_iet.tools.audit_model import audit_model
from lightning_iet.tools.export import export
from tests.helpers.audits import QUICK_MODEL
from tests.helpers.digit_models import digit_pixels, drawn, save_checkpoint
from tests.helpers.image_folders import write_images
from tests.helpers.models import tiny_diffusion, tiny_unet


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that was trained and evaluated."""
    folder = tmp_path_factory.mktemp("run")
    arguments = {
        "seed_everything": 3,
        "model": {
            "class_path": "DiffusionModule",
            "init_args": {
                "unet": {"class_path": "diffusers.UNet2DModel", "init_args": dict(tiny_unet().config)},
                "ema_decay": 0.9,
            },
        },
        "data": {"class_path": "DigitsDataModule", "init_args": {"num_train": 60, "batch_size": 30}},
        "averaging": {"num_shards": 2},
        "agc": {"threshold": 0.5},
        "evaluation": {"num_samples": 8, "num_inference_steps": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "digits"},
            },
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
            ],
        },
    }
    for key in [key for key in arguments["model"]["init_args"]["unet"]["init_args"] if key.startswith("_")]:
        del arguments["model"]["init_args"]["unet"]["init_args"][key]
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(arguments))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-iet"])
        main(["fit", "--config", str(folder / "config.yaml")])
    return folder / "digits" / "version_0"


def header(folder):
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_train_export_load_draw_the_same_images(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "last.ckpt"
    main(["export", "--ckpt", str(checkpoint), "--out", str(tmp_path / "digits-model")])
    printed = capsys.readouterr().out
    assert "a DDPMPipeline of diffusers" in printed
    assert "class_labels" not in printed
    loaded = DDPMPipeline.from_pretrained(tmp_path / "digits-model")
    loaded.set_progress_bar_config(disable=True)
    module = DiffusionModule.load_from_checkpoint(checkpoint)
    ours = module.sample(3, seed=7, sampler="ddpm", num_inference_steps=3)
    torch.testing.assert_close(drawn(loaded, range(3), seed=7), ours, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn(loaded, range(3)), drawn(module.pipeline(), range(3)))
    # … and round again: what was exported can be started from.
    again = DiffusionModule(pretrained=str(tmp_path / "digits-model"))
    assert torch.equal(again.unet.conv_in.weight, module.ema.module.conv_in.weight)
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "digits-model").rglob("*.json"))


def test_the_card_tells_data_method_settings_and_figures(run, tmp_path):
    folder = export(run / "checkpoints" / "last.ckpt", out=tmp_path / "digits-model")
    head, body = header(folder)
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "unconditional-image-generation"
    report = json.loads((run / "metrics.json").read_text())
    for fact in (
        "# digits-model",
        "averaged (EMA) weights after 2 optimizer steps",
        "`DigitsDataModule` (num_train 60",
        "`Adam` (lr 0.0002",
        "ema_decay 0.9",
        "2 shards, averaged every 1 epochs",
        "threshold 0.5",
        "| seed | 3 |",
        f"| memorized fraction | {report['generated']['memorized_fraction']:.1%} |",
        "8 generated images",
        f"torch {torch.__version__.partition('+')[0]}",
    ):
        assert fact in body, fact
    assert "averaged weights, seed" in body
    assert "Measured after" not in body
    assert "Measured with" not in body
    assert str(run) not in body


def test_figures_of_other_weights_are_called_so(run, tmp_path):
    body = header(export(run / "checkpoints" / "last.ckpt", out=tmp_path / "last", use_ema=False))[1]
    assert "These are the last weights" in body
    assert "**Measured with the averaged weights; these are the last ones.**" in body
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text((run / "metrics.json").read_text())  # which says: averaged
    save_checkpoint(DiffusionModule(tiny_unet(), ema_decay=0.0), tmp_path / "run" / "last.ckpt")
    body = header(export(tmp_path / "run" / "last.ckpt", out=tmp_path / "plain"))[1]
    assert "last weights, seed" in body
    assert "averaged" not in body.partition("## Quality")[2]
    assert "Measured with" not in body


def test_the_card_says_which_part_was_trained(run, tmp_path):
    module = tiny_diffusion()
    groups, trained = module.select_parameters(Selection("bias", mask="100000"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text())
    save_checkpoint(module, tmp_path / "run" / "last.ckpt")
    body = header(export(tmp_path / "run" / "last.ckpt", out=tmp_path / "out"))[1]
    number = sum(groups.numel[name] for name in trained)
    share = 100 * number / groups.total
    assert (
        f"| what was trained (MemControl) | bias in 1 of {len(groups.groups)} blocks, not in the rest; {number} for "
        f"{groups.total:,} parameters ({share:.4f} %); mask 100000 |"
    ) in body
    whole = header(export(run / "checkpoints" / "last.ckpt", out=tmp_path / "whole"))[1]
    assert "MemControl" not in whole


def test_figures_of_another_step_are_called_so(run, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.json").write_text((run / "metrics.json").read_text())
    save_checkpoint(tiny_diffusion(), tmp_path / "run" / "checkpoints" / "early.ckpt")
    body = header(export(tmp_path / "run" / "checkpoints" / "early.ckpt", out=tmp_path / "out"))[1]
    assert "Measured after 2 steps; these weights are those after 0." in body
    assert "No `config.yaml` was found" in body


def test_an_audit_is_in_the_card(tmp_path):
    save_checkpoint(tiny_diffusion(), tmp_path / "model.ckpt")
    share = {"count": 3, "total": 100, "share": 0.03, "low": 0.01, "high": 0.08}
    figures = {"generated": {"copies": share, "identical": 1}, "held_out": {"copies": share}, "membership": None}
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    folder = export(tmp_path / "model.ckpt", out=tmp_path / "out", audit=tmp_path)
    body = header(folder)[1]
    assert "An audit of 100 generated images found **3 copies** of training images (3.0%; 95 % interval" in body
    assert "Of held-out images, in their place, 3.0% would pass for copies." in body
    with pytest.raises(ValueError, match=r"`audit` expected the folder of a report"):
        export(tmp_path / "model.ckpt", out=tmp_path / "other", audit=folder)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("classes", "labels"), [(1, [0, 0, 0, 0]), (2, [0, 1, 0, 1]), (3, [0, 1, 2, 0]), (5, [0, 1, 2, 3])]
)
def test_the_code_in_the_card_of_a_class_conditional_model_runs(tmp_path, monkeypatch, capsys, classes, labels):
    # With label dropout, one more class stands for "any".
    model = tiny_diffusion(unet={"num_class_embeds": classes + 1}, label_dropout=0.1)
    save_checkpoint(model, tmp_path / "model.ckpt")
    folder = export(tmp_path / "model.ckpt", out=tmp_path / "out", sampler="ddim", use_ema=False)
    printed = capsys.readouterr().out
    assert f"call its `unet` with `class_labels=`, as the code in {folder / 'README.md'} does" in printed
    body = header(folder)[1]
    code = body.split("```python\n")[1].split("```")[0]
    assert f"# 0 … {classes - 1}; {classes} = any class" in code
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("set_timesteps(50)", "set_timesteps(2)"), names)
    assert names["labels"].tolist() == labels
    assert names["images"].shape == (4, 1, 8, 8)
    assert isinstance(names["scheduler"], DDIMScheduler)
    assert "These are the last weights" in body


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    save_checkpoint(tiny_diffusion(), tmp_path / "model.ckpt")
    folder = export(tmp_path / "model.ckpt", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"which holds a pipeline. .* replace it with --overwrite"):
        export(tmp_path / "model.ckpt", out=folder)

    def fails(*args, **kwargs):
        raise OSError("no space left")

    before = (folder / "README.md").read_text()
    monkeypatch.setattr(UNet2DModel, "save_pretrained", fails)
    for out in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            export(tmp_path / "model.ckpt", out=out, overwrite=True)
    assert (folder / "README.md").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ckpt", "out"]
    monkeypatch.undo()
    export(tmp_path / "model.ckpt", out=folder, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ValueError, match=r"which holds other files, among them 'file'"):
        export(tmp_path / "model.ckpt", out=tmp_path / "mine", overwrite=True)


def test_only_what_an_export_writes_is_replaced(tmp_path):
    save_checkpoint(tiny_diffusion(), tmp_path / "model.ckpt")
    folder = export(tmp_path / "model.ckpt", out=tmp_path / "out")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    with pytest.raises(ValueError, match=r"`out` expected a new folder, .* other files, among them '\.git'") as error:
        export(tmp_path / "model.ckpt", out=folder, overwrite=True)
    assert "\n" not in str(error.value)
    assert (folder / ".git" / "HEAD").is_file()


def test_the_folder_that_one_is_in_is_exported_to(tmp_path, monkeypatch):
    save_checkpoint(tiny_diffusion(), tmp_path / "model.ckpt")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    export(tmp_path / "model.ckpt", out=".")
    assert DDPMPipeline.from_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text(encoding="utf-8").count("# mine")


def test_the_hub_gets_the_folder_when_asked(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **kwargs: calls.append((name, kwargs)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **kwargs: calls.append(kwargs) or "its-url")
    save_checkpoint(tiny_diffusion(), tmp_path / "model.ckpt")
    export(tmp_path / "model.ckpt", out=tmp_path / "out", push_to_hub="me/model", private=True)
    assert calls == [
        ("me/model", {"private": True, "exist_ok": True}),
        {"folder_path": tmp_path / "out", "repo_id": "me/model"},
    ]
    assert "Uploaded to its-url" in capsys.readouterr().out
    assert 'from_pretrained("me/model")' in (tmp_path / "out" / "README.md").read_text()


def test_without_network_the_export_is_kept(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fails)
    save_checkpoint(tiny_diffusion(), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"but got 'me/model' \(no route to host\)\. The export is in") as error:
        export(tmp_path / "model.ckpt", out=tmp_path / "out", push_to_hub="me/model")
    assert "\n" not in str(error.value)
    assert DDPMPipeline.from_pretrained(tmp_path / "out")


def test_an_export_can_be_audited_and_the_report_fits_the_card(tmp_path):
    for name, first in (("train", 0), ("held_out", 100)):
        write_images(tmp_path / name, digit_pixels(first, first + 20))
    save_checkpoint(tiny_diffusion(), tmp_path / "model.ckpt")
    folder = export(tmp_path / "model.ckpt", out=tmp_path / "out")
    sets = {name: tmp_path / name for name in ("train", "held_out")}
    audit_model(pipeline=folder, out=tmp_path / "report", **sets, **QUICK_MODEL)
    body = header(export(tmp_path / "model.ckpt", out=folder, audit=tmp_path / "report", overwrite=True))[1]
    assert "An audit of 20 generated images found" in body
    assert "with an AUC of 0." in body


def test_a_model_that_draws_nan_is_not_exported(tmp_path):
    broken = tiny_diffusion()
    broken.unet.conv_out.bias.data.fill_(torch.nan)
    save_checkpoint(broken, tmp_path / "model.ckpt")
    for sampler in ("ddpm", "ddim"):
        with pytest.raises(ValueError, match=r"Sampling expected finite images, but got NaN or infinity in 1 of 1"):
            export(tmp_path / "model.ckpt", out=tmp_path / "out", use_ema=False, sampler=sampler)
    assert not (tmp_path / "out").exists()
