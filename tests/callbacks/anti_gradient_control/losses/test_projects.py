"""AGC in every style of project, against the same project with AGC written into its training step."""

import importlib
import pkgutil

import pytest
from torch.testing import assert_close

import tests.helpers.projects
from tests.helpers.projects.training import fit, make
from tests.helpers.weights import assert_same

NAMES = [found.name for found in pkgutil.iter_modules(tests.helpers.projects.__path__) if found.name != "common"]
MODULES = {name: importlib.import_module(f"tests.helpers.projects.{name}") for name in NAMES}
WORKING = [name for name, module in MODULES.items() if hasattr(module, "ByHand")]
REFUSED = [name for name, module in MODULES.items() if hasattr(module, "REASON")]


pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler asks for it


@pytest.mark.parametrize("name", WORKING)
def test_equals_agc_by_hand(tmp_path, name):
    style = MODULES[name]
    project, by_hand, agc = style.Project(), style.ByHand(), make(style)
    fit(tmp_path, project, agc, num_samples=92)
    fit(tmp_path, by_hand, num_samples=92)
    assert_same(project, by_hand, getattr(style, "TOLERANCE", 1e-9))
    assert agc.run_statistics.skipped.sum() == by_hand.bank.skipped
    assert 5 < by_hand.bank.skipped < 87  # else this test shows nothing
    assert "training_step" not in vars(project)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in project.modules())


@pytest.mark.parametrize("name", WORKING)
def test_threshold_zero_is_bit_identical(tmp_path, name):
    style = MODULES[name]
    project, plain, agc = style.Project(), style.Project(), make(style, 0)
    fit(tmp_path, project, agc, limit_train_batches=8)
    fit(tmp_path, plain, limit_train_batches=8)
    assert_same(project, plain)
    assert agc.run_statistics.seen.sum() == 64
    assert (agc.bank > 0).all()


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "compiled_absolute_error"])
def test_what_is_switched_off_refuses_nothing(tmp_path, name):
    style = MODULES[name]
    project, plain, agc = style.Project(), style.Project(), make(style, 0)
    fit(tmp_path, project, agc, limit_train_batches=4)
    fit(tmp_path, plain, limit_train_batches=4)
    for ours, theirs in zip(project.parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_optimizer_step(tmp_path, name):
    style = MODULES[name]
    project = style.Project()
    with pytest.raises(ValueError, match=style.REASON) as caught:
        fit(tmp_path, project, make(style))
    assert "\n" not in str(caught.value)
    assert_same(project, style.Project())
