"""Lightning under both of its names; a trainer's callbacks, found and put in order; a module's parts and attributes."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_iet.utilities.random import isolated_rng

T = TypeVar("T")

if TYPE_CHECKING or find_spec("pytorch_lightning") is None:

    class Callback(pl.Callback):
        """Base class of this package's callbacks."""

else:
    import lightning_utilities.core.rank_zero as rank_zero

    # Whichever name is imported last redirects the messages of both to its own logger; undo that.
    logger = getattr(rank_zero, "log", None)
    imported_by_us = "pytorch_lightning" not in sys.modules
    import pytorch_lightning

    if imported_by_us:
        rank_zero.log = logger

    class Callback(pl.Callback, pytorch_lightning.Callback):
        """Base class of this package's callbacks: of either Lightning's, in Python and on the command line."""


@cache
def lightning_classes(*paths: str) -> tuple[type, ...]:
    """Return the classes of these names in each Lightning that is imported, for ``isinstance``.

    Args:
        paths: Module and name of each class, below ``lightning.pytorch``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> isinstance(trainer.strategy, lightning_classes("strategies.SingleDeviceStrategy"))
        True
    """
    packages = [package for package in ("lightning.pytorch", "pytorch_lightning") if package in sys.modules]
    return tuple(
        getattr(import_module(f"{package}.{module}".rstrip(".")), name)
        for module, _, name in (path.rpartition(".") for path in paths)
        for package in packages
    )


def is_trial(trainer: pl.Trainer) -> bool:
    """Return whether a run takes a few steps as a trial, and keeps nothing: by ``fast_dev_run``, or to plan by."""
    return bool(trainer.fast_dev_run) or getattr(trainer, "is_measuring", False)  # type: ignore[attr-defined]


def is_cut_short(trainer: pl.Trainer) -> bool:
    """Return whether the epoch that ends now was broken off: by a limit of steps or time, or by early stopping.

    To be asked in ``on_train_epoch_end``. Sums of such an epoch are to be kept: from a checkpoint it may be continued.
    """
    loop = trainer.fit_loop.epoch_loop
    return not loop.batch_progress.is_last_batch and loop.done  # a stream that is shorter than it says is not done


def loss_of(outputs: Any, accumulated: int) -> Tensor | None:
    """Return the loss that a training step returned, which Lightning has divided by the number of accumulated batches.

    Args:
        outputs: What ``on_train_batch_end`` gets.
        accumulated: Of the trainer, ``accumulate_grad_batches``.

    Example:
        >>> import torch
        >>> loss_of({"loss": torch.tensor(0.5)}, 4)
        tensor(2.)
    """
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss * accumulated if isinstance(loss, Tensor) else None


def log_values(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Log values of the current epoch at the current step, on the first process, to all loggers."""
    for logger in trainer.loggers:
        logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step)


def log_image(trainer: pl.Trainer, name: str, path: Path) -> None:
    """Log a picture to those loggers that take pictures, as Weights & Biases does."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(name, [str(path)])


def num_shards_of(trainer: pl.Trainer, averaging: object) -> int:
    """Return the number of shards of a run: ``num_shards`` of a callback, where None is one for each process.

    Args:
        trainer: Of the run.
        averaging: The callback; of anything without ``num_shards``, such as None, the run has one shard.
    """
    shards: int | None = getattr(averaging, "num_shards", 1)
    return trainer.world_size if shards is None else shards


def is_sharded(strategy: object) -> bool:
    """Return whether a strategy spreads the parameters of one model over several processes."""
    names = {kind.__name__ for kind in type(strategy).__mro__}
    return not names.isdisjoint(("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"))


class Position(IntEnum):
    """Where a callback stands among those of a trainer, which calls each hook of all of them in this order."""

    RESUME = 0
    """Compares the checkpoints of all processes before any other callback acts."""
    AVERAGING = 1
    """In the last batch of a round, whatever else looks at the model finds the average."""
    DEFAULT = 2
    """All callbacks without a position of their own, in the order in which the user gave them."""
    CHECKPOINT = 3
    """Saves what the callbacks before it have done; Lightning orders checkpoint callbacks likewise."""
    STOP = 4
    """Ends the run after all that belongs to a step."""
    RELEASE = 5
    """Ends the averaging after an exception that all callbacks before it have seen."""
    EVALUATION = 6
    """The weights are final, and the last checkpoint is written."""


def order_callbacks(trainer: pl.Trainer, *added: pl.Callback) -> None:
    """Add callbacks to a trainer, and sort all of its callbacks by their :class:`Position`.

    A callback says its position in a class attribute ``position``. The order among callbacks of one position is kept.
    The trainer gets a new list, so that a hook may call this while the trainer goes through the old one.

    Example:
        >>> class Last(Callback):
        ...     position = Position.EVALUATION
        >>> shown = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = pl.Trainer(accelerator="cpu", callbacks=[Last()], **shown)
        >>> order_callbacks(trainer, pl.callbacks.Timer())
        >>> [type(callback).__name__ for callback in trainer.callbacks]
        ['Timer', 'ModelCheckpoint', 'Last']
    """
    checkpoints = lightning_classes("callbacks.Checkpoint")

    def position(callback: pl.Callback) -> Position:
        default = Position.CHECKPOINT if isinstance(callback, checkpoints) else Position.DEFAULT
        return getattr(callback, "position", default)

    trainer.callbacks = sorted(dict.fromkeys([*trainer.callbacks, *added]), key=position)  # type: ignore[attr-defined]


def find_callback(trainer: pl.Trainer, kind: type[T]) -> T | None:
    """Return the trainer's first callback of a class, or ``None``.

    Example:
        >>> trainer = pl.Trainer(logger=False, accelerator="cpu", callbacks=[pl.callbacks.Timer()])
        >>> find_callback(trainer, pl.callbacks.Timer) is trainer.callbacks[0]
        True
    """
    return next(iter(find_callbacks(trainer, kind)), None)


def find_callbacks(trainer: pl.Trainer, *kinds: type[T]) -> list[T]:
    """Return the trainer's callbacks of some classes, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]  # type: ignore[attr-defined]


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a hook or a method, as a replacement in :func:`patched_attribute`."""


def distinct_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all of its parts by name, each object once, in the order of ``named_modules``.

    ``named_modules`` keeps a set of what it has seen: of two parts that compare as equal it leaves one out, and parts
    without a hash stop it. Here only identity counts.

    Example:
        >>> class Equal(nn.Linear):
        ...     def __eq__(self, other):
        ...         return True
        ...     def __hash__(self):
        ...         return 0
        >>> module = nn.Sequential(Equal(1, 1), Equal(1, 1))
        >>> [name for name, _ in module.named_modules()], [name for name, _ in distinct_modules(module)]
        (['', '0'], ['', '0', '1'])
    """
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child, part in module._modules.items():
            if part is not None:
                yield from visit(f"{name}.{child}" if name else child, part)

    yield from visit("", root)


def named_part(root: nn.Module, name: str) -> nn.Module:
    """Return the part of a module that the user names as ``denoiser``.

    Raises:
        ValueError: If there is none of that name.

    Example:
        >>> named_part(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    try:
        return root.get_submodule(name)
    except AttributeError:
        children = [child for child, part in root._modules.items() if part is not None]
        raise ValueError(
            f"Argument `denoiser` expected the name of a module in {type(root).__name__}, such as one of {children}, "
            f"but got {name!r}."
        ) from None


@contextmanager
def isolated_module(module: nn.Module, *, seed: int = 0) -> Iterator[None]:
    """Use a module inside a block, seeded, and restore random generators and the training mode of each part after it.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with isolated_module(model):
        ...     _ = model.eval()
        >>> model.training, model[0].training, model[1].training
        (True, True, False)
    """
    modes = [(part, part.training) for _, part in distinct_modules(module)]
    try:
        with isolated_rng(seed=seed):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


_ABSENT = object()


@contextmanager
def patched_attribute(thing: object, name: str, replacement: object) -> Iterator[None]:
    """Replace an attribute inside a block, whether it is of the class, of the instance or a submodule.

    The replacement is an entry of the instance's ``__dict__``, which is removed, or restored, after the block.

    Example:
        >>> class Thing:
        ...     def name(self):
        ...         return "its own"
        >>> thing = Thing()
        >>> with patched_attribute(thing, "name", lambda: "another"):
        ...     thing.name()
        'another'
        >>> thing.name(), vars(thing)
        ('its own', {})
    """
    attributes = vars(thing)  # written directly: a plain function may not be assigned over a registered submodule
    before = attributes.get(name, _ABSENT)
    attributes[name] = replacement
    try:
        yield
    finally:
        if before is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = before
