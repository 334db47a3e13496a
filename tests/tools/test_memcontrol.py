"""The search by short runs of fit, on a network of a few thousand parameters."""

import json
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import optuna
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from lightning_iet import DiffusionModule, DigitsDataModule
from lightning_iet.callbacks.parameter_selection import ParameterSelection, read_mask, write_mask
from lightning_iet.cli import main
from lightning_iet.evaluation.assessment import Assessor
from lightning_iet.evaluation.measures import TextNorm
from lightning_iet.functional.parameter_groups import find_groups
from lightning_iet.metrics.frechet import frechet_distance
from lightning_iet.modules.adapters import Selection
from lightning_iet.modules.pipelines import synthetic_pipeline
from lightning_iet.search import Candidate
from lightning_iet.tools import memcontrol as module
from lightning_iet.tools.memcontrol import (
    Training,
    _beside_the_mask,
    _digest,
    _for_trials,
    _selection,
    figures_at,
    memcontrol,
)
from lightning_iet.utilities.configurations import import_exports
from tests.helpers.image_folders import write_images
from tests.helpers.state import undisturbed
from tests.helpers.unets import small_sd_unet

STUDIES = ("references", "masks")
BARE = "lightning.pytorch.demos.boring_classes.BoringDataModule"
QUICK = {"trials": 2, "max_steps": 4, "checkpoints": 2, "objectives": ["fid", "memorized_fraction"], "lr": [1e-3, 1e-3]}


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pretrained")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


def write_config(pretrained, **changes):
    """A configuration of fine-tuning, in this folder."""
    settings = {
        "seed_everything": 0,
        "model": {
            "class_path": "DiffusionModule",
            "init_args": {
                "pretrained": str(pretrained),
                "ema_decay": 0.5,
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}},
            },
        },
        "data": {
            "class_path": "DigitsDataModule",
            "init_args": {"classes": [8, 9], "num_train": 20, "num_control": 30, "batch_size": 10},
        },
        "evaluation": {"num_samples": 12, "num_inference_steps": 2, "k": 5},
        "trainer": {
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}],
        },
    }
    for name, change in changes.items():
        settings[name] = {**settings.get(name, {}), **change} if isinstance(change, dict) else change
    Path("finetune.yaml").write_text(yaml.safe_dump(settings))
    return Path("finetune.yaml")


@pytest.fixture
def config(pretrained, tmp_path, monkeypatch):
    """A configuration of fine-tuning, in an empty folder; ``config(trainer={…})`` writes another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])
    return partial(write_config, pretrained)


@pytest.fixture(scope="module")
def searched(pretrained, tmp_path_factory):
    """A search among groups of the configuration's, on images of which some repeat; and its folder, to be read.

    Its masks are those of all groups and of none.
    """
    folder = tmp_path_factory.mktemp("searched")
    options = QUICK | {"objectives": ["fid", "copied_fraction"], "subset": 12, "repeat": (6, 5), "enqueue": ["00"]}
    with undisturbed(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-iet"])
        file = write_config(pretrained, selection={"groups": {"conv": "conv_in|conv_out"}, "denoiser": "unet"})
        return memcontrol(file, family="svdiff", out=Path("search"), **options), folder


@pytest.mark.parametrize(("decay", "use_ema", "left"), [(0.999, True, "67%"), (0.999, False, ""), (0.99, True, "")])
def test_an_average_that_hardly_leaves_the_pretrained_weights_is_told(
    config, monkeypatch, capsys, decay, use_ema, left
):
    settings = yaml.safe_load(config(evaluation={"use_ema": use_ema}).read_text())
    settings["model"]["init_args"]["ema_decay"] = decay
    Path("finetune.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(module, "search_selection", lambda *args, **kwargs: SimpleNamespace(choice=None))
    memcontrol(Path("finetune.yaml"), family="all", out=Path("search"), **(QUICK | {"max_steps": 400}))
    said = capsys.readouterr().out
    assert ("are still the weights before training" in said) == bool(left)
    assert left in said


def test_a_search_from_the_command_line_and_the_use_of_its_mask(config, pretrained, capsys):
    options = ["--trials=1", "--max-steps=4", "--checkpoints=2"]
    selected = {"family": "difffit", "granularity": "attention", "mask": "101", "lora_rank": 8, "norm_lr_scale": 0.5}
    # Trials need not heed the number of epochs, nor the training with the mask either of both.
    file = str(config(trainer={"max_epochs": 1}, selection=selected))
    command = ["memcontrol", "--config", file, "--family", "bias", "--out", "search", "--lr", "1e-3", "1e-3"]
    command += ["--granularity", "block"]
    main([*command, *options, "--objectives", "eval/fid", "memorized_fraction"])
    said = capsys.readouterr().out
    assert "plain-0: all parameters at learning rate 0.001: fid" in said
    assert "epoch" not in said.partition("To train")[0].lower()  # what the trainings say goes to their logs
    groups = find_groups(UNet2DModel.from_pretrained(pretrained, subfolder="unet"), "bias")
    chosen = read_mask(Path("search/chosen.json"))
    chosen.check(groups)
    assert Path("search/report.html").is_file()
    trials = sorted(path.name for path in Path("search/trials").iterdir())
    assert trials[:3] == ["plain-0", "pretrained-1", "trial-000"]
    assert "output.log" in {path.name for path in Path("search/trials/plain-0").iterdir()}
    assert not list(Path("search").rglob("*.ckpt"))

    main([*command, *options, "--objectives", "fid", "memorized_fraction"])  # nothing is left to do
    again = capsys.readouterr().out
    assert "plain-0" not in again.split("Chosen")[0]

    program, *shown = shlex.split(said.partition("To train what was chosen: ")[2])
    assert (program, shown) == ("lightning-iet", shlex.split(again.partition("To train what was chosen: ")[2])[1:])
    main(shown)
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    trained = torch.load(checkpoint, weights_only=True)
    source = json.loads(Path("search/chosen.json").read_text())["source"]
    assert trained["global_step"] == source["step"]
    assert [group["lr"] for group in trained["optimizer_states"][0]["param_groups"]] == [source["learning_rate"]]
    state = trained["state_dict"]
    before = UNet2DModel.from_pretrained(pretrained, subfolder="unet").state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, state[f"unet.{name}"])}
    saved = next(part for name, part in trained["callbacks"].items() if name.startswith("ParameterSelection"))
    assert Selection(**saved) == chosen.selection  # what the configuration selects is undone
    mask = chosen.selection
    switches = groups.switches(mask.mask, rest=mask.rest)
    named = {group.name: group.parameters for group in groups.groups} | {"rest": groups.rest}
    trained = {name for group, on in switches.items() if on for name in named[group]}
    assert moved
    assert moved <= trained


@pytest.mark.parametrize(
    ("searched", "selected", "expected"),
    [
        (Selection("bias"), None, []),
        (Selection("bias"), {"family": "all", "lora_rank": 4, "denoiser": "unet", "bases": "x"}, []),
        (Selection("bias"), {"family": "bias", "mask": "1" * 12}, []),
        (Selection("bias"), {"family": "all", "mask": "01"}, ["mask=null"]),
        (
            Selection("bias", granularity="attention"),
            {"family": "lora", "granularity": "published", "lora_rank": 8, "lora_alpha": 2.0, "lora_targets": ["to_q"]},
            [
                "family=bias", "granularity=attention", "lora_rank=4", "lora_alpha=null",
                'lora_targets=["to_q", "to_k", "to_v", "to_out.0"]',
            ],
        ),
    ],
)  # fmt: skip
def test_only_options_that_the_mask_contradicts_stand_beside_it(pretrained, tmp_path, searched, selected, expected):
    groups = searched.find(UNet2DModel.from_pretrained(pretrained, subfolder="unet"))
    file = write_mask(tmp_path / "chosen.json", groups, selection=searched)
    words = _beside_the_mask({"selection": selected}, file)
    assert words == [f"--selection.{word}" for word in expected]
    kept = ParameterSelection(file=file, **_selected(selected, words)).selection
    assert kept == read_mask(file).selection


def _selected(selected, words):
    """Options of a configuration after those of a command line."""
    given = (word.removeprefix("--selection.").split("=", 1) for word in words)
    return {**(selected or {}), **{name: yaml.safe_load(value) for name, value in given}}


def test_a_search_of_an_earlier_version_goes_on():
    settings = _for_trials({"trainer": {"max_steps": 8, "accelerator": "gpu"}, "evaluation": {"k": 5}}, 4, 2)
    assert _digest(settings) == "b570eddc5822"  # as before trials ran on one device


def test_a_trial_is_the_run_that_its_configuration_says(searched, config):
    result, folder = searched
    point = next(p for p in result.points if p.candidate.mask == "11" and p.last)
    settings = yaml.safe_load((folder / "search/trials" / point.candidate.name / "trial.yaml").read_text())
    assert settings["selection"] | {"family": "svdiff", "mask": point.candidate.mask} == settings["selection"]
    assert settings["model"]["init_args"]["optimizer"]["init_args"]["lr"] == point.candidate.learning_rate
    settings["trainer"]["logger"]["init_args"] |= {"save_dir": str(Path.cwd()), "version": "again"}
    Path("again.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "--config", "again.yaml"])
    report = json.loads(Path("again/metrics.json").read_text())
    assert [entry["step"] for entry in report["course"]] == [2, 4]
    assert figures_at(report, report["course"][-1]) == {**point.figures, "step": 4}
    assert report["generated"]["fid"] == point.values[0]


def test_the_pretrained_network_is_measured_as_it_is(searched, pretrained):
    result, folder = searched
    point = next(p for p in result.references if p.candidate.kind == "pretrained")
    assert (point.step, point.trained) == (0, 0)
    digits = DigitsDataModule(12, num_control=30, classes=[8, 9], repeated_images=6, repeats=5)
    digits.setup("fit")
    sets = (digits.train_set, digits.control_set, digits.reference_set)
    assessor = Assessor(*sets, fid=frechet_distance("digits"), k=5, num_control=12)
    images = DiffusionModule(pretrained=str(pretrained)).sample(12, num_inference_steps=2, seed=0)
    assert point.values[0] == pytest.approx(assessor.assess(images).scores.fid, rel=1e-5)
    zeros = [p for p in result.points if "1" not in p.candidate.mask]
    assert zeros
    assert {p.values for p in zeros} == {point.values}
    plain = next(p for p in result.references if p.candidate.kind == "plain")
    assert plain.share == 1.0
    assert list((folder / "search/bases").iterdir())  # decompositions are kept from trial to trial


def test_options_of_the_selection_stay(searched):
    result, folder = searched
    assert result.groups == ("conv", "rest")
    assert read_mask(folder / "search/chosen.json").selection.groups == {"conv": "conv_in|conv_out"}


def test_the_search_of_the_paper_runs_on_a_pipeline_of_the_real_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextNorm, "TIMESTEPS", (0.5,))  # one calls the network as often as another
    pipeline = synthetic_pipeline(image_size=16, vae_scale=2)
    pipeline.unet = small_sd_unet()
    pipeline.save_pretrained("sd")
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for file in sorted(write_images(Path("images"), images).iterdir()):
        file.with_suffix(".txt").write_text(f"an image called {file.stem}")
    paper = Path(__file__).parents[2] / "configs" / "paper" / "memcontrol_sd15.yaml"
    settings = yaml.safe_load(paper.read_text())
    settings["model"]["init_args"] |= {"pretrained": "sd", "image_size": 16}
    small = {"image_size": 16, "batch_size": 4, "num_control": 4, "num_reference": 4, "num_workers": 0}
    settings["data"]["init_args"] |= {"root": "images"} | small
    Path("paper.yaml").write_text(yaml.safe_dump(settings))
    quick = {"trials": 1, "max_steps": 1, "checkpoints": 1, "lr": [1e-4, 1e-4], "out": Path("search")}
    with pytest.raises(ValueError, match=r"got num_samples 0. A search needs its figures: at least 2"):
        memcontrol(Path("paper.yaml"), **quick)
    settings["evaluation"] |= {"num_samples": 2, "num_inference_steps": 2, "k": 2, "features": "none"}
    settings["evaluation"]["measures"] = ["text_norm"]
    settings["trainer"] |= {"accelerator": "cpu", "precision": "32-true"}
    Path("paper.yaml").write_text(yaml.safe_dump(settings))
    result = memcontrol(Path("paper.yaml"), objectives=["memorized_fraction", "text_norm"], **quick)
    assert "1 mask of 1 step takes 6.67e-05 times the 15,000 steps of paper.yaml" in capsys.readouterr().out
    groups = find_groups(small_sd_unet(), "svdiff", granularity="published")
    assert result.groups == tuple(group.name for group in groups.groups)
    assert [(point.candidate.kind, point.candidate.mask) for point in result.all_points] == [
        ("mask", "1" * 13), ("plain", ""), ("pretrained", ""),
    ]  # fmt: skip
    assert result.points[0].trained == groups.count()
    chosen = read_mask(Path("search/chosen.json"))
    chosen.check(groups)
    known = {name: settings["selection"][name] for name in ("family", "granularity", "mask", "norm_lr_scale")}
    assert ParameterSelection(file=Path("search/chosen.json"), **known).selection == chosen.selection


def test_memorization_is_provoked_by_images_that_repeat(searched):
    result, folder = searched
    assert result.settings["repeated images"] == "6, 5 times"
    report = json.loads((folder / "search/trials/plain-0/metrics.json").read_text())
    assert report["data"]["num_train"] == 12 + 6 * 4
    trained = yaml.safe_load((folder / "search/trials/plain-0/trial.yaml").read_text())["data"]["init_args"]
    assert (trained["num_train"], trained["repeated_images"], trained["repeats"]) == (12, 6, 5)


def test_figures_of_an_evaluation():
    part = {
        "fid": 2.0, "memorized_fraction": 0.5, "copied_fraction": 0.25, "mq": {"0.3": 0.25},
        "further": {"membership_inference_auc": 0.7},
    }  # fmt: skip
    control = {
        "num_images": 98, "fid": 1.0, "memorized_fraction": 0.0, "copied_fraction": 0.0, "mq": {"0.3": 0.5},
        "further": {},
    }  # fmt: skip
    data = {"num_train": 20, "num_held_out": 900}
    found = figures_at({"control": control, "train": {"fid": None}, "data": data}, {"step": 7, **part})
    assert found["step"] == 7
    assert found["fid_train"] != found["fid_train"]
    assert (found["fid"], found["fid_control"], found["mq_0.3"], found["mq_0.3_control"]) == (2.0, 1.0, 0.25, 0.5)
    assert found["memorized_fraction_control_standard_error"] == pytest.approx((0.01 * 0.99 / 100) ** 0.5)
    assert found["mq_0.3_control_standard_error"] == pytest.approx(0.05)
    assert (found["membership_inference_auc"], found["membership_inference_auc_control"]) == (0.7, 0.5)
    error = found["membership_inference_auc_control_standard_error"]  # of 20 training and 512 held-out images
    generator = torch.Generator().manual_seed(0)
    aucs = [
        (torch.rand(20, 1, generator=generator) < torch.rand(512, generator=generator)).double().mean()
        for _ in range(2000)
    ]
    assert error == pytest.approx(float(torch.stack(aucs).std()), rel=0.06)  # of such AUCs without any difference


def test_a_candidate_becomes_a_configuration():
    settings = {
        "model": {"init_args": {"optimizer": {"init_args": {"lr": 1.0}}}}, "selection": {"family": "old"},
        "trainer": {"max_steps": 8}, "evaluation": {"every_n_steps": 4},
    }  # fmt: skip
    training = Training(settings, {"family": "bias"}, "model.init_args.optimizer.init_args.lr", Path("x"))
    masked, plain, untouched = (
        training.configuration(Candidate(kind, kind, mask, rate))
        for kind, mask, rate in (("mask", "01", 0.1), ("plain", "", 0.2), ("pretrained", "", 0.0))
    )
    assert masked["selection"] == {"family": "bias", "mask": "01"}
    assert "selection" not in plain
    rates = [c["model"]["init_args"]["optimizer"]["init_args"]["lr"] for c in (masked, plain, untouched)]
    assert rates == [0.1, 0.2, 0.0]
    assert (untouched["trainer"]["max_steps"], untouched["evaluation"]) == (1, {})
    assert settings["selection"] == {"family": "old"}


def test_trainings_that_fail_say_why(config, capsys):
    file = config(data={"init_args": {"num_train": 20, "num_control": 30, "batch_size": 10, "classes": [8]}})
    settings = yaml.safe_load(file.read_text())
    settings["evaluation"]["k"] = 50  # of 20 training images
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"the first 3 failed, .*at least k=50 images, but got 20.*trial-000\.log"):
        memcontrol(file, family="bias", out=Path("search"), **QUICK)
    with pytest.raises(SystemExit) as end:
        main(["memcontrol", "--config", str(file), "--family=bias", "--out=other", "--trials=1", "--max-steps=4"])
    assert end.value.code == 2


INTERRUPTS = """
import os, signal
from lightning.pytorch import Callback

class Interrupts(Callback):
    def __init__(self, number: int):
        self.number = number

    def on_train_batch_end(self, *args):
        os.kill(os.getpid(), self.number)
"""


@pytest.fixture
def _interrupts_heard():
    """A job that a shell puts into the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_search_and_fails_no_trial(config, number, tmp_path, monkeypatch):
    Path("interrupts.py").write_text(INTERRUPTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "interrupts", raising=False)
    callbacks = [{"class_path": "interrupts.Interrupts", "init_args": {"number": int(number)}}]
    file = config(trainer={"callbacks": callbacks})
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        memcontrol(file, family="bias", out=Path("search"), **QUICK)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # the next Ctrl-C is heard
    studies = [optuna.load_study(study_name=name, storage="sqlite:///search/search.db") for name in STUDIES]
    states = [trial.state.name for study in studies for trial in study.trials]
    assert set(states) == {"RUNNING", "WAITING"}  # RUNNING: given back, to be run again
    assert states.count("RUNNING") == 1


@pytest.mark.parametrize(
    ("known", "given", "expected"),
    [
        (None, (None, None), ("svdiff", "block")),
        ({"family": "difffit", "granularity": "published"}, (None, None), ("difffit", "published")),
        ({"family": "difffit", "granularity": "published"}, (None, "block"), ("difffit", "block")),
        ({"family": "difffit"}, ("bias", None), ("bias", "block")),
        ({"family": "all", "granularity": "block", "mask": None}, (None, None), ("svdiff", "block")),
        ({"family": "all", "mask": "01"}, (None, None), ("all", "block")),
        ({"family": None, "granularity": "attention"}, (None, None), ("svdiff", "attention")),
    ],
)
def test_what_is_not_given_is_that_of_the_configuration(known, given, expected):
    found = _selection({"selection": known}, *given)
    assert (found["family"], found["granularity"]) == expected
    assert not {"mask", "file"} & set(found)
    kept = _selection({"selection": {"file": "x.json", "bases": None, "denoiser": "unet"}}, None, None)
    assert kept == {"family": "svdiff", "granularity": "block", "bases": None, "denoiser": "unet"}


@pytest.mark.parametrize(("devices", "expected"), [(None, 1), ("auto", 1), (-1, 1), ("-1", 1), (1, 1), ([3], [3])])
def test_a_trial_runs_on_one_device(devices, expected):
    trainer = {} if devices is None else {"devices": devices}
    settings = _for_trials({"trainer": trainer, "evaluation": {}, "lr": 1.0}, 4, 2)
    assert settings["trainer"].get("devices") == devices  # by these a search knows whether it may go on
    training = Training(settings, {"family": "bias"}, "lr", Path("x"))
    for kind in ("mask", "plain", "pretrained"):
        assert training.configuration(Candidate(kind, kind, "01", 0.1))["trainer"]["devices"] == expected
        assert training.settings["trainer"].get("devices") == devices


def test_the_choice_of_a_best_checkpoint_is_no_part_of_a_trial(config):
    evaluation = {"every_n_epochs": 1, "keep_best": True, "patience": 2}
    file = config(evaluation=evaluation)
    trials = _for_trials(yaml.safe_load(file.read_text()), 4, 2)
    assert trials["evaluation"] == {
        "num_samples": 12, "num_inference_steps": 2, "k": 5, "every_n_steps": 2, "pictures": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"config": "none.yaml"}, "--config expected a file or the name of a configuration .* but got 'none.yaml'"),
        ({"model": {"init_args": {"pretrained": "x"}}}, {}, "no 'model.init_args.optimizer'. Write an optimizer"),
        ({}, {"lr_option": "model.init_args.rate"}, "no 'model.init_args.rate'"),
        ({"evaluation": {"num_samples": 0}}, {}, "expected an evaluation, but got num_samples 0"),
        ({}, {"max_steps": 5}, "of which the second divides the first, but got 5 and 2"),
        ({}, {"max_steps": None}, "`max_steps` expected an integer ≥ 1, but got none"),
        ({}, {"lr": [1e-3]}, "`lr` expected two numbers"),
        ({}, {"repeat": [3]}, "`repeat` expected two numbers"),
        ({}, {"repeat": [3, 0]}, r"no more that repeat than there are, but got None and \[3, 0\]"),
        ({}, {"repeat": [-1, 2]}, "no more that repeat than there are"),
        ({}, {"repeat": [9, 2], "subset": 8}, r"no more that repeat than there are, but got 8 and \[9, 2\]"),
        ({}, {"subset": 0}, "expected at least 1 image"),
        (
            {},
            {"repeat": [21, 2], "objectives": ["fid", "copied_fraction"]},
            "`repeat` expected no more images than the 20 that are trained on, but got 21",
        ),
        ({}, {"repeat": [3, 2]}, "memorized_fraction, which does not. Take copied_fraction"),
        (
            {"data": {"class_path": BARE, "init_args": {}}},
            {"repeat": [3, 2], "objectives": ["fid", "copied_fraction"]},
            "`repeat` expected a data module with options repeated_images, repeats, but got .*which has none",
        ),
        ({"data": {"class_path": BARE, "init_args": {}}}, {"subset": 3}, "with options subset or num_train, but got"),
        ({}, {"lr": [1e-3, 1e-5]}, "`lr` expected 0 < lowest ≤ highest"),
        ({}, {"algorithm": "grid"}, "`algorithm` expected one of"),
        ({}, {"family": "svd"}, "svd"),
        ({}, {"granularity": "published"}, "'published'"),
        ({}, {"enqueue": ["01"]}, "`enqueue` expected masks of 13 characters"),
        ({"selection": {"rest": True}}, {}, "expected no rest in `selection`, which .* but got True. Remove it"),
        ({"trainer": {"num_nodes": 2}}, {}, "expected trainer.num_nodes of 1, but got 2. A trial runs on one device"),
        ({"trainer": {"devices": 2}}, {}, r"expected one device \(trainer.devices\), but got 2. Trials share"),
        ({"trainer": {"devices": [0, 1]}}, {}, r"one device \(trainer.devices\), but got \[0, 1\]"),
        ({"averaging": {"num_shards": 2}}, {}, "num_shards of 1, but got 2. Search without shards, then train"),
        ({"selection": {"famly": "svdiff"}}, {}, "options of ParameterSelection in `selection`, but got {'famly'}"),
        ({}, {"objectives": ["fid"]}, "at least two figures"),
    ],
)
def test_bad_input_is_refused_before_the_first_training(config, changes, options, message):
    options = {"config": config(**changes), "family": "bias", "out": Path("search"), **QUICK, **options}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        memcontrol(**options)
    assert "\n" not in str(error.value)
    assert not Path("search/trials").exists()


def test_classes_are_imported_before_they_are_looked_for_by_name(monkeypatch):
    """Of a package with names that are imported when they are asked for; in a fresh process all are yet to come."""
    asked = []

    class Lazy:
        __all__ = ("A", "B")

        def __getattr__(self, name):
            asked.append(name)

    import_exports(Lazy(), Lazy())
    assert asked == ["A", "B"] * 2
    imported = []
    monkeypatch.setattr(module, "import_exports", lambda *packages: imported.extend(packages))
    module._parse(pl.LightningDataModule, "data", {"class_path": "DigitsDataModule"})
    assert [package.__name__ for package in imported] == ["lightning_iet.data", "lightning_iet.modules"]
    assert {"DiffusionModule", "DigitsDataModule"} <= {name for package in imported for name in package.__all__}


def test_a_file_that_is_no_configuration(config):
    for text, message in (("a: [", "expected YAML"), ("[1]", "with model and data"), ("model: 1", "with model")):
        Path("bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            memcontrol(Path("bad.yaml"))
