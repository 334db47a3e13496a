"""Studies that several programs share, and what killed ones leave."""

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import sqlalchemy

from lightning_iet.search import shared_study
from lightning_iet.search.shared_study import SharedStudy, named_sampler, open_storage, shown_storage
from tests.helpers.distributed import forking

SPACE = {
    "a": optuna.distributions.CategoricalDistribution((0, 1)),
    "x": optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True),
}


def opened(folder, storage="journal", *, facts=None, objectives=None, seed=0, sampler="random"):
    """A study in a journal of the folder, which is faster than a database; ``storage=None`` is the default."""
    make, _ = named_sampler(sampler, trials=20)
    return SharedStudy(
        open_storage(folder / "search.journal" if storage == "journal" else storage, folder),
        "test",
        space=SPACE,
        objectives=objectives or {"cost": "minimize", "gain": "maximize"},
        facts={"family": "svdiff"} if facts is None else facts,
        sampler=make,
        seed=seed,
    )


def told(study, total):
    """Run trials whose objectives follow from their parameters; returns the parameters."""
    while (trial := study.next(total)) is not None:
        study.tell(trial.number, [trial.parameters["x"], trial.parameters["a"]], {"from": trial.number})
    return [trial.parameters for trial in study.trials()]


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_a_seed_draws_the_same_trials_in_one_go_or_in_parts(tmp_path, sampler):
    one, several, another = (tmp_path / f"{name}.journal" for name in ("one", "parts", "other"))
    with opened(tmp_path, one, sampler=sampler, seed=3) as study:
        whole = told(study, 12)
    for total in (1, 5, 12):
        with opened(tmp_path, several, sampler=sampler, seed=3) as study:
            parts = told(study, total)
    with opened(tmp_path, another, sampler=sampler, seed=4) as study:
        other = told(study, 12)
    assert whole == parts
    assert len({parameters["x"] for parameters in whole}) > 6  # evolution may hand a rate down
    assert other != whole


def test_results_come_back_as_they_were_told(tmp_path):
    with opened(tmp_path) as study:
        good, bad = study.next(2), study.next(2)
        study.tell(good.number, [1.0, 2.0], {"points": [1, (2, 3)], "nested": {"b": None}})
        study.fail(bad.number, "fid is nan")
        assert study.next(2) is None
    with opened(tmp_path) as study:
        first, second = study.trials()
    assert (first.state, first.result) == ("complete", {"points": [1, [2, 3]], "nested": {"b": None}})
    assert (second.state, second.reason, second.result) == ("failed", "fid is nan", None)


def test_a_trial_that_another_program_ends_at_the_same_moment_keeps_its_result(tmp_path, monkeypatch):
    """Between Optuna's look whether it has ended and the end that it writes."""
    with opened(tmp_path) as study, opened(tmp_path) as other:
        trial = study.next(1)
        storage = study._study._storage
        write = storage.set_trial_state_values

        def write_late(*args, **kwargs):
            other.tell(trial.number, [1.0, 2.0], {"from": "other"})
            return write(*args, **kwargs)

        monkeypatch.setattr(storage, "set_trial_state_values", write_late)
        study.tell(trial.number, [3.0, 4.0], {"from": "this"})
        monkeypatch.undo()
        (found,) = study.trials()
    assert (found.state, found.result) == ("complete", {"from": "other"})


def test_enqueued_trials_come_first_and_once(tmp_path):
    point = {"a": 1, "x": 1e-4}
    for _ in range(2):
        with opened(tmp_path) as study:
            study.enqueue(point)
            study.enqueue(point)
            trial = study.next()
            if trial is not None:
                assert trial.parameters == point
                study.tell(trial.number, [1.0, 1.0], None)
            assert study.next() is None
    assert len(study.trials()) == 1


def test_a_failed_point_can_be_enqueued_again_and_counts_once(tmp_path):
    point = {"a": 1, "x": 1e-4}
    with opened(tmp_path / "whole") as study:
        whole = told(study, 3)
    for total in (1, 3, 4, 4):
        with opened(tmp_path / "parts") as study:
            for _ in range(2):  # the second call finds that of the first waiting
                study.enqueue(point)
            trial = study.next(total)
            assert trial.parameters == point
            study.fail(trial.number, "no memory")
            told(study, total)
            assert len(study.trials()) == total
    assert [trial.state for trial in study.trials()] == ["complete"] * 3 + ["failed"]
    drawn = [trial.parameters for trial in study.trials() if trial.state == "complete"]
    assert drawn[:2] == whole[1:]  # each by the seed of its place: the failed one has the first


def test_a_point_whose_figure_is_no_number_is_not_enqueued_again(tmp_path):
    point = {"a": 1, "x": 1e-4}
    with opened(tmp_path) as study:
        study.enqueue(point)
        study.tell(study.next().number, [float("nan"), 1.0], None)
        study.enqueue(point)
        assert study.next() is None


def _die_after(folder, storage, stage):
    """A program that is killed: after the storage has made a trial, or while it runs one."""
    shared_study.UNCLAIMED = 0.1
    study = opened(Path(folder), storage)
    if stage == "drawn":
        study._claim = lambda number: os.kill(os.getpid(), signal.SIGKILL)
    with study:
        study.next(5)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("stage", "storage"),
    [("drawn", "trials.journal"), ("running", "sqlite:///{}/other.db")],
)
def test_what_a_killed_program_has_left_is_run_again(tmp_path, monkeypatch, stage, storage):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared_study, "UNCLAIMED", 0.1)
    storage = storage.format(tmp_path)
    for _ in range(2):
        process = forking().Process(target=_die_after, args=(tmp_path, storage, stage))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    with opened(tmp_path, storage) as study:
        parts = told(study, 5)
        assert study.num_elsewhere == 0
    with opened(tmp_path / "undisturbed") as study:
        assert told(study, 5) == parts


@pytest.fixture
def clock(monkeypatch):
    """Time that passes in sleep alone, an hour ahead of other machines'; ``clock.sleeps`` are called, one in each."""

    def sleep(seconds):
        found.now += seconds
        if found.sleeps:
            found.sleeps.pop(0)()

    ahead = time.time() + 3600
    found = SimpleNamespace(now=0.0, sleeps=[], sleep=sleep)
    found.time, found.monotonic = (lambda: ahead + found.now), (lambda: found.now)
    monkeypatch.setattr(shared_study, "time", found)
    return found


def test_a_trial_that_is_being_drawn_is_left_to_its_program_whatever_its_clock_says(tmp_path, clock):
    journal = tmp_path / "trials.journal"
    with opened(tmp_path, journal) as theirs, opened(tmp_path, journal) as ours:
        asked = theirs._study.ask({"a": SPACE["a"]})
        wait = [lambda: None] * 7  # of ten, until a trial without anything new counts as left
        clock.sleeps = [*wait, lambda: asked.suggest_float("x", 1e-5, 1e-3, log=True), *wait]
        clock.sleeps.append(lambda: theirs._claim(asked.number))
        assert ours.next(2).number == asked.number + 1
        assert not clock.sleeps
        assert ours.num_elsewhere == 1
        theirs._study.ask(SPACE)
        assert ours.next(3).number == asked.number + 3  # nothing came after the last one, which is struck out
        assert [trial.number for trial in ours.trials()] == [0, 1, 3]


def test_an_abandoned_trial_is_taken_over_by_one_program(tmp_path, clock):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as study:  # noqa: PT012
        first = study.next(1)
        raise KeyboardInterrupt
    with opened(tmp_path) as theirs, opened(tmp_path) as ours:
        clock.sleeps = [lambda: theirs._claim(first.number)]  # it found the trial at the same moment
        assert ours.next(1) is None
        assert ours.num_elsewhere == 1
        assert not ours._beating
        assert theirs._is_mine(theirs._all()[first.number])


def test_a_program_that_was_too_slow_does_not_run_what_was_struck_out(tmp_path, monkeypatch):
    with opened(tmp_path) as study:
        claim = study._claim
        monkeypatch.setattr(study, "_claim", lambda number: (number or study._strike_out(number), claim(number)))
        assert study.next(1).number == 1
        assert study._beating == {1}


def test_an_enqueued_trial_that_was_left_before_it_was_claimed_is_tried_in_the_same_call(tmp_path, clock):
    point = {"a": 1, "x": 1e-4}
    with opened(tmp_path) as theirs, opened(tmp_path) as ours:
        theirs.enqueue(point)
        theirs._study.ask(SPACE)  # and is killed
        assert ours.next().parameters == point
        assert ours.next() is None


def test_a_storage_that_is_away_for_a_moment_stops_no_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_study, "BEAT", 0.01)
    with opened(tmp_path) as study:
        number = study.next(1).number
        errors = [optuna.exceptions.StorageInternalError("away"), OSError("away")]
        write, reached = study._storage.set_trial_user_attr, threading.Event()

        def set_trial_user_attr(*arguments):
            if errors:
                raise errors.pop()
            write(*arguments)
            reached.set()

        monkeypatch.setattr(study._storage, "set_trial_user_attr", set_trial_user_attr)
        assert reached.wait(30)
        assert study._is_mine(study._all()[number])


def test_failed_trials_are_tried_again_and_count_once(tmp_path):
    with opened(tmp_path) as study:
        drawn = [study.next(3) for _ in range(3)]
        for trial, state in zip(drawn, ("complete", "failed", "failed"), strict=True):
            if state == "failed":
                study.fail(trial.number, "no memory")
            else:
                study.tell(trial.number, [1.0, 1.0], None)
        assert study.next(3) is None
        for _ in range(2):  # the second call finds those of the first waiting
            study.retry_failed()
        again = [study.next(3), study.next(3)]
        assert [trial.parameters for trial in again] == [trial.parameters for trial in drawn[1:]]
        assert study.next(3) is None
        study.tell(again[0].number, [2.0, 2.0], None)
        study.fail(again[1].number, "no memory, again")
        assert [(trial.number, trial.state) for trial in study.trials()] == [
            (0, "complete"),
            (3, "complete"),
            (4, "failed"),
        ]
        study.retry_failed()
        assert study.next(3).parameters == drawn[2].parameters
        assert study.next(4).number == 6  # a fourth one


def test_a_trial_whose_figure_is_no_number_has_ended_and_is_not_tried_again(tmp_path):
    with opened(tmp_path) as study:
        blind, failed, good = (study.next(3) for _ in range(3))
        study.tell(blind.number, [float("nan"), 1.0], None)
        study.fail(failed.number, "no memory")
        study.tell(good.number, [1.0, 1.0], None)
        study.retry_failed()
        assert [trial.has_figures for trial in study.trials()] == [True, True, False]
        assert study.next(3).parameters == failed.parameters
        assert study.next(3) is None


def test_an_interrupted_program_gives_its_trials_back(tmp_path, clock):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as study:  # noqa: PT012
        first = study.next(3)
        raise KeyboardInterrupt
    with opened(tmp_path) as study:
        assert study.next(3) == first


def test_a_trial_that_runs_elsewhere_is_left_alone_until_it_shows_no_life(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_study, "UNCLAIMED", 0.1)
    with opened(tmp_path) as theirs, opened(tmp_path) as ours:
        first = theirs.next(2)
        second = ours.next(2)
        assert second.number != first.number
        assert ours.next(2) is None
        assert ours.num_elsewhere == 1
        later = time.time() + shared_study.STALE + 1
        with monkeypatch.context() as patch:  # this machine lost power
            patch.setattr(time, "time", lambda: later)
            assert ours.next(2) == first
        ours.tell(first.number, [1.0, 1.0], "ours")
        theirs.tell(first.number, [2.0, 2.0], "theirs")  # too late, which is no error
        assert ours.trials()[first.number].result == "ours"


def test_a_sign_of_life_keeps_a_long_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_study, "BEAT", 0.01)
    with opened(tmp_path) as study:
        number = study.next(1).number

        def beat():
            return study._study.trials[number].user_attrs["claim"]["beat"]

        first, end = beat(), time.monotonic() + 30
        while beat() == first and time.monotonic() < end:
            time.sleep(0.01)
        assert beat() > first


def test_a_process_number_that_was_given_again_is_no_life(tmp_path):
    claim = shared_study._claim("token")
    assert shared_study._is_alive(claim)
    assert not shared_study._is_alive(claim | {"started": claim["started"] - 60})
    assert not shared_study._is_alive(claim | {"pid": 2**22 + 1})
    assert shared_study._is_alive(claim | {"pid": 2**22 + 1, "host": "another"})
    assert not shared_study._is_alive(None)


def _work(folder, storage, both):
    with opened(Path(folder), storage) as study:
        waits = True
        while (trial := study.next(12)) is not None:
            if waits:
                both.wait()  # neither goes on before the other has a trial too, however busy the machine is
                waits = False
            study.tell(trial.number, [1.0, 1.0], os.getpid())


@pytest.mark.parametrize("storage", [None, "shared.journal"])
def test_two_programs_share_a_storage(tmp_path, monkeypatch, storage):
    monkeypatch.chdir(tmp_path)
    opened(tmp_path, storage)
    both = forking().Barrier(2)
    processes = [forking().Process(target=_work, args=(tmp_path, storage, both)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    with opened(tmp_path, storage) as study:
        trials = study.trials()
    assert {trial.state for trial in trials} == {"complete"}
    assert 12 <= len(trials) <= 13  # both may ask for the last one at the same moment
    assert {trial.result for trial in trials} == {process.pid for process in processes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": {"family": "bias"}}, "expected family svdiff, with which it was begun, but got bias"),
        ({"facts": {"family": "svdiff", "steps": 3}}, "expected steps nothing, with which it was begun, but got 3"),
        ({"objectives": {"cost": "minimize", "other": "maximize"}}, "expected objectives.gain maximize"),
        (
            {"objectives": {"cost": "minimize", "gain": "minimize"}},
            "expected objectives.gain maximize, .* got minimize",
        ),
        (
            {"objectives": {"cost": "minimize", "gain": "maximize", "more": "minimize"}},
            "expected objectives.more nothing",
        ),
    ],
)
def test_another_search_in_the_storage_is_refused(tmp_path, changes, message):
    opened(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_study_of_somebody_else_is_refused(tmp_path):
    theirs = optuna.create_study(
        storage=f"sqlite:///{tmp_path}/search.db", study_name="test", directions=["minimize", "maximize"]
    )
    theirs.ask()
    with pytest.raises(ValueError, match="was made by another program"):
        opened(tmp_path, None)


def test_storages_that_cannot_be_opened(tmp_path):
    for url, message in (
        ("nodatabase://me:secret@host/x", "nodatabase://me:\\*\\*\\*@host/x"),
        (f"sqlite:///{tmp_path}/no/such/folder/x.db", "unable to open database file"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            open_storage(url, tmp_path)
        assert "secret" not in str(error.value)
        assert "\n" not in str(error.value)
    assert shown_storage(tmp_path / "a.journal") == str(tmp_path / "a.journal")


def test_a_database_file_does_not_wait_for_the_disk(tmp_path):
    with open_storage(None, tmp_path).engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    assert found == ["wal", 1]
    (tmp_path / "text.db").write_text("no database, however long it is. " * 99)
    with pytest.raises(ValueError, match="file is not a database"):
        open_storage(tmp_path / "text.db", tmp_path)


def test_samplers_are_named_with_their_options():
    made, said = named_sampler("tpe", trials=100)
    assert said == "TPESampler(n_startup_trials=20, multivariate=True, group=False, constant_liar=True)"
    assert isinstance(made(1), optuna.samplers.TPESampler)
    assert isinstance(named_sampler("random", trials=3)[0](1), optuna.samplers.RandomSampler)
    # At least three generations, the first of which is drawn at random.
    assert [named_sampler("nsga2", trials=n)[0](0)._population_size for n in (3, 30, 100)] == [2, 10, 20]
    with pytest.raises(ValueError, match="one of tpe, nsga2, random, but got 'anneal'"):
        named_sampler("anneal", trials=3)


@pytest.mark.parametrize(
    ("error", "message", "calls"),
    [
        (sqlalchemy.exc.IntegrityError, "UNIQUE constraint failed: alembic_version.version_num", 3),
        (sqlalchemy.exc.OperationalError, "table studies already exists", 3),
        (sqlalchemy.exc.OperationalError, "unable to open database file", 1),
    ],
)
def test_a_database_whose_tables_another_program_writes_is_opened_again(tmp_path, monkeypatch, error, message, calls):
    opened_with, whole = [], optuna.storages.RDBStorage

    def storage(url, **options):
        opened_with.append(url)
        if len(opened_with) < 3:
            raise error("INSERT", None, Exception(message))
        return whole(url, **options)

    monkeypatch.setattr(optuna.storages, "RDBStorage", storage)
    if calls == 1:
        with pytest.raises(ValueError, match=message):
            open_storage(tmp_path / "new.db", tmp_path)
    else:
        assert open_storage(tmp_path / "new.db", tmp_path).get_all_studies() == []
    assert len(opened_with) == calls
