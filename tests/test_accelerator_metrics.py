"""Metrics on an accelerator that the CPU stands in for: it finds what the CPU finds, and keeps nothing on the host.

These wait, once for each batch or set: pixels are checked to lie in [0, 1], and results are read.
"""

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_iet.evaluation.measures import ImageMeasures, MembershipMeasure
from lightning_iet.evaluation.memorization import measure_closeness
from lightning_iet.functional.text_norm import text_norm
from lightning_iet.metrics import (
    AverageMinimumDistance,
    DensityCoverage,
    ExtractionAttack,
    MemorizedFraction,
    MemorizedQuantity,
    MiFID,
    NearestTrainingDistance,
    PrecisionRecall,
    SSCDSimilarity,
)
from lightning_iet.metrics.membership_inference import MembershipInference
from tests.helpers.accelerator import DEVICE, accelerator
from tests.helpers.models import Pictures, tiny_diffusion


class Features(nn.Module):
    """Eight sums of pixels."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) - 0.5)

    def forward(self, images):
        return images.flatten(1).float() @ self.weights


def images(number, seed=0):
    return torch.rand(number, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


TRAIN = images(20)
GENERATED = torch.cat([images(12, seed=1), TRAIN[:3], TRAIN[:1], TRAIN[:1] + 1e-4]).clamp(0, 1)
METRICS = {
    "memorized_fraction": lambda: MemorizedFraction(TRAIN),
    "memorized_fraction_of_groups": lambda: MemorizedFraction(TRAIN, duplicates="group"),
    "memorized_quantity": lambda: MemorizedQuantity(TRAIN, k=5),
    "average_minimum_distance": lambda: AverageMinimumDistance(TRAIN, features=Features()),
    "extraction_attack": lambda: ExtractionAttack(TRAIN, min_size=2),
    "mifid": lambda: MiFID(TRAIN, features=Features()),
    "nearest_training_distance": lambda: NearestTrainingDistance(TRAIN),
    "sscd_similarity": lambda: SSCDSimilarity(TRAIN, features=Features()),
    "precision_recall": lambda: PrecisionRecall(Features(), reset_real_features=False),
    "density_coverage": lambda: DensityCoverage(Features(), reset_real_features=False),
    "frechet_distance": lambda: FrechetInceptionDistance(Features(), reset_real_features=False, normalize=True),
}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("name", METRICS)
def test_an_evaluation_finds_the_same(name):
    reference = images(15, seed=2)
    measured = ImageMeasures({name: METRICS[name]()}, reference)
    expected = measured.measure(GENERATED)
    with accelerator():
        there = ImageMeasures({name: METRICS[name]()}, reference)
        there.to(DEVICE)
        found = there.measure(GENERATED)
        states = [getattr(there.metrics[name], state) for state in there.metrics[name]._defaults]
        rows = [tensor for state in states for tensor in (state if isinstance(state, list) else [state])]
        assert {tensor.device for tensor in rows} == {DEVICE}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_membership_inference():
    losses = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))

    def measure(device):
        metric = MembershipInference().to(device)
        for part, member in zip(losses.to(device), (True, False), strict=True):
            metric.update(part, member=member)
        found = metric.compute()
        assert {value.device for value in found.values()} == {torch.device(device)}
        return {name: float(value) for name, value in found.items()}

    expected = measure("cpu")
    with accelerator():
        assert measure(DEVICE) == expected


def test_losses_of_a_model_and_closeness_of_images():
    data, module = Pictures(6), tiny_diffusion(unet={"sample_size": 4})
    expected = MembershipMeasure(data, data)(module, use_ema=True)
    closest = measure_closeness(GENERATED, TRAIN, 5, mirrored=True)
    with accelerator():
        found = MembershipMeasure(data, data)(module.to(DEVICE), use_ema=True)
        close = measure_closeness(GENERATED, TRAIN.to(DEVICE), 5, mirrored=True)
    assert found == pytest.approx(expected)
    assert close.nearest.tolist() == closest.nearest.tolist()
    assert close.ratio.tolist() == pytest.approx(closest.ratio.tolist(), rel=1e-5, abs=1e-7)


def test_text_norm_needs_no_value():
    rows = torch.rand(2, 4, 6)
    with accelerator() as waits:
        found = text_norm(*(part.to(DEVICE, non_blocking=True) for part in rows))
        assert (found.device, waits.total()) == (DEVICE, 0)
        assert found.tolist() == text_norm(*rows).tolist()


def test_images_are_sampled_as_on_the_cpu():
    module = tiny_diffusion()
    expected = module.sample(3, num_inference_steps=2)
    with accelerator():
        found = module.to(DEVICE).sample(3, num_inference_steps=2)
    assert torch.equal(found, expected)
