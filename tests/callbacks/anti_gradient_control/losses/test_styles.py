"""AGC in every style of project, against the same project with AGC written into its training step."""

import importlib
import pkgutil

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import tests.styles
from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from tests.helpers.models import quiet_trainer
from tests.styles.common import NUM_TIMESTEPS, THRESHOLD

NAMES = [found.name for found in pkgutil.iter_modules(tests.styles.__path__) if found.name != "common"]
MODULES = {name: importlib.import_module(f"tests.styles.{name}") for name in NAMES}
WORKING = [name for name, module in MODULES.items() if hasattr(module, "ByHand")]
REFUSED = [name for name, module in MODULES.items() if hasattr(module, "REASON")]


def batches(num_samples=156):
    """Twenty batches of eight, the last one smaller."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_samples, 2, 4, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(images, torch.randint(10, (num_samples,), generator=generator)), batch_size=8)


def fit(tmp_path, project, *callbacks, **kwargs):
    torch.manual_seed(1)
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **({"max_epochs": 1} | kwargs))
    trainer.fit(project, batches())
    return trainer


def make(style, threshold=THRESHOLD):
    agc = AntiGradientControl(threshold, **({"num_timesteps": NUM_TIMESTEPS} | getattr(style, "AGC", {})))
    agc.load_shard_state(agc.shard_state() | {"bank": agc.bank.double()})
    return agc


def assert_same(project, other, tolerance=0.0):
    for ours, theirs in zip(project.parameters(), other.parameters(), strict=True):
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler asks for it


@pytest.mark.parametrize("name", WORKING)
def test_equals_agc_by_hand(tmp_path, name):
    style = MODULES[name]
    project, by_hand, agc = style.Project(), style.ByHand(), make(style)
    fit(tmp_path, project, agc)
    fit(tmp_path, by_hand)
    assert_same(project, by_hand, getattr(style, "TOLERANCE", 1e-9))
    assert agc.run_statistics.skipped.sum() == by_hand.bank.skipped
    assert 20 < by_hand.bank.skipped < 136  # else this test shows nothing
    assert "training_step" not in vars(project)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in project.modules())


@pytest.mark.parametrize("name", WORKING)
def test_threshold_zero_is_bit_identical(tmp_path, name):
    style = MODULES[name]
    project, plain, agc = style.Project(), style.Project(), make(style, 0)
    fit(tmp_path, project, agc)
    fit(tmp_path, plain)
    assert_same(project, plain)
    assert agc.run_statistics.seen.sum() == 156
    assert (agc.bank > 0).all()


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "compiled_absolute_error"])
def test_what_is_switched_off_refuses_nothing(tmp_path, name):
    style = MODULES[name]
    project, plain, agc = style.Project(), style.Project(), make(style, 0)
    fit(tmp_path, project, agc)
    fit(tmp_path, plain)
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
