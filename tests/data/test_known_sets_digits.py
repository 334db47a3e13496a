"""The digits: which of them, and how they are split."""

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_iet import DigitsDataModule

PIXELS, CLASSES = load_digits(return_X_y=True)


def sets_of(digits):
    digits.setup("fit")
    return digits.train_set, digits.control_set, digits.reference_set


@pytest.mark.parametrize("chosen", [None, (8, 9), (3,)])
def test_sets_hold_the_chosen_digits_once_each(chosen):
    sets = sets_of(DigitsDataModule(20, num_control=30, classes=chosen))
    wanted = [pixels for pixels, label in zip(PIXELS, CLASSES, strict=True) if chosen is None or label in chosen]
    found = torch.cat([part.images for part in sets]).flatten(1) * 16
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, wanted))
    assert set(torch.cat([part.targets for part in sets]).tolist()) == set(chosen or range(10))
    assert [len(part) for part in sets[:2]] == [20, 30]


def test_classes_come_in_equal_shares():
    train, _, _ = sets_of(DigitsDataModule(20, num_control=30, classes=[8, 9]))
    assert train.targets.bincount().tolist()[8:] == [10, 10]


@pytest.mark.parametrize("chosen", [[], [10], [-1, 3]])
def test_what_is_no_digit_is_refused(chosen):
    with pytest.raises(ValueError, match="`classes` expected digits from 0 to 9"):
        DigitsDataModule(classes=chosen)
