"""One call of a denoiser in a training step, and each sample's loss, at the first error behind its output."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from lightning_iet.callbacks.anti_gradient_control.losses.protocols import Selection
from lightning_iet.utilities.errors import first_line

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


def tensors_in(output: Any, depth: int = 10) -> Iterator[Tensor]:
    """All tensors in up to ``depth`` containers inside one another, such as a module returns; they may be circular."""
    if isinstance(output, Tensor):
        yield output
    elif depth == 0:
        return
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value, depth - 1)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value, depth - 1)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for entry in dataclasses.fields(output):
            yield from tensors_in(getattr(output, entry.name, None), depth - 1)  # a field may be unset


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


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse_loss": F.mse_loss,
    "l1_loss": F.l1_loss,
    "smooth_l1_loss": F.smooth_l1_loss,
    "huber_loss": F.huber_loss,
    "gaussian_nll_loss": F.mse_loss,  # its squared error; the variance is another output
}
_SETTINGS = ("beta", "delta")
_ELEMENTWISE = ("square", "abs", "absolute")
_POWERS = ("pow", "float_power")
_PRODUCTS = ("mul", "multiply")
_NORMS = ("norm", "linalg_norm", "linalg_vector_norm", "vector_norm")


@dataclass(frozen=True)
class ErrorOperation:
    """A squared or absolute error in a training step."""

    name: str
    operands: tuple[Tensor, ...]  # what goes in and needs a gradient
    elements: Callable[[], Tensor]  # makes the error of each element, with a graph if gradients are on
    result: Tensor  # what the operation returned
    is_difference: bool = False  # whether it takes a difference itself; else one must have been taken before


def error_operation(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> ErrorOperation | None:
    """Recognise a squared or absolute error in a call of torch; None if it is none, or needs no gradient."""
    if type(result) is not Tensor or not result.requires_grad:  # a tracing compiler shows tensors of its own kind
        return None
    name = getattr(func, "__name__", "").rstrip("_")
    if name in _LOSSES:
        return _loss(name, args, kwargs, result)
    operand = args[0] if args else kwargs.get("input")
    if not isinstance(operand, Tensor):
        return None
    other = args[1] if len(args) > 1 else kwargs.get("exponent", kwargs.get("other"))
    is_power = name in _POWERS and not isinstance(other, Tensor) and other == 2
    is_product = name in _PRODUCTS and other is operand
    if name in _ELEMENTWISE or is_power or is_product:
        return ErrorOperation(name, (operand,), lambda: result, result)
    if name in _NORMS:
        return ErrorOperation(name, (operand,), operand.square, result)
    return None


def _loss(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> ErrorOperation | None:
    named = dict(zip(("input", "target"), args, strict=False)) | dict(kwargs)
    prediction, target = named.get("input"), named.get("target")
    if not (isinstance(prediction, Tensor) and isinstance(target, Tensor)):
        return None

    def elements() -> Tensor:
        if name != "gaussian_nll_loss" and result.ndim and result.numel() == max(prediction.numel(), target.numel()):
            return result  # it was asked for without reduction
        settings = {key: kwargs[key] for key in _SETTINGS if key in kwargs}
        return _LOSSES[name](prediction, target, reduction="none", **settings)

    operands = tuple(tensor for tensor in (prediction, target) if tensor.requires_grad)
    return ErrorOperation(name, operands, elements, result, is_difference=True)


_DIFFERENCES = ("Sub", "Rsub", "Add", "Lerp", "Compiled")


class ErrorWatch(TorchFunctionMode):
    """Passes the squared and absolute errors that this thread computes to a function, between ``start`` and ``stop``.

    It lies at the bottom of the stack of modes: a ``with torch.device(…)`` may begin before it and end first.

    Args:
        notice: Takes each error that needs a gradient.
        look: Takes every operation's function, positional and keyword arguments, and result, if given.

    Example:
        >>> names = []
        >>> watch = ErrorWatch(lambda error: names.append(error.name))
        >>> watch.start()
        >>> loss = (torch.ones(3, requires_grad=True) - 2) ** 2
        >>> watch.stop()
        >>> names
        ['pow']
    """

    def __init__(self, notice: Callable[[ErrorOperation], None], look: Callable[..., None] | None = None) -> None:
        super().__init__()
        self.notice = notice
        self.look = look

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call, and look at the result."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return result
        if self.look is not None:
            self.look(func, args, kwargs, result)
        error = error_operation(func, args, kwargs, result)
        if error is not None:
            self.notice(error)
        return result

    def start(self) -> None:
        """Begin to watch, unless it does already."""
        self._restack(present=True)

    def stop(self) -> None:
        """Watch no longer."""
        self._restack(present=False)

    def _restack(self, *, present: bool) -> None:
        stack = _get_current_function_mode_stack()  # private, and what torch.device itself uses to lie at the bottom
        if (self in stack) == present:
            return
        others = [mode for mode in stack if mode is not self]
        for _ in stack:
            _pop_mode()
        for mode in [self, *others] if present else others:
            _push_mode(mode)


def owners_behind(tensor: Tensor, owners: Mapping[Node, int], *, after_difference: bool = False) -> set[int]:
    """Numbers of those nodes of the graph that a tensor was computed from; with or without a difference on the way."""
    found: set[int] = set()
    todo = [(tensor.grad_fn, not after_difference)]
    seen = set(todo)
    while todo and len(found) < len(set(owners.values())):
        node, counts = todo.pop()
        if node is None:
            continue
        if node in owners:
            found |= {owners[node]} if counts else set()
            continue
        counts = counts or node.name().startswith(_DIFFERENCES)
        news = {(following, counts) for following, _ in node.next_functions} - seen
        seen |= news
        todo.extend(news)
    return found


def calls_behind(error: ErrorOperation, calls: Sequence[DenoiserCall]) -> list[DenoiserCall]:
    """Those of some calls on whose outputs an error depends, through a difference."""
    owners = {node: number for number, call in enumerate(calls) for node in call.nodes}
    found: set[int] = set()
    for operand in error.operands:
        found |= owners_behind(operand, owners, after_difference=not error.is_difference)
    return [calls[number] for number in sorted(found)]


def nodes_behind(tensor: Tensor) -> set[Node]:
    """All nodes of the graph that a tensor was computed from."""
    found: set[Node] = set()
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo.extend(following for following, _ in node.next_functions)
    return found


_UNKNOWN = -1


@dataclass(frozen=True)
class Layout:
    """Where the samples lie in a tensor of errors: on an axis, alone, or merged with others into one."""

    axis: int = 0
    major: bool = True  # whether the samples vary slowest in what was merged into the axis, as in ``(b h w)``
    whole: bool = True  # whether the axis holds all rows of the denoiser's output; else it holds a loss per entry

    def rows(self, errors: Tensor, batch_size: int) -> Tensor:
        """One row of errors per loss, shape (n, k)."""
        size = batch_size if self.whole else errors.shape[self.axis]
        split = errors.unflatten(self.axis, (size, -1) if self.major else (-1, size))
        return split.movedim(self.axis if self.major else self.axis + 1, 0).reshape(size, -1)

    def fits(self, errors: Tensor, batch_size: int) -> bool:
        """Whether a tensor can be laid out so."""
        if self.axis >= errors.ndim:
            return False
        size = errors.shape[self.axis]
        return size > 0 and size % batch_size == 0 if self.whole else 0 < size < batch_size


def layouts(errors: Tensor, batch_size: int) -> Iterator[Layout]:
    """The layouts that a tensor of errors may have, the usual one first."""
    candidates = [Layout(axis, major) for major in (True, False) for axis in range(errors.ndim)]
    for layout in [*candidates, Layout(whole=False)]:
        if layout.fits(errors, batch_size):
            yield layout


def row_maps(rows: Tensor, outputs: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    r"""For each row of each output, tell the one loss that depends on it.

    Row-local means :math:`\partial l_i / \partial o_j = 0` unless :math:`i = m(j)`. Loss :math:`i` is weighted by 2
    where a bit of :math:`i` is set and by 1 elsewhere; the gradient at row :math:`j` must then be exactly once or twice
    what it is with all weights 1, and which of them is that bit of :math:`m(j)`. So :math:`1 + \log_2 n` passes through
    the tail of the graph compare all pairs of rows. It waits for the device.

    Args:
        rows: Errors behind the outputs, shape (n, k), one row per loss, with a graph that is kept.
        outputs: For each call of the denoiser the tensors that it returned, each with B rows.

    Returns:
        For each call the number of the loss by row, (B,), on the CPU, -1 where no gradient arrives; None if some row
        has a part in several losses.

    Example:
        >>> out = torch.ones(4, 2, requires_grad=True)
        >>> row_maps(out.square().flip(0), [[out]])
        [tensor([3, 2, 1, 0])]
        >>> row_maps(out.square() / out.square().mean(), [[out]]) is None
        True
    """
    losses = rows.sum(1)  # sums: means of half precision would vanish
    tensors = [tensor for call in outputs for tensor in call]
    lengths = [len(call) for call in outputs]

    def gradients(weights: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(losses, tensors, weights, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]
        flat = iter([(torch.view_as_real(g) if g.is_complex() else g).flatten(1) for g in filled])
        return [torch.cat([next(flat).double() for _ in range(length)], 1) for length in lengths]

    once = gradients(torch.ones_like(losses))
    tolerance = math.sqrt(torch.finfo(tensors[0].dtype).eps)
    maps = [torch.zeros(len(gradient), dtype=torch.long) for gradient in once]
    numbers = torch.arange(len(losses), device=losses.device)
    for bit in range((len(losses) - 1).bit_length()):
        weighted = gradients(1 + (numbers >> bit & 1).to(losses.dtype))
        for found, ones, row_map in zip(weighted, once, maps, strict=True):
            limit = tolerance * ones.abs().amax(1)
            single, double = ((found - times * ones).abs().amax(1) <= limit for times in (1, 2))
            if not (single | double | ~ones.isfinite().all(1)).all():
                return None
            row_map += (double & ~single).cpu().long() << bit
    return [torch.where(_live(ones).cpu(), row_map, _UNKNOWN) for ones, row_map in zip(once, maps, strict=True)]


def _live(gradients: Tensor) -> Tensor:
    """Rows that tell something: neither all zero nor broken."""
    return gradients.isfinite().all(1) & gradients.ne(0).any(1)


_Key: TypeAlias = tuple[int, ...]


@dataclass
class _Part:
    """Losses of some or all samples, and for each call the loss of each row of it."""

    losses: Tensor
    maps: list[Tensor]


class LossCapture:
    """Turns errors that appear behind a denoiser's output into one loss per sample.

    Which errors count, and how samples lie in them, is settled with the first batch: the first error through which a
    gradient reaches the output, and further ones until every row of the output has a loss. For each new batch size,
    :func:`row_maps` tests that each row of the output has a part in one loss only; later batches of that size are not
    tested, and do not wait for the device.

    Attributes:
        pending: The calls whose losses are being measured.
        failure: Why they cannot be; raised when the step comes to its backward pass.
        description: How they are, once it is settled.
        seen: Number of errors seen so far.
        probing: Whether gradients are being taken for the test: they are none of the user's.
    """

    def __init__(self) -> None:
        self.pending: list[DenoiserCall] = []
        self.failure: CallError | None = None
        self.description = ""
        self.seen = 0
        self.probing = False
        self._layouts: dict[int, Layout] = {}  # of the errors that count, by their place among all
        self._maps: dict[_Key, list[Tensor]] = {}
        self._pairings: dict[_Key, _Pairing] = {}
        self._parts: list[_Part] = []
        self._place = 0

    def begin(self, calls: list[DenoiserCall]) -> None:
        """Measure the losses of these calls, from the next error on."""
        self.pending, self._parts, self._place = calls, [], 0

    def notice(self, error: ErrorOperation, *, counts: bool = True) -> None:
        """Take in an error; when it completes the losses of the calls behind it, these get their verdict to be.

        Of an error that does not count, for the loss does not depend on it, only its place is taken.
        """
        calls = calls_behind(error, self.pending)
        if not calls or self.failure is not None:
            return
        place, self._place = self._place, self._place + 1
        self.seen += 1
        if not counts or (self.description and place not in self._layouts):
            return
        try:
            part = self._measure(error, calls, place)
            if part is None:
                return
            if not self._adds(part):
                del self._layouts[place]
                return
            self._parts.append(part)
            self._complete(calls, error.name)
        except CallError as failure:
            self.failure = failure

    def incomplete(self) -> CallError | None:
        """What to say of a step that ends before every row has a loss."""
        if not self._parts:
            return None
        call = self.pending[-1]
        num_rows = int((self._join(0, call, sum(len(part.losses) for part in self._parts)) >= 0).sum())
        return CallError(f"only {num_rows} of its {call.batch_size} rows have a loss")

    def _adds(self, part: _Part) -> bool:
        """Whether a part measures rows that none has measured yet; of no interest once the parts are settled."""
        if self.description or not self._parts:
            return True
        pairs = zip(part.maps, *(earlier.maps for earlier in self._parts), strict=True)
        return any(((new >= 0) & (torch.stack(known).amax(0) < 0)).any() for new, *known in pairs)

    def _measure(self, error: ErrorOperation, calls: list[DenoiserCall], place: int) -> _Part | None:
        """Lay the samples out; None if no gradient passes."""
        size = calls[0].batch_size
        layout = self._layouts.get(place)
        if layout is not None:
            with torch.no_grad():
                rows = self._rows(error, layout, size)
            key = (place, len(rows), *(call.batch_size for call in calls))
            if key in self._maps:
                return _Part(_mean(rows), self._maps[key])
        elements = error.elements()  # with a graph, also where the step itself reduced it at once
        for candidate in layouts(elements, size) if layout is None else [layout]:
            rows = candidate.rows(elements, size)
            maps = self._probe(rows, calls)
            if maps is not None:
                if layout is None and all((row_map < 0).all() for row_map in maps):
                    _refuse_broken(elements, error.name)
                    return None
                self._layouts[place] = candidate
                self._maps[(place, len(rows), *(call.batch_size for call in calls))] = maps
                return _Part(_mean(rows.detach()), maps)
        raise CallError(
            f"the errors behind it, `{error.name}` of shape {tuple(elements.shape)}, mix its {size} rows: the gradient"
            " of one sample's loss reaches another's row"
        )

    def _rows(self, error: ErrorOperation, layout: Layout, size: int) -> Tensor:
        elements = error.elements().detach()
        if not layout.fits(elements, size):
            raise CallError(
                f"the errors behind it, `{error.name}` of shape {tuple(elements.shape)}, do not fit its {size} rows any"
                " more"
            )
        return layout.rows(elements, size)

    def _probe(self, rows: Tensor, calls: list[DenoiserCall]) -> list[Tensor] | None:
        self.probing = True
        try:
            return row_maps(rows, [call.outputs for call in calls])
        except RuntimeError as error:  # a graph that may be passed through only once, say
            raise CallError(f"the graph of its losses cannot be tested ({first_line(error)})") from error
        finally:
            self.probing = False

    def _complete(self, calls: list[DenoiserCall], name: str) -> None:
        """Put the parts together once every row has a loss."""
        if self.description and len(self._parts) < len(self._layouts):
            return
        losses = torch.cat([part.losses for part in self._parts])
        key = (len(losses), *(call.batch_size for call in calls))
        if key not in self._pairings:
            maps = [self._join(number, call, len(losses)) for number, call in enumerate(calls)]
            if any((row_map < 0).any() for row_map in maps):
                return
            self._pairings[key] = _pair(maps, calls, losses)
        self.description = self.description or f"the first `{name}` behind its output, averaged per sample"
        pairing = self._pairings[key]
        timesteps = torch.cat([call.timesteps for call in calls])
        verdict = Verdict(losses, timesteps if pairing.first_rows is None else timesteps[pairing.first_rows])
        for call, row_map in zip(calls, pairing.row_maps, strict=True):
            call.row_map, call.verdict = row_map, verdict
        self.begin([call for call in self.pending if call.verdict is None])

    def _join(self, number: int, call: DenoiserCall, num_losses: int) -> Tensor:
        """For each row of a call its loss among those of all parts, (B,); -1 where none is known."""
        joined = torch.full((call.batch_size,), -1)
        offset = 0
        for part in self._parts:
            row_map = part.maps[number]
            joined = torch.where((joined < 0) & (row_map >= 0), row_map + offset, joined)
            offset += len(part.losses)
        if len(self._parts) == 1 and num_losses == call.batch_size:
            # A row that no gradient reaches (a sample that is masked out, say): its place says which it is.
            joined = torch.where(joined < 0, torch.arange(call.batch_size), joined)
        return joined


@dataclass
class _Pairing:
    """Which rows belong to which loss; None where they are simply the same."""

    row_maps: list[Tensor | None]
    first_rows: Tensor | None


def _pair(maps: list[Tensor], calls: list[DenoiserCall], losses: Tensor) -> _Pairing:
    """Check that the rows of one loss have one timestep, and move the maps to the device."""
    timesteps = torch.cat([call.timesteps for call in calls])
    owners = torch.cat(maps)
    first_rows = torch.full((len(losses),), -1)
    first_rows[owners.flip(0)] = torch.arange(len(owners)).flip(0)  # the first of several is written last
    if (first_rows < 0).any():
        raise CallError(f"of the {len(losses)} losses behind it some belong to none of its rows")
    if not torch.equal(timesteps, timesteps[first_rows[owners]]):
        raise CallError("rows at different timesteps share one loss, as in consistency training, which AGC is not for")
    same = [torch.equal(row_map, torch.arange(len(losses))) for row_map in maps]
    return _Pairing(
        row_maps=[None if plain else row_map.to(losses.device) for plain, row_map in zip(same, maps, strict=True)],
        first_rows=None if len(calls) == 1 and same[0] else first_rows.to(timesteps.device),
    )


def _refuse_broken(elements: Tensor, name: str) -> None:
    if not elements.detach().isfinite().any():
        raise CallError(
            f"its losses (`{name}`) are NaN or infinite before anything was learnt: look at data and weights"
        )


def _mean(rows: Tensor) -> Tensor:
    """Mean of each row, (n,), at least in float32."""
    return rows.mean(1, dtype=torch.promote_types(rows.dtype, torch.float32))


_ASSIGNMENTS = ("__setitem__",)
_DEPTH = 3  # of an operation's tensors: a list of them among its arguments


class _Marks(NamedTuple):
    """Numbers of calls."""

    passing: frozenset[int] = frozenset()  # whose outputs a gradient reaches
    fixed: frozenset[int] = frozenset()  # whose outputs are in the values, but no gradient reaches


class Origins:
    """Follows the outputs of a denoiser through the operations of one step, scaled, clamped or mixed as they may be.

    Example:
        >>> import torch
        >>> student, teacher, origins = nn.Linear(1, 1), nn.Linear(1, 1), Origins()
        >>> made, target = torch.ones(1, requires_grad=True), torch.zeros(1)
        >>> origins.add(student, [made])
        >>> origins.add(teacher, [target])
        >>> error = made - target
        >>> origins.follow(torch.Tensor.sub, (made, target), {}, error)
        >>> [module is teacher for module in origins.foreign(error)]
        [True]
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._marks: dict[int, tuple[Tensor, _Marks]] = {}  # by id of the tensor, which lives as long

    def __bool__(self) -> bool:
        return bool(self._modules)

    def add(self, module: nn.Module, outputs: Iterable[Tensor]) -> None:
        """A call has returned these outputs: whatever was followed inside it does not matter any more."""
        outputs = list(outputs)
        if not outputs:
            return
        number = frozenset([len(self._modules)])
        self._modules.append(module)
        for tensor in outputs:
            self._marks[id(tensor)] = tensor, _Marks(passing=number) if tensor.requires_grad else _Marks(fixed=number)

    def follow(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Mark what an operation made of what is marked."""
        marks = [self._marks[id(t)][1] for t in tensors_in((args, kwargs), _DEPTH) if id(t) in self._marks]
        if not marks:
            return
        passing = frozenset().union(*(mark.passing for mark in marks))
        fixed = frozenset().union(*(mark.fixed for mark in marks))
        name = getattr(func, "__name__", "")
        in_place = name in _ASSIGNMENTS or (name.endswith("_") and not name.endswith("__"))
        for tensor in tensors_in(args[:1] if in_place else result, _DEPTH):
            made = _Marks(passing, fixed) if tensor.requires_grad else _Marks(fixed=passing | fixed)
            self._marks[id(tensor)] = tensor, made

    def foreign(self, tensor: Tensor) -> list[nn.Module]:
        """The modules whose outputs are in a tensor without a gradient, those excepted that a gradient reaches too."""
        marks = self._marks[id(tensor)][1] if id(tensor) in self._marks else _Marks()
        return [self._modules[number] for number in sorted(marks.fixed - marks.passing)]

    def clear(self) -> None:
        """Forget all."""
        self._modules, self._marks = [], {}
