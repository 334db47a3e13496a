import pytest

from lightning_iet.tools.sample import sample
from tests.helpers.digit_models import save_checkpoint
from tests.helpers.models import tiny_diffusion


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(tiny_diffusion(), folder / "plain.ckpt")
    save_checkpoint(tiny_diffusion(unet={"num_class_embeds": 4}, label_dropout=0.1), folder / "classes.ckpt")
    return folder


def images(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]


def test_labels_and_guidance_reach_the_images(checkpoints, tmp_path):
    settings = {"num_samples": 3, "num_inference_steps": 2, "device": "cpu"}
    in_turn = sample(checkpoints / "classes.ckpt", out=tmp_path / "in_turn", **settings)
    listed = sample(checkpoints / "classes.ckpt", out=tmp_path / "listed", labels=[0, 1, 2], **settings)
    one = sample(checkpoints / "classes.ckpt", out=tmp_path / "one", labels=1, **settings)
    guided = sample(checkpoints / "classes.ckpt", out=tmp_path / "guided", labels=1, guidance_scale=5.0, **settings)
    assert images(in_turn) == images(listed)
    assert [a == b for a, b in zip(images(in_turn), images(one), strict=True)] == [False, True, False]
    assert images(guided) != images(one)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("plain", {"labels": 1}, "`labels` expected none for a denoiser without conditions, but got 1"),
        ("plain", {"guidance_scale": 2.0}, "`guidance_scale` expected 1 .* but got 2.0"),
        ("plain", {"prompts": ["a dog"]}, r"`prompts` expected none for a DiffusionModule, but got \['a dog'\]"),
        ("classes", {"labels": 3}, "class labels 0 … 2, but got 3"),
    ],
)
def test_options_that_a_model_does_not_take(checkpoints, tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        sample(checkpoints / f"{name}.ckpt", num_samples=2, out=tmp_path / "out", num_inference_steps=2, **options)
