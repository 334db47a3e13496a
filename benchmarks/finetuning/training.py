"""Pretraining, and one fine-tuning with its judgements."""

import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from benchmarks.finetuning.data import Sets, pretraining_images
from benchmarks.finetuning.rows import Row
from benchmarks.finetuning.settings import Setting
from benchmarks.mitigation.denoiser import small_unet
from benchmarks.mitigation.scoring import Judge as Scoring
from benchmarks.mitigation.training import Marks, quiet_trainer
from lightning_iet import AntiGradientControl, DiffusionModule, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks import ParameterSelection
from lightning_iet.evaluation.memorization import below, measure_closeness
from lightning_iet.modules.base import averaged_network
from lightning_iet.utilities.files import write_atomically

HALF = 1 / 2  # a weaker sign of a copy than a third


@dataclass(frozen=True)
class Tuning:
    """What trains, and how fast.

    Attributes:
        family: of parameters.
        mask: one character for each group; ``None`` = the whole family.
        rate: learning rate.
    """

    family: str
    mask: str | None
    rate: float


def make_denoiser(setting: Setting) -> nn.Module:
    """A U-Net of two levels with attention on the lower one, over pixels or over patches."""
    return small_unet(
        setting,
        block_out_channels=setting.channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )


def make_module(setting: Setting, pretrained: Path | None, *, rate: float, warmup: int = 1) -> DiffusionModule:
    """A module around the network with the weights of a file, or with new ones."""
    denoiser = make_denoiser(setting)
    if pretrained is not None:
        denoiser.load_state_dict(torch.load(pretrained, weights_only=True))
    return DiffusionModule(
        denoiser,
        scheduler=DDPMScheduler(beta_schedule=setting.schedule, prediction_type=setting.prediction),
        ema_decay=setting.ema_decay if pretrained is not None else 0.998,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate, fused=True),
        warmup_steps=warmup,
    )


def pretrain(setting: Setting, folder: Path) -> Path:
    """Train the network on the other classes, unless the folder has it; returns the file of its averaged weights."""
    names = (
        "source", "classes", "num_pretrain", "pretrain_steps", "pretrain_batch", "pretrain_rate", "patch", "channels",
        "layers", "schedule", "prediction",
    )  # fmt: skip
    facts = json.dumps([getattr(setting, name) for name in names])
    file = folder / f"pretrained-{sha256(facts.encode()).hexdigest()[:8]}.pt"
    if file.exists():
        return file
    pl.seed_everything(0, verbose=False)
    module = make_module(setting, None, rate=setting.pretrain_rate, warmup=min(200, setting.pretrain_steps))
    images = pretraining_images(setting)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images), batch_size=setting.pretrain_batch, shuffle=True, drop_last=True
    )
    trainer = quiet_trainer(max_steps=setting.pretrain_steps, max_epochs=-1)
    trainer.fit(module, loader)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(file) as path:
        torch.save(averaged_network(module.unet, module.ema).state_dict(), path)
    return file


class Judge(Scoring):
    """Scores checkpoints; the sets are those of a fine-tuning."""

    @cached_property
    def sets(self) -> Any:
        """The images to compare with."""
        assert isinstance(self.setting, Setting)
        assert isinstance(self.row, Row)
        return Sets(self.setting, self.row, seed=self.seed)

    def of_images(self, images: Tensor) -> dict[str, float]:
        """Quality and copies, also by a weaker sign."""
        if self.setting.is_uneven:
            figures = super().of_images(images)
            return figures | {"copies_half": figures["copies_repeated_half"] + figures["copies_once_half"]}
        train = self.sets.every_image.images
        ratio = measure_closeness(images, train, min(50, len(train))).ratio
        return {**super().of_images(images), "copies_half": float(below(ratio, HALF).double().mean())}


def fine_tune(
    setting: Setting, row: Row, tuning: Tuning, pretrained: Path, judge: Judge, *, marks: list[int], seed: int,
    folder: Path,
) -> list[dict[str, float]]:  # fmt: skip
    """Fine-tune, and judge at the marks.

    Args:
        setting: data, length and how it is judged.
        row: AGC, shards, and whether near-duplicates are left out.
        tuning: what trains.
        pretrained: file of the weights to begin with.
        judge: of the checkpoints; its seed decides the training images.
        marks: steps at which to judge; training ends at the last one.
        seed: of the training.
        folder: for checkpoints.

    Returns:
        Figures at each mark, with ``share`` of the parameters that train.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(seed, verbose=False)
    module = make_module(setting, pretrained, rate=tuning.rate, warmup=max(1, setting.warmup // row.num_shards))
    course = Marks(folder, marks, deadline=None)
    callbacks: list[pl.Callback] = [_selection(tuning)]
    if row.threshold:
        bins = None if row.agc else setting.num_bins
        callbacks.append(AntiGradientControl(row.threshold, num_bins=bins, **dict(row.agc)))
    if row.num_shards > 1:
        callbacks.append(ParameterAveragingCallback(row.num_shards, every_n_epochs=setting.round_epochs))
    data: pl.LightningDataModule = Sets(setting, row, seed=judge.seed)
    if row.num_shards > 1:
        data = ShardedDataModule(data, row.num_shards, partition="iid", seed=seed)
    # Shards end with an epoch: more epochs than enough, the last mark ends it.
    trainer = quiet_trainer(max_epochs=marks[-1], callbacks=[*callbacks, course], default_root_dir=folder)
    trainer.fit(module, data)
    trained = make_module(setting, pretrained, rate=tuning.rate)
    selection = _selection(tuning)
    selection.apply(trained)
    share = selection.share if selection.parameter_groups is not None else 1.0
    points = []
    for mark in sorted(course.cost):
        figures = judge.score(trained, folder / f"{mark:05d}.ckpt")
        points.append({"mark": mark, **course.cost[mark], "share": share, **figures})
    return points


def _selection(tuning: Tuning) -> ParameterSelection:
    return ParameterSelection(tuning.family, mask=tuning.mask)  # type: ignore[arg-type]
