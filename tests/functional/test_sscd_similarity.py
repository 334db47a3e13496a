import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lightning_iet.functional.sscd_similarity import similarity_summary, sscd_similarity


@given(seed=st.integers(0, 1000), threshold=st.sampled_from([-0.5, 0.0, 0.5, 0.9]))
def test_equals_the_largest_dot_products(seed, threshold):
    draw = torch.Generator().manual_seed(seed)
    generated, train = (normalize(torch.randn(n, 5, generator=draw).double()) for n in (12, 20))
    largest = [max((x * y).sum().item() for y in train) for x in generated]
    found = sscd_similarity(generated, train, threshold=threshold)
    assert found["q0.95"].item() == pytest.approx(np.quantile(largest, 0.95), abs=1e-6)
    assert found["share"].item() == pytest.approx(np.mean([value > threshold for value in largest]))


def test_a_similarity_at_the_threshold_does_not_count():
    assert similarity_summary(torch.tensor([0.25, 0.5]), threshold=0.5)["share"] == 0
    assert similarity_summary(torch.tensor([0.25, 0.75]), threshold=0.5)["share"] == 0.5


def test_copies_have_similarity_one():
    train = torch.randn(30, 16)
    found = sscd_similarity(train[:4], train)
    assert found["q0.95"].item() == pytest.approx(1)
    assert found["share"] == 1
