import copy
import pickle
import sys
import urllib.error

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torchvision import transforms

from lightning_iet.functional.neighbors import nearest_neighbors, search_rows
from lightning_iet.metrics import DigitsFeatures, InceptionFeatures, feature_extractor
from lightning_iet.metrics.features import (
    FEATURE_NAMES,
    DigitsClassifier,
    SSCDFeatures,
    TorchScriptFeatures,
    embed_images,
)
from tests.helpers.networks import Means, save_torchscript


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
    with pytest.raises(
        ValueError, match=r"Argument `name` expected 'pixels', .* file \(\.ts\), but got 'resnet'\. For a"
    ):
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


# --- TorchScript, SSCD -----------------------------------------------------------------------------------------------


@pytest.fixture
def means_file(tmp_path):
    """A network whose features are the means of the channels."""
    return save_torchscript(Means(), tmp_path / "means.ts")


def test_a_torchscript_file_gets_the_images_as_they_are(means_file):
    images = torch.randint(256, (5, 3, 7, 9), dtype=torch.uint8)
    expected = (images / 255).mean(dim=(2, 3))
    for given in (images, images / 255):
        torch.testing.assert_close(feature_extractor(means_file)(given), expected)
    torch.testing.assert_close(feature_extractor(str(means_file))(images[:, :1]), expected[:, :1].expand(-1, 3))


def test_resizing_and_normalisation_are_those_of_pillow_and_torchvision(means_file):
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    steps = [transforms.ToPILImage(), transforms.Resize(8), transforms.ToTensor(), transforms.Normalize(mean, std)]
    expected = transforms.Compose(steps)(image).mean(dim=(1, 2))
    features = TorchScriptFeatures(means_file, size=8, mean=mean, std=std)(image[None])[0]
    torch.testing.assert_close(features, expected, rtol=0, atol=0.01)  # Pillow rounds to 256 levels


def test_sscd_is_found_by_path_or_variable(means_file, monkeypatch):
    monkeypatch.delenv("LIGHTNING_IET_SSCD", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"but got None. Get https://.*pass its path .*LIGHTNING_IET_SSCD"
    ) as caught:
        feature_extractor("sscd")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("LIGHTNING_IET_SSCD", str(means_file))
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    for extractor in (feature_extractor("sscd"), feature_extractor("sscd", weights=means_file)):
        assert extractor(torch.ones(2, 3, 8, 8))[0].tolist() == pytest.approx((1 - mean) / std, rel=1e-5)


@pytest.mark.parametrize("kind", [TorchScriptFeatures, SSCDFeatures])
def test_a_torchscript_network_may_be_copied(means_file, kind):
    images = torch.rand(2, 3, 8, 8)
    extractor = kind(means_file)
    for copied in (copy.deepcopy(extractor), pickle.loads(pickle.dumps(extractor))):
        assert torch.equal(copied(images), extractor(images))
        assert not copied.training


def test_missing_and_wrong_torchscript_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"but got .*missing\.ts"):
        feature_extractor(tmp_path / "missing.ts")
    (tmp_path / "text.ts").write_text("no network at all")
    with pytest.raises(ValueError, match=r"expected a TorchScript file, but got .*text\.ts") as caught:
        feature_extractor(tmp_path / "text.ts")
    assert "\n" not in str(caught.value)


def test_a_network_of_one_number_for_all_images_is_refused(tmp_path):
    class Sum(nn.Module):
        def forward(self, images):
            return images.sum()

    extractor = feature_extractor(save_torchscript(Sum(), tmp_path / "sum.ts"))
    with pytest.raises(ValueError, match=r"shape \(N, D\), but .* returned \(\) for 2 images"):
        extractor(torch.rand(2, 3, 4, 4))


# --- EfficientNet, CLIP ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def efficientnet():
    return feature_extractor("efficientnet")


def test_efficientnet_recognises_a_photograph(efficientnet):
    """Sensible weights under the right normalisation: scikit-learn's pictures are a temple and a flower."""
    from sklearn.datasets import load_sample_images

    found = []
    for photograph in load_sample_images().images:
        features = efficientnet(torch.tensor(photograph).permute(2, 0, 1)[None])
        assert features.shape == (1, efficientnet.num_features) == (1, 1280)
        found.append(efficientnet.network._fc(features).argmax().item())
    assert found[0] in (497, 442, 663, 698)  # ImageNet's church, bell cote, monastery, palace
    assert found[1] == 985  # daisy


def test_efficientnet_finds_edited_copies_that_pixels_do_not(efficientnet):
    from sklearn.datasets import load_sample_images

    photograph = torch.tensor(load_sample_images().images[0]).permute(2, 0, 1)
    parts = [photograph[:, y : y + 96, x : x + 96] for y in range(0, 288, 96) for x in range(0, 576, 96)]
    train = torch.stack(parts) / 255
    edited = (0.6 * train.flip(-1)).clamp(0, 1)  # mirrored and darkened
    rows = [embed_images(efficientnet, images) for images in (edited, train)]
    by_features = search_rows(*rows, 1)[1][:, 0]
    by_pixels = nearest_neighbors(edited, train, 1)[1][:, 0]
    hits = [(found == torch.arange(len(train))).sum().item() for found in (by_features, by_pixels)]
    assert hits[0] > hits[1]


def test_wrong_efficientnet_files_are_refused_in_one_line(efficientnet, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "other")
    (tmp_path / "text").write_text("no weights at all")
    for name, reason in (("other", "holds another network's"), ("text", "is no file of weights")):
        with pytest.raises(ValueError, match=f"but got .*{name}, which {reason}. Leave it out") as caught:
            feature_extractor("efficientnet", weights=tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("clip", "transformers", "clip"),
        ("clean-inception", "cleanfid", "inception"),
    ],
)
def test_without_a_package_the_error_names_the_extra(monkeypatch, name, module, extra):
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'lightning-iet\[{extra}\]'"):
        feature_extractor(name)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP of random weights, saved as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=6, image_size=32
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def test_clip_preprocesses_as_its_folder_says(clip_folder):
    transformers = pytest.importorskip("transformers")
    extractor = feature_extractor("clip", weights=clip_folder)
    images = torch.randint(256, (2, 3, 40, 60), dtype=torch.uint8)
    features = extractor(images)
    assert features.shape == (2, extractor.num_features) == (2, 6)
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip_folder)
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    expected = network(**processor(images=arrays, return_tensors="pt")).image_embeds
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(extractor(images / 255), features, rtol=0.02, atol=0.02)


def test_missing_and_wrong_clip_folders_are_refused_in_one_line(tmp_path):
    pytest.importorskip("transformers")
    for folder in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected the folder of a CLIP network, .* but got") as caught:
            feature_extractor("clip", weights=folder)
        assert "\n" not in str(caught.value)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected the folder of a CLIP network, but got .* Save one") as caught:
        feature_extractor("clip", weights=tmp_path)
    assert "\n" not in str(caught.value)


# --- what all share --------------------------------------------------------------------------------------------------


def test_pixels_are_the_pixels():
    images = torch.randint(256, (3, 2, 4, 5), dtype=torch.uint8)
    assert torch.equal(feature_extractor("pixels")(images), images.flatten(1) / 255)
    assert "pixels" in FEATURE_NAMES
    with pytest.raises(ValueError, match="Argument `weights` expected None with name='pixels', but got somewhere"):
        feature_extractor("pixels", weights="somewhere")


def test_embedding_is_the_network_batch_by_batch():
    images = torch.rand(11, 1, 4, 4)
    for batch_size in (1, 4, 11, 100):
        assert torch.equal(embed_images(nn.Flatten(), images, batch_size=batch_size), images.flatten(1))
    assert embed_images(nn.Flatten(), images[:0]).shape == (0, 0)


def test_embedding_stays_float32_under_autocast():
    linear, images = nn.Linear(16, 3), torch.rand(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = embed_images(linear, images)
    assert torch.equal(features, linear(images))
    assert not features.requires_grad


def test_features_that_are_not_finite_are_refused():
    class Broken(nn.Module):
        def forward(self, images):
            return (images.flatten(1) - 0.5).log()

    with pytest.raises(ValueError, match=r"finite features, but got NaN or infinity for 1 of 3 images, .* index 2"):
        embed_images(Broken(), torch.tensor([1.0, 0.9, 0.1]).reshape(3, 1, 1, 1))
