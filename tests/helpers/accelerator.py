"""An accelerator made of the CPU: code runs there with values, and what a GPU would refuse or wait for is seen.

Its tensors are of the device ``meta``, which otherwise holds none, and hold a tensor of the CPU each. Operations that
mix them with tensors of the host raise, as on a GPU; results are those of the CPU, bit for bit, random numbers too.

A wait is what makes the host wait for a GPU: reading a value, an output whose size depends on values, and copies
between the two, also those to the device unless they are ``non_blocking``, as torch makes them from pageable memory.

Not seen: branches for ``device.type == "cuda"`` (pinned memory, free memory, its random generator), autocast and
kernels of a GPU, and communication between GPUs.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.helpers.models import quiet_trainer

DEVICE = torch.device("meta")
HOST = torch.device("cpu")

_READS = (
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "bincount", "is_nonzero", "equal", "histc",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "linalg_eigh", "_linalg_eigh",
    "_linalg_svd", "linalg_svd",
)  # fmt: skip
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class There(torch.Tensor):
    """A tensor of the accelerator; ``values`` are its own, on the CPU."""

    @staticmethod
    def __new__(cls, values):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, **layout, device=DEVICE)
        made.values = values
        return made

    is_meta = False  # it has values
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {}, Counter())

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        assert (self.shape, self.dtype, self.device) == (other.shape, other.dtype, other.device)
        self.values = other.values

    def data_ptr(self):
        return self.values.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # of checkpoints
        return self.detach().cpu().__reduce_ex__(protocol)

    def __repr__(self):
        return f"There({self.values})"


def _is_there(device):
    return device is not None and torch.device(device).type == DEVICE.type


def _values(entry):
    if isinstance(entry, There):
        return entry.values
    return HOST if isinstance(entry, torch.device) and entry.type == DEVICE.type else entry


def _computed(func, args, kwargs, waits):
    """What an operation returns; counts in ``waits`` if the host would wait for it."""
    name, goal = func.overloadpacket.__name__, kwargs.get("device")
    entries, structure = tree_flatten((args, kwargs))
    tensors = [entry for entry in entries if isinstance(entry, torch.Tensor)]
    is_there = any(isinstance(tensor, There) for tensor in tensors)
    if not is_there and not _is_there(goal):
        return func(*args, **kwargs)
    args_here, kwargs_here = tree_unflatten([_values(entry) for entry in entries], structure)
    if name in ("_to_copy", "copy_"):
        source, target = (args[1], args[0].device) if name == "copy_" else (args[0], goal or args[0].device)
        if _is_there(source.device) and not _is_there(target):
            waits["to the host"] += 1
        elif not _is_there(source.device) and not kwargs.get("non_blocking") and "non_blocking" not in args[2:]:
            waits["from the host"] += 1
        found = func(*args_here, **kwargs_here)
        if name == "copy_":
            return args[0]
        return There(found) if _is_there(target) else found
    if is_there:
        _check_devices(func, name, args, kwargs, tensors)
    if name in _READS or (name in _INDEXED and _is_by_mask(name, args)):
        waits[name] += 1
    elif name in _INDEXED and any(index is not None and not isinstance(index, There) for index in args[1]):
        waits["from the host"] += 1
    found = func(*args_here, **kwargs_here)
    changed = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if changed and len(func._schema.returns) == 1 and func._schema.returns[0].alias_info is not None:
        assert changed[0].shape == found.shape, f"{func} changes the shape of a tensor: not simulated"
        return changed[0]
    return tree_map_only(torch.Tensor, There, found)


def _check_devices(func, name, args, kwargs, tensors):
    """Raise what a GPU would raise; a number of the host, and indices into a tensor, may come from there."""
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{func} expected a generator of the accelerator, but got one of the host.")
    mixed = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.ndim]
    if name in _INDEXED and isinstance(args[0], There):
        mixed = []
    if mixed or (tensors and isinstance(tensors[0], There) is False and name in _INDEXED):
        raise RuntimeError(f"{func} expected all tensors to be on the same device, but got two.")


def _is_by_mask(name, args):
    """Whether the number of what is chosen is unknown to the host; one number is written without counting."""
    is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return is_mask and not ("put" in name and args[2].numel() == 1)


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {}, self.waits)


class _Numbers(TorchFunctionMode):
    """Numbers of the host become tensors there by a copy: torch makes none on the device ``meta``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.new_tensor and isinstance(args[0], There):
            return torch.tensor(*args[1:], **({"dtype": args[0].dtype} | kwargs)).to(DEVICE)
        if func is torch.Tensor.unsqueeze_ and isinstance(args[0], There):
            return torch.Tensor.unsqueeze(*args, **kwargs)  # a tensor's shape stays here what it was; callers chain
        is_number = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if is_number and _is_there(kwargs.get("device")):
            return func(*args, **(kwargs | {"device": HOST})).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def accelerator():
    """Within it there is :data:`DEVICE`; yields the counts, by operation, of what the host waited for."""
    autocast = torch.autocast
    with ExitStack() as stack:
        operations = stack.enter_context(_Operations())
        stack.enter_context(_Numbers())
        known = mock.patch.object(torch, "autocast", lambda kind, *args, **kwargs: autocast(
            HOST.type if kind == DEVICE.type else kind, *args, **kwargs
        ))  # fmt: skip
        stack.enter_context(known)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object, as elsewhere
        yield operations.waits


class _Accelerator(CPUAccelerator):
    def setup_device(self, device):
        """There is nothing to set up."""


def trainer_there(tmp_path, **kwargs):
    """A quiet trainer that trains on :data:`DEVICE`."""
    strategy = SingleDeviceStrategy(DEVICE, accelerator=_Accelerator())
    return quiet_trainer(tmp_path, **({"accelerator": "auto", "strategy": strategy} | kwargs))
