"""Pipelines that cannot be fine-tuned are refused in one line."""

import json

import huggingface_hub
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from lightning_iet.modules import TextToImageModule
from lightning_iet.modules.pipelines import load_pipeline, synthetic_pipeline
from tests.helpers.models import tiny_unet
from tests.helpers.single_files import write_single_file


@pytest.fixture
def folder(tmp_path):
    synthetic_pipeline(image_size=16, vae_scale=2).save_pretrained(tmp_path / "sd")
    return tmp_path / "sd"


def refuses(pretrained, message, kind=ValueError):
    with pytest.raises(kind, match=message) as error:
        TextToImageModule(pretrained)
    assert len(str(error.value).splitlines()) == 1


def test_parts_come_in_single_precision_whatever_they_were_saved_in(folder):
    load_pipeline(folder).to(dtype=torch.float16).save_pretrained(folder)
    pipeline = load_pipeline(folder)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


def test_parts_of_which_only_the_half_precision_is_there(folder):
    pipeline = load_pipeline(folder)
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    pipeline.save_pretrained(folder, variant="fp16")
    loaded = load_pipeline(folder)
    for part in ("unet", "vae", "text_encoder"):
        weights, expected = getattr(loaded, part).state_dict(), getattr(pipeline, part).state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("part", ["unet", "vae", "tokenizer"])
def test_a_part_that_is_missing(folder, part):
    (folder / part).rename(folder / "elsewhere")
    refuses(folder, rf"expected a StableDiffusionPipeline with .* but got '.*sd' without {part}\.")


def test_an_index_without_a_unet(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": [None, None]}))
    refuses(folder, r"without unet\. Give a complete pipeline")


def test_a_unet_that_lacks_weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file)
    refuses(folder, r"expected a complete StableDiffusionPipeline, .* lacks 1 weights, conv_in\.weight the first")


def test_a_damaged_file(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    refuses(folder, "expected a complete StableDiffusionPipeline, but got")


def test_a_pipeline_of_another_class(tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    refuses(tmp_path, "expected a pipeline of class .* of class DDPMPipeline. Use DiffusionModule")


def test_a_folder_of_something_else(folder):
    refuses(folder / "unet", r"expected a folder with a diffusers pipeline, .* without a model_index\.json")


@pytest.mark.parametrize("pretrained", ["./nowhere", "/no/where", "nowhere"])
def test_no_such_folder(pretrained):
    refuses(pretrained, "which is no folder. Check the path", FileNotFoundError)


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks.*")  # diffusers' own
def test_a_hub_id_without_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuses(
        "nobody/nothing-of-the-kind", "could not be had from the hub .*offline.* give a local path", FileNotFoundError
    )


def test_nothing_at_all():
    refuses(None, "`pretrained` expected a folder .*, but got none. Give one, or try without: synthetic=true")


def as_one_file(folder):
    """Weights in one file, and the folder of the pipeline without weights."""
    pipeline = load_pipeline(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    write_single_file(pipeline, folder / "model.safetensors")
    return pipeline, folder / "model.safetensors"


def test_a_single_file_beside_the_configuration_of_its_parts(folder):
    pipeline, file = as_one_file(folder)
    loaded = load_pipeline(file)
    assert type(loaded) is type(pipeline)
    for part in ("unet", "vae", "text_encoder"):
        weights, expected = getattr(loaded, part).state_dict(), getattr(pipeline, part).state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    module = TextToImageModule(str(file), lora_rank=2)
    assert module.sample(1, prompts=["a dog"], num_inference_steps=1).shape == (1, 3, 16, 16)


def test_a_single_file_that_lacks_weights_or_is_another(folder, tmp_path):
    _, file = as_one_file(folder)
    weights = load_file(file)
    lacking = {name: weight for name, weight in weights.items() if not name.endswith("input_blocks.0.0.weight")}
    save_file(lacking, file)
    refuses(file, r"expected a single file of Stable Diffusion, but got")
    save_file({name: weight for name, weight in weights.items() if name.startswith("first_stage")}, file)
    refuses(file, "which holds no U-Net in its original form")
    (tmp_path / "x.ckpt").write_bytes(b"pickled")
    refuses(tmp_path / "x.ckpt", r"it is no \.safetensors file")


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks.*")  # diffusers' own
def test_a_single_file_alone_without_network(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _, file = as_one_file(folder)
    alone = file.rename(tmp_path / "alone.safetensors")
    refuses(alone, r"with the configuration of its parts, .* Put model_index.json and the folders", FileNotFoundError)
