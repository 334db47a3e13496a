import pytest
import torch
from sklearn.metrics import roc_auc_score

from lightning_iet.metrics import MembershipInference


def test_equals_scikit_learn():
    members, non_members = torch.rand(70).round(decimals=1), torch.rand(50).round(decimals=1) + 0.1
    metric = MembershipInference()
    for part in members.split(30):
        metric.update(part, member=True)
    metric.update(non_members, member=False)
    scores = -torch.cat([members, non_members]).numpy()
    found = metric.compute()
    assert found["auc"].item() == pytest.approx(roc_auc_score([1] * 70 + [0] * 50, scores))
    assert found["auc_low"] < found["auc"] < found["auc_high"]
    assert list(found) == ["auc", "auc_low", "auc_high", "tpr@0.01", "tpr@0.001"]


def test_takes_losses_of_a_running_training():
    metric = MembershipInference()
    for member in (True, False):
        metric.update(torch.rand(5, dtype=torch.bfloat16, requires_grad=True), member)
    assert not metric.compute()["auc"].requires_grad


def test_plot_draws_the_roc_curve():
    metric = MembershipInference()
    metric.update(torch.tensor([1.0, 2.0]), member=True)
    metric.update(torch.tensor([2.0, 3.0]), member=False)
    _, axes = metric.plot()
    assert axes.lines[0].get_xdata().tolist() == [0, 0, 0.5, 1]
    assert axes.lines[0].get_ydata().tolist() == [0, 0.5, 1, 1]
    assert axes.get_xscale() == axes.get_yscale() == "log"


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_plot_draws_results_as_other_metrics_do():
    metric = MembershipInference()
    with pytest.raises(ValueError, match="Argument `members` expected one loss"):
        metric.plot()
    metric.update(torch.rand(9), member=True)
    metric.update(torch.rand(9), member=False)
    _, axes = metric.plot([metric.compute(), metric.compute()])
    assert {line.get_label() for line in axes.lines} >= {"auc", "tpr@0.01"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rates": (2,)}, r"Argument `rates` expected numbers in \[0, 1\], but got \(2,\)"),
        ({"rates": (0.1, 0.1)}, r"Argument `rates` expected numbers that differ in six digits, but got \(0.1, 0.1\)"),
        ({"confidence": 1}, r"Argument `confidence` expected a number in \(0, 1\), but got 1"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MembershipInference(**kwargs)


def test_losses_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(B,\), but got \(2, 3\)"):
        MembershipInference().update(torch.rand(2, 3), member=True)
