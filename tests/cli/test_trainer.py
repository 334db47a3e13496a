import json
import re
import runpy
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_iet import DiffusionModule, __version__
from lightning_iet.cli import main
from lightning_iet.cli.trainer import IETCLI, _option_of
from lightning_iet.data import DigitsDataModule
from tests.helpers.command_line import QUICK, fails
from tests.helpers.digit_models import save_checkpoint
from tests.helpers.models import tiny_diffusion, tiny_unet

UNJUDGED = ["--evaluation.num_samples=0", "--trainer.limit_val_batches=0"]
FEW_IMAGES = ["--evaluation.num_samples=4", "--evaluation.k=2"]
CONFIGS = sorted(Path(__file__).parents[2].glob("configs/digits/*.yaml"))


class LoadsItsWeights(DiffusionModule):
    """A user's module, trained as soon as it is built."""

    def __init__(self, unet: torch.nn.Module) -> None:
        torch.nn.init.zeros_(unet.conv_out.weight)
        torch.nn.init.zeros_(unet.conv_out.bias)
        super().__init__(unet)  # which copies them for the moving average


class Refuses(DigitsDataModule):
    """Data that are refused, for what the argument of a function is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def prepare_data(self) -> None:
        refuse(self.name)


class CountsThreads(DiffusionModule):
    """A user's module that notes the threads of its steps, and may set their number."""

    seen: ClassVar[list[int]] = []

    def __init__(self, unet: torch.nn.Module, threads: int | None = None) -> None:
        super().__init__(unet)
        if threads is not None:
            torch.set_num_threads(threads)

    def training_step(self, *args):
        self.seen.append(torch.get_num_threads())
        return super().training_step(*args)


def refuse(name):
    raise ValueError(f"Argument `{name}` expected something else.")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])


def fit(name, *arguments):
    config = next(path for path in CONFIGS if path.stem == name)
    main(["fit", "--config", str(config), *QUICK, *arguments])


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_all_that_it_promises_and_can_be_repeated(capsys):
    often = ["--trainer.check_val_every_n_epoch=1", "--trainer.callbacks.init_args.every_n_epochs=1"]
    often += [f"--trainer.limit_{part}_batches=4" for part in ("val", "test")]
    often += ["--evaluation.num_samples=12", "--evaluation.k=5"]
    for version in range(2):
        fit("iet_agc", *often, f"--evaluation.pictures={version == 0}")
        folder = Path(f"runs/digits/iet_agc/version_{version}")
        report = json.loads((folder / "metrics.json").read_text())
        assert report
        for picture in ("samples.png", "nearest.png", "curves.png", "mq.png") if version == 0 else ():
            with Image.open(folder / picture) as image:
                assert min(image.size) > 100
        assert (folder / "config.yaml").is_file()
        assert [file.name for file in (folder / "checkpoints").iterdir()] == ["last.ckpt"]  # none of the same step
        assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    output = capsys.readouterr().out
    assert "FID" in output
    assert "control" in output.lower()

    checkpoint = folder / "checkpoints" / "last.ckpt"
    main(["sample", "--ckpt", str(checkpoint), "--num-samples", "3", "--out", "images", "--num_inference_steps", "2"])
    several = ["--num-samples", "3", "--out", "images", "--num_inference_steps", "2", "--grid", "all.png"]
    main(["sample", "runs/digits/iet_agc", *several])
    assert Path("all.png").is_file()
    for place in ("images", "images-1"):
        assert sorted(path.name for path in Path(place).glob("0*.png")) == ["00000.png", "00001.png", "00002.png"]
        assert not Path(f"{place}.png").exists()
        assert len(list(Path(place).iterdir())) == 3  # nothing that an audit would count
    assert Path("images/00001.png").read_bytes() == Path("images-1/00001.png").read_bytes()
    module = DiffusionModule.load_from_checkpoint(checkpoint)
    expected = (module.sample(3, num_inference_steps=2)[1, 0] * 255).to(torch.uint8)
    with Image.open("images/00001.png") as image:
        assert abs(torch.from_numpy(np.array(image)).int() - expected.int()).max() <= 1

    for subcommand in ("validate", "test"):
        config = next(path for path in CONFIGS if path.stem == "iet_agc")
        main([subcommand, "--config", str(config), *QUICK, *often, "--ckpt_path", str(checkpoint)])
    main(["compare", "runs/digits/iet_agc/version_0", "runs/digits/iet_agc/version_1", "--out", "comparison"])
    for suffix in ("csv", "md", "png"):
        assert Path(f"comparison/comparison.{suffix}").stat().st_size > 0


def test_a_run_goes_on_from_its_checkpoint():
    fit("iet_agc", *UNJUDGED, "--trainer.max_epochs=4", "--trainer.logger.init_args.name=whole")
    fit("iet_agc", *UNJUDGED, "--trainer.logger.init_args.name=cut")
    fit("iet_agc", *UNJUDGED, "--trainer.max_epochs=4", "--ckpt_path", "runs/cut/version_0/checkpoints/last.ckpt")
    whole, resumed = (
        torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "digits/iet_agc")
    )
    for name in whole:
        assert torch.equal(whole[name], resumed[name])


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # of Lightning: a version with a name has one folder
def test_what_training_has_written_stays_where_a_model_is_tested(capsys):
    named = ["--trainer.logger.init_args.version=mine", "--trainer.limit_test_batches=1"]
    fit("baseline", *UNJUDGED, *named, "--trainer.log_every_n_steps=1", "--ckpt_path", "last")
    folder = Path("runs/digits/baseline/mine")
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] is None  # which repeats the run
    before = {name: (folder / name).read_bytes() for name in ("metrics.csv", "config.yaml")}
    assert b"train/loss" in before["metrics.csv"]
    main(["test", "--ckpt_path", str(folder), "--trainer.log_every_n_steps=7"])
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert "test/loss" in (folder / "test.csv").read_text()
    main(["test", "--config", str(folder / "config.yaml"), "--ckpt_path", "last"])
    (folder / "test.csv").unlink()
    fit("baseline", *UNJUDGED, *named, "--trainer.max_epochs=3", "--ckpt_path", "last")
    assert (folder / "metrics-1.csv").read_bytes() == before["metrics.csv"]
    assert not (folder / "test.csv").exists()
    figures = [line.split()[-2] for line in capsys.readouterr().out.splitlines() if "test/loss" in line]
    assert len(figures) == 2
    assert len(set(figures)) == 1  # of the trained model both times


@pytest.mark.parametrize("command", ["test", "validate"])
def test_the_last_checkpoint_of_no_run_is_refused(command, capsys):
    config = next(path for path in CONFIGS if path.stem == "baseline")
    error = fails(capsys, command, "--config", str(config), *QUICK, "--ckpt_path", "last")
    assert f"`{command}` expected a trained model, but got --ckpt_path last, and 'runs/digits/baseline/" in error


def test_methods_are_switched_off_by_their_neutral_values(tmp_path):
    """Bit for bit the weights of the baseline's configuration."""
    fit("baseline", *UNJUDGED, "--trainer.logger.init_args.name=plain")
    neutral = ["--agc.threshold=0", "--averaging.num_shards=1", "--trainer.logger.init_args.name=neutral"]
    fit("iet_agc", *UNJUDGED, *neutral)
    plain, neutral = (
        torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("plain", "neutral")
    )
    for name in plain:
        assert torch.equal(plain[name], neutral[name])


@pytest.mark.parametrize(
    ("variable", "options", "expected"),
    [
        (None, [], 1),
        (None, ["--data.batch_size=100000000"], 3),  # a step of a few billion multiply-adds
        ("OMP_NUM_THREADS", [], 3),
        ("MKL_NUM_THREADS", [], 3),
        (None, ["--model.threads=2"], 2),
    ],
)
def test_a_small_network_trains_on_one_thread_unless_the_user_has_set_a_number(
    variable, options, expected, monkeypatch, caplog
):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "3")
    torch.set_num_threads(3)
    settings = {name: value for name, value in tiny_unet().config.items() if not name.startswith("_")}
    unet = json.dumps({"class_path": "diffusers.UNet2DModel", "init_args": settings})
    module = [f"--model={__name__}.CountsThreads", f"--model.unet={unet}"]
    trainer = ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--evaluation.num_samples=0"]
    CountsThreads.seen.clear()
    main(["fit", *module, "--data=DigitsDataModule", "--data.num_train=20", *trainer, *options])
    assert CountsThreads.seen == [expected]
    assert ("Training on 1 thread: a step is too small to be divided among 3 (OMP_NUM_THREADS=3" in caplog.text) == (
        expected == 1
    )
    assert torch.get_num_threads() == (2 if expected == 2 else 3)


def test_another_logger_works():
    """That of Weights & Biases: tests/search/test_wandb.py."""
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.name=other"]
    fit("iet_agc", *FEW_IMAGES, *logger)
    assert list(Path("runs/other").glob("version_0/events*"))
    assert len(list(Path("runs").rglob("metrics.json"))) == 1


def test_no_logger_is_fine_twice():
    for _ in range(2):
        fit(
            "iet",
            *FEW_IMAGES,
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.callbacks=null",
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--averaging.num_shards", "57", "--sharding.partition", "iid"], "one shard per sample (56), but got 57"),
        (["--averaging.num_shards", "8"], "expected at most 5 for a stratified split"),
        (["--data.num_train", "0"], "Options --data.num_train and --data.num_control expected"),
        (["--trainer.logger.init_args.save_dir", "/dev/null/runs"], "/dev/null/runs"),
        (["--evaluation.feature_weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--model.ema_decay", "1"], "Option --model.ema_decay expected"),
        (["--trainer.max_steps", "5"], "expected max_steps=-1, but got 5"),
    ],
)
def test_bad_input_is_one_clear_line_before_the_first_step(arguments, message, capsys):
    config = next(path for path in CONFIGS if path.stem == "iet_agc")
    assert message in fails(capsys, "fit", "--config", str(config), *QUICK, *arguments)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.unet.init_args.sample_size=9"], "multiples of 2 (it halves them 1 times), but got 9 × 9. "),
        (["--model.pretrained=nowhere"], "--model.unet and --model.pretrained expected one of them, but got both. "),
        (["--model.unet=null", "--model.pretrained=no/where"], "Without network give a local path"),
        (["--model.unet.init_args.num_class_embeds=5"], "Argument `condition` expected class labels 0 … 4, but got "),
    ],
)
def test_a_model_that_does_not_fit_is_one_short_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = next(path for path in CONFIGS if path.stem == "baseline")
    error = fails(capsys, "fit", "--config", str(config), *QUICK, *arguments)
    assert message in error
    subject = "Argument `condition` " if "condition" in message else "Option"  # labels of a batch are no option
    assert error.startswith(f"lightning-iet: error: {subject}")
    assert len(error) < 600  # a path and the remedy, and nothing that jsonargparse has tried


def test_a_checkpoint_of_another_architecture_is_one_short_line(capsys):
    save_checkpoint(tiny_diffusion(unet={"block_out_channels": (8,)}), Path("other.ckpt"))
    config = next(path for path in CONFIGS if path.stem == "baseline")
    error = fails(capsys, "test", "--config", str(config), *QUICK, "--ckpt_path", "other.ckpt")
    assert "expected another architecture, but got" in error
    assert len(error) < 600  # a path and the remedy, and nothing that jsonargparse has tried


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["sample", "--ckpt", "nowhere.ckpt"], "expected a checkpoint file, but got 'nowhere.ckpt'"),
        (["compare", "nowhere"], "but got 'nowhere', which does not exist"),
        (["compare"], "expected one or more RUNS"),
        (["fly"], "fly"),
    ],
)
def test_bad_commands_are_one_clear_line(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


def test_a_file_that_is_no_checkpoint_is_named(capsys):
    Path("text.ckpt").write_text("hello")
    named = "expected a whole checkpoint, but got 'text.ckpt'"
    assert named in fails(capsys, "sample", "--ckpt", "text.ckpt")
    config = next(path for path in CONFIGS if path.stem == "iet_agc")
    assert named in fails(capsys, "fit", "--config", str(config), "--ckpt_path", "text.ckpt")


def test_a_checkpoint_of_something_else_is_named(capsys):
    torch.save({"state_dict": {}, "specification": {}}, "other.ckpt")
    named = "but got 'other.ckpt', which does not say how to build its denoiser"
    assert named in fails(capsys, "sample", "--ckpt", "other.ckpt")


def test_the_traceback_is_there_when_asked_for(monkeypatch):
    monkeypatch.setenv("LIGHTNING_IET_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        main(["sample", "--ckpt", "nowhere.ckpt"])


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["sample", "--help"], ["compare", "--help"]])
def test_help_is_there(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    help_text = capsys.readouterr().out
    assert {"fit": "--agc.threshold", "sample": "--ckpt", "compare": "--out"}.get(arguments[0], "compare") in help_text


def test_the_module_is_the_same_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_iet", "--version"])
    monkeypatch.delitem(sys.modules, "lightning_iet.__main__", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lightning_iet", run_name="__main__")  # what `python -m` does
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out.strip() == f"lightning-iet {__version__}"


def test_the_command_line_is_lightnings():
    assert set(IETCLI.subcommands()) == {"fit", "validate", "test", "plan"}
    assert tiny_diffusion().num_timesteps == 1000


def test_no_progress_bar_where_none_is_wanted(capsys):
    fit("baseline", "--trainer.enable_progress_bar=false", "--trainer.fast_dev_run=1")
    assert "step/s" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("given", [["--config", "broken.yaml"], ["--config=broken.yaml"], ["-c", "broken.yaml"]])
def test_a_configuration_that_is_no_yaml_is_named_with_its_line(capsys, given):
    Path("broken.yaml").write_text("model:\n  a: [1, 2\nb: 3\n")
    assert "Option --config expected YAML, but got 'broken.yaml': expected ',' or ']'" in fails(capsys, "fit", *given)


def test_the_extra_of_a_missing_logger_is_named(capsys, monkeypatch):
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "x"]
    error = fails(capsys, "fit", "--config", str(CONFIGS[0]), *logger)
    assert "`tensorboard` is not installed. Run: pip install 'lightning-iet[tensorboard]'" in error


def test_each_logger_of_weights_and_biases_has_a_project(tmp_path, monkeypatch):
    class Parsed(Exception):
        pass

    def parsed(cli):
        raise Parsed([one.init_args.get("project") for one in cli.config["fit"].trainer.logger])

    def projects():
        with pytest.raises(Parsed) as found:
            main(["fit", "--config", str(CONFIGS[0]), "--config", str(tmp_path / "loggers.yaml")])
        return found.value.args[0]

    monkeypatch.setattr(IETCLI, "instantiate_classes", parsed)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    kinds = ("CSVLogger", "init_args: {save_dir: runs}"), ("WandbLogger", "init_args: {offline: true}"), (
        "WandbLogger", "init_args: {project: mine}",
    )  # fmt: skip
    entries = "\n".join(f"    - class_path: lightning.pytorch.loggers.{kind}\n      {rest}" for kind, rest in kinds)
    (tmp_path / "loggers.yaml").write_text(f"trainer:\n  logger:\n{entries}\n")
    assert projects() == [None, "lightning-iet", "mine"]
    monkeypatch.setenv("WANDB_PROJECT", "digits")
    assert projects()[1] != "lightning-iet"  # wandb takes the variable's
    assert projects()[2] == "mine"


def test_a_module_of_a_user_that_loads_its_weights_is_tested_without_a_checkpoint(capsys):
    config = Path("own.yaml")
    unet = "{sample_size: 8, in_channels: 1, out_channels: 1, block_out_channels: [8], norm_num_groups: 4, "
    unet += "down_block_types: [DownBlock2D], up_block_types: [UpBlock2D]}"
    config.write_text(
        f"model: {{class_path: {__name__}.LoadsItsWeights, init_args: {{unet: {{class_path: diffusers.UNet2DModel, "
        f"init_args: {unet}}}}}}}\ndata: {{class_path: DigitsDataModule}}\ntrainer: {{accelerator: cpu}}\n"
    )
    main(["test", "--config", str(config), *QUICK[2:]])
    loss = next(line for line in capsys.readouterr().out.splitlines() if "test/loss" in line)
    assert float(re.search(r"\d+\.\d+", loss)[0]) == pytest.approx(1, abs=0.1)  # it predicts no noise at all


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("num_train", "Option --data.num_train expected"),  # of the data that have refused it
        ("threshold", "Option --agc.threshold expected"),  # of one option only
        ("images", "Argument `images` expected"),
    ],
)
def test_an_error_of_data_names_only_what_an_option_is_meant_for(name, answer, capsys):
    data = ["--data", f"{__name__}.Refuses", "--data.name", name]
    assert answer in fails(capsys, "fit", "--config", "digits/baseline", *data)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("max_steps", "--trainer.max_steps"),  # of one option only
        ("num_shards", "--averaging.num_shards"),
        *((name, None) for name in ("labels", "condition", "num_samples", "unet")),
    ],
)
def test_only_what_an_option_is_meant_for_is_called_so(name, option):
    with pytest.raises(ValueError, match=name) as error:
        refuse(name)
    assert _option_of(name, error.value, images=False) == option


def test_the_length_of_a_stream_is_no_option_of_the_evaluation(capsys):
    sharded = ["--averaging.num_shards", "2", "--sharding.seed", "-1"]
    data = ["--data", f"{__name__}.Refuses", "--data.name", "num_samples"]
    assert "Argument `num_samples` expected" in fails(capsys, "fit", "--config", "digits/baseline", *data, *sharded)


def test_one_set_of_images_of_two_is_answered_with_the_option_of_the_other_and_the_command(capsys):
    save_checkpoint(tiny_diffusion(unet={"block_out_channels": (8,)}), Path("model.ckpt"))
    error = fails(capsys, "audit-model", "model.ckpt", "--train", "images")
    assert "Option --held-out expected images, but got none." in error
    assert "to audit a run of `lightning-iet fit` with its own." in error
