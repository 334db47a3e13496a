"""Adapters: trained in place of a denoiser's weights, zero at the start, folded into the weights at the end."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_iet.functional.checks import check_at_least
from lightning_iet.functional.parameter_groups import (
    DIFFFIT_BRANCH_OFFSET,
    DIFFFIT_OFFSET,
    LORA_FACTORS,
    LORA_TARGETS,
    REST,
    SVDIFF_SHIFT,
    Family,
    Granularity,
    ParameterGroups,
    check_words,
    find_groups,
    is_norm,
    trained_parameters,
)
from lightning_iet.modules.svdiff import add_svdiff, fold_svdiff, remove_svdiff
from lightning_iet.utilities.errors import first_line, require

__all__ = [
    "Selection",
    "add_difffit",
    "add_lora",
    "add_svdiff",
    "fold_adapters",
    "fold_difffit",
    "fold_lora",
    "fold_svdiff",
    "parameter_groups",
    "remove_adapters",
    "remove_difffit",
    "remove_lora",
    "remove_svdiff",
    "select_parameters",
]

_EXTRA = "text-to-image"
_NAMES = (DIFFFIT_OFFSET, DIFFFIT_BRANCH_OFFSET)


def add_difffit(network: nn.Module, parameters: Iterable[str]) -> None:
    r"""Multiply the outputs of layers by :math:`\gamma = 1 + g`, where g = 0 at the start.

    The trained parameter is g, not γ *(our choice: weight decay then pulls to the pretrained network; published: γ,
    which it pulls to 0)*. Where a layer has two scales, as in the published code, both multiply its output. At g = 0
    outputs are those of before, bit for bit. Scales are forward hooks: weights and their names stay as they are.

    Source: Xie et al., *DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient
    Fine-Tuning*, ICCV 2023, https://arxiv.org/abs/2304.06648.

    Args:
        network: Any network, before ``torch.compile``.
        parameters: Names of the scales to be: that of a layer with a weight, a dot, and ``difffit_offset`` or
            ``difffit_branch_offset``.

    Raises:
        ValueError: For other names, or a layer that has the scale already.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 2))
        >>> add_difffit(network, ["0.difffit_offset"])
        >>> before = network(torch.ones(1, 1))
        >>> _ = network[0].difffit_offset.data.fill_(1.0)
        >>> torch.equal(network(torch.ones(1, 1)), 2 * before)
        True
    """
    for parameter in parameters:
        path, _, name = parameter.rpartition(".")
        layer = network.get_submodule(path)
        weight = getattr(layer, "weight", None)
        if name not in _NAMES or weight is None or name in layer._parameters:
            raise ValueError(
                f"DiffFit expected the name of a layer with a weight and without this scale, then one of "
                f"{', '.join(_NAMES)}, but got '{parameter}'."
            )
        if not _offsets(layer):
            layer.register_forward_hook(_scale)
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        layer.register_parameter(name, nn.Parameter(torch.zeros(len(weight), dtype=dtype, device=weight.device)))


@torch.no_grad()
def fold_difffit(network: nn.Module) -> None:
    """Multiply rows of weights, and biases, by the scales, and take these out: an ordinary network again.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 2))
        >>> add_difffit(network, ["0.difffit_offset"])
        >>> _ = network[0].difffit_offset.data.fill_(1.0)
        >>> scaled = network(torch.ones(1, 1))
        >>> fold_difffit(network)
        >>> torch.equal(network(torch.ones(1, 1)), scaled), list(network.state_dict())
        (True, ['0.weight', '0.bias'])
    """
    layers: list[Any] = list(network.modules())
    for layer in layers:
        for offset in _offsets(layer):
            scale = 1 + offset
            layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
            if layer.bias is not None:
                layer.bias.mul_(scale)
    remove_difffit(network)


def remove_difffit(network: nn.Module) -> None:
    """Take the scales out; biases and norms that were trained beside them stay as they are now."""
    for layer in network.modules():
        if _offsets(layer):
            for name in _NAMES:
                layer._parameters.pop(name, None)
            hooks = layer._forward_hooks
            for number in [number for number, hook in hooks.items() if hook is _scale]:
                del hooks[number]


def _offsets(layer: nn.Module) -> list[Tensor]:
    return [offset for name in _NAMES if (offset := layer._parameters.get(name)) is not None]


def _scale(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    behind_channels = output.ndim - 2 if isinstance(layer, nn.modules.conv._ConvNd) else 0
    for offset in _offsets(layer):
        output = output * (1 + offset).to(output.dtype).reshape(-1, *[1] * behind_channels)
    return output


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
    _unwrap_lora(network, folded=True)


def remove_lora(network: Any) -> None:
    """Take the adapters out again: the weights are those of before."""
    _unwrap_lora(network, folded=False)


def _unwrap_lora(network: Any, *, folded: bool) -> None:
    adapted = [(name, layer) for name, layer in network.named_modules() if hasattr(layer, "lora_A")]
    for name, layer in adapted:
        if folded:
            layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, layer.get_base_layer().requires_grad_(False))
    if adapted and getattr(network, "_hf_peft_config_loaded", False):
        network._hf_peft_config_loaded = False
        del network.peft_config


@dataclass(frozen=True)
class Selection:
    """Which parameters of a denoiser train.

    Attributes:
        family: See :func:`~lightning_iet.functional.parameter_groups.find_groups`.
        mask: One character, 0 or 1, for each group; None = all ones.
        granularity: See :func:`~lightning_iet.functional.parameter_groups.find_groups`.
        rest: Whether the family's parameters in no group train, if the mask does not say; None = they do.
        groups: Groups of one's own, a mapping from names to regular expressions.
        lora_rank: Rank of the adapters of ``lora``.
        lora_alpha: Their strength is ``lora_alpha / lora_rank``; None = 1.
        lora_targets: Ends of names of the layers that get them.

    Example:
        >>> Selection("bias").is_neutral, Selection().is_neutral
        (False, True)
    """

    family: Family = "all"
    mask: str | None = None
    granularity: Granularity = "block"
    rest: bool | None = None
    groups: Mapping[str, str] | None = None
    lora_rank: int = 4
    lora_alpha: float | None = None
    lora_targets: Sequence[str] = LORA_TARGETS

    @property
    def is_neutral(self) -> bool:
        """Whether everything trains, as without a selection."""
        return self.family == "all" and self.mask is None and self.rest is not False

    def find(self, network: nn.Module) -> ParameterGroups:
        """The groups of a network without adapters.

        Raises:
            ValueError: See :func:`~lightning_iet.functional.parameter_groups.find_groups`.
        """
        return find_groups(
            network,
            self.family,
            granularity=self.granularity,
            groups=self.groups,
            lora_rank=self.lora_rank,
            lora_targets=self.lora_targets,
        )

    def specification(self) -> dict[str, Any]:
        """The selection in plain types, for a checkpoint; ``Selection(**specification)`` is equal to it."""
        plain = asdict(self)
        return plain | {
            "lora_targets": list(self.lora_targets),
            "groups": None if self.groups is None else dict(self.groups),
        }

    def check(self) -> None:
        """Refuse what can be known to be wrong without a network.

        Raises:
            ValueError: For unknown words, or a mask or a rank that cannot be.
            ModuleNotFoundError: For ``lora`` without peft.
        """
        check_words(self.family, self.granularity, self.groups)
        if self.mask is not None and (not isinstance(self.mask, str) or not self.mask or set(self.mask) - {"0", "1"}):
            raise ValueError(f"Argument `mask` expected a string of 0 and 1, but got {self.mask!r}.")
        check_at_least(1, lora_rank=self.lora_rank)
        if self.family == "lora":
            require("peft", _EXTRA)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))


def describe_selection(groups: ParameterGroups, selection: Selection, num_trained: int) -> str:
    """Say in a line what of a network trains.

    Example:
        >>> network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> describe_selection(find_groups(network, "bias"), Selection("bias", "01"), 2)
        'bias in 1 of 2 blocks; 2 for 12 parameters (16.6667 %)'
    """
    switches = groups.switches(selection.mask, rest=selection.rest)
    on = sum(switches[group.name] for group in groups.groups)
    what = "blocks" if groups.patterns is None else "groups"
    rest = "" if not groups.rest else " and in the rest" if switches[REST] else ", not in the rest"
    share = f"{100 * num_trained / groups.total:.4f} %"
    where = f"{on} of {len(groups.groups)} {what}{rest}"
    return f"{groups.family} in {where}; {num_trained:,} for {groups.total:,} parameters ({share})"


def differing_options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Say in which options two specifications of selections differ: that of a checkpoint, and what is to go on with it.

    Example:
        >>> differing_options({"family": "lora", "lora_alpha": 4.0}, {"family": "lora", "lora_alpha": None})
        'lora_alpha was 4.0 and is None'
    """
    names = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    return ", ".join(f"{name} was {saved.get(name)!r} and is {own.get(name)!r}" for name in names)


def select_parameters(
    network: nn.Module, selection: Selection, *, bases: Path | str | None = None
) -> tuple[ParameterGroups, frozenset[str]]:
    """Add the adapters that a selection trains to a network, and freeze everything else.

    Adapters start at zero: the network computes what it did, bit for bit. Groups that the mask switches off get none.
    Parameters that were frozen while others were trained stay frozen (a table of positions, say), and a layer whose
    weight was gets no adapter; in a network that is frozen as a whole, the selection says what trains.

    Args:
        network: A denoiser without adapters, in the type and with the weights that it is trained from.
        selection: What trains.
        bases: A folder for SV-DIFF's singular value decompositions, see
            :func:`~lightning_iet.modules.adapters.add_svdiff`.

    Returns:
        The groups, and the names of the parameters that train.

    Raises:
        ValueError: If the selection does not fit the network, or nothing would train.

    Example:
        >>> from diffusers import UNet2DModel
        >>> network = UNet2DModel(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, add_attention=False,
        ...                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
        >>> groups, trained = select_parameters(network, Selection("bias", "011000"))
        >>> groups.bits[1:3], len(trained)
        (('mid_block.resnets.0', 'mid_block.resnets.1'), 10)
        >>> trained == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        True
    """
    groups = selection.find(network)
    trained = trained_parameters(groups, selection.mask, rest=selection.rest)
    if not trained:
        raise ValueError(
            f"Argument `mask` expected at least one 1, but got {selection.mask!r} without the rest, with which nothing "
            "would train. Set a bit."
        )
    parameters = dict(network.named_parameters())
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    if len(frozen) < len(parameters):
        trained = frozenset(name for name in trained if _weight_of(name) not in frozen)
    if not trained:
        raise ValueError(
            f"Argument `family` expected parameters that are not frozen in {type(network).__name__}, but got "
            f"{selection.family!r}, all of whose parameters are frozen while others are trained. Unfreeze them first."
        )
    if selection.family == "lora":
        layers = {name.partition(".lora_")[0]: None for name in sorted(trained)}
        add_lora(network, rank=selection.lora_rank, alpha=selection.lora_alpha, targets=list(layers), whole_names=True)
    elif selection.family == "svdiff":
        order = [name for name, _ in network.named_modules()]
        layers = {name.removesuffix(SVDIFF_SHIFT).removesuffix("."): None for name in trained}
        add_svdiff(network, [name for name in order if name in layers], folder=bases)
    elif selection.family == "difffit":
        offsets = (DIFFFIT_OFFSET, DIFFFIT_BRANCH_OFFSET)
        add_difffit(network, sorted(name for name in trained if name.rpartition(".")[2] in offsets))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)
    return groups, trained


def _weight_of(name: str) -> str:
    """Name of the weight that a parameter of an adapter stands beside; a parameter of the network is its own.

    Example:
        >>> _weight_of("conv.parametrizations.weight.0.shift"), _weight_of("to_q.lora_A.default.weight")
        ('conv.weight', 'to_q.weight')
        >>> _weight_of("to_q.difffit_offset"), _weight_of("conv.bias")
        ('to_q.weight', 'conv.bias')
    """
    for ending in (SVDIFF_SHIFT, DIFFFIT_OFFSET, DIFFFIT_BRANCH_OFFSET, *LORA_FACTORS):
        if name == ending or name.endswith(f".{ending}"):
            return f"{name.removesuffix(ending)}weight"
    return name


def fold_adapters(network: nn.Module) -> None:
    """Work all adapters into the weights, in place: the network has the names of before, and computes the same.

    The difference is one of rounding (1e-5 relative at most, in float32).
    """
    fold_svdiff(network)
    fold_difffit(network)
    fold_lora(network)


def remove_adapters(network: nn.Module) -> None:
    """Take all adapters out: the network computes what it did before they were trained.

    Weights that were trained beside them (biases and norms of DiffFit) stay as they are now.
    """
    remove_svdiff(network)
    remove_difffit(network)
    remove_lora(network)


def parameter_groups(network: nn.Module, *, norm_lr_scale: float = 1e-2) -> list[dict[str, Any]]:
    """The trained parameters, for an optimizer: those of SV-DIFF in norms apart, which learn more slowly.

    Published: learning rate 1e-6 for the shifts of norms, beside 1e-4 for all others. A factor inside the weight would
    not be the same with Adam, whose steps do not depend on the gradient's scale.

    Args:
        network: With its selection.
        norm_lr_scale: Factor of their learning rate.

    Returns:
        One or two groups: ``params``, and ``lr_scale`` to multiply the second one's ``lr`` with, before a schedule is
        made.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> add_svdiff(network.requires_grad_(False), ["0", "1"])
        >>> groups = parameter_groups(network)
        >>> optimizer = torch.optim.Adam([{"params": group["params"]} for group in groups], lr=1e-4)
        >>> for group, options in zip(groups, optimizer.param_groups, strict=True):
        ...     options["lr"] *= group["lr_scale"]
        >>> [round(options["lr"], 9) for options in optimizer.param_groups]
        [0.0001, 1e-06]
    """
    slow = {
        id(parameter)
        for layer in network.modules()
        if is_norm(layer)
        for name, parameter in layer.named_parameters()
        if name == SVDIFF_SHIFT
    }
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    fast = [parameter for parameter in trained if id(parameter) not in slow]
    apart = [parameter for parameter in trained if id(parameter) in slow]
    groups = [{"params": fast, "lr_scale": 1.0}, {"params": apart, "lr_scale": norm_lr_scale}]
    return [group for group in groups if group["params"]]
