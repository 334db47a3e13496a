"""Checkpoints of fine-tuned pipelines: what was trained, and the name of what was not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_iet.modules.latent_diffusion.encoders import fingerprint
from lightning_iet.utilities.errors import require


def add_lora(unet: Any, *, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    r"""Freeze a denoiser and put adapters into it: :math:`W x + (\alpha / r)\, B A x`, where B starts at zero.

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022,
    https://arxiv.org/abs/2106.09685.

    Args:
        unet: Of diffusers; its adapters are all that requires gradients afterwards.
        rank: :math:`r`, the rows of A.
        alpha: :math:`\alpha`; ``None`` = r, so that the adapters count in full.
        targets: Ends of names of layers.

    Raises:
        ValueError: If no layer has such a name.
    """
    peft = require("peft", "text-to-image")
    unet.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets), init_lora_weights="gaussian"
    )
    try:
        unet.add_adapter(config)
    except ValueError as error:
        raise ValueError(
            f"Argument `lora_targets` expected ends of names of layers of {type(unet).__name__}, such as to_q or "
            f"to_out.0, but got {list(targets)}: {str(error).splitlines()[0]}"
        ) from error


def fuse_lora(unet: Any) -> None:
    """Work adapters into the weights, in place: afterwards the denoiser is an ordinary one."""
    unet.fuse_lora()
    unet.unload_lora()


_NAME = "TextToImageModule"


class SavesTrainedWeights(nn.Module):
    """What a :class:`~lightning_iet.modules.TextToImageModule` does about checkpoints: it is mixed into that class."""

    def _remember(self, **arguments: Any) -> None:
        """Take note of what is frozen, and of the arguments that build the module again."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        frozen = {
            name: parameter
            for name, parameter in self.named_parameters()
            if name not in trained and not name.startswith("ema.")
        }
        self._frozen_names = frozenset(frozen)
        self._specification = {"module": _NAME, **arguments, "frozen": fingerprint(frozen)}

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights but the frozen ones."""
        weights = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in self._frozen_names:
            weights.pop(prefix + name, None)
        return weights

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: If weights are missing or too many, or their shapes differ.
        """
        own = self.state_dict()
        shapes = [{name: tuple(tensor.shape) for name, tensor in found.items()} for found in (own, state_dict)]
        differing = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
        if strict and differing:
            name = differing[0]
            raise ValueError(
                f"The checkpoint expected another architecture, but got {len(differing)} weights that differ: '{name}' "
                f"has the shape {shapes[1].get(name)} there, and {shapes[0].get(name)} here. Use the settings of the "
                "run that wrote it."
            )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if name not in self._frozen_names]
        return type(result)(missing, result.unexpected_keys)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build the module again."""
        checkpoint["specification"] = dict(self._specification)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See that the weights meet the same frozen ones that they were trained with.

        Raises:
            ValueError: If they do not.
        """
        saved = checkpoint.get("specification", {})
        for name in ("lora_rank", "lora_alpha", "lora_targets"):
            if name in saved and saved[name] != self._specification[name]:
                raise ValueError(
                    f"The checkpoint expected `{name}` {saved[name]}, but got {self._specification[name]}. Use the "
                    "settings of the run that wrote it."
                )
        if saved.get("frozen") not in (None, self._specification["frozen"]):
            raise ValueError(
                f"The checkpoint expected the frozen weights of '{saved.get('pretrained')}', with which it was "
                f"trained, but got others, of '{self._specification['pretrained']}'. Give the same pipeline as "
                "`pretrained`."
            )


def arguments_of(path: Any) -> dict[str, Any]:
    """Arguments of the class, as a checkpoint specifies them.

    Args:
        path: The checkpoint.

    Raises:
        ValueError: If it is a checkpoint of something else.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("specification", {})
    if saved.get("module") != _NAME:
        raise ValueError(
            f"Argument `checkpoint_path` expected a checkpoint of a {_NAME}, but got '{path}' of "
            f"{saved.get('module', 'another module')}."
        )
    return {name: value for name, value in saved.items() if name not in ("module", "frozen")}


def check_arguments(lora_rank: int | None, warmup_steps: int, ema_decay: float, caption_dropout: float) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: Naming the argument.
    """
    for name, value, least in (("lora_rank", lora_rank, 1), ("warmup_steps", warmup_steps, 0)):
        if value is not None and value < least:
            raise ValueError(f"Argument `{name}` expected an integer ≥ {least}, but got {value}.")
    for name, share in (("ema_decay", ema_decay), ("caption_dropout", caption_dropout)):
        if not 0 <= share < 1:
            raise ValueError(f"Argument `{name}` expected a number in [0, 1), but got {share}.")
