"""Which points of a sweep are tried."""

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from lightning_iet.sweeps.sweep_file import Parameter, SweepFile
from lightning_iet.utilities.imports import require

__all__ = ["Search", "grid_points"]


def grid_points(parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    """Yield every combination of values; the last parameter changes first.

    Example:
        >>> list(grid_points({"a": Parameter(values=(1, 2)), "b": Parameter(values=(3,))}))
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    for values in product(*(parameter.values for parameter in parameters.values())):
        yield dict(zip(parameters, values, strict=True))


class Search:
    """Draws points by Optuna, at random or by its tree-structured Parzen estimator for ``bayes``.

    What was tried is kept in a file, so that a search goes on where it was cut off.

    Args:
        sweep: the sweep, of method ``random`` or ``bayes``.
        folder: where the file goes.
        seed: of the draws.

    Raises:
        ModuleNotFoundError: without Optuna.
    """

    def __init__(self, sweep: SweepFile, folder: Path, *, seed: int = 0) -> None:
        optuna = require("optuna", "sweep")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = {name: _distribution(optuna, kind) for name, kind in sweep.parameters.items()}
        kind = optuna.samplers.TPESampler if sweep.method == "bayes" else optuna.samplers.RandomSampler
        self._study = optuna.create_study(
            storage=f"sqlite:///{folder.absolute() / 'search.db'}",
            study_name=sweep.name,
            load_if_exists=True,
            direction="maximize" if sweep.maximize else "minimize",
        )
        self._study.sampler = kind(seed=seed + len(self._study.trials))
        waiting = optuna.trial.TrialState.RUNNING
        self._states = optuna.trial.TrialState
        self._cut_off = self._study.get_trials(deepcopy=False, states=(waiting,))

    @property
    def finished(self) -> int:
        """Number of points that were tried to their end, in this search or before."""
        ended = (self._states.COMPLETE, self._states.FAIL)
        return len(self._study.get_trials(deepcopy=False, states=ended))

    def next(self) -> tuple[int, dict[str, Any]]:
        """Return a point's number and values: first those that an interruption cut off."""
        if self._cut_off:
            trial = self._cut_off.pop(0)
            return trial.number, dict(trial.params)
        trial = self._study.ask(self._distributions)
        return trial.number, dict(trial.params)

    def tell(self, number: int, value: float | None) -> None:
        """Take in a point's figure, or ``None`` if its run failed."""
        if value is None:
            self._study.tell(number, state=self._states.FAIL)
        else:
            self._study.tell(number, value)


def _distribution(optuna: Any, parameter: Parameter) -> Any:
    kinds = optuna.distributions
    if parameter.distribution == "categorical":
        return kinds.CategoricalDistribution(parameter.values)
    if parameter.distribution == "int_uniform":
        return kinds.IntDistribution(int(parameter.low), int(parameter.high))
    return kinds.FloatDistribution(parameter.low, parameter.high, log=parameter.distribution == "log_uniform_values")
