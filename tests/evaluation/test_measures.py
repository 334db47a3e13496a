import torch
from torch import nn

from lightning_iet.evaluation.measures import ImageMeasures
from lightning_iet.metrics import PrecisionRecall


def test_what_compares_with_the_reference_is_known_by_what_it_takes():
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    metrics = {
        name: PrecisionRecall(nn.Flatten(), reset_real_features=False) for name in ("precision_recall", "another")
    }
    found = ImageMeasures(metrics, images[:30]).measure(images[30:])
    assert found["another_precision"] == found["precision"]
    assert found["another_recall"] == found["recall"]
