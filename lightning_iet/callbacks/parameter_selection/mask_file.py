"""Files that hold a mask, with the groups and the network that it belongs to.

A file is JSON::

    {"format": 1, "family": "svdiff", "granularity": "block", "groups": ["down_blocks.0.resnets.0", …],
     "mask": {"down_blocks.0.resnets.0": 1, …, "rest": 0}, "patterns": null, "lora": null,
     "network": "UNet2DModel", "shapes": "SHA-256 …", "source": {"study": …, "trial": …, "objectives": {…}}}

``groups`` keeps their order, ``patterns`` the regular expressions of groups of one's own, ``lora`` rank, alpha and
targets of that family, ``source`` whatever a search wants to remember.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from lightning_iet.functional.parameter_groups import REST, Family, Granularity, ParameterGroups
from lightning_iet.modules.adapters import Selection
from lightning_iet.utilities.files import write_atomically

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

    def check(self, groups: ParameterGroups) -> None:
        """Refuse the groups of another network, and warn of another one with the same groups (a transfer).

        Args:
            groups: Those of the network that is to be trained, found with this file's :attr:`selection`.

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
    """Read a file of :func:`write_mask`.

    Args:
        path: The file.

    Returns:
        What it holds; :meth:`MaskFile.check` compares it with a network.

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
        raise _refusal(path, f"no JSON ({str(error).splitlines()[0]})") from error
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
