"""What every measure keeps to, whatever it measures."""

import copy
import io
import pickle
from contextlib import nullcontext

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_iet.functional.checks import unit_interval
from lightning_iet.metrics import (
    AverageMinimumDistance,
    DensityCoverage,
    ExtractionAttack,
    MembershipInference,
    MiFID,
    NearestTrainingDistance,
    PrecisionRecall,
    SSCDSimilarity,
)

matplotlib.use("Agg")

DRAW = torch.Generator().manual_seed(0)
TRAIN = torch.rand(30, 1, 4, 4, generator=DRAW)
GENERATED = torch.cat([torch.rand(12, 1, 4, 4, generator=DRAW), TRAIN[:1].expand(4, -1, -1, -1) * 0.99, TRAIN[5:9]])
ORDER = torch.randperm(20, generator=DRAW)


class Means(nn.Module):
    """Row means, some of them negative."""

    def forward(self, images):
        return unit_interval(images).mean(dim=(1, 3)) - 0.4


MEASURES = {
    "distance": lambda: NearestTrainingDistance(TRAIN),
    "distance of features": lambda: NearestTrainingDistance(TRAIN, features=Means()),
    "amd": lambda: AverageMinimumDistance(TRAIN, features=Means()),
    "sscd": lambda: SSCDSimilarity(TRAIN, features="pixels", threshold=0.95),
    "mifid": lambda: MiFID(TRAIN, features=Means(), threshold=0.5),
    "extraction": lambda: ExtractionAttack(TRAIN, min_size=3),
}
TWO_KINDS = {
    "precision": lambda: PrecisionRecall("pixels"),
    "density": lambda: DensityCoverage("pixels"),
    "membership": MembershipInference,
}
ALL = MEASURES | TWO_KINDS


def feed(name, metric, first=0, last=20):
    """Give a metric some of the twenty samples, in one call of update (two where there are two kinds)."""
    if name in MEASURES:
        metric.update(GENERATED[ORDER[first:last]])
        return
    values = TRAIN if name != "membership" else torch.linspace(0, 1, 40)[ORDER].sin()
    others = GENERATED[ORDER] if name != "membership" else torch.linspace(0.1, 1.4, 20)
    metric.update(values[first:last], True)
    metric.update(others[first:last], False)


def expected_of(name):
    metric = ALL[name]()
    feed(name, metric)
    return metric.compute()


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-12, equal_nan=True)


every = pytest.mark.parametrize("name", ALL)


REPRS = {
    "distance": "NearestTrainingDistance(train=<30 x (1, 4, 4)>, features=pixels, quantiles=(0.01, 0.05, 0.25, 0.5,",
    "distance of features": "NearestTrainingDistance(train=<30 x (1, 4, 4)>, features=Means, quantiles=(0.01,",
    "amd": "AverageMinimumDistance(train=<30 x (1, 4, 4)>, features=Means)",
    "sscd": "SSCDSimilarity(train=<30 x (1, 4, 4)>, features=PixelFeatures, threshold=0.95)",
    "mifid": "MiFID(train=<30 x (1, 4, 4)>, features=Means, threshold=0.5)",
    "extraction": "ExtractionAttack(train=<30 x (1, 4, 4)>, eps=0.15, min_size=3, grid=4)",
    "precision": "PrecisionRecall(features=PixelFeatures, k=3, reset_real_features=True)",
    "density": "DensityCoverage(features=PixelFeatures, k=5, reset_real_features=True)",
    "membership": "MembershipInference(rates=(0.01, 0.001), confidence=0.95)",
}


@every
def test_repr_says_the_settings(name):
    assert repr(ALL[name]()).startswith(REPRS[name])


@every
@given(splits=st.lists(st.integers(0, 20), max_size=3).map(sorted))
@settings(max_examples=10)
def test_batches_do_not_matter(name, splits):
    metric = ALL[name]()
    for first, last in zip([0, *splits], [*splits, 20], strict=True):
        feed(name, metric, first, last)
    assert_same(metric.compute(), expected_of(name))


@pytest.mark.parametrize("name", MEASURES)
def test_the_order_does_not_matter(name):
    metric = ALL[name]()
    metric.update(GENERATED[ORDER.flip(0)])
    assert_same(metric.compute(), expected_of(name))


@pytest.mark.parametrize("name", MEASURES)
def test_forward_returns_the_batch_and_counts_it_in(name):
    metric = ALL[name]()
    for first, last in ((0, 12), (12, 20)):
        alone = ALL[name]()
        feed(name, alone, first, last)
        assert_same(metric(GENERATED[ORDER[first:last]]), alone.compute())
    assert_same(metric.compute(), expected_of(name))


@every
def test_reset_starts_anew(name):
    metric = ALL[name]()
    feed(name, metric, 3, 9)
    metric.reset()
    feed(name, metric)
    assert_same(metric.compute(), expected_of(name))


@every
def test_copies_are_independent(name):
    metric = ALL[name]()
    feed(name, metric)
    for copied in (pickle.loads(pickle.dumps(metric)), metric.clone(), copy.deepcopy(metric)):
        assert_same(copied.compute(), expected_of(name))
        copied.reset()
        feed(name, copied, 3, 9)
        assert_same(metric.compute(), expected_of(name))


@every
def test_the_state_may_be_saved_and_loaded_without_running_code(name):
    metric = ALL[name]()
    feed(name, metric)
    file = io.BytesIO()
    torch.save(metric.metric_state, file)
    file.seek(0)
    restored = ALL[name]()
    for state, value in torch.load(file, weights_only=True).items():
        setattr(restored, state, value)
    restored._update_count = 1
    assert_same(restored.compute(), expected_of(name))
    assert metric.state_dict() == {}


@every
def test_uint8_equals_float(name):
    if name == "membership":
        return
    results = []
    for convert in (lambda images: images, lambda images: images / 255):
        metric = ALL[name]()
        for real in (None,) if name in MEASURES else (True, False):
            images = ((TRAIN[10:] if real else GENERATED) * 255).byte()
            metric.update(convert(images), *(() if real is None else (real,)))
        results.append(metric.compute())
    assert_same(*results)


def on_ranks(name, bounds):
    """The measure, each rank on its own share, in two updates; an empty share is no update at all."""
    dist.init_process_group("gloo")
    metric = ALL[name]()
    first, last = bounds[dist.get_rank()]
    if last > first:
        middle = (first + last) // 2
        feed(name, metric, first, middle)
        feed(name, metric, middle, last)
    together = metric.compute()
    return together, metric.compute()


@every
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("split", [10, 3, 0], ids=["even", "uneven", "empty rank"])
def test_two_processes_equal_one(name, split, processes):
    expected = expected_of(name)
    for results in processes(2).run(on_ranks, name, [(0, split), (split, 20)]):
        for found in results:
            assert_same(found, expected)


@every
def test_plot_draws(name):
    metric = ALL[name]()
    feed(name, metric)
    figure, axes = metric.plot()
    assert axes.figure is figure
    assert axes.lines
    _, given_axes = plt.subplots()
    assert metric.plot(ax=given_axes)[1] is given_axes
    assert len(metric.plot([metric.compute(), metric.compute()])[1].lines[0].get_ydata()) == 2
    plt.close("all")


@pytest.mark.parametrize("name", MEASURES)
def test_bad_images_are_refused_and_change_nothing(name):
    metric = ALL[name]()
    feed(name, metric)
    for bad in (torch.zeros(2, 3, 4, 4), torch.full((2, 1, 4, 4), torch.nan), torch.full((2, 1, 4, 4), 255.0)):
        with pytest.raises(ValueError, match="Argument `generated` expected") as caught:
            metric.update(bad)
        assert "\n" not in str(caught.value)
    assert_same(metric.compute(), expected_of(name))


@pytest.mark.parametrize("name", MEASURES)
def test_no_images_are_no_error(name):
    metric = ALL[name]()
    metric.update(torch.zeros(0, 1, 4, 4))
    told = (
        nullcontext() if name == "extraction" else pytest.warns(UserWarning, match="has seen no generated images, so")
    )
    with told:
        found = metric.compute()
    values = found.values() if isinstance(found, dict) else [found]
    assert all(value.isnan() or value == 0 for value in values)


@pytest.mark.parametrize("name", TWO_KINDS)
def test_one_kind_is_not_enough(name):
    metric = ALL[name]()
    metric.update(TRAIN if name != "membership" else torch.rand(5), True)
    with pytest.raises(ValueError, match="but got") as caught:
        metric.compute()
    assert "\n" not in str(caught.value)


@every
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_compute_without_an_update_gives_what_the_page_says(name):
    metric = ALL[name]()
    if name in TWO_KINDS:
        with pytest.raises(ValueError, match="expected"):
            metric.compute()
        return
    found = metric.compute()
    values = found.values() if isinstance(found, dict) else [found]
    assert all(value == 0 if name == "extraction" else value.isnan() for value in values)


@pytest.mark.parametrize("name", TWO_KINDS)
def test_forward_of_one_kind_is_an_update(name):
    metric = ALL[name]()
    values = TRAIN if name != "membership" else torch.linspace(0, 1, 40)[ORDER].sin()
    others = GENERATED[ORDER] if name != "membership" else torch.linspace(0.1, 1.4, 20)
    for part in values[:20].split(7):
        assert metric(part, True) is None
    for part in others.split(7):
        assert metric(part, False) is None
    assert_same(metric.compute(), expected_of(name))


@every
@pytest.mark.parametrize("convert", [nn.Module.bfloat16, lambda module: module.to(dtype=torch.float16)])
def test_half_precision_of_the_module_around_changes_nothing(name, convert):
    holder = nn.Module()
    holder.metric = ALL[name]()
    feed(name, holder.metric, 0, 8)
    convert(holder)
    feed(name, holder.metric, 8, 20)
    assert_same(holder.metric.compute(), expected_of(name))
    assert holder.metric.metric_state.keys()
    for value in holder.metric.metric_state.values():
        for state in value if isinstance(value, list) else [value]:
            assert state.dtype in (torch.float32, torch.float64, torch.int64)


class Moody(nn.Module):
    """A network that does something else in training mode, and learns statistics from what it sees."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(1), nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, images):
        return self.frozen(self.dropout(self.norm(images))).flatten(1)


def test_a_network_in_training_mode_is_used_in_evaluation_mode():
    network = Moody()
    metric = AverageMinimumDistance(TRAIN, features=network)
    metric.update(TRAIN[:10])
    assert metric.compute() < 1e-6, "copies are copies"
    assert network.norm.num_batches_tracked == 0
    assert [module.training for module in network.modules()] == [True, True, True, False]


@pytest.mark.parametrize("name", ["precision", "density"])
def test_images_of_another_size_are_refused_and_change_nothing(name):
    metric = ALL[name]()
    feed(name, metric)
    for real in (True, False):
        with pytest.raises(ValueError, match=r"features are of one width, but got 16 and 64\. Resize"):
            metric.update(torch.rand(16, 1, 8, 8), real)
    assert_same(metric.compute(), expected_of(name))
    metric.reset()
    metric.update(torch.rand(16, 1, 8, 8), real=True)


def widths_on_ranks(name):
    """Images of another size on each rank."""
    dist.init_process_group("gloo")
    metric = ALL[name]()
    side = (4, 8)[dist.get_rank()]
    for real in (True, False):
        metric.update(torch.rand(16, 1, side, side), real)
    with pytest.raises(ValueError, match="features are of one width, but got 16 and 64"):
        metric.compute()
    return True


@pytest.mark.parametrize("name", ["precision", "density"])
def test_images_of_another_size_on_another_process_are_refused(name, processes):
    assert processes(2).run(widths_on_ranks, name) == [True, True]


@pytest.mark.parametrize("name", ["precision", "density"])
def test_real_images_may_outlive_a_reset(name):
    metric = type(ALL[name]())("pixels", reset_real_features=False)
    feed(name, metric)
    metric.reset()
    metric.update(GENERATED[ORDER], False)
    assert_same(metric.compute(), expected_of(name))
