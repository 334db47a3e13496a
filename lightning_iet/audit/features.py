"""What images are compared by: their pixels, or the features of a network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_iet.audit.cache import BlockCache, digest, hash_weights
from lightning_iet.audit.images import ImageSet
from lightning_iet.audit.naming import printable
from lightning_iet.audit.work import in_blocks
from lightning_iet.functional.images import image_rows
from lightning_iet.functional.precision import full_precision
from lightning_iet.metrics.features import feature_extractor

__all__ = ["CLASS_LIKE", "PIXELS", "SSCD", "Features", "build_features", "extract"]

PIXELS, SSCD = "pixels", "sscd"
BATCH = 256  # images that go through a network at once, and lie in one block of the cache
ON_SPHERE = ("clip", SSCD)  # networks whose features are compared by angle
CLASS_LIKE = ("digits",)  # networks whose features tell classes apart, but hardly the images of one class


@dataclass(frozen=True)
class Features:
    """How images become rows of numbers.

    Attributes:
        name: as the user gave it.
        sha256: hash of the weights; empty for pixels.
        rows: maps images, uint8 of shape ``(N, C, H, W)``, to rows, shape ``(N, D)``, uint8 for pixels, else float32.
    """

    name: str
    sha256: str
    rows: Callable[[Tensor], Tensor]


def build_features(name: str, *, weights: Path | None = None, device: str = "cpu") -> Features:
    """Prepare the comparison by pixels or by a network's features.

    Args:
        name: ``"pixels"``, or a name that :func:`~lightning_iet.metrics.features.feature_extractor` knows.
        weights: the network's weight file.
        device: where the network runs.

    Returns:
        The features; those of networks trained for cosine similarity have length 1.

    Raises:
        ValueError: as :func:`~lightning_iet.metrics.features.feature_extractor`.
        FileNotFoundError: as there.
        ModuleNotFoundError: as there.

    Example:
        >>> build_features("pixels").rows(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2, 64])
    """
    if name == PIXELS:
        return Features(PIXELS, "", lambda images: image_rows(images).to(device))
    network = feature_extractor(name, weights=weights).to(device).eval()
    return Features(name, _hash(name, network), _Rows(network, device, name in ON_SPHERE))


def extract(images: ImageSet, features: Features, cache: BlockCache, *, argument: str) -> Tensor:
    """Return the rows of all images of a set; those of a network are kept in the cache.

    Args:
        images: the set.
        features: what to take of it.
        cache: where a network's features go.
        argument: what the images are, for messages.

    Returns:
        Shape ``(N, D)``.

    Raises:
        ValueError: if features are not finite.
    """
    if features.name == PIXELS:
        return features.rows(images.pixels)
    parts = in_blocks(
        f"Features of {argument} images",
        [
            digest("features", features.name, features.sha256, *images.pixels.shape, images.sha256, start)
            for start in range(0, len(images), BATCH)
        ],
        lambda place, _: {"rows": features.rows(images.pixels[place]).cpu()},
        cache=cache,
        total=len(images),
        block=BATCH,
    )
    rows = torch.cat([part["rows"] for part in parts])
    check_finite(rows, images.names, argument=argument, name=features.name)
    return rows


def check_finite(rows: Tensor, names: Sequence[str], *, argument: str, name: str) -> None:
    """Refuse features that cannot be compared.

    Raises:
        ValueError: naming the first image.
    """
    broken = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"Argument `features` expected a network with finite features, but got '{name}', which gives NaN or "
            f"infinite ones for {len(broken)} of {len(rows)} {argument} images, the first "
            f"'{printable(names[broken[0]])}'. "
            "Choose another network, or remove the images."
        )


class _Rows:
    def __init__(self, network: nn.Module, device: str, on_sphere: bool) -> None:
        self.network, self.device, self.on_sphere = network, device, on_sphere

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        with full_precision(torch.device(self.device).type):
            batches = [self.network(batch.to(self.device)).flatten(1).float() for batch in images.split(BATCH)]
        rows = torch.cat(batches)
        return F.normalize(rows) if self.on_sphere else rows


def _hash(name: str, network: nn.Module) -> str:
    """Hash the weights, and the whole file where that is what the user named: TorchScript holds code as well."""
    file = Path(name)
    return digest(file.read_bytes() if file.is_file() else b"", hash_weights(network))
