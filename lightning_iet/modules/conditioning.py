"""The conditions of a denoiser: class labels, or conditions of any other kind."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn


def image_shape_of(denoiser: nn.Module) -> tuple[int, int, int] | None:
    """Return ``(C, H, W)`` of the images, from the denoiser's ``config``; None if that does not say.

    Example:
        >>> image_shape_of(nn.Identity()) is None
        True
    """
    config = getattr(denoiser, "config", None)
    size = getattr(config, "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width  # type: ignore[union-attr]


def check_denoiser(denoiser: nn.Module) -> None:
    """Refuse a denoiser that cannot be trained or sampled from.

    Raises:
        ValueError: If it predicts other channels than those of the images, or its own ``sample_size`` does not fit it.
    """
    config: Any = getattr(denoiser, "config", None)
    inside, outside = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    if inside is not None and outside is not None and inside != outside:
        also = ": it also predicts a variance, which is not supported" if outside == 2 * inside else ""
        raise ValueError(
            f"Argument `unet` expected as many output channels as input channels, {inside}, but got {outside}{also}. "
            f"Set `out_channels` to {inside}."
        )
    shape = image_shape_of(denoiser)
    if shape is not None:
        check_image_shape(denoiser, shape)


def check_image_shape(denoiser: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse images of shape ``(C, H, W)`` that do not fit a network of diffusers; other denoisers take any.

    Raises:
        ValueError: If it has other channels, cannot halve the images as often as it has to, or takes one size only.

    Example:
        >>> from diffusers import UNet2DModel
        >>> blocks = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
        >>> unet = UNet2DModel(block_out_channels=(4, 4, 4), norm_num_groups=2, add_attention=False, **blocks)
        >>> check_image_shape(unet, (3, 32, 30))
        Traceback (most recent call last):
        ...
        ValueError: Argument `unet` expected images whose height and width are multiples of 4 (it halves them 2 times),
        but got 32 × 30. ...
    """
    config: Any = getattr(denoiser, "config", None)
    if config is None or len(shape) != 3:
        return
    channels, height, width = shape
    if getattr(config, "in_channels", channels) != channels:
        raise ValueError(
            f"Argument `unet` expected images with {config.in_channels} channels, but got {channels}. "
            f"Set its `in_channels` and `out_channels` to {channels}, or convert the images."
        )
    if hasattr(config, "patch_size"):  # a transformer, with one position embedding for each patch
        expected = image_shape_of(denoiser)
        if (expected is not None and (height, width) != expected[1:]) or height % config.patch_size:
            raise ValueError(
                f"Argument `unet` expected square images of its `sample_size` {config.sample_size}, a multiple of its "
                f"`patch_size` {config.patch_size}, but got {height} × {width}. Set it to the size of the images."
            )
    elif hasattr(config, "down_block_types"):
        halvings = len(config.down_block_types) - 1
        factor = 2**halvings
        if height % factor or width % factor:
            raise ValueError(
                f"Argument `unet` expected images whose height and width are multiples of {factor} (it halves them "
                f"{halvings} times), but got {height} × {width}. Resize the images, or take fewer blocks."
            )


Labels = Tensor | Sequence[int] | int


@dataclass(frozen=True)
class Conditioning:
    """How a denoiser takes the condition of each sample.

    Attributes:
        keyword: Name of the argument; None = the third one, by position.
        num_classes: Labels are 0 … ``num_classes`` - 1; None = conditions are not labels, and are passed as they are.
        null: The label that says “any class”; None = there is none, and no guidance.

    Example:
        >>> classes = Conditioning("class_labels", num_classes=10, null=10)
        >>> classes.drop(torch.tensor([3, 4]), rate=1.0)
        tensor([10, 10])
        >>> classes.labels_of_images(8, 4)  # in turn, so that all classes get equal shares
        tensor([8, 9, 0, 1])
    """

    keyword: str | None
    num_classes: int | None = None
    null: int | None = None

    def predict(self, denoiser: Callable[..., Any], images: Tensor, timesteps: Tensor, condition: Any) -> Any:
        """Call the denoiser on noisy images, shape ``(B, C, H, W)``; the condition ``None`` is the null label.

        Raises:
            ValueError: If there is no condition, and no null label either.
        """
        if condition is None:
            condition = self.null_labels(images)
        # Transformers of diffusers take one timestep per image only.
        timesteps = timesteps.expand(len(images))
        if self.keyword is None:
            return denoiser(images, timesteps, condition)
        return denoiser(images, timesteps, **{self.keyword: condition})

    def null_labels(self, images: Tensor) -> Tensor:
        """Return the null label for each image or label, shape ``(B,)``.

        Raises:
            ValueError: If there is none.
        """
        if self.null is None:
            raise ValueError(
                "Argument `condition` expected one for each image, but got none, and the denoiser has no null label. "
                "Give labels, or train with `label_dropout` > 0 and one more embedding than classes."
            )
        return torch.full((len(images),), self.null, device=images.device)

    def add_null(self, labels: Tensor) -> Tensor:
        """Return B null labels followed by the B labels, shape ``(2B,)``: both predictions of guidance in one call.

        Raises:
            ValueError: If there is no null label.
        """
        return torch.cat([self.null_labels(labels), labels])

    def drop(self, labels: Tensor, rate: float) -> Tensor:
        """Replace a share of the labels by the null label, at random (Ho & Salimans 2022)."""
        assert self.null is not None  # noqa: S101 (find_conditioning refuses dropping without one)
        return labels.masked_fill(torch.rand(len(labels), device=labels.device) < rate, self.null)

    def check(self, condition: Any) -> None:
        """Refuse labels that are none, or out of range. On an accelerator this waits for the device.

        Raises:
            TypeError: If they are no labels.
            ValueError: If one is out of range.
        """
        if self.num_classes is None:
            return
        wanted = f"Argument `condition` expected class labels 0 … {self.num_classes - 1}"
        if not isinstance(condition, Tensor) or condition.ndim != 1 or condition.is_floating_point():
            kind = type(condition).__name__
            got = f"{condition.dtype} {tuple(condition.shape)}" if isinstance(condition, Tensor) else kind
            raise TypeError(f"{wanted}, integers of shape (B,), but got {got}. Batches are (image, label, index).")
        wrong = condition[(condition < 0) | (condition >= self.num_classes)]
        if len(wrong):
            raise ValueError(
                f"{wanted}, but got {int(wrong[0])}. Set the number of classes of the denoiser "
                "(`num_class_embeds`, and one more for `label_dropout`) to that of the data."
            )

    def warn_of_classes_without_images(self, labels: Tensor) -> None:
        """Warn if the denoiser has more classes than the data: they would be sampled, though never trained."""
        found = int(labels.max()) + 1 if len(labels) else 0
        if self.num_classes is not None and found < self.num_classes:
            rank_zero_warn(
                f"The denoiser has {self.num_classes} classes, but the data have {found}: without labels, images of "
                f"all classes are sampled. If a further embedding is the null label, say `num_classes: {found}`."
            )

    def labels_of_images(self, first: int, num: int, labels: Labels | None = None) -> Tensor:
        """Return labels of the images numbered ``first`` … ``first + num - 1``, shape ``(num,)`` (or what was given).

        Labels are given for each image, or one for all. Without, image i gets class i mod ``num_classes`` *(our choice:
        it depends on i alone, and all classes get equal shares)*.

        Raises:
            ValueError: If labels are missing where they are needed, or their number or range is wrong.
        """
        if labels is None:
            if self.num_classes is None:
                raise ValueError(
                    "Argument `labels` expected a condition for each image, but got none: the denoiser's conditions "
                    "are not classes to be sampled in turn. Give them, or `num_classes`."
                )
            return torch.arange(first, first + num) % self.num_classes
        found = torch.as_tensor(labels)
        found = found.expand(num) if found.ndim == 0 else found
        if len(found) != num:
            raise ValueError(f"Argument `labels` expected one for each of {num} images, but got {len(found)}.")
        self.check(found)
        return found


def find_conditioning(denoiser: nn.Module, *, num_classes: int | None, label_dropout: float) -> Conditioning | None:
    """Return how a denoiser takes conditions; None for one that takes none.

    Networks of diffusers say in their ``config`` how many label embeddings they have; the first one beyond the classes
    is the null label. Another denoiser takes conditions if ``num_classes`` says so, or if its ``forward`` cannot be
    called with two arguments alone.

    Args:
        denoiser: The network.
        num_classes: Number of classes; ``None`` = one for each label embedding, but for one if labels are dropped.
        label_dropout: Share of the labels that are to be dropped.

    Raises:
        ValueError: If the denoiser has too few label embeddings, or takes no labels though some are to be dropped.

    Example:
        >>> find_conditioning(nn.Bilinear(2, 2, 2), num_classes=None, label_dropout=0) is None
        True
    """
    config: Any = getattr(denoiser, "config", None)
    table = next((part for part in denoiser.modules() if isinstance(part, LabelEmbedding)), None)  # of a DiT
    if getattr(config, "class_embed_type", None) is not None:
        raise ValueError(
            f"Argument `unet` expected labels that are embedded (class_embed_type null), but got "
            f"{config.class_embed_type!r}. Set `num_class_embeds` instead."
        )
    embeddings = getattr(config, "num_class_embeds", None)
    if table is not None:
        num_classes = table.num_classes if num_classes is None else num_classes
        embeddings = table.embedding_table.num_embeddings
    if embeddings is not None:
        return _embedded(embeddings, num_classes, label_dropout)
    names: list[str] = []
    if not hasattr(denoiser, "from_config"):
        parameters = inspect.signature(denoiser.forward).parameters.values()
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        # A third argument is a condition if it has no default, or if classes are asked for.
        names = [p.name for p in positional[2:] if p.default is p.empty or num_classes is not None]
    if num_classes is not None and names:
        keyword = "class_labels" if "class_labels" in names else None
        return Conditioning(keyword, num_classes, null=num_classes)
    if label_dropout or num_classes is not None:
        raise ValueError(
            f"Arguments `label_dropout` and `num_classes` expected a denoiser of classes, but got {label_dropout} and "
            f"{num_classes} for a {type(denoiser).__name__} without. Set `num_class_embeds`, or leave them out."
        )
    return Conditioning(None) if names else None


def disable_label_dropout(denoiser: nn.Module) -> None:
    """Keep a DiT from dropping labels by itself in training mode: the option ``label_dropout`` says how many."""
    for part in denoiser.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0


def check_guidance(conditioning: Conditioning | None, scale: float) -> None:
    """Refuse guidance where the denoiser has no null label.

    Raises:
        ValueError: For a scale other than 1.
    """
    if scale != 1 and (conditioning is None or conditioning.null is None):
        raise ValueError(
            f"Argument `guidance_scale` expected 1 for a denoiser without a null label, but got {scale}. "
            "Train with `label_dropout` > 0 and one more label embedding than classes."
        )


def _embedded(embeddings: int, num_classes: int | None, label_dropout: float) -> Conditioning:
    """The conditioning of a network of diffusers with so many label embeddings."""
    if num_classes is None:
        num_classes = embeddings - 1 if label_dropout else embeddings
    needed = num_classes + (label_dropout > 0)
    if embeddings < needed or num_classes < 1:
        raise ValueError(
            f"Argument `unet` expected at least {max(needed, 1 + (label_dropout > 0))} label embeddings "
            f"({num_classes} classes{', and one for dropped labels' if label_dropout else ''}), but got {embeddings}. "
            "Set its `num_class_embeds`."
        )
    return Conditioning("class_labels", num_classes, null=num_classes if num_classes < embeddings else None)
