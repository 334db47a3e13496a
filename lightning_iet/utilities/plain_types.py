"""Which types a checkpoint may hold and still be read without running code, and which of its entries hold others.

``torch.load(weights_only=True)`` calls only what is on its list of allowed names. People put more than tensors and
numbers into a checkpoint, mostly as hyperparameters: numbers and arrays of numpy, the state of its generators,
configurations of OmegaConf, paths, dates, enumerations. :func:`allow_plain_types` adds those types of libraries whose
construction runs nothing else; :func:`allow_imported_types` adds enumerations, dataclasses and named tuples of the
program itself, if they are imported already and have no code of their own for being made.
"""

import abc
import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import pickle
import sys
import types
import typing
import uuid
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

import jsonargparse
import numpy as np
import omegaconf
import torch
from omegaconf.base import ContainerMetadata, Metadata

_KINDS_OF_NUMBERS = "?bBhHiIlLqQefdgFDGSUMm"  # numpy's one-letter codes; neither objects nor structures
_UNITS = ("Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as", "generic")  # of dates
# --- numpy ------------------------------------------------------------------------------------------------------------


class _DataType:
    """Stands for ``numpy.dtype`` while a file is read.

    A pickled data type sets its own flags: with a wrong one numpy takes numbers for addresses of objects. Only the code
    and the byte order are taken from the file.
    """

    def __init__(self, code: Any, align: bool = False, copy: bool = True) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.char not in _KINDS_OF_NUMBERS:
            raise pickle.UnpicklingError(f"Unsupported numpy data type {self.dtype}")

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields, *_ = state
        if (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("Unsupported numpy data type with fields")
        if self.dtype.char in "Mm" and len(state) > 8:  # dates: (None, (unit, count, …))
            unit, count = state[8][1][:2]
            unit = unit.decode() if isinstance(unit, bytes) else unit
            if unit not in _UNITS:
                raise pickle.UnpicklingError("Unsupported unit of a numpy date")
            self.dtype = np.dtype(f"{self.dtype.char}8[{int(count)}{unit}]")
        self.dtype = self.dtype.newbyteorder(order if order in "<>=|" else "=")

    def __reduce__(self) -> tuple[Any, ...]:
        return self.dtype.__reduce__()

    def __repr__(self) -> str:
        return repr(self.dtype)


class _Array(np.ndarray):
    """An array that was read from a file; equal to a plain one in all else, and saved as one."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        if not isinstance(kind, _DataType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("Unsupported numpy array")
        super().__setstate__((1, tuple(shape), kind.dtype, bool(is_fortran), content))  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return np.asarray(self).view(np.ndarray).__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return np.asarray(self).view(np.ndarray).__reduce_ex__(protocol)


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    return np.empty(0, np.uint8).view(_Array)


def _scalar(kind: Any, content: Any) -> Any:
    if not isinstance(kind, _DataType) or not isinstance(content, bytes):
        raise pickle.UnpicklingError("Unsupported numpy number")
    return np.frombuffer(content, kind.dtype, count=1)[0]


def _of_numpy() -> Iterator[Any]:
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # of numpy 2, and of 1
        yield _reconstruct, f"{module}._reconstruct"
        yield _scalar, f"{module}.scalar"
    yield _DataType, "numpy.dtype"
    yield _DataType
    yield _Array
    yield np.ndarray
    for code in _KINDS_OF_NUMBERS:
        yield np.dtype(code).type  # the class as a value: {"dtype": numpy.float32}
    from numpy.random import _pickle, bit_generator

    for name in ("__generator_ctor", "__bit_generator_ctor", "__randomstate_ctor"):
        yield getattr(_pickle, name), f"numpy.random._pickle.{name}"
    restore = "__pyx_unpickle_SeedSequence"
    yield getattr(bit_generator, restore), f"numpy.random.bit_generator.{restore}"
    yield from (np.random.Generator, np.random.RandomState, np.random.SeedSequence)
    yield from (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)


# --- what is allowed --------------------------------------------------------------------------------------------------


def _of_python() -> Iterator[Any]:
    yield from (bool, int, float, str, bytes, list, dict, tuple, frozenset, range, slice, collections.defaultdict)
    yield from (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone)
    yield from (decimal.Decimal, fractions.Fraction, uuid.UUID, uuid.SafeUUID, types.SimpleNamespace)
    yield from (argparse.Namespace, jsonargparse.Namespace)
    for name in ("PurePosixPath", "PureWindowsPath", "PosixPath", "WindowsPath"):
        kind = getattr(pathlib, name)
        # A path of the other system cannot be made here, its pure form can.
        if name in ("PosixPath", "WindowsPath") and not isinstance(Path(), kind):
            kind = getattr(pathlib, f"Pure{name}")
        yield kind, f"pathlib.{name}"
        yield kind, f"pathlib._local.{name}"  # Python 3.13


def _of_omegaconf() -> Iterator[Any]:
    yield from (omegaconf.DictConfig, omegaconf.ListConfig, Metadata, ContainerMetadata)
    for name in dir(omegaconf):
        kind = getattr(omegaconf, name)
        if isinstance(kind, type) and kind.__module__ == "omegaconf.nodes":
            yield kind
    yield typing.Any, "typing.Any"
    for name in ("Dict", "List", "Tuple"):
        yield getattr(typing, name), f"typing.{name}"


@cache
def allow_plain_types() -> None:
    """Let ``torch.load(weights_only=True)`` read plain types of Python, numpy and OmegaConf, in this process.

    Example:
        >>> import io
        >>> allow_plain_types()
        >>> file = io.BytesIO()
        >>> torch.save({"mean": np.float64(0.5), "cache": Path("a/b")}, file)
        >>> _ = file.seek(0)
        >>> float(torch.load(file, weights_only=True)["mean"])
        0.5
    """
    torch.serialization.add_safe_globals(
        [*_of_python(), *_of_numpy(), *_of_omegaconf(), torch.torch_version.TorchVersion]
    )


def allow_imported_types(path: Path) -> None:
    """Let a file be read that holds enumerations, dataclasses or named tuples of this program.

    Nothing is imported, and only classes are added whose construction runs no code of their own: enumerations without
    ``_missing_``, dataclasses without ``__post_init__``, ``__setstate__`` and the like.
    """
    allow_plain_types()
    for name in _unsafe_globals(path):
        module, _, qualified = name.rpartition(".")
        # Looked up in what is there: to ask some modules for an attribute imports another one.
        kind = getattr(sys.modules.get(module), "__dict__", {}).get(qualified)
        if isinstance(kind, type) and _runs_nothing(kind):
            torch.serialization.add_safe_globals([kind])


def _unsafe_globals(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError):
        return []


# What is called when attributes are set or looked for while an instance is filled.
_HOOKS = ("__setattr__", "__getattr__", "__getattribute__")


def _runs_nothing(kind: type) -> bool:
    """Whether instances are made, filled and dropped without code that somebody wrote for the class."""
    own = [base for base in kind.__mro__ if base.__module__ not in ("builtins", "enum", "typing", "abc")]
    if type(kind) not in (type, abc.ABCMeta, enum.EnumType) or any(
        _written(base, name) for base in own for name in _HOOKS
    ):
        return False
    if issubclass(kind, enum.Enum):
        names = ("_missing_", "__new__", "__init__", "__setstate__", "__reduce__", "__reduce_ex__", "__del__")
        # EnumType puts a `__new__` of its own into each class, and keeps a written one as `__new_member__`.
        return all(not _written(base, name) for base in own for name in names)
    if kind.__bases__ == (tuple,) and hasattr(kind, "_fields"):
        return not any(
            _written(kind, name) for name in ("__new__", "__init__", "__setstate__", "__del__", "__reduce__")
        )
    names = ("__new__", "__post_init__", "__init__", "__setstate__", "__reduce__", "__reduce_ex__", "__del__")
    return all(
        dataclasses.is_dataclass(base) and all(not _written(base, name) for name in names) for base in own
    ) and bool(own)


def _written(kind: type, name: str) -> bool:
    """Whether a class defines a method itself, and neither `dataclasses` nor `enum` has made it."""
    found = vars(kind).get(name)
    found = getattr(found, "__func__", found)
    if found is None or not isinstance(found, types.FunctionType):
        return found is not None
    return found.__code__.co_filename not in ("<string>", dataclasses.__file__, enum.__file__)


# --- what is not ------------------------------------------------------------------------------------------------------


class _Stub(dict):  # type: ignore[type-arg]
    """Stands for whatever a name in a file would make; keeps what it is given, and runs nothing."""

    name = ""
    parts: list[Any]
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        stub = super().__new__(cls)
        stub.parts = list(args)
        return stub

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def append(self, part: Any) -> None:
        self.parts.append(part)

    def extend(self, parts: Any) -> None:
        self.parts.extend(parts)

    def __call__(self, *args: Any) -> Any:  # what `getattr` returns for a class inside a class
        return self

    add = append


class _Outline(pickle.Unpickler):
    """Reads a pickle as dicts, lists and stubs."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._kinds: dict[str, type[_Stub]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        full = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        return self._kinds.setdefault(full, type("Stub", (_Stub,), {"name": full}))

    def persistent_load(self, pid: Any) -> None:
        return None


def unreadable_entries(path: Path) -> list[tuple[str, str]]:
    """Return which entries of a checkpoint ``torch.load(weights_only=True)`` would refuse, without running anything.

    Returns:
        ``(key, name of the type)`` of each entry, such as ``("hyper_parameters.mode", "project.Mode")``; empty if there
        is none, or the file cannot be read that way either.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        ...     torch.save({"hyper_parameters": {"loss": torch.nn.MSELoss()}}, file.name)
        ...     unreadable_entries(Path(file.name))
        [('hyper_parameters.loss', 'torch.nn.modules.loss.MSELoss')]
    """
    unsafe = {name.removeprefix("builtins.") for name in _unsafe_globals(path)}
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            with archive.open(pickled) as file:
                content = _Outline(file).load()
    except Exception:  # damaged files make pickle raise anything
        return []

    def refused(stub: Any) -> bool:
        is_mapping = stub.name.rpartition(".")[2] in ("OrderedDict", "Counter")
        filled = isinstance(stub, _Stub) and len(stub) > 0 and not is_mapping
        return filled or stub.name.removeprefix("builtins.") in unsafe

    return list(dict(_search(content, (), refused)).items())


def _kind(stub: Any) -> str:
    """The name of a stub's class; of a class inside another one it was made by ``getattr``."""
    owner, *inner = stub.parts if isinstance(stub, _Stub) and stub.parts else [None]
    if stub.name.rpartition(".")[2] == "getattr" and isinstance(owner, type) and issubclass(owner, _Stub):
        return ".".join([owner.name, *map(str, inner)])
    return str(stub.name)


def _search(
    thing: Any, keys: tuple[str, ...], refused: Callable[[Any], bool], seen: set[int] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield key and name of every stub that is refused."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | None):
        return
    seen.add(id(thing))
    is_class = isinstance(thing, type) and issubclass(thing, _Stub)
    if (is_class or isinstance(thing, _Stub)) and refused(thing):
        yield ".".join(keys) or "(the whole)", _kind(thing)
        return
    if is_class:
        return
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield from _search(key, keys, refused, seen)
            yield from _search(value, (*keys, str(key)), refused, seen)
    for part in getattr(thing, "parts", thing if isinstance(thing, list | tuple | set) else ()):
        inner = part if isinstance(part, dict) and isinstance(thing, _Stub) else None
        yield from _search(part if inner is None else list(inner.values()), keys, refused, seen)
