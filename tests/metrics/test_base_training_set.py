import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset

from lightning_iet.metrics import MemorizedFraction, MemorizedQuantity
from lightning_iet.metrics import base as training_set
from lightning_iet.metrics.base import collect_images

IMAGES = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
METRICS = pytest.mark.parametrize("metric_class", [MemorizedQuantity, MemorizedFraction])


class Images(Dataset):
    """A data set that yields what a function makes of each index."""

    def __init__(self, sample, length=60):
        self.sample, self.length = sample, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.sample(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


@pytest.mark.parametrize(
    "train",
    [
        IMAGES,
        Images(lambda i: IMAGES[i]),
        Images(lambda i: (IMAGES[i], i % 10, i)),
        Images(lambda i: [IMAGES[i], i % 10]),
        TensorDataset(IMAGES, torch.arange(60)),
        DataLoader(TensorDataset(IMAGES), batch_size=7),
        DataLoader(Images(lambda i: IMAGES[i]), batch_size=60),
        DataLoader(Stream(), batch_size=7),
    ],
    ids=["tensor", "images", "tuples", "lists", "TensorDataset", "loader of tuples", "loader of images", "stream"],
)
def test_every_kind_of_training_set_gives_the_same_images(train):
    assert torch.equal(collect_images(train), IMAGES)


@METRICS
def test_a_large_uint8_set_stays_uint8_and_gives_the_same(metric_class, monkeypatch):
    images = (IMAGES * 255).byte()
    assert collect_images(TensorDataset(images)).dtype == torch.uint8
    small = metric_class(images)
    monkeypatch.setattr(training_set, "_FLOATS", images.numel() - 1)
    large = metric_class(images)
    assert small.train_rows.dtype == torch.float32
    assert large.train_rows.dtype == torch.uint8
    assert small(IMAGES) == large(IMAGES)


@METRICS
@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (torch.zeros(0, 1, 4, 4), ValueError, "Argument `train` expected at least .* images, but got 0. Add"),
        (Images(None, length=0), ValueError, "Argument `train` expected at least one image, but got an empty set"),
        (torch.zeros(1, 1, 4, 4), ValueError, "Argument `train` expected at least .* images, but got 1. Add"),
        (torch.zeros(60, 4, 4), ValueError, r"shape \(N, C, H, W\), but got \(60, 4, 4\). Add"),
        (IMAGES * 2 - 1, ValueError, r"Argument `train` expected values in \[0, 1\], but got values from -0.99"),
        (torch.full((60, 1, 4, 4), torch.nan), ValueError, r"Argument `train` expected .* but got NaN"),
        (
            Images(lambda i: torch.zeros(1, 4 + i % 2, 4)),
            ValueError,
            r"2 sizes, among them \(1, 4, 4\) and \(1, 5, 4\)",
        ),
        (Images(lambda i: i), TypeError, "begin with\\) a tensor, but got int. Give the data set a transform"),
        (Stream(), TypeError, "a map-style Dataset or a DataLoader, but got Stream. Wrap"),
        (DataLoader(IMAGES, batch_size=32, drop_last=True), ValueError, "all of .* 60 images, but got 32 .* Pass"),
        (
            DataLoader(IMAGES, sampler=DistributedSampler(IMAGES, num_replicas=2, rank=0)),
            ValueError,
            "all of its data set's 60 images, but got 30 .* Pass the Dataset",
        ),
    ],
)
def test_bad_training_sets_are_refused_in_one_line(metric_class, train, error, message):
    with pytest.raises(error, match=message) as caught:
        metric_class(train)
    assert "\n" not in str(caught.value)


@METRICS
@pytest.mark.parametrize(
    ("generated", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4), ValueError, r"shape \(N, 1, 4, 4\), as the .* but got \(2, 3, 4, 4\). Resize"),
        (torch.zeros(1, 4, 4), ValueError, r"shape \(N, 1, 4, 4\), as the .* but got \(1, 4, 4\)"),
        (torch.full((2, 1, 4, 4), 255.0), ValueError, r"Argument `generated` expected values in \[0, 1\]"),
        (torch.full((2, 1, 4, 4), torch.nan), ValueError, "Argument `generated` expected .* but got NaN"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), TypeError, "Argument `generated` expected dtype uint8"),
        ("images", TypeError, "Argument `generated` expected a tensor, but got str"),
    ],
)
def test_bad_generated_images_are_refused_and_change_nothing(metric_class, generated, error, message):
    metric = metric_class(IMAGES)
    metric.update(IMAGES[:3])
    before = metric.compute()
    with pytest.raises(error, match=message):
        metric.update(generated)
    assert metric.compute() == before


def test_a_subset_may_be_chosen_on_purpose():
    assert len(collect_images(DataLoader(Subset(TensorDataset(IMAGES), range(10))))) == 10


@METRICS
def test_training_set_is_no_state(metric_class):
    metric = metric_class(IMAGES)
    assert metric.state_dict() == {}
    assert list(metric.parameters()) == list(metric.buffers()) == []
    assert metric.metric_state.keys().isdisjoint({"train_rows", "train_norms"})


@METRICS
def test_training_set_follows_the_device_but_never_the_dtype(metric_class):
    holder = nn.Module()
    holder.metric = metric_class(IMAGES)
    holder.half().double().to(torch.bfloat16)
    holder.metric.set_dtype(torch.float64)
    assert torch.equal(holder.metric.train_rows, IMAGES.flatten(1))
    holder.metric.to("meta")
    assert holder.metric.train_rows.device.type == holder.metric.train_norms.device.type == "meta"


@METRICS
def test_pickle_clone_and_reset_keep_the_training_set(metric_class):
    metric = metric_class(IMAGES)
    metric.update(IMAGES[:3])
    expected = metric.compute()
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert copy.compute() == expected
        copy.update(torch.zeros(5, 1, 4, 4))
        assert metric.compute() == expected, "a copy must not change the original"
        copy.reset()
        copy.update(IMAGES[:3])
        assert copy.compute() == expected
