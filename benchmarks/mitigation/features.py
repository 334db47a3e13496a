"""The eyes of FID: a small classifier of the same kind of images.

That of clothes has learnt from Fashion-MNIST's test images, which no set holds; the digits' comes with the package, and
has learnt from half of all digits, of which the sets hold some.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.mitigation.data import feature_images
from benchmarks.mitigation.settings import Setting
from lightning_iet.metrics import feature_extractor
from lightning_iet.utilities.files import write_atomically

EPOCHS = 4


class FashionFeatures(nn.Module):
    """64 features of a classifier of clothes, 32 × 32."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_halving(1, 16), *_halving(16, 32), *_halving(32, 64),
            nn.Flatten(), nn.Linear(64 * 4 * 4, self.num_features), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``(N, 64)`` of images ``(N, 1, 32, 32)``, uint8 or in [0, 1]."""
        return self.body(images.float() / 255 if images.dtype == torch.uint8 else images)


def _halving(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(8, outside), nn.SiLU(), nn.MaxPool2d(2)]


def prepare_features(setting: Setting, folder: Path) -> None:
    """Learn the features of a setting, unless they are in the folder already (the digits' come with the package)."""
    file = _file(setting, folder)
    if setting.source == "digits" or file.exists():
        return
    images, labels = feature_images(setting.source)
    with write_atomically(file) as path:
        torch.save(learn(images[: setting.num_feature_images], labels).state_dict(), path)


def load_features(setting: Setting, folder: Path) -> nn.Module:
    """The network, in eval mode."""
    if setting.source == "digits":
        return feature_extractor("digits")
    network = FashionFeatures()
    network.load_state_dict(torch.load(_file(setting, folder), weights_only=True))
    return network.eval().requires_grad_(False)


def learn(images: Tensor, labels: Tensor) -> FashionFeatures:
    """Train a classifier; the same on one kind of processor with equally many threads."""
    torch.manual_seed(0)
    network = FashionFeatures()
    steps = EPOCHS * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(images)).split(64):
            batch = images[part].float() / 255
            flipped = torch.where(torch.rand(len(part), 1, 1, 1) < 0.5, batch, batch.flip(-1))
            loss = F.cross_entropy(network.head(network(flipped)), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def _file(setting: Setting, folder: Path) -> Path:
    return folder / f"{setting.source}_features_{setting.num_feature_images}.pt"
