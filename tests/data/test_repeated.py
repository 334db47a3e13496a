"""Training sets in which some images occur many times."""

import pickle
from collections import Counter

import pytest

from lightning_iet import DigitsDataModule, ShardedDataModule
from lightning_iet.data import RepeatedSubset


def made(**options):
    data = RepeatedSubset(DigitsDataModule(40, num_control=20, batch_size=8), **options)
    data.setup("fit")
    return data


def seen(data):
    return Counter(index for _, _, indices in data.train_dataloader() for index in indices.tolist())


def test_the_first_images_of_the_seed_occur_many_times_and_the_others_once():
    data = made(subset=12, repeated=3, times=5, seed=1)
    counts = seen(data)
    assert sorted(counts.values()) == [1] * 9 + [5] * 3
    often = {index for index, count in counts.items() if count == 5}
    assert {data.train_set[place][2] for place in range(3)} == often
    assert len(data.train_set) == 3
    assert seen(made(subset=12, repeated=3, times=5, seed=1)) == counts
    assert seen(made(subset=12, repeated=3, times=5, seed=2)) != counts


def test_without_repetition_it_is_a_subset():
    data = made(subset=12)
    counts = seen(data)
    assert sorted(counts.values()) == [1] * 12
    assert {data.train_set[place][2] for place in range(12)} == set(counts)
    assert seen(made()) == Counter(range(40))


def test_what_is_held_out_stays():
    data, whole = made(subset=12, repeated=3, times=5), made()
    assert len(data.control_set) == len(whole.control_set) == 20
    assert data.reference_set.images.equal(whole.reference_set.images)
    assert len(data.val_dataloader().dataset) == 20
    assert pickle.loads(pickle.dumps(data)).times == 5


def test_it_can_be_split_into_shards():
    data = RepeatedSubset(DigitsDataModule(40), subset=12, repeated=2, times=3)
    sharded = ShardedDataModule(data, num_shards=2, partition="iid")
    sharded.setup("fit")
    assert sum(len(batch[0]) for batch in sharded.train_dataloader()) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": 0}, "`subset` expected an integer ≥ 1"),
        ({"repeated": -1}, "`repeated` expected an integer ≥ 0"),
        ({"times": 0}, "`times` expected an integer ≥ 1"),
        ({"subset": 41}, "the 40 training images suffice, but got 41 and 0"),
        ({"subset": 5, "repeated": 6}, "suffice, but got 5 and 6"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)
