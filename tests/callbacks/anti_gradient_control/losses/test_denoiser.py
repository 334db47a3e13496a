"""The third way to the losses: it agrees with the others, waits for nothing, and leaves nothing behind."""

import copy
import logging
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from lightning_iet import ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks.anti_gradient_control.callback import AntiGradientControl
from tests.helpers.devices import CountWaits
from tests.helpers.models import quiet_trainer
from tests.helpers.projects import (
    class_labels,
    edm,
    latents_and_text,
    manual_optimization,
    randint_and_mse,
    two_denoisers,
)
from tests.helpers.projects.common import NUM_BINS, NUM_TIMESTEPS, THRESHOLD, Style, rows
from tests.helpers.projects.training import batches, fit, make
from tests.helpers.weights import assert_same


class Dict(randint_and_mse.Project):
    def training_step(self, batch):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": t}


class Reducer(randint_and_mse.Project):
    def loss_reducer(self, sample_loss, timesteps):
        return sample_loss.mean()

    def training_step(self, batch):
        outputs = Dict.training_step(self, batch)
        return self.loss_reducer(outputs["sample_loss"], outputs["timesteps"])


class EdmDict(edm.Project):
    def training_step(self, batch, batch_idx):
        denoised, images, sigma, _ = self.parts(batch)
        losses = rows((denoised - images) ** 2)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": sigma.flatten()}


def agc(threshold=THRESHOLD, **kwargs):
    made = AntiGradientControl(threshold, **({"num_timesteps": NUM_TIMESTEPS} | kwargs))
    made.load_shard_state({"bank": made.bank.double()})
    return made


def assert_no_trace(module):
    plain = type(module)()
    for part, other in zip(module.modules(), plain.modules(), strict=True):
        assert vars(part).keys() - {"_hparams"} == vars(other).keys()  # Lightning makes that one
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._forward_hooks_with_kwargs
        assert not part._forward_pre_hooks_with_kwargs
    assert _get_current_function_mode_stack() == []
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(copied, module)


@pytest.mark.parametrize("kinds", [(randint_and_mse.Project, Dict, Reducer), (EdmDict, EdmDict)])
def test_the_seams_agree(tmp_path, kinds):
    hooked, *others = [kind() for kind in kinds]
    bins = {"num_bins": NUM_BINS if kinds[0] is EdmDict else None}
    one = agc(denoiser="net", **bins)
    fit(tmp_path, hooked, one)
    for module in others:
        other = agc(**bins)
        fit(tmp_path, module, other)
        assert_same(hooked, module, 1e-9)
        torch.testing.assert_close(one.bank, other.bank, rtol=1e-9, atol=1e-9)
        assert one.skip_rate() == other.skip_rate() > 0.1


@pytest.mark.parametrize(
    ("style", "kwargs", "message"),
    [
        (
            class_labels.Project,
            {},
            "AntiGradientControl: denoiser `net` (Conditional), timesteps from its argument `moment`, loss: the first"
            " `mse_loss` behind its output, averaged per sample; 4 bins, one per timestep.",
        ),
        (edm.Project, {"num_bins": 5}, "argument `sigma`, .*; 5 bins of equal probability, learnt from the first 50"),
        (
            randint_and_mse.Project,
            {"denoiser": "net", "timestep": "t"},
            "denoiser `net` (Net), timesteps from its argument `t`",
        ),
        (Dict, {"num_bins": 2}, "from the dict that `training_step` returns; 2 bins, of 4 timesteps."),
        (Reducer, {}, "from the attribute `loss_reducer`; 4 bins"),
    ],
)
def test_the_decision_is_in_the_log_once(tmp_path, caplog, style, kwargs, message):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, style(), agc(**kwargs))
    ours = [record.getMessage() for record in caplog.records if "AntiGradientControl" in record.getMessage()]
    assert len(ours) == 1
    assert [part for part in message.split(".*") if part not in ours[0]] == [], ours[0]


@pytest.mark.filterwarnings("ignore:Found 3 module.* in eval mode")
def test_eval_mode_is_in_the_log(tmp_path, caplog):
    module = randint_and_mse.Project()
    module.net.eval()
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, module, agc())
    assert "The denoiser `net` trains in eval mode, without dropout; call `.train()`" in caplog.text


# --- no trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [randint_and_mse, latents_and_text, manual_optimization])
def test_no_trace_after_fit_and_fit_again(tmp_path, style):
    module, once = style.Project(), agc()
    fit(tmp_path, module, once)
    assert_no_trace(module)
    fit(tmp_path, module, once)
    assert_no_trace(module)
    assert once.run_statistics.seen.sum() == 2 * 156
    pickle.loads(pickle.dumps(once))


class Breaks(Style):
    def __init__(self, where=None):
        super().__init__()
        self.where = where

    def training_step(self, batch, batch_idx):
        where = self.where if batch_idx == 3 else None
        if where == "before":
            raise KeyError("broken")
        noisy, noise, t = self.noisy(batch[0])
        out = self.net(noisy, t[:2] if where == "inside" else t)
        if where == "between":
            raise KeyError("broken")
        if where == "backward":
            out.register_hook(lambda gradient: {}["broken"])
        return F.mse_loss(out, noise)


@pytest.mark.parametrize("where", ["before", "inside", "between", "backward"])
def test_no_trace_after_an_exception_in_mid_step(tmp_path, where):
    module = Breaks(where)
    with pytest.raises((KeyError, RuntimeError)):
        fit(tmp_path, module, agc())
    assert_no_trace(module)
    fit(tmp_path, randint_and_mse.Project(), agc())  # and the next run is as ever


def test_copies_made_in_the_middle_of_training_are_deaf(tmp_path):
    class Copies(randint_and_mse.Project):
        def training_step(self, batch):
            self.copied = [copy.deepcopy(self.net), pickle.loads(pickle.dumps(self.net))]
            for copied in self.copied:
                copied(*self.noisy(batch[0])[::2])
            return super().training_step(batch)

    module, made = Copies(), agc()
    fit(tmp_path, module, made)
    assert made.run_statistics.seen.sum() == 156
    for copied in module.copied:
        pickle.dumps(copied)


def test_a_mode_of_the_users_may_begin_before_the_denoiser_and_end_before_the_loss(tmp_path):
    class Modes(randint_and_mse.Project):
        def training_step(self, batch):
            noisy, noise, t = self.noisy(batch[0])
            with torch.device("cpu"):
                out = self.net(noisy, t)
            with torch.device("cpu"):
                return F.mse_loss(out, noise)

    module, plain, made = Modes(), randint_and_mse.Project(), agc()
    fit(tmp_path, module, made)
    fit(tmp_path, plain, agc())
    assert_same(module, plain)
    assert _get_current_function_mode_stack() == []


class Validated(randint_and_mse.Project):
    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():  # guidance by gradients, say
            noisy, noise, t = self.noisy(batch[0])
            F.mse_loss(self.net(noisy, t), noise).backward()


def test_validation_in_between_is_not_recorded(tmp_path):
    module, made = Validated(), agc()
    trainer = quiet_trainer(tmp_path, callbacks=[made], max_epochs=1, val_check_interval=5, inference_mode=False)
    trainer.fit(module, batches(), batches(16))
    assert made.run_statistics.seen.sum() == 156
    trainer.validate(module, batches(16), verbose=False)
    assert_no_trace(module)


# --- two denoisers ---------------------------------------------------------------------------------------------------


class TwoByHand(two_denoisers.Project):
    def __init__(self):
        super().__init__()
        self.other_bank = type(self.bank)()

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        first, second = rows((self.net(noisy, t) - noise) ** 2), rows((self.other(noisy, t) - batch[0]) ** 2)
        return self.bank.mean(first, first, t) + self.other_bank.mean(second, second, t)


def test_two_callbacks_on_two_denoisers(tmp_path):
    module, by_hand = two_denoisers.Project(), TwoByHand()
    callbacks = [agc(denoiser="net"), agc(denoiser="other")]
    trainer = fit(tmp_path, module, *callbacks)
    fit(tmp_path, by_hand)
    assert_same(module, by_hand, 1e-9)
    assert_no_trace(module)
    for name, callback, bank in zip(("net", "other"), callbacks, (by_hand.bank, by_hand.other_bank), strict=True):
        assert trainer.callback_metrics[f"agc/{name}/skip_rate"].item() == pytest.approx(bank.skipped / 156)
        assert callback.skip_rate() > 0.1
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = [agc(denoiser="net"), agc(denoiser="other")]
    quiet_trainer(tmp_path, callbacks=again, max_epochs=1).fit(module, batches(), ckpt_path=tmp_path / "two.ckpt")
    assert all(torch.equal(new.bank, old.bank) for new, old in zip(again, callbacks, strict=True))


def test_a_last_batch_of_one_is_read_like_the_others(tmp_path):
    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = class_labels.Net()

        def forward(self, x, moment, strength):
            return self.body(x, moment) * strength

    class Project(Style):
        def __init__(self):
            super().__init__()
            self.net = Guided()

        def training_step(self, batch, batch_idx):
            noisy, noise, t = self.noisy(batch[0])
            return F.mse_loss(self.net(noisy, t, torch.ones(1, dtype=torch.float64)), noise)

    made = agc()
    quiet_trainer(tmp_path, callbacks=[made], max_epochs=1).fit(Project(), batches(17))
    assert made.run_statistics.seen.sum() == 17


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [randint_and_mse, edm])
def test_resuming_is_exact(tmp_path, style):
    class Stateless(style.Project):
        """Draws from the step's number, so that a run that is cut goes on with the same draws."""

        def on_train_batch_start(self, batch, batch_idx):
            torch.manual_seed(self.global_step)

    whole, first, second = Stateless(), Stateless(), Stateless()
    agcs = [make(style) for _ in range(3)]
    fit(tmp_path, whole, agcs[0], max_epochs=3)
    trainer = fit(tmp_path, first, agcs[1], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    torch.load(tmp_path / "cut.ckpt", weights_only=True)
    quiet_trainer(tmp_path, callbacks=[agcs[2]], max_epochs=3).fit(second, batches(), ckpt_path=tmp_path / "cut.ckpt")
    assert_same(second, whole)
    for name, tensor in agcs[0].shard_state().items():
        assert torch.equal(tensor, agcs[2].shard_state()[name])
    assert agcs[0].skip_rate() == agcs[2].skip_rate()


def test_shards_learn_bins_of_their_own():
    draws = [torch.rand(6, dtype=torch.float64) for _ in range(6)]
    alone = [agc(num_bins=NUM_BINS) for _ in range(2)]
    for made, turns in zip(alone, (draws[::2], draws[1::2]), strict=True):
        for time in turns:
            made.select(time + 1, time)
    made = agc(num_bins=NUM_BINS)
    states = [made.shard_state(), copy.deepcopy(made.shard_state())]
    for number, time in enumerate(draws):
        made.load_shard_state(states[number % 2])
        made.select(time + 1, time)
        states[number % 2] = made.shard_state()
    for state, other in zip(states, alone, strict=True):
        assert all(torch.equal(tensor, other.shard_state()[name]) for name, tensor in state.items())


class Digits(pl.LightningDataModule):
    def train_dataloader(self):
        return batches(48)


def test_shards_have_banks_of_their_own_behind_hooks_too(tmp_path):
    found = []
    for kind in (randint_and_mse.Project, Dict):
        made, module = agc(), kind()
        averaging = ParameterAveragingCallback(2)
        quiet_trainer(tmp_path, callbacks=[made, averaging], max_epochs=2).fit(
            module, ShardedDataModule(Digits(), 2, partition="iid")
        )
        found.append((module, made))
    (module, made), (other, same) = found
    assert_same(module, other, 1e-9)
    assert made.skip_rate() == same.skip_rate() > 0.05


# --- cost ------------------------------------------------------------------------------------------------------------


class CountCopies(CountWaits):
    """Counts copies between devices as well."""

    WAITS = (*CountWaits.WAITS, "item", "_to_cpu", "copy_from")


@pytest.mark.parametrize("style", [randint_and_mse, edm, class_labels])
def test_no_step_waits_for_the_device(tmp_path, style):
    def waits(steps, *callbacks):
        with CountCopies() as waits:
            fit(tmp_path, style.Project(), *callbacks, limit_train_batches=steps)
        return waits.count

    assert waits(3, make(style)) > waits(3)  # the counter works: the first batch and the end of an epoch may wait
    assert waits(15, make(style)) - waits(3, make(style)) == waits(15) - waits(3)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"denoiser": "unet"},
            r"Argument `denoiser` expected .* in Project, such as one of \['net'\], but got 'unet'.",
        ),
        ({"timestep": "time"}, "`net` looks like it, but its argument `time` should hold one number .* is no tensor"),
    ],
)
def test_names_that_do_not_exist(tmp_path, kwargs, message):
    module = randint_and_mse.Project()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, agc(**kwargs))
    assert_same(module, randint_and_mse.Project())
    assert_no_trace(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda self, out, noise: F.mse_loss(out[:3], noise[:3]), "do not fit its 8 rows any more"),
        (lambda self, out, noise: out.sum(), "no error behind the output of `net`, as earlier ones had"),
        (lambda self, out, noise: self.net.inner.weight.sum() + 0 * out.detach().sum(), "no error behind"),
    ],
)
def test_a_loss_that_changes_later_is_refused(tmp_path, change, message):
    class Changes(Style):
        def training_step(self, batch, batch_idx):
            noisy, noise, t = self.noisy(batch[0])
            out = self.net(noisy, t)
            return F.mse_loss(out, noise) if batch_idx < 2 else change(self, out, noise)

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Changes(), agc())


def test_a_step_that_does_without_the_denoiser_is_refused(tmp_path):
    class Phases(Style):
        def __init__(self):
            super().__init__()
            self.critic = nn.Linear(2, 1).double()

        def training_step(self, batch, batch_idx):
            noisy, noise, t = self.noisy(batch[0])
            if batch_idx % 2:
                return self.critic.weight.sum()
            return F.mse_loss(self.net(noisy, t), noise)

    with pytest.raises(ValueError, match="this step did not call it with gradients on, as earlier steps did"):
        fit(tmp_path, Phases(), agc())


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_is_compiled_as_a_whole_is_refused(tmp_path):
    module = torch.compile(class_labels.Project(), backend="eager")
    with pytest.raises(ValueError, match="all of it is compiled, where nothing can be seen; compile the denoiser inst"):
        fit(tmp_path, module, agc())


def test_timesteps_out_of_range_are_refused(tmp_path):
    module = randint_and_mse.Project()
    with pytest.raises(ValueError, match=r"values in \[0, 2\), but got [23]. Set `num_timesteps`"):
        fit(tmp_path, module, AntiGradientControl(num_timesteps=2))
    assert_same(module, randint_and_mse.Project())


class Joined(Style):
    """Trains on the mean of each pair of images."""

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0].unflatten(0, (-1, 2)).mean(1))
        return F.mse_loss(self.net(noisy, t), noise)


class JoinedLosses(Style):
    """Returns one loss for each pair."""

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0])
        losses = rows((self.net(noisy, t) - noise) ** 2).unflatten(0, (-1, 2)).mean(1)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": t[::2]}


class JoinedReducer(JoinedLosses):
    def loss_reducer(self, sample_loss, timesteps):
        return sample_loss.mean()

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        return self.loss_reducer(outputs["sample_loss"], outputs["timesteps"])


@pytest.mark.parametrize("style", [Joined, JoinedLosses, JoinedReducer])
def test_samples_that_are_joined_are_warned_of_once(tmp_path, style):
    with pytest.warns(UserWarning, match="a loss for each of the 8 samples of a batch, but got 4") as caught:
        fit(tmp_path, style(), agc())
    assert sum("AntiGradientControl" in str(warning.message) for warning in caught) == 1


# --- precision -------------------------------------------------------------------------------------------------------


def test_half_precision_training(tmp_path):
    class Half(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = HalfNet()

        def training_step(self, batch, batch_idx):
            images = batch[0].float()
            return F.mse_loss(self.net(images, torch.randint(4, (len(images),))), images)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    made = AntiGradientControl(THRESHOLD, num_timesteps=NUM_TIMESTEPS)
    quiet_trainer(tmp_path, callbacks=[made], max_epochs=1, precision="bf16-mixed").fit(Half(), batches())
    assert made.bank.dtype == torch.float32
    assert (made.bank > 0).all()
    assert made.skip_rate() > 0.1


class HalfNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 1)

    def forward(self, x, t):
        return self.mix(x) * (1 + t.reshape(-1, 1, 1, 1))


# --- two processes ---------------------------------------------------------------------------------------------------


class OfRank(Style):
    """Each process has data of its own."""

    def train_dataloader(self):
        return batches(40)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(10 * self.global_step + self.global_rank)

    def training_step(self, batch, batch_idx):
        noisy, noise, t = self.noisy(batch[0] + self.global_rank)
        return F.mse_loss(self.net(noisy, t), noise)


def fit_of_rank(tmp_path):
    made, module = agc(), OfRank()
    kwargs = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
    quiet_trainer(tmp_path, callbacks=[made], **kwargs).fit(module)
    return {name: value.detach() for name, value in module.state_dict().items()}, made.bank, made.skip_rate()


def two_processes_by_hand():
    module = OfRank()
    banks = [type(module.bank)(), type(module.bank)()]
    optimizer = module.configure_optimizers()
    for step in range(10):
        optimizer.zero_grad()
        for rank, bank in enumerate(banks):
            images = list(batches(40))[step % 5][0] + rank
            torch.manual_seed(10 * step + rank)
            noisy, noise, t = module.noisy(images)
            losses = rows((module.net(noisy, t) - noise) ** 2)
            (bank.mean(losses, losses, t) / 2).backward()
        optimizer.step()
    return module.state_dict(), banks


def test_two_processes(tmp_path, processes):
    weights, banks = two_processes_by_hand()
    for rank, (found, bank, skip_rate) in enumerate(processes(2).run(fit_of_rank, tmp_path)):
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
        expected = torch.tensor([banks[rank].means[t] for t in range(NUM_TIMESTEPS)], dtype=torch.float64)
        torch.testing.assert_close(bank, expected, rtol=1e-9, atol=1e-9)
        assert skip_rate == pytest.approx(sum(each.skipped for each in banks) / 160)
