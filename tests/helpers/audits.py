"""The command `audit` on the folders of the fixture `here`, and `audit-model` in seconds."""

import json
import re
from pathlib import Path

import pytest

from lightning_iet.cli import main
from lightning_iet.tools.audit import audit

DATE = "1700000000"  # for SOURCE_DATE_EPOCH: reports of the same images are the same, byte by byte

FILES = {"report.html", "pairs.csv", "metrics.json", "pairs.png", "ratios.png"}


COMMAND = ["--generated", "generated", "--train", "train", "--out", "report", "--k", "20", "--num-workers", "0"]


QUICK_MODEL = {
    "num_samples": 20,
    "num_inference_steps": 3,
    "batch_size": 8,
    "loss_timesteps": 5,
    "k": 5,
    "num_workers": 0,
}


def run(**options):
    settings = {
        "generated": Path("generated"),
        "train": Path("train"),
        "out": Path("report"),
        "k": 20,
        "num_workers": 0,
    }
    return audit(**settings | options)


def metrics(folder="report"):
    return json.loads(Path(folder, "metrics.json").read_text())


PROGRESS = r"[A-Z][A-Za-z ]+: (0 of [\d,]+|[\d,]+ of [\d,]+, about .* left)"


def said(text):
    """Lines of standard error, without those that tell on a busy machine how far the work is."""
    return [line for line in text.splitlines() if not re.fullmatch(PROGRESS, line)]


def fails(capsys, *arguments):
    """Runs a command that must end with status 2; returns its one line on standard error."""
    with pytest.raises(SystemExit) as stop:
        main(["audit", *arguments])
    assert stop.value.code == 2
    lines = said(capsys.readouterr().err)
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]
