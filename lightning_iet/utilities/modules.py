"""The parts of a module: by name, and each once by identity."""

from collections.abc import Iterator

from torch import nn


def distinct_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all of its parts by name, each object once, in the order of ``named_modules``.

    ``named_modules`` keeps a set of what it has seen: of two parts that compare as equal it leaves one out, and parts
    without a hash stop it. Here only identity counts.

    Example:
        >>> class Equal(nn.Linear):
        ...     def __eq__(self, other):
        ...         return True
        ...     def __hash__(self):
        ...         return 0
        >>> module = nn.Sequential(Equal(1, 1), Equal(1, 1))
        >>> [name for name, _ in module.named_modules()], [name for name, _ in distinct_modules(module)]
        (['', '0'], ['', '0', '1'])
    """
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child, part in module._modules.items():
            if part is not None:
                yield from visit(f"{name}.{child}" if name else child, part)

    yield from visit("", root)


def named_part(root: nn.Module, name: str) -> nn.Module:
    """Return the part of a module that the user names as ``denoiser``.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> named_part(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    try:
        return root.get_submodule(name)
    except AttributeError:
        children = [child for child, part in root._modules.items() if part is not None]
        raise ValueError(
            f"Argument `denoiser` expected the name of a module in {type(root).__name__}, such as one of {children}, "
            f"but got {name!r}."
        ) from None
