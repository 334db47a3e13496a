"""What a checkpoint is worth: quality, memorization, and whether a stranger can tell who was trained on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.mitigation.data import Sets
from benchmarks.mitigation.rows import Row
from benchmarks.mitigation.settings import Setting
from lightning_iet import DiffusionModule
from lightning_iet.audit.losses import probe_losses, spread_timesteps
from lightning_iet.data import IndexedImages
from lightning_iet.functional.checks import unit_interval
from lightning_iet.functional.membership_inference import membership_inference
from lightning_iet.functional.memorization import memorization_ratio, nearest_ratio
from lightning_iet.functional.neighbors import nearest_neighbors
from lightning_iet.metrics import frechet_distance

MQ = (0.15, 0.3)
TIMESTEPS = 10  # at which an image's loss is taken
BATCH = 256  # images that go through the features at once
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
        train = _images(self.sets.train_set)
        distances, nearest = self._nearest(images, train)
        memorized, mq = nearest_ratio(distances) < 1 / 3, memorization_ratio(distances)
        return {
            "fid": self._fid(images, "reference_set"),
            "fid_selection": self._fid(images, "selection_set"),
            "memorized_fraction": float(memorized.double().mean()),
            "copied_images": len(nearest[memorized, 0].unique()) / len(train),
            **{f"mq_{limit:g}": float((mq < limit).double().mean()) for limit in MQ},
        }

    def _nearest(self, images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest training images; of what was trained on mirrored images, of the image or its mirror image."""
        views = [images, images.flip(-1)] if self.row.flip else [images]
        k = min(50, len(train))
        found = [nearest_neighbors(view.to(self.device), train.to(self.device), k) for view in views]
        distances, nearest = (torch.stack(parts) for parts in zip(*found, strict=True))
        closest = distances[:, :, 0].argmin(0)
        rows = torch.arange(len(images), device=closest.device)
        return distances[closest, rows], nearest[closest, rows]

    def of_losses(self, module: DiffusionModule) -> dict[str, float]:
        """The attack by losses, and the loss of the unseen images, which early stopping watches."""
        members, others = (self._losses(module, images) for images in (self.sets.train_set, self.sets.control_set))
        found = membership_inference(members, others)
        return {
            "membership_auc": float(found["auc"]),
            "train_loss": float(members.mean()),
            "unseen_loss": float(self._losses(module, self.sets.unseen).mean()),
        }

    def _losses(self, module: DiffusionModule, images: IndexedImages) -> Tensor:
        timesteps = spread_timesteps(TIMESTEPS, module.num_timesteps)
        numbers = torch.arange(min(len(images), max(NON_MEMBERS, len(self.sets.train_set))))
        return probe_losses(module, _images(images)[numbers], numbers, timesteps, seed=0, use_ema=True).double().mean(1)

    def _fid(self, images: Tensor, name: str) -> float:
        if name not in self._frechet:
            metric = frechet_distance(self.features, reset_real_features=False).to(self.device)
            for batch in _images(getattr(self.sets, name)).split(BATCH):
                metric.update(batch.to(self.device), real=True)
            self._frechet[name] = metric
        metric = self._frechet[name]
        metric.reset()
        for batch in images.split(BATCH):
            metric.update(batch.to(self.device), real=False)
        return float(metric.compute())

    @cached_property
    def _frechet(self) -> dict:
        return {}


def _images(images: IndexedImages) -> Tensor:
    return unit_interval(images.images)
