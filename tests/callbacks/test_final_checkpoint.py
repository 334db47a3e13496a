"""Whatever the interval of checkpoints: the last one holds the last step."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_iet.callbacks.interruptions import FinalCheckpoint
from lightning_iet.utilities.lightning import order_callbacks
from tests.helpers.evaluations import Copier, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint",
    "ignore:Checkpoint directory .* exists and is not empty",
)


class Added(pl.Callback):
    """Adds the callback as the command line does."""

    def setup(self, trainer, pl_module, stage):
        order_callbacks(trainer, FinalCheckpoint())


@pytest.fixture
def written(monkeypatch):
    """Name and step of each checkpoint that a run writes."""
    found, save = [], pl.Trainer.save_checkpoint

    def noted(trainer, filepath, *args, **kwargs):
        found.append((Path(filepath).name, trainer.global_step))
        return save(trainer, filepath, *args, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", noted)
    return found


def run(folder, saving, limits, *others, **further):
    at_epochs = {"save_on_train_epoch_end": True} if "every_n_epochs" in saving else {}
    checkpoint = ModelCheckpoint(folder, **(at_epochs | saving))
    settings = {"enable_checkpointing": True, **limits}
    trainer, module = fit(folder, callbacks=[Added(), checkpoint, *others], trainer=settings, **further)
    return trainer, module, checkpoint


@pytest.mark.parametrize(
    ("saving", "limits", "expected"),
    [
        ({"every_n_epochs": 2, "save_last": True}, {"max_epochs": 3},
         [("epoch=1-step=4", 4), ("last", 4), ("last", 6)]),
        ({"every_n_epochs": 3, "save_last": True}, {"max_epochs": 3}, [("epoch=2-step=6", 6), ("last", 6)]),
        ({"every_n_epochs": 9, "save_last": True}, {"max_epochs": 3}, [("last", 6)]),
        ({"every_n_epochs": 9, "save_last": "link"}, {"max_epochs": 3}, [("last", 6)]),
        ({"every_n_epochs": 2, "save_last": "link"}, {"max_epochs": 3}, [("epoch=1-step=4", 4), ("last", 6)]),
        ({"every_n_train_steps": 4, "save_last": True}, {"max_epochs": -1, "max_steps": 5},
         [("epoch=1-step=4", 4), ("last", 4), ("last", 5)]),
        ({"every_n_epochs": 3, "save_last": True}, {"max_epochs": -1, "max_steps": 6},
         [("epoch=2-step=6", 6), ("last", 6)]),
        ({"every_n_epochs": 1, "filename": "last"}, {"max_epochs": 2}, [("last", 2), ("last", 4)]),
        ({"every_n_epochs": 2, "filename": "last"}, {"max_epochs": 3}, [("last", 4), ("last", 6)]),
        ({"every_n_epochs": 2, "save_last": True, "save_top_k": 0}, {"max_epochs": 3}, [("last", 6)]),
    ],
)  # fmt: skip
def test_the_last_checkpoint_holds_the_last_step_and_is_written_once(tmp_path, written, saving, limits, expected):
    trainer, module, checkpoint = run(tmp_path, saving, limits)
    assert written == [(f"{name}.ckpt", step) for name, step in expected]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == sorted({f"{name}.ckpt" for name, _ in expected})
    for name, step in dict(expected).items():
        stored = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert stored["global_step"] == step
    assert torch.equal(
        torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["net.0.weight"], module.net[0].weight
    )
    assert Path(checkpoint.last_model_path if checkpoint.save_last else checkpoint.best_model_path).name == "last.ckpt"
    trainer, _ = fit(tmp_path / "go on", ckpt_path=tmp_path / "last.ckpt", trainer={"max_epochs": 5})
    assert trainer.global_step == 10


def test_a_run_that_goes_on_writes_the_same_file(tmp_path, written):
    run(tmp_path, {"every_n_epochs": 9, "save_last": True}, {"max_epochs": 1})
    run(tmp_path, {"every_n_epochs": 9, "save_last": True}, {"max_epochs": 3}, ckpt_path=tmp_path / "last.ckpt")
    assert written == [("last.ckpt", 2), ("last.ckpt", 6)]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


def test_a_run_that_ends_early_has_it_too(tmp_path, written):
    class Worse(Copier):
        def on_train_epoch_end(self):
            self.log("worse", float(self.current_epoch))

    stopping = EarlyStopping("worse", patience=1, check_on_train_epoch_end=True)
    run(tmp_path, {"every_n_epochs": 9, "save_last": True}, {"max_epochs": 5}, stopping, module=Worse())
    assert written == [("last.ckpt", 4)]


def test_the_best_of_a_validation_after_the_last_step_is_kept_all_the_same(tmp_path):
    class Better(Copier):
        def validation_step(self, batch, batch_idx):
            self.log("score", -float(self.trainer.global_step))

    limits = {"max_epochs": -1, "max_steps": 3, "val_check_interval": 1, "limit_val_batches": 1}  # within an epoch
    saving = {"monitor": "score", "save_last": True, "save_on_train_epoch_end": False}
    _, _, checkpoint = run(tmp_path, saving, limits, module=Better())
    assert Path(checkpoint.best_model_path).name == "epoch=1-step=3.ckpt"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_what_lies_there_from_another_run_is_neither_read_nor_overwritten(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(b"damaged")
    run(tmp_path, {"every_n_epochs": 9, "save_last": True}, {"max_epochs": 1})
    assert (tmp_path / "last.ckpt").read_bytes() == b"damaged"
    assert torch.load(tmp_path / "last-v1.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize(
    "saving", [{"every_n_epochs": 2}, {"every_n_epochs": 2, "filename": "last", "monitor": "step"}]
)
def test_other_checkpoints_are_left_alone(tmp_path, written, saving):
    run(tmp_path, saving, {"max_epochs": 3})
    assert [step for _, step in written] == [4]
