import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.data.splits import SetSizes, deal, select_disjoint

labels = st.lists(st.integers(-2, 4), min_size=1, max_size=60)


def dealt_naively(labels, seed):
    """Hand the samples of a shuffled row out: first the first of each class, then the second of each, …"""
    rows = {}
    for position, sample in enumerate(torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))):
        row = rows.setdefault(labels[sample], [])
        row.append((len(row), position, int(sample)))
    return [sample for _, _, sample in sorted(entry for row in rows.values() for entry in row)]


@given(labels, st.integers(0, 3))
def test_classes_are_dealt_out_in_turn(labels, seed):
    assert deal(torch.tensor(labels), seed=seed).tolist() == dealt_naively(labels, seed)
    [drawn] = select_disjoint(torch.tensor(labels), [len(labels)], seed=seed)
    assert drawn.tolist() == dealt_naively(labels, seed)


@given(labels, st.integers(0, 3))
def test_every_stretch_holds_the_classes_in_their_shares(labels, seed):
    order = deal(torch.tensor(labels), seed=seed, proportional=True).tolist()
    assert sorted(order) == list(range(len(labels)))
    classes = set(labels)
    for length in range(len(labels) + 1):
        taken = [labels[sample] for sample in order[:length]]
        for name in classes:
            expected = length * labels.count(name) / len(labels)
            assert abs(taken.count(name) - expected) <= 0.5 + len(classes) / 2


def test_fifty_thousand_samples_take_no_time():
    order = deal(torch.arange(50_000) % 10, seed=0)
    assert (order[:1000] % 10).bincount().tolist() == [100] * 10


@given(st.integers(1, 50), st.integers(0, 20), st.none() | st.integers(0, 20), st.none() | st.integers(1, 50))
def test_sizes_of_one_source(available, control, reference, train):
    both_left_open = reference is None and train is None
    least = (train or 1) + control + (control if both_left_open else reference or 0)
    asked = SetSizes(train, control, reference)
    if least > available:
        with pytest.raises(ValueError, match=f"for which {available} images suffice"):
            asked.of_one(available)
        return
    sizes = asked.of_one(available)
    assert sizes[0] == train or (train is None and sizes[0] >= 1)
    assert sizes[1] == control
    assert reference in (None, sizes[2])
    assert sum(sizes) == available or (sum(sizes) < available and train is not None and reference is not None)


def test_sizes_of_two_sources():
    assert SetSizes(None, 3, None).of_two(10, 8) == ([10], [3, 5])
    assert SetSizes(4, 3, 2).of_two(10, 8) == ([4], [3, 2])
    assert SetSizes(4, 0, None).of_two(10, 8) == ([4], [0, 8])
    with pytest.raises(ValueError, match=r"numbers for which 10 images suffice, .* but got 11, 3 and None\."):
        SetSizes(11, 3, None).of_two(10, 8)
    with pytest.raises(ValueError, match=r"numbers for which 8 images suffice, .* but got None, 9 and None\."):
        SetSizes(None, 9, None).of_two(10, 8)
