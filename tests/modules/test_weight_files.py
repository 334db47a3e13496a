import pytest

from lightning_iet.modules.pretrained import which_weights


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["diffusion_pytorch_model.safetensors"], {"variant": None, "use_safetensors": True}),
        (["diffusion_pytorch_model.bin"], {"variant": None, "use_safetensors": False}),
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"],
         {"variant": None, "use_safetensors": True}),
        (["diffusion_pytorch_model.fp16.bin"], {"variant": "fp16", "use_safetensors": False}),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], {"variant": "fp16", "use_safetensors": True}),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], {"variant": None, "use_safetensors": True}),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "text/model.fp16.safetensors"],
         {"variant": "fp16", "use_safetensors": True}),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "text/model.safetensors"],
         {"variant": "fp16", "use_safetensors": True}),
        (["unet/diffusion_pytorch_model.safetensors", "text/pytorch_model.bin"], {"variant": None}),
        (["config.json", "optimizer.bin"], {}),
    ],
)  # fmt: skip
def test_what_is_asked_for(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert which_weights(tmp_path) == expected


def test_parts_of_different_variants_are_refused(tmp_path):
    for name in ("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bf16.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="variants bf16, fp16 and no plain ones"):
        which_weights(tmp_path)
