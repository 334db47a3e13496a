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
from lightning_iet.functional.memorization import nearest_ratio
from lightning_iet.functional.neighbors import nearest_neighbors
from lightning_iet.metrics import frechet_distance

FIDS = {"fid": "reference", "fid_selection": "selection"}  # to which real images
MQ = (0.15, 0.3)
TIMESTEPS = 10  # at which an image's loss is taken
NON_MEMBERS = 200  # control images that the attack tells from training images
QUARTERS = (1, 2, 3, 4)  # of the training images, from the least typical to the most typical
NEIGHBORS = 10  # held-out images by whose distance an image is more or less typical


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
        train = _images(self.sets.every_image).to(self.device)
        if self.setting.is_uneven:
            found = nearest_neighbors(images.to(self.device), train, min(2 * self.setting.repeats + 10, len(train)))
            copies = copies_by_source(*found, self.sets.source, num_repeated=self.setting.num_repeated)
            quality = {name: self._fid(images, f"{set_}_set") for name, set_ in FIDS.items()}
            return quality | copies
        # Of what was trained on mirrored images, the image or its mirror image, whichever is nearer.
        closeness = measure_closeness(images, train, min(50, len(train)), mirrored=self.row.flip)
        counts = closeness.count(thresholds=MQ)
        by_quarter = {}
        if self.setting.by_typicality:
            quarter = quarters(self._typicality, self._typicality)[closeness.nearest]
            for name, limit in (("", RATIO), ("_half", 1 / 2)):
                copied = below(closeness.ratio, limit)
                shares = {f"copies_quarter_{q}{name}": copied & (quarter == q) for q in QUARTERS}
                by_quarter |= {key: float(chosen.double().mean()) for key, chosen in shares.items()}
            by_quarter |= {f"nearest_quarter_{q}": float((quarter == q).double().mean()) for q in QUARTERS}
        return by_quarter | {
            **{name: self._fid(images, f"{set_}_set") for name, set_ in FIDS.items()},
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
        if self.setting.by_typicality:
            own, other = self._typicality, self._distance_to_others(_images(self.sets.control_set)[: len(others)])
            of_members, of_others = quarters(own, own), quarters(other, own)
            for q in QUARTERS:
                found = membership_inference(members[of_members == q], others[of_others == q])
                by_kind[f"membership_auc_quarter_{q}"] = float(found["auc"])
        return by_kind | {
            "membership_auc": float(membership_inference(members, others)["auc"]),
            "train_loss": float(members.mean()),
            "unseen_loss": float(self._losses(module, self.sets.unseen).mean()),
        }

    @cached_property
    def _typicality(self) -> Tensor:
        """Of the training images, whatever is drawn."""
        return self._distance_to_others(_images(self.sets.every_image))

    def _distance_to_others(self, images: Tensor) -> Tensor:
        """Mean distance, in the features of FID, to the nearest images that FID compares with: small = typical."""
        distances = torch.cdist(self._features_of(images), self._reference_features)
        return distances.topk(NEIGHBORS, largest=False).values.mean(dim=1).cpu()

    @cached_property
    def _reference_features(self) -> Tensor:
        return self._features_of(_images(self.sets.reference_set))

    def _features_of(self, images: Tensor) -> Tensor:
        return torch.cat([self.features(part.to(self.device)) for part in images.split(500)])

    def _losses(self, module: DiffusionModule, images: IndexedImages) -> Tensor:
        timesteps = spread_timesteps(TIMESTEPS, module.num_timesteps)
        places = torch.arange(min(len(images), max(NON_MEMBERS, len(self.sets.every_image))))
        return mean_losses(module, _images(images)[places], places, timesteps)

    def _fid(self, images: Tensor, name: str) -> float:
        if name not in self._frechet:
            metric = frechet_distance(self.features, reset_real_features=False).to(self.device)
            self._frechet[name] = ImageMeasures({"fid": metric}, _images(getattr(self.sets, name)))
        return self._frechet[name].measure(images)["fid"]

    @cached_property
    def _frechet(self) -> dict[str, ImageMeasures]:
        return {}


def copies_by_source(sq_distances: Tensor, nearest: Tensor, source: Tensor, *, num_repeated: int) -> dict[str, float]:
    """Shares of drawn images that copy a repeated training image, and one that occurs once.

    The occurrences of an image count as one: the ratio is that of the distance to the nearest training image and to the
    nearest one that shows another image.

    Args:
        sq_distances: squared, to the ``k`` nearest training images, shape ``(Q, k)``, with k above the number of
            occurrences of any image.
        nearest: their positions, shape ``(Q, k)``.
        source: what each training image shows, shape ``(N,)``.
        num_repeated: the sources below this number occur many times.

    Example:
        >>> copies_by_source(torch.tensor([[1.0, 1.0, 100.0]]), torch.tensor([[0, 2, 1]]), torch.tensor([0, 1, 0]),
        ...     num_repeated=1)["copies_repeated"]
        1.0
    """
    shown = source.to(nearest.device)[nearest]
    is_other = shown != shown[:, :1]
    if not is_other.any(dim=1).all():
        raise ValueError("Argument `nearest` expected an image of another source in each row; look at more neighbours.")
    second = sq_distances.gather(1, is_other.int().argmax(dim=1, keepdim=True))[:, 0]
    ratio = nearest_ratio(torch.stack([sq_distances[:, 0], second], dim=1))
    is_repeated = shown[:, 0] < num_repeated
    found = {"nearest_repeated": float(is_repeated.double().mean())}
    for name, limit in (("", 1 / 3), ("_half", 1 / 2)):
        for kind, chosen in (("repeated", is_repeated), ("once", ~is_repeated)):
            found[f"copies_{kind}{name}"] = float(((ratio < limit) & chosen).double().mean())
    found["memorized_fraction"] = found["copies_repeated"] + found["copies_once"]
    return found


def quarters(distance: Tensor, of: Tensor) -> Tensor:
    """Number images from 1 (least typical: farthest from others) to 4, by the quartiles of a set's distances.

    Args:
        distance: mean distance of each image to its nearest others, shape ``(N,)``.
        of: the distances whose quartiles divide, shape ``(M,)``.

    Example:
        >>> quarters(torch.tensor([9.0, 0.5, 2.6]), of=torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([1, 4, 2])
    """
    limits = of.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=of.dtype))
    return 4 - torch.bucketize(distance, limits)


def _images(images: IndexedImages) -> Tensor:
    return unit_interval(images.images)
