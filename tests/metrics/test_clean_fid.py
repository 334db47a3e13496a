import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from lightning_iet.functional.mifid import frechet_distance, moments, moments_of_sums
from lightning_iet.metrics import CleanFID, feature_extractor
from lightning_iet.metrics.features import CleanInceptionFeatures, embed_images
from tests.helpers.networks import Means, random_inception, save_torchscript

pytest.importorskip("cleanfid.fid")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    return random_inception(tmp_path_factory.mktemp("inception") / "inception-2015-12-05.pt")


@pytest.fixture(scope="module")
def sets():
    """Two sets of small images, one with a gradient on it."""
    draw = torch.Generator().manual_seed(0)
    real, generated = torch.randint(256, (2, 3, 3, 20, 24), dtype=torch.uint8, generator=draw)
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


def root_of_low_rank(matrix, disp=False):
    """scipy's `sqrtm` of a matrix of a few images' features, which takes that one most of a minute.

    It is L Rᵀ with as many columns as its rank; (L C Rᵀ)² is the same if C² is the inverse of Rᵀ L.
    """
    draw = np.random.default_rng(0)
    columns, _ = np.linalg.qr(matrix @ draw.standard_normal((len(matrix), 32)))
    left, values, right = np.linalg.svd(columns.T @ matrix, full_matrices=False)
    rank = int((values > 1e-12 * values[0]).sum())
    left, right = columns @ left[:, :rank] * values[:rank], right[:rank]
    np.testing.assert_allclose(left @ right, matrix, rtol=0, atol=1e-9 * np.abs(matrix).max())
    root = left @ scipy.linalg.sqrtm(np.linalg.inv(right @ left)) @ right
    np.testing.assert_allclose(root @ root, matrix, rtol=0, atol=1e-9 * np.abs(matrix).max())
    return root, 0.0


def test_equals_clean_fid_on_the_same_folders(weights, sets, folders, monkeypatch):
    from cleanfid import fid
    from cleanfid.inception_torchscript import InceptionV3W

    monkeypatch.setattr(fid, "linalg", SimpleNamespace(sqrtm=root_of_low_rank))
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
        for batch in images.split(2):
            metric.update(batch, real=real)
    assert expected > 0
    assert metric.compute().item() == pytest.approx(expected, rel=1e-3)
    rows = []  # the other way to the same moments
    for images, name in zip(sets, ("real", "fake"), strict=True):
        count, total, products = (
            getattr(metric, f"{name}_features_{part}") for part in ("num_samples", "sum", "cov_sum")
        )
        rows.append(embed_images(metric.inception, images, batch_size=2))
        for found, of_metric in zip(moments(rows[-1]), moments_of_sums(count, total, products), strict=True):
            torch.testing.assert_close(found, of_metric, rtol=1e-5, atol=1e-8)
    axes, _ = torch.linalg.qr(torch.cat(rows).double().T)  # as many as images, in which distances are the same
    by_features = (moments(features.double() @ axes) for features in rows)
    assert frechet_distance(*by_features).item() == pytest.approx(expected, rel=1e-3)


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
