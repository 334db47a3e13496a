"""The criteria quantile and record against METHODS 2c written by hand: a loop over steps, shards, samples and draws."""

import functools
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_iet import AntiGradientControl, DigitsDataModule, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks.anti_gradient_control import sample_record
from lightning_iet.data import WithIndex
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.functional.sharding import partition
from lightning_iet.plots import captioned_grid
from lightning_iet.utilities.random import isolated_rng, seed_rng
from tests.helpers.devices import CountWaits
from tests.helpers.models import quiet_trainer, tiny_diffusion
from tests.helpers.weights import assert_same_bits, state_of

SEED, BINS, TIMESTEPS, MIN_VALUES, DECAY, RHO = 5, 2, 4, 20, 0.9, 0.8
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Regression(pl.LightningModule):
    """Returns its losses per sample; some samples are much easier than others."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Linear(3, 3, dtype=torch.float64)

    def losses(self, batch):
        x = batch[0]
        t = torch.randint(TIMESTEPS, (len(x),))
        noise = torch.randn_like(x)
        return (self.net(x) + t[:, None] * noise / TIMESTEPS - x.abs()).square().mean(1), t

    def training_step(self, batch, batch_idx):
        losses, t = self.losses(batch)
        return {"loss": losses.mean(), "sample_loss": losses, "timesteps": t}

    def validation_step(self, batch, batch_idx):
        """Lightning warns of a validation loader without it."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Reducer(Regression):
    def __init__(self):
        super().__init__()
        self.loss_reducer = lambda losses, t: losses.mean()

    def training_step(self, batch, batch_idx):
        return self.loss_reducer(*self.losses(batch))


class Net(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x, t):
        return self.linear(x)


class Hooks(Regression):
    """Knows nothing of AGC; its denoiser is found."""

    def __init__(self):
        super().__init__()
        self.net = Net(self.net)

    def training_step(self, batch, batch_idx):
        x = batch[0]
        t = torch.randint(TIMESTEPS, (len(x),))
        noise = torch.randn_like(x)
        return (self.net(x, t) + t[:, None] * noise / TIMESTEPS - x.abs()).square().mean()


def numbers(num=24, seed=0):
    """Every third sample has a tenth of the size."""
    x = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[::3] /= 10
    return TensorDataset(x)


class Draws:
    """An order in which some samples come twice in a batch."""

    def __init__(self, num):
        self.indices = [*range(num), 0, 0, 3, 1, 0, 3, 5, 5]

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def loader(num=24, seed=0, **kwargs):
    return DataLoader(WithIndex(numbers(num, seed)), batch_size=4, **kwargs)


def make(**kwargs):
    settings = {"num_timesteps": TIMESTEPS, "num_bins": BINS, "reference_every": 2, "reference_images": 5}
    agc = AntiGradientControl(**(settings | kwargs))
    return double(agc)


def double(agc):
    """Compute in the type of the loops."""
    agc.log_losses = type(agc.log_losses)(
        agc.log_losses.mean.double(), agc.log_losses.variance.double(), agc.log_losses.num_values
    )
    return agc


class Double(pl.Callback):
    """Keeps records in float64, as the loops do."""

    def __init__(self, agc):
        self.agc = agc

    def on_train_start(self, trainer, pl_module):
        if self.agc.records is not None:
            self.agc.records.double()


class SameNoise(pl.Callback):
    """What a step draws depends on its place alone."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)


def fit(tmp_path, module, *callbacks, train=None, val=None, ckpt_path=None, **kwargs):
    torch.manual_seed(SEED)
    kwargs = {"max_epochs": 6, "limit_val_batches": 0} | kwargs
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **kwargs)
    loaders = loader() if train is None else train, loader(5, seed=1) if val is None else val
    trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


class Bin:
    """Mean and variance of log-losses of all values so far, each weighted by the decay for every later one."""

    def __init__(self):
        self.values = []

    def learn(self, losses):
        news = [math.log(loss) for loss in losses if math.isfinite(loss) and loss > 0]
        if news:
            share = DECAY ** len(news)
            self.values = [(x, w * share) for x, w in self.values]
            self.values += [(x, (1 - share) / (1 - DECAY) / len(news)) for x in news]

    def score(self, loss):
        if len(self.values) < MIN_VALUES or not (math.isfinite(loss) and loss > 0):
            return 0.0
        total = sum(w for _, w in self.values)
        mean = sum(w * x for x, w in self.values) / total
        variance = sum(w * (x - mean) ** 2 for x, w in self.values) / total
        return (math.log(loss) - mean) / max(math.sqrt(variance), 1e-3)


class ByHand:
    """One shard's model, optimizer and statistics; records are those of the run."""

    def __init__(
        self, module, records, *, quantile=False, z0=None, delta=None, eta=None, normalize="kept", members=None
    ):
        self.module, self.optimizer, self.records = module, module.configure_optimizers(), records
        self.bins, self.steps, self.skipped = [Bin() for _ in range(BINS)], 0, {}
        self.quantile, self.z0, self.delta, self.eta, self.normalize = quantile, z0, delta, eta, normalize
        self.members = members

    def weights(self, losses, bins, index):
        scores = [self.bins[b].score(loss) for loss, b in zip(losses, bins, strict=True)]
        if self.quantile:
            return [float(z >= -self.z0) for z in scores]
        record, weight, drawn = self.records
        for i, z in zip(index, scores, strict=True):
            drawn.add(i)
            record[i] = RHO * record.get(i, 0.0) + (1 - RHO) * z
        ours = sorted(record[i] for i in drawn if self.members is None or i in self.members)
        limit = ours[(len(ours) - 1) // 2] - (self.delta or 0.0) if self.z0 is None else -self.z0
        if self.eta is None:
            return [float(record[i] >= limit) for i in index]
        for i in set(index):
            step = index.count(i) * self.eta * (record[i] - limit)
            weight[i] = min(max(weight.get(i, 0.0) + step, math.log(0.02)), 0.0)
        return [math.exp(weight[i]) for i in index]

    def step(self, batch, index, *, unseen=None, shard=0):
        losses, t = self.module.losses(batch)
        bins = [int(step) * BINS // TIMESTEPS for step in t]
        weights = self.weights(losses.tolist(), bins, index)
        for i, w in zip(index, weights, strict=True):
            self.skipped.setdefault(i, []).append(w == 0)
        if unseen is None:
            for number, bin_ in enumerate(self.bins):
                bin_.learn([loss for loss, b in zip(losses.tolist(), bins, strict=True) if b == number])
        divisor = len(losses) if self.normalize == "batch" else sum(weights) if self.eta else max(1, sum(weights))
        self.optimizer.zero_grad()
        (sum((w * loss for w, loss in zip(weights, losses, strict=True)), start=0 * losses.sum()) / divisor).backward()
        self.steps += 1
        if unseen is not None and self.steps % 2 == 1:
            self.measure(unseen, shard, len(losses))
        self.optimizer.step()

    def measure(self, unseen, shard, size):
        with isolated_rng(seed=derive_seed(SEED, shard, self.steps, 0, 1)), torch.no_grad():
            chosen = torch.randint(len(unseen), (size,)).tolist()
            losses, t = self.module.losses([torch.stack([unseen[i] for i in chosen])])
        for number, bin_ in enumerate(self.bins):
            found = zip(losses.tolist(), t.tolist(), strict=True)
            bin_.learn([loss for loss, step in found if step * BINS // TIMESTEPS == number])


CASES = {
    "quantile": ({"criterion": "quantile", "z0": 0.7}, {"quantile": True, "z0": 0.7}),
    "record": ({"criterion": "record", "z0": 0.3}, {"z0": 0.3}),
    "delta": ({"criterion": "record", "delta": 0.2}, {"delta": 0.2}),
    "eta": ({"criterion": "record", "eta": 0.3}, {"eta": 0.3}),
    "eta below the median": ({"criterion": "record", "eta": 0.5, "delta": 0.1}, {"eta": 0.5, "delta": 0.1}),
    "eta below a limit": ({"criterion": "record", "eta": 0.5, "z0": 0.1}, {"eta": 0.5, "z0": 0.1}),
    "by batch": ({"criterion": "record", "eta": 0.3, "normalize": "batch"}, {"eta": 0.3, "normalize": "batch"}),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *((case, Regression) for case in ("quantile", "eta below the median", "eta below a limit", "by batch")),
        ("eta", Reducer),
        ("record", Hooks),
        ("by batch", Hooks),
    ],
)
def test_against_training_samples_equals_the_loop(tmp_path, case, kind):
    settings, by_hand = CASES[case]
    if kind is Hooks and case == "by batch":
        settings, by_hand = ({k: v for k, v in d.items() if k != "normalize"} for d in (settings, by_hand))
    agc, model = make(**settings), ByHand(Regression(), ({}, {}, set()), **by_hand)
    module = kind()
    order = Draws(24)
    fit(tmp_path, module, agc, Double(agc), SameNoise(), train=loader(sampler=order))
    for epoch in range(6):
        for batch_idx, start in enumerate(range(0, len(order), 4)):
            torch.manual_seed(100 * epoch + batch_idx)
            index = order.indices[start : start + 4]
            model.step([numbers()[index][0]], index)
    ours = list(module.parameters())
    for a, b in zip(ours, model.module.parameters(), strict=True):
        assert_close(a, b, **EXACT)
    skipped = [sum(model.skipped[i]) for i in range(24)]
    assert agc.counts.skipped.tolist() == skipped
    assert agc.counts.seen.tolist() == [len(model.skipped[i]) for i in range(24)]
    assert agc.run_statistics.skipped.sum() == sum(skipped)
    if "eta" in by_hand:
        assert_close(agc.records.log_weights.tolist(), [model.records[1][i] for i in range(24)], **EXACT)
        assert agc.records.weights().min() < 0.5  # else this test shows nothing
    else:
        assert 5 < sum(skipped) < 200
    if case != "quantile":
        assert_close(agc.records.record.tolist(), [model.records[0][i] for i in range(24)], **EXACT)


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("quantile", "held_out"),
        ("record", "other_shards"),
        ("delta", "training"),
        ("eta", "training"),
        ("eta below a limit", "held_out"),
    ],
)
def test_shards_equal_the_loop(tmp_path, case, reference):
    settings, by_hand = CASES[case]
    agc = make(reference=reference, **settings)
    module, averaging = Regression(), ParameterAveragingCallback(3, every_n_epochs=2)
    data = ShardedDataModule.from_loader(loader(21, shuffle=True), loader(5, seed=1), num_shards=3, partition="iid")
    torch.manual_seed(SEED)
    trainer = quiet_trainer(tmp_path, callbacks=[agc, averaging, Double(agc)], max_epochs=12, limit_val_batches=0)
    trainer.fit(module, data)

    shards, records, train = partition(21, 3, seed=0), ({}, {}, set()), numbers(21)
    models = [ByHand(Regression(), records, **by_hand, members=set(shards[k].tolist())) for k in range(3)]
    held_out = [numbers(5, seed=1)[i][0] for i in torch.randperm(5, generator=torch.Generator().manual_seed(0))]
    for epoch in range(12):
        for k, model in enumerate(models):
            others = [train[i][0] for other in range(3) if other != k for i in shards[other].tolist()]
            unseen = {"training": None, "held_out": held_out, "other_shards": others}[reference]
            order = torch.randperm(7, generator=torch.Generator().manual_seed(derive_seed(SEED, k, epoch)))
            for step, part in enumerate(torch.tensor_split(shards[k][order], 2)):
                seed_rng(derive_seed(SEED, k, epoch, step))
                model.step(train[part], part.tolist(), unseen=unseen, shard=k)
        if epoch % 2:
            states = [model.module.state_dict() for model in models]
            mean = {name: sum(state[name] for state in states) / 3 for name in states[0]}
            for model in models:
                model.module.load_state_dict(mean)
    assert_close(dict(module.named_parameters()), dict(models[0].module.named_parameters()), rtol=1e-8, atol=1e-8)
    skipped = {i: found for model in models for i, found in model.skipped.items()}
    assert agc.counts.skipped.tolist() == [sum(skipped[i]) for i in range(21)]
    if case != "quantile":
        assert_close(agc.records.record.tolist(), [records[0][i] for i in range(21)], rtol=1e-7, atol=1e-7)
    if "eta" not in by_hand:
        assert agc.counts.skipped.sum() > 3


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """``plain(kind)``: the weights after training without AGC."""

    @functools.cache
    def train(kind):
        module = kind()
        fit(tmp_path_factory.mktemp("plain"), module, max_epochs=4)
        return state_of(module)

    return train


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Regression, {"criterion": "quantile", "z0": math.inf}),
        (Reducer, {"criterion": "quantile", "z0": math.inf}),
        (Hooks, {"criterion": "record", "z0": math.inf}),
        (Regression, {"criterion": "record", "delta": math.inf}),
        (Hooks, {"criterion": "record", "eta": 0.0}),
        (Reducer, {"criterion": "record", "eta": 0.0, "z0": 0.5}),
        (Regression, {"criterion": "record", "eta": 0.0, "z0": math.inf}),
        (Regression, {"threshold": 0.0}),
        (Hooks, {"threshold": 0.0}),
    ],
)
def test_neutral_settings_change_no_bit_and_record(tmp_path, plain, settings, kind):
    module, agc = kind(), AntiGradientControl(num_timesteps=TIMESTEPS, num_bins=BINS, **settings)
    fit(tmp_path, module, agc, max_epochs=4)
    assert_same_bits(state_of(module), plain(kind))
    assert agc.is_off
    assert agc.counts.seen.tolist() == [4] * 24
    assert agc.counts.skipped.sum() == 0
    assert agc.skip_rate_by_sample().tolist() == [0] * 24
    if settings.get("criterion") == "record":
        assert agc.records.record.ne(0).all()


@pytest.mark.parametrize("settings", [{"z0": 0.3}, {"delta": 0.2}, {"eta": 0.3, "z0": 0.5}])
def test_no_step_waits_for_the_device(tmp_path, settings):
    def waits(steps, *callbacks):
        with CountWaits() as counted:
            fit(tmp_path, Regression(), *callbacks, limit_train_batches=steps, max_epochs=1)
        return counted.count

    def agc():
        return make(criterion="record", **settings)

    assert waits(6, agc()) - waits(3, agc()) == waits(6) - waits(3)


class Saves(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def run(folder, world_size=1, *, ckpt_path=None, save_at=None, num_shards=4, **settings):
    """Train shards by records; what is left of them."""
    torch.manual_seed(SEED)
    module = tiny_diffusion(unet={"dropout": 0.1, "mid_block_type": None})
    agc = AntiGradientControl(criterion="record", num_bins=1, **settings)
    averaging = ParameterAveragingCallback(num_shards, every_n_epochs=2)
    trainer = quiet_trainer(
        folder,
        callbacks=[agc, averaging, *([Saves(folder / "cut.ckpt", save_at)] if save_at else [])],
        max_epochs=3,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_val_batches=0,
    )
    data = ShardedDataModule(DigitsDataModule(40, batch_size=5), num_shards)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    tables = {**agc.counts.state_dict(), **agc.records.state_dict()}
    return {"model": state_of(module), "tables": {name: table.clone() for name, table in tables.items()}}


@pytest.mark.filterwarnings("ignore:.*yielded None.*")
@pytest.mark.parametrize(
    ("settings", "world_size", "cut"),
    [({"z0": 0.1, "reference": "other_shards", "reference_every": 1}, 2, None), ({"eta": 0.3}, 4, 11)],
)
def test_processes_and_cuts_change_nothing(tmp_path, processes, settings, world_size, cut):
    whole = run(tmp_path, save_at=cut, **settings)  # of 24: within the second epoch
    if "z0" in settings:
        assert whole["tables"]["shared"][1].sum() > 3
    assert whole["tables"]["record"].ne(0).sum() > 30
    settings = {"ckpt_path": cut and tmp_path / "cut.ckpt", **settings}
    for other in processes(world_size).run(run, tmp_path / "several", world_size, **settings):
        assert_same_bits(other["model"], whole["model"])
        assert_same_bits(other["tables"], whole["tables"])


def plain_ddp(folder, world_size, batch_size):
    """Two processes share one training set in Lightning's way, without an averaging callback."""
    torch.manual_seed(SEED)
    module, agc = Fixed(), AntiGradientControl(criterion="record", eta=0.3, num_timesteps=TIMESTEPS, num_bins=BINS)
    trainer = quiet_trainer(
        folder,
        callbacks=[agc],
        max_epochs=6,
        devices=world_size,
        strategy="ddp" if world_size > 1 else "auto",
        limit_val_batches=0,
    )
    trainer.fit(module, DataLoader(WithIndex(numbers(24)), batch_size=batch_size, shuffle=False), loader(4))
    return agc.counts.seen, agc.records.drawn


class Fixed(Regression):
    """Its losses depend on the batch alone."""

    def losses(self, batch):
        x = batch[0]
        t = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        return (self.net(x) - x.abs()).square().mean(1) + 0.1, t


def test_without_shards_processes_hold_the_same_records(tmp_path, processes):
    for seen, drawn in processes(2).run(plain_ddp, tmp_path, 2, 2):
        assert seen.tolist() == [6] * 24
        assert drawn.all()


# --- what a user sees ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("settings", [{"threshold": 0.9}, {"criterion": "record", "delta": 0.1}])
def test_a_table_and_a_picture_of_the_images_closest_to_being_copied(tmp_path, settings, monkeypatch):
    figures = []
    keep = sample_record.save_figure
    monkeypatch.setattr(sample_record, "save_figure", lambda figure, path: figures.append(figure) or keep(figure, path))
    agc = AntiGradientControl(num_timesteps=1000, num_bins=10, **settings)
    trainer = quiet_trainer(
        tmp_path, callbacks=[agc], logger=CSVLogger(tmp_path, name="", version=""), max_epochs=5, limit_val_batches=0
    )
    trainer.fit(tiny_diffusion(), DigitsDataModule(30, batch_size=5))
    header, *rows = (tmp_path / "skips.csv").read_text().splitlines()
    columns = header.split(",")
    assert columns[:5] == ["sample", "name", "seen", "skipped", "skip_rate"]
    assert {"label"} <= set(columns)
    table = [dict(zip(columns, row.split(","), strict=True)) for row in rows]
    assert sorted(int(row["sample"]) for row in table) == list(range(30))
    skipped = agc.counts.skipped.tolist()
    assert [int(row["skipped"]) for row in table] == [skipped[int(row["sample"])] for row in table]
    if "criterion" in settings:
        records = [float(row["record"]) for row in table]
        assert records == sorted(records)
        assert trainer.callback_metrics["agc/lowest_record"] == pytest.approx(agc.records.record.min().item())
    else:
        rates = [float(row["skip_rate"]) for row in table]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] > 0
        assert trainer.callback_metrics["agc/most_skipped"] == pytest.approx(rates[0], abs=1e-4)
    assert (tmp_path / "skips.png").stat().st_size > 10_000
    captions = [axes.get_title() for axes in figures[0].axes if axes.get_title()]
    shown = table[:24] if "criterion" in settings else [row for row in table[:24] if int(row["skipped"])]
    counts = [[row["sample"], f"skipped {row['skipped']} of {row['seen']}"] for row in shown]
    assert [caption.splitlines()[:2] for caption in captions] == counts


@pytest.mark.usefixtures("drawn")
def test_images_that_were_never_skipped_are_not_shown_as_those_skipped_most(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(sample_record, "save_figure", lambda figure, path: figures.append(figure))
    agc = AntiGradientControl(num_timesteps=1000, num_bins=10, threshold=0.9)
    trainer = quiet_trainer(
        tmp_path, callbacks=[agc], logger=CSVLogger(tmp_path, name="", version=""), max_epochs=2, limit_val_batches=0
    )
    seen, skipped = torch.full((30,), 12), torch.zeros(30)
    skipped[[7, 3]] = torch.tensor([1.0, 2.0])
    columns = {"seen": seen, "skipped": skipped.long(), "skip_rate": skipped / seen}
    monkeypatch.setattr(sample_record, "sample_columns", lambda *_: columns)
    trainer.fit(tiny_diffusion(), DigitsDataModule(30, batch_size=5))
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "3\nskipped 2 of 12",
        "7\nskipped 1 of 12",
    ]
    title = " ".join(figure._suptitle.get_text().split())
    assert "the 2 of 30 that were skipped at all" in title
    assert "Each was drawn about 12 times: an image that was skipped once may have been so by chance" in title


def test_numbers_in_captions_of_large_sets_are_whole():
    columns = {"seen": torch.full((12_346,), 1_200), "skipped": torch.full((12_346,), 112)}
    figure = captioned_grid([torch.zeros(1, 8, 8)], [sample_record._caption(columns, 12_345)], title="skipped")
    assert figure.axes[0].get_title() == "12345\nskipped 112 of 1,200"


# --- bad input -------------------------------------------------------------------------------------------------------


class Images(Dataset):
    """Samples without an index, and with labels that look like one."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3,), float(index), dtype=torch.float64), index % 2


class Wrong(Images):
    def __getitem__(self, index):
        return torch.full((3,), float(index), dtype=torch.float64), index + 5


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        (
            Images(),
            {},
            "expected batches with the index of each sample, .* but got samples of Images without one. Wrap",
        ),
        (Images(), {"sample_index": 0}, "expected a batch with one index for each loss, but got no index. Return"),
        (Images(), {"sample_index": "index"}, "with one index for each loss, but got no index"),
        (Wrong(), {"sample_index": 1}, r"`sample_index` expected indices in \[0, 8\), the size .*, but got 8. Name"),
    ],
)
def test_an_index_that_is_missing_or_wrong(tmp_path, dataset, kwargs, message):
    module = Regression()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, make(criterion="record", **kwargs), train=DataLoader(dataset, batch_size=4))
    assert_same_bits(state_of(module), state_of(Regression()))


def test_labels_are_no_index_and_without_one_skips_are_counted_by_timestep_alone(tmp_path):
    agc = AntiGradientControl(0.5, num_timesteps=TIMESTEPS)
    fit(tmp_path, Regression(), agc, train=DataLoader(Images(), batch_size=4), max_epochs=1)
    assert agc.counts is None
    with pytest.raises(ValueError, match="expected batches with the index of each sample, but has counted none"):
        agc.skip_rate_by_sample()
    named = AntiGradientControl(0.5, num_timesteps=TIMESTEPS, sample_index=-1)
    fit(tmp_path, Regression(), named, train=DataLoader(WithIndex(Images()), batch_size=4), max_epochs=1)
    assert named.counts.seen.tolist() == [1] * 8


def test_later_indices_out_of_range_raise_at_the_end_of_the_epoch(tmp_path):
    class Later(Images):
        def __getitem__(self, index):
            return torch.ones(3, dtype=torch.float64), index if index < 6 else 100

    agc = make(criterion="record", sample_index=1)
    with pytest.raises(
        ValueError, match=r"`sample_index` expected indices in \[0, 8\).* but got 2 others in this epoch"
    ):
        fit(tmp_path, Regression(), agc, train=DataLoader(Later(), batch_size=4))


def test_losses_without_a_logarithm_are_refused(tmp_path):
    class Negative(Regression):
        def losses(self, batch):
            losses, t = super().losses(batch)
            return losses - 100, t

    with pytest.raises(ValueError, match=r"`criterion` expected 'ratio' for losses that may be negative, .* 'record'"):
        fit(tmp_path, Negative(), make(criterion="record"))


def test_a_broken_loss_stays_in_the_loss_and_out_of_the_record(tmp_path):
    dataset = numbers(8)
    dataset.tensors[0][5] = torch.nan
    module, agc = Regression(), make(criterion="record", eta=0.3)
    fit(tmp_path, module, agc, train=DataLoader(WithIndex(dataset), batch_size=4), max_epochs=1)
    assert module.net.weight.isnan().all()
    assert agc.records.record.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"criterion": "loss"}, "Argument `criterion` expected one of 'ratio', 'quantile', 'record', but got 'loss'"),
        ({"eta": 0.1}, "Argument `eta` expected None with criterion='ratio', which does not use it, but got 0.1"),
        ({"criterion": "quantile", "delta": 1.0}, "Argument `delta` expected None with criterion='quantile'"),
        (
            {"criterion": "record", "delta": 1.0, "z0": 0.1},
            "Arguments `z0` and `delta` expected one of them, but got both. Choose: a fixed limit, or one below",
        ),
        (
            {"criterion": "record", "delta": math.inf, "eta": 0.1},
            "Arguments `z0` and `delta` expected finite numbers with `eta`, but got inf. Leave them out, or set eta=0",
        ),
        ({"criterion": "record", "z0": -1.0}, "Argument `z0` expected a number ≥ 0, but got -1.0"),
        ({"criterion": "record", "eta": math.inf}, "Argument `eta` expected a finite number, but got inf. 0 is off"),
        ({"criterion": "record", "eta": math.nan}, "Argument `eta` expected a number ≥ 0, but got nan"),
        (
            {"criterion": "record", "min_weight": 0.0},
            r"Argument `min_weight` expected a number in \(0, 1\], but got 0.0",
        ),
        (
            {"criterion": "record", "record_decay": 1.0},
            r"Argument `record_decay` expected a number in \[0, 1\), but go",
        ),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AntiGradientControl(**kwargs)


def test_another_criterion_or_another_training_set_is_no_way_to_go_on(tmp_path):
    trainer = fit(tmp_path, Regression(), make(criterion="record"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    ratio = AntiGradientControl(num_timesteps=TIMESTEPS, num_bins=BINS)
    with pytest.raises(ValueError, match="Argument `criterion` expected 'record', with which the checkpoint"):
        fit(tmp_path, Regression(), ratio, ckpt_path=tmp_path / "cut.ckpt")
    with pytest.raises(
        ValueError,
        match=r"`ckpt_path` expected a checkpoint with counts of 20 samples, the size of the .* but got those of 24",
    ):
        fit(tmp_path, Regression(), make(criterion="record"), train=loader(20), ckpt_path=tmp_path / "cut.ckpt")


def test_defaults_by_criterion():
    record, quantile = AntiGradientControl(criterion="record"), AntiGradientControl(criterion="quantile")
    assert (record.z0, quantile.z0) == (1.0, 1.64)
    assert (record.decay, record.bins.num_bins, record.normalize) == (0.9, 50, "kept")
    anchored = AntiGradientControl(criterion="record", reference="held_out")
    assert (anchored.decay, anchored.bins.num_bins, anchored.normalize) == (0.9, 50, "kept")
    assert AntiGradientControl(reference="train").reference == "training"
    draws = {"criterion": "record", "weigh": "draws"}
    for reference, limit in (("training", (0.1, 0.3, True)), ("held_out", (0.2, None, False))):
        agc = AntiGradientControl(reference=reference, **draws)
        assert (agc.eta, agc.delta, agc.is_relative) == limit
    assert AntiGradientControl(reference="other_shards", **draws).z0 == 1.0
    median = AntiGradientControl(eta=0.03, **draws)
    assert (median.eta, median.delta, median.is_relative) == (0.03, None, True)
    fixed = AntiGradientControl(z0=2.0, **draws)
    assert (fixed.eta, fixed.z0, fixed.delta, fixed.is_relative) == (0.1, 2.0, None, False)
