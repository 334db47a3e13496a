from pathlib import Path

import pytest

from lightning_iet.cli import main
from lightning_iet.tools.configs import configurations, summary
from tests.helpers.command_line import fails


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_list_names_each_with_a_line(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    for name, file in configurations().items():
        assert any(line.startswith(f"{name} ") and line.endswith(f"  {summary(file)}") for line in lines)


def test_one_is_shown_and_copied(capsys):
    text = configurations()["digits/iet"].read_text()
    main(["configs", "digits/iet"])
    assert capsys.readouterr().out == text
    main(["configs", "digits/iet", "--out", "mine/run.yaml"])
    assert Path("mine/run.yaml").read_text() == text
    assert "lightning-iet fit --config mine/run.yaml" in capsys.readouterr().out
    main(["configs", "sweeps/shards", "--out", "sweep.yaml"])
    assert "lightning-iet sweep sweep.yaml" in capsys.readouterr().out
    main(["configs", "images", "--out", "images.yaml"])
    assert "lightning-iet fit --config images.yaml --images FOLDER\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits/ie"], "Did you mean digits/iet?"),
        (["digits/iet", "--out", "there.yaml"], "expected a new file, but got 'there.yaml', which exists"),
        (["--out", "there.yaml"], "expected the name of a configuration before it, but got 'there.yaml' alone"),
        (["digits/iet", "--out", "there.yaml/run.yaml"], "expected a file that can be written"),
    ],
)
def test_what_cannot_be_copied_is_told(arguments, message, capsys):
    Path("there.yaml").write_text("mine")
    assert message in fails(capsys, "configs", *arguments)
    assert Path("there.yaml").read_text() == "mine"
