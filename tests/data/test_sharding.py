import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
)

from lightning_iet import DigitsDataModule, ShardedDataModule, ShardSampler
from lightning_iet.data.samples import labels_of
from lightning_iet.data.shard_sampler import ShardPlan


class Numbers(Dataset):
    """Yields its index and a number drawn from each of the global generators."""

    def __init__(self, size=10, targets=None):
        self.size = size
        if targets is not None:
            self.targets = targets

    def __getitem__(self, index):
        return index, torch.rand(()).item()

    def __len__(self):
        return self.size


class Loaded(pl.LightningDataModule):
    """A data module around one loader."""

    def __init__(self, dataset=None, **kwargs):
        super().__init__()
        self.dataset = Numbers() if dataset is None else dataset
        self.kwargs = {"batch_size": 2, "shuffle": True} | kwargs

    def train_dataloader(self):
        return DataLoader(self.dataset, **self.kwargs)

    def val_dataloader(self):
        return "validation"


def shards_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    seen = {}
    for batch in sampler:
        seen.setdefault(batch.shard, []).append(batch.indices)
    return seen


def test_an_epoch_visits_every_sample_once_and_only_in_its_shard():
    loader = ShardedDataModule(Loaded(), 3).train_dataloader()
    seen = shards_of(loader.sampler)
    assert sorted(i for batches in seen.values() for batch in batches for i in batch) == list(range(10))
    for shard, batches in seen.items():
        assert {i for batch in batches for i in batch} == set(loader.sampler.shards[shard].tolist())
    assert len(loader) == len(loader.sampler) == sum(map(len, seen.values()))


def test_shards_are_fixed_and_their_order_changes_with_the_epoch():
    sampler = ShardedDataModule(Loaded(Numbers(40)), 2).train_dataloader().sampler
    first, second, again = (shards_of(sampler, epoch) for epoch in (0, 1, 0))
    assert first == again
    assert first != second
    for shard in first:
        assert {i for b in first[shard] for i in b} == {i for b in second[shard] for i in b}


def test_processes_share_the_shards_out_without_changing_their_batches():
    data = ShardedDataModule(Loaded(Numbers(40)), 4)
    data.plan = ShardPlan(num_shards=4, seed=3)
    alone = shards_of(data.train_dataloader().sampler)
    together = {}
    for rank in range(2):
        data.plan = ShardPlan(num_shards=4, num_processes=2, rank=rank, seed=3)
        together |= shards_of(data.train_dataloader().sampler)
    assert together == alone


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_augmentation_depends_on_the_sample_and_the_epoch_alone(num_workers):
    data = ShardedDataModule(Loaded(num_workers=num_workers), 2)
    loader = data.train_dataloader()
    drawn = {int(i): float(x) for indices, numbers in loader for i, x in zip(indices, numbers, strict=True)}
    data.plan = ShardPlan(num_shards=2, num_processes=2, rank=1)
    for indices, numbers in data.train_dataloader():
        assert all(drawn[int(i)] == float(x) for i, x in zip(indices, numbers, strict=True))
    loader.sampler.set_epoch(1)
    other = {int(i): float(x) for indices, numbers in loader for i, x in zip(indices, numbers, strict=True)}
    assert other.keys() == drawn.keys()
    assert all(other[i] != drawn[i] for i in drawn)


def test_reading_samples_leaves_the_random_stream_of_training_alone():
    loader = ShardedDataModule(Loaded(), 2).train_dataloader()
    batch = next(iter(loader.sampler))
    state = torch.get_rng_state()
    loader.dataset[batch]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("round_steps", [None, 1, 2, 3])
@pytest.mark.parametrize("cut_with", [1, 2, 4])
def test_a_cut_epoch_goes_on_with_the_batches_that_are_left(world_size, cut_with, round_steps):
    """Whatever the two process counts: together, what came before and after the cut is the epoch, each step once."""

    def samplers(processes, **kwargs):
        shared = {"num_shards": 4, "num_processes": processes, "round_steps": round_steps, "epoch": 5} | kwargs
        data = ShardedDataModule(Loaded(Numbers(24)), 4)
        for rank in range(processes):
            data.plan = ShardPlan(rank=rank, **shared)
            yield data.train_dataloader().sampler

    before = [list(zip(s.walk(5), s, strict=True)) for s in samplers(cut_with)]
    for cut in range(len(before[0])):
        taken = [(step, batch) for path in before for step, batch in path[:cut]]
        done = [sum(step.shard == shard for step, _ in taken) for shard in range(4)]
        seen = [(step.shard, step.step, batch.indices) for step, batch in taken]
        paths = [list(zip(s.walk(5), s, strict=True)) for s in samplers(world_size, done=tuple(done))]
        seen += [
            (step.shard, step.step, batch.indices) for path in paths for step, batch in path if batch.shard is not None
        ]
        assert sorted(seen) == sorted((s.shard, s.step, b.indices) for path in before for s, b in path)
        assert len({len(path) for path in paths}) == 1
        meetings = [[i for i, (step, _) in enumerate(path) if step.averaging] for path in paths]
        assert all(meeting == meetings[0] for meeting in meetings)
        for path in paths:
            assert all(step.shard == batch.shard for step, batch in path)


def test_one_shard_is_the_inner_loader_untouched():
    loader = ShardedDataModule(Loaded(), 1).train_dataloader()
    assert loader.batch_size == 2
    assert not isinstance(loader.sampler, ShardSampler)


def test_other_loader_settings_are_kept():
    data = Loaded(num_workers=1, prefetch_factor=3, collate_fn=list, timeout=5)
    loader = ShardedDataModule(data, 2).train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.timeout) == (1, 3, 5)
    assert loader.collate_fn.collate is list


def test_everything_else_of_the_data_module_is_passed_through():
    inner = Loaded()
    data = ShardedDataModule(inner, 2)
    assert data.val_dataloader() == "validation"
    assert data.dataset is inner.dataset
    data.trainer = "trainer"
    assert inner.trainer == "trainer"
    with pytest.raises(AttributeError, match="nothing"):
        _ = data.nothing


def test_shards_are_stratified_where_there_are_labels():
    labels = [0] * 8 + [1] * 4
    data = ShardedDataModule(Loaded(Numbers(12, labels)), 4)
    for shard in data.train_dataloader().sampler.shards:
        assert sorted(labels[i] for i in shard.tolist()) == [0, 0, 1]
    with pytest.raises(ValueError, match="at most 4 for a stratified split, since class 1"):
        ShardedDataModule(Loaded(Numbers(12, labels)), 5).train_dataloader()


def test_labels_are_found_through_subsets_and_concatenations():
    data = Numbers(4, torch.tensor([3, 4, 5, 6]))
    assert labels_of(Subset(data, [2, 0])).tolist() == [5, 3]
    assert labels_of(ConcatDataset([data, Subset(data, [1])])).tolist() == [3, 4, 5, 6, 4]
    assert labels_of(ConcatDataset([data, Numbers(2)])) is None


@pytest.mark.parametrize(
    "labels", [["cat", "dog"], {"cat": 0, "dog": 1, "emu": 2, "fox": 3}, [{"boxes": []}] * 4, [["a", "b"]] * 4]
)
def test_names_of_classes_boxes_and_files_are_no_labels(labels):
    data = Numbers(4)
    data.labels = labels
    assert labels_of(data) is None
    assert len(ShardedDataModule(Loaded(data), 2).train_dataloader()) > 0
    assert labels_of(Numbers(2, torch.rand(2))) is None
    assert labels_of(Numbers(3, ["dog", "cat", "dog"])).tolist() == [1, 0, 1]


def test_order_is_kept_when_the_loader_does_not_shuffle():
    loader = ShardedDataModule(Loaded(shuffle=False), 2, partition="iid").train_dataloader()
    for shard, batches in shards_of(loader.sampler).items():
        assert [i for batch in batches for i in batch] == loader.sampler.shards[shard].tolist()


def test_what_cannot_be_split_is_refused():
    empty = Loaded(TensorDataset(torch.empty(0)), shuffle=False)
    with pytest.raises(ValueError, match="expected a training set with samples, but got an empty one"):
        ShardedDataModule(empty, 4).train_dataloader()
    with pytest.raises(ValueError, match=r"at most one shard per sample \(3\), but got 4"):
        ShardedDataModule(Loaded(Numbers(3)), 4).train_dataloader()


def test_bad_arguments():
    with pytest.raises(ValueError, match="`partition` expected 'stratified' or 'iid', but got 'random'"):
        ShardedDataModule(Loaded(), 2, partition="random")
    with pytest.raises(ValueError, match="`num_shards` expected an integer ≥ 1, but got 0"):
        ShardedDataModule(Loaded(), 0)
    with pytest.raises(ValueError, match="the same value in the data and in the averaging, but got 2 and 3"):
        ShardSampler([torch.tensor([0]), torch.tensor([1])], 1, plan=ShardPlan(num_shards=3))
    inner = Loaded()
    inner.train_dataloader = lambda: [1, 2]
    with pytest.raises(TypeError, match="expected one training DataLoader, but got list"):
        ShardedDataModule(inner, 2).train_dataloader()
    with pytest.raises(TypeError, match=r"but got a DataLoader. Use ShardedDataModule.from_loader"):
        ShardedDataModule(DataLoader([1, 2]), 2)
    with pytest.raises(
        TypeError, match=r"LightningDataModule, but got 'photos'. For a folder .* ImageFolderDataModule"
    ):
        ShardedDataModule("photos", 2)
    with pytest.raises(TypeError, match=r"LightningDataModule, but got <class .*Loaded'>. Pass an instance of one."):
        ShardedDataModule(Loaded, 2)
    with pytest.raises(TypeError, match=r"`num_shards` expected an integer, but got 2.5"):
        ShardedDataModule(Loaded(), 2.5)
    with pytest.raises(ValueError, match="`num_samples` expected an integer ≥ 1, but got 0"):
        ShardedDataModule(Loaded(), 2, num_samples=0)


def test_digits_are_split_into_disjoint_sets_with_all_classes():
    digits = DigitsDataModule(64)
    digits.setup("fit")
    sets = [digits.train_set, digits.control_set, digits.reference_set]
    assert [len(s) for s in sets] == [64, 512, 1221]
    images = torch.cat([s.images for s in sets])
    # The digits hold no two equal images, so disjoint sets together hold 1,797 different ones.
    assert len(images.flatten(1).unique(dim=0)) == 1797
    counts = digits.train_set.targets.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1
    assert images.min() >= 0
    assert images.max() == 1
    again = DigitsDataModule(64)
    again.setup("fit")
    assert torch.equal(again.train_set.images, digits.train_set.images)


def test_digits_refuse_more_images_than_there_are():
    with pytest.raises(ValueError, match="leave 2 of the 1,797 digits for FID"):
        DigitsDataModule(1500).setup("fit")
    with pytest.raises(ValueError, match="`batch_size` expected an integer ≥ 1"):
        DigitsDataModule(64, batch_size=0)
    with pytest.raises(ValueError, match="`num_workers` expected an integer ≥ 0"):
        DigitsDataModule(64, num_workers=-1)
