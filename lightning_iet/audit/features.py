"""What images are compared by: their pixels, or the features of a network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_iet.audit.cache import BlockCache, in_blocks
from lightning_iet.audit.reading import ImageSet
from lightning_iet.functional.checks import image_rows
from lightning_iet.metrics.features import feature_extractor
from lightning_iet.utilities.devices import full_precision
from lightning_iet.utilities.files import printable
from lightning_iet.utilities.fingerprints import digest, hash_weights

PIXELS, SSCD = "pixels", "sscd"
VERSION = 2  # to be raised when bits of features change, as with the images that go through a network at once
BATCH = 256  # images that go through a network at once on a GPU, and lie in one block of the cache
# On a CPU fewer, so that what a layer gives is below 32 MiB: larger tensors are mapped and unmapped anew by the system
# for every layer, which takes more time than the arithmetic (measured on one and on two cores; on many, more images may
# be faster). On one thread up to 8 large images also give the same bits as one alone.
SIDES = {"efficientnet": 224, "sscd": 288, "inception": 299, "clean-inception": 299, "clip": 224}  # pixels they work on
PIXELS_AT_ONCE = 2**18
TRIED = 16  # images on which the time is measured, where there are 20 times as many
ON_SPHERE = ("clip", SSCD)  # networks whose features are compared by angle
_LEAST, _MOST = 1e-10, 1e15  # whose squares, and sums of these, are ordinary float32 numbers
CLASS_LIKE = ("digits",)  # networks whose features tell classes apart, but hardly the images of one class


@dataclass(frozen=True)
class Features:
    """How images become rows of numbers.

    Attributes:
        name: as the user gave it.
        sha256: hash of the weights; empty for pixels.
        rows: maps images, uint8 of shape ``(N, C, H, W)``, to rows, shape ``(N, D)``, uint8 for pixels, else float32.
        device: where the rows are.
    """

    name: str
    sha256: str
    rows: Callable[[Tensor], Tensor]
    device: str = "cpu"


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
        if weights is not None:
            raise ValueError(f"Argument `weights` expected None with features='{PIXELS}', but got '{weights}'.")
        return Features(PIXELS, "", lambda images: image_rows(images).to(device), device)
    network = feature_extractor(name, weights=weights).to(device).eval()
    return Features(name, _hash(name, network), _Rows(name, network, device), device)


def extract(images: ImageSet, features: Features, cache: BlockCache, *, argument: str) -> Tensor:
    """Return the rows of all images of a set; those of a network are kept in the cache.

    Args:
        images: the set.
        features: what to take of it.
        cache: where a network's features go.
        argument: what the images are, for messages.

    Returns:
        Shape ``(N, D)``, on the device of the features.

    Raises:
        ValueError: if features are not finite.
    """
    if features.name == PIXELS:
        return features.rows(images.pixels)
    parts = in_blocks(
        f"Features of {argument} images",
        [_key(images, features, start) for start in _starts(images)],
        lambda place, _: {"rows": features.rows(images.pixels[place]).cpu()},
        cache=cache,
        total=len(images),
        block=BATCH,
    )
    rows = torch.cat([part["rows"] for part in parts]).to(features.device)
    check_finite(rows, images.names, argument=argument, name=features.name)
    return rows


def _key(images: ImageSet, features: Features, start: int) -> str:
    return digest("features", VERSION, features.name, features.sha256, *images.pixels.shape, images.sha256, start)


def _starts(images: ImageSet) -> range:
    return range(0, len(images), BATCH)


def estimated_seconds(sets: Mapping[str, ImageSet], features: Features, cache: BlockCache, *, versions: int) -> float:
    """Measure on a few images about how long a network's features of all sets will take.

    Args:
        sets: ``"train"`` and other images, with the channels with which they are compared.
        features: what to take of them.
        cache: where features go; those that are there take no time.
        versions: in how many versions all but the training images are compared.

    Returns:
        Seconds; 0 of pixels, and of few images.
    """
    if features.name == PIXELS:
        return 0.0
    missing = sum(
        min(BATCH, len(images) - start)
        for images in sets.values()
        for start in _starts(images)
        if _key(images, features, start) not in cache
    )
    searched = sum(len(images) for name, images in sets.items() if name != "train")
    number = missing + (versions - 1) * searched  # of further versions features are not kept
    if number < 20 * TRIED:
        return 0.0
    few = sets["train"].pixels[:TRIED]
    features.rows(few[:1]).cpu()  # the first pass prepares what the others use again
    start = perf_counter()
    features.rows(few).cpu()  # a GPU has finished only when its result is here
    return (perf_counter() - start) / len(few) * number


def check_comparable(rows: Tensor, *, name: str) -> None:
    """Refuse features of training images that say nothing, or whose distances float32 cannot hold.

    Raises:
        ValueError: naming the network.
    """
    spread = (rows.amax(dim=0) - rows.amin(dim=0)).amax() if rows.numel() else torch.tensor(0.0)
    largest = rows.abs().amax() if rows.numel() else spread
    problem = None
    if not spread:
        problem = f"{rows.shape[1]} features that are the same for all training images"
    elif spread < _LEAST or largest > _MOST:
        problem = f"features of up to {largest:.0e} that differ by {spread:.0e}"
    if problem and len(rows) > 1:
        raise ValueError(
            f"Argument `features` expected a network whose features differ between images, by {_LEAST:.0e} or more, "
            f"and lie below {_MOST:.0e}, but got '{name}' with {problem}. Scale them, or choose another network."
        )


def check_finite(rows: Tensor, names: Sequence[str], *, argument: str, name: str) -> None:
    """Refuse features that cannot be compared.

    Raises:
        ValueError: naming the first image.
    """
    if not rows.is_floating_point():
        return
    broken = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"Argument `features` expected a network with finite features, but got '{name}', which gives NaN or "
            f"infinite ones for {len(broken)} of {len(rows)} {argument} images, the first "
            f"'{printable(names[broken[0]])}'. "
            "Choose another network, or remove the images."
        )


class _Rows:
    def __init__(self, name: str, network: nn.Module, device: str) -> None:
        self.name, self.network, self.device, self.on_sphere = name, network, device, name in ON_SPHERE

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        with full_precision(torch.device(self.device).type):
            try:
                parts = images.split(self._batch(images))
                batches = [self.network(part.to(self.device)).flatten(1).float() for part in parts]
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # what TorchScript says runs over many lines; the last one is the reason
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(
                    f"Argument `features` expected a network that takes images of shape {tuple(images.shape[1:])}, "
                    f"but got '{self.name}', which fails ({reason}). Bring them to its size with --image-size."
                ) from error
        rows = torch.cat(batches)
        return F.normalize(rows) if self.on_sphere else rows

    def _batch(self, images: Tensor) -> int:
        if torch.device(self.device).type != "cpu":
            return BATCH
        pixels = SIDES[self.name] ** 2 if self.name in SIDES else max(1, images.shape[-2] * images.shape[-1])
        return max(4, min(BATCH, PIXELS_AT_ONCE // pixels))


def _hash(name: str, network: nn.Module) -> str:
    """Hash the weights, and the whole file where that is what the user named: TorchScript holds code as well."""
    file = Path(name)
    return digest(file.read_bytes() if file.is_file() else b"", hash_weights(network))
