"""The test of the first batch: which row of an output each loss depends on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.callbacks.anti_gradient_control.losses.error_capture import Layout, layouts, row_maps


def map_by_hand(losses, output):
    """One backward pass per loss."""
    found = torch.full((len(output),), -1)
    for number, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
        for row in gradient.flatten(1).ne(0).any(1).nonzero().flatten().tolist():
            if found[row] >= 0:
                return None
            found[row] = number
    return found


def assert_map(rows, output):
    expected, found = map_by_hand(rows.sum(1), output), row_maps(rows, [[output]])
    if expected is None:
        assert found is None
    else:
        assert torch.equal(found[0], expected)


@given(owners=st.lists(st.integers(0, 8), min_size=1, max_size=20))
def test_any_map_is_told(owners):
    """Row j is added into loss owners[j]; what belongs to loss 8 is left out."""
    output = torch.randn(len(owners), 3, dtype=torch.float64, requires_grad=True)
    rows = torch.zeros(9, 3, dtype=torch.float64).index_add(0, torch.tensor(owners), output)[:8] ** 2
    assert_map(rows, output)


@given(
    owners=st.lists(st.integers(0, 6), min_size=2, max_size=12),
    extra=st.tuples(st.integers(0, 11), st.integers(0, 6)),
    size=st.sampled_from([1.0, 1e-3, -1.0]),
)
def test_a_second_owner_is_found_out(owners, extra, size):
    row, owner = extra[0] % len(owners), extra[1]
    output = torch.randn(len(owners), 3, dtype=torch.float64, requires_grad=True)
    rows = torch.zeros(7, 3, dtype=torch.float64).index_add(0, torch.tensor(owners), output)
    rows = rows.index_add(0, torch.tensor([owner]), size * output[row : row + 1].flip(1)) ** 2
    assert_map(rows, output)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_every_precision(dtype, batch_size):
    output = torch.randn(batch_size, 3, 8, 8).to(dtype).requires_grad_()
    error = (output - torch.randn_like(output)) ** 2
    (found,) = row_maps(error.flatten(1), [[output]])
    assert torch.equal(found, torch.arange(batch_size))
    if batch_size > 1:
        assert row_maps((error / error.mean()).flatten(1), [[output]]) is None
        assert row_maps(((output - output.mean(0)) ** 2).flatten(1), [[output]]) is None


def test_several_outputs_and_calls():
    first, second, third = (torch.randn(4, 2, requires_grad=True) for _ in range(3))
    rows = (first + second.flip(0)) ** 2 + third.roll(1, 0)
    assert [found.tolist() for found in row_maps(rows, [[first], [second]])] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert row_maps(rows, [[first, second]]) is None


def test_broken_rows_tell_nothing():
    output = torch.ones(3, 2, requires_grad=True)
    rows = output**2 * torch.tensor([[1.0], [float("nan")], [0.0]])
    assert row_maps(rows, [[output]])[0].tolist() == [0, -1, -1]


@pytest.mark.parametrize(
    ("arrange", "layout"),
    [
        (lambda x: x, Layout(0)),
        (lambda x: x.permute(0, 2, 3, 1).reshape(-1, 2), Layout(0)),
        (lambda x: x.movedim(0, 1), Layout(1)),
        (lambda x: x.flatten(1).mT, Layout(1)),
        (lambda x: x.permute(2, 3, 0, 1).reshape(-1, 2), Layout(0, major=False)),
        (lambda x: x[:3], Layout(whole=False)),
    ],
)
def test_layouts(arrange, layout):
    output = torch.randn(6, 2, 5, 5, requires_grad=True)
    errors = arrange(output**2)
    tried = [each for each in layouts(errors, 6) if row_maps(each.rows(errors, 6), [[output]]) is not None]
    assert tried[0] == layout
    rows = layout.rows(errors, 6)
    torch.testing.assert_close(rows.sum(1), (output**2).sum((1, 2, 3))[: len(rows)])
