import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import nn

from lightning_iet import DiffusionModule
from tests.helpers.digit_models import drawn
from tests.helpers.models import tiny_diffusion, tiny_dit, tiny_unet


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("unet", [{}, {"in_channels": 3, "out_channels": 3, "sample_size": (4, 8)}])
def test_a_pipeline_draws_our_images_before_and_after_saving(tmp_path, sampler, unet):
    module = tiny_diffusion(unet=unet | {"dropout": 0.5}, channels_last=True).train()
    with torch.no_grad():
        module.ema.module.conv_in.bias += 1  # the averaged weights are others
    pipeline = module.pipeline(sampler=sampler)
    ours = module.sample(5, seed=4, sampler=sampler, num_inference_steps=3)[2:]
    torch.testing.assert_close(drawn(pipeline, [2, 3, 4], seed=4), ours, rtol=1e-5, atol=1e-5)
    pipeline.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler])
    assert torch.equal(drawn(loaded, [2, 3, 4], seed=4), drawn(pipeline, [2, 3, 4], seed=4))


def test_the_weights_themselves_and_weights_of_its_own():
    module = tiny_diffusion()
    with torch.no_grad():
        module.unet.conv_in.bias += 1
    pipeline = module.pipeline(use_ema=False)
    before = pipeline.unet.conv_in.bias.clone()
    assert torch.equal(before, module.unet.conv_in.bias)
    with torch.no_grad():
        module.unet.conv_in.bias += 1
    assert torch.equal(pipeline.unet.conv_in.bias, before)
    assert module.unet.conv_in.bias.requires_grad
    assert module.unet.training


@pytest.mark.parametrize("make", [lambda: tiny_unet(num_class_embeds=11), tiny_dit])
def test_a_class_conditional_pipeline_is_loadable(tmp_path, make):
    module = DiffusionModule(make(), ema_decay=0.9)
    module.pipeline().save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    images, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 3]), torch.tensor([1, 10])
    with torch.no_grad():
        expected = module.eval()(images, t, labels)
        assert torch.equal(loaded.unet(images, t, class_labels=labels).sample, expected)


def test_other_denoisers_make_no_pipeline():
    with pytest.raises(TypeError, match=r"UNet2DModel or DiTTransformer2DModel .* but got Conv2d"):
        DiffusionModule(nn.Conv2d(1, 1, 1)).pipeline()
