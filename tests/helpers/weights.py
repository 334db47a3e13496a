"""Weights of modules, compared."""

import torch
from torch.testing import assert_close


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same(project, other, tolerance=0.0):
    for ours, theirs in zip(project.parameters(), other.parameters(), strict=True):
        assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
