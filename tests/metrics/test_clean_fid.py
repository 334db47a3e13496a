import warnings

import pytest
import torch
from PIL import Image

from lightning_iet.functional.mifid import frechet_distance, moments
from lightning_iet.metrics import CleanFID, feature_extractor
from lightning_iet.metrics.features import CleanInceptionFeatures, embed_images
from tests.helpers.networks import Means, random_inception, save_torchscript

pytest.importorskip("cleanfid.fid")
pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    return random_inception(tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt")


@pytest.fixture(scope="module")
def sets():
    """Two sets of small images, one with a gradient on it."""
    draw = torch.Generator().manual_seed(0)
    real, generated = torch.randint(256, (2, 5, 3, 20, 24), dtype=torch.uint8, generator=draw)
    return real, (generated * torch.linspace(0.2, 1, 24)).byte()


@pytest.fixture(scope="module")
def folders(sets, tmp_path_factory):
    """The same as PNG files."""
    paths = []
    for images in sets:
        folder = tmp_path_factory.mktemp("images")
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
        paths.append(str(folder))
    return paths


def test_equals_clean_fid_on_the_same_folders(weights, sets, folders):
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clean-fid is of 2022
        expected = fid.compute_fid(
            *folders,
            custom_feat_extractor=InceptionV3W(str(weights.parent), download=False),
            num_workers=0,
            device=torch.device("cpu"),
            verbose=False,
        )
    metric = CleanFID(weights)
    for images, real in zip(sets, (True, False), strict=True):
        for batch in images.split(3):
            metric.update(batch, real=real)
    assert expected > 0
    assert metric.compute().item() == pytest.approx(expected, rel=1e-3)
    features = [embed_images(metric.inception, images, batch_size=3) for images in sets]
    assert frechet_distance(*map(moments, features)).item() == pytest.approx(expected, rel=1e-3)


def test_grey_and_float_images_are_what_files_would_hold(weights, sets):
    extractor = CleanInceptionFeatures(weights)
    grey = sets[0][:2, :1]
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(extractor(grey / 255), extractor(grey))
    assert extractor(grey).shape == (2, extractor.num_features) == (2, 2048)


def test_a_copy_of_the_metric_has_the_same_network_and_images(weights, sets):
    metric = CleanFID(weights)
    metric.update(sets[0][:2], real=True)
    copied = metric.clone()
    assert torch.equal(copied.inception(sets[1][:2]), metric.inception(sets[1][:2]))
    assert torch.equal(copied.real_features_sum, metric.real_features_sum)
    assert copied.real_features_num_samples == 2


def test_nothing_is_downloaded_and_wrong_files_are_refused_in_one_line(tmp_path):
    for make in (CleanFID, lambda: feature_extractor("clean-inception")):
        with pytest.raises(FileNotFoundError, match=r"but got None\. Get https://.*\.pt and pass its path") as caught:
            make()
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt\. Get https://"):
        CleanFID(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=r"which holds another network\. Get https://"):
        CleanFID(save_torchscript(Means(), tmp_path / "other.pt"))
