import sys
import urllib.error

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from lightning_iet.metrics import DigitsFeatures, InceptionFeatures, feature_extractor
from lightning_iet.metrics.features import DigitsClassifier


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture
def shipped():
    from importlib.resources import files

    return files("lightning_iet.metrics") / "weights" / "digits_features.safetensors"


def test_shipped_weights_are_small_and_as_accurate_as_they_say(digits, shipped):
    assert shipped.stat().st_size < 500_000
    with safe_open(shipped, "pt") as file:
        accuracy = float(file.metadata()["test_accuracy"])
    _, images, _, labels = train_test_split(*digits, stratify=digits[1], test_size=0.5, random_state=0)
    hits = DigitsFeatures().classifier(images).argmax(1) == labels
    assert hits.float().mean().item() == pytest.approx(accuracy, abs=1e-4)
    assert accuracy >= 0.985


def test_features_are_the_penultimate_layer(digits):
    extractor = DigitsFeatures()
    features = extractor(digits[0][:50])
    assert features.shape == (50, extractor.num_features) == (50, 64)
    torch.testing.assert_close(extractor.classifier.head(features), extractor.classifier(digits[0][:50]))


def test_uint8_equals_float(digits):
    images = (digits[0][:50] * 255).round().byte()
    extractor = DigitsFeatures()
    assert torch.equal(extractor(images), extractor(images / 255))


def test_extractor_is_frozen_and_the_same_in_training_mode(digits):
    extractor = DigitsFeatures()
    before = extractor(digits[0][:5])
    assert not before.requires_grad
    assert torch.equal(extractor.train()(digits[0][:5]), before)


def test_extractor_follows_a_dtype(digits):
    features = DigitsFeatures().double()(digits[0][:5])
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.float(), DigitsFeatures()(digits[0][:5]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 16, 16), ValueError, r"shape \(N, 1, 8, 8\), but got \(2, 1, 16, 16\)"),
        (torch.zeros(2, 3, 8, 8), ValueError, r"shape \(N, 1, 8, 8\), but got \(2, 3, 8, 8\)"),
        (torch.full((2, 1, 8, 8), -1.0), ValueError, r"in \[0, 1\], but got values from -1 to -1"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int32), TypeError, "uint8 or floating point, but got torch.int32"),
    ],
)
def test_images_that_are_no_digits_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        DigitsFeatures()(images)


def test_weights_of_ones_own(tmp_path, digits):
    classifier = DigitsClassifier()
    save_file(classifier.state_dict(), tmp_path / "own.safetensors")
    extractor = feature_extractor("digits", weights=str(tmp_path / "own.safetensors"))
    torch.testing.assert_close(extractor(digits[0][:5]), classifier.body(digits[0][:5]).detach())


def bad_files(folder):
    (folder / "text").write_text("no weights at all")
    (folder / "empty").touch()
    save_file({"a": torch.zeros(3)}, folder / "other names")
    save_file(DigitsClassifier(num_features=32).state_dict(), folder / "other shapes")
    return ["text", "empty", "other names", "other shapes"]


def test_missing_and_wrong_weight_files_are_refused_in_one_line(tmp_path):
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="Argument `weights` expected an existing file, but got") as caught:
            feature_extractor("digits", weights=path)
        assert "\n" not in str(caught.value)
    for name in bad_files(tmp_path):
        with pytest.raises(ValueError, match=f"but got .*{name}, which holds something else. Leave it out") as caught:
            feature_extractor("digits", weights=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="Argument `name` expected 'digits' or 'inception', but got 'resnet'"):
        feature_extractor("resnet")


# --- Inception -------------------------------------------------------------------------------------------------------


def test_without_torch_fidelity_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-iet\[inception\]'"):
        feature_extractor("inception")


@pytest.fixture
def inception():
    return pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture
def no_network(inception, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(inception, "load_state_dict_from_url", refuse)


@pytest.fixture
def inception_weights(inception, tmp_path, monkeypatch):
    """A file of random weights, with the right names and shapes."""
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # slow, and random will do
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


@pytest.mark.usefixtures("no_network")
def test_inception_reads_a_local_file(inception_weights):
    extractor = feature_extractor("inception", weights=inception_weights)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    features = extractor(grey)
    assert features.shape == (1, extractor.num_features) == (1, 2048)
    assert torch.equal(extractor(grey.repeat(1, 3, 1, 1) / 255), features)
    with pytest.raises(ValueError, match=r"shape \(N, 3, H, W\) or \(N, 1, H, W\), but got \(1, 2, 16, 16\)"):
        extractor(grey.repeat(1, 2, 1, 1))


@pytest.mark.usefixtures("no_network")
def test_nothing_is_downloaded_unasked():
    with pytest.raises(
        FileNotFoundError, match=r"but got None. Get https://.*\.pth and pass .* download=True"
    ) as caught:
        feature_extractor("inception")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_a_failed_download_is_one_line():
    with pytest.raises(ConnectionError, match=r"could not be downloaded \(.*no network.*\). Get https://") as caught:
        InceptionFeatures(download=True)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_missing_and_wrong_inception_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.pth\. Get https://"):
        feature_extractor("inception", weights=tmp_path / "missing.pth")
    (tmp_path / "text").write_text("no weights at all")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other")
    torch.save([torch.zeros(3)], tmp_path / "list")
    for name, reason in (
        ("text", "is no file of weights"),
        ("other", "holds another network's"),
        ("list", "holds another network's"),
    ):
        with pytest.raises(ValueError, match=f"but got .*{name}, which {reason}") as caught:
            feature_extractor("inception", weights=tmp_path / name)
        assert "\n" not in str(caught.value)
