"""Which parameters of a denoiser train: families, groups that one bit of a mask switches, and counts.

Only names and shapes are read, so that networks on ``torch.device("meta")`` can be counted without memory.

Source: Dutt et al., *MemControl: Mitigating Memorization in Diffusion Models via Automated Parameter Selection*, WACV
2025, https://arxiv.org/abs/2405.19458. "Published" means the authors' code, `Raman1121/Diffusion_Memorization_HPO`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import nn
from torch.nn.utils import parametrize

from lightning_iet.functional.checks import check_at_least
from lightning_iet.utilities.fingerprints import sha256_of

Family = Literal["all", "attention", "norm", "bias", "norm_bias", "svdiff", "difffit", "lora"]
"""Which parameters can train at all."""

Granularity = Literal["block", "attention", "published"]
"""Which parameters one bit of a mask switches."""

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Ends of the names of layers that get low-rank adapters by default: the attention layers of diffusers."""

REST = "rest"
"""Name of the parameters in no group, where groups are named."""

# Names that the adapters give to their parameters, below the name of the layer.
SVDIFF_SHIFT = "parametrizations.weight.0.shift"
DIFFFIT_OFFSET = "difffit_offset"
DIFFFIT_BRANCH_OFFSET = "difffit_branch_offset"
LORA_FACTORS = ("lora_A.default.weight", "lora_B.default.weight")

_PUBLISHED = ("attention", "svdiff", "difffit")
_U_NET = ("resnets", "attentions")
_OTHERS = (
    *("transformer_blocks", "single_transformer_blocks", "blocks"),  # DiT, PixArt, Stable Diffusion 3, Flux
    *("input_blocks", "middle_block", "output_blocks", "in_blocks", "out_blocks"),  # guided-diffusion, CompVis, U-ViT
)
_STAGES = {"down": 0, "input": 0, "in": 0, "mid": 1, "middle": 1, "up": 2, "output": 2, "out": 2}
_PUBLISHED_BLOCKS = (
    *(f"down_blocks.{block}.attentions.{layer}" for block in (0, 1, 2) for layer in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{layer}" for block in (1, 2, 3) for layer in (0, 1, 2)),
)
# Branches and projections of diffusers' transformer blocks that DiffFit scales.
_SCALED = re.compile(r"(^|\.)(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|ff(_context)?\.net\.2)$")
_BRANCH = re.compile(r"(^|\.)(to_out\.0|to_add_out)$")


@dataclass(frozen=True)
class Group:
    """The parameters that one bit of a mask switches.

    Attributes:
        name: Name of the block, such as ``"mid_block.attentions.0"``.
        parameters: Names of the parameters as they are once adapters are there: an adapter's own parameter for
            ``svdiff``, ``difffit`` and ``lora``, a weight of the network otherwise.
    """

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class ParameterGroups:
    """The parameters of a family, in groups.

    A *mask* is a string of ``0`` and ``1``, one character for each of :attr:`bits`: the groups in their order, then
    the rest, unless the granularity is ``"published"`` (the rest then always trains) or there is no rest.

    Attributes:
        family: See :func:`find_groups`.
        granularity: Likewise; ``"block"`` for groups of one's own.
        groups: Groups in the order of a mask's characters.
        rest: Names of the family's parameters in no group.
        numel: Number of elements of each parameter in the groups and the rest, by name.
        total: Number of parameters of the network without adapters.
        network: Name of the network's class.
        shapes: SHA-256 of the names and shapes of the network's parameters without adapters.
        patterns: Regular expressions that made the groups, by name; None if blocks made them.
    """

    family: Family
    granularity: Granularity
    groups: tuple[Group, ...]
    rest: tuple[str, ...]
    numel: Mapping[str, int]
    total: int
    network: str
    shapes: str
    patterns: Mapping[str, str] | None = None

    @property
    def bits(self) -> tuple[str, ...]:
        """What each character of a mask switches: names of the groups, and ``"rest"`` where it is searched."""
        searched = (REST,) if self.rest and self.granularity != "published" else ()
        return (*(group.name for group in self.groups), *searched)

    def switches(self, mask: str | None = None, *, rest: bool | None = None) -> dict[str, bool]:
        """Read a mask.

        Args:
            mask: One character for each of :attr:`bits`; or, with or without ``rest``, one for each group alone.
                None = all ones.
            rest: Whether the rest trains, if the mask does not say; None = it does.

        Returns:
            Whether it trains, for each group by name and for ``"rest"``.

        Raises:
            ValueError: For a mask of another length, with other characters, or that says itself what ``rest`` says.

        Example:
            >>> network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
            >>> find_groups(network, "bias").switches("01")
            {'blocks.0': False, 'blocks.1': True, 'rest': True}
        """
        names, bits = [group.name for group in self.groups], self.bits
        if mask is None:
            mask = "1" * len(names)
        if not isinstance(mask, str) or set(mask) - {"0", "1"}:
            raise ValueError(f"Argument `mask` expected a string of 0 and 1, but got {mask!r}.")
        if len(mask) not in {len(names), len(bits)}:
            lengths = " or ".join(str(length) for length in sorted({len(names), len(bits)}))
            raise ValueError(
                f"Argument `mask` expected {lengths} characters, one for each of {', '.join(bits)}, but got "
                f"{len(mask)}: {mask!r}."
            )
        if len(mask) > len(names):
            if rest is not None:
                raise ValueError(
                    f"Argument `rest` expected None with a mask of {len(mask)} characters, whose last one says it, but "
                    f"got {rest}. Leave one of them out."
                )
            rest = mask[-1] == "1"
        if rest is False and self.granularity == "published":
            raise ValueError(
                "Argument `rest` expected None or True with granularity 'published', whose rest always trains, but "
                "got False. Use granularity 'attention'."
            )
        switched = {name: bit == "1" for name, bit in zip(names, mask[: len(names)], strict=True)}
        return switched | {REST: rest is not False}

    def count(self, mask: str | None = None, *, rest: bool | None = None) -> int:
        """Number of parameters that a mask trains, adapters included; arguments as for :meth:`switches`."""
        return sum(self.numel[name] for name in trained_parameters(self, mask, rest=rest))

    def share(self, mask: str | None = None, *, rest: bool | None = None) -> float:
        r"""Share of the network that a mask trains, :math:`\sum_{trained} n_i / \sum_{network} n_i`.

        Adapters count above the line only. Arguments as for :meth:`switches`.

        Example:
            >>> network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
            >>> find_groups(network, "bias").share("01")
            0.16666666666666666
        """
        return self.count(mask, rest=rest) / self.total


def trained_parameters(groups: ParameterGroups, mask: str | None = None, *, rest: bool | None = None) -> frozenset[str]:
    """Names of the parameters that a mask trains; arguments as for :meth:`ParameterGroups.switches`.

    Returns:
        Names as in ``network.named_parameters()`` once adapters are there.

    Example:
        >>> network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> sorted(trained_parameters(find_groups(network, "bias"), "01"))
        ['blocks.1.bias']
    """
    switches = groups.switches(mask, rest=rest)
    named = [*((group.name, group.parameters) for group in groups.groups), (REST, groups.rest)]
    return frozenset(parameter for name, parameters in named if switches[name] for parameter in parameters)


def find_groups(
    network: nn.Module,
    family: Family = "all",
    *,
    granularity: Granularity = "block",
    groups: Mapping[str, str] | None = None,
    lora_rank: int = 4,
    lora_targets: Sequence[str] = LORA_TARGETS,
) -> ParameterGroups:
    r"""Find the parameters of a family in a denoiser, and the groups that one bit of a mask switches.

    ============= =====================================================================================
    Family        Parameters that can train
    ============= =====================================================================================
    ``all``       every parameter
    ``attention`` those of attention blocks (``attentions.<i>``; whole blocks of a transformer)
    ``norm``      those of normalisation layers *(our choice: by type; published: by name)*
    ``bias``      those whose own name is ``bias``
    ``norm_bias`` both
    ``svdiff``    a shift of each singular value of the weights of linear, convolution, embedding and
                  normalisation layers, see :mod:`lightning_iet.modules.adapters`
    ``difffit``   scales of the outputs of attention and feed-forward layers, and ``norm_bias``
    ``lora``      low-rank adapters of attention layers
    ============= =====================================================================================

    ================= =================================================================================
    Granularity       Groups
    ================= =================================================================================
    ``block``         ``resnets.<i>`` and ``attentions.<i>`` of a U-Net, the blocks of a transformer;
                      all of the family's parameters inside *(our choice)*
    ``attention``     ``attentions.<i>`` only; the blocks of a transformer
    ``published``     the authors' bits on a Stable Diffusion 1.x or 2.x U-Net: 16 (``attention``: the
                      layers ``attn1`` and ``attn2``) or 13 (``svdiff``, ``difffit``: shifts and scales
                      inside transformer blocks, without the third attention block of each up block);
                      all else is rest, and always trains
    ================= =================================================================================

    Groups without a parameter of the family are left out.

    Args:
        network: Any denoiser without adapters, also on ``torch.device("meta")``.
        family: Which parameters can train.
        granularity: Which of them one bit switches.
        groups: Groups of one's own instead: an ordered mapping from name to a regular expression that is searched in
            names of the network's parameters.
        lora_rank: Rank of the adapters of ``lora``, ≥ 1.
        lora_targets: Ends of names of the layers that get them.

    Returns:
        The groups, disjoint; together with the rest they hold each parameter of the family once.

    Raises:
        ValueError: For unknown words, a network without blocks, one that ``"published"`` does not fit, one that has
            adapters already, a family without parameters, a group without parameters, or groups that overlap.

    Example:
        >>> from diffusers import UNet2DModel
        >>> blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["UpBlock2D"] * 2}
        >>> network = UNet2DModel(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
        >>> [group.name for group in find_groups(network, "attention").groups]
        ['down_blocks.1.attentions.0', 'mid_block.attentions.0']
        >>> round(find_groups(network, "svdiff").share(), 4)
        0.0137
    """
    check_words(family, granularity, groups)
    _check_plain(network)
    check_at_least(1, lora_rank=lora_rank)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    owner = _own_groups(network, list(shapes), groups) if groups is not None else _blocks(network, shapes, granularity)
    candidates = list(_candidates(network, family, granularity, lora_rank, tuple(lora_targets)))
    if not candidates:
        raise ValueError(
            f"Argument `family` expected one with parameters in {type(network).__name__}, but got {family!r}, which "
            "has none there. Use another one."
        )
    is_published = granularity == "published"
    blocks = list(dict.fromkeys(owner.values()))
    if is_published and family != "attention":  # 13 bits: the third attention block of each up block has none
        blocks = [block for block in blocks if not (block.startswith("up_") and block.endswith("attentions.2"))]
    members: dict[str, list[str]] = {block: [] for block in blocks}
    rest: list[str] = []
    for candidate in candidates:
        block = owner.get(candidate.at, "")
        if block not in members or (is_published and not _is_published(candidate, family, block)):
            rest.append(candidate.name)
        else:
            members[block].append(candidate.name)
    empty = [name for name, parameters in members.items() if not parameters]
    if groups is not None and empty:
        raise ValueError(
            f"Argument `groups` expected parameters of the family {family!r} in each group, but got none in "
            f"'{empty[0]}'. Leave it out, or change its regular expression."
        )
    return ParameterGroups(
        family=family,
        granularity=granularity,
        groups=tuple(Group(name, tuple(parameters)) for name, parameters in members.items() if parameters),
        rest=tuple(rest),
        numel={candidate.name: candidate.numel for candidate in candidates},
        total=sum(parameter.numel() for parameter in network.parameters()),
        network=type(network).__name__,
        shapes=sha256_of(["\n".join(sorted(f"{name} {tuple(shape)}" for name, shape in shapes.items())).encode()]),
        patterns=None if groups is None else dict(groups),
    )


# --- what can train ---------------------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """A parameter that can train: its name, the weight of the network that it belongs to, its number of elements."""

    name: str
    at: str
    numel: int


def is_norm(layer: nn.Module) -> bool:
    """Tell whether a layer is a normalisation layer, of torch or of anybody: by its class's name.

    Example:
        >>> is_norm(nn.GroupNorm(1, 1)), is_norm(nn.Linear(1, 1))
        (True, False)
    """
    return any("Norm" in parent.__name__ for parent in type(layer).__mro__)


def is_svdiff_layer(layer: nn.Module) -> bool:
    """Tell whether SV-DIFF shifts singular values of a layer's weight.

    Example:
        >>> is_svdiff_layer(nn.Conv2d(1, 1, 1)), is_svdiff_layer(nn.LayerNorm(2, elementwise_affine=False))
        (True, False)
    """
    fits = isinstance(layer, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) or is_norm(layer)
    return fits and getattr(layer, "weight", None) is not None


def has_blocks(network: nn.Module) -> bool:
    """Tell whether :func:`find_groups` finds blocks in a network.

    Example:
        >>> has_blocks(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)])})), has_blocks(nn.Linear(1, 1))
        (True, False)
    """
    return any(_block_of(name, _U_NET + _OTHERS) for name, _ in network.named_parameters())


def check_words(family: str, granularity: str, groups: Mapping[str, str] | None = None) -> None:
    """Refuse words that :func:`find_groups` does not know, or that do not go together.

    Raises:
        ValueError: Naming the argument.

    Example:
        >>> check_words("svdif", "block")
        Traceback (most recent call last):
        ...
        ValueError: Argument `family` expected one of all, attention, ..., but got 'svdif'.
    """
    for argument, value, known in (("family", family, Family), ("granularity", granularity, Granularity)):
        if value not in get_args(known):
            words = ", ".join(get_args(known))
            raise ValueError(f"Argument `{argument}` expected one of {words}, but got {value!r}.")
    if granularity == "published" and family not in _PUBLISHED:
        raise ValueError(
            f"Argument `granularity` expected 'block' or 'attention' for the family {family!r}, but got 'published', "
            f"which the authors have for {', '.join(_PUBLISHED)}."
        )
    if groups is not None and granularity != "block":
        raise ValueError(
            f"Argument `granularity` expected its default 'block' with groups of one's own, but got {granularity!r}. "
            "Leave one of them out."
        )


def _candidates(
    network: nn.Module,
    family: Family,
    granularity: Granularity,
    rank: int,
    targets: tuple[str, ...],
) -> Iterator[_Candidate]:
    if family in ("all", "attention", "norm", "bias", "norm_bias", "difffit"):
        yield from _weights(network, family)
    if family == "svdiff":
        for name, layer in network.named_modules():
            if is_svdiff_layer(layer):
                rows = 1 if is_norm(layer) else len(layer.weight)
                num_values = min(rows, layer.weight.numel() // max(rows, 1))
                yield _Candidate(_below(name, SVDIFF_SHIFT), _below(name, "weight"), num_values)
    elif family == "difffit":
        yield from _scales(network, published=granularity == "published")
    elif family == "lora":
        found = [
            (name, layer)
            for name, layer in network.named_modules()
            if name in targets or name.endswith(tuple(f".{target}" for target in targets))
        ]
        if not found:
            raise ValueError(
                f"Argument `lora_targets` expected ends of names of layers of {type(network).__name__}, such as to_q "
                f"or to_out.0, but got {list(targets)}."
            )
        for name, layer in found:
            weight = getattr(layer, "weight", None)
            if weight is None or weight.ndim < 2:
                raise ValueError(
                    "Argument `lora_targets` expected names of linear or convolution layers, but got "
                    f"'{name}', a {type(layer).__name__}."
                )
            sizes = rank * weight[0].numel(), rank * len(weight)
            for factor, size in zip(LORA_FACTORS, sizes, strict=True):
                yield _Candidate(_below(name, factor), _below(name, "weight"), size)


def _weights(network: nn.Module, family: Family) -> Iterator[_Candidate]:
    """Parameters of the network itself."""
    norms = {
        _below(path, name)
        for path, layer in network.named_modules()
        if is_norm(layer)
        for name, _ in layer.named_parameters(recurse=False)
    }
    is_unet = any(_block_of(name, _U_NET) for name, _ in network.named_parameters())
    for name, parameter in network.named_parameters():
        is_bias = name.rpartition(".")[2] == "bias"
        fits = {
            "all": True,
            "attention": "attentions." in name or (not is_unet and _block_of(name, _OTHERS) is not None),
            "norm": name in norms,
            "bias": is_bias,
        }.get(family, name in norms or is_bias)
        if fits:
            yield _Candidate(name, name, parameter.numel())


def _scales(network: nn.Module, *, published: bool) -> Iterator[_Candidate]:
    """DiffFit's scales."""
    found = False
    for name, layer in network.named_modules():
        if _SCALED.search(name) and getattr(layer, "weight", None) is not None:
            found = True
            yield _Candidate(_below(name, DIFFFIT_OFFSET), _below(name, "weight"), len(layer.weight))
            if published and _BRANCH.search(name):
                yield _Candidate(_below(name, DIFFFIT_BRANCH_OFFSET), _below(name, "weight"), len(layer.weight))
    if not found:
        raise ValueError(
            f"Argument `family` expected 'difffit' on a network with diffusers' attention layers (to_q, to_k, to_v, "
            f"to_out.0), but got {type(network).__name__}, which has none. Use 'norm_bias' or 'svdiff'."
        )


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_published(candidate: _Candidate, family: Family, block: str) -> bool:
    """Tell whether the authors' bit of a block switches a parameter."""
    inside = candidate.at[len(block) :]
    if not inside.startswith(".transformer_blocks."):
        return False
    if family == "attention":
        return ".attn1." in inside or ".attn2." in inside
    return family == "svdiff" or "difffit" in candidate.name.rpartition(".")[2]


# --- groups -----------------------------------------------------------------------------------------------------------


def _blocks(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], granularity: Granularity) -> dict[str, str]:
    """The block that each parameter lies in, by the parameter's name; in the order of the blocks."""
    if granularity == "published":
        return _published_blocks(network, shapes)
    is_unet = any(_block_of(name, _U_NET) for name in shapes)
    kinds = _OTHERS if not is_unet else ("attentions",) if granularity == "attention" else _U_NET
    owner = {name: block for name in shapes if (block := _block_of(name, kinds))}
    if not owner:
        what = "attention blocks (attentions.<i>)" if is_unet else "blocks (resnets.<i>, attentions.<i>, blocks.<i> …)"
        raise ValueError(
            f"Argument `network` expected a denoiser with {what}, but got {type(network).__name__}, which has none. "
            "Give `groups`, a mapping from names to regular expressions over names of its parameters"
            + (", or use granularity 'block'." if is_unet else ".")
        )
    stems = list(dict.fromkeys(block.rpartition(".")[0] for block in owner.values()))
    order = sorted(set(owner.values()), key=lambda block: _position(block, stems, is_unet=is_unet))
    rank = {block: position for position, block in enumerate(order)}
    return dict(sorted(owner.items(), key=lambda entry: rank[entry[1]]))


def _block_of(name: str, kinds: Sequence[str]) -> str | None:
    """The shortest prefix of a name that ends in one of some kinds and a number."""
    parts = name.split(".")
    for position in range(len(parts) - 2):
        if parts[position] in kinds and parts[position + 1].isdigit():
            return ".".join(parts[: position + 2])
    return None


def _position(block: str, stems: Sequence[str], *, is_unet: bool) -> tuple[int, ...]:
    """Where a block stands among others: down, mid, up, others; then by number; a resnet before its attention."""
    parts = block.split(".")
    stage = _STAGES.get(parts[0].partition("_")[0], 3)
    index = int(parts[-1])
    if is_unet:
        number = next((int(part) for part in parts[:-2] if part.isdigit()), 0)
        return stage, number, index, int(parts[-2] != "resnets")
    return stage, stems.index(block.rpartition(".")[0]), index


def _published_blocks(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The authors' 16 blocks, if the network has these and no others."""
    owner = {name: block for name in shapes if (block := _block_of(name, ("attentions",)))}
    found = {block for name, block in owner.items() if ".transformer_blocks." in name}
    if found != set(_PUBLISHED_BLOCKS):
        differing = sorted(found ^ set(_PUBLISHED_BLOCKS))[0]
        raise ValueError(
            "Argument `granularity` expected 'block' or 'attention' for a network other than the U-Net of Stable "
            f"Diffusion 1.x or 2.x, whose 16 attention blocks 'published' names, but got 'published' for "
            f"{type(network).__name__}, which {'has' if differing in found else 'lacks'} '{differing}'."
        )
    return {name: block for published in _PUBLISHED_BLOCKS for name, block in owner.items() if block == published}


def _own_groups(network: nn.Module, names: Sequence[str], groups: Mapping[str, str]) -> dict[str, str]:
    """The group of each parameter by regular expressions; in the order of the groups."""
    if not groups or REST in groups:
        got = "none" if not groups else f"one called {REST!r}, which is what all other parameters are called"
        raise ValueError(f"Argument `groups` expected a mapping from names to regular expressions, but got {got}.")
    owner: dict[str, str] = {}
    for group, pattern in groups.items():
        try:
            found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(
                f"Argument `groups` expected a regular expression for '{group}', but got {pattern!r} ({error})."
            ) from None
        if not found:
            raise ValueError(
                f"Argument `groups` expected '{group}' to match names of parameters of {type(network).__name__}, such "
                f"as '{names[0]}', but got {pattern!r}, which matches none."
            )
        if twice := [name for name in found if name in owner]:
            raise ValueError(
                f"Argument `groups` expected groups that do not overlap, but got '{twice[0]}' in both "
                f"'{owner[twice[0]]}' and '{group}'. Make one of the regular expressions narrower."
            )
        owner.update(dict.fromkeys(found, group))
    return owner


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_plain(network: nn.Module) -> None:
    """Refuse a network that has adapters, or that is compiled."""
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in network.modules()):
        raise ValueError(
            "Argument `network` expected a network that is not compiled yet, but got the result of torch.compile. "
            "Select parameters first, then compile."
        )
    name = adapted_layer(network)
    if name is not None:
        raise ValueError(
            f"Argument `network` expected a network without adapters, but got {type(network).__name__} with some in "
            f"'{name}'. Fold or remove them first."
        )


def adapted_layer(network: nn.Module) -> str | None:
    """Name of the first layer with an adapter of any kind; None if there is none.

    Example:
        >>> adapted_layer(nn.Linear(1, 1)) is None
        True
    """
    offsets = (DIFFFIT_OFFSET, DIFFFIT_BRANCH_OFFSET)
    for name, layer in network.named_modules():
        shift = parametrize.is_parametrized(layer, "weight") and hasattr(layer.parametrizations.weight[0], "shift")
        if shift or hasattr(layer, "lora_A") or any(offset in layer._parameters for offset in offsets):
            return name
    return None
