"""metrics.json says what has written it, and whoever reads it looks."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from lightning_iet.evaluation import report as reports
from lightning_iet.evaluation.memorization import Closeness
from lightning_iet.evaluation.report import read_metrics, report_table, write_pictures
from lightning_iet.tools.compare import compare
from lightning_iet.tools.export import model_card
from tests.helpers.digit_models import fresh_model, save_checkpoint


def written(folder, content):
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "metrics.json"


@pytest.mark.parametrize("kind", ["evaluation", "audit"])
def test_a_file_of_the_kind_is_read_with_all_its_keys(tmp_path, kind):
    content = {"kind": kind, "settings": {"k": 50}}
    assert read_metrics(written(tmp_path / "new", content), kind=kind) == content
    assert read_metrics(written(tmp_path / "old", {"settings": {}}), kind=kind) == {"settings": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "audit"}, "expected the measures of an evaluation, but got 'audit'"),
        ([], "expected the measures of an evaluation, but got 'list'"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_metrics(written(tmp_path / "run", content), kind="evaluation")


def test_an_audit_is_no_run_and_a_run_no_audit(tmp_path):
    audit, run = written(tmp_path / "audit", {"kind": "audit"}), written(tmp_path / "run", {"kind": "evaluation"})
    with pytest.raises(ValueError, match=r"written by `lightning-iet fit`, but got .*but got 'audit'"):
        compare([audit.parent], out=tmp_path / "out")
    model = fresh_model()
    save_checkpoint(model, tmp_path / "last.ckpt")
    options = {"ckpt": tmp_path / "last.ckpt", "use_ema": True, "sampler": "ddpm", "name": "model"}
    with pytest.raises(ValueError, match="Argument `audit` expected the folder of a report"):
        model_card(model, audit=run.parent, **options)


@pytest.mark.parametrize("distinct", [None, torch.tensor([0.2, 0.1])])
def test_the_picture_of_pairs_says_which_ratio_it_shows(monkeypatch, tmp_path, distinct):
    """With near-duplicates counted once it is not ``d1 / d2``, by which such images count as memorized in the table."""
    shown = {}
    for name in ("image_grid", "training_curves", "memorized_quantity_curve", "save_figure"):
        monkeypatch.setattr(reports, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(reports, "nearest_pairs", lambda *args, **kwargs: shown.update(kwargs, ratios=args[2]))
    settings = {"ratio": 1 / 3, "k": 50, "sampler": "ddim", "num_inference_steps": 2, "use_ema": True, "seed": 0}
    names = ("loss_by_epoch", "validation_loss", "round_epochs", "weights_by_epoch", "skip_rate_by_timestep")
    report = {
        "settings": settings,
        "run": {"threshold": None, "num_timesteps": None},
        "curves": dict.fromkeys((*names, "loss_by_timestep")),
        "generated": {"mq": {}},
        "control": {"mq": {}},
    }
    ratio, images = torch.tensor([1.0, 0.9]), torch.rand(2, 1, 8, 8)
    closeness = Closeness(ratio, ratio, torch.tensor([0, 1]), distinct)
    assessor = SimpleNamespace(train=images, name=str)
    assessment = SimpleNamespace(images=images, closeness=closeness)
    write_pictures(report, tmp_path, assessor=assessor, assessment=assessment, num_pairs=2)
    assert shown["ratios"] == pytest.approx([0.9, 1.0] if distinct is None else [0.1, 0.2])
    assert ("label" in shown) == (distinct is not None)
    if distinct is not None:
        assert "the next one that shows something else (near-duplicates count once); below 0.33" in shown["title"]


def test_one_image_is_spoken_of_as_one():
    part = {"memorized_fraction": 0.0, "copied_fraction_of_repeated": 0.5, "copied_fraction_of_others": 0.0}
    part |= {"num_images": 4, "mq": {"0.15": 0.0}, "further": {}}
    report = {
        "verdict": "", "settings": {"ratio": 1 / 3, "features": None, "k": 50, "sampler": "ddim", "use_ema": True,
        "num_inference_steps": 2, "seed": 0}, "generated": part, "control": part,
        "data": {"num_train": 3, "near_duplicates": 2, "groups_of_near_duplicates": 1, "num_reference": 4},
        "run": {"threshold": None},
    }  # fmt: skip
    cells = list(report_table(report).columns[0].cells)
    assert "copies of the 1 image with near-duplicates" in cells
    assert "copies of the 1 other" in cells
