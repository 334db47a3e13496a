"""Which operation measures an error, and what the error of each element is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

__all__ = ["ErrorOperation", "error_operation"]

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
    """A squared or absolute error in somebody's training step.

    Attributes:
        name: Of the operation, for the log.
        operands: What goes in and needs a gradient.
        elements: Makes the error of each element: a tensor with a graph if gradients are on.
        is_difference: Whether the operation itself takes a difference; else one must have been taken before.
    """

    name: str
    operands: tuple[Tensor, ...]
    elements: Callable[[], Tensor]
    is_difference: bool = False


def error_operation(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> ErrorOperation | None:
    """Recognise a squared or absolute error.

    Args:
        func: What a ``TorchFunctionMode`` was shown.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.

    Returns:
        The operation, or None if it is another one or needs no gradient.
    """
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
        return ErrorOperation(name, (operand,), lambda: result)
    if name in _NORMS:
        return ErrorOperation(name, (operand,), operand.square)
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
    return ErrorOperation(name, operands, elements, is_difference=True)
