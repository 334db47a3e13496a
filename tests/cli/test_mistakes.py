"""Typical mistakes, and the line that each is answered with: what was wrong, and what to do."""

import os
import sys
from pathlib import Path

import pytest
import torch

from lightning_iet.cli import main
from tests.helpers.command_line import fails
from tests.helpers.pictures import write_pictures

DIGITS = ["fit", "--config", "digits/baseline"]
A_RUN = "model: {class_path: DiffusionModule}\ndata: {class_path: DigitsDataModule}\n"
MISTAKES = [
    # commands
    (["trian"], "There is no command 'trian'."),
    (["audti"], "There is no command 'audti'. Did you mean audit?"),
    (["train", "--images", "few"], "There is no command 'train'. Did you mean fit?"),
    (["training"], "There is no command 'training'. Did you mean fit?"),
    (["--config", "digits/baseline"], "Expected a command first, but got '--config', as in `lightning-iet fit"),
    # configurations
    (["fit"], "`fit` expected a configuration, but got none. Try `lightning-iet fit --config digits/iet_agc`"),
    (["fit", "--config"], "Option --config expected a file or a name, but got none."),
    (["fit", "--config", "--trainer.max_epochs", "1"], "Option --config expected a file or a name, but got none."),
    (["fit", "--config="], "Option --config expected a file or a name, but got none."),
    (["fit", "digits/baseline"], "Did you mean `lightning-iet fit --config digits/baseline`?"),
    (["fit", "few"], "Did you mean `lightning-iet fit --images few`?"),
    (["test", "few"], "Did you mean `lightning-iet test --ckpt_path RUN_FOLDER`?"),
    (["test", "run"], "Did you mean `lightning-iet test --ckpt_path run`?"),
    (["validate", "run/version_0/checkpoints/last.ckpt"], "--ckpt_path run/version_0/checkpoints/last.ckpt`?"),
    (["test", "gone.ckpt"], "Did you mean `lightning-iet test --config CONFIG --ckpt_path gone.ckpt`?"),
    (["validate", "runs/x/epoch=9-step=90.ckpt"], "--config CONFIG --ckpt_path runs/x/epoch=9-step=90.ckpt`?"),
    (["validate", "epoch=9-step=90.ckpt"], "--config CONFIG --ckpt_path epoch=9-step=90.ckpt`?"),
    (["validate", "ckpt_path=gone.ckpt"], "Did you mean `lightning-iet validate --ckpt_path=gone.ckpt`?"),
    (["fit", "few=2"], "Did you mean `lightning-iet fit --images few=2`?"),
    (["fit", "run"], "/run/version_0/config.yaml --ckpt_path run`?"),
    (["test", "digits/iet"], "`lightning-iet test --config digits/iet --ckpt_path RUN_FOLDER`?"),
    (["test"], "expected a trained model, but got none. Try `lightning-iet test --ckpt_path RUN_FOLDER`."),
    (["test", "--ckpt_path"], "Option --ckpt_path expected a checkpoint or the folder of a run, but got none."),
    (["test", "--ckpt_path", "gone.ckpt"], "and the checkpoint has no config.yaml beside it."),
    (["test", "--config", "digits/baseline"], "`test` expected a trained model, but got none: --ckpt_path RUN_FOLDER."),
    (["fit", "--config", "digits/iet_acg"], "but got 'digits/iet_acg'. Did you mean digits/iet_agc?"),
    (["fit", "--config", "text.yaml"], "Option --config expected"),
    (["fit", "--config", "class.yaml"], "but got 'DiffusionModul'. Did you mean DiffusionModule?"),
    (["fit", "--config", "key.yaml"], "option `modell`. Did you mean --model? It stands in key.yaml, line 1."),
    (["fit", "--config=group.yaml"], "Did you mean --agc.threshold? It stands in group.yaml, line 3."),
    (["fit", "--config", "inner.yaml"], "It stands in inner.yaml, line 5."),
    (["fit", "--config", "digits/iet", "--config", "nested.yaml"], "It stands in nested.yaml, line 2."),
    # options
    ([*DIGITS, "--agc.treshold", "1"], "There is no option --agc.treshold. Did you mean --agc.threshold?"),
    ([*DIGITS, "--treshold", "1"], "There is no option --treshold. Did you mean --agc.threshold?"),
    ([*DIGITS, "--seed", "1"], "There is no option --seed. Did you mean --seed_everything?"),
    ([*DIGITS, "--epochs", "3"], "There is no option --epochs. Did you mean --trainer.max_epochs?"),
    ([*DIGITS, "--lr", "0.1"], "There is no option --lr. Did you mean --model.optimizer.init_args.lr?"),
    ([*DIGITS, "--resume", "last"], "There is no option --resume. Did you mean --ckpt_path?"),
    ([*DIGITS, "--out", "here"], "There is no option --out. Did you mean --trainer.logger.save_dir?"),
    ([*DIGITS, "--trainer.accelerator", "gpuu"], "but got 'gpuu' and 'auto'. Leave both out to take what is there."),
    ([*DIGITS, "--trainer.devices", "0"], "but got 'cpu' and '0'. Leave both out to take what is there."),
    ([*DIGITS, "--trainer.devices", "-1"], "but got 'cpu' and '-1'. Leave both out to take what is there."),
    ([*DIGITS, "--trainer.devices=5", "--averaging.num_shards=4"], "a divisor of the 5 processes, but got 4"),
    ([*DIGITS, "--trainer.strategy", "fsdp"], "with accelerator 'cpu' (this machine has"),
    ([*DIGITS, "--trainer.logger.prefi-x", "a"], "There is no option"),
    ([*DIGITS, "--trainer.precision", "fp8"], "bf16-mixed, 32-true"),
    ([*DIGITS, "--trainer.logger", "wandb"], "Did you mean lightning.pytorch.loggers.WandbLogger?"),
    ([*DIGITS, "--trainer.max_epochs"], "Option --trainer.max_epochs expected a value behind it, but got none."),
    ([*DIGITS, "--evaluation.measures", "mifid,kid"], "expected a list, such as [a,b], but got 'mifid,kid'."),
    ([*DIGITS, "--data", "few"], "but got 'few'. Give a folder of images with --images."),
    ([*DIGITS, "--data.root", "few"], "Option --data.root does not belong to the class in the configuration."),
    ([*DIGITS, "--trainer.max_epoch", "3"], "Did you mean --trainer.max_epochs?"),
    ([*DIGITS, "--model.ema_deca", "0.9"], "There is no option `ema_deca`. Did you mean --model.ema_decay?"),
    ([*DIGITS, "--trainer.max_epochs", "three"], "--trainer.max_epochs expected an integer or null, but got 'three'."),
    ([*DIGITS, "--agc.threshold", "high"], "Option --agc.threshold expected a number, but got 'high'."),
    ([*DIGITS, "--agc.threshold", "2"], "Option --agc.threshold expected a number in [0, 1], but got 2"),
    ([*DIGITS, "--data.num_train", "many"], "Option --data.num_train expected an integer, but got 'many'."),
    ([*DIGITS, "--data.num_train", "5000"], "of the 1,797 digits for FID, but got 5,000 and 512."),
    ([*DIGITS, "--evaluation.measures=[precision]"], "Did you mean precision_recall?"),
    ([*DIGITS, "--evaluation.features", "digit"], "Option --evaluation.features expected"),
    ([*DIGITS, "--model.unet.init_args.norm_num_groups=5"], "diffusers.UNet2DModel cannot be built"),
    ([*DIGITS, "--model.optimizer", "Adm"], "Did you mean torch.optim.Adam?"),
    ([*DIGITS, "folder"], "There is no place for 'folder': options begin with --."),
    ([*DIGITS, "--ckpt_path", "empty"], "expected a checkpoint or the folder of a run, but got 'empty'"),
    # images of one's own
    (["fit", "--images", "nowhere"], "Option --images expected a folder of images"),
    (["fit", "--images", "empty"], "'empty'"),
    (["fit", "--images", "few"], "Option --images expected at least 10 images"),
    (["fit", "--config", "images"], "Option --images expected a folder of images, but got none."),
    (["fit", "--image", "few"], "There is no option --image. Did you mean --images?"),
    (["plan", "--image=few"], "There is no option --image. Did you mean --images?"),
    (["fit", "--confg", "digits/iet"], "There is no option --confg. Did you mean --config?"),
    (["test", "--ckpt-pth", "run"], "There is no option --ckpt_pth. Did you mean --ckpt_path?"),
    ([*DIGITS, "--image", "few"], "There is no option --image. Did you mean --images?"),
    ([*DIGITS, "--images", "few"], "but got one with DigitsDataModule. Leave out one of --config and --images."),
    # tools
    (["sample", "empty"], "Option --ckpt expected a checkpoint or the folder of a run, but got 'empty'"),
    (["sample"], "Option --ckpt is missing."),
    (["sample", "--ckpt_path", "empty"], "Option --ckpt expected a checkpoint or the folder of a run, but got 'empty'"),
    (["export", "--ckpt-path=empty", "--out", "o"], "Option --ckpt expected a checkpoint or the folder of a run, but"),
    (["sample", "whole.ckpt", "--num-samples", "0", "--out", "drawn"], "--num-samples expected an integer ≥ 1"),
    (["sample", "whole.ckpt", "--batch-size", "0"], "Option --batch-size expected an integer ≥ 1, but got 0."),
    (["audit-model", "whole.ckpt", "--train", "few"], "--ckpt expected a checkpoint of `lightning-iet fit`, but got"),
    (["sample", "whole.ckpt"], "it does not say what its model is. A pipeline of diffusers can be audited with"),
    (["export", "runs", "--out", "o"], "no checkpoint itself, but the runs runs/one, runs/two/three. Give one of"),
    (["sample", "pipeline"], "which holds a pipeline of diffusers and no checkpoint. Load it with diffusers, or audit"),
    (["sample", "runs/one"], "is cut off or no checkpoint. Use the one before it: runs/one/checkpoints/a.ckpt."),
    (["sample", "text.yaml", "--num-samples", "many"], "Option --num-samples expected an integer, but got 'many'."),
    (["audit", "--generated", "few", "--train", "few", "--no-images"], "Did you mean --no-show-images?"),
    (["audit", "--generated", "few", "--train", "more", "--features", "resnet"], "Option --features expected 'pixels'"),
    (
        ["audit", "--generated", "few", "--train", "more", "--fail-on-copies", "-held-out", "few"],
        "There is no option -held-out. Did you mean --held-out?",
    ),
    (["audit"], "Options --generated and --train are missing."),
    (["audit-model"], "Options --ckpt and --pipeline expected one of them"),
    (["inspect", "--train", "empty"], "Option --train expected images, but got 'empty', which holds none"),
    ([*DIGITS, "--resize", "64"], "There is no option --resize. Did you mean --data.image_size?"),
    (["inspect", "--train", "few", "--image-size", "64,48"], "a size such as 64 or 64x48 (width x height), but got"),
    (["compare"], "`lightning-iet compare` expected one or more RUNS, but got none."),
    (["memcontrol", "--config", "digits/finetune", "--sampler", "tpe"], "Did you mean --algorithm?"),
    (["memcontrol", "--config", "digits/finetune", "--steps", "5"], "Did you mean --max-steps?"),
    (["demo", "--epochs", "5"], "Did you mean --max-epochs?"),
    (["audit", "--generated", "few", "--train", "few", "--helout", "few"], "Did you mean --held-out?"),
    (["audit", "--generated", "few"], "Option --train is missing."),
    (["audit", "--generated", "few", "--train", "nowhere", "--held-out", "few"], "'nowhere', which does not exist"),
    (["compare", "empty"], "but got 'empty' without a metrics.json"),
    # wrong types, and files that are something else
    (["fit", "--config", "types.yaml"], "Option --trainer.max_epochs expected an integer or null, but got 'ten'."),
    (["fit", "--config", "list.yaml"], "Option --model expected a class, as class_path and init_args, but got '[1]'."),
    (["fit", "--config", "empty.yaml"], "expected a mapping in YAML, but got 'empty.yaml' with None."),
    (["fit", "--config", "tabs.yaml"], "that cannot start any token (line 2, column 1)"),
    (["fit", "--config", "flat.yaml"], "There is no option `agc.treshold`. Did you mean --agc.threshold?"),
    (["fit", "--config", "few"], "but got the folder 'few'. Did you mean --images few?"),
    (["fit", "--config", "few/a.png"], "Option --config expected YAML, but got 'few/a.png'"),
    (["fit", "--config", "iet_agc"], "Did you mean digits/iet_agc?"),
    (["fit", "-config", "digits/iet_agc"], "There is no option -config. Did you mean --config?"),
    (["fit", "-images", "few"], "There is no option -images. Did you mean --images?"),
    (["fit", "-cgone.yaml"], "that comes with the package, but got 'gone.yaml'"),
    (["audit", "-generated", "few"], "There is no option -generated. Did you mean --generated?"),
    ([*DIGITS, "-lr", "3"], "There is no option -lr. Did you mean --model.optimizer.init_args.lr?"),
    ([*DIGITS, "--agc.threshold", "-Infinity"], "Option --agc.threshold expected"),
    (["fit", "config=digits/iet_agc"], "Did you mean `lightning-iet fit --config=digits/iet_agc`?"),
    (["fit", "help"], "Did you mean `lightning-iet fit --help`?"),
    ([*DIGITS, "--agc", "0.5"], "Option --agc has options of its own, --agc.…, but got '0.5'."),
    ([*DIGITS, "--agc.threshold="], "Option --agc.threshold expected a number, but got ''."),
    ([*DIGITS, "--agc.threshold", "0,5"], "Option --agc.threshold expected a number, but got '0,5'."),
    ([*DIGITS, "--agc.eta", "0.03"], "Option --agc.eta expected None with criterion='ratio', which does not use it"),
    ([*DIGITS, "--redistribution.fraction", "0.25"], "Option --redistribution.fraction expected 0 with 1 shard"),
    ([*DIGITS, "--data.classes", "[1,2"], "Option --data.classes expected a list, such as [a,b] or null"),
    ([*DIGITS, "--data.classes=[11]"], "Option --data.classes expected digits from 0 to 9, at least one"),
    ([*DIGITS, "--data", "DiffusionModule"], "--data expected a class of another kind, but got 'DiffusionModule'"),
    ([*DIGITS, "--data", "ImageFolderDataModule"], "Option --data.root expected a folder of images, but got None."),
    ([*DIGITS, "--trainer.logger.save_dir", "text.yaml"], "Give another folder: --trainer.logger.save_dir"),
    ([*DIGITS, "--ckpt_path", "text.yaml"], "Option --ckpt_path expected a whole checkpoint, but got 'text.yaml'"),
    ([*DIGITS, "--evaluation.features", "sscd"], "--evaluation.feature_weights expected SSCD's TorchScript file"),
    ([*DIGITS, "--evaluation.num_samples", "1"], "Option --evaluation.num_samples expected an integer ≥ 2"),
    ([*DIGITS, "--evaluation.seed", "-1"], "Option --evaluation.seed expected an integer ≥ 0, but got -1."),
    ([*DIGITS, "--model.optimizer.init_args.lr", "fast"], "--model.optimizer.init_args.lr expected a number"),
    ([*DIGITS, "--model.unet.init_args.sample_size", "eight"], "sample_size expected an integer or a list"),
    (["fit", "--images", "few/a.png"], "but got 'few/a.png', which is no folder. Check the path."),
    (["fit", "--images", "texts"], "Option --images expected a folder of images, but got 'texts', which holds none."),
    (["fit", "--images", "sp ace/Öl"], "at least 10 images, some of which are held out, but got 'sp ace/Öl' with 1."),
    (["sample", "run"], "Option --ckpt expected a whole checkpoint, but got 'run/version_0/checkpoints/last.ckpt'"),
    (["export", "run", "--out", "few"], "--out expected a new folder, but got 'few', which holds other files, among "
     "them 'a.png'. Give another one with --out."),
    (["audit", "--generated", "few", "--train", "few"], "Option --train expected other images than --generated"),
    (["audit", "--generated", "few", "--train", "sp ace/Öl"], "at least k = 2 images, but got 1. Add images."),
    (["audit", "--generated", "few/a.png", "--train", "more"], "which cannot be read (it is no folder, .npy"),
    (["audit", "--generated", "few", "--train", "more", "--fit", "pad"], "Option --fit expected one of stretch, crop"),
    (["compare", "text.yaml"], "RUNS expected a metrics.json written by `lightning-iet fit`, but got 'text.yaml'"),
    (["sweep", "few"], "FILES expected files of sweeps, but got 'few', which is a folder."),
    (["sweep", "class.yaml"], "but got `model`. Remove it."),
    (["memcontrol", "--config", "digits/finetune", "--trials", "0"], "--trials expected an integer ≥ 1, but got 0."),
    (["memcontrol", "--config", "digits/finetune", "--lr", "1e-3", "1e-5"], "Option --lr expected 0 < lowest ≤"),
    (["memcontrol", "--config", "digits/finetune", "--trials", "2"], "`pretrained` of the configuration expected a"),
    (["demo", "--out", "text.yaml"], "Option --out expected a folder that can be written, but got 'text.yaml'"),
    (["inspect", "--images", "few"], "There is no option --images. Did you mean --train?"),
    (["configs", "digits/iet_agc", "--out", "text.yaml"], "Option --out expected a new file, but got 'text.yaml'"),
    (["plan", "--config", "digits/baseline", "--measure_steps", "-1"], "--measure_steps expected an integer ≥ 0"),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["lightning-iet"])
        Path("empty").mkdir()
        Path("text.yaml").write_text("hello")
        Path("key.yaml").write_text("modell: 3\n")
        Path("group.yaml").write_text(f"{A_RUN}agcc: {{threshold: 0.5}}\n")
        Path("inner.yaml").write_text(f"{A_RUN}\nagc:\n  treshold: 0.5\n")
        Path("nested.yaml").write_text("model:\n  ema_deca: 0.9\n")
        Path("class.yaml").write_text(A_RUN.replace("DiffusionModule", "DiffusionModul"))
        Path("types.yaml").write_text(f"{A_RUN}trainer: {{max_epochs: ten}}\n")
        Path("list.yaml").write_text("model: [1]\ndata: {class_path: DigitsDataModule}\n")
        Path("empty.yaml").touch()
        Path("tabs.yaml").write_text("trainer:\n\tmax_epochs: 3\n")
        Path("flat.yaml").write_text("trainer.max_epochs: 3\nagc.treshold: 2\n")
        Path("run/version_0/checkpoints").mkdir(parents=True)
        Path("run/version_0/config.yaml").touch()
        Path("run/version_0/checkpoints/last.ckpt").touch()
        torch.save({"state_dict": {}}, "whole.ckpt")
        for run in ("runs/one", "runs/two/three"):
            Path(run, "checkpoints").mkdir(parents=True)
            torch.save({"state_dict": {}}, f"{run}/checkpoints/a.ckpt")
            Path(run, "checkpoints/last.ckpt").touch()
        Path("pipeline").mkdir()
        Path("pipeline/model_index.json").touch()
        write_pictures(Path("few"), ["a.png", "b.png"])
        Path("few=2").mkdir()
        write_pictures(Path("more"), ["c.png", "d.png"])
        write_pictures(Path("sp ace/Öl"), ["ä b.png"])
        Path("texts").mkdir()
        Path("texts/notes.txt").write_text("hello")
        yield


@pytest.mark.parametrize(("arguments", "answer"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_answered_in_one_line_and_leaves_nothing(arguments, answer, capsys):
    before = set(Path().rglob("*"))
    state = torch.random.get_rng_state()
    error = fails(capsys, *arguments)
    torch.random.set_rng_state(state)
    assert answer in error
    assert "Argument" not in error  # a user types options
    assert len(error) < 500
    assert "LIGHTNING_IET_TRACEBACK" not in error  # of use where nobody expected the error
    assert set(Path().rglob("*")) == before


def test_a_fault_of_lightning_that_is_about_no_option_keeps_its_words(capsys):
    error = fails(capsys, *DIGITS, "--trainer.strategy", "ddp_magic")
    assert "invalid strategy name" in error
    assert "accelerator" not in error


def test_a_typing_error_is_followed_by_the_list_of_commands(capsys):
    with pytest.raises(SystemExit):
        main(["trian"])
    error = capsys.readouterr().err
    assert "  fit " in error
    assert "  audit-model " in error


def test_more_processes_than_cores_are_told_before_what_is_wrong_with_them(capsys, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("lightning_iet.cli.trainer.rank_zero_info", told.append)
    many = (os.cpu_count() or 1) + 1
    fails(capsys, *DIGITS, f"--trainer.devices={many}", f"--averaging.num_shards={many + 1}")
    assert f"{many} processes (--trainer.devices) share the {many - 1} core" in told[0]
