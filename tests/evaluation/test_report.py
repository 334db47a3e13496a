"""metrics.json says what has written it, and whoever reads it looks."""

import json
import re

import pytest

from lightning_iet.evaluation.report import read_metrics
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
