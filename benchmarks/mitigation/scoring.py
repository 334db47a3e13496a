"""What a checkpoint is worth: quality, memorization, and whether its loss tells which images it was trained on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.mitigation.data import Sets
from benchmarks.mitigation.rows import Row
from benchmarks.mitigation.settings import Setting
from lightning_iet import DiffusionModule
from lightning_iet.data import IndexedImages
from lightning_iet.evaluation.measures import ImageMeasures
from lightning_iet.evaluation.membership import mean_losses, spread_timesteps
from lightning_iet.evaluation.memorization import RATIO, below, measure_closeness
from lightning_iet.functional.checks import unit_interval
from lightning_iet.functional.membership_inference import membership_inference
from lightning_iet.metrics import frechet_distance

MQ = (0.15, 0.3)
TIMESTEPS = 10  # at which an image's loss is taken
NON_MEMBERS = 200  # control images that the attack tells from training images


@dataclass
class Judge:
    """Scores checkpoints of one row, setting and seed.

    Attributes:
        setting: how many images are drawn, in how many steps.
        row: decides the training images.
        seed: of the sets, and of the images that are drawn.
        features: the network of FID.
        device: where this is done.
    """

    setting: Setting
    row: Row
    seed: int
    features: nn.Module
    device: str = "cpu"

    @cached_property
    def sets(self) -> Sets:
        """The images to compare with."""
        return Sets(self.setting, self.row, seed=self.seed)

    def score(self, module: DiffusionModule, checkpoint: Path) -> dict[str, float]:
        """Figures of one checkpoint."""
        module.load_state_dict(torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"])
        module = module.to(self.device).eval()
        images = module.sample(
            self.setting.num_samples, seed=self.seed, num_inference_steps=self.setting.inference_steps
        )
        return {**self.of_images(images), **self.of_losses(module)}

    def control(self) -> dict[str, float]:
        """The same figures of held-out real images in the place of generated ones, and FID of the training images."""
        held_out = _images(self.sets.control_set)
        return {**self.of_images(held_out), "fid_train": self._fid(_images(self.sets.train_set), "reference_set")}

    def of_images(self, images: Tensor) -> dict[str, float]:
        """Quality, and closeness to training images: shares of the images, and of training images that were copied."""
        train = _images(self.sets.train_set).to(self.device)
        # Of what was trained on mirrored images, the image or its mirror image, whichever is nearer.
        closeness = measure_closeness(images, train, min(50, len(train)), mirrored=self.row.flip)
        counts = closeness.count(thresholds=MQ)
        return {
            "fid": self._fid(images, "reference_set"),
            "fid_selection": self._fid(images, "selection_set"),
            "memorized_fraction": counts.memorized_fraction,
            "copied_images": len(closeness.nearest[below(closeness.ratio, RATIO)].unique()) / len(train),
            **{f"mq_{threshold}": share for threshold, share in counts.mq.items()},
        }

    def of_losses(self, module: DiffusionModule) -> dict[str, float]:
        """The attack by losses, and the loss of the unseen images, which early stopping watches."""
        members, others = (self._losses(module, images) for images in (self.sets.every_image, self.sets.control_set))
        by_kind = {}
        if self.setting.is_uneven:
            is_repeated = self.sets.source[: len(members)] < self.setting.num_repeated
            for kind, chosen in (("repeated", is_repeated), ("once", ~is_repeated)):
                found = membership_inference(members[chosen], others)
                by_kind[f"membership_auc_{kind}"] = float(found["auc"])
        return by_kind | {
            "membership_auc": float(membership_inference(members, others)["auc"]),
            "train_loss": float(members.mean()),
            "unseen_loss": float(self._losses(module, self.sets.unseen).mean()),
        }

    def _losses(self, module: DiffusionModule, images: IndexedImages) -> Tensor:
        timesteps = spread_timesteps(TIMESTEPS, module.num_timesteps)
        places = torch.arange(min(len(images), max(NON_MEMBERS, len(self.sets.train_set))))
        return mean_losses(module, _images(images)[places], places, timesteps)

    def _fid(self, images: Tensor, name: str) -> float:
        if name not in self._frechet:
            metric = frechet_distance(self.features, reset_real_features=False).to(self.device)
            self._frechet[name] = ImageMeasures({"fid": metric}, _images(getattr(self.sets, name)))
        return self._frechet[name].measure(images)["fid"]

    @cached_property
    def _frechet(self) -> dict[str, ImageMeasures]:
        return {}


def _images(images: IndexedImages) -> Tensor:
    return unit_interval(images.images)
