"""Processes that run tasks: with functions that report where they run, fail, and die."""

import os
import signal
import time

import psutil
import pytest
import torch

from lightning_iet.search import jobs
from lightning_iet.search.jobs import Workers
from tests.helpers.distributed import forking


def task(word):
    """What a process does with a word."""
    if word == "fail":
        raise ValueError("not this one\nand more")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return word, os.getpid(), torch.get_num_threads()


@pytest.fixture(autouse=True)
def _forks(monkeypatch):
    """Processes are forks of a warm one: starting Python anew would take most of a test's time."""
    monkeypatch.setattr(jobs, "_CONTEXT", forking())


def run(pool, words):
    words, outcomes = list(words), {}
    while True:
        while words and pool.is_free:
            pool.start(words.pop(0))
        if not pool.is_busy:
            return outcomes
        outcomes |= {outcome.task: outcome for outcome in pool.finished()}


def test_one_job_runs_here_and_one_task_after_the_other():
    with Workers(lambda word: task(word), jobs=1) as pool:
        outcomes = run(pool, ["a", "fail", "b"])
    assert outcomes["a"].value[1] == outcomes["b"].value[1] == os.getpid()
    assert outcomes["fail"].value is None
    assert outcomes["fail"].error == "ValueError: not this one"
    assert all(outcome.seconds >= 0 for outcome in outcomes.values())


def test_two_jobs_share_two_processes_and_a_dead_one_is_replaced():
    with Workers(task, jobs=2) as pool:
        outcomes = run(pool, ["a", "b", "die", "c", "fail", "d"])
        processes = {outcomes[word].value[1] for word in "abcd"}
    assert "status -9" in outcomes["die"].error
    assert outcomes["fail"].error == "ValueError: not this one"
    assert os.getpid() not in processes
    assert 2 <= len(processes) <= 3
    threads = max(1, os.cpu_count() // 2)
    assert {outcomes[word].value[2] for word in "abcd"} == {threads}
    for process in processes:  # none is left
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_function_that_no_other_process_can_import():
    with pytest.raises(ValueError, match="`jobs` expected 1 for a function that other processes cannot import"):
        Workers(lambda word: word, jobs=2)


def _leave_workers_behind(connection):
    pool = Workers(report, jobs=2)
    pool.start(connection)
    connection.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def report(connection):
    """Say which process this is, and never end."""
    connection.send(os.getpid())
    time.sleep(600)


def test_workers_end_with_the_program_that_is_killed():
    ours, theirs = forking().Pipe()
    process = forking().Process(target=_leave_workers_behind, args=(theirs,))
    process.start()
    worker = ours.recv()
    ours.send("die")
    process.join()
    end = time.monotonic() + 30
    while psutil.pid_exists(worker) and time.monotonic() < end:
        time.sleep(0.02)
    assert not psutil.pid_exists(worker)
