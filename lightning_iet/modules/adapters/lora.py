"""Low-rank adapters (LoRA), by peft."""

import re
from collections.abc import Sequence
from typing import Any

from lightning_iet.utilities.errors import first_line, require

_EXTRA = "text-to-image"


def add_lora(
    network: Any, *, rank: int, alpha: float | None = None, targets: Sequence[str], whole_names: bool = False
) -> None:
    r"""Freeze a network and put adapters into it: :math:`W x + (\alpha / r)\, B A x`, where B starts at zero.

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022,
    https://arxiv.org/abs/2106.09685.

    Args:
        network: Its adapters are all that requires gradients afterwards.
        rank: :math:`r`, the rows of A.
        alpha: :math:`\alpha`; ``None`` = r, so that the adapters count in full.
        targets: Ends of names of layers.
        whole_names: Whether they are whole names instead.

    Raises:
        ModuleNotFoundError: Without the package ``peft``.
        ValueError: If no layer has such a name, or one of them cannot have adapters.
    """
    peft = require("peft", _EXTRA)
    network.requires_grad_(False)
    names: Any = "|".join(re.escape(target) for target in targets) if whole_names else list(targets)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=names, init_lora_weights="gaussian"
    )
    try:
        if hasattr(network, "add_adapter"):
            network.add_adapter(config)
        else:
            peft.inject_adapter_in_model(config, network)
    except ValueError as error:
        raise ValueError(
            f"Argument `lora_targets` expected ends of names of layers of {type(network).__name__}, such as to_q or "
            f"to_out.0, but got {list(targets)[:8]}: {first_line(error)}"
        ) from error


def fold_lora(network: Any) -> None:
    """Work adapters into the weights, in place: afterwards the network is an ordinary one."""
    _remove(network, folded=True)


def remove_lora(network: Any) -> None:
    """Take the adapters out again: the weights are those of before."""
    _remove(network, folded=False)


def _remove(network: Any, *, folded: bool) -> None:
    adapted = [(name, layer) for name, layer in network.named_modules() if hasattr(layer, "lora_A")]
    for name, layer in adapted:
        if folded:
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer().requires_grad_(False))
    if adapted and getattr(network, "_hf_peft_config_loaded", False):
        network._hf_peft_config_loaded = False
        del network.peft_config
