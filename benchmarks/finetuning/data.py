"""The images: those that the network is pretrained on, and the sets of a fine-tuning."""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.finetuning.rows import Row
from benchmarks.finetuning.settings import Setting
from benchmarks.mitigation.data import kept_occurrences, real_images
from lightning_iet.data import DrawnByWeight, IndexedImages
from lightning_iet.data.duplicates import repeat_images
from lightning_iet.data.splits import select_disjoint
from lightning_iet.functional.checks import unit_interval


def pretraining_images(setting: Setting) -> Tensor:
    """Images of all classes that are not fine-tuned on, in [0, 1], shape ``(n, 1, H, W)``."""
    images, labels = real_images(setting.source)
    others = (~torch.isin(labels, torch.tensor(setting.classes))).nonzero()[:, 0]
    chosen = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(0))]
    return unit_interval(images[chosen[: setting.num_pretrain]])


class Sets(pl.LightningDataModule):
    """Disjoint sets of the classes that are fine-tuned on; the seed decides which images they hold.

    Attributes:
        train_set: the images to fine-tune on.
        every_image: the same, and the near-duplicates that the row leaves out: copies are judged by all.
        source: for each of them the number of the image that it shows; occurrences of one image share it, and the
            sources below the setting's ``num_repeated`` occur many times.
        unseen: images whose loss is watched.
        control_set, selection_set, reference_set: held out: to compare copies with, to choose by, to report by.
    """

    def __init__(self, setting: Setting, row: Row, *, seed: int) -> None:
        super().__init__()
        images, labels = real_images(setting.source)
        mine = torch.isin(labels, torch.tensor(setting.classes)).nonzero()[:, 0]
        sizes = (
            setting.num_unseen, setting.num_control, setting.num_selection, setting.num_reference,
            setting.num_train + setting.num_repeated,
        )  # fmt: skip
        self.unseen, self.control_set, self.selection_set, self.reference_set, shown = (
            IndexedImages(unit_interval(images[mine[part]]), labels[mine[part]])
            for part in select_disjoint(labels[mine], sizes, seed=seed)
        )
        repeats = setting.repeats if setting.is_uneven else 1
        pixels, self.source = repeat_images(
            shown.images, repeated=setting.num_repeated, repeats=repeats, change=setting.change, seed=seed
        )
        self.every_image = self.train_set = IndexedImages(pixels, shown.targets[self.source])
        if row.deduplicated:
            kept = kept_occurrences(self.source, share=row.deduplicated)
            self.train_set = IndexedImages(pixels[kept], self.every_image.targets[kept])
        self.drawn: Dataset = self.train_set
        if dict(row.agc).get("weigh") == "draws":
            self.drawn = DrawnByWeight(self.drawn)
        self.batch_size = setting.batch_size

    def train_dataloader(self) -> DataLoader:
        """Training images, shuffled."""
        return DataLoader(self.drawn, batch_size=self.batch_size, shuffle=True)
