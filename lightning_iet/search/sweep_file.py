"""Which points of a sweep are tried."""

import json
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import yaml

from lightning_iet.search.shared_study import SharedStudy, named_sampler, open_storage
from lightning_iet.utilities.errors import require, yaml_fault

Method: TypeAlias = Literal["grid", "random", "bayes"]
Distribution: TypeAlias = Literal["categorical", "uniform", "int_uniform", "log_uniform_values"]
OBJECTIVE = "eval/objective"
"""What a sweep minimises unless its file says otherwise: FID, raised by copies beyond those of held-out images."""
_ARGUMENTS = "${args}"
_KEYS = ("value", "values", "distribution", "min", "max")
# What Weights & Biases reads at the top of a file, but for what changes which runs there are.
_TOP = ("method", "metric", "command", "parameters", "run_cap", "name", "program", "project", "entity", "description")


@dataclass(frozen=True)
class Parameter:
    """What a parameter may be.

    Attributes:
        values: all there is, of a categorical one.
        distribution: how a value is drawn.
        low: least value of a distribution over numbers.
        high: greatest value.
    """

    values: tuple[Any, ...] = ()
    distribution: Distribution = "categorical"
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class SweepFile:
    """A sweep.

    Attributes:
        path: the file.
        name: what the sweep is called; the file's name, if it does not say.
        method: how points are chosen.
        command: the program and its arguments; ``${args}`` stands for those of a point.
        parameters: by the name of an option.
        metric: the figure to optimise, as loggers know it.
        maximize: whether more of it is better.
        cap: at most so many runs; of a grid, the first ones.
    """

    path: Path
    name: str
    method: Method
    command: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    metric: str
    maximize: bool
    cap: int | None

    def arguments(self, point: Mapping[str, Any]) -> list[str]:
        """The command of one point.

        Example:
            >>> sweep = SweepFile(Path("s.yaml"), "s", "grid", ("fit", "${args}"), {}, "eval/fid", False, None)
            >>> sweep.arguments({"agc.threshold": 0.5, "agc.num_bins": None, "trainer.logger": True})
            ['fit', '--agc.threshold=0.5', '--agc.num_bins=null', '--trainer.logger=true']
        """
        options = [f"--{name}={_text(value)}" for name, value in point.items()]
        return [part for word in self.command for part in (options if word == _ARGUMENTS else [word])]


def _text(value: Any) -> str:
    """Text as it stands; anything else in JSON, which YAML reads: ``true``, ``null``, ``[8, 16]``."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_sweep(path: Path) -> SweepFile:
    """Read a sweep's file in YAML, as ``wandb sweep`` takes it: ``method``, ``command``, ``parameters`` and ``metric``.

    Without ``metric``, that is ``eval/objective``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks something, or asks for what only Weights & Biases can do.
    """
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"Argument `files` expected files of sweeps, but got '{path}', which {why}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _unfit(path, "YAML", yaml_fault(error)) from error
    if not isinstance(content, dict):
        raise _unfit(path, "a mapping", repr(content))
    if others := [str(key) for key in content if key not in _TOP]:
        hint = " All runs go to their end here: remove it." if "early_terminate" in others else " Remove it."
        raise _unfit(path, f"{', '.join(_TOP)} only", f"`{others[0]}`", hint)
    method = cast(Method, content.get("method"))
    if method not in get_args(Method):
        raise _unfit(path, "`method` grid, random or bayes", repr(method))
    metric = content.get("metric", {"name": OBJECTIVE})
    if (
        not isinstance(metric, dict)
        or not isinstance(metric.get("name"), str)
        or metric.get("goal", "minimize") not in ("minimize", "maximize")
    ):
        raise _unfit(path, "`metric` with a `name` and a `goal`, minimize or maximize", repr(metric))
    if others := [key for key in metric if key not in ("name", "goal")]:
        raise _unfit(path, "`metric` with a `name` and a `goal` only", f"`{others[0]}`")
    cap = content.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise _unfit(path, "`run_cap`, an integer ≥ 1", repr(cap), _written_out(cap))
    parameters = content.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise _unfit(path, "`parameters`", repr(parameters))
    return SweepFile(
        path=path,
        name=str(content.get("name") or path.stem),
        method=method,
        command=_command(path, content.get("command")),
        parameters={name: _parameter(path, name, given, method) for name, given in parameters.items()},
        metric=metric["name"],
        maximize=metric.get("goal") == "maximize",
        cap=cap,
    )


def _command(path: Path, command: Any) -> tuple[str, ...]:
    words = tuple(map(str, command)) if isinstance(command, list) else ()
    if words[:1] == ("${env}",):  # of Unix, which makes no difference here
        words = words[1:]
    unknown = [word for word in words if word != _ARGUMENTS and string.Template(word).get_identifiers()]
    if _ARGUMENTS not in words or unknown:
        raise _unfit(path, f"a list `command` with {_ARGUMENTS} as its only variable", repr(command))
    return words


def _parameter(path: Path, name: str, given: Any, method: Method) -> Parameter:
    if not isinstance(given, dict) or set(given) - set(_KEYS):
        raise _unfit(path, f"parameter `{name}` with {', '.join(_KEYS)} only", repr(given))
    if "values" in given or "value" in given:
        values = given["values"] if "values" in given else [given["value"]]
        if isinstance(values, list) and values:
            return Parameter(values=tuple(values))
        raise _unfit(path, f"parameter `{name}` with a list of values", repr(values))
    low, high = (cast(float, given.get(bound)) for bound in ("min", "max"))
    numbers = all(isinstance(bound, int | float) for bound in (low, high)) and low < high
    whole = isinstance(low, int) and isinstance(high, int)
    kind = given.get("distribution", "int_uniform" if whole else "uniform")
    if method == "grid" or not numbers or kind not in get_args(Distribution)[1:]:
        wanted = "values" if method == "grid" else "values, or min < max and a uniform distribution"
        hint = "" if method == "grid" else _written_out(low) or _written_out(high)
        raise _unfit(path, f"parameter `{name}` with {wanted}", repr(given), hint)
    return Parameter(distribution=cast(Distribution, kind), low=low, high=high)


def _unfit(path: Path, expected: str, got: str, hint: str = "") -> ValueError:
    return ValueError(f"Sweep '{path}' expected {expected}, but got {got}.{hint}")


def _written_out(value: Any) -> str:
    """Say how to write a number that YAML 1.1 reads as text, for it has no point; empty if it is something else.

    Example:
        >>> _written_out("1e-5"), _written_out("-2E4"), _written_out("1_0e3"), _written_out("much")
        (' YAML reads 1e-5 as text: write 1.0e-5.', ' YAML reads -2E4 as text: write -2.0e+4.', ...
    """
    match = re.fullmatch(r"([-+]?[\d_]+)(\.[\d_]*)?[eE]([-+]?)(\d+)", value) if isinstance(value, str) else None
    if match is None:
        return ""
    whole, part, sign, power = match.groups()
    return f" YAML reads {value} as text: write {whole}{part or '.0'}e{sign or '+'}{power}."


def grid_points(parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    """Yield every combination of values; the last parameter changes first.

    Example:
        >>> list(grid_points({"a": Parameter(values=(1, 2)), "b": Parameter(values=(3,))}))
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    for values in product(*(parameter.values for parameter in parameters.values())):
        yield dict(zip(parameters, values, strict=True))


def open_study(sweep: SweepFile, folder: Path, *, trials: int, seed: int = 0) -> SharedStudy:
    """Return the study that points of a sweep are drawn from, at random or by Optuna's TPE for ``bayes``.

    What was tried is kept in ``search.db`` in the folder, so that a sweep goes on where it was cut off; ``trials`` is
    the number of points in all.

    Raises:
        ModuleNotFoundError: without Optuna.
        ValueError: if the folder holds a sweep with other parameters, or another command.
    """
    kinds = require("optuna", "sweep").distributions
    space = {name: _distribution(kinds, parameter) for name, parameter in sweep.parameters.items()}
    make, _ = named_sampler("tpe" if sweep.method == "bayes" else "random", trials=trials)
    return SharedStudy(
        open_storage(None, folder),
        sweep.name,
        space=space,
        objectives={sweep.metric: "maximize" if sweep.maximize else "minimize"},
        facts={
            "parameters": {name: kinds.distribution_to_json(kind) for name, kind in space.items()},
            "command": sweep.command,
        },
        added=["command"],
        sampler=make,
        seed=seed,
    )


def _distribution(kinds: Any, parameter: Parameter) -> Any:
    if parameter.distribution == "categorical":
        return kinds.CategoricalDistribution(parameter.values)
    if parameter.distribution == "int_uniform":
        return kinds.IntDistribution(int(parameter.low), int(parameter.high))
    return kinds.FloatDistribution(parameter.low, parameter.high, log=parameter.distribution == "log_uniform_values")
