"""Configurations are found by name, in a clone and in a wheel."""

import shutil
from pathlib import Path

import pytest

from lightning_iet.tools import configs as module
from lightning_iet.tools.configs import configurations, find_configuration, shipped_configuration, summary

ROOT = Path(__file__).parents[2]


def test_a_clone_lists_all_of_its_configurations():
    files = set(configurations().values())
    assert files == set((ROOT / "configs").rglob("*.yaml"))
    assert configurations()["paper/cifar10_iet"] == ROOT / "configs/paper/cifar10_iet.yaml"


def test_a_wheel_holds_them_in_the_package(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs/digits", tmp_path / "lightning_iet/configs/digits")
    monkeypatch.setattr(module, "_PACKAGE", tmp_path / "lightning_iet")
    assert set(configurations()) == {f"digits/{path.stem}" for path in (ROOT / "configs/digits").iterdir()}
    assert find_configuration("digits/agc") == tmp_path / "lightning_iet/configs/digits/agc.yaml"


@pytest.mark.parametrize("name", ["digits/agc", "digits/agc.yaml", "configs/digits/agc.yaml", "configs/digits/agc"])
def test_names_as_people_write_them(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_configuration(name) == shipped_configuration(name) == ROOT / "configs/digits/agc.yaml"


def test_a_file_of_that_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    Path("digits/agc").write_text("trainer: {}")
    assert find_configuration("digits/agc") == Path("digits/agc")


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(
        FileNotFoundError, match=r"but got 'digit/agc'\. Did you mean digits/agc\? `lightning-iet configs`"
    ):
        find_configuration("digit/agc")
    with pytest.raises(FileNotFoundError, match=r"but got 'nothing like it'\. `lightning-iet configs` lists"):
        find_configuration("nothing like it")


def test_each_has_a_summary_of_one_line():
    for name, file in configurations().items():
        assert summary(file).endswith("."), name
        assert len(summary(file)) <= 120
