"""``fit --images FOLDER``: what is found, what a user's settings change, and a run from beginning to end."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_iet import AntiGradientControl, DiffusionModule
from lightning_iet.cli import main
from lightning_iet.cli.images import LONGEST, Folder, describe, epochs_within, look, settings_of, unet, with_images
from lightning_iet.modules.pretrained import load_any_module
from lightning_iet.utilities.text import in_words
from tests.helpers.pictures import write_pictures

PLAIN = "--evaluation.pictures=false"  # plots take most of the time of such a run
FEW = ["--evaluation.num_samples=6", "--evaluation.num_inference_steps=2", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])


def write(folder, *, num, size=(20, 24), grey=False, suffix="png", seed=0):
    random = np.random.default_rng(seed)
    Path(folder).mkdir(parents=True)
    for number in range(num):
        shape = size if grey else (*size, 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(f"{folder}/{number}.{suffix}")


def test_number_size_channels_and_classes_are_read():
    write("grey", num=12, size=(9, 40), grey=True)
    assert look(Path("grey")) == Folder(12, 9, 1)
    for name in "ab":
        write(f"colour/{name}", num=5, suffix="jpg")
    assert look(Path("colour")) == Folder(10, 20, 3, (5, 5))
    Image.open("grey/0.png").convert("RGB").save("grey/0.png")  # grey, stored in three channels
    assert look(Path("grey")).channels == 1


def test_the_issue_of_two_hundred_images():
    folder = Folder(200, 70, 3, (100, 100))
    settings = settings_of(folder, Path("cats"), {})
    assert describe(folder, settings) == "200 images, 3 × 64 × 64, 2 classes: 120 to train on, 40 held out, 40 for FID"
    arguments = settings["model"]["init_args"]["unet"]["init_args"]
    assert (arguments["sample_size"], arguments["in_channels"], arguments["num_class_embeds"]) == (64, 3, 2)


RECORDS = {"criterion": "record", "weigh": "draws"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, RECORDS | {"reference": "held_out", "reference_images": 20}),  # the other 20 are left as the control
        ({"data.num_control": 400}, RECORDS | {"reference": "held_out", "reference_images": 64}),
        ({"data.num_control": 20}, RECORDS),  # too few to compare with
        (
            {"agc.reference_every": 3, "averaging.num_shards": 2},
            RECORDS | {"reference": "held_out", "reference_images": 20},
        ),
        ({"data.num_control": 20, "trainer.max_epochs": 1}, {"criterion": "record"}),  # draws begin with the second
        ({"agc.reference": "training"}, RECORDS),
        ({"agc.weigh": "losses", "agc.eta": 0.03}, RECORDS | {"reference": "held_out", "reference_images": 20}),
        ({"agc.criterion": "record"}, RECORDS | {"reference": "held_out", "reference_images": 20}),
        ({"redistribution.fraction": 0.0}, RECORDS | {"reference": "held_out", "reference_images": 20}),  # off
        ({"trainer.max_steps": 5}, {"criterion": "record", "reference": "held_out", "reference_images": 20}),
        ({"agc.threshold": 0.8}, {"threshold": 0.5}),
        ({"agc.criterion": "quantile"}, {}),
        ({"redistribution.fraction": 0.25}, {"threshold": 0.5}),  # moves what is skipped: draws skip nothing
        ({"augmentation.max_magnitude": 5}, {"threshold": 0.5}),
        ({"augmentation.max_magnitude": "strong", "data.num_control": 20}, RECORDS),  # the parser refuses it
    ],
)
def test_records_protect_unless_another_form_is_asked_for(given, expected):
    folder = Folder(200, 70, 3) if "data.num_control" not in given else Folder(1000, 70, 3)
    settings = settings_of(folder, Path("cats"), given)
    assert settings["agc"] == expected
    assert settings["averaging"]["num_shards"] == given.get(
        "averaging.num_shards", 4 if given.get("redistribution.fraction") else 1
    )
    AntiGradientControl(**settings["agc"])


@pytest.mark.parametrize(("number", "kept"), [(20_000, "drop"), (20_001, None)])
def test_near_duplicates_are_looked_for_where_that_takes_minutes_at_most(number, kept):
    settings = settings_of(Folder(number + 20, 64, 3), Path("cats"), {"data.num_control": 10, "data.num_reference": 10})
    assert settings["data"]["init_args"].get("duplicates") == kept


@pytest.mark.parametrize(("side", "size"), [(5, 8), (8, 8), (31, 16), (32, 32), (64, 64), (500, 64)])
def test_the_size_is_a_power_of_two_up_to_64(side, size):
    assert settings_of(Folder(50, side, 1), Path("x"), {})["data"]["init_args"]["image_size"] == size


@pytest.mark.parametrize("size", [(8, 8), (24, 24), (32, 48), (28, 28), (96, 96), (256, 256)])
def test_the_unet_halves_every_size_evenly(size):
    levels = len(unet(size, 3, 0)["block_out_channels"])
    assert all(length % 2 ** (levels - 1) == 0 for length in size)


def test_what_a_user_has_set_is_not_found():
    write("pictures", num=20)
    Path("mine.yaml").write_text(
        "data: {class_path: ImageFolderDataModule, init_args: {num_control: 6}}\nagc: {threshold: 0.0}\n"
    )
    options = ["--data.image_size", "32", "--trainer.max_epochs=7", "--data.batch_size=3"]
    arguments, told = with_images(["fit", "--config", "mine.yaml", "--images=pictures", *options])
    settings = yaml.safe_load(arguments[1].removeprefix("--config="))
    assert settings["model"]["init_args"]["unet"]["init_args"]["sample_size"] == 32
    assert settings["data"]["init_args"]["num_control"] == 6
    assert settings["agc"]["threshold"] == 0
    assert settings["trainer"]["max_epochs"] == 7
    assert arguments[2:] == options
    assert told == "20 images, 3 × 32 × 32: 10 to train on, 6 held out, 4 for FID"


@pytest.mark.parametrize("asked", ["last", "runs/pictures/version_3"])
def test_a_run_goes_on_by_the_method_that_it_began_with(asked):
    write("pictures", num=200, size=(8, 8))
    run = Path("runs/pictures/version_3")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    began = {
        "agc": {"threshold": 0.5, "criterion": "ratio"},
        "averaging": {"num_shards": 4, "every_n_epochs": 7},
        "data": {"init_args": {"batch_size": 5}},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(began))

    def settings_after(*options):
        arguments, _ = with_images(["fit", "--images=pictures", *options])
        return yaml.safe_load(arguments[1].removeprefix("--config="))

    settings = settings_after("--ckpt_path", asked)
    assert settings["averaging"] == began["averaging"]
    assert settings["agc"] == began["agc"]
    assert settings["data"]["init_args"]["duplicates"] == "keep"  # before there was a choice
    assert settings["data"]["init_args"]["batch_size"] == 5
    (run / "config.yaml").write_text("data: imagenet\nagc: {speed: 3}\n")  # of another program
    assert settings_after("--ckpt_path", asked)["agc"]["criterion"] == "record"
    afresh = settings_after()
    assert afresh["averaging"]["num_shards"] == 1
    assert afresh["data"]["init_args"]["duplicates"] == "drop"


def test_without_images_arguments_stay_as_they_are():
    given = ["fit", "--config", "any.yaml", "--agc.threshold", "0"]
    Path("any.yaml").write_text("trainer: {}")
    assert with_images(given) == (given, None)


def test_files_of_several_pages_are_looked_at():
    frames = [Image.fromarray(np.full((9, 40, 3), (value, 0, 0), dtype=np.uint8)) for value in range(100, 200, 10)]
    Path("stack").mkdir()
    frames[0].save("stack/a.tiff", save_all=True, append_images=frames[1:])
    assert look(Path("stack")) == Folder(10, 9, 3)
    Path("deep").mkdir()
    deep = [Image.fromarray(np.full((12, 10), value, dtype=np.uint16)) for value in range(10)]
    deep[0].save("deep/a.tiff", save_all=True, append_images=deep[1:])
    assert look(Path("deep")) == Folder(10, 10, 1)


def test_what_is_excluded_is_not_looked_at():
    write("pictures", num=12)
    for number in range(12):
        Image.new("L", (300, 300)).save(f"pictures/{number}_mask.png")
    with pytest.raises(ValueError, match="`exclude` expected to say what to leave out"):
        with_images(["fit", "--images", "pictures"])
    _, told = with_images(["fit", "--images", "pictures", "--data.exclude", "*_mask.png"])
    assert told == "12 images, 3 × 16 × 16: 8 to train on, 2 held out, 2 for FID"


def test_images_none_of_which_can_be_read():
    Path("damaged").mkdir()
    for number in range(10):
        Path(f"damaged/{number}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"which holds 10 of which none can be read .0.png: "):
        look(Path("damaged"))
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="which holds none"):
        look(Path("empty"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("data.batch_size", 0, "Option --data.batch_size expected an integer ≥ 1, but got 0"),
        ("data.channels", "three", "Option --data.channels expected an integer ≥ 1, but got 'three'"),
        ("data.image_size", "big", "--data.image_size expected a number of pixels, or .height, width., but got 'big'"),
        ("data.image_size", [64], "--data.image_size expected a number of pixels"),
        ("averaging.num_shards", 0, "Option --averaging.num_shards expected an integer ≥ 1, but got 0"),
        ("trainer.max_epochs", 2.5, "Option --trainer.max_epochs expected an integer ≥ -1, but got 2.5"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_their_option(option, value, message):
    with pytest.raises(ValueError, match=message):
        settings_of(Folder(50, 8, 1), Path("x"), {option: value})


def test_checkpoints_are_written_some_twenty_times_whatever_the_length():
    def saving(option, number):
        trainer = settings_of(Folder(50, 8, 1), Path("x"), {option: number})["trainer"]
        return trainer["callbacks"][0]["init_args"]

    for epochs, often in ((1, 1), (2, 1), (7, 1), (40, 2), (41, 2), (101, 5), (997, 49), (1340, 67)):
        found = saving("trainer.max_epochs", epochs)
        assert found["every_n_epochs"] == often
        assert found["save_on_train_epoch_end"]  # else it waits for a validation, which the last epoch may not have
    for steps, often in ((300, 15), (997, 49), (1234, 61)):
        assert saving("trainer.max_steps", steps)["every_n_train_steps"] == often


@pytest.mark.parametrize("model", ["TextToImageModule", "lightning_iet.modules.TextToImageModule"])
def test_a_model_of_something_else_than_images_is_refused_before_they_are_read(model, monkeypatch):
    write("pictures", num=10)
    Path("mine.yaml").write_text(f"model: {{class_path: {model}}}\n")
    monkeypatch.setattr("lightning_iet.cli.images.look", None)
    for options in (["--model", model], ["--config", "mine.yaml"]):
        with pytest.raises(
            ValueError, match=r"--images expected --model DiffusionModule, .*, but got TextToImageModule"
        ):
            with_images(["fit", "--images", "pictures", *options])


def test_a_model_that_is_made_of_ours_trains_on_images():
    write("pictures", num=10)
    for model in ("DiffusionModule", "lightning_iet.DiffusionModule", f"{__name__}.Own", "no.such.Module"):
        assert with_images(["fit", "--images", "pictures", "--model", model])[1].startswith("10 images")


class Own(DiffusionModule):
    """As a user may write one."""


@pytest.fixture
def slow(monkeypatch):
    """A run on 40 images whose steps take 7 s: its epochs and what is said of it; ``slow.measured`` has the calls."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    write_pictures(Path("pictures"), [f"{number}.png" for number in range(40)])

    def measure(unet, batch_size, device):
        fit.measured.append((unet["sample_size"], batch_size, device.type))
        return 7.0

    def fit(*options):
        arguments, told = with_images(["fit", "--images", "pictures", *options], measure=measure)
        settings = json.loads(arguments[1].partition("=")[2])
        fit.batch_size, fit.judged = settings["data"]["init_args"]["batch_size"], settings["evaluation"]["num_samples"]
        return settings["trainer"]["max_epochs"], told

    fit.measured = []
    return fit


def store(folder, *, epochs, age=0):
    """A version of a run with its configuration and a checkpoint, so many seconds old."""
    checkpoint = Path(folder, "checkpoints", "last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    Path(folder, "config.yaml").write_text(f"trainer: {{max_epochs: {epochs}}}\n")
    checkpoint.touch()
    os.utime(checkpoint, (1e9 - age, 1e9 - age))


def test_a_run_that_would_take_hours_gets_the_epochs_of_an_hour(slow):
    usual, told = slow("--trainer.max_epochs=5")
    assert (usual, "hour" in told, slow.measured) == (5, False, [])  # a length that is given is not looked at
    epochs, told = slow("--trainer.accelerator=cpu")
    steps = -(-24 // slow.batch_size)  # 40 images, a fifth of which is held out twice
    assert slow.measured == [(8, slow.batch_size, "cpu")]
    sampling = slow.judged * 50 * 7 / 3 / slow.batch_size  # images, calls of the denoiser, a third of a step each
    assert epochs == epochs_within(LONGEST - sampling, step=7.0, steps_of_epoch=steps)
    assert 0.8 * LONGEST < 7 * steps * epochs + sampling <= LONGEST
    assert f"; {epochs} epochs, as many as take about an hour (--trainer.max_epochs " in told
    option = told.partition("(--")[2].partition(" trains on")[0].split()  # can be given as it is printed
    assert slow(f"--{option[0]}", option[1])[0] == int(option[1]) > epochs


def test_no_more_images_are_sampled_than_a_quarter_of_an_hour_allows(slow):
    held_out = "--data.num_control=16"  # four images for each, 64
    _, told = slow(held_out)
    of_one = 7 / 3 / slow.batch_size  # a call of the denoiser for an image
    assert 32 * 50 * of_one < 900 < 64 * 50 * of_one
    assert slow.judged == 32
    assert told.endswith("; judged by 32 images (--evaluation.num_samples 64 takes longer)")
    _, told = slow(held_out, "--evaluation.num_inference_steps=5")
    assert (slow.judged, "judged" in told) == (64, False)
    slow(held_out, "--evaluation.num_inference_steps=30", "--model.guidance_scale=3")  # two calls each
    assert slow.judged == 32
    steps = -(-16 // slow.batch_size)
    for number in (64, 0):  # what is asked for is taken
        epochs, told = slow(held_out, f"--evaluation.num_samples={number}")
        assert (slow.judged, "judged" in told) == (64, False)  # the option itself comes later
        assert epochs == epochs_within(LONGEST - number * 50 * of_one, step=7.0, steps_of_epoch=steps)
    _, told = slow(held_out, "--evaluation.num_samples=64", "--evaluation.num_inference_steps=200")
    assert "as many as take about half an hour without its evaluation (" in told


def test_an_hour_counts_every_evaluation(slow):
    for every, of_an_epoch in (("epochs=2", 1 / 2), ("steps=5", 24 / 5)):
        epochs, _ = slow(f"--evaluation.every_n_{every}", "--evaluation.num_inference_steps=4", "--data.batch_size=1")
        assert slow.judged == 32
        evaluation = 32 * 4 * 7 / 3
        per_epoch = 24 * 7 + of_an_epoch * evaluation
        assert epochs * per_epoch + evaluation <= LONGEST < (epochs + 1) * per_epoch + evaluation


def test_a_run_that_goes_on_is_judged_by_as_many_images(slow):
    held_out = "--data.num_control=16"
    store("runs/pictures/version_0", epochs=40, age=2)
    with Path("runs/pictures/version_0/config.yaml").open("a") as file:
        file.write("evaluation: {num_samples: 17}\n")
    assert slow(held_out, "--ckpt_path=last")[0] == 40
    assert slow.judged == 17
    store("runs/pictures/version_1", epochs=-1, age=1)  # its length was that of its steps
    with Path("runs/pictures/version_1/config.yaml").open("a") as file:
        file.write("evaluation: {num_samples: 64}\n")
    assert "judged" not in slow(held_out, "--ckpt_path=last")[1]
    assert slow.judged == 64
    store("runs/pictures/version_2", epochs=40)
    with Path("runs/pictures/version_2/config.yaml").open("a") as file:
        file.write("evaluation: {num_samples: 0}\n")  # which was to be quick; it is not mended by a word
    slow(held_out, "--ckpt_path=last")
    assert slow.judged == 64


def test_a_run_that_goes_on_keeps_its_length(slow):
    epochs, _ = slow()
    assert slow("--ckpt_path=last")[0] == epochs  # there is none yet
    store("runs/pictures/version_0", epochs=epochs - 20)
    assert slow("--ckpt_path", "last")[0] == epochs - 20  # however fast the machine is today
    store("runs/pictures/version_1", epochs=epochs - 40, age=9)
    assert slow("--ckpt_path=last")[0] == epochs - 20  # the newest checkpoint, not the newest version
    assert slow("--ckpt_path=runs/pictures/version_1")[0] == epochs - 40
    assert slow("--ckpt_path=runs/pictures/version_1/checkpoints/last.ckpt")[0] == epochs - 40
    store("elsewhere/mine/version_0", epochs=epochs - 60)
    assert slow("--ckpt_path=last", "--trainer.logger.save_dir=elsewhere", "--trainer.logger.name=mine")[0] == (
        epochs - 60
    )
    store("runs/pictures/fixed", epochs=epochs - 80)
    assert slow("--ckpt_path=last", "--trainer.logger.version=fixed")[0] == epochs - 80


def test_the_run_that_goes_on_is_found_wherever_its_checkpoints_are(slow, monkeypatch):
    epochs, _ = slow()
    store("mine", epochs=epochs - 20)
    assert slow("--ckpt_path=last", "--trainer.logger=false", "--trainer.default_root_dir=mine")[0] == epochs - 20
    store("there", epochs=epochs - 40)
    folder = "there/checkpoints"
    assert slow("--ckpt_path=last", f"--trainer.callbacks.init_args.dirpath={folder}")[0] == epochs - 40
    saving = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": folder}}
    Path("saving.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "Timer"}, saving]}}))
    assert slow("--ckpt_path=last", "--config=saving.yaml")[0] == epochs - 40
    Path("pictures").rename("there/checkpoints/pictures")
    monkeypatch.chdir(folder)
    assert slow("--ckpt_path=last.ckpt")[0] == epochs - 40  # whose configuration lies above this folder


def test_several_processes_do_not_measure_each_for_itself(slow, monkeypatch):
    alone, _ = slow()
    for options in ("--trainer.devices=2",), ("--trainer.devices=0,1",), ("--trainer.devices=[0, 1]",), (
        "--trainer.devices='2'",  # as YAML has a number that is written as text
    ), (
        "--trainer.num_nodes=2", "--trainer.devices=1",
    ):  # fmt: skip
        slow.measured.clear()
        epochs, told = slow("--trainer.accelerator=cpu", *options)
        assert (epochs > alone, slow.measured) == (True, [])
        assert f"; {epochs:,} epochs, which several processes do not fit to an hour" in told
    store("runs/pictures/version_0", epochs=alone)
    assert slow("--trainer.devices=2", "--ckpt_path=last")[0] == alone  # the same for all
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    assert slow()[0] == epochs


def test_the_number_that_is_trained_on_is_without_near_duplicates(caplog):
    write("pets", num=20, size=(8, 8))
    for number in range(20, 30):
        shutil.copy("pets/0.png", f"pets/{number}.png")
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    main(["fit", "--images", "pets", *FEW, "--trainer.max_epochs=1", "--trainer.fast_dev_run=1"])
    assert "30 images, 3 × 8 × 8: 18 to train on, 6 held out, 6 for FID; " in caplog.text
    (number,) = re.findall(r"; (\d+) images without near-duplicates; ", caplog.text)
    ((lie, groups),) = re.findall(r"(\d+) of 18 training images lie in (\d+) group", caplog.text)
    assert int(number) == 18 - int(lie) + int(groups) < 18


def test_from_a_folder_to_samples_with_what_is_installed(capsys, caplog, monkeypatch):
    monkeypatch.setattr("lightning_iet.metrics.features.find_spec", lambda name: None)  # no feature network
    for seed, name in enumerate("ab"):
        write(f"pets/{name}", num=12, size=(9, 11), seed=seed)
    monkeypatch.setattr("lightning_iet.cli.trainer.seconds_of_step", lambda *_: 1000.0)
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    every_second = ["--trainer.callbacks.init_args.every_n_epochs=2", "--trainer.check_val_every_n_epoch=2"]
    main(["fit", "--images", "pets", *FEW, *every_second, "--trainer.max_epochs=3"])
    table = capsys.readouterr().out
    assert "memorized" in table
    assert "No FID" in table
    assert "24 images, 3 × 8 × 8, 2 classes: 16 to train on, 4 held out, 4 for FID; " in caplog.text
    assert caplog.text.count("None of 16 training images are near-duplicates of one another.") == 1
    run = Path("runs/pets/version_0")
    assert (run / "duplicates.csv").read_text() == "group,images,name,kept_by_drop\n"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["init_args"]["root"] == "pets"
    assert saved["data"]["init_args"]["image_size"] == 8
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    # Though the last epoch is neither validated nor saved by the interval.
    assert torch.load(run / "checkpoints" / "last.ckpt")["epoch"] == 2
    # The first line names the size of a checkpoint, and the time of the steps; of a run that goes on, of those left.
    last = run / "checkpoints" / "last.ckpt"
    steps = torch.load(last)["global_step"]
    (size,) = re.findall(r"M parameters, ([\d.]+) MiB a checkpoint, ", caplog.text)
    assert float(size) == pytest.approx(last.stat().st_size / 2**20, rel=0.1)
    sampling = in_words(6 * 2 * 1000 / 3 / saved["data"]["init_args"]["batch_size"])
    last_words = f", and {sampling} to sample the 6 images that it is judged by\n"
    assert f"a checkpoint, about {in_words(1000 * steps)} of training here{last_words}" in caplog.text
    # The run goes on by the same command, and is repeated by its configuration.
    main(["fit", "--images", "pets", *FEW, "--trainer.max_epochs=4", "--ckpt_path", "last", PLAIN, *every_second])
    assert "Going on from" in caplog.text
    assert f"a checkpoint, about {in_words(1000 * steps // 3)} left to train here{last_words}" in caplog.text
    repeated = ["fit", "--config", str(run / "config.yaml"), "--trainer.logger.init_args.name=again", PLAIN]
    main(repeated)
    first, second = (
        load_any_module(Path(f"runs/{name}/version_0/checkpoints/last.ckpt")) for name in ("pets", "again")
    )
    assert all(one.equal(other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    capsys.readouterr()
    main(["sample", "runs/pets", "--num-samples", "3", "--out", "drawn", "--num-inference-steps", "2"])
    assert len(list(Path("drawn").glob("*.png"))) == 3
    assert {path.name for path in Path().iterdir()} == {"pets", "runs", "drawn"}
    main(["test", "--ckpt_path", "runs/pets"])
    assert "memorized" in capsys.readouterr().out
