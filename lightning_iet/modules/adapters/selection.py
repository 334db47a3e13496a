"""A selection of parameters, applied to a network: adapters in, everything else frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

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
from lightning_iet.modules.adapters.difffit import add_difffit, fold_difffit, remove_difffit
from lightning_iet.modules.adapters.lora import add_lora, fold_lora, remove_lora
from lightning_iet.modules.adapters.svdiff import add_svdiff, fold_svdiff, remove_svdiff
from lightning_iet.utilities.errors import require


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
        if self.lora_rank < 1:
            raise ValueError(f"Argument `lora_rank` expected an integer ≥ 1, but got {self.lora_rank}.")
        if self.family == "lora":
            require("peft", "text-to-image")

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))


def describe_selection(groups: ParameterGroups, selection: Selection, num_trained: int) -> str:
    """Say in a line what of a network trains.

    Args:
        groups: Of the network.
        selection: What trains.
        num_trained: Number of parameters that train.

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
    """Say in which options two specifications of selections differ.

    Args:
        saved: Of a checkpoint.
        own: Of what is to go on with it.

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
