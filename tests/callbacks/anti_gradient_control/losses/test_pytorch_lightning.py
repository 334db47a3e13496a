"""The callbacks work under both of Lightning's names, in Python and on the command line."""

import importlib
import sys

import lightning_utilities.core.rank_zero as rank_zero
import pytest
import torch
import torch.nn.functional as F

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from lightning_iet.utilities.lightning import Callback
from tests.helpers.projects import randint_and_mse
from tests.helpers.projects.common import NUM_TIMESTEPS, THRESHOLD, Bank, Net
from tests.helpers.projects.training import batches
from tests.helpers.weights import assert_same

pytorch_lightning = pytest.importorskip("pytorch_lightning")
NAMES = ["lightning.pytorch", "pytorch_lightning"]
QUIET = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")


def project_of(name):
    """The usual project, on the LightningModule of either package."""
    package = importlib.import_module(name)

    class Project(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.net = Net()
            self.bank = Bank()

        noisy = randint_and_mse.Project.noisy
        training_step = randint_and_mse.Project.training_step
        configure_optimizers = randint_and_mse.Project.configure_optimizers

    return package, Project


def fit(package, module, *callbacks):
    torch.manual_seed(1)
    package.Trainer(callbacks=list(callbacks), accelerator="cpu", max_epochs=1, **dict.fromkeys(QUIET, False)).fit(
        module, batches()
    )


def test_a_callback_is_one_of_both():
    assert all(issubclass(Callback, importlib.import_module(name).Callback) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_equals_agc_by_hand(name):
    package, kind = project_of(name)
    module, by_hand = kind(), kind()
    agc = AntiGradientControl(THRESHOLD, num_timesteps=NUM_TIMESTEPS)
    fit(package, module, agc)

    def training_step(batch):
        noisy, noise, t = by_hand.noisy(batch[0])
        losses = F.mse_loss(by_hand.net(noisy, t), noise, reduction="none").mean((1, 2, 3))
        return by_hand.bank.mean(losses, losses, t)

    by_hand.training_step = training_step
    fit(package, by_hand)
    assert_same(module, by_hand, 1e-9)
    assert agc.run_statistics.skipped.sum() == by_hand.bank.skipped > 20


CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_iet.AntiGradientControl
      init_args: {threshold: 0.95, num_timesteps: 4, denoiser: net}
"""


@pytest.mark.parametrize("name", NAMES)
def test_on_the_command_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    package, kind = project_of(name)

    class Data(package.LightningDataModule):
        def train_dataloader(self):
            return batches()

    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = importlib.import_module(f"{name}.cli").LightningCLI(
        kind,
        Data,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
        seed_everything_default=0,
    )
    assert cli.trainer.callback_metrics["agc/skip_rate"] > 0.1


def test_importing_leaves_the_messages_of_lightning_where_they_were():
    assert rank_zero.log.name.startswith("lightning.pytorch")
