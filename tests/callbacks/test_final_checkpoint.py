"""Whatever the interval of checkpoints: the last one holds the last step."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_iet.callbacks.final_checkpoint import FinalCheckpoint
from tests.helpers.evaluations import fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint",
)


@pytest.mark.parametrize(
    ("saving", "limits"),
    [
        ({"every_n_epochs": 2, "save_last": True}, {"max_epochs": 3}),
        ({"every_n_epochs": 3, "save_last": True}, {"max_epochs": 3}),
        ({"every_n_epochs": 9, "save_last": True}, {"max_epochs": 3}),
        ({"every_n_train_steps": 4, "save_last": True}, {"max_epochs": -1, "max_steps": 5}),
        ({"every_n_epochs": 2, "filename": "last"}, {"max_epochs": 3}),
        ({"every_n_epochs": 2, "save_last": True, "save_top_k": 0}, {"max_epochs": 3}),
    ],
)
def test_the_last_checkpoint_holds_the_last_step(tmp_path, saving, limits):
    checkpoint = ModelCheckpoint(
        tmp_path, save_on_train_epoch_end=True if "every_n_epochs" in saving else None, **saving
    )
    settings = {"enable_checkpointing": True, **limits}
    trainer, module = fit(tmp_path, callbacks=[checkpoint, FinalCheckpoint()], trainer=settings)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == trainer.global_step == (5 if "max_steps" in limits else 6)
    assert torch.equal(stored["state_dict"]["net.0.weight"], module.net[0].weight)
    trainer, _ = fit(tmp_path / "go on", ckpt_path=tmp_path / "last.ckpt", trainer={"max_epochs": 5})
    assert trainer.global_step == 10


def test_other_checkpoints_are_left_alone(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_epochs=2, save_on_train_epoch_end=True)
    settings = {"enable_checkpointing": True, "max_epochs": 3}
    fit(tmp_path, callbacks=[checkpoint, FinalCheckpoint()], trainer=settings)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["epoch=1-step=4.ckpt"]
