"""torchrun brings a job back whose process has died, from the last checkpoint, without a hand."""

from tests.helpers.launched import callback, started, torchrun, weights, write_config
from tests.helpers.weights import assert_same_bits


def test_a_process_that_dies_brings_the_job_back(tmp_path, tiny_weights, warm):
    config = write_config(
        tmp_path / "tiny.yaml",
        callbacks=[callback("DieOnce", step=7), callback("Starts")],
        saving={"every_n_train_steps": 6},
        devices=2,
    )
    command = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1")
    log = tmp_path / "log.txt"
    # Else torch (2.15) lets a restarted process find the addresses of those of the attempt before, by chance.
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with started(
        *command, "fit", "--config", config, "--ckpt_path", "last", folder=tmp_path, log=log, **fresh
    ) as process:
        assert process.wait(120) == 0, log.read_text()
    assert (tmp_path / "died").exists()
    assert (tmp_path / "starts.txt").read_text().split() == ["0", "6"]
    assert_same_bits(weights(tmp_path), tiny_weights)
    assert "the run starts afresh" in log.read_text()
    assert "Going on from" in log.read_text()
