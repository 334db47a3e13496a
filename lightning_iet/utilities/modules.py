"""Walking through modules by identity."""

from collections.abc import Iterator

from torch import nn


def distinct_modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all of its parts by name, each object once, in the order of ``named_modules``.

    ``named_modules`` keeps a set of what it has seen: of two parts that compare as equal it leaves one out, and parts
    without a hash stop it. Here only identity counts.

    Args:
        root: Where to begin.
        prefix: Its name.

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

    yield from visit(prefix, root)
