"""One call of a denoiser in a training step: what went in, what came out, and what is to become of its gradient."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_iet.callbacks.anti_gradient_control.losses.protocols import Selection

# With a plural s or without.
_TIMESTEP_NAMES: Sequence[str] = (
    *("t", "tt", "time", "timestep", "time_step", "step", "sigma", "noise_label", "noise_level"),
    *("noise_cond", "c_noise", "tau", "log_snr", "logsnr", "gamma"),
)
_LABEL_NAMES = ("y", "c", "label", "class_label", "class", "classe", "cls", "class_idx", "cond", "idx", "index")
_GRAPH_NAMES = ("edge_index", "edge_attr", "batch_index", "node_batch", "ptr", "segment_id")


class CallError(ValueError):
    """A call of a denoiser that cannot be used: the text says why."""


class NearMiss(CallError):
    """A call that may be one of a denoiser's parts: worth a word only if nothing else is found."""


@dataclass
class Verdict:
    """What is decided about the rows of one or more calls; all of shape (n,)."""

    losses: Tensor
    timesteps: Tensor
    weights: Tensor | None = None  # factor of each sample's gradient; None leaves gradients untouched

    def apply(self, selection: Selection | None) -> None:
        """Set the weights that leave the mean of the selected losses."""
        if selection is not None:
            self.weights = selection.factors(self.losses.dtype)


@dataclass
class DenoiserCall:
    """A call of a denoiser whose output needs a gradient."""

    module: nn.Module
    argument: str  # name of that which holds the timesteps
    timesteps: Tensor  # one per row, (B,)
    outputs: list[Tensor]  # what was returned and needs a gradient, each with B rows
    nodes: set[Node] = field(default_factory=set)  # of the outputs, in the graph
    row_map: Tensor | None = None  # the sample of each row, (B,), on the device; None if rows are samples
    verdict: Verdict | None = None  # once its losses are measured

    def __post_init__(self) -> None:
        self.nodes = {output.grad_fn for output in self.outputs if output.grad_fn is not None}

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return len(self.timesteps)

    def release(self) -> None:
        """Let go of the graph: its tensors refer to this call."""
        self.outputs, self.nodes = [], set()

    def mask(self, gradient: Tensor) -> Tensor | None:
        """The gradient of an output with its rows weighted, or None to leave it."""
        if self.verdict is None or self.verdict.weights is None:
            return None
        weights = self.verdict.weights if self.row_map is None else self.verdict.weights[self.row_map]
        weights = weights.to(gradient).reshape(-1, *[1] * (gradient.ndim - 1))
        # where, not a product: 0 * inf is NaN
        return torch.where(weights != 0, gradient * weights, 0)


@dataclass
class Entry:
    """Where a step stood when a module was called."""

    module: nn.Module
    num_calls: int
    num_events: int
    num_errors: int
    unmeasured: list[DenoiserCall]
    failure: str | None


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output):
        for entry in dataclasses.fields(output):
            yield from tensors_in(getattr(output, entry.name))


def argument_names(module: nn.Module) -> list[str]:
    """Names of a module's positional arguments, also of a compiled one."""
    forward = getattr(module, "_orig_mod", module).forward
    parameters = inspect.signature(forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def name_arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name; those that have none are called by their position."""
    positions = [f"argument {number}" for number in range(len(names), len(args))]
    return dict(zip([*names, *positions], args, strict=False)) | dict(kwargs)


def read_call(
    module: nn.Module, arguments: Mapping[str, Any], output: Any, *, timestep: str | None = None
) -> DenoiserCall | None:
    """Tell whether a call is one of a denoiser, and read it; None if not, CallError if it cannot be used.

    A denoiser takes a floating tensor and another tensor with one number per row of it, and returns a tensor that needs
    a gradient and has the batch and spatial sizes of the first. The timestep's argument is found unless it is named.
    """
    outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    sample = next((x for x in arguments.values() if is_sample(x) and any(_fits(out, x) for out in outputs)), None)
    if sample is None:
        return None
    batch_size = len(sample)
    others = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x is not sample}
    per_row = {name: x for name, x in others.items() if one_per_row(x, batch_size)}
    name = _choose(per_row, others, batch_size, timestep)
    if name is None:
        return None
    _refuse_graphs(arguments)
    lacking = [tuple(out.shape) for out in outputs if out.ndim == 0 or len(out) != batch_size]
    if lacking:
        raise CallError(
            f"it returns an output of shape {lacking[0]}, which has no row for each of {batch_size} samples"
        )
    return DenoiserCall(module, name, per_row[name].detach().reshape(-1), outputs)


def fixed_outputs(arguments: Mapping[str, Any], output: Any) -> list[Tensor]:
    """What a call returned that needs no gradient, if it looks like one of a denoiser; else nothing."""
    shapes = [value.shape for value in arguments.values() if is_sample(value)]
    has_timesteps = any(
        isinstance(value, Tensor) and any(one_per_row(value, shape[0]) for shape in shapes)
        for value in arguments.values()
    )
    found = [tensor for tensor in tensors_in(output) if not tensor.requires_grad and tensor.shape in shapes]
    return found if has_timesteps else []


def _choose(per_row: Mapping[str, Tensor], others: Mapping[str, Tensor], rows: int, timestep: str | None) -> str | None:
    """Which argument the timestep is: by what the user says, by name, by type, by being the only one."""
    if timestep is not None or not per_row:
        named = [timestep] if timestep is not None else [name for name in others if _is_one_of(name, _TIMESTEP_NAMES)]
        for name in named:
            if name in per_row:
                return name
            found = tuple(others[name].shape) if name in others else "no tensor"
            raise NearMiss(f"its argument `{name}` should hold one number for each of {rows} rows, but is {found}")
        return None
    named = [name for name in per_row if _is_one_of(name, _TIMESTEP_NAMES)]
    unnamed = [name for name in per_row if not _is_one_of(name, _LABEL_NAMES)]
    floating = [name for name in unnamed if per_row[name].is_floating_point()]
    for candidates in (named, floating, unnamed, list(per_row)):
        if len(candidates) == 1:
            return candidates[0]
        if len(candidates) > 1:
            raise CallError(f"its arguments {candidates} could each be the timestep")
    return None


def _is_one_of(name: str, names: Sequence[str]) -> bool:
    return name.lower() in names or name.lower().removesuffix("s").strip("_") in names


def is_sample(value: Any) -> bool:
    """Whether this may be a batch of what is denoised."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2


def one_per_row(value: Tensor, rows: int) -> bool:
    """Whether this may be a timestep for each row."""
    return value.ndim >= 1 and len(value) == rows == value.numel() and value.dtype != torch.bool


def _fits(output: Tensor, sample: Tensor) -> bool:
    """Equal batch and spatial sizes, with channels first or last."""
    a, b = output.shape, sample.shape
    return len(a) == len(b) and a[0] == b[0] and (a[2:] == b[2:] or a[1:-1] == b[1:-1])


def _refuse_graphs(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        is_segment = name == "batch" and isinstance(value, Tensor) and not value.is_floating_point()
        if _is_one_of(name, _GRAPH_NAMES) or is_segment or hasattr(value, "edge_index"):
            raise CallError(f"its argument `{name}` says that rows are nodes of graphs, not samples")
