import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.generator import Generator
from lightning_iet.audit.losses import Probing, measure_losses
from lightning_iet.audit.reading import image_set
from lightning_iet.evaluation.membership import choose_images, infer_membership, noise_of, spread_timesteps
from tests.helpers.digit_models import digit_pixels, fresh_model, overfitted_model


def losses(model, pixels, folder, **probing):
    settings = {"timesteps": 5, "batch_size": 7}
    return measure_losses(
        Generator(model, "model", "hash", use_ema=True),
        image_set(pixels, location="images"),
        Probing(**settings | probing),
        cache=BlockCache(folder),
        argument="train",
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_losses_equal_those_of_the_images_one_by_one(tmp_path, prediction_type):
    model, pixels = fresh_model(prediction_type=prediction_type), digit_pixels(0, 10)
    found = losses(model, pixels, tmp_path)
    assert found.shape == (10, 5)
    with torch.no_grad():
        for index, image in enumerate(pixels):
            for draw, timestep in enumerate((10, 30, 50, 70, 90)):
                noise = noise_of(index, draw, image.shape, seed=0)[None]
                expected = model.losses(image[None] / 255, torch.tensor([timestep]), noise, use_ema=True)
                torch.testing.assert_close(found[index, draw], expected[0], rtol=1e-4, atol=1e-6)


def test_noise_is_that_of_the_position_and_the_draw(tmp_path):
    first, again = (noise_of(3, 1, torch.Size([1, 2, 2]), seed=0) for _ in range(2))
    assert torch.equal(first, again)
    for index, draw, seed in ((4, 1, 0), (3, 2, 0), (3, 1, 1)):
        assert not torch.equal(first, noise_of(index, draw, first.shape, seed=seed))
    model, pixels = fresh_model(), digit_pixels(0, 10)
    whole, part = losses(model, pixels, tmp_path / "a"), losses(model, pixels[:4], tmp_path / "b")
    torch.testing.assert_close(whole[:4], part)


def test_some_of_the_images_keep_their_noise(tmp_path):
    model, pixels = fresh_model(), digit_pixels(0, 20)
    places = choose_images(20, 6)
    assert len(places.unique()) == 6
    torch.testing.assert_close(
        losses(model, pixels, tmp_path, images=6), losses(model, pixels, tmp_path / "all")[places]
    )


def test_finished_blocks_are_not_measured_again(tmp_path, monkeypatch):
    model, pixels = fresh_model(), digit_pixels(0, 20)
    whole = losses(model, pixels, tmp_path)
    monkeypatch.setattr(model, "losses", None)
    assert torch.equal(losses(model, pixels, tmp_path), whole)
    with pytest.raises(TypeError):
        losses(model, pixels, tmp_path, seed=1)


@given(st.integers(1, 200), st.integers(1, 1000))
def test_timesteps_are_the_middles_of_equal_parts(count, total):
    found = spread_timesteps(count, total).tolist()
    assert len(found) == min(count, total)
    assert found == sorted(set(found))
    assert 0 <= found[0] <= found[-1] < total
    part = total / len(found)
    assert all(-1e-9 < (index + 0.5) * part - step < 1 for index, step in enumerate(found))


def test_a_model_that_has_memorized_is_told_from_a_fresh_one(tmp_path):
    train, held_out = digit_pixels(0, 6), digit_pixels(100, 300)
    more = digit_pixels(0, 100)
    found = [
        infer_membership(
            losses(model, images, tmp_path / name / "train", timesteps=10, batch_size=256),
            losses(model, held_out, tmp_path / name / "held_out", timesteps=10, batch_size=256),
            spread_timesteps(10, 100),
        )
        for name, model, images in (("fresh", fresh_model(), more), ("overfitted", overfitted_model(train), train))
    ]
    assert found[0].auc_low < 0.5 < found[0].auc_high
    assert abs(found[0].auc - 0.5) < 0.1
    assert found[1].auc > 0.9
    assert found[1].auc_low > 0.8
    early = found[1].timesteps[0]
    assert 0 < early.low < early.gap < early.high
