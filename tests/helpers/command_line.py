"""Commands that end soon."""

import pytest

from lightning_iet.cli import main

# The same runs in seconds: a smaller U-Net, fewer epochs, fewer images to judge by, no plots.
QUICK = [
    "--model.unet.init_args.block_out_channels=[8,8]",
    "--model.unet.init_args.norm_num_groups=4",
    "--trainer.max_epochs=2",
    "--averaging.every_n_epochs=1",
    "--evaluation.num_samples=60",
    "--evaluation.num_inference_steps=2",
    "--evaluation.pictures=false",
    "--trainer.enable_model_summary=false",
]


def fails(capsys, *arguments):
    """Runs a command that must end with status 2; returns its one line on standard error."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert "Traceback" not in error[0]
    return error[0]
