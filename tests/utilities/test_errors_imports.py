import math
import sys

import pytest

from lightning_iet.utilities.errors import require


def test_an_installed_module_is_returned():
    assert require("math", "inception") is math


def test_a_missing_module_names_the_line_that_installs_it():
    with pytest.raises(ModuleNotFoundError) as caught:
        require("no_such_package.part", "inception")
    assert str(caught.value) == "`no_such_package` is not installed. Run: pip install 'lightning-iet[inception]'"
    assert caught.value.name == "no_such_package"


def test_a_module_that_misses_one_of_its_own_names_that_one(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="`no_such_package` is not installed"):
        require("needs_more", "inception")
    assert "needs_more" not in sys.modules
