import pytest
import torch

from lightning_iet.modules.pretrained import load_any_module
from tests.helpers.digit_models import save_checkpoint
from tests.helpers.models import tiny_diffusion


def test_the_class_is_that_which_the_checkpoint_names(tmp_path, monkeypatch):
    module = tiny_diffusion(unet={"num_class_embeds": 3})
    save_checkpoint(module, tmp_path / "model.ckpt")
    loaded = load_any_module(tmp_path / "model.ckpt")
    assert loaded.conditioning == module.conditioning
    assert torch.equal(loaded.sample(2, num_inference_steps=2), module.sample(2, num_inference_steps=2))


def test_a_checkpoint_from_before_there_were_several(tmp_path):
    save_checkpoint(tiny_diffusion(), tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    for name in ("module", "num_classes", "label_dropout", "guidance_scale"):
        del checkpoint["specification"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert load_any_module(tmp_path / "old.ckpt").conditioning is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"specification": {"module": "Evil"}}, "which is one of a Evil"),
        ({"specification": {}}, "expected the denoiser of"),
        ([1], "which holds a list"),
    ],
)
def test_other_files_are_one_line(tmp_path, content, message):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        load_any_module(tmp_path / "other.ckpt")
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_one_line(tmp_path):
    module = tiny_diffusion()
    save_checkpoint(module, tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    checkpoint["specification"]["unet"]["config"]["block_out_channels"] = [16]
    torch.save(checkpoint, tmp_path / "model.ckpt")
    with pytest.raises(
        ValueError, match=r"^The checkpoint expected another architecture, but got \d+ of \d+ weights that differ"
    ):
        load_any_module(tmp_path / "model.ckpt")
