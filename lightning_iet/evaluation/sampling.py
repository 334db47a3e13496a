"""How images are sampled from a module of any project: by its own method, or by the diffusers pipeline in it."""

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_iet.functional.seeding import derive_seed
from lightning_iet.modules.noise_processes import noise_process, sample_images

Sample = Callable[..., Tensor]
"""``sample(num, *, seed, start, batch_size, sampler, num_inference_steps, use_ema)`` -> images (num, C, H, W) in [0, 1]
where image i depends on ``seed`` and ``start + i`` alone."""

_ARGUMENTS = ("seed", "start", "batch_size", "sampler", "num_inference_steps", "use_ema")
_METHOD = """
    def sample(self, num, *, seed, start, batch_size, **settings):
        generators = [torch.Generator().manual_seed(seed * 10**6 + i) for i in range(start, start + num)]
        return {call}  # images in [0, 1], (num, C, H, W)"""


class FoundSample(NamedTuple):
    """A way to sample from a module, and what to say of it in the log; nothing of a method that was made for this."""

    sample: Sample
    description: str = ""


def find_sample(module: nn.Module) -> FoundSample:
    """Find how a module samples images.

    1. Its method ``sample``, if it takes the arguments of :data:`Sample`.
    2. A pipeline of diffusers that it holds and that needs no input, or the parts of one: an unconditional
       ``UNet2DModel`` and a scheduler. Those with DDPM's or DDIM's scheduler are sampled by the sampler that is asked
       for; others are called as they are.

    Raises:
        TypeError: There is neither, or the denoiser does not know the size of its images; the message holds the lines
            to write.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> module = nn.Module()
        >>> module.unet = UNet2DModel(8, 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ...                           block_out_channels=(8,), norm_num_groups=4, add_attention=False)
        >>> module.noise_scheduler = DDPMScheduler()
        >>> settings = {"start": 0, "batch_size": 2, "sampler": "ddim", "num_inference_steps": 2, "use_ema": False}
        >>> find_sample(module).sample(2, seed=0, **settings).shape
        torch.Size([2, 1, 8, 8])
    """
    method = getattr(module, "sample", None)
    problem = "has none"
    if callable(method):
        problem = _why_not_callable(method)
        if not problem:
            return FoundSample(method)
    pipelines = list(_pipelines(module))
    if len(pipelines) == 1:
        name, pipeline = pipelines[0]
        unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
        if _is_unconditional(unet) and _has_usual_schedule(scheduler):
            _check_size(module, f"{name}.unet", unet)
            return FoundSample(partial(_by_parts, module, unet, scheduler), _says(f"`{name}`"))
        if not (missing := _inputs(pipeline)):
            said = f"{_says(f'`{name}`')} `sampler` is left to it."
            return FoundSample(partial(_by_pipeline, module, pipeline), said)
        problem = f"its {type(pipeline).__name__} `{name}` needs {', '.join(f'`{argument}`' for argument in missing)}"
        given = ", ".join(f"{argument}=…" for argument in missing)
        raise _refusal(module, problem, f'self.{name}({given}, generator=generators, output_type="pt").images.cpu()')
    parts = _parts(module)
    if parts is not None:
        name, unet, scheduler = parts
        _check_size(module, name, unet)
        return FoundSample(partial(_by_parts, module, unet, scheduler), _says(f"`{name}`"))
    if pipelines:
        problem = f"holds {len(pipelines)} pipelines, {', '.join(f'`{name}`' for name, _ in pipelines)}"
    raise _refusal(module, problem, "…")


def _refusal(module: nn.Module, problem: str, call: str) -> TypeError:
    return TypeError(
        f"Argument `model` expected a module with a method `sample` to evaluate, but {type(module).__name__} {problem}."
        " Switch the evaluation off with num_samples=0, or write into the class:" + _METHOD.format(call=call)
    )


def _check_size(module: nn.Module, name: str, unet: Any) -> None:
    if unet.config.sample_size is None:  # the default of UNet2DModel
        problem = f"has `{name}` without `sample_size`: set it to the height and width of the images"
        raise _refusal(module, problem, "…")


def _says(what: str) -> str:
    return f"Evaluation: images are sampled by {what} of the module, with the weights that are trained."


def _why_not_callable(method: Callable[..., Any]) -> str:
    """What is wrong with the arguments of a method ``sample``; empty if nothing is."""
    try:
        inspect.signature(method).bind(1, **dict.fromkeys(_ARGUMENTS))
    except TypeError as error:
        return f"has one with other arguments ({error})"
    return ""


def _pipelines(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The pipelines among a module's attributes; if diffusers was not imported, there is none."""
    kind = getattr(sys.modules.get("diffusers"), "DiffusionPipeline", None)
    for name, value in vars(module).items():
        if kind is not None and isinstance(value, kind):
            yield name, value


def _parts(module: nn.Module) -> tuple[str, nn.Module, Any] | None:
    """The denoiser of a pipeline that a module has not put together, with its name, and the scheduler."""
    unets = [(name, part) for name, part in module._modules.items() if part is not None and _is_unconditional(part)]
    trained = [(name, part) for name, part in unets if any(weight.requires_grad for weight in part.parameters())]
    schedulers = [value for value in vars(module).values() if _has_usual_schedule(value)]
    return (*trained[0], schedulers[0]) if len(trained) == 1 and schedulers else None


def _is_unconditional(part: Any) -> bool:
    """Whether something is a ``UNet2DModel`` of diffusers without classes."""
    kind = getattr(sys.modules.get("diffusers"), "UNet2DModel", None)
    if kind is None or not isinstance(part, kind):
        return False
    return part.config.num_class_embeds is None and part.config.class_embed_type is None


def _has_usual_schedule(scheduler: Any) -> bool:
    return type(scheduler).__name__ in ("DDPMScheduler", "DDIMScheduler")


def _inputs(pipeline: Any) -> list[str]:
    """The inputs without which a pipeline cannot be called, a number of images excepted."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    needed = [name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [name for name in needed if name not in ("self", "batch_size")]
    return needed or ([] if "batch_size" in parameters else [next(name for name in parameters if name != "self")])


def _by_parts(
    module: nn.Module, unet: Any, scheduler: Any, num: int, *, sampler: Any, use_ema: bool, **settings: Any
) -> Tensor:
    """Sample by our own loop, in which each image has a generator of its own."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    module.eval()
    return sample_images(
        lambda noisy, timesteps, _: unet(noisy, timesteps).sample,
        noise_process(scheduler).sampler(sampler),
        (unet.config.in_channels, height, width),
        num,
        module=unet,
        **settings,
    )


@torch.no_grad()
def _by_pipeline(
    module: nn.Module, pipeline: Any, num: int, *, seed: int, start: int, batch_size: int, **given: Any
) -> Tensor:
    """Call a pipeline as it is."""
    known = inspect.signature(type(pipeline).__call__).parameters
    settings = {name: given[name] for name in ("num_inference_steps",) if name in known}
    shown = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    module.eval()
    batches = []
    try:
        for first in range(start, start + num, batch_size):
            numbers = range(first, min(first + batch_size, start + num))
            generators = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in numbers]
            made = pipeline(batch_size=len(numbers), generator=generators, output_type="np", **settings).images
            batches.append(torch.from_numpy(made).permute(0, 3, 1, 2).float())
    finally:
        pipeline.set_progress_bar_config(**(shown or {}))
    return torch.cat(batches)
