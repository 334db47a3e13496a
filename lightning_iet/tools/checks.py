"""What an evaluation needs, looked for before hours of training go into a run that cannot be evaluated."""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

__all__ = ["check_images", "check_losses", "check_module", "check_settings", "real_sets"]

_SETS = ("train_set", "control_set", "reference_set")


def check_settings(num_samples: int, sampler: str, **at_least_one: int | None) -> None:
    """Refuses settings of an evaluation that are out of range; ``None`` is what was left out.

    Raises:
        ValueError: naming the setting.
    """
    if num_samples < 0 or num_samples == 1:
        raise ValueError(
            f"Argument `num_samples` expected an integer ≥ 2, or 0 for no evaluation, but got {num_samples}."
        )
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"Argument `sampler` expected 'ddim' or 'ddpm', but got {sampler!r}.")
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"Argument `{name}` expected an integer ≥ 1, but got {value}.")


def real_sets(datamodule: object) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
    """Takes the training, control and reference set from a data module that is set up.

    Raises:
        ValueError: there is no data module, or it lacks one of them.

    Example:
        >>> from lightning_iet import DigitsDataModule
        >>> digits = DigitsDataModule()
        >>> digits.setup("fit")
        >>> [len(images) for images in real_sets(digits)]
        [64, 512, 1221]
        >>> real_sets(None)
        Traceback (most recent call last):
        ...
        ValueError: Argument `datamodule` expected data sets `train_set`, `control_set`, `reference_set` to evaluate ...
    """
    missing = [name for name in _SETS if getattr(datamodule, name, None) is None]
    if missing:
        found = "none" if datamodule is None else f"{type(datamodule).__name__} without `{'`, `'.join(missing)}`"
        raise ValueError(
            f"Argument `datamodule` expected data sets `{'`, `'.join(_SETS)}` to evaluate with, but got {found}. Set"
            " them in its setup() (images to train on, to stand in for generated ones, and for FID), or switch the"
            " evaluation off with num_samples=0."
        )
    train, control, reference = (getattr(datamodule, name) for name in _SETS)
    return train, control, reference


def check_module(module: nn.Module, *, num_inference_steps: int) -> None:
    """Refuses a module that cannot draw images in so many steps.

    Raises:
        TypeError: it has no method ``sample``.
        ValueError: the noise schedule is shorter.
    """
    if not callable(getattr(module, "sample", None)):
        raise TypeError(
            f"Argument `model` expected a module with a method `sample` to evaluate, but got {type(module).__name__}."
            " Use DiffusionModule, write such a method, or switch the evaluation off with num_samples=0."
        )
    most = getattr(module, "num_timesteps", None)
    if isinstance(most, int) and num_inference_steps > most:
        raise ValueError(
            f"Argument `num_inference_steps` expected at most {most}, the timesteps of training, but got"
            f" {num_inference_steps}. Take fewer."
        )


def check_losses(module: nn.Module) -> None:
    """Refuses a module that does not tell the loss of an image.

    Raises:
        TypeError: it has no method ``losses``, or does not say how many timesteps there are.
    """
    losses = getattr(module, "losses", None)
    of_images = callable(losses) and next(iter(inspect.signature(losses).parameters), "") == "images"
    if not of_images or not hasattr(module, "num_timesteps"):
        raise TypeError(
            "Argument `measures` expected a module with `losses(images, timesteps, noise, use_ema=…)`, `num_timesteps`"
            f" for membership_inference, but got {type(module).__name__}. Write them, or leave this measure out."
        )


def check_images(images: Tensor, train: Tensor) -> None:
    """Refuses images, ``(N, C, H, W)``, that cannot be compared with those of training, ``(M, C, H, W)``.

    Raises:
        ValueError: the shapes differ, or a value is NaN or infinite.
    """
    if images.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"Argument `model` expected a module that draws images like those of training, {tuple(train.shape[1:])},"
            f" but got {tuple(images.shape[1:])}. Set the channels and size of its denoiser (`in_channels`,"
            " `sample_size`)."
        )
    if not images.isfinite().all():
        raise ValueError(
            "Argument `model` expected a module that draws finite images, but got NaN or infinite values: its weights"
            " have diverged. Train with a lower learning rate, or with gradient clipping."
        )
