"""One run over two machines (two network namespaces with their own addresses), one of which is cut off."""

import contextlib
import os
import shutil
import subprocess
import time

import pytest

from tests.helpers.launched import callback, sent, started, torchrun, weights, write_config
from tests.helpers.weights import assert_same_bits

TIMEOUT = 5  # seconds that the processes wait for one another
STEPS = 4  # of each shard in an epoch
NAMES = ("iet-test-0", "iet-test-1")


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two namespaces, each with one end of a cable."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs iproute2 and the rights of root, to make network namespaces")
    if (made := ip("netns", "add", NAMES[0], check=False)).returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        ip("netns", "add", NAMES[1])
        ip("link", "add", "cable0", "netns", NAMES[0], "type", "veth", "peer", "name", "cable1", "netns", NAMES[1])
        for number, name in enumerate(NAMES):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"cable{number}", "up")
        yield NAMES
    finally:
        for name in NAMES:
            ip("netns", "del", name, check=False)


def on_both(folder, config, timeout):
    """The same command on both machines; returns the status of each, and when it ended."""
    options = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=10.77.0.1", "--master-port=29500")
    with contextlib.ExitStack() as stack:
        machines = {}
        for rank, name in enumerate(NAMES):
            command = [
                "ip",
                "netns",
                "exec",
                name,
                *torchrun(*options, f"--node-rank={rank}", "--monitor-interval=0.1"),
            ]
            command += ["fit", "--config", config, "--ckpt_path", "last"]
            log = folder / f"log-{rank}.txt"
            running = started(*command, folder=folder, log=log, GLOO_SOCKET_IFNAME=f"cable{rank}")
            machines[rank] = stack.enter_context(running)
        ends, latest = {}, time.time() + timeout
        while len(ends) < 2 and time.time() < latest:
            ends |= {rank: time.time() for rank, one in machines.items() if rank not in ends and one.poll() is not None}
            time.sleep(0.05)
        logs = [(folder / f"log-{rank}.txt").read_text() for rank in machines]
        assert len(ends) == 2, f"Machines other than {sorted(ends)} hang:\n" + "\n".join(logs)
        return [machines[rank].returncode for rank in (0, 1)], [ends[0], ends[1]], logs


def test_a_machine_that_is_cut_off_ends_the_run_and_the_run_goes_on(tmp_path, tiny_weights, hosts, warm):
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"timeout": f"0:00:{TIMEOUT}"}}
    config = write_config(
        tmp_path / "tiny.yaml",
        callbacks=[callback("CutOff", step=10), callback("CountBytes"), callback("Starts")],
        saving={"every_n_train_steps": 10},
        num_nodes=2,
        strategy=strategy,
    )
    statuses, ends, logs = on_both(tmp_path, config, timeout=1_200)
    cut_at = float((tmp_path / "cut_off").read_text())
    for status, end, log in zip(statuses, ends, logs, strict=True):
        assert status != 0
        assert "The connection to another process was lost" in log
        assert "--ckpt_path last" in log
        assert end - cut_at < TIMEOUT + 150  # without the limit they would wait for half an hour

    # The bytes of the first averaging, at the end of the second epoch, and of steps that neither average nor save.
    for rank in (0, 1):
        copy, within, to_next = sent(tmp_path, rank)
        averaging = 2 * STEPS - 1
        assert within[averaging] == pytest.approx(2 * copy * (2 - 1) / 2, rel=0.05)
        assert max(to_next[step] for step in range(0, averaging, 2)) < copy / 50
        print(copy, within, to_next)
    print(logs[0][-3000:], ends, cut_at)

    ip("-n", NAMES[1], "link", "set", "cable1", "up")
    statuses, _, logs = on_both(tmp_path, config, timeout=1_200)
    assert statuses == [0, 0], "\n".join(logs)
    assert (tmp_path / "starts.txt").read_text().split() == ["0", "10"]
    assert_same_bits(weights(tmp_path), tiny_weights)
