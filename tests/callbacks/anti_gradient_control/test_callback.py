"""AntiGradientControl against AGC written by hand into a training step."""

import copy
import pickle
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from tests.helpers.devices import CountWaits
from tests.helpers.distributed import forking
from tests.helpers.interrupted import Saves
from tests.helpers.models import quiet_trainer, tiny_diffusion

NUM_TIMESTEPS = 4
THRESHOLD = 0.8


class Regression(pl.LightningModule):
    """A stranger's module that follows the dict protocol."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2, dtype=torch.float64)
        with torch.no_grad():
            self.net.weight.copy_(torch.arange(6).reshape(2, 3) / 6)
            self.net.bias.zero_()

    def losses(self, batch):
        x, y, timesteps = batch
        return (self.net(x) - y).square().mean(1), timesteps

    def training_step(self, batch, batch_idx):
        losses, timesteps = self.losses(batch)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": timesteps}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def mean_loss(losses, timesteps):
    return losses.mean()


class WithReducer(Regression):
    """A module that reduces its losses by an attribute."""

    def __init__(self):
        super().__init__()
        self.loss_reducer = mean_loss

    def training_step(self, batch, batch_idx):
        return self.loss_reducer(*self.losses(batch))


class ByHand(Regression):
    """The same with AGC in its training step: a loop over samples, as METHODS has it."""

    def __init__(self):
        super().__init__()
        self.bank_by_hand = [0.0] * NUM_TIMESTEPS
        self.skipped_by_hand = 0

    def training_step(self, batch, batch_idx):
        losses, timesteps = self.losses(batch)
        kept = [loss for loss, t in zip(losses, timesteps, strict=True) if loss >= THRESHOLD * self.bank_by_hand[t]]
        for loss, t in zip(losses.tolist(), timesteps.tolist(), strict=True):
            self.bank_by_hand[t] = 0.8 * self.bank_by_hand[t] + 0.2 * loss
        self.skipped_by_hand += len(losses) - len(kept)
        return sum(kept) / len(kept) if kept else 0 * losses.sum()


def data(num_samples=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(num_samples, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(x, y, torch.randint(NUM_TIMESTEPS, (num_samples,), generator=generator))


def loader(dataset=None, **kwargs):
    return DataLoader(data() if dataset is None else dataset, batch_size=4, **kwargs)


def make(threshold=THRESHOLD, **kwargs):
    agc = AntiGradientControl(threshold, num_timesteps=NUM_TIMESTEPS, **kwargs)
    agc.load_shard_state({"bank": torch.zeros(NUM_TIMESTEPS, dtype=torch.float64)})
    return agc


def fit(tmp_path, module, *callbacks, batches=None, **kwargs):
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **({"max_epochs": 1} | kwargs))
    trainer.fit(module, loader() if batches is None else batches)
    return trainer


def assert_same(module, other, **tolerance):
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        if tolerance:
            assert_close(a, b, **tolerance)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", [Regression, WithReducer])
def test_equals_agc_by_hand(tmp_path, kind, accumulate):
    module, by_hand, agc = kind(), ByHand(), make()
    fit(tmp_path, module, agc, accumulate_grad_batches=accumulate)
    fit(tmp_path, by_hand, accumulate_grad_batches=accumulate)
    assert_same(module, by_hand, rtol=1e-9, atol=1e-9)
    assert_close(agc.bank.tolist(), by_hand.bank_by_hand, rtol=1e-9, atol=1e-9)
    assert agc.skip_rate() == pytest.approx(by_hand.skipped_by_hand / 80)
    assert by_hand.skipped_by_hand > 10  # else this test shows nothing


@pytest.mark.parametrize("kind", [Regression, WithReducer])
def test_threshold_zero_is_bit_identical_and_still_records(tmp_path, kind):
    module, plain, agc = kind(), kind(), make(0)
    trainer = fit(tmp_path, module, agc)
    fit(tmp_path, plain)
    assert_same(module, plain)
    assert (agc.bank > 0).all()
    assert agc.skip_rate() == 0
    assert agc.run_statistics.seen.sum() == 80
    assert trainer.callback_metrics["agc/skip_rate"] == 0


@pytest.mark.parametrize("kind", [Regression, WithReducer])
def test_no_trace_after_fit_and_fit_again(tmp_path, kind):
    module, plain, agc = kind(), kind(), make()
    fit(tmp_path, module, agc)
    fit(tmp_path, plain)
    assert "training_step" not in vars(module)
    assert vars(module).keys() == vars(plain).keys()
    assert_same(pickle.loads(pickle.dumps(module)), module)
    assert torch.equal(pickle.loads(pickle.dumps(agc)).bank, agc.bank)
    bank = agc.bank.clone()
    fit(tmp_path, module, agc)
    assert agc.run_statistics.seen.sum() == 160
    assert not torch.equal(agc.bank, bank)
    assert "training_step" not in vars(module)


def test_no_trace_after_an_exception(tmp_path):
    class Breaks(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

    module, agc = Breaks(), make()
    with pytest.raises(KeyError, match="broken"):
        fit(tmp_path, module, agc)
    assert "training_step" not in vars(module)
    assert agc.epoch_statistics.seen.sum() == 12


class SavesOnException(Checkpoint):
    """Writes a checkpoint after an exception, as ModelCheckpoint does, up to where all processes meet."""

    def on_exception(self, trainer, pl_module, exception):
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.save_checkpoint(checkpoint, f"{trainer.default_root_dir}/exception.ckpt")


def stops(folder, ranks, error):
    """Train on one of two processes, of which these raise an error; return how many samples the checkpoint counts."""

    class Breaks(OfRank):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3 and self.global_rank in ranks:
                raise error("broken")
            return super().training_step(batch, batch_idx)

    settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "enable_checkpointing": True}
    trainer = quiet_trainer(folder, callbacks=[make(), SavesOnException()], max_epochs=1, **settings)
    with pytest.raises(error if trainer.global_rank in ranks else RuntimeError):
        trainer.fit(Breaks())
    if trainer.global_rank:
        return None
    (state,) = torch.load(folder / "exception.ckpt", weights_only=True)["callbacks"].values()
    return state["epoch_statistics"]["seen"].sum()


def test_a_checkpoint_after_an_exception_in_one_process_waits_for_no_other(tmp_path, processes):
    seen, _ = processes(2).run(stops, tmp_path, (0,), KeyError)
    assert seen == 12  # its own


def test_a_checkpoint_after_sigterm_which_all_processes_raise_is_of_all(tmp_path, processes):
    seen, _ = processes(2).run(stops, tmp_path, (0, 1), SIGTERMException)
    assert seen == 24


@pytest.mark.parametrize("threshold", [0, 0.9])
def test_works_on_a_diffusion_module(tmp_path, threshold):
    images = TensorDataset(torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    module, plain, agc = tiny_diffusion(), tiny_diffusion(), AntiGradientControl(threshold)
    agc.bank.fill_(1.0)
    for denoiser, callbacks in ((module, [agc]), (plain, [])):
        torch.manual_seed(0)
        quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=1).fit(denoiser, loader(images), loader(images))
    same = all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    assert same is (threshold == 0)
    assert agc.run_statistics.seen.sum() == 12
    assert 0 <= agc.skip_rate() < 1
    assert module.loss_reducer is plain.loss_reducer


def test_validation_is_not_recorded(tmp_path):
    class Validated(WithReducer):
        def validation_step(self, batch, batch_idx):
            assert self.loss_reducer(*self.losses(batch)) == self.losses(batch)[0].mean()

    agc = make()
    quiet_trainer(tmp_path, callbacks=[agc], max_epochs=1).fit(Validated(), loader(), loader())
    assert agc.run_statistics.seen.sum() == 80


def test_batch_in_which_nothing_is_kept(tmp_path):
    module, agc = Regression(), make(1.0)
    agc.bank.fill_(1e9)
    before = copy.deepcopy(module)
    trainer = fit(tmp_path, module, agc)
    assert_same(module, before)
    assert agc.skip_rate() == 1
    assert trainer.callback_metrics["agc/skip_rate"] == 1


def test_a_broken_loss_is_seen_by_the_user_but_not_by_the_bank(tmp_path):
    dataset = data(8)
    dataset.tensors[1][5] = torch.nan
    module, agc = Regression(), make()
    fit(tmp_path, module, agc, batches=loader(dataset))
    assert module.net.weight.isnan().all()
    assert agc.bank.isfinite().all()
    assert agc.run_statistics.seen.sum() == 7
    assert agc.run_statistics.loss_sum.isfinite().all()


def test_half_precision_training(tmp_path):
    class Half(Regression):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step([value if value.ndim == 1 else value.float() for value in batch], batch_idx)
            assert outputs["sample_loss"].dtype == torch.bfloat16
            return outputs

        def losses(self, batch):
            losses, timesteps = super().losses(batch)
            return losses.bfloat16(), timesteps

    module = Half()
    module.net.float()
    agc = AntiGradientControl(0.5, num_timesteps=NUM_TIMESTEPS)
    fit(tmp_path, module, agc, precision="bf16-mixed")
    assert agc.bank.dtype == torch.float32
    assert (agc.bank > 0).all()


# --- what it tells ---------------------------------------------------------------------------------------------------


def test_readers_by_hand():
    agc = AntiGradientControl(0.5, num_timesteps=4)
    assert agc.skip_rate() == 0
    for losses, timesteps in (([8.0, 8.0], [0, 1]), ([4.0, 0.1], [0, 1]), ([1.0], [3])):
        agc.select(torch.tensor(losses), torch.tensor(timesteps))
    nan = float("nan")
    assert agc.skip_rate() == pytest.approx(1 / 5)
    assert_close(agc.skip_rate_by_timestep(4), torch.tensor([0, 0.5, nan, 0]), equal_nan=True)
    assert_close(agc.skip_rate_by_timestep(2), torch.tensor([0.25, 0]))
    assert_close(agc.loss_by_timestep(4), torch.tensor([6, 4.05, nan, 1]), equal_nan=True)
    assert_close(agc.loss_by_timestep(1), torch.tensor([21.1 / 5]))
    assert agc.loss_by_timestep().shape == (4,)  # no more bins than timesteps
    assert AntiGradientControl(num_timesteps=7).loss_by_timestep(3).shape == (3,)


def test_skip_rate_is_logged_by_epoch_and_read_for_the_run(tmp_path):
    logged = []

    class Listen(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            logged.append((trainer.callback_metrics["agc/skip_rate"].item(), agc.run_statistics.seen.sum().item()))

    agc = make()
    fit(tmp_path, Regression(), agc, Listen(), max_epochs=3)
    assert [seen for _, seen in logged] == [80, 160, 240]
    assert agc.skip_rate() == pytest.approx(sum(rate for rate, _ in logged) / 3)


@pytest.mark.parametrize("kind", [Regression, WithReducer])
def test_no_step_waits_for_the_device(tmp_path, kind):
    def waits(steps, *callbacks):
        with CountWaits() as waits:
            fit(tmp_path, kind(), *callbacks, limit_train_batches=steps)
        return waits.count

    assert waits(3, make()) > waits(3)  # the counter works: the first batch and the end of an epoch may wait
    assert waits(12, make()) - waits(3, make()) == waits(12) - waits(3)


def test_runs_on_an_accelerator_without_a_wait():
    with FakeTensorMode():  # tensors without values: raises when one is asked for, or when devices are mixed
        agc = AntiGradientControl()
        # Lightning moves the module after `setup`: only the strategy knows the device by then.
        trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda")))
        agc.setup(trainer, SimpleNamespace(device=torch.device("cpu"), automatic_optimization=True), "fit")
        agc._is_first_batch = False
        losses = torch.rand(8, device="cuda")
        agc.select(losses, torch.randint(1000, (8,), device="cuda"))
        agc.select(losses, torch.randint(1000, (8,)))  # a scheduler may draw on the host
        assert agc.bank.device == agc.epoch_statistics.seen.device == losses.device


# --- state -----------------------------------------------------------------------------------------------------------


def test_checkpoint_holds_tensors_only_and_restores(tmp_path):
    agc, restored = make(), make()
    trainer = fit(tmp_path, Regression(), agc)
    trainer.save_checkpoint(tmp_path / "agc.ckpt")
    torch.load(tmp_path / "agc.ckpt", weights_only=True)
    trainer = quiet_trainer(tmp_path, callbacks=[restored], max_epochs=2)
    trainer.fit(Regression(), loader(), ckpt_path=tmp_path / "agc.ckpt")

    whole, module = make(), Regression()
    fit(tmp_path, module, whole, max_epochs=2)
    assert torch.equal(restored.bank, whole.bank)
    assert restored.skip_rate() == whole.skip_rate()
    assert_same(trainer.lightning_module, module)


def test_loaded_state_is_a_copy():
    agc, other = make(), make()
    state = agc.state_dict()
    other.load_state_dict(state)
    other.select(torch.ones(1), torch.tensor([0]))
    assert agc.bank.sum() == 0
    assert agc.epoch_statistics.seen.sum() == 0


def test_shards_take_turns():
    batches = [(torch.rand(6, dtype=torch.float64), torch.randint(NUM_TIMESTEPS, (6,))) for _ in range(4)]
    alone = [make(), make()]
    for agc, turns in zip(alone, (batches[::2], batches[1::2]), strict=True):
        for losses, timesteps in turns:
            agc.select(losses, timesteps)

    agc = make()
    states = [agc.shard_state(), {"bank": torch.zeros_like(agc.bank)}]
    for i, (losses, timesteps) in enumerate(batches):
        agc.load_shard_state(states[i % 2])
        agc.select(losses, timesteps)
        assert agc.shard_state()["bank"] is states[i % 2]["bank"]  # in place: a reference stays good
    for state, other in zip(states, alone, strict=True):
        assert torch.equal(state["bank"], other.bank)
    assert agc.epoch_statistics.seen.sum() == 24  # counted over all shards


def go_on(ckpt_path, agc, **kwargs):
    trainer = quiet_trainer(ckpt_path.parent, callbacks=[agc], **kwargs)
    trainer.fit(Regression(), loader(), ckpt_path=ckpt_path, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*ended before the epoch ended.*")
def test_an_epoch_within_which_a_run_ends_is_counted_once(tmp_path):
    """Without shards, a run that goes on begins the next epoch."""
    agc = make()
    trainer = fit(tmp_path, Regression(), agc, Saves(tmp_path), max_epochs=3, max_steps=30, enable_checkpointing=True)
    assert trainer.callback_metrics["agc/skip_rate"] > 0
    assert agc.epoch_statistics.seen.sum() == 0
    again = make()
    go_on(tmp_path / "1-end.ckpt", again, max_epochs=3)
    for control, seen in ((agc, [80, 40]), (again, [80, 40, 80])):
        assert control.run_statistics.seen.sum() == sum(seen)
        assert control.gap_history.rows[:, 0].sum(1).tolist() == seen


@pytest.mark.parametrize("load", ["load_state_dict", "load_shard_state"])
def test_a_bank_of_another_length_is_refused(load):
    state = AntiGradientControl(num_timesteps=10).state_dict()
    with pytest.raises(ValueError, match=r"Argument `bank` expected shape \(1000,\), but got \(10,\).*num_timesteps"):
        getattr(AntiGradientControl(), load)(state)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"threshold": -0.1}, r"Argument `threshold` expected a number in \[0, 1\], but got -0.1. 0 switches AGC off."),
        ({"threshold": 1.25}, r"Argument `threshold` .* but got 1.25. For a mem_ratio of 1.25 pass 0.8."),
        ({"threshold": float("nan")}, "Argument `threshold` .* but got nan"),
        ({"decay": 1.0}, r"Argument `decay` expected a number in \[0, 1\), but got 1.0"),
        ({"decay": -0.5}, r"Argument `decay` expected a number in \[0, 1\), but got -0.5"),
        ({"num_timesteps": 0}, "Argument `num_timesteps` expected at least 1, but got 0"),
        ({"num_bins": 0}, "Argument `num_bins` expected at least 1, but got 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AntiGradientControl(**kwargs)


@pytest.mark.parametrize("name", ["threshold", "decay", "z0", "delta", "eta", "min_weight", "record_decay"])
def test_text_is_no_number(name):
    with pytest.raises(TypeError, match=f"^Argument `{name}` expected a number, but got '0.5'.$"):
        AntiGradientControl(**{name: "0.5"})


@pytest.mark.parametrize(
    "name", ["num_timesteps", "num_bins", "reference_every", "reference_batch_size", "reference_images"]
)
def test_numbers_that_are_no_integers(name):
    with pytest.raises(TypeError, match=f"^Argument `{name}` expected an integer, but got 2.5.$"):
        AntiGradientControl(**{name: 2.5})


def test_fabric_is_refused():
    with pytest.raises(TypeError, match=r"expected a Trainer, but got Fabric. Call lightning_iet.functional.*plain-py"):
        AntiGradientControl().setup(Fabric(accelerator="cpu"), Regression(), "fit")


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_cut_the_model_up_are_refused(name):
    strategy = type("Ours", (type(name, (), {}),), {})()
    with pytest.raises(ValueError, match=r"that keeps the model whole, but got Ours\. Use .* 'auto' or 'ddp'"):
        AntiGradientControl().setup(SimpleNamespace(strategy=strategy), Regression(), "fit")


@pytest.mark.parametrize("names", [("net", None), ("net", "net")])
def test_several_callbacks_must_be_told_apart(names):
    callbacks = [AntiGradientControl(denoiser=name) for name in names]
    trainer = SimpleNamespace(strategy=object(), callbacks=callbacks)
    with pytest.raises(ValueError, match=r"`denoiser` to tell several callbacks apart, but got \['net', .*Name the"):
        callbacks[0].setup(trainer, Regression(), "fit")


def test_bad_number_of_bins():
    with pytest.raises(ValueError, match="Argument `num_bins` expected at least 1, but got 0"):
        AntiGradientControl().skip_rate_by_timestep(0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda outputs: outputs["loss"],
            ValueError,
            "find the denoiser of Bad, .* return {.*sample_loss.*; or reduce",
        ),
        (lambda outputs: {"loss": outputs["loss"]}, ValueError, "find the denoiser of Bad, but no module was called"),
        (lambda outputs: outputs | {"timesteps": [0] * 4}, TypeError, "`timesteps` expected a tensor, but got list"),
        (lambda outputs: outputs | {"timesteps": torch.zeros(7).long()}, ValueError, r"shape of `sample_loss`, \(4,\)"),
        (lambda outputs: outputs | {"sample_loss": torch.zeros(4, 2)}, ValueError, "expected one loss per sample"),
        (
            lambda outputs: outputs | {"timesteps": torch.ones(4) > 0},
            TypeError,
            "`timesteps` expected integers or float",
        ),
        (lambda outputs: outputs | {"timesteps": torch.zeros(4) / 0}, ValueError, "finite numbers, but got NaN or inf"),
        (
            lambda outputs: outputs | {"timesteps": torch.full((4,), 4)},
            ValueError,
            r"values in \[0, 4\), but got 4. Set",
        ),
        (lambda outputs: outputs | {"timesteps": torch.full((4,), -1)}, ValueError, r"values in \[0, 4\), but got -1."),
    ],
)
def test_bad_steps_are_refused_before_the_first_optimizer_step(tmp_path, change, error, message):
    class Bad(Regression):
        def training_step(self, batch, batch_idx):
            return change(super().training_step(batch, batch_idx))

    module = Bad()
    with pytest.raises(error, match=message):
        fit(tmp_path, module, make())
    assert_same(module, Regression())


def test_a_reducer_that_is_not_called_is_refused_before_the_first_optimizer_step(tmp_path):
    class Forgets(WithReducer):
        def training_step(self, batch, batch_idx):
            return self.losses(batch)[0].mean()

    module = Forgets()
    with pytest.raises(
        ValueError, match=r"expected Forgets.training_step to call `loss_reducer` .* no such call. Call"
    ):
        fit(tmp_path, module, make())
    assert_same(module, Forgets())


def test_later_timesteps_out_of_range_raise_at_the_end_of_the_epoch(tmp_path):
    dataset = data()
    dataset.tensors[2][50:53] = torch.tensor([-1, NUM_TIMESTEPS, 1000])
    agc, module = make(), Regression()
    with pytest.raises(ValueError, match=r"values in \[0, 4\), but got 3 others in this epoch. Set `num_timesteps`"):
        fit(tmp_path, module, agc, batches=loader(dataset))
    assert "training_step" not in vars(module)
    fit(tmp_path, module, agc)  # the mistake is gone: so is the error


def test_timesteps_out_of_range_are_told_on_the_way_on_from_the_last_step_of_an_epoch(tmp_path):
    dataset = data()
    dataset.tensors[2][50:53] = torch.tensor([-1, NUM_TIMESTEPS, 1000])
    with pytest.raises(ValueError, match="3 others in this epoch"):
        fit(tmp_path, Regression(), make(), Saves(tmp_path), batches=loader(dataset), enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"values in \[0, 4\), but got 3 others in the epoch of the checkpoint"):
        go_on(tmp_path / "0-19.ckpt", make(), max_epochs=2)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize("manual", [False, True])
def test_a_run_without_a_backward_pass_is_refused(tmp_path, manual):
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None

    module = Skips()
    module.automatic_optimization = not manual
    with pytest.raises(ValueError, match=r"none of 20 steps had a backward pass: Skips.training_step returned None"):
        fit(tmp_path, module, make())


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_skipped_batch_is_not_recorded(tmp_path):
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 4 == 0 else super().training_step(batch, batch_idx)

    agc = make()
    fit(tmp_path, Skips(), agc)
    assert agc.run_statistics.seen.sum() == 60


# --- two processes ---------------------------------------------------------------------------------------------------


def of_rank(rank):
    """Eight batches; rank 1 predicts its fifth one perfectly, so that nothing of it is kept."""
    dataset = data(32, seed=rank)
    if rank == 1:
        dataset.tensors[0][16:20] = 0
        dataset.tensors[1][16:20] = 0
    return dataset


class OfRank(Regression):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2, bias=False, dtype=torch.float64)
        nn.init.constant_(self.net.weight, 0.1)

    def train_dataloader(self):
        return loader(of_rank(self.global_rank))


def one_of_two(folder):
    """Train on one of two processes; returns its (weight, bank, skip rate, samples seen, logged skip rate)."""
    agc, module = make(), OfRank()
    trainer = quiet_trainer(
        folder, callbacks=agc, strategy="ddp", devices=2, use_distributed_sampler=False, max_epochs=1
    )
    trainer.fit(module)
    logged = trainer.callback_metrics["agc/skip_rate"]
    return module.net.weight.detach(), agc.bank, agc.skip_rate(), agc.run_statistics.seen, logged


def two_processes_by_hand():
    module = OfRank()
    optimizer = module.configure_optimizers()
    banks, skipped, dropped_batches = [[0.0] * NUM_TIMESTEPS, [0.0] * NUM_TIMESTEPS], 0, 0
    for batches in zip(loader(of_rank(0)), loader(of_rank(1)), strict=True):
        optimizer.zero_grad()
        for bank, batch in zip(banks, batches, strict=True):
            losses, timesteps = module.losses(batch)
            kept = [loss for loss, t in zip(losses, timesteps, strict=True) if loss >= THRESHOLD * bank[t]]
            if kept:
                (sum(kept) / len(kept) / 2).backward()
            for loss, t in zip(losses.tolist(), timesteps.tolist(), strict=True):
                bank[t] = 0.8 * bank[t] + 0.2 * loss
            skipped += len(losses) - len(kept)
            dropped_batches += not kept
        optimizer.step()
    assert dropped_batches == 1
    return module.net.weight.detach(), banks, skipped / 64


def test_two_processes_one_of_which_keeps_nothing(tmp_path, processes):
    expected, banks, expected_rate = two_processes_by_hand()
    found = processes(2).run(one_of_two, tmp_path)
    for (weight, bank, skip_rate, seen, logged), by_hand in zip(found, banks, strict=True):
        assert_close(weight, expected, rtol=1e-9, atol=1e-9)
        assert_close(bank.tolist(), by_hand, rtol=1e-9, atol=1e-9)
        assert seen.sum() == 64  # of both processes
        assert skip_rate == pytest.approx(expected_rate)
        assert logged.item() == pytest.approx(expected_rate)


class SaveBank(pl.Callback):
    """Writes down what a process that Lightning has started holds in the end."""

    def __init__(self, folder, agc):
        self.folder, self.agc = folder, agc

    def on_train_end(self, trainer, pl_module):
        torch.save((self.agc.bank, self.agc.run_statistics.seen), self.folder / f"{trainer.global_rank}.pt")


def test_processes_that_lightning_starts_have_a_bank_each(tmp_path, monkeypatch):
    """A tensor handed to two started processes is one in both: each must learn from its own samples alone.

    They are started by a forkserver, not spawned as `ddp_spawn` does by itself: they are handed the same pickles, in
    which a tensor is shared memory, and need no time to import.
    """
    start = mp.start_processes
    monkeypatch.setattr(mp, "start_processes", lambda *args, **kw: start(*args, **kw | {"start_method": "forkserver"}))
    forking()
    agc, (_, banks, _) = make(), two_processes_by_hand()
    kwargs = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False, "max_epochs": 1}
    quiet_trainer(tmp_path, callbacks=[agc, SaveBank(tmp_path, agc)], **kwargs).fit(OfRank())
    for rank, by_hand in enumerate(banks):
        bank, seen = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_close(bank.tolist(), by_hand, rtol=1e-9, atol=1e-9)
        assert seen.sum() == 64  # of both processes
