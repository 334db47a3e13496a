import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_iet import (
    AntiGradientControl,
    DigitsDataModule,
    ParameterAveragingCallback,
    Redistribution,
    ShardedDataModule,
    ThresholdAwareAugmentation,
)
from lightning_iet.cli import main
from lightning_iet.tools import plan
from lightning_iet.tools.plan import PlanningTrainer, model_size
from tests.helpers.models import tiny_diffusion

DIGITS = Path(__file__).parents[2] / "configs" / "digits"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])


def trainer(**settings):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return PlanningTrainer(accelerator="cpu", devices=1, **quiet | settings)


class Counting(ParameterAveragingCallback):
    """Counts the averagings of a run."""

    count = 0

    def _average(self, engine):
        self.count += 1
        super()._average(engine)


WHOLE, ACCUMULATED = {"max_epochs": 3}, {"max_epochs": 4, "accumulate_grad_batches": 2}


@pytest.mark.parametrize(  # every two of their values once
    ("limits", "round_length", "num_shards"),
    [
        (WHOLE, {"every_n_epochs": 2}, 1),
        (WHOLE, {"every_n_train_steps": 4}, 3),
        (ACCUMULATED, {"every_n_epochs": 2}, 3),
        (ACCUMULATED, {"every_n_train_steps": 4}, 1),
    ],
)
def test_a_plan_comes_true(limits, round_length, num_shards):
    def parts():
        averaging = Counting(num_shards=num_shards, **round_length)
        inner = DigitsDataModule(34, num_control=16, batch_size=4)
        data = ShardedDataModule(inner, num_shards) if num_shards > 1 else inner
        return trainer(callbacks=[averaging], limit_val_batches=0, **limits), data, averaging

    planning, data, _ = parts()
    schedule = planning.plan(tiny_diffusion(), data).schedule
    real, data, averaging = parts()
    real.fit(tiny_diffusion(), data)
    assert schedule.process_steps == real.global_step
    assert sum(schedule.shard_sizes) == 34
    assert len(schedule.shard_sizes) == num_shards
    assert schedule.averagings == averaging.count


def tensors(content):
    """All tensors of a checkpoint."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        yield from (one for value in content.values() for one in tensors(value))
    elif isinstance(content, list | tuple):
        yield from (one for value in content for one in tensors(value))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_size_of_a_checkpoint_is_that_of_its_tensors(num_shards):
    inner = DigitsDataModule(50, num_control=16, batch_size=4)
    data = ShardedDataModule(inner, num_shards) if num_shards > 1 else inner
    saving = ModelCheckpoint("saved", filename="last")
    callbacks = [ParameterAveragingCallback(num_shards=num_shards), saving]
    module = tiny_diffusion()
    trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=1, limit_val_batches=0).fit(module, data)
    kept = {(t.untyped_storage().data_ptr(), t.numel()): t.nbytes for t in tensors(torch.load("saved/last.ckpt"))}
    # Beside what is counted there are a number of steps for each tensor, and random states.
    assert sum(kept.values()) == pytest.approx(model_size(module).checkpoint(num_shards), rel=0.1)


@pytest.mark.parametrize("config", ["baseline", "iet_agc"])
def test_measured_steps_tell_the_time_and_leave_nothing(config, capsys):
    arguments = ["--config", str(DIGITS / f"{config}.yaml"), "--model.unet.init_args.block_out_channels=[8,8]"]
    main(["plan", *arguments, "--model.unet.init_args.norm_num_groups=4", "--measure_steps=2"])
    output = " ".join(capsys.readouterr().out.split())
    assert f"{4 if config == 'iet_agc' else 1} shard(s) on each" in output
    assert "measured peak" in output
    assert "s for each step" in output
    assert list(Path().iterdir()) == []


def test_measured_steps_are_no_run_that_is_too_short_or_lists_its_images(capsys):
    arguments = ["--config", str(DIGITS / "baseline.yaml"), "--model.unet.init_args.block_out_channels=[8,8]"]
    arguments += ["--agc.criterion=record", "--agc.weigh=draws", "--data.duplicates=drop"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "AntiGradientControl expected")
        main(["plan", *arguments, "--model.unet.init_args.norm_num_groups=4", "--measure_steps=2"])
    assert "s for each step" in " ".join(capsys.readouterr().out.split())
    assert list(Path().iterdir()) == []


def test_measured_steps_are_those_of_all_methods(monkeypatch):
    monkeypatch.setattr(plan, "peak_memory", lambda: 3 * 2**20)
    calls = []

    def counting(kind):
        def started(self, *args):
            calls.append(kind)
            kind.on_train_batch_start(self, *args)

        return type(f"Counting{kind.__name__}", (kind,), {"on_train_batch_start": started})

    kinds = (
        (AntiGradientControl, {"threshold": 0.5}),
        (ParameterAveragingCallback, {"num_shards": 2}),
        (Redistribution, {"fraction": 0.25, "within": "shard"}),
        (ThresholdAwareAugmentation, {"max_magnitude": 5, "at": "same_step"}),
    )
    methods = [counting(kind)(**options) for kind, options in kinds]
    data = ShardedDataModule(DigitsDataModule(32, num_control=16, batch_size=4), 2)
    cost = trainer(callbacks=methods, max_epochs=2).plan(tiny_diffusion(), data, measure_steps=2)
    assert cost.step_seconds > 0
    assert cost.peak == 3 * 2**20
    assert set(calls) == {kind for kind, _ in kinds}


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: None, {}, "`data` expected a data module"),
        (lambda: DigitsDataModule(16), {"measure_steps": -1}, "`measure_steps` expected an integer ≥ 0"),
    ],
)
def test_bad_input(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(max_epochs=1).plan(tiny_diffusion(), make(), **arguments)


def test_nothing_is_measured_on_several_processes():
    several = PlanningTrainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, max_epochs=1)
    with pytest.raises(ValueError, match=r"0 for 2 processes, but got 3\. Measure on one process"):
        several.plan(tiny_diffusion(), DigitsDataModule(16), measure_steps=3)
    assert several.plan(tiny_diffusion(), DigitsDataModule(30, num_control=16, batch_size=8)).schedule.steps == 2
