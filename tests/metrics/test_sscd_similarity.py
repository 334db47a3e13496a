import pytest
import torch
from torch import nn

from lightning_iet.functional.sscd_similarity import sscd_similarity
from lightning_iet.metrics import SSCDSimilarity
from lightning_iet.metrics.features import SSCDFeatures
from tests.helpers.networks import save_torchscript


@pytest.fixture
def weights(tmp_path):
    """A small network in place of SSCD: it takes images of 288x288 too."""
    network = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return save_torchscript(network, tmp_path / "sscd.ts")


def test_equals_the_function_on_the_files_descriptors(weights):
    generated, train = torch.rand(2, 12, 3, 16, 16)
    metric = SSCDSimilarity(train, weights=weights, threshold=0.99)
    metric.update(generated[:5])
    metric.update(generated[5:])
    network = SSCDFeatures(weights)
    torch.testing.assert_close(metric.compute(), sscd_similarity(network(generated), network(train), threshold=0.99))


def test_copies_have_similarity_one(weights, monkeypatch):
    monkeypatch.setenv("LIGHTNING_IET_SSCD", str(weights))
    train = torch.rand(12, 1, 16, 16)
    metric = SSCDSimilarity(train)
    metric.update(train[:4])
    assert metric.compute()["q0.95"].item() == pytest.approx(1)
    assert metric.compute()["share"] == 1


def test_without_the_file_the_error_says_where_to_get_it(monkeypatch):
    monkeypatch.delenv("LIGHTNING_IET_SSCD", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"Get https://.*sscd_disc_mixup.* `weights`, or set LIGHTNING_IET_SSCD"
    ):
        SSCDSimilarity(torch.rand(5, 3, 8, 8))


def test_bad_thresholds_are_refused():
    with pytest.raises(ValueError, match=r"Argument `threshold` expected a number in \[-1, 1\], but got 1.5"):
        SSCDSimilarity(torch.rand(5, 3, 8, 8), threshold=1.5)
