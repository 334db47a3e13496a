r"""How a model is trained and sampled with a scheduler of diffusers: which noise it sees, and what it predicts.

A scheduler of diffusers is a sampler first. What a model was, or is to be, trained with is read from its configuration:

- *betas* (DDPM, DDIM, PNDM, DPM-Solver, UniPC, DEIS, Euler, Heun, LMS, …): trained by DDPM's forward process with the
  same :math:`\bar\alpha_t` and prediction type, whatever the class itself understands by ``add_noise``: some scale
  differently, some give the noisiest image to every timestep until a sampler is set up;
- *flow matching* (``FlowMatchEulerDiscreteScheduler`` and its relatives): trained on straight lines to the noise;
- *EDM* (``EDMEulerScheduler``, ``EDMDPMSolverMultistepScheduler``): trained by preconditioned denoising.

Others have no such schedule and are refused by name. Timesteps are 0 … T - 1 in all three, from the least noise to the
most, so that losses, bins of :class:`~lightning_iet.callbacks.AntiGradientControl` and measures mean the same by them.
"""

import inspect
from collections.abc import Callable
from inspect import signature
from typing import Any, Literal, get_args

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_iet.functional.checks import check_at_least, check_choice
from lightning_iet.functional.diffusion import (
    FlowWeighting,
    draw_flow_levels,
    edm_coefficients,
    flow_weights,
    guide,
    prediction_target,
    sample_losses,
)
from lightning_iet.functional.seeding import derive_seed

Sampler = Literal["ddim", "ddpm", "own"]
"""Deterministic, ancestral, or the class of the scheduler that was given, with its settings."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(noisy (B, ...), what the denoiser is told of the time (B,)) -> prediction (B, ...)``."""

_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# Schedulers that draw images from noise alone, with one denoiser call for each of their timesteps.
_SAMPLERS = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
    *_FLOW,
    *_EDM,
)
_OTHERS = (
    *("UnCLIPScheduler", "RePaintScheduler", "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"),
    "DPMSolverSDEScheduler",  # draws its noise without a generator: images would not depend on their seeds alone
)
SCHEDULERS = (*_SAMPLERS, *_OTHERS, "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""Classes of diffusers whose noise schedule is known how to train with."""


def effective_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return all settings of a scheduler, those left at the defaults of its class among them.

    ``from_config`` of diffusers leaves such settings out, and the class that is made takes its own defaults instead.

    Example:
        >>> from diffusers import LCMScheduler
        >>> ours = DDIMScheduler.from_config(effective_config(LCMScheduler()))
        >>> ours.config.beta_schedule, DDIMScheduler.from_config(LCMScheduler().config).config.beta_schedule
        ('scaled_linear', 'linear')
    """
    return {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}


def rebuilt(scheduler: SchedulerMixin, **changes: Any) -> SchedulerMixin:
    """Return a new scheduler of the same class and settings, but for some, as it is before any sampling.

    Raises:
        ValueError: If its class, one of the user's own, does not take the settings that it has.
    """
    settings = effective_config(scheduler) | changes
    kind: Any = type(scheduler)
    new = kind(**_for(kind, settings))  # from_config of diffusers passes nothing through **kwargs
    for name, value in settings.items():
        if name in new.config and not np.array_equal(new.config[name], value):
            raise ValueError(
                f"Argument `scheduler` expected a class that can be made again with its settings, but got "
                f"{kind.__name__}, of which {name} is then {new.config[name]!r} instead of {value!r}. Let its __init__ "
                "take this setting."
            )
    # Files hold settings of other classes too (`set_alpha_to_one` beside Euler's), for those who change to them.
    new.register_to_config(**{name: value for name, value in settings.items() if name not in new.config})
    return new


class NoiseProcess:
    """How a model is trained and sampled with one scheduler, which is not changed; T is ``num_timesteps``."""

    default_sampler: Sampler = "own"

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self.scheduler = scheduler
        self.num_timesteps = int(scheduler.config.num_train_timesteps)

    def draw(self, num: int, *, device: torch.device) -> Tensor:
        """Draw the timesteps of a training batch, 0 … T - 1, shape ``(num,)``."""
        return torch.randint(self.num_timesteps, (num,), device=device)

    def noised(self, images: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the denoiser sees of images with noise, and what it is told of the time.

        Args are as for :meth:`losses`.

        Returns:
            ``(noisy (B, ...), times (B,))``.
        """
        raise NotImplementedError

    def losses(self, predict: Predict, images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each sample.

        Args:
            predict: Calls the denoiser.
            images: Clean ones, about [-1, 1] or of unit variance, shape ``(B, ...)``.
            timesteps: 0 … T - 1, shape ``(B,)``.
            noise: Standard normal, shape ``(B, ...)``.

        Returns:
            Shape ``(B,)``.
        """
        raise NotImplementedError

    def sampler(self, name: Sampler) -> SchedulerMixin:
        """Return the scheduler to sample with: for ``"own"`` a fresh copy of the given one.

        Flow matching and EDM use it for ``"ddim"`` too: Euler steps are DDIM's of these processes.

        Raises:
            ValueError: If the model cannot be sampled by it.
        """
        kind = type(self.scheduler)
        if name not in get_args(Sampler):
            raise ValueError(f"Argument `sampler` expected 'ddim', 'ddpm' or 'own', but got {name!r}.")
        if name == "ddpm":
            raise ValueError(
                f"Argument `sampler` expected 'own' or 'ddim' with a {kind.__name__}, but got 'ddpm', which is the "
                "ancestral sampler of models that were trained with betas."
            )
        known = next((base.__name__ for base in kind.__mro__ if base.__name__ in SCHEDULERS), None)
        if known not in _SAMPLERS:
            raise ValueError(f"Argument `sampler` expected 'ddim' or 'ddpm' with a {kind.__name__}, but got {name!r}.")
        return rebuilt(self.scheduler)


class BetaProcess(NoiseProcess):
    r"""DDPM's forward process, :math:`x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon`.

    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239. With ``rescale_betas_zero_snr`` (Lin et al. 2024,
    https://arxiv.org/abs/2305.08891) the noisiest image holds nothing of x_0, and the noise is no target.

    Raises:
        ValueError: For a prediction type or time scale that this process does not have.

    Example:
        >>> process = BetaProcess(diffusers.DPMSolverMultistepScheduler())
        >>> type(process.sampler("own")).__name__, type(process.sampler("ddim")).__name__
        ('DPMSolverMultistepScheduler', 'DDIMScheduler')
    """

    default_sampler = "ddpm"

    def __init__(self, scheduler: SchedulerMixin) -> None:
        super().__init__(scheduler)
        name, config = type(scheduler).__name__, effective_config(scheduler)
        self._prediction_type = config.get("prediction_type", "epsilon")
        if self._prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"Argument `scheduler` expected a prediction_type 'epsilon', 'sample' or 'v_prediction', but got a "
                f"{name} with {self._prediction_type!r}."
            )
        if config.get("use_flow_sigmas"):
            raise ValueError(
                f"Argument `scheduler` expected a FlowMatchEulerDiscreteScheduler for flow matching, but got a {name} "
                "with use_flow_sigmas. Sample with it once the model is trained."
            )
        if config.get("timestep_type", "discrete") != "discrete":
            raise ValueError(
                f"Argument `scheduler` expected an EDMEulerScheduler for continuous times, but got a {name} with "
                f"timestep_type={config['timestep_type']!r}."
            )
        if config.get("rescale_betas_zero_snr") and self._prediction_type == "epsilon":
            raise ValueError(
                "Argument `scheduler` expected prediction_type 'v_prediction' or 'sample' with rescale_betas_zero_snr, "
                f"but got a {name} with 'epsilon': at the last timestep there is nothing but noise to predict it from."
            )
        self._config = _common_settings(scheduler, config)
        is_exact = isinstance(scheduler, DDPMScheduler | DDIMScheduler)
        # Theirs, for what was saved and measured with these two; others differ in how they add noise.
        self.forward: Any = scheduler if is_exact else DDPMScheduler.from_config(_for(DDPMScheduler, self._config))

    def noised(self, images: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and t."""
        return self.forward.add_noise(images, noise, timesteps), timesteps

    def losses(self, predict: Predict, images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each sample, the squared error of the noise, the image or the velocity."""
        noisy, times = self.noised(images, timesteps, noise)
        target = prediction_target(images, noise, timesteps, self.forward.alphas_cumprod, self._prediction_type)
        return sample_losses(predict(noisy, times), target)

    def sampler(self, name: Sampler) -> SchedulerMixin:
        """Make the scheduler that samples, with the betas of training."""
        if name not in ("ddim", "ddpm"):
            return super().sampler(name)
        kind = DDIMScheduler if name == "ddim" else DDPMScheduler
        return kind.from_config(_for(kind, self._config))


def _common_settings(scheduler: SchedulerMixin, config: dict[str, Any]) -> dict[str, Any]:
    """Settings that give DDPM and DDIM the schedule of another class."""
    settings = {"clip_sample": False} | config  # a class that does not know clipping does not clip
    if settings.get("variance_type", 0) is None:
        del settings["variance_type"]
    own = scheduler.alphas_cumprod.float().cpu()  # add_noise of diffusers leaves it where it was trained
    try:
        found = DDPMScheduler.from_config(_for(DDPMScheduler, settings)).alphas_cumprod
        is_same = torch.allclose(found, own, rtol=1e-4, atol=1e-6)
    except NotImplementedError:  # a beta schedule that DDPM does not have
        is_same = False
    if not is_same:
        before = torch.cat([torch.ones(1), own[:-1]])
        betas = (1 - own.double() / before.double()).clamp(0, 1)
        settings |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    return settings


def _for(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that a class takes, through ``**kwargs`` also those of the class that it derives from."""
    known: set[str] = set()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters
            known |= parameters.keys()
            if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return {name: value for name, value in settings.items() if name in known}


class FlowProcess(NoiseProcess):
    r"""Flow matching, :math:`x_\sigma = (1 - \sigma)\,x_0 + \sigma\,\epsilon`, with :math:`\epsilon - x_0` as target.

    Sources: Lipman et al. 2023, https://arxiv.org/abs/2210.02747, and Esser et al. 2024,
    https://arxiv.org/abs/2403.03206; noise levels, weights and the time that the denoiser is told, :math:`T\,\sigma`,
    are those of diffusers' ``train_dreambooth_sd3.py`` (without ``--precondition_outputs``).

    Args:
        scheduler: With ``shift``; what it sets of its sampler holds for sampling alone.
        weighting: See :func:`~lightning_iet.functional.diffusion.draw_flow_levels`.

    Raises:
        ValueError: For settings that other pipelines compute for each image.

    Example:
        >>> process = FlowProcess(diffusers.FlowMatchEulerDiscreteScheduler())
        >>> x, noise = torch.zeros(2, 1), torch.ones(2, 1)
        >>> process.losses(lambda noisy, time: noisy, x, torch.tensor([499, 999]), noise)
        tensor([0.2500, 0.0000])
    """

    def __init__(self, scheduler: SchedulerMixin, weighting: FlowWeighting = "logit_normal") -> None:
        super().__init__(scheduler)
        check_choice("flow_weighting", weighting, get_args(FlowWeighting))
        for name in ("use_dynamic_shifting", "invert_sigmas"):
            if scheduler.config.get(name):
                raise ValueError(
                    f"Argument `scheduler` expected a {type(scheduler).__name__} with a fixed `shift`, but got one "
                    f"with {name}. Set {name}=False, and `shift` as the images' size needs it."
                )
        self.weighting: FlowWeighting = weighting
        self._table = _Table(rebuilt(scheduler), self.num_timesteps)

    def draw(self, num: int, *, device: torch.device) -> Tensor:
        """Draw the timesteps of a training batch, 0 … T - 1, shape ``(num,)``."""
        # diffusers counts from the most noise down.
        below = (draw_flow_levels(num, self.weighting, device=device) * self.num_timesteps).long()
        return self.num_timesteps - 1 - below

    def noised(self, images: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`x_\sigma` and :math:`T\,\sigma`."""
        sigmas, times = self._table.at(timesteps, images)
        return (1 - sigmas) * images + sigmas * noise, times

    def losses(self, predict: Predict, images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each sample, the weighted squared error of the velocity."""
        noisy, times = self.noised(images, timesteps, noise)
        losses = sample_losses(predict(noisy, times), noise - images)
        weights = flow_weights(self._table.at(timesteps, images)[0].flatten(), self.weighting)
        return losses if weights is None else weights * losses


class EDMProcess(NoiseProcess):
    r"""EDM, :math:`x_\sigma = x_0 + \sigma\,\epsilon`, with the loss :math:`(D - x_0)^2` of a preconditioned D.

    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, as diffusers' ``train_dreambooth_lora_sdxl.py``
    trains with ``--do_edm_style_training``: levels of the scheduler's own :math:`\sigma` schedule, drawn uniformly by
    their number; no weights; the denoiser is told :math:`\ln(\sigma) / 4`.

    Raises:
        ValueError: For another prediction type than ``"epsilon"`` and ``"v_prediction"``.

    Example:
        >>> process = EDMProcess(diffusers.EDMEulerScheduler())
        >>> process.losses(lambda noisy, time: noisy, torch.zeros(1, 1), torch.tensor([0]), torch.ones(1, 1)).shape
        torch.Size([1])
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        super().__init__(scheduler)
        config = scheduler.config
        if config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"Argument `scheduler` expected a prediction_type 'epsilon' or 'v_prediction', but got a "
                f"{type(scheduler).__name__} with {config.prediction_type!r}."
            )
        self._scaling = {"sigma_data": config.sigma_data, "prediction_type": config.prediction_type}
        self._table = _Table(rebuilt(scheduler), self.num_timesteps)

    def noised(self, images: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`c_{in}\,x_\sigma` and :math:`\ln(\sigma) / 4`."""
        sigmas, times = self._table.at(timesteps, images)
        return edm_coefficients(sigmas, **self._scaling)[2] * (images + sigmas * noise), times

    def losses(self, predict: Predict, images: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each sample, the squared error of the denoised image."""
        sigmas, times = self._table.at(timesteps, images)
        noisy = images + sigmas * noise
        c_skip, c_out, c_in = edm_coefficients(sigmas, **self._scaling)
        return sample_losses(c_skip * noisy + c_out * predict(c_in * noisy, times), images)


class _Table:
    """Noise level, and what the denoiser is told of it, for each timestep; on the device of the images."""

    def __init__(self, fresh: Any, num_timesteps: int) -> None:
        # diffusers lists them from the most noise down; EDM's list has an end of its own.
        self._both = torch.stack([fresh.sigmas[:num_timesteps].float(), fresh.timesteps[:num_timesteps].float()])
        self._both = self._both.flip(1)

    def at(self, timesteps: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        if self._both.device != images.device:
            self._both = self._both.to(images.device)
        sigmas, times = self._both[:, timesteps]
        return sigmas.to(images.dtype).view(-1, *[1] * (images.ndim - 1)), times


def noise_process(scheduler: SchedulerMixin, *, flow_weighting: FlowWeighting | None = None) -> NoiseProcess:
    """Return how a model is trained and sampled with a scheduler.

    Args:
        scheduler: Of diffusers, or any with ``alphas_cumprod`` and a ``config``.
        flow_weighting: Of flow matching; ``None`` = ``"logit_normal"`` there, nothing elsewhere.

    Raises:
        ValueError: For a scheduler without a noise schedule to train with, by name, or settings that do not fit.

    Example:
        >>> noise_process(diffusers.KarrasVeScheduler())
        Traceback (most recent call last):
        ...
        ValueError: Argument `scheduler` expected one with betas (such as DDPMScheduler),
        FlowMatchEulerDiscreteScheduler or EDMEulerScheduler, but got KarrasVeScheduler, which has no noise schedule to
        train with.
    """
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    is_flow = any(name in _FLOW for name in names)
    if flow_weighting is not None and not is_flow:
        raise ValueError(
            f"Argument `flow_weighting` expected None with a {names[0]}, but got {flow_weighting!r}. It is for "
            "FlowMatchEulerDiscreteScheduler."
        )
    if is_flow:
        return FlowProcess(scheduler, flow_weighting or "logit_normal")
    if any(name in _EDM for name in names):
        return EDMProcess(scheduler)
    has_betas = isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor)
    if has_betas and "num_train_timesteps" in getattr(scheduler, "config", {}):
        return BetaProcess(scheduler)
    raise ValueError(
        "Argument `scheduler` expected one with betas (such as DDPMScheduler), FlowMatchEulerDiscreteScheduler or "
        f"EDMEulerScheduler, but got {names[0]}, which has no noise schedule to train with."
    )


def scheduler_class(name: object) -> Any:
    """Return a scheduler class of diffusers by the name that a file gives, one of :data:`SCHEDULERS`.

    Raises:
        ValueError: For another name: a file must not name code to run.

    Example:
        >>> scheduler_class("KarrasVeScheduler")
        Traceback (most recent call last):
        ...
        ValueError: KarrasVeScheduler has no noise schedule to train with (known: DDPMScheduler, ...
    """
    if name not in SCHEDULERS:
        raise ValueError(f"{name} has no noise schedule to train with (known: {', '.join(SCHEDULERS)}).")
    return getattr(diffusers, str(name))


@torch.no_grad()
def sample_images(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    scheduler: SchedulerMixin,
    shape: tuple[int, int, int],
    num: int,
    *,
    module: nn.Module,
    conditions: Callable[[range], Any] = lambda numbers: None,
    add_null: Callable[[Any], Any] | None = None,
    guidance_scale: float = 1.0,
    decode: Callable[[Tensor], Tensor] = lambda images: (images / 2 + 0.5).clamp(0, 1),
    seed: int = 0,
    start: int = 0,
    batch_size: int = 256,
    num_inference_steps: int = 50,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample images; each has a generator of its own, seeded from (seed, number of the image).

    Args:
        denoise: ``denoise(noisy (B, C, H, W), timesteps (B,), conditions of B samples) -> prediction``.
        scheduler: A sampler of diffusers, not yet told the number of steps.
        shape: ``(C, H, W)`` of what is denoised: of an image, or of its latents.
        num: Number of images.
        module: Put into evaluation mode meanwhile; its first parameter says the device and dtype.
        conditions: Returns the conditions of the images of these numbers, on the module's device.
        add_null: Returns B null conditions followed by the B given ones; for guidance.
        guidance_scale: See :func:`~lightning_iet.functional.diffusion.guide`; 1 = none, with one denoiser call a step.
        decode: Turns what is denoised into images in [0, 1].
        seed: Seed of the run of images.
        start: Number of the first image.
        batch_size: Images at once.
        num_inference_steps: Steps of the scheduler, at most those of training; one denoiser call each, except for
            schedulers of second order (Heun, KDPM2), which take two.
        progress: Called with the number of images of each finished batch.

    Returns:
        Images in [0, 1] on the CPU, shape ``(num, C, H, W)``.

    Raises:
        ValueError: For numbers out of range; for images that are not finite.
    """
    most = scheduler.config.num_train_timesteps
    check_at_least(1, num=num, batch_size=batch_size, num_inference_steps=num_inference_steps)
    if num_inference_steps > most:
        raise ValueError(f"Argument `num_inference_steps` expected at most {most}, but got {num_inference_steps}.")
    if num_inference_steps == most and getattr(scheduler.config, "steps_offset", 0):  # there is no step to begin later
        scheduler = type(scheduler).from_config(scheduler.config, steps_offset=0)
    scale = getattr(scheduler, "scale_model_input", None)
    is_random = "generator" in signature(scheduler.step).parameters
    weight = next(module.parameters())
    was_training = module.training
    module.eval()
    try:
        batches = []
        for first in range(start, start + num, batch_size):
            numbers = range(first, min(first + batch_size, start + num))
            generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
            # Noise comes from the CPU, so that a seed means the same images on every device.
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            scheduler.set_timesteps(num_inference_steps)  # anew: many count their steps, or remember earlier ones
            images = noise.to(weight) * getattr(scheduler, "init_noise_sigma", 1.0)
            told = conditions(numbers)
            with parametrize.cached():  # SV-DIFF forms its weights once, not in each step
                for timestep in scheduler.timesteps:
                    timesteps = timestep.to(images.device).expand(len(images))
                    seen = images if scale is None else scale(images, timestep)
                    prediction = guided(denoise, seen, timesteps, told, add_null=add_null, scale=guidance_scale)
                    random = {"generator": generators} if is_random else {}
                    images = scheduler.step(prediction, timestep, images, **random).prev_sample
            batches.append(_finite(decode(images).float().cpu()))
            if progress is not None:
                progress(len(numbers))
        return torch.cat(batches)
    finally:
        module.train(was_training)


def _finite(images: Tensor) -> Tensor:
    """Return images, or refuse what is none: NaN would become black in a file, and pass for an image."""
    broken = int((~images.isfinite().flatten(1).all(dim=1)).sum())
    if broken:
        raise ValueError(
            f"Sampling expected finite images, but got NaN or infinity in {broken} of {len(images)}. The model has "
            "diverged, or its scheduler does not fit it (zero terminal SNR needs prediction_type: v_prediction): use "
            "an earlier checkpoint, or another scheduler."
        )
    return images


def guided(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    noisy: Tensor,
    timesteps: Tensor,
    conditions: Any,
    *,
    add_null: Callable[[Any], Any] | None,
    scale: float,
) -> Tensor:
    """Predict with classifier-free guidance, by one denoiser call of twice as many samples.

    Arguments are those of :func:`sample_images`, for a batch of noisy images, shape ``(B, C, H, W)``; so is the result.

    Example:
        >>> x, t, c = torch.ones(1), torch.zeros(1), torch.tensor([2.0])
        >>> guided(lambda x, t, c: x + c, x, t, c, add_null=lambda c: torch.cat([0 * c, c]), scale=3.0)
        tensor([7.])
    """
    if scale == 1 or add_null is None:
        return denoise(noisy, timesteps, conditions)
    both = denoise(torch.cat([noisy, noisy]), timesteps.repeat(2), add_null(conditions))
    unconditional, conditional = both.chunk(2)
    return guide(conditional, unconditional, scale=scale)
