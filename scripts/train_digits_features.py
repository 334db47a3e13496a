"""Train the digits feature network that ships with the package, and write its weights.

    python scripts/train_digits_features.py

The data are scikit-learn's 1,797 handwritten digits, which come with that library. One part trains the classifier, the
other tells its accuracy; both the split and the accuracy are written into the file's metadata. A run is deterministic
on one kind of CPU, and takes less than a minute.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from lightning_iet.metrics.features import DigitsClassifier

SHIPPED = Path(__file__).parents[1] / "lightning_iet" / "metrics" / "weights" / "digits_features.safetensors"
SPLIT = {"test_size": 0.5, "random_state": 0}  # stratified by digit


def load_split() -> list[Tensor]:
    """Return training images, test images, training labels, test labels; images ``(N, 1, 8, 8)`` in [0, 1]."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    return train_test_split(images, labels, stratify=labels, **SPLIT)


def augment(images: Tensor) -> Tensor:
    """Rotate, scale and shift each image a little."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.5  # radians, within about 14 degrees
    scale = 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 0.5  # of half the width: within one pixel
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = nn.functional.affine_grid(affine, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, labels: Tensor, *, epochs: int, batch_size: int = 64, lr: float = 3e-3) -> DigitsClassifier:
    """Train from scratch with AdamW, a one-cycle schedule and smoothed labels."""
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
            logits = model(augment(images[batch]))
            loss = nn.functional.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def main() -> None:
    """Train, test, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="passes over the training part (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of initial weights, order and augmentation (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=SHIPPED, help="file to write (default: the shipped one)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(
        1
    )  # the order of a sum depends on the number of threads, and the network is too small to care
    torch.use_deterministic_algorithms(True)
    train_images, test_images, train_labels, test_labels = load_split()
    model = train(train_images, train_labels, epochs=args.epochs)
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()

    split = f"{len(train_images)} training and {len(test_images)} test images, train_test_split({SPLIT}), stratified"
    metadata = {"data": "sklearn.datasets.load_digits", "split": split, "test_accuracy": f"{accuracy:.4f}"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out, metadata=metadata)
    print(f"test accuracy {accuracy:.4f} on {len(test_images)} images; wrote {args.out}")


if __name__ == "__main__":
    main()
