"""MemControl: train the part of a denoiser that memorises least, and keep that choice in a file."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_iet.functional.parameter_groups import (
    LORA_TARGETS,
    REST,
    Family,
    Granularity,
    ParameterGroups,
    adapted_layer,
    has_blocks,
    is_norm,
)
from lightning_iet.modules.adapters import Selection, describe_selection, differing_options, select_parameters
from lightning_iet.modules.svdiff import rebuild_bases, share_bases, spectral_shifts
from lightning_iet.shards.ema import averaged_modules, unregistered_averages, weight_averagings
from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.files import write_atomically
from lightning_iet.utilities.lightning import Callback, is_sharded, named_part, patched_attribute


class ParameterSelection(Callback):
    r"""Trains a part of a denoiser: some blocks, biases, norms, or adapters in place of its weights.

    What can train at all is the *family*; one bit of the *mask* switches each *group* of it, a block of the network.
    Adapters start at zero, so that training starts from the pretrained network bit for bit. Everything else of the
    network is frozen; other trained parts of the module are left alone. The family ``"all"`` without a mask changes
    nothing at all.

    Source: Dutt et al., *MemControl: Mitigating Memorization in Diffusion Models via Automated Parameter Selection*,
    WACV 2025, https://arxiv.org/abs/2405.19458.

    Args:
        family: ``"all"``, ``"attention"``, ``"norm"``, ``"bias"``, ``"norm_bias"``, ``"svdiff"``, ``"difffit"`` or
            ``"lora"``, see :func:`~lightning_iet.functional.parameter_groups.find_groups`.
        mask: One character, 0 or 1, for each group in the network's order, and one more for the rest of the family,
            unless granularity is ``"published"``. None = all ones.
        file: A file of a mask, which also says the family, the granularity and the like. These may stand beside it
            where they say the same.
        granularity: What one bit switches: ``"block"``, ``"attention"`` or ``"published"``.
        rest: Whether the family's parameters in no group train, if the mask does not say. None = they do.
        denoiser: Name of the denoiser in the module, such as ``"unet"``, or ``""`` for the module itself. Default: the
            one submodule that has blocks and is trained.
        groups: Groups of one's own: names, and regular expressions over names of parameters.
        norm_lr_scale: SV-DIFF: factor of the learning rate of the shifts of norms *(published: 1e-6 beside 1e-4)*; of
            effect in this package's modules.
        lora_rank: Rank of the adapters of ``"lora"``.
        lora_alpha: Their strength is ``lora_alpha / lora_rank``; None = 1.
        lora_targets: Ends of names of the layers that get them.
        bases: SV-DIFF: a folder that keeps the decompositions of weights from run to run. None = none is kept.

    Attributes:
        selection: What trains, in one object.
        parameter_groups: Groups of the denoiser; None before ``setup``.
        num_trained: Number of parameters that train; 0 before ``setup``.
        share: ``num_trained`` divided by the number of the network's parameters without adapters.

    Raises:
        ValueError: For words, numbers or files that cannot be, at once; in ``setup``, for a selection that does not
            fit the network.
        ModuleNotFoundError: For ``"lora"`` without peft.
        MisconfigurationException: For a strategy that shards parameters, or an optimizer that trains none of them.

    Example:
        >>> from lightning_iet import DiffusionModule
        >>> selection = ParameterSelection("bias", mask="011000")
        >>> trainer = Trainer(callbacks=[selection], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        family: Family = "all",
        *,
        mask: str | None = None,
        file: Path | None = None,
        granularity: Granularity = "block",
        rest: bool | None = None,
        denoiser: str | None = None,
        groups: Mapping[str, str] | None = None,
        norm_lr_scale: float = 1e-2,
        lora_rank: int = 4,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] = LORA_TARGETS,
        bases: Path | None = None,
    ) -> None:
        if not norm_lr_scale > 0:
            raise ValueError(f"Argument `norm_lr_scale` expected a number > 0, but got {norm_lr_scale}.")
        selection = Selection(
            family=family,
            mask=mask,
            granularity=granularity,
            rest=rest,
            groups=groups,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_targets=lora_targets,
        )
        self.mask_file: MaskFile | None = None
        if file is None:
            selection.check()
        else:
            self.mask_file = read_mask(file)
            self.mask_file.check_agreement(selection)
            selection = self.mask_file.selection
        self.selection = selection
        self.denoiser = denoiser
        self.norm_lr_scale = norm_lr_scale
        self.bases = bases
        self._forget()
        self._stack = ExitStack()

    def _forget(self) -> None:
        """Know of no network."""
        self.parameter_groups: ParameterGroups | None = None
        self.num_trained = 0
        self.share = 0.0
        self._trained: dict[str, nn.Parameter] = {}
        self._network: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy: callbacks are copied with a module that knows its trainer.
        return vars(self) | {"_stack": ExitStack()}

    # --- before training ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Select the parameters of the denoiser, now or as soon as the module has made it."""
        self._stack.close()
        load = pl_module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._check_same(trainer, checkpoint)
            load(checkpoint)

        # Callbacks are asked only when the weights have been loaded, or have failed to be with a list of their names.
        self._stack.enter_context(patched_attribute(pl_module, "on_load_checkpoint", on_load_checkpoint))
        if self._network is not None and not any(part is self._network for part in pl_module.modules()):
            self._forget()  # the network of another module, of an earlier run
        if self.selection.is_neutral or self._network is not None:
            return
        if is_sharded(trainer.strategy):
            raise MisconfigurationException(
                f"ParameterSelection expected a strategy that keeps parameters whole, but got "
                f"{type(trainer.strategy).__name__}. Use Trainer(strategy='ddp') or one device."
            )
        if self.apply(pl_module):
            _check_averages(trainer)
            return
        configure = pl_module.configure_model

        def configure_model() -> None:
            configure()
            if self._network is None and not self.apply(pl_module):
                raise ValueError(
                    f"ParameterSelection expected a denoiser with blocks in {type(pl_module).__name__}, but found "
                    "none. Say where it is (`denoiser`), or what its groups are (`groups`)."
                )

        # Lightning calls it once setup is through, and before the weights of a checkpoint are loaded.
        self._stack.enter_context(patched_attribute(pl_module, "configure_model", configure_model))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module's methods as they were."""
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        self._stack.close()

    def apply(self, module: nn.Module) -> bool:
        """Select the parameters of a module's denoiser; return whether there is one.

        Raises:
            ValueError: If the selection does not fit it.
        """
        if self.selection.is_neutral:
            return True
        network = find_denoiser(module, self.denoiser, any_network=self.selection.groups is not None)
        if network is None:
            return False
        if self.mask_file is not None and adapted_layer(network) is None:
            self.mask_file.check(self.selection.find(network))
        select = getattr(module, "select_parameters", None)
        if select is not None:
            options = {"bases": self.bases, "norm_lr_scale": self.norm_lr_scale}
            groups, trained = select(self.selection, network=network, **options)
        else:
            groups, trained = _select(module, network, self.selection, self.bases)
        self.parameter_groups, self._network = groups, network
        self.num_trained = sum(groups.numel[name] for name in trained)
        self.share = self.num_trained / groups.total
        parameters = dict(network.named_parameters())
        self._trained = {name: parameters[name] for name in sorted(trained)}
        rank_zero_info(self.description)
        if select is None and any(is_norm(network.get_submodule(name)) for name in spectral_shifts(network)):
            rank_zero_info(
                "ParameterSelection: the shifts of norms learn as fast as others (published: 0.01 times as fast). Use "
                "lightning_iet.modules.adapters.parameter_groups in configure_optimizers to slow them down."
            )
        return True

    @property
    def description(self) -> str:
        """What trains, in one line."""
        groups = self.parameter_groups
        if groups is None:
            return "ParameterSelection: everything trains" if self.selection.is_neutral else "ParameterSelection"
        return f"ParameterSelection: {describe_selection(groups, self.selection, self.num_trained)}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the optimizers train what is selected, and nothing that is frozen.

        Raises:
            MisconfigurationException: If no optimizer has any of it.
        """
        if self._network is None:
            return
        if replaced := rebuild_bases(self._network):
            rank_zero_warn(
                f"ParameterSelection decomposed {len(replaced)} weights again ('{replaced[0]}' the first): they have "
                "been replaced since setup."
            )
        frozen = {id(parameter) for parameter in self._network.parameters() if not parameter.requires_grad}
        trained = {id(parameter) for parameter in self._trained.values()}
        held: set[int] = set()
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            held.update(map(id, group["params"]))
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in frozen]
        if not held & trained:
            raise MisconfigurationException(
                f"ParameterSelection expected an optimizer with parameters of the family {self.selection.family!r}, "
                f"such as '{next(iter(self._trained))}', but got {len(trainer.optimizers)} without any. Make it in "
                "configure_optimizers, from the parameters that require gradients then, not in __init__."
            )
        if missing := [name for name, parameter in self._trained.items() if id(parameter) not in held]:
            rank_zero_warn(
                f"ParameterSelection selects {len(missing)} parameters that no optimizer trains, '{missing[0]}' the "
                "first. Hand configure_optimizers' optimizer all that require gradients."
            )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The selection; nothing if everything trains."""
        return {} if self.selection.is_neutral else self.selection.specification()

    def _check_same(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Refuse to go on with a run of another selection."""
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {})
        if trainer.state.fn != "fit" or saved == self.state_dict():
            return
        there, here = _summary(Selection(**saved)) if saved else "everything", _summary(self.selection)
        got = f"one under which {here} does"
        if there == here:
            got = f"another one: {differing_options(saved, self.state_dict())}"
        raise ValueError(
            f"The checkpoint expected a selection under which {there} trains, but got {got}. Use the settings of the "
            "run that wrote it; to begin another run from its weights, load them with load_from_checkpoint."
        )


def find_denoiser(module: nn.Module, name: str | None = None, *, any_network: bool = False) -> nn.Module | None:
    """Find the denoiser of a module by its blocks.

    Averages of weights are passed over; so are networks that are frozen, if another one is trained.

    Args:
        module: Any module.
        name: Name of the denoiser, ``""`` for the module itself; None = it is found.
        any_network: Whether it may be without blocks.

    Returns:
        The denoiser; None if there is none yet.

    Raises:
        ValueError: If there is no submodule of that name, or more than one denoiser.

    Example:
        >>> from lightning_iet import DiffusionModule
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, add_attention=False,
        ...                    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
        >>> find_denoiser(nn.ModuleDict({"text": nn.Linear(2, 2), "model": nn.Sequential(unet)})) is unet
        True
    """
    if name is not None:
        return named_part(module, name)
    copies = averaged_modules(module)
    networks = {
        child: part
        for child, part in module.named_children()
        if not isinstance(part, AveragedModel) and not any(part is copy for copy in copies)
    }
    fitting = {child: part for child, part in networks.items() if any_network or has_blocks(part)}
    trained = {child: part for child, part in fitting.items() if any(p.requires_grad for p in part.parameters())}
    found = trained or fitting
    if len(found) > 1:
        raise ValueError(
            f"Argument `denoiser` expected a name, for {type(module).__name__} has {len(found)} networks that could be "
            f"it: {', '.join(found)}. Name one of them."
        )
    if found:
        return _innermost(next(iter(found.values())))
    own = any_network or has_blocks(module)
    return module if own and next(module.parameters(recurse=True), None) is not None else None


def _innermost(network: nn.Module) -> nn.Module:
    """The module inside wrappers that hold nothing else."""
    # What torch.compile has wrapped is not unwrapped: find_groups refuses it.
    while not hasattr(network, "_orig_mod") and next(network.parameters(recurse=False), None) is None:
        inner = [part for part in network.children() if next(part.parameters(), None) is not None]
        if len(inner) != 1 or not has_blocks(inner[0]):
            break
        network = inner[0]
    return network


def _select(
    module: nn.Module, network: nn.Module, selection: Selection, bases: Path | None
) -> tuple[ParameterGroups, frozenset[str]]:
    """Select the parameters of a network and of the averages of it that the module keeps."""
    outline = {name: parameter.shape for name, parameter in network.named_parameters()}
    copies = [copy for copy in _copies(module) if {n: p.shape for n, p in copy.named_parameters()} == outline]
    adds = selection.family in ("svdiff", "difffit", "lora")
    if adds and (beside := unregistered_averages(module)[0]):
        raise ValueError(
            f"ParameterSelection expected no average of the weights in plain tensors, which would lack the adapters of "
            f"{selection.family!r}, but got '{beside[0].name}'. Keep it as a deep copy of the network or as "
            "torch.optim.swa_utils.AveragedModel, or make it in on_fit_start."
        )
    free = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    groups, trained = select_parameters(network, selection, bases=bases)
    for copy in copies:
        for name, parameter in copy.named_parameters():
            parameter.requires_grad_(free[name])
        select_parameters(copy, selection, bases=bases)
        share_bases(network, copy)
        if adds:
            _copy_parameters(network, copy, trained - set(outline))
        copy.requires_grad_(False)
    return groups, trained


def _copies(module: nn.Module) -> Iterator[nn.Module]:
    for copy in averaged_modules(module):
        yield copy.module if isinstance(copy, AveragedModel) else copy


@torch.no_grad()
def _copy_parameters(network: nn.Module, copy: nn.Module, names: frozenset[str]) -> None:
    source, target = dict(network.named_parameters()), dict(copy.named_parameters())
    for name in names:
        target[name].copy_(source[name])


def _check_averages(trainer: Trainer) -> None:
    for callback in weight_averagings(trainer):
        if callback._average_model is not None:
            raise MisconfigurationException(
                f"ParameterSelection expected to come before {type(callback).__name__} in the trainer's callbacks, for "
                "that one copies the module, but got it before. Exchange them."
            )


def _summary(selection: Selection) -> str:
    if selection.is_neutral:
        return "everything"
    mask = "" if selection.mask is None else f" with the mask {selection.mask}"
    rest = "" if selection.rest is None else f", rest {'on' if selection.rest else 'off'}"
    options = f" of rank {selection.lora_rank}" if selection.family == "lora" else ""
    return f"'{selection.family}'{options} by {selection.granularity}{mask}{rest}"


FORMAT = 1
_KEYS = ("format", "family", "granularity", "groups", "mask", "patterns", "lora", "network", "shapes", "source")
_NEEDED = ("format", "family", "granularity", "groups", "mask", "network", "shapes")


@dataclass(frozen=True)
class MaskFile:
    """What a file of a mask holds.

    Attributes:
        selection: Family, mask and granularity, ready for a network.
        groups: Names of the groups, in the order of the mask's characters.
        network: Name of the class of the network that the mask was made for.
        shapes: SHA-256 of the names and shapes of its parameters.
        source: What the search wrote about it.
        path: The file.
    """

    selection: Selection
    groups: tuple[str, ...]
    network: str
    shapes: str
    source: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def contradicted(self, beside: Selection) -> tuple[str, ...]:
        """Return the names of options given beside the file that say something else than it; defaults say nothing."""
        return tuple(
            option.name
            for option in fields(Selection)
            if getattr(beside, option.name) not in (option.default, getattr(self.selection, option.name))
        )

    def check_agreement(self, beside: Selection) -> None:
        """Refuse options, given beside the file, that say something else than it.

        Raises:
            ValueError: With the first option that differs.
        """
        for name in self.contradicted(beside):
            given, saved = (getattr(selection, name) for selection in (beside, self.selection))
            raise ValueError(
                f"Argument `file` expected no option beside it that says something else, but got {name} {given!r}, "
                f"where '{self.path}' has {saved!r}. Leave {name}, or the file, out."
            )

    def check(self, groups: ParameterGroups) -> None:
        """Refuse groups of another network, found with :attr:`selection`; warn of one with the same (a transfer).

        Raises:
            ValueError: With the first name that differs.
        """
        names = tuple(group.name for group in groups.groups)
        if names != self.groups:
            pairs = zip((*self.groups, *[None] * len(names)), (*names, *[None] * len(self.groups)), strict=True)
            position, (saved, found) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ValueError(
                f"The mask in '{self.path}' expected the {len(self.groups)} groups of {self.network}, but got "
                f"{len(names)} of {groups.network}: group {position} is {saved or 'none'} there, and "
                f"{found or 'none'} here. Use it on a network with the same blocks, or search one for this network."
            )
        if self.shapes != groups.shapes:
            warnings.warn(
                f"The mask in '{self.path}' was made for another {self.network}: its groups have the same names as "
                f"those of this {groups.network}, and other shapes. It is transferred.",
                stacklevel=2,
            )


def write_mask(
    path: Path | str,
    groups: ParameterGroups,
    mask: str | None = None,
    *,
    rest: bool | None = None,
    selection: Selection | None = None,
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Write a mask with its groups and its network.

    Args:
        path: The file, ending in ``.json``; its folder is made.
        groups: Groups of the network, of :func:`~lightning_iet.functional.parameter_groups.find_groups`.
        mask: One character for each of ``groups.bits``, or for each group; None = all ones.
        rest: Whether the rest trains, if the mask does not say.
        selection: What ``groups`` were found with; needed for ``lora`` with options other than the defaults.
        source: Plain values about where the mask comes from, such as study, trial and objectives.

    Returns:
        The file.

    Raises:
        ValueError: If the mask does not fit the groups.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from lightning_iet.functional.parameter_groups import find_groups
        >>> network = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = write_mask(Path(folder, "mask.json"), find_groups(network, "bias"), "01", source={"trial": 3})
        ...     read_mask(file).selection.mask, read_mask(file).groups
        ('01', ('blocks.0', 'blocks.1'))
    """
    switches = groups.switches(mask, rest=rest)
    selection = selection or Selection(groups.family)
    lora = {"rank": selection.lora_rank, "alpha": selection.lora_alpha, "targets": list(selection.lora_targets)}
    content = {
        "format": FORMAT,
        "family": groups.family,
        "granularity": groups.granularity,
        "groups": [group.name for group in groups.groups],
        "mask": {name: int(bit) for name, bit in switches.items()},
        "patterns": None if groups.patterns is None else dict(groups.patterns),
        "lora": lora if groups.family == "lora" else None,
        "network": groups.network,
        "shapes": groups.shapes,
        "source": dict(source or {}),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_mask(path: Path | str) -> MaskFile:
    """Read a file of :func:`write_mask`; :meth:`MaskFile.check` compares it with a network.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else, of a later format, or contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Argument `file` expected a file of a mask, but got '{path}', which is not there.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refusal(path, f"no JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise _refusal(path, f"a JSON {type(content).__name__}")
    for found, reason in (
        ([key for key in _NEEDED if key not in content], "one without the key '{}'"),
        ([key for key in content if key not in _KEYS], "one with the unknown key '{}'"),
    ):
        if found:
            raise _refusal(path, reason.format(found[0]))
    if content["format"] != FORMAT:
        raise _refusal(path, f"one of format {content['format']!r}, where this version of lightning-iet reads {FORMAT}")
    for key, known in (("family", Family), ("granularity", Granularity)):
        if content[key] not in get_args(known):
            raise _refusal(path, f"one with the unknown {key} {content[key]!r}")
    names, bits = content["groups"], content["mask"]
    if not isinstance(names, list) or not isinstance(bits, dict) or [*names, REST] != list(bits):
        raise _refusal(path, "one whose mask does not name its groups in their order, and the rest")
    if any(bit not in (0, 1) or isinstance(bit, bool) for bit in bits.values()):
        raise _refusal(path, "one whose mask holds other values than 0 and 1")
    lora = content.get("lora")
    options = {} if lora is None else {f"lora_{name}": value for name, value in lora.items()}
    selection = Selection(
        family=content["family"],
        mask="".join(str(bits[name]) for name in names),
        granularity=content["granularity"],
        rest=bool(bits[REST]),
        groups=content.get("patterns"),
        **options,
    )
    return MaskFile(selection, tuple(names), content["network"], content["shapes"], content.get("source") or {}, path)


def _refusal(path: Path, got: str) -> ValueError:
    return ValueError(
        f"Argument `file` expected a file of a mask, as `lightning-iet memcontrol` writes it, but got '{path}', {got}."
    )
