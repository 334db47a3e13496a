"""What Weights & Biases keeps of a run that is offline: a file of records, which newer versions have no reader for."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _CHUNK = 7, 32768, struct.Struct("<IHB")  # a chunk's checksum, length, kind
_WHOLE, _LAST = 1, 4  # kinds of a chunk that end a record


@dataclass
class OfflineRun:
    """A run.

    Attributes:
        config: values of the sweep and of the program.
        summary: last value of all that was logged; of a picture a dict with ``filenames``.
        history: rows in the order in which they were logged.
        exit_code: of the program; None if it was killed.
    """

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def read_offline_run(path: Path) -> OfflineRun:
    """Read ``offline-run-…/run-….wandb``."""
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun()
    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        if record.HasField("run"):
            run.config |= _named(record.run.config.update)
        elif record.HasField("config"):
            run.config |= _named(record.config.update)
        elif record.HasField("history"):
            run.history.append(_named(record.history.item))
        elif record.HasField("summary"):
            run.summary |= _named(record.summary.update)
        elif record.HasField("exit"):
            run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> Iterator[bytes]:
    """The log format of LevelDB: records in chunks, none of which crosses the border of a block."""
    position, record = _HEADER, b""
    while position + _CHUNK.size <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _CHUNK.size:
            position += room
            continue
        _, length, kind = _CHUNK.unpack_from(data, position)
        position += _CHUNK.size + length
        record += data[position - length : position]
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""


def _named(items: Any) -> dict[str, Any]:
    """Values by name; ``nested_key`` is a path, such as a picture's ``eval/samples`` and ``filenames``."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        entry = found
        for key in path:
            entry = entry.setdefault(key, {})
        entry[last] = json.loads(item.value_json)
    return found
