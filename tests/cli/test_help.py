"""Help of the trainer's commands."""

import re
import sys

import pytest

from lightning_iet.cli import main
from lightning_iet.cli.help import first_sentence, plain


@pytest.fixture(autouse=True)
def _wide(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-iet"])


def page(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "100", "114", "115", "120"])
def test_help_of_fit_begins_with_its_own_options_in_plain_text(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = page(capsys, "fit", "--help")
    lines = text.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= int(columns)
    assert not re.search(r":\w+:`|``|\.\. math|\\[a-z]|\bNone\b|see above|intervals\. for", text)
    places = [
        text.index(option) for option in ("--images", "--agc.threshold", "--evaluation.k", "--trainer.max_epochs")
    ]
    assert places == sorted(places)
    assert "--help-all" in lines[-1]


def test_all_options_are_there_when_asked_for(capsys):
    text = page(capsys, "fit", "--help-all")
    assert "--trainer.reload_dataloaders_every_n_epochs" in text
    assert len(text.splitlines()) > 300


@pytest.mark.parametrize(
    ("option", "name", "shown"),
    [
        ("--model.help", "DiffusionModule", "--model.ema_decay"),
        ("--data.help", "ImageFolderDataModule", "--data.image_size"),
    ],
)
def test_help_of_a_class_shows_the_class_alone(option, name, shown, capsys):
    text = page(capsys, "fit", option, name)
    assert text.startswith(f"{name}: ")
    assert shown in text
    assert len(text.splitlines()) < 80
    assert "torch.nn.modules" not in text


def test_the_program_alone_lists_its_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.index("\ntrain\n") < error.index("\naudit\n") < error.index("\nsearch\n")


def test_markup_becomes_text():
    assert plain(r"See :func:`~a.b.c`, :math:`\lambda = 1`, **each**.") == "See c, lambda = 1, each."
    assert first_sentence("One, i.e. this. Two.") == "One, i.e. this."
