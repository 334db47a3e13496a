"""The images: those that the network is pretrained on, and the sets of a fine-tuning."""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.finetuning.settings import Setting
from benchmarks.mitigation.data import real_images
from lightning_iet.data import IndexedImages
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
        every_image: the same.
        unseen: images whose loss is watched.
        control_set, selection_set, reference_set: held out: to compare copies with, to choose by, to report by.
    """

    def __init__(self, setting: Setting, *, seed: int) -> None:
        super().__init__()
        images, labels = real_images(setting.source)
        mine = torch.isin(labels, torch.tensor(setting.classes)).nonzero()[:, 0]
        sizes = (
            setting.num_unseen, setting.num_control, setting.num_selection, setting.num_reference, setting.num_train,
        )  # fmt: skip
        self.unseen, self.control_set, self.selection_set, self.reference_set, self.train_set = (
            IndexedImages(unit_interval(images[mine[part]]), labels[mine[part]])
            for part in select_disjoint(labels[mine], sizes, seed=seed)
        )
        self.every_image = self.train_set
        self.batch_size = setting.batch_size

    def train_dataloader(self) -> DataLoader:
        """Training images, shuffled."""
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)
