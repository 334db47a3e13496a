"""Which of the weight files in a folder of diffusers are meant."""

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)"
    r"(?:\.(?P<variant>(?!safetensors|bin)[^.]+?))?(?:-\d+-of-\d+)?\.(?P<suffix>safetensors|bin)"
)


def which_weights(folder: Path) -> dict[str, Any]:
    """Find out which weights ``from_pretrained`` has to take: plain ones, or else the only variant that is there.

    Weights are often published in half precision alone (``diffusion_pytorch_model.fp16.safetensors``), which
    diffusers finds only by the variant's name.

    Args:
        folder: Of a model, with its ``config.json``; or of a pipeline, whose parts are looked at together.

    Returns:
        ``variant`` and ``use_safetensors`` for ``from_pretrained``; nothing where there are no weights at all.

    Raises:
        ValueError: If there are several variants and none is the plain one, naming them.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
        ...     which_weights(Path(folder))
        {'variant': 'fp16', 'use_safetensors': True}
    """
    parts = [folder, *(child for child in sorted(folder.iterdir()) if child.is_dir())]
    found = {part: _variants(part) for part in parts}
    found = {part: variants for part, variants in found.items() if variants}
    if not found:
        return {}
    lacking = {part: sorted(map(str, variants)) for part, variants in found.items() if None not in variants}
    if len({name for names in lacking.values() for name in names}) > 1:
        part, names = next(iter(lacking.items()))
        names = sorted({name for names in lacking.values() for name in names})
        raise ValueError(
            f"'{part}' holds weights of the variants {', '.join(names)} and no plain ones, such as "
            f"diffusion_pytorch_model.safetensors: which of them is not known. Leave one there."
        )
    variant = next(iter(lacking.values()))[0] if lacking else None
    if variant is not None:
        log.warning("'%s' holds weights of the variant '%s' alone; these are taken, in float32.", folder, variant)
    safe = ["safetensors" in variants.get(variant, variants.get(None, set())) for variants in found.values()]
    # Where some parts have them and others do not, diffusers looks for itself.
    return {"variant": variant} | ({"use_safetensors": safe[0]} if len(set(safe)) == 1 else {})


def _variants(folder: Path) -> dict[str | None, set[str]]:
    """The suffixes of a folder's weight files by variant; plain ones are None."""
    found: dict[str | None, set[str]] = {}
    for match in (_FILE.fullmatch(file.name) for file in folder.iterdir()):
        if match is not None:
            found.setdefault(match["variant"], set()).add(match["suffix"])
    return found
