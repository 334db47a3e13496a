"""An Optuna study that several programs ask for trials; what a killed one has left is run again."""

import json
import os
import socket
import sqlite3
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any, Self

import psutil

from lightning_iet.functional.seeding import derive_seed
from lightning_iet.utilities.errors import first_line, require

SAMPLERS = ("tpe", "nsga2", "random")
BEAT = 30.0  # seconds between two signs of life
STALE = 150.0  # seconds without one, after which a trial of another machine counts as abandoned
_ATTEMPTS = 10  # to open a database whose tables another program writes at this moment
UNCLAIMED = 3.0  # seconds within which a program that draws or takes over a trial writes the next thing about it
_SPACE, _CLAIM, _RESULT, _REASON, _VOID = "space", "claim", "result", "reason", "void"
_ENQUEUED, _RETRIED = "enqueued", "retried"


@dataclass(frozen=True)
class StudyTrial:
    """A trial as the storage holds it.

    Attributes:
        number: of the trial in its study.
        parameters: by name.
        state: ``complete``, ``failed``, ``running`` or ``waiting``.
        result: what was told of a complete trial.
        reason: why a failed trial failed; empty where an objective that was told is no number.
    """

    number: int
    parameters: Mapping[str, Any]
    state: str
    result: Any = None
    reason: str = ""

    @property
    def has_figures(self) -> bool:
        """Whether it ran to its end: also one whose objective is no number, which Optuna counts as failed."""
        return self.state == "complete" or (self.state == "failed" and not self.reason)


def open_storage(storage: str | Path | None, folder: Path) -> Any:
    """Open where a study is kept.

    Args:
        storage: an URL that Optuna takes (``postgresql://…``, ``mysql://…``, ``sqlite:///…``), a path that ends in
            ``.journal`` for a journal file (which a network file system can hold, other than SQLite), any other path
            for an SQLite file, or None for ``search.db`` in ``folder``.
        folder: of the search.

    Returns:
        A storage of Optuna's.

    Raises:
        ModuleNotFoundError: without Optuna, or without the driver of the database.
        ValueError: if the database cannot be opened.
    """
    storages = require("optuna", "sweep").storages
    text = str(folder / "search.db" if storage is None else storage)
    if "://" not in text:
        path = Path(text).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".journal":
            lock = storages.journal.JournalFileOpenLock(str(path))
            return storages.JournalStorage(storages.journal.JournalFileBackend(str(path), lock_obj=lock))
        text = f"sqlite:///{path}"
    # SQLite locks the whole file while another program writes.
    options = {"connect_args": {"timeout": 100, "factory": _WriteAhead}} if text.startswith("sqlite") else {}
    errors = require("sqlalchemy", "sweep").exc
    try:
        for attempt in range(_ATTEMPTS):
            try:
                return storages.RDBStorage(text, engine_kwargs=options)
            except (errors.IntegrityError, errors.OperationalError, errors.ProgrammingError) as error:
                # Optuna looks whether its tables are there, then writes them: another program may do so in between.
                written = isinstance(error, errors.IntegrityError) or "already exists" in str(error)
                if not written or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.2)
    except (ImportError, errors.SQLAlchemyError) as error:
        raise ValueError(
            f"Argument `storage` expected a database that can be opened, but got {shown_storage(text)} "
            f"({first_line(error)}). Look at the URL, or install the database's driver."
        ) from error


class _WriteAhead(sqlite3.Connection):
    """Does not wait for the disk at every commit, of which a trial has dozens.

    A program that is killed loses nothing, a machine without power the last trials at most.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        with suppress(sqlite3.OperationalError):  # another program is at work: it has set the file's mode
            self.execute("PRAGMA journal_mode=WAL")
        self.execute("PRAGMA synchronous=NORMAL")


def shown_storage(storage: str | Path) -> str:
    """Return a storage's name without the password that an URL may hold.

    Example:
        >>> shown_storage("postgresql://me:secret@host/studies"), shown_storage("search.journal")
        ('postgresql://me:***@host/studies', 'search.journal')
    """
    text = str(storage)
    if "://" not in text:
        return text
    return str(require("sqlalchemy.engine", "sweep").make_url(text).render_as_string(hide_password=True))


def named_sampler(name: str, *, trials: int) -> tuple[Callable[[int], Any], str]:
    """Return how a sampler is made from a seed, for so many trials in all, and its name with all options that matter.

    Optuna's defaults differ between versions and between one and several objectives, so that every option is given.

    Raises:
        ValueError: for another name than ``tpe``, ``nsga2`` and ``random``.

    Example:
        >>> named_sampler("nsga2", trials=30)[1]
        'NSGAIISampler(population_size=10, crossover_prob=0.9, swapping_prob=0.5)'
    """
    samplers = require("optuna", "sweep").samplers
    # A first generation of Optuna's 50 would be drawn at random, and be the whole of a search of 50 trials.
    options: dict[str, dict[str, Any]] = {
        "tpe": {"n_startup_trials": max(10, trials // 5), "multivariate": True, "group": False, "constant_liar": True},
        "nsga2": {"population_size": max(2, min(20, trials // 3)), "crossover_prob": 0.9, "swapping_prob": 0.5},
        "random": {},
    }
    classes = {"tpe": "TPESampler", "nsga2": "NSGAIISampler", "random": "RandomSampler"}
    if name not in options:
        raise ValueError(f"Argument `sampler` expected one of {', '.join(SAMPLERS)}, but got {name!r}.")
    written = ", ".join(f"{key}={value}" for key, value in options[name].items())
    return lambda seed: getattr(samplers, classes[name])(seed=seed, **options[name]), f"{classes[name]}({written})"


class SharedStudy:
    """Asks an Optuna study for trials and tells their results.

    A trial is claimed by the program that runs it, with a sign of life every half minute. A program that finds a claim
    of its own machine whose process is gone, or one without a sign of life for 150 seconds, runs that trial again with
    the same parameters; clocks of machines may differ by a minute. Of programs that take over one trial at once, the
    last to write its claim has it: each waits three seconds, and reads it again. The sampler is made anew for every
    trial from the seed and the number of trials before, so that one program draws the same trials whether it was
    interrupted or not.

    Args:
        storage: of Optuna's, see :func:`open_storage`.
        name: of the study.
        space: distributions by the name of a parameter.
        objectives: ``minimize`` or ``maximize``, by the name of an objective.
        facts: what must be the same whenever the study is opened, by name; anything that JSON holds.
        added: names of facts that a study begun by an earlier version lacks; it takes them over when it is opened.
        sampler: makes a sampler from a seed; None where every trial is enqueued.
        seed: of the draws.

    Raises:
        ValueError: if the storage holds a study of this name with other parameters, objectives or facts.
    """

    def __init__(
        self,
        storage: Any,
        name: str,
        *,
        space: Mapping[str, Any],
        objectives: Mapping[str, str],
        facts: Mapping[str, Any],
        added: Collection[str] = (),
        sampler: Callable[[int], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self._optuna = require("optuna", "sweep")
        self._states = self._optuna.trial.TrialState
        self._storage, self._space, self._sampler, self._seed = storage, dict(space), sampler, seed
        self.name = name
        self._token = uuid.uuid4().hex
        with self._quiet():
            self._study = self._optuna.create_study(
                storage=storage, study_name=name, directions=list(objectives.values()), load_if_exists=True
            )
            self._check(_json({"objectives": dict(objectives), **facts}), added)
            self._study.set_metric_names(list(objectives))
        self._id = storage.get_study_id_from_name(name)
        self._beating: set[int] = set()
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        """Start the signs of life."""
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop them, and give back the trials that did not end: whoever comes next runs them."""
        self._stop.set()
        self._thread.join()
        for number in list(self._beating):
            self._set(number, _CLAIM, None)
            self._beating.discard(number)

    def trials(self) -> list[StudyTrial]:
        """Return all trials that were drawn, by number; of those that were tried again, the last try."""
        return [self._read(trial) for trial in self._known()]

    def enqueue(self, parameters: Mapping[str, Any]) -> None:
        """Have a point tried before any other, unless it has ended well, runs or waits.

        Where it has failed, it is tried again in the place of that trial, and counts once.
        """
        same = [t for t in self._known() if t.system_attrs.get("fixed_params", t.params) == parameters]
        if any(trial.state != self._states.FAIL or _REASON not in trial.user_attrs for trial in same):
            return
        again = {_RETRIED: same[-1].number} if same else {}
        self._study.enqueue_trial(dict(parameters), user_attrs={_ENQUEUED: True, **again})

    def retry_failed(self) -> None:
        """Have the trials that have failed so far tried again, with their parameters, before any other.

        Those whose objective is no number ran to their end, and would have the same figures again.
        """
        for trial in self._known():
            if trial.state == self._states.FAIL and _REASON in trial.user_attrs:
                self._study.enqueue_trial(trial.params, user_attrs={_ENQUEUED: True, _RETRIED: trial.number})

    def next(self, total: int | None = None) -> StudyTrial | None:
        """Claim a trial: one that was cut off, one that was enqueued, or a new one.

        Args:
            total: trials of the whole study, more are not drawn; None for those that are enqueued and no others.

        Returns:
            The trial, or None if all are done or run elsewhere.
        """
        with self._quiet():
            while True:
                for trial in self._abandoned(self._all()):
                    if self._take_over(trial.number):
                        return self._read(trial)
                known = self._known()  # read again: the search for abandoned ones may have struck some out
                drawn = sum(trial.state != self._states.WAITING for trial in known)
                if drawn == len(known) if total is None else drawn >= total:
                    return None
                if self._sampler is not None:
                    self._study.sampler = self._sampler(derive_seed(self._seed, drawn) % 2**32)
                asked = self._study.ask(self._space)
                if self._is_superfluous(asked, total):
                    self._strike_out(asked.number)
                    continue
                self._claim(asked.number)
                if self._is_mine(self._all()[asked.number]):
                    return StudyTrial(asked.number, dict(asked.params), "running")
                self._beating.discard(asked.number)  # this program was so slow that another one has struck it out

    def tell(self, number: int, values: Sequence[float], result: Any) -> None:
        """Store a trial's objectives and whatever else is to be known of it, in JSON."""
        self._set(number, _RESULT, _json(result))
        if any(map(isnan, values)):  # of which Optuna keeps none
            self._end(number, state=self._states.FAIL)
        else:
            self._end(number, values=list(values))

    def fail(self, number: int, reason: str) -> None:
        """Store that a trial failed, and why."""
        self._set(number, _REASON, reason)
        self._end(number, state=self._states.FAIL)

    def discard(self) -> None:
        """Remove the study from its storage, with all trials; not while this program gives signs of life."""
        self._optuna.delete_study(study_name=self.name, storage=self._storage)

    @property
    def num_elsewhere(self) -> int:
        """Number of trials that other programs run now."""
        return sum(trial.state == self._states.RUNNING and not self._is_mine(trial) for trial in self._all())

    def _all(self) -> list[Any]:
        return self._study.get_trials(deepcopy=False)

    def _known(self) -> list[Any]:
        """Trials that count: neither struck out, nor tried again."""
        drawn = [trial for trial in self._all() if _VOID not in trial.user_attrs]
        again = {trial.user_attrs.get(_RETRIED) for trial in drawn}
        return [trial for trial in drawn if trial.number not in again]

    def _read(self, trial: Any) -> StudyTrial:
        names = {"COMPLETE": "complete", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
        notes = trial.user_attrs
        return StudyTrial(
            trial.number, dict(trial.params), names[trial.state.name], notes.get(_RESULT), notes.get(_REASON, "")
        )

    def _end(self, number: int, **outcome: Any) -> None:
        # Another program may have taken the trial over while this one was suspended, and have ended it, or end it now.
        with suppress(RuntimeError):
            self._study.tell(number, skip_if_finished=True, **outcome)
        self._beating.discard(number)

    def _set(self, number: int, key: str, value: Any) -> None:
        trial = self._storage.get_trial_id_from_study_id_trial_number(self._id, number)
        with suppress(RuntimeError):  # another program has ended the trial
            self._storage.set_trial_user_attr(trial, key, value)

    def _strike_out(self, number: int) -> None:
        self._set(number, _VOID, True)
        self._end(number, state=self._states.FAIL)

    def _claim(self, number: int) -> None:
        self._set(number, _CLAIM, _claim(self._token))
        self._beating.add(number)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            for number in list(self._beating):
                with suppress(self._optuna.exceptions.OptunaError, OSError):  # a storage that is away comes back
                    self._set(number, _CLAIM, _claim(self._token))

    def _is_mine(self, trial: Any) -> bool:
        return (trial.user_attrs.get(_CLAIM) or {}).get("token") == self._token

    def _is_superfluous(self, asked: Any, total: int | None) -> bool:
        """Whether another program was faster: it took the last enqueued trial, or enqueued the same point before."""
        if _ENQUEUED not in asked.user_attrs:
            return total is None
        return any(
            trial.number < asked.number
            and trial.params == asked.params
            and trial.state != self._states.FAIL
            and _ENQUEUED in trial.user_attrs
            and trial.user_attrs.get(_RETRIED) == asked.user_attrs.get(_RETRIED)
            for trial in self._all()
        )

    def _take_over(self, number: int) -> bool:
        """Claim an abandoned trial; of several programs that do so at once, the last to write has it."""
        trial = self._all()[number]
        if trial.state != self._states.RUNNING or _is_alive(trial.user_attrs.get(_CLAIM)):
            return False  # another one was faster
        self._claim(number)
        time.sleep(UNCLAIMED)
        if self._is_mine(self._all()[number]):
            return True
        self._beating.discard(number)
        return False

    def _is_left_unclaimed(self, trial: Any) -> bool:
        """Wait for the claim of a trial that is being drawn; whether nothing more comes, by this machine's clock."""
        drawn, began = len(trial.params), time.monotonic()
        while time.monotonic() - began < UNCLAIMED:
            time.sleep(UNCLAIMED / 10)
            trial = self._all()[trial.number]
            if _CLAIM in trial.user_attrs or trial.state != self._states.RUNNING:
                return False
            if len(trial.params) > drawn:
                drawn, began = len(trial.params), time.monotonic()
        return True

    def _abandoned(self, trials: Sequence[Any]) -> Iterator[Any]:
        """Trials that nobody runs any more; those that were not drawn to the end are struck out."""
        for trial in trials:
            if trial.state != self._states.RUNNING or self._is_mine(trial):
                continue
            if _CLAIM not in trial.user_attrs:
                if self._is_left_unclaimed(trial):
                    self._strike_out(trial.number)
                    if _ENQUEUED in trial.user_attrs:  # who asked for it may not do so again
                        fixed = trial.system_attrs["fixed_params"]
                        self._study.enqueue_trial(fixed, user_attrs=dict(trial.user_attrs))
            elif not _is_alive(trial.user_attrs[_CLAIM]):
                yield trial

    def _check(self, facts: Mapping[str, Any], added: Collection[str]) -> None:
        known = self._study.user_attrs.get(_SPACE)
        if known is not None and (lacking := {name: facts[name] for name in added if name not in known}):
            known |= lacking
            self._study.set_user_attr(_SPACE, known)
        if known is None:
            if self._study.get_trials(deepcopy=False):
                raise ValueError(
                    f"Study '{self.name}' in the storage was made by another program. Give another storage."
                )
            self._study.set_user_attr(_SPACE, facts)
            return
        difference = _first_difference(known, facts)
        if difference is not None:
            name, old, new = difference
            raise ValueError(
                f"Study '{self.name}' expected {name} {old}, with which it was begun, but got {new}. Give the same "
                "settings, or another storage or folder."
            )

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Leave out what Optuna logs of every trial, and warnings about options that 4.x calls experimental."""
        level = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                yield
        finally:
            self._optuna.logging.set_verbosity(level)


def _claim(token: str) -> dict[str, Any]:
    """Describe this program: where it runs, and that it runs now."""
    process = psutil.Process()
    return {
        "host": _host(), "pid": process.pid, "started": process.create_time(), "token": token, "beat": time.time(),
    }  # fmt: skip


def _host() -> str:
    """Name of the machine; containers on one machine number their processes each by itself."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(claim: Mapping[str, Any] | None) -> bool:
    """Whether the program that wrote a claim still runs, as far as one can know."""
    if claim is None or time.time() - claim["beat"] > STALE:
        return False
    if claim["host"] != _host():
        return True
    try:
        process = psutil.Process(claim["pid"])
        same = abs(process.create_time() - claim["started"]) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _json(value: Any) -> Any:
    """What comes back from JSON, so that tuples and lists compare equal."""
    return json.loads(json.dumps(value))


def _first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Name and values of the first entry in which two mappings differ.

    Example:
        >>> _first_difference({"a": {"x": 1, "y": 2}}, {"a": {"x": 1, "z": 2}})
        ('a.y', 2, 'nothing')
    """
    if not isinstance(old, dict) or not isinstance(new, dict):
        return None if old == new else (name, old, new)
    for key in [*old, *(key for key in new if key not in old)]:
        found = _first_difference(old.get(key, "nothing"), new.get(key, "nothing"), f"{name}.{key}".lstrip("."))
        if found is not None:
            return found
    return None
