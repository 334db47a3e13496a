"""What an accelerator would notice, on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountWaits(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += mask or name.lstrip("_").startswith(tuple(wait.lstrip("_") for wait in self.WAITS))
        return func(*args, **(kwargs or {}))
