import lightning.pytorch as pl
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from lightning_iet.functional.memorization import MQ_THRESHOLDS
from lightning_iet.metrics import MemorizedFraction, MemorizedQuantity
from tests.helpers.neighbors import on_the_way

matplotlib.use("Agg")


def naive(generated, train, thresholds, k):
    """Every pair in float64, one after the other: the share below each threshold."""
    counts = dict.fromkeys(thresholds, 0)
    for image in generated.double():
        nearest = sorted(((image - other) ** 2).sum().item() for other in train.double())[:k]
        for threshold in thresholds:
            counts[threshold] += nearest[0] < threshold * sum(nearest) / k
    shares = {f"mq_{threshold:g}": count / len(generated) for threshold, count in counts.items()}
    return {name: pytest.approx(share, rel=1e-6) for name, share in shares.items()}


@pytest.mark.parametrize("k", [2, 50, 70])
def test_equals_the_double_loop(k):
    generated, train = on_the_way()
    metric = MemorizedQuantity(train, k=k)
    metric.update(generated)
    assert metric.compute() == naive(generated, train, MQ_THRESHOLDS, k)
    assert tuple(metric.compute())[:4] == ("mq_0.15", "mq_0.2", "mq_0.3", "mq_0.4")
    assert len(metric.compute()) == len(MQ_THRESHOLDS)
    assert all(share.dtype == torch.float32 and share.ndim == 0 for share in metric.compute().values())
    expected = {f"mq_{a:g}": count / 20 for a, count in zip(metric.thresholds, metric.counts.tolist(), strict=True)}
    assert metric.compute() == pytest.approx(expected)
    assert metric.counts.dtype == torch.int64
    assert metric.total == 20


def test_planted_copies_are_found_and_only_those():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (100, 3, 8, 8), dtype=torch.uint8, generator=generator)
    generated = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)
    generated[10:16] = train[40:46]
    generated[10:16, 0, 0, 0] ^= 1
    metric = MemorizedQuantity(train)
    metric.update(generated)
    assert metric.counts[metric.thresholds.index(0.15)] == metric.counts[metric.thresholds.index(0.5)] == 6
    assert metric.compute()["mq_0.15"] == metric.compute()["mq_0.5"] == pytest.approx(6 / 50)


@given(seed=st.integers(0, 1000), splits=st.lists(st.integers(0, 20), max_size=3).map(sorted))
def test_batches_do_not_matter(seed, splits):
    generated, train = on_the_way(seed)
    metric = MemorizedQuantity(train, k=20)
    for batch in generated.tensor_split(splits):
        metric.update(batch)
    assert metric.compute() == naive(generated, train, MQ_THRESHOLDS, 20)


def test_forward_returns_the_batch_and_counts_it_in():
    generated, train = on_the_way()
    metric = MemorizedQuantity(train)
    for batch in generated.split(8):
        assert metric(batch) == naive(batch, train, MQ_THRESHOLDS, 50)
    assert metric.compute() == naive(generated, train, MQ_THRESHOLDS, 50)


def test_reset_starts_anew():
    generated, train = on_the_way()
    metric = MemorizedQuantity(train)
    metric.update(train)
    metric.reset()
    metric.update(generated)
    assert metric.compute() == naive(generated, train, MQ_THRESHOLDS, 50)


def test_uint8_equals_float():
    generated, train = ((images * 255).byte() for images in on_the_way())
    results = []
    for g, t in ((generated, train), (generated / 255, train), (generated / 255, train / 255)):
        metric = MemorizedQuantity(t)
        metric.update(g)
        results.append(metric.compute())
    assert results[0] == results[1] == results[2] == naive(generated / 255, train / 255, MQ_THRESHOLDS, 50)


def test_lives_in_a_collection():
    generated, train = on_the_way()
    collection = MetricCollection({"mq": MemorizedQuantity(train, thresholds=(0.5,)), "mf": MemorizedFraction(train)})
    collection.update(generated)
    alone = MemorizedQuantity(train, thresholds=(0.5,))
    alone.update(generated)
    assert collection["mq"].compute() == alone.compute()
    assert collection.compute() == {"mq_0.5": alone.compute()["mq_0.5"], "mf": collection["mf"].compute()}


def test_a_module_logs_it(tmp_path):
    generated, train = on_the_way()
    metric = MemorizedQuantity(train, thresholds=(0.15, 0.5), k=10)
    collection = MetricCollection([MemorizedQuantity(train, k=10), MemorizedFraction(train)], prefix="val/")

    class Logging(pl.LightningModule):
        def validation_step(self, batch):
            metric.update(batch)
            collection.update(batch)

        def on_validation_epoch_end(self):
            self.log_dict(metric.compute())
            self.log_dict(collection.compute())

    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    (logged,) = trainer.validate(Logging(), DataLoader(generated, batch_size=20), verbose=False)
    expected = naive(generated, train, MQ_THRESHOLDS, 10)
    assert {name: logged[name] for name in ("mq_0.15", "mq_0.5")} == {a: expected[a] for a in ("mq_0.15", "mq_0.5")}
    assert {name: logged[f"val/{name}"] for name in expected} == expected
    assert logged["val/MemorizedFraction"] == pytest.approx(collection["MemorizedFraction"].compute().item())


def test_no_images_give_nan():
    metric = MemorizedQuantity(on_the_way()[1])
    metric.update(torch.zeros(0, 1, 4, 4))
    with pytest.warns(UserWarning, match="has seen no generated images, so that its result is NaN"):
        found = metric.compute()
    assert all(share.isnan() for share in found.values())


def on_ranks(shares):
    """``MemorizedQuantity`` on each rank's share of the generated images."""
    dist.init_process_group("gloo")
    _, train = on_the_way()
    metric = MemorizedQuantity(train)
    for batch in shares[dist.get_rank()]:
        metric.update(batch)
    together = metric.compute()
    metric.update(torch.zeros(0, 1, 4, 4))  # local counts are back, and are not counted twice
    return together, metric.compute()


@pytest.mark.parametrize("split", [10, 3, 0], ids=["even", "uneven", "empty rank"])
def test_two_processes_equal_one(split, processes):
    generated, train = on_the_way()
    expected = naive(generated, train, MQ_THRESHOLDS, 50)
    for results in processes(2).run(on_ranks, [generated[:split].split(2), generated[split:].split(7)]):
        assert results == (expected, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "Argument `train` expected at least k=50 images, but got 30. Pass k=30 or less"),
        ({"k": 1}, "Argument `k` expected at least 2, but got 1"),
        ({"k": 5, "thresholds": ()}, r"Argument `thresholds` expected numbers in \(0, 1\], but got \(\)"),
        ({"k": 5, "thresholds": (0.5, 1.5)}, r"Argument `thresholds` expected .* but got \(0.5, 1.5\)"),
        ({"k": 5, "thresholds": (float("nan"),)}, r"Argument `thresholds` expected .* but got \(nan,\)"),
    ],
)
def test_bad_settings_are_refused_in_one_line(kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        MemorizedQuantity(torch.rand(30, 1, 4, 4), **kwargs)
    assert "\n" not in str(caught.value)


def test_plot_draws_the_shares():
    generated, train = on_the_way()
    metric = MemorizedQuantity(train)
    values = [metric(batch) for batch in generated.split(10)]
    figure, axes = metric.plot()
    assert axes.figure is figure
    x, y = axes.lines[0].get_data()
    assert tuple(x) == MQ_THRESHOLDS
    assert {f"mq_{a:g}": share for a, share in zip(x, y, strict=True)} == naive(generated, train, MQ_THRESHOLDS, 50)
    _, given_axes = plt.subplots()
    assert metric.plot(values, ax=given_axes)[1] is given_axes
    assert len(given_axes.lines) == 2
    plt.close("all")
