"""How much memory a process has had, in the units of each system."""

from types import SimpleNamespace

import pytest

from lightning_iet.utilities import devices


@pytest.mark.parametrize(("platform", "expected"), [("linux", 5 * 1024), ("darwin", 5)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, platform, expected):
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5))
    monkeypatch.setattr(devices, "resource", usage)
    monkeypatch.setattr(devices, "sys", SimpleNamespace(platform=platform))
    assert devices.peak_memory() == expected


def test_where_the_system_does_not_tell_there_is_none(monkeypatch):
    monkeypatch.setattr(devices, "resource", None)
    assert devices.peak_memory() == 0
