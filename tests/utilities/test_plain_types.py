import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import os
import pathlib
import pickle
import types
import uuid
from typing import NamedTuple

import jsonargparse
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_iet.utilities.checkpoints import outline
from lightning_iet.utilities.plain_types import allow_imported_types, unreadable_entries


class Mode(enum.Enum):
    FAST = 1
    SLOW = "slow"


class Shrinking(enum.Enum):
    A = 1
    B = 2


class Level(enum.IntFlag):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    A = "a"


class Outer:
    class Inner(enum.Enum):
        A = 1


class Guessing(enum.Enum):
    """Runs code of its own when a value is unknown."""

    A = 1

    @classmethod
    def _missing_(cls, value):
        os.mkdir(value)


@dataclasses.dataclass
class Settings:
    width: int = 8
    mode: Mode = Mode.FAST


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    width: int = 8


@dataclasses.dataclass
class Busy:
    folder: str = "evil"

    def __post_init__(self):
        self.size = len(self.folder)


@dataclasses.dataclass
class Watching:
    """Runs code of its own when an attribute is set."""

    width: int = 8

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


class Size(NamedTuple):
    height: int
    width: int


class Plain:
    def __init__(self):
        self.width = 8


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@dataclasses.dataclass
class Structured:
    width: int = 3
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


def saved(tmp_path, value):
    """A checkpoint with a value in its hyperparameters."""
    path = tmp_path / "some.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "hyper_parameters": {"width": 8, "value": value}}, path)
    return path


PLAIN = {
    "numpy number": np.float64(0.5),
    "numpy half": np.float16(0.5),
    "numpy integer": np.int32(-7),
    "numpy truth": np.bool_(True),
    "numpy complex": np.complex64(1 + 2j),
    "numpy date": np.datetime64("2026-11-29T01:02:03", "ns"),
    "numpy duration": np.timedelta64(5, "D"),
    "numpy text": np.str_("word"),
    "numpy type": np.float32,
    "numpy class": np.int64,
    "path": pathlib.Path("a/b"),
    "pure path": pathlib.PurePosixPath("a/b"),
    "path of Windows": pathlib.PureWindowsPath("a/b"),
    "date": datetime.date(2026, 11, 29),
    "moment": datetime.datetime(2026, 11, 29, 1, 2, tzinfo=datetime.UTC),
    "duration": datetime.timedelta(hours=3),
    "decimal": decimal.Decimal("0.1"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "range": range(3, 9),
    "slice": slice(1, 5, 2),
    "frozen set": frozenset({1, 2}),
    "set": {1, 2},
    "complex": 1 + 2j,
    "bytes": b"\x00\xff",
    "large": 2**100,
    "counter": collections.Counter("abca"),
    "ordered": collections.OrderedDict(a=1),
    "namespace": types.SimpleNamespace(a=1),
    "options": argparse.Namespace(a=1, b=[2]),
    "parsed options": jsonargparse.Namespace(a=1, b=jsonargparse.Namespace(c=2)),
    "OmegaConf": OmegaConf.create({"a": 1, "b": [1, 2.5, True, None, "x"], "c": "${a}", "d": {"e": b"f"}}),
    "OmegaConf list": OmegaConf.create([1, {"a": [2]}]),
    "OmegaConf of a dataclass": OmegaConf.structured(Structured),
    "OmegaConf that is read-only": OmegaConf.create({"a": 1}, flags={"readonly": True}),
    "generator's state": np.random.default_rng(3).bit_generator.state,
    "enumeration": Mode.SLOW,
    "enumerations": {"a": [Mode.FAST, Word.A, Level.LOW | Level.HIGH]},
    "dataclass": Settings(3, Mode.SLOW),
    "frozen dataclass": Frozen(3),
    "named tuple": Size(3, 4),
    "torch type": torch.bfloat16,
    "device": torch.device("cpu"),
    "torch version": torch.__version__,
    "type": float,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_values_come_back_equal(tmp_path, kind):
    path = saved(tmp_path, PLAIN[kind])
    assert unreadable_entries(path) == [] or kind in (
        "enumeration",
        "enumerations",
        "dataclass",
        "frozen dataclass",
        "named tuple",
        "OmegaConf of a dataclass",
    )
    found = outline(path, argument="ckpt")["hyper_parameters"]["value"]
    assert type(found) is type(PLAIN[kind])
    assert found == PLAIN[kind]


ARRAYS = {
    "numbers": np.arange(6, dtype=np.float32).reshape(2, 3),
    "in Fortran's order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "of the other byte order": np.arange(4, dtype=">i4"),
    "none": np.empty((0, 3)),
    "one": np.array(3.5),
    "truths": np.array([True, False]),
    "words": np.array(["a", "bcd"]),
    "bytes": np.array([b"a", b"bcd"]),
    "dates": np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[D]"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_come_back_equal_and_are_saved_again_as_plain_ones(tmp_path, kind):
    array = ARRAYS[kind]
    found = outline(saved(tmp_path, {"deep": [array]}), argument="ckpt")["hyper_parameters"]["value"]["deep"][0]
    assert isinstance(found, np.ndarray)
    assert found.dtype == pickle.loads(pickle.dumps(array)).dtype  # of this machine's byte order
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array)
    assert b"lightning_iet" not in pickle.dumps(found)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)), array)


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_a_generator_goes_on_where_it_was(tmp_path, bits):
    generator = np.random.Generator(bits(5))
    generator.random(7)
    found = outline(saved(tmp_path, generator), argument="ckpt")["hyper_parameters"]["value"]
    assert found.random() == generator.random()


def test_an_old_generator_and_the_state_of_a_twister(tmp_path):
    generator = np.random.RandomState(5)
    state = generator.get_state()
    found = outline(saved(tmp_path, (generator, state)), argument="ckpt")["hyper_parameters"]["value"]
    assert found[0].rand() == generator.rand()
    other = np.random.RandomState(0)
    other.set_state(found[1])
    generator.set_state(state)
    assert other.rand() == generator.rand()


FOREIGN = {
    "network": (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "function": (saved, f"{__name__}.saved"),
    "partial": (functools.partial(saved, 1), "functools.partial"),
    "class": (Plain(), f"{__name__}.Plain"),
    "busy dataclass": (Busy(), f"{__name__}.Busy"),
    "watching dataclass": (Watching(), f"{__name__}.Watching"),
    "guessing enumeration": (Guessing.A, f"{__name__}.Guessing"),
    "class in a class": (Outer.Inner.A, f"{__name__}.Outer.Inner"),
    "deque": (collections.deque([1]), "collections.deque"),
    "default dict": (collections.defaultdict(int, a=1), "collections.defaultdict"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_could_run_code_is_named_by_its_key(tmp_path, kind):
    value, name = FOREIGN[kind]
    path = saved(tmp_path, {"a": [{"b": value}]})
    with pytest.raises(
        ValueError, match=r"its `hyper_parameters\.value\.a\.0?\.?b` is a|its `hyper_parameters"
    ) as error:
        outline(path, argument="ckpt_path")
    assert f"is a {name}" in str(error.value)
    assert "--trust-checkpoint" in str(error.value)
    assert str(path) in str(error.value)
    found = outline(path, argument="ckpt_path", trusted=True)["hyper_parameters"]["value"]["a"][0]["b"]
    assert type(found) is type(value)


def test_several_entries_are_counted(tmp_path):
    path = saved(tmp_path, {"a": Plain(), "b": nn.MSELoss(), "c": 1, "d": (functools.partial(saved),)})
    found = unreadable_entries(path)
    prefix = "hyper_parameters.value"
    assert [key for key, _ in found] == [f"{prefix}.a", f"{prefix}.b", f"{prefix}.d"]
    with pytest.raises(ValueError, match=r"\.Plain \(and 2 more: hyper_parameters\.value\.b"):
        outline(path, argument="ckpt_path")


def test_nothing_is_run_while_it_is_looked_at(tmp_path):
    path = saved(tmp_path, Evil(tmp_path / "evil"))
    allow_imported_types(path)
    assert unreadable_entries(path) == [("hyper_parameters.value", "posix.mkdir")]
    assert not (tmp_path / "evil").exists()


class Forged:
    """Pickled as an array whose data type claims that its numbers are addresses of objects."""

    def __reduce__(self):
        kind = np.dtype("f8", False, True)
        kind.__setstate__((3, "<", None, None, None, -1, -1, 63))
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (2,), kind, False, b"\x01" * 16)


def test_flags_of_a_data_type_are_not_taken_from_the_file(tmp_path):
    found = outline(saved(tmp_path, Forged()), argument="ckpt")["hyper_parameters"]["value"]
    assert not found.dtype.hasobject
    assert found.tolist() == np.frombuffer(b"\x01" * 16).tolist()


@pytest.mark.parametrize("array", [np.array([object()]), np.array([None, "a"]), np.zeros(2, [("a", "i4")])])
def test_arrays_of_objects_and_structures_are_refused(tmp_path, array):
    path = tmp_path / "some.ckpt"
    array = np.array([1, "a"], dtype=object) if array.dtype.hasobject else array
    torch.save({"hyper_parameters": {"value": array}}, path)
    with pytest.raises(ValueError, match="expected a checkpoint of tensors and plain values"):
        outline(path, argument="ckpt")


def test_a_value_that_cannot_be_made_again_is_said(tmp_path, monkeypatch):
    path = saved(tmp_path, Shrinking.B)
    monkeypatch.setitem(globals(), "Shrinking", enum.Enum("Shrinking", {"A": 1}, module=__name__))
    with pytest.raises(ValueError, match="2 is not a valid Shrinking") as error:
        outline(path, argument="ckpt_path")
    assert f"expected a checkpoint of tensors and plain values, but got '{path}'" in str(error.value)


def test_nobody_is_advised_to_allow_what_could_run_code(tmp_path):
    path = saved(tmp_path, Outer.Inner.A)
    with pytest.raises(ValueError, match="is a") as error:
        outline(path, argument="ckpt_path")
    assert "safe_globals" not in str(error.value)
