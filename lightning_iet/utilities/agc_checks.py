"""What anti-gradient control cannot work with, refused before the first step, each with its remedy."""

from typing import Any

from lightning.fabric import Fabric

__all__ = ["check_arguments", "check_reference", "check_some_losses", "check_trainer"]

_LOOP = "Call lightning_iet.functional.anti_gradient in the training loop, see docs/howto/plain-pytorch.md."
_SPREAD = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def check_arguments(threshold: float, decay: float, num_timesteps: int, num_bins: int | None) -> None:
    """Refuse values that are out of range.

    Raises:
        ValueError: Naming the argument, and what to pass instead.
    """
    if not 0 <= threshold <= 1:
        remedy = f"For a mem_ratio of {threshold} pass {1 / threshold:.3g}." if threshold > 1 else "0 switches AGC off."
        raise ValueError(f"Argument `threshold` expected a number in [0, 1], but got {threshold}. {remedy}")
    if not 0 <= decay < 1:
        raise ValueError(f"Argument `decay` expected a number in [0, 1), but got {decay}. 0.8 is the published value.")
    if num_timesteps < 1:
        raise ValueError(
            f"Argument `num_timesteps` expected at least 1, but got {num_timesteps}. Pass that of the noise schedule."
        )
    if num_bins is not None and num_bins < 1:
        raise ValueError(f"Argument `num_bins` expected at least 1, but got {num_bins}. Leave it out for one each.")


def check_reference(reference: str, normalize: str | None, **at_least_one: int | None) -> None:
    """Refuse a reference that is none, and numbers below 1.

    Raises:
        ValueError: Naming the argument, and what to pass instead.
    """
    for name, value, choices in (
        ("reference", reference, ("train", "held_out", "other_shards")),
        ("normalize", normalize, (None, "kept", "batch")),
    ):
        if value not in choices:
            raise ValueError(f"Argument `{name}` expected one of {', '.join(map(repr, choices))}, but got {value!r}.")
    for name, number in at_least_one.items():
        if number is not None and number < 1:
            raise ValueError(f"Argument `{name}` expected at least 1, but got {number}. Leave it out for the default.")


def check_some_losses(module: object, num_steps: int) -> None:
    """Refuse a run whose steps had no losses.

    Raises:
        ValueError: If there was any step.
    """
    if num_steps:
        raise ValueError(
            f"AntiGradientControl expected losses to learn from, but none of {num_steps} steps had a backward pass:"
            f" {type(module).__name__}.training_step returned None each time. Return a loss."
        )


def check_trainer(trainer: Any, callback: Any) -> None:
    """Refuse what is no Lightning trainer, and trainers that spread one model over processes.

    Raises:
        TypeError: For Fabric.
        ValueError: For FSDP, DeepSpeed and the like, and for several callbacks that are not told apart.
    """
    if isinstance(trainer, Fabric):
        raise TypeError(f"AntiGradientControl expected a Trainer, but got {type(trainer).__name__}. {_LOOP}")
    strategies = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if strategies.intersection(_SPREAD):
        raise ValueError(
            f"AntiGradientControl expected a strategy that keeps the model whole, but got"
            f" {type(trainer.strategy).__name__}. Use the strategy 'auto' or 'ddp'."
        )
    names = [other.denoiser for other in getattr(trainer, "callbacks", ()) if isinstance(other, type(callback))]
    if len(names) > 1 and (None in names or len(set(names)) < len(names)):
        raise ValueError(
            f"AntiGradientControl expected `denoiser` to tell several callbacks apart, but got {names}."
            ' Name the denoiser of each: AntiGradientControl(denoiser="…").'
        )
