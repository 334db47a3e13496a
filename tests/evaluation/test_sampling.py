"""Images from modules of other projects: found by themselves, or the lines to write are shown."""

import inspect

import lightning.pytorch as pl
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
)

from lightning_iet.callbacks.evaluation import Evaluation
from lightning_iet.evaluation.sampling import find_sample
from lightning_iet.functional.seeding import derive_seed
from tests.helpers.evaluations import Copier, fit
from tests.helpers.models import tiny_unet

SETTINGS = {"sampler": "ddim", "num_inference_steps": 3, "use_ema": False}


class Project(pl.LightningModule):
    """Trains a U-Net of diffusers with a loss of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = tiny_unet()

    def training_step(self, batch, batch_idx):
        images = 2 * batch[0] - 1
        noise, t = torch.randn_like(images), torch.randint(1000, (len(images),))
        noisy = DDPMScheduler().add_noise(images, noise, t)
        return (self.unet(noisy, t).sample - noise).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.unet.parameters(), lr=1e-3)


class WithPipeline(Project):
    def __init__(self, kind=DDPMPipeline, scheduler=DDPMScheduler):
        super().__init__()
        self.pipe = kind(self.unet, scheduler())


class WithParts(Project):
    def __init__(self):
        super().__init__()
        self.noise_scheduler = DDPMScheduler()
        self.ema_unet = tiny_unet().requires_grad_(False)


class Narrow(WithParts):
    """Its own method takes a number alone."""

    def sample(self, num_images):
        raise AssertionError("called")


def by_diffusers(module, numbers):
    """What diffusers' own pipeline draws from a generator for each image."""
    pipeline = DDIMPipeline(module.unet.eval(), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(derive_seed(5, number)) for number in numbers]
    images = pipeline(len(generators), generators, num_inference_steps=3, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "make",
    [WithPipeline, lambda: WithPipeline(DDIMPipeline, DDIMScheduler), WithParts, Narrow],
    ids=["pipeline", "pipeline of DDIM", "parts", "narrow"],
)
def test_a_pipeline_or_its_parts_are_sampled_as_diffusers_does(make):
    module = make()
    sample, said = find_sample(module)
    images = sample(3, seed=5, start=2, batch_size=2, **SETTINGS)
    torch.testing.assert_close(images, by_diffusers(module, range(2, 5)), rtol=0, atol=2e-6)
    assert "of the module, with the weights that are trained" in said


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers and NumPy
def test_other_pipelines_are_called_as_they_are():
    module = WithPipeline(DDPMPipeline, DPMSolverMultistepScheduler)
    sample, said = find_sample(module)
    settings = SETTINGS | {"num_inference_steps": 6}
    together = sample(3, seed=5, start=2, batch_size=3, **settings)
    module.pipe.scheduler = DPMSolverMultistepScheduler()  # this one remembers its last steps
    alone = sample(1, seed=5, start=3, batch_size=1, **settings)
    assert together.shape == (3, 1, 8, 8)
    assert 0 <= together.min() < together.max() <= 1
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    assert said.endswith("`sampler` is left to it.")


class Mute(Project):
    pass


class NeedsClasses(Project):
    def __init__(self):
        super().__init__()
        self.pipe = DiTPipeline.__new__(DiTPipeline)


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (Mute, ["Mute has none", "return …"]),
        (NeedsClasses, ["its DiTPipeline `pipe` needs `class_labels`", "self.pipe(class_labels=…, generator=gen"]),
        (type("Short", (Mute,), {"sample": lambda self, n: n}), ["Short has one with other arguments ("]),
        (type("Many", (WithPipeline,), {"second": None}), []),
    ],
)
def test_else_the_lines_to_write_are_shown(make, reasons):
    module = make()
    if not reasons:
        module.second = DDPMPipeline(module.unet, DDPMScheduler())
        reasons = ["Many holds 2 pipelines, `pipe`, `second`"]
    with pytest.raises(TypeError, match="expected a module with a method `sample` to evaluate") as caught:
        find_sample(module)
    message = str(caught.value)
    assert all(reason in message for reason in reasons), message
    lines = message.splitlines()[1:]
    assert len(lines) == 3
    written = {}
    exec("\n".join(["import torch", "class Written:", *lines]).replace("=…", "=0").replace("…", "None"), written)
    inspect.signature(written["Written"]().sample).bind(2, seed=0, start=0, batch_size=1, **SETTINGS)


@pytest.mark.parametrize("make", [WithPipeline, WithParts])
def test_a_denoiser_that_does_not_know_the_size_of_its_images_is_refused(make):
    module = make()
    module.unet.register_to_config(sample_size=None)  # the default of UNet2DModel
    with pytest.raises(TypeError, match="without `sample_size`: set it to the height and width of the images"):
        find_sample(module)


def test_a_project_is_evaluated_without_a_line_in_it(tmp_path):
    evaluation = Evaluation(4, num_inference_steps=2, k=5)
    fit(tmp_path, evaluation, module=WithPipeline())
    assert evaluation.report["generated"]["num_images"] == 4


def test_what_cannot_be_sampled_is_refused_before_training(tmp_path):
    class Silent(Copier):
        sample = None

        def training_step(self, batch, batch_idx):
            raise AssertionError("training has started")

    with pytest.raises(TypeError, match="but Silent has none"):
        fit(tmp_path, Evaluation(4), module=Silent())
