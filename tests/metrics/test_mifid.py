import pytest
import torch

from lightning_iet.functional.mifid import mifid
from lightning_iet.metrics import MiFID, feature_extractor, frechet_distance


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_equals_the_function_on_the_features(threshold):
    generated, train = torch.rand(2, 80, 1, 8, 8)
    metric = MiFID(train, features="digits", threshold=threshold)
    for batch in generated.split(30):
        metric.update(batch)
    network = feature_extractor("digits")
    expected = mifid(network(generated), network(train), threshold=threshold)
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-4)


def test_without_a_penalty_it_is_the_frechet_distance_of_torchmetrics():
    generated, train = torch.rand(80, 1, 8, 8), torch.rand(80, 1, 8, 8) ** 2
    metric, plain = MiFID(train, features="digits", threshold=0), frechet_distance("digits")
    metric.update(generated)
    plain.update(train, real=True)
    plain.update(generated, real=False)
    assert metric.compute().item() == pytest.approx(plain.compute().item(), rel=1e-3)


def test_a_generator_that_emits_one_training_image_is_punished():
    train = torch.rand(50, 1, 8, 8)
    values = []
    for threshold in (0.0, 0.001):
        metric = MiFID(train, features="pixels", threshold=threshold)
        metric.update(train[:1].expand(20, -1, -1, -1))
        values.append(metric.compute().item())
    assert values[1] > 1e10 * values[0] > 0


def test_a_perfect_copier_gets_infinity_not_zero():
    train = torch.rand(60, 1, 4, 4)
    metric = MiFID(train, features="pixels", threshold=0.001)
    for batch in train[torch.randperm(60)].split(11):
        metric.update(batch)
    assert metric.compute().isinf()
    metric.reset()
    metric.update(torch.rand(60, 1, 4, 4))
    assert metric.compute().isfinite()


@pytest.mark.parametrize("num", [0, 1])
@pytest.mark.filterwarnings("ignore:MiFID has seen no generated images")
def test_fewer_than_two_images_have_no_covariance(num):
    metric = MiFID(torch.rand(5, 1, 8, 8), features="digits")
    metric.update(torch.rand(num, 1, 8, 8))
    assert metric.compute().isnan()


def test_everything_follows_the_device():
    metric = MiFID(torch.rand(5, 1, 8, 8), features="digits").to("meta")
    tensors = [metric.train_rows, metric.train_norms, *metric.train_moments, metric.products]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
