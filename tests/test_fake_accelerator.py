"""Steps on an accelerator that is not there: tensors without values, which refuse to be mixed with those of the host.

They also raise where a value is asked for, or a shape depends on one: what would make the host wait.
"""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lightning_iet.audit import features, search
from lightning_iet.audit.disguises import _spectrum, _standardized, _thumbnail
from lightning_iet.audit.features import Features, _Rows, extract
from lightning_iet.audit.reading import ImageSet
from lightning_iet.audit.search import References, nearest_references, views
from lightning_iet.callbacks import ParameterSelection
from lightning_iet.callbacks.anti_gradient_control.sample_record import SampleCounts, SampleDraws, SampleRecords
from lightning_iet.functional.exhaustive_neighbors import ExhaustiveSearch, level_moments
from lightning_iet.functional.memorization import count_below, memorization_ratio, nearest_ratio
from lightning_iet.functional.registration import grey_images
from lightning_iet.metrics.features import EfficientNetFeatures
from tests.helpers.models import tiny_diffusion
from tests.helpers.text_to_image import SIZE, make_module, save_pipelines


def no_values():
    """The mode; tables of a noise schedule are numbers of the host, which are copied."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def put_there(module):
    """Move a module to the accelerator, in a mode for tensors without values."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(there, requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return module


def losses_of(module, batch):
    """Losses by sample of a training step, up to its backward pass, which needs a real accelerator."""
    module.log = lambda *_, **__: None  # there is no trainer
    found = module.training_step(batch, 0)
    assert found["loss"].requires_grad
    assert found["loss"].device == found["sample_loss"].device == found["timesteps"].device
    return found["sample_loss"]


def test_plain_training():
    module = tiny_diffusion()
    with no_values():
        losses = losses_of(put_there(module), [torch.rand(4, *module.image_shape, device="cuda")])
        assert (losses.shape, losses.device.type) == ((4,), "cuda")


@pytest.mark.parametrize("family", ["bias", "norm", "svdiff"])
def test_selected_parameters(family):
    module = tiny_diffusion()
    ParameterSelection(family).apply(module)
    with no_values():
        losses_of(put_there(module), [torch.rand(4, *module.image_shape, device="cuda")])


@pytest.mark.parametrize("family", ["all", "attention", "lora", "difffit"])
def test_text_to_image(tmp_path, family):
    module = make_module(save_pipelines(tmp_path, ["sd1"])["sd1"])
    ParameterSelection(family).apply(module)
    with no_values():
        put_there(module)
        batch = torch.rand(2, 3, SIZE, SIZE, device="cuda"), ["a picture", "another"], torch.arange(2, device="cuda")
        assert losses_of(module, batch).device.type == "cuda"


def test_records_weights_and_paces_of_draws():
    tables = SampleCounts(9), SampleRecords(9), SampleDraws(9)
    with FakeTensorMode():
        counts, records, draws = (put_there(table) for table in tables)
        index, scores = torch.randint(9, (4,), device="cuda"), torch.rand(4, device="cuda")
        absent = torch.zeros(4, dtype=torch.bool, device="cuda")
        counts.update(index, keep=scores > 0.5)
        found = records.update(index, scores, 0.8, absent=absent)
        for members in (None, torch.arange(5, device="cuda")):
            typical = records.typical(members)
            weights = records.update_weights(index, found, typical, 0.3 * draws.pace(index))
            assert weights.device.type == typical.device.type == "cuda"


def test_ratios():
    with FakeTensorMode():
        rows = torch.rand(6, 48, device="cuda")
        ratios = memorization_ratio(rows), nearest_ratio(rows)
        found = [*ratios, *(count_below(part, (0.1, 0.2)) for part in ratios)]
        for values in found:
            assert values.device.type == "cuda"


def test_a_search_among_images_of_8_bits():
    with FakeTensorMode():
        levels = torch.zeros(6, 48, dtype=torch.uint8, device="cuda")
        squares = level_moments(levels)[1]
        distances, indices = ExhaustiveSearch(levels, squares, 3, chunk_size=4, squares=squares).nearest(levels)
        assert (distances.shape, distances.device, indices.device) == ((6, 3), levels.device, levels.device)


def test_features_of_an_audit():
    network = EfficientNetFeatures(size=64)
    with FakeTensorMode():
        rows = _Rows("efficientnet", put_there(network), "cuda")(torch.zeros(6, 1, 28, 28, dtype=torch.uint8))
        assert (rows.shape, rows.device.type) == ((6, 1280), "cuda")


def test_neighbours_by_a_networks_features(tmp_path, monkeypatch):
    """Of an image as it is, whose features are at hand, and of its mirror image."""

    def on_one_device(queries, references, k, *, norms, **_):
        assert queries.device == references.device == norms.device
        return queries[:, :k], torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)

    def at_once(_, keys, compute, *, total, **__):
        return [compute(slice(0, total), lambda done: None)]

    for module in (features, search):
        monkeypatch.setattr(module, "in_blocks", at_once)
        monkeypatch.setattr(module, "check_finite", lambda *_, **__: None)  # which reads values
    monkeypatch.setattr(search, "search_rows", on_one_device)
    with FakeTensorMode():
        images = ImageSet(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), list("abcdef"), "train", "0")
        network = Features("network", "", lambda part: torch.rand(len(part), 48, device="cuda"), "cuda")
        shared = {"features": network, "cache": None, "argument": "train"}
        rows = extract(images, network, None, argument="train")
        references = References.of(rows, images.sha256)
        found = nearest_references(images, references, k=3, views=views("flip"), rows=rows, **shared)
        assert (found.indices.shape, found.indices.device.type) == ((6, 3), "cpu")


def test_what_disguised_copies_are_searched_by():
    with FakeTensorMode():
        grey = grey_images(torch.zeros(3, 3, 80, 60, dtype=torch.uint8, device="cuda"), (32, 32))
        for rows in (_spectrum(grey), _thumbnail(grey), _standardized(grey.flatten(1))):
            assert rows.device.type == "cuda"
