import errno
import logging
import os

import lightning.pytorch as pl
import pytest
import torch

from lightning_iet import AntiGradientControl, ShardedDataModule
from lightning_iet.shards import FlatLayout, ShardState
from lightning_iet.shards.state import Offloaded, choose_offload, estimate_state_bytes, host_memory, mapped_memory
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.shards import Spied, digits
from tests.helpers.weights import assert_same_bits, state_of

GIB = 2**30


def fit(tmp_path, offload, **kwargs):
    torch.manual_seed(7)
    spied = Spied(4, every_n_epochs=2, offload=offload)
    module = tiny_diffusion(warmup_steps=3, unet={"dropout": 0.1})
    settings = {"max_epochs": 3, "limit_val_batches": 1, "val_check_interval": 3, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(tmp_path, callbacks=[AntiGradientControl(0.8), spied], **(settings | kwargs))
    trainer.fit(module, ShardedDataModule(digits(24), 4, partition="iid"))
    return state_of(module), spied


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_where_states_lie_changes_no_bit(tmp_path, offload, monkeypatch):
    monkeypatch.setattr("lightning_iet.shards.state.SMALLEST_FILE", 1)
    expected, on_device = fit(tmp_path, "none")
    state, spied = fit(tmp_path, offload)
    assert_same_bits(state, expected)
    for epoch in range(3):
        for shard, other in zip(spied.before[epoch], on_device.before[epoch], strict=True):
            assert_same_bits(shard, other)
    assert list(tmp_path.iterdir()) == []  # files have no name once they are mapped


class Addresses(pl.Callback):
    """Where the weights lie in each step, and how many bytes of states are elsewhere."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.add(pl_module.unet.conv_in.weight.data_ptr())


@pytest.mark.parametrize(("offload", "places"), [("none", 4), ("cpu", 1)])
def test_the_device_has_room_for_one_shard_only_when_the_others_are_away(tmp_path, offload, places):
    addresses = Addresses()
    torch.manual_seed(7)
    trainer = quiet_trainer(tmp_path, callbacks=[Spied(4, offload=offload), addresses], limit_val_batches=0)
    trainer.fit(tiny_diffusion(), ShardedDataModule(digits(24), 4, partition="iid"))
    assert len(addresses.seen) == places


def state(value):
    parameter = torch.nn.Parameter(torch.zeros(2))
    moments = {"exp_avg": torch.full((2,), value), "step": torch.tensor(value)}
    return ShardState(
        flat={torch.float32: torch.full((4,), value)},
        counters=[torch.tensor(int(value))],
        optimizers=[({parameter: moments}, [{"lr": value}])],
        schedulers=[{"last_epoch": value}],
        callbacks=[{"bank": torch.full((3,), value)}],
    )


def test_states_that_are_away_keep_their_values_and_share_nothing():
    desk = state(1.0)
    away = Offloaded(desk.flat, host_memory(torch.device("cpu")))
    stored = {shard: away.store(shard, desk) for shard in (0, 1)}
    for tensor in (desk.flat[torch.float32], desk.callbacks[0]["bank"], desk.counters[0]):
        tensor.fill_(5)
    (moments,) = desk.optimizers[0][0].values()
    moments["exp_avg"].fill_(5)
    stored[1] = away.store(1, desk)
    back = away.load(stored[0])
    assert back.flat[torch.float32] is desk.flat[torch.float32]
    assert back.flat[torch.float32].tolist() == [1.0] * 4
    assert back.callbacks[0]["bank"].tolist() == [1.0] * 3
    assert next(iter(back.optimizers[0][0].values()))["exp_avg"].tolist() == [1.0, 1.0]
    assert away.load(stored[1]).flat[torch.float32].tolist() == [5.0] * 4


def test_states_grow_when_an_optimizer_first_steps():
    empty, full = state(1.0), state(2.0)
    empty.optimizers[0][0].clear()
    away = Offloaded(empty.flat, host_memory(torch.device("cpu")))
    stored = [away.store(0, empty), away.store(1, full)]
    assert away.load(stored[0]).optimizers[0][0] == {}
    (moments,) = away.load(stored[1]).optimizers[0][0].values()
    assert moments["exp_avg"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("needed", "device", "expected"),
    [(10, "cuda", "none"), (30, "cuda", "cpu"), (90, "cuda", "disk"), (10, "cpu", "none"), (30, "cpu", "disk")],
)
def test_the_nearest_place_with_room_is_chosen(needed, device, expected):
    free = {"device_free": 40 * GIB, "host_free": (40 if device == "cpu" else 100) * GIB}
    assert choose_offload(needed * GIB, device=torch.device(device), **free) == expected


def test_the_estimate_counts_weights_ema_and_two_moments():
    layout = FlatLayout({"w": torch.zeros(16), "ema": torch.zeros(16)}, first=["w"])
    assert estimate_state_bytes(layout) == 4 * (16 + 16 + 2 * 16)


def test_the_decision_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, "auto", max_epochs=1)
        fit(tmp_path, "disk", max_epochs=1)
    messages = [record.getMessage() for record in caplog.records if "Shard states" in record.getMessage()]
    assert len(messages) == 2
    assert "stay on cpu (offload='auto'" in messages[0]
    assert "lie in files (offload='disk'" in messages[1]


def test_a_full_disk_is_told_before_training(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightning_iet.shards.state.SMALLEST_FILE", 1)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match=r"`offload` expected room for the shard states in '.*', but got: No space left"):
        fit(tmp_path, "disk")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`offload` expected a folder that can be written, but got '.*file'"):
        fit(tmp_path / "file", "disk")


def test_mapped_memory_is_a_tensor_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_iet.shards.state.SMALLEST_FILE", 1)
    tensor = mapped_memory(tmp_path)(torch.Size([3, 5]), torch.float64)
    tensor.copy_(torch.arange(15.0).view(3, 5))
    assert tensor.sum().item() == 105
    assert mapped_memory(tmp_path)(torch.Size([0]), torch.float32).numel() == 0
    assert list(tmp_path.iterdir()) == []
