"""Every scheduler of diffusers: what a model trained with it sees, and how it is sampled."""

import warnings

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from lightning_iet.functional.diffusion import draw_flow_levels
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules import DiffusionModule
from lightning_iet.modules.noise_processes import (
    SCHEDULERS,
    effective_config,
    noise_process,
    rebuilt,
    scheduler_class,
)
from tests.helpers.accelerator import DEVICE, accelerator
from tests.helpers.models import tiny_unet

# diffusers gives tensors to numpy in a way that numpy 2 advises against; some schedulers are experiments, and say so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*__array_(_|wrap).*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TIMES = torch.tensor([0, 1, 300, 700, 998, 999])


def made():
    """Every scheduler of diffusers that can be made without arguments and further packages, by name."""
    found = {}
    for name in dir(diffusers):
        if name.endswith("Scheduler") and not name.startswith("Flax"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found[name] = getattr(diffusers, name)()
            except (TypeError, ImportError):
                continue
    return found


MADE = made()
BETAS = sorted(name for name, one in MADE.items() if isinstance(getattr(one, "alphas_cumprod", None), torch.Tensor))
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
DRAWERS = sorted({*BETAS, *FLOWS, *EDMS} - {
    "UnCLIPScheduler", "RePaintScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler",
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
})  # fmt: skip


def images_and_noise():
    num = len(TIMES)
    generator = torch.Generator().manual_seed(3)
    return torch.rand(num, 1, 4, 4, generator=generator) * 2 - 1, torch.randn(num, 1, 4, 4, generator=generator)


def seen(process, times=TIMES):
    """What the denoiser sees, and what it is told of the time."""
    calls = []

    def predict(noisy, told):
        calls.append((noisy, told))
        return torch.zeros_like(noisy)

    losses = process.losses(predict, *(images_and_noise()[0][: len(times)], times, images_and_noise()[1][: len(times)]))
    return (*calls[0], losses)


def test_the_list_covers_what_diffusers_has():
    assert len(BETAS) > 18
    assert {*BETAS, *FLOWS, *EDMS} <= set(SCHEDULERS)
    for name in SCHEDULERS:
        assert scheduler_class(name).__name__ == name


@pytest.mark.parametrize("name", BETAS)
def test_betas_train_by_the_forward_process_of_ddpm(name):
    if "FlowMatch" in name or MADE[name].config.get("prediction_type") == "flow_prediction":
        pytest.skip("not one of betas")
    x, noise = images_and_noise()
    noisy, told, losses = seen(noise_process(MADE[name]))
    for row, t in enumerate(TIMES.tolist()):
        share = MADE[name].alphas_cumprod[t]
        expected = (share.sqrt() * x[row] + (1 - share).sqrt() * noise[row]).float()
        torch.testing.assert_close(noisy[row], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(losses[row], noise[row].square().mean())
    assert told.equal(TIMES)


@pytest.mark.parametrize("name", sorted(set(MADE) - {*BETAS, *FLOWS, *EDMS}))
def test_others_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"but got {name}, which has no noise schedule"):
        DiffusionModule(tiny_unet(), scheduler=MADE[name])


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samplers_have_the_betas_of_training(name, sampler):
    made = noise_process(MADE[name]).sampler(sampler)
    assert isinstance(made, {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[sampler])
    torch.testing.assert_close(made.alphas_cumprod, MADE[name].alphas_cumprod.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", [DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_settings_survive(kind, spacing):
    given = kind(
        timestep_spacing=spacing, prediction_type="v_prediction", steps_offset=1, beta_schedule="scaled_linear"
    )
    made = noise_process(given).sampler("ddim")
    assert made.config.timestep_spacing == spacing
    assert made.config.prediction_type == "v_prediction"
    assert made.config.steps_offset == 1
    made.set_timesteps(10)
    expected = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    expected.set_timesteps(10)
    assert made.timesteps.equal(expected.timesteps)


def test_defaults_of_a_class_survive():
    assert noise_process(LCMScheduler()).sampler("ddim").config.beta_schedule == "scaled_linear"
    assert noise_process(DPMSolverMultistepScheduler()).sampler("ddim").config.timestep_spacing == "linspace"
    assert noise_process(PNDMScheduler()).sampler("ddim").config.set_alpha_to_one is False
    assert noise_process(DDPMScheduler()).sampler("ddim").config.clip_sample is True
    assert noise_process(HeunDiscreteScheduler()).sampler("ddim").config.clip_sample is False
    assert noise_process(EulerDiscreteScheduler()).sampler("ddim").config.clip_sample is False  # which it does not know
    clipped = PNDMScheduler.from_config(effective_config(DDPMScheduler()))  # it keeps what it does not know
    assert noise_process(clipped).sampler("ddim").config.clip_sample is True


def test_a_scheduler_may_have_trained_before_on_another_device():
    given = DDPMScheduler(prediction_type="v_prediction")
    with accelerator():
        x, noise = (part.to(DEVICE) for part in images_and_noise())
        noise_process(given).noised(x, TIMES.to(DEVICE), noise)
        assert given.alphas_cumprod.device == DEVICE  # diffusers leaves it there
        assert noise_process(given).sampler("ddim").config.prediction_type == "v_prediction"


def test_settings_of_other_classes_in_a_file_survive():
    """As in the files of Stable Diffusion XL, whose Euler scheduler has DDIM's settings beside its own."""
    given = EulerDiscreteScheduler.from_config({"set_alpha_to_one": False, "beta_schedule": "scaled_linear"})
    made = rebuilt(given, clip_sample=False)
    assert made.config.beta_schedule == "scaled_linear"
    for scheduler in (made, noise_process(made).sampler("own")):
        sampler = noise_process(scheduler).sampler("ddim")
        assert sampler.config.set_alpha_to_one is False
        assert sampler.config.clip_sample is False
        assert sampler.final_alpha_cumprod == sampler.alphas_cumprod[0]


def test_a_sampler_whose_noise_has_no_seed_is_refused():
    kind = type("DPMSolverSDEScheduler", (DDPMScheduler,), {})  # diffusers' own needs a further package
    with pytest.raises(ValueError, match="expected 'ddim' or 'ddpm' with a DPMSolverSDEScheduler"):
        noise_process(kind()).sampler("own")


def test_a_schedule_that_ddpm_does_not_have_is_taken_by_its_betas():
    given = HeunDiscreteScheduler(beta_schedule="exp")
    torch.testing.assert_close(noise_process(given).sampler("ddim").alphas_cumprod, given.alphas_cumprod)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_zero_snr_is_honoured_or_refused(kind):
    given = kind(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    _, noise = images_and_noise()
    noisy, _, _ = seen(noise_process(given))
    torch.testing.assert_close(noisy[-1], noise[-1], atol=1e-3, rtol=1e-3)
    assert noise_process(given).sampler("ddim").alphas_cumprod[-1] < 1e-6
    with pytest.raises(ValueError, match=rf"rescale_betas_zero_snr, but got a {kind.__name__} with 'epsilon'"):
        noise_process(kind(rescale_betas_zero_snr=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_targets(kind, prediction_type):
    x, noise = images_and_noise()
    given = kind(prediction_type=prediction_type)
    share = given.alphas_cumprod[TIMES].view(-1, 1, 1, 1)
    velocity = share.sqrt() * noise - (1 - share).sqrt() * x
    target = {"epsilon": noise, "sample": x, "v_prediction": velocity}[prediction_type]
    torch.testing.assert_close(seen(noise_process(given))[2], target.square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "flow_prediction"),
        (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "'continuous'"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(given, fault):
    with pytest.raises(ValueError, match=rf"Argument `scheduler` expected .* but got .*{fault}"):
        noise_process(given)


def test_weighting_is_of_flow_matching():
    with pytest.raises(ValueError, match=r"`flow_weighting` expected None with a DDPMScheduler, but got 'mode'"):
        DiffusionModule(tiny_unet(), flow_weighting="mode")
    with pytest.raises(ValueError, match=r"`flow_weighting` expected one of 'none', .* but got 'other'"):
        DiffusionModule(tiny_unet(), scheduler=FlowMatchEulerDiscreteScheduler(), flow_weighting="other")


# --- flow matching ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shift", "weighting"),
    [
        *(
            (FlowMatchEulerDiscreteScheduler, 3.0, name)
            for name in ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")
        ),
        (FlowMatchEulerDiscreteScheduler, 1.0, "sigma_sqrt"),
        (FlowMatchHeunDiscreteScheduler, 1.0, "none"),
        (FlowMatchHeunDiscreteScheduler, 3.0, "cosmap"),
    ],
)
def test_flow_matching_is_that_of_diffusers_example(kind, shift, weighting):
    """The loss of examples/dreambooth/train_dreambooth_sd3.py, sample by sample."""
    torch.manual_seed(0)
    unet, scheduler = tiny_unet(), kind(shift=shift)
    process = noise_process(scheduler, flow_weighting=weighting)
    x, noise = images_and_noise()
    x, noise = (torch.nn.functional.interpolate(part, size=8) for part in (x, noise))
    losses = process.losses(lambda noisy, told: unet(noisy, told).sample, x, TIMES, noise)
    for row, t in enumerate(TIMES.tolist()):
        index = 999 - t  # diffusers counts from the most noise down
        timestep, sigma = scheduler.timesteps[index], scheduler.sigmas[index]
        noisy = (1 - sigma) * x[row] + sigma * noise[row]
        prediction = unet(noisy[None], timestep[None]).sample[0]
        weight = compute_loss_weighting_for_sd3(weighting, sigma)
        expected = (weight * (prediction - (noise[row] - x[row])) ** 2).mean()
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["none", "logit_normal", "mode", "cosmap"])
def test_levels_are_drawn_as_in_diffusers_example(weighting):
    torch.manual_seed(5)
    ours = draw_flow_levels(1000, weighting)
    torch.manual_seed(5)
    theirs = compute_density_for_timestep_sampling(weighting, 1000, logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    torch.testing.assert_close(ours, theirs)
    process = noise_process(FlowMatchEulerDiscreteScheduler(), flow_weighting=weighting)
    torch.manual_seed(5)
    drawn = process.draw(1000, device=torch.device("cpu"))
    assert drawn.equal(999 - (theirs * 1000).long())


def test_the_sampler_given_before_does_not_change_training():
    used = FlowMatchEulerDiscreteScheduler(shift=2.0)
    used.set_timesteps(7)
    for ours, fresh in zip(
        seen(noise_process(used)), seen(noise_process(FlowMatchEulerDiscreteScheduler(shift=2.0))), strict=True
    ):
        assert ours.equal(fresh)


# --- EDM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "schedule"), [(EDMEulerScheduler, "karras"), (EDMEulerScheduler, "exponential"),
                                                (EDMDPMSolverMultistepScheduler, "karras")])  # fmt: skip
def test_edm_is_that_of_diffusers_example(kind, schedule, prediction_type):
    """The loss of train_dreambooth_lora_sdxl.py with --do_edm_style_training, sample by sample."""
    torch.manual_seed(0)
    unet, scheduler = tiny_unet(), kind(prediction_type=prediction_type, sigma_schedule=schedule, sigma_data=0.7)
    process = noise_process(kind(prediction_type=prediction_type, sigma_schedule=schedule, sigma_data=0.7))
    x, noise = images_and_noise()
    x, noise = (torch.nn.functional.interpolate(part, size=8) for part in (x, noise))
    losses = process.losses(lambda noisy, told: unet(noisy, told).sample, x, TIMES, noise)
    for row, t in enumerate(TIMES.tolist()):
        index = 999 - t
        timestep, sigma = scheduler.timesteps[index], scheduler.sigmas[index]
        noisy = x[row] + sigma * noise[row]
        prediction = unet(scheduler.precondition_inputs(noisy, sigma)[None], timestep[None]).sample[0]
        denoised = scheduler.precondition_outputs(noisy, prediction, sigma)
        torch.testing.assert_close(losses[row], (denoised - x[row]).square().mean(), rtol=1e-4, atol=1e-6)


def test_levels_of_edm_are_drawn_alike():
    drawn = noise_process(EDMEulerScheduler()).draw(20_000, device=torch.device("cpu"))
    assert (drawn.min(), drawn.max()) == (0, 999)
    assert abs(drawn.float().mean() - 499.5) < 8


@pytest.mark.parametrize("name", [*FLOWS, *EDMS])
def test_no_ancestral_sampler_without_betas(name):
    with pytest.raises(ValueError, match=rf"expected 'own' or 'ddim' with a {name}, but got 'ddpm'"):
        noise_process(MADE[name]).sampler("ddpm")


@pytest.mark.parametrize("name", DRAWERS)
def test_an_unknown_sampler_is_refused(name):
    with pytest.raises(ValueError, match="`sampler` expected 'ddim', 'ddpm' or 'own', but got 'euler'"):
        noise_process(MADE[name]).sampler("euler")


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWERS)
def test_own_samplers_draw_as_diffusers_does(name):
    torch.manual_seed(0)
    module = DiffusionModule(tiny_unet(), scheduler=MADE[name], ema_decay=0)
    ours = module.sample(3, sampler="own", num_inference_steps=5, batch_size=2, seed=4)
    scheduler = type(MADE[name])()
    for number in range(3):
        generator = torch.Generator().manual_seed(derive_seed(4, number))
        scheduler.set_timesteps(5)
        image = torch.randn(1, 1, 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1)
        for timestep in scheduler.timesteps:
            shown = scheduler.scale_model_input(image, timestep) if hasattr(scheduler, "scale_model_input") else image
            with torch.no_grad():
                prediction = module.unet(shown, timestep).sample
            try:
                image = scheduler.step(prediction, timestep, image, generator=generator).prev_sample
            except TypeError:  # takes none
                image = scheduler.step(prediction, timestep, image).prev_sample
        torch.testing.assert_close(ours[number], (image[0] / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["UnCLIPScheduler", "RePaintScheduler", "DDIMInverseScheduler"])
def test_those_that_do_not_draw_images_are_refused_for_it(name):
    module = DiffusionModule(tiny_unet(), scheduler=MADE[name], ema_decay=0)
    with pytest.raises(ValueError, match=rf"`sampler` expected 'ddim' or 'ddpm' with a {name}, but got 'own'"):
        module.sample(1, sampler="own", num_inference_steps=2)
    assert module.sample(1, num_inference_steps=2).isfinite().all()


def test_a_perfect_denoiser_of_flow_matching_and_edm_finds_its_image():
    """Of one image x, the best prediction is known in closed form; Euler's steps end at x."""
    x = torch.linspace(-0.9, 0.9, 64).view(1, 1, 8, 8)
    for is_flow in (True, False):
        scheduler = FlowMatchEulerDiscreteScheduler() if is_flow else EDMEulerScheduler()
        module = DiffusionModule(tiny_unet(), scheduler=scheduler, ema_decay=0)

        def perfect(noisy, time, *, is_flow=is_flow):
            if is_flow:
                return (noisy - x) / (time / 1000).view(-1, 1, 1, 1)
            sigma = (time * 4).exp().view(-1, 1, 1, 1)
            total = sigma**2 + 0.25
            clean, seen_by = x, noisy * total.sqrt()  # without c_in
            return (clean - 0.25 / total * seen_by) / (sigma * 0.5 / total.sqrt())

        module.unet.forward = perfect
        images = module.sample(2, num_inference_steps=20)
        torch.testing.assert_close(images, ((x + 1) / 2).expand_as(images), atol=2e-3, rtol=0)
        assert module.losses((x + 1) / 2, torch.tensor([500]), torch.randn(1, 1, 8, 8)).item() < 1e-6


def test_effective_config_has_no_private_keys():
    config = effective_config(DDPMScheduler())
    assert config["num_train_timesteps"] == 1000
    assert not any(name.startswith("_") for name in config)


class OwnFlow(FlowMatchEulerDiscreteScheduler):
    """A sampler of one's own."""


@pytest.mark.parametrize("name", ["own", "ddim"])
def test_a_class_of_ones_own_samples_as_that_which_it_derives_from(name):
    assert type(noise_process(OwnFlow(shift=2.0)).sampler(name)) is OwnFlow


class OwnBetas(DDPMScheduler):
    """One that hands on what it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Fixed(DDPMScheduler):
    """One that hands on nothing."""

    def __init__(self):
        super().__init__()


def test_a_class_of_ones_own_keeps_its_settings():
    scheduler = OwnBetas(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    sampler = noise_process(scheduler).sampler("own")
    assert type(sampler) is OwnBetas
    assert effective_config(sampler) == effective_config(scheduler)
    assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)


def test_a_class_of_ones_own_that_does_not_take_its_settings_is_refused():
    scheduler = Fixed()
    assert type(noise_process(scheduler).sampler("own")) is Fixed
    scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"but got Fixed, of which prediction_type is then 'epsilon' instead of 'v_pr"):
        noise_process(scheduler).sampler("own")
