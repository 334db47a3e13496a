"""Every configuration under configs/ runs, and means what it says."""

import sys
from math import ceil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from lightning_iet.cli import main

FOLDER = Path(__file__).parents[1] / "configs"
# Sweeps, and what is found from a folder of images, have tests of their own.
CONFIGS = [path for path in sorted(FOLDER.glob("**/*.yaml")) if path.parent.name in ("digits", "paper")]
PAPER = sorted(FOLDER.glob("paper/*.yaml"))

# The U-Net of google/ddpm-cifar10-32, as it was published.
DDPM_CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def name(config):
    return "/".join(config.parts[-2:])


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])


# That whose plots are made, of repeated images.
DRAWN = {"digits/uneven_record.yaml"}


def quick(config):
    """Overrides that make a run of seconds out of a configuration of the paper: other widths, the same shape."""
    if config not in PAPER:
        return []
    settings = yaml.safe_load(config.read_text())
    overrides = ["--data.synthetic=true", "--data.num_workers=0", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    if settings["model"]["class_path"] == "DiffusionModule":
        levels = len(settings["model"]["init_args"]["unet"]["init_args"]["block_out_channels"])
        unet = {"block_out_channels": [4] * levels, "norm_num_groups": 2, "layers_per_block": 1}
        overrides += [f"--model.unet.init_args.{key}={value}" for key, value in unet.items()]
    else:
        overrides += ["--model.image_size=32", "--data.image_size=32"]
    if "selection" in settings:  # the tiny pipeline has other blocks than those that are published
        overrides += ["--selection.granularity=block", "--trainer.precision=32-true"]
    return overrides


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """What digits/pretrain.yaml and `export` leave, with random weights."""
    settings = yaml.safe_load((FOLDER / "digits" / "pretrain.yaml").read_text())
    folder = tmp_path_factory.mktemp("pretrained")
    unet = UNet2DModel(**settings["model"]["init_args"]["unet"]["init_args"])
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


# Of the paper's methods one or two on each data set: a run by its length in steps or in epochs, one with shards or with
# all methods, and the one that moves samples within classes. What the others say is the same but for figures, see
# `test_runs_on_a_data_set_differ_in_the_methods_alone` and the two tests behind it.
METHODS = ("baseline", "agc", "iet", "iet_agc", "iet_agc_plus")
ALIKE = {
    f"{data}_{method}"
    for data, run in {
        "cifar10": ("iet_agc_plus", "baseline"),
        "cifar100": ("iet_agc_plus",),
        "afhq_dog": ("iet",),
        "laion10k": ("iet_agc",),
    }.items()
    for method in set(METHODS) - set(run)
}
# These train two epochs of digits in tests/cli/test_trainer.py, test_anchored.py, and tests/search/test_wandb.py.
LONGER = {"baseline", "iet", "iet_agc", "anchored_agc", "iet_anchored_agc", "agc"}


# Of a few synthetic images a quarter of each class in each shard is none; of CIFAR-100's 50 it is 12.
@pytest.mark.filterwarnings("ignore:Redistribution moves nothing.*:UserWarning")
@pytest.mark.parametrize("config", [config for config in CONFIGS if config.stem not in ALIKE | LONGER], ids=name)
def test_every_configuration_runs(config, pretrained):
    overrides = quick(config)
    if str(yaml.safe_load(config.read_text())["model"]["init_args"].get("pretrained")).startswith("runs/"):
        overrides.append(f"--model.pretrained={pretrained}")
    overrides.append(f"--evaluation.pictures={name(config) in DRAWN}")
    main(["fit", "--config", str(config), "--trainer.fast_dev_run=1", *overrides])
    assert not [path for path in Path().rglob("*") if path.is_file()]


# What fails is the parser: one file of each kind shows it.
@pytest.mark.parametrize(
    "config", [config for config in CONFIGS if config.stem in ("baseline", "laion10k_baseline")], ids=name
)
def test_a_misspelt_key_fails(config, capsys):
    for group, key in (("trainer", "max_epochs"), ("agc", "threshold")):
        settings = yaml.safe_load(config.read_text())
        settings[group][f"{key}_"] = settings[group].pop(key)
        Path("wrong.yaml").write_text(yaml.safe_dump(settings))
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", "wrong.yaml"])
        assert stop.value.code == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert f"{key}_" in error


# --- what the configurations of the paper say -------------------------------------------------------------------------


def settings_of(stem):
    return yaml.safe_load((FOLDER / "paper" / f"{stem}.yaml").read_text())


def test_the_unet_of_cifar10_is_the_published_one():
    ours = UNet2DModel(**settings_of("cifar10_iet_agc")["model"]["init_args"]["unet"]["init_args"]).eval()
    theirs = UNet2DModel(**DDPM_CIFAR10).eval()
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    theirs.load_state_dict(ours.state_dict())
    images, timesteps = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(ours(images, timesteps).sample, theirs(images, timesteps).sample)
    # DDPM trains with dropout, which a published configuration without training does not say.
    assert {key: ours.config[key] for key in DDPM_CIFAR10} == DDPM_CIFAR10
    assert ours.config.dropout == 0.1


def test_the_other_networks_differ_from_it_as_published():
    cifar10, cifar100, dogs = (
        settings_of(f"{data}_iet_agc")["model"]["init_args"]["unet"]["init_args"]
        for data in ("cifar10", "cifar100", "afhq_dog")
    )
    assert cifar100 == cifar10 | {"num_class_embeds": 100}
    multipliers = [channels // 128 for channels in dogs["block_out_channels"]]
    assert multipliers == [1, 2, 2, 2, 4]
    for blocks, size in (("down_block_types", 64), ("up_block_types", 4)):
        step = 0.5 if size == 64 else 2
        attending = [size * step**level for level, kind in enumerate(dogs[blocks]) if kind.startswith("Attn")]
        assert attending == [16]


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "afhq_dog"])
def test_runs_on_a_data_set_differ_in_the_methods_alone(data):
    shards = {"iet": (10, 0.0), "agc": (1, 0.5), "iet_agc": (10, 0.5), "baseline": (1, 0.0)}
    rest = []
    for method, (num_shards, threshold) in shards.items():
        settings = settings_of(f"{data}_{method}")
        assert settings["averaging"].pop("num_shards") == num_shards
        assert settings["agc"].pop("threshold") == threshold
        trainer, model = settings["trainer"], settings["model"]["init_args"]
        assert trainer["logger"]["init_args"].pop("name") == f"paper/{data}_{method}"
        # Length and warm-up are counted in steps of a shard, or of the whole.
        length = (trainer.pop("max_epochs"), trainer.pop("max_steps", -1), model.pop("warmup_steps"))
        epochs, warmup, warmup_of_shards = {"afhq_dog": (2400, 1185, 120)}.get(data, (1000, 5865, 600))
        assert length == ((epochs, -1, warmup_of_shards) if num_shards > 1 else (-1, 400_000, warmup))
        checkpointing = trainer["callbacks"][0]["init_args"]
        assert checkpointing.pop("every_n_epochs", None) or checkpointing.pop("every_n_train_steps")
        rest.append(settings)
    assert all(settings == rest[0] for settings in rest)


def test_runs_of_fine_tuning_differ_in_the_methods_alone():
    shards = {"iet": (4, 0.0), "agc": (1, 0.8), "iet_agc": (4, 0.8), "baseline": (1, 0.0)}
    rest = []
    for method, (num_shards, threshold) in shards.items():
        settings = settings_of(f"laion10k_{method}")
        assert settings["averaging"].pop("num_shards") == num_shards
        assert settings["agc"].pop("threshold") == threshold
        assert settings["trainer"]["logger"]["init_args"].pop("name") == f"paper/laion10k_{method}"
        rest.append(settings)
    assert all(settings == rest[0] for settings in rest)


def test_the_further_methods_are_the_same_on_each_data_set():
    added = settings_of("cifar10_iet_agc_plus")
    for data in ("cifar10", "cifar100", "afhq_dog", "laion10k"):
        without, plus = settings_of(f"{data}_iet_agc"), settings_of(f"{data}_iet_agc_plus")
        within = plus["redistribution"].pop("within")
        assert within == ("class" if data == "cifar100" else "shard")
        assert plus.pop("redistribution") | {"within": "shard"} == added["redistribution"]
        assert plus.pop("augmentation") == added["augmentation"]
        assert plus["trainer"]["logger"]["init_args"].pop("name") == f"paper/{data}_iet_agc_plus"
        assert without["trainer"]["logger"]["init_args"].pop("name") == f"paper/{data}_iet_agc"
        assert plus == without


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_run_keeps_one_checkpoint(path):
    """Two of one step take twice the room: a file of a large model holds 14 GB."""
    callbacks = (yaml.safe_load(path.read_text()).get("trainer") or {}).get("callbacks") or []
    saving = [one["init_args"] for one in callbacks if one["class_path"].endswith(".ModelCheckpoint")]
    assert all(one.get("filename") == "last" and "save_last" not in one for one in saving)


def at(settings, path):
    for key in path.split("."):
        settings = settings[key]
    return settings


PUBLISHED = {  # what METHODS of the paper says of all runs from scratch
    "model.init_args.scheduler.init_args.beta_start": 1e-4,
    "model.init_args.scheduler.init_args.beta_end": 0.02,
    "model.init_args.scheduler.init_args.beta_schedule": "linear",
    "model.init_args.scheduler.init_args.num_train_timesteps": 1000,
    "model.init_args.scheduler.init_args.prediction_type": "epsilon",
    "model.init_args.optimizer.class_path": "torch.optim.Adam",
    "model.init_args.optimizer.init_args.lr": 2e-4,
    "model.init_args.ema_decay": 0.9999,
    "model.init_args.unet.init_args.dropout": 0.1,
    "trainer.gradient_clip_val": 1.0,
    "data.init_args.flip": True,
    "agc.decay": 0.8,
    "agc.num_timesteps": 1000,
    "evaluation.k": 50,
}
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "afhq_dog": 4_739}


@pytest.mark.parametrize(
    "config", [path for path in PAPER if not path.stem.startswith(("laion", "memcontrol"))], ids=name
)
def test_figures_are_those_that_were_published(config):
    settings = yaml.safe_load(config.read_text())
    assert {path: at(settings, path) for path in PUBLISHED} == PUBLISHED
    data = next(known for known in sorted(IMAGES, key=len, reverse=True) if config.stem.startswith(known))
    method = config.stem.removeprefix(f"{data}_")
    batch = {"cifar10": 128, "cifar100": 128, "afhq_dog": 60}[data]
    assert at(settings, "data.init_args.batch_size") == batch
    assert at(settings, "agc.threshold") == (0.5 if "agc" in method else 0)
    assert at(settings, "averaging.num_shards") == (10 if "iet" in method else 1)
    if "iet" in method:
        steps = ceil(IMAGES[data] / 10 / batch)
        assert at(settings, "model.init_args.warmup_steps") == 15 * steps
        assert at(settings, "averaging.every_n_epochs") == 100
        assert at(settings, "trainer.max_epochs") == (2400 if data == "afhq_dog" else 1000)
    else:
        assert at(settings, "model.init_args.warmup_steps") == 15 * ceil(IMAGES[data] / batch)
        assert at(settings, "trainer.max_steps") == 400_000
        saved = at(settings, "trainer.callbacks")[0]["init_args"]["every_n_train_steps"]
        assert 400_000 % saved == 0  # the last step is in a checkpoint


@pytest.mark.parametrize("config", [path for path in PAPER if path.stem.startswith("laion")], ids=name)
def test_figures_of_fine_tuning_are_those_that_were_published(config):
    settings = yaml.safe_load(config.read_text())
    assert at(settings, "model.init_args.optimizer.class_path") == "torch.optim.AdamW"
    assert at(settings, "model.init_args.optimizer.init_args.lr") == 2.5e-6
    assert at(settings, "model.init_args.warmup_steps") == 5000
    assert at(settings, "data.init_args.batch_size") == 8
    assert at(settings, "data.init_args.image_size") == 256
    assert at(settings, "agc.threshold") == (0.8 if "agc" in config.stem else 0)
    assert at(settings, "averaging.num_shards") == (4 if "iet" in config.stem else 1)
    if "iet" in config.stem:
        assert at(settings, "averaging.every_n_train_steps") == 2000


def test_figures_of_memcontrol_are_those_that_were_published():
    settings = settings_of("memcontrol_sd15")
    published = {
        "model.init_args.image_size": 224,
        "model.init_args.optimizer.class_path": "torch.optim.AdamW",
        "model.init_args.optimizer.init_args": {"lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.01, "eps": 1e-8},
        "model.init_args.warmup_steps": 0,
        "model.init_args.caption_dropout": 0.1,
        "model.init_args.guidance_scale": 4.0,
        "data.init_args.image_size": 224,
        "selection": {"family": "svdiff", "granularity": "published", "mask": None, "norm_lr_scale": 0.01},
        "evaluation.num_inference_steps": 50,
        "trainer.max_steps": 15_000,
        "trainer.gradient_clip_val": 1.0,
        "trainer.precision": "16-mixed",
        "averaging.num_shards": 1,
        "agc.threshold": 0.0,
    }
    assert {path: at(settings, path) for path in published} == published
    assert 15_000 % at(settings, "trainer.callbacks")[0]["init_args"]["every_n_train_steps"] == 0
