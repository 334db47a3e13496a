import csv
import errno
import json
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_iet.audit import reading, search
from lightning_iet.audit.pairs import apply_review
from lightning_iet.audit.report import page
from lightning_iet.cli import main
from lightning_iet.metrics.features import DigitsFeatures, SSCDFeatures
from tests.helpers.audits import COMMAND, DATE, FILES, fails, metrics, run
from tests.helpers.image_folders import random_pixels, write_images
from tests.helpers.undrawn import drawing


def left_behind(here):
    return {path.name for path in here.iterdir()} - {"train", "generated", "held_out"}


# --- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_a_report_with_all_its_files(here, capsys):
    main(["audit", *COMMAND, "--held-out", "held_out"])
    assert {path.name for path in Path("report").iterdir()} == FILES
    assert left_behind(here) == {"report"}
    figures = metrics()
    assert figures["generated"]["copies"]["count"] == 3
    assert figures["generated"]["copies"]["total"] == 40
    assert figures["held_out"]["copies"]["count"] == 0
    with Path("report/pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows if row["copy"] == "1"] == ["00000.png", "00001.png", "00002.png"]
    assert [row["train_1"] for row in rows[:3]] == ["00000.png", "00001.png", "00002.png"]
    printed = capsys.readouterr().out
    for text in ("3 of 40 generated images", "memorized fraction", "memorized quantity", "report.html"):
        assert text in " ".join(printed.split())


def test_sources_of_any_kind_give_the_same_figures(here):
    expected = run(out=Path("folders"), show_images=False).as_dict()["generated"]
    train = random_pixels(60)
    np.save("train.npy", train[:, 0].numpy())
    np.savez("generated.npz", images=torch.cat([train[:3], random_pixels(37, seed=1)]).numpy())
    assert (
        run(generated=Path("generated.npz"), train=Path("train.npy"), show_images=False).as_dict()["generated"]
        == expected
    )


def test_the_record_names_the_colour_under_transparent_pixels(here):
    assert run(show_images=False).as_dict()["settings"]["background"] == "white"
    assert run(background="black", overwrite=True).as_dict()["settings"]["background"] == "black"


@pytest.mark.parametrize(
    ("hashes", "line"),
    [
        (["a", "b"], "The 2 decisions in 'review.json' belong to no pair that these images are found in: look at the "),
        (["a"], "The decision in 'review.json' belongs to no pair that these images are found in: look at the pairs, "),
        ([], ""),
        ([None], ""),
        (["a", None], "1 of the 2 decisions in 'review.json' belongs to no pair that these images are found in: look "),
        (["a", "b", None], "2 of the 3 decisions in 'review.json' belong to no pair that these images are found in: "),
    ],
)
def test_a_review_of_other_images_is_told_of(here, capsys, hashes, line):
    pair = run(out=Path("before"), show_images=False).pairs[0]
    own = {name: pair[name] for name in ("sha256", "source_sha256")}
    pairs = [
        (own if name is None else {"sha256": name, "source_sha256": name}) | {"decision": "dismissed"}
        for name in hashes
    ]
    Path("review.json").write_text(json.dumps({"pairs": pairs}))
    capsys.readouterr()
    run(review=Path("review.json"), show_images=False)
    printed = capsys.readouterr().out
    assert line in printed
    assert ("review.json" in printed) == bool(line)


@pytest.mark.parametrize(
    ("outweighed", "line"),
    [
        (0, ""),
        (1, "The decision in 'review.json' dismisses a pair of an image that stays named or noticed beside another"),
        (2, "The 2 decisions in 'review.json' dismiss pairs of images that stay named or noticed beside another"),
    ],
)
def test_a_dismissed_pair_of_an_image_that_stays_noticed_is_told_of(here, capsys, monkeypatch, outweighed, line):
    """It belongs to a pair, and to mark it anew would change nothing."""
    pairs = run(out=Path("before"), show_images=False).pairs[: max(1, outweighed)]
    Path("review.json").write_text(json.dumps({"pairs": [pair | {"decision": "dismissed"} for pair in pairs]}))

    def reviewed(audited, review):
        return replace(apply_review(audited, review), outweighed_decisions=outweighed)

    monkeypatch.setattr("lightning_iet.tools.audit.apply_review", reviewed)
    capsys.readouterr()
    run(review=Path("review.json"), show_images=False)
    printed = capsys.readouterr().out
    assert line in printed
    assert "that these images are found in" not in printed
    assert ("review.json" in printed) == bool(line)


def test_features_of_a_network(here):
    figures = run(features="digits", show_images=False).as_dict()
    assert figures["settings"]["features"] == "digits"
    assert len(figures["settings"]["features_sha256"]) == 64
    assert figures["generated"]["identical"] == 3


def test_how_long_the_features_of_a_network_take_is_said_before(here, capsys, monkeypatch):
    monkeypatch.setattr("lightning_iet.tools.audit.MINUTE", 0.0)
    monkeypatch.setattr("lightning_iet.audit.features.TRIED", 3)
    run(features="digits", cache=Path("cache"))
    assert re.search(r"^Features of all images by 'digits' will take about \d+ s\.$", capsys.readouterr().err, re.M)
    monkeypatch.setattr("lightning_iet.tools.audit.MINUTE", 1e-9)
    run(features="digits", cache=Path("cache"), overwrite=True)  # they are kept
    run(overwrite=True)
    assert "Features of all images" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "line"),
    [
        (59.0, ""),
        (150.0, "Comparing all pixels will take at most about 3 min; with --image-size 6x6 about 38 s."),
        (9600.0, "Comparing all pixels will take at most about 2 h 40 min; with --image-size 8x4 about 10 min."),
        (9600.9, "Comparing all pixels will take at most about 2 h 41 min; with --image-size 4x4 about 1 h 12 min."),
    ],
)
def test_how_long_a_comparison_of_pixels_takes_is_said_before(here, capsys, monkeypatch, seconds, line):
    """With the size that would bring it below a minute, halved as often as it takes, but not below the least."""
    monkeypatch.setattr("lightning_iet.tools.audit.LEAST_ADVISED", 4)
    monkeypatch.setattr("lightning_iet.tools.audit.comparison_seconds", lambda *_, **__: seconds)
    size = {9600.0: "32x16", 9600.9: "6"}.get(seconds, "12")
    run(image_size=size, fit="stretch", show_images=False)
    said = capsys.readouterr().err
    assert line in said
    assert ("Comparing all pixels" in said) == bool(line)


def test_sets_that_cannot_be_compared_are_refused_before_features_are_tried(here, capsys, monkeypatch):
    monkeypatch.setattr("lightning_iet.tools.audit.estimated_seconds", lambda *_, **__: pytest.fail("was tried"))
    line = fails(capsys, *COMMAND, "--features", "digits", "--k", "61")
    assert "expected at least k = 61 images, but got 60" in line


def test_what_ends_the_trial_of_features_ends_all_processes(here, capsys, monkeypatch):
    caught = []

    @contextmanager
    def shared():
        try:
            yield
        except ValueError as error:
            caught.append(error)
            raise

    def fail(*_, **__):
        raise ValueError("Argument `features` expected something else.")

    monkeypatch.setattr("lightning_iet.tools.audit.estimated_seconds", fail)
    monkeypatch.setattr("lightning_iet.tools.audit.all_or_none", shared)
    fails(capsys, *COMMAND, "--features", "digits")
    assert len(caught) == 1


class Darkness(torch.nn.Module):
    """Features that are not finite for an image that is all black."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rows = images.flatten(1)
        return rows / rows.amax(dim=1, keepdim=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_grey_images_beside_colour_are_looked_up_as_they_are_kept(here, capsys, monkeypatch):
    monkeypatch.setattr("lightning_iet.audit.features.TRIED", 1)
    monkeypatch.setattr("lightning_iet.tools.audit.MINUTE", 1e-9)
    torch.jit.script(Darkness()).save("net.ts")
    train = random_pixels(60)
    np.save("train.npy", train.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    options = {"train": Path("train.npy"), "features": "net.ts", "cache": Path("cache")}
    run(**options)
    assert "Features of all images" in capsys.readouterr().err
    run(**options, overwrite=True)
    assert "Features of all images" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_features_of_a_torchscript_file(here, capsys):
    torch.jit.script(Darkness()).save("net.ts")
    assert run(features="net.ts").as_dict()["generated"]["copies"]["count"] == 3
    Image.new("L", (8, 8)).save("generated/00009.png")
    line = fails(capsys, *COMMAND, "--features", "net.ts", "--out", "again")
    assert "Option --features expected a network with finite features, but got 'net.ts'" in line
    assert "1 of 40 generated images, the first '00009.png'" in line
    assert "again" not in left_behind(here)


class Averages(torch.nn.Module):
    """Means of 16 squares of each channel: a stand-in for SSCD's network."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_similarity_of_descriptors(here, capsys):
    torch.jit.script(Averages()).save("sscd.ts")
    main(["audit", *COMMAND, "--held-out", "held_out", "--features", "sscd", "--feature-weights", "sscd.ts"])
    network = SSCDFeatures("sscd.ts")
    sets = [torch.cat([random_pixels(60)[:3], random_pixels(37, seed=1)]), random_pixels(30, seed=2), random_pixels(60)]
    generated, held_out, train = (torch.nn.functional.normalize(network(pixels).double()) for pixels in sets)
    for name, rows in (("generated", generated), ("held_out", held_out)):
        similarities = sorted(max(float(row @ other) for other in train) for row in rows)
        figures = metrics()[name]
        assert figures["average_minimum_distance"] == pytest.approx(1 - sum(similarities) / len(rows), abs=1e-6)
        assert figures["sscd"]["quantile_95"] == pytest.approx(np.quantile(similarities, 0.95), abs=1e-6)
        above = sum(value > 0.5 for value in similarities)
        assert (figures["sscd"]["above"]["count"], figures["sscd"]["above"]["total"]) == (above, len(rows))
    printed = " ".join(capsys.readouterr().out.split())
    page = Path("report/report.html").read_text(encoding="utf-8")
    for text in ("SSCD similarity, 95th percentile", "average minimum cosine distance (AMD)"):
        assert text in printed
        assert text in page


def test_directions_are_measured_for_networks_only(here):
    assert run(show_images=False).generated.average_minimum_distance is None
    found = run(features="digits", overwrite=True, show_images=False).generated
    assert found.sscd is None
    rows = [DigitsFeatures()(pixels).double() for pixels in (random_pixels(60), random_pixels(37, seed=1))]
    train, others = (torch.nn.functional.normalize(part) for part in rows)
    least = [min(1 - float(row @ other) for other in train) for row in others]
    assert found.average_minimum_distance == pytest.approx(sum(least) / 40, rel=1e-4)  # three copies are at distance 0


def test_a_network_sees_each_image_once(here, monkeypatch):
    seen, forward = [], DigitsFeatures.forward
    monkeypatch.setattr(DigitsFeatures, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    run(features="digits", held_out=Path("held_out"), show_images=False)
    planted = 3 * 10  # exact, mirrored and recoloured copies
    assert sum(seen) == 60 + 40 + 30 + planted


def test_links_in_a_circle_come_to_an_end(here):
    expected = run(out=Path("plain"), show_images=False).as_dict()
    Path("train/again").symlink_to(here / "train", target_is_directory=True)
    Path("generated/other").mkdir()
    Path("generated/other/up").symlink_to(here / "generated", target_is_directory=True)
    Path("generated/self").symlink_to("self")  # a link to itself leads nowhere: it is listed
    found = run(show_images=False).as_dict()
    assert found["generated"] == expected["generated"]
    facts = found["sets"]["generated"]
    assert [skip["name"] for skip in facts["skipped"]] == ["self"]
    assert (facts["found"], facts["used"]) == (41, 40)
    assert found["sets"]["train"]["found"] == 60


def test_names_that_look_like_formulas_are_harmless_in_a_spreadsheet(here):
    names = ["=1+1.png", "+a.png", "-a.png", "@a.png", "'a.png", "a=b.png"]
    for number, name in enumerate(names):
        Path(f"generated/{number:05d}.png").rename(f"generated/{name}")
    Path("train/00000.png").rename("train/@train.png")
    run()
    with Path("report/pairs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["name"]: row for row in rows}
    assert set(found) >= {"'=1+1.png", "'+a.png", "'-a.png", "'@a.png", "''a.png", "a=b.png"}
    assert found["'=1+1.png"]["train_1"] == "'@train.png"
    cells = [cell for row in rows for cell in row.values()]
    assert not any(cell[:1] in tuple("=+-@") for cell in cells)


def test_images_are_resized_as_asked(here):
    run(image_size="6x4", fit="crop")
    assert [metrics()["sets"]["train"][side] for side in ("width", "height")] == [6, 4]
    assert (metrics()["settings"]["image_size"], metrics()["settings"]["fit"]) == ("6x4", "crop")


def test_a_cache_that_is_kept_serves_the_next_audit(here, monkeypatch):
    run(cache=Path("cache"))
    monkeypatch.setattr(reading, "decode_stored", None)  # nothing is decoded again
    monkeypatch.setattr(search, "search_rows", None)
    run(cache=Path("cache"), out=Path("again"))
    assert metrics("again") == metrics("report")
    assert any(Path("cache").iterdir())


def test_an_empty_folder_and_a_report_may_be_replaced(here, capsys):
    Path("report").mkdir()
    run()
    before = metrics()
    assert "holds a report. Give another one with --out, or replace it" in fails(capsys, *COMMAND)
    assert metrics() == before
    main(["audit", *COMMAND, "--overwrite", "--k", "10"])
    assert metrics()["settings"]["k"] == 10
    assert left_behind(here) == {"report"}


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--generated", "nowhere"], "Option --generated expected images, but got 'nowhere', which does not exist"),
        (["--train", "nowhere"], "Option --train expected images, but got 'nowhere', which does not exist"),
        (["--held_out", "nowhere"], "Option --held-out expected images, but got 'nowhere', which does not exist"),
        (["--train", "empty"], "Option --train expected images, but got 'empty', which holds none"),
        (["--train", "broken.npy"], "Option --train expected images, but got 'broken.npy', which cannot be read"),
        (["--generated", "texts"], "Option --generated expected images, but got"),
        (["--generated", "damaged", "--strict"], "expected images that can all be read"),
        (["--generated", "mixed"], "Say with --image-size"),
        (["--generated", "large"], "expected images of 8x8 pixels, as the training images have, but got 9x9"),
        (["--generated", "train"], "expected other images than --generated, but got the same ones"),
        (["--held_out", "train"], "expected other images than --train, but got the same ones"),
        (["--k", "61"], "Option --train expected at least k = 61 images, but got 60"),
        (["--k", "1"], "Option --k expected an integer ≥ 2"),
        (["--image-size", "big"], "Option --image-size expected a size such as 64 or 64x48"),
        (["--image-size", "0"], "Option --image-size expected a size"),
        (["--features", "nosuch"], "nosuch"),
        (["--features", "digits", "--image-size", "9"], "expected shape"),
        (["--out", "train"], "holds other files"),
        (["--out", "."], "holds other files"),
        (["--out", "generated/report"], "Option --out expected a folder outside of --generated"),
        (["--cache", "train/cache"], "Option --cache expected a folder outside of --train"),
        (["--out", "a_file"], "which is something else"),
        (["--out", "/dev/null/report"], "expected a folder that can be written"),
        (["--ratio", "0"], "Option --ratio expected"),
        (["--num-pairs", "-1"], "Option --num-pairs expected an integer ≥ 0"),
        (["--num-workers", "-1"], "Option --num-workers expected an integer ≥ 0"),
        (["--invariance", "turn"], "invariance"),
    ],
)
def test_bad_input_is_one_clear_line_and_no_report(here, capsys, arguments, message):
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("texts/notes.txt").write_text("x")
    Path("a_file").write_text("x")
    Path("broken.npy").write_text("x")
    write_images(here / "damaged", random_pixels(30))
    Path("damaged/00007.png").write_bytes(b"")
    write_images(write_images(here / "mixed", random_pixels(3)), random_pixels(3, size=9), start=3)
    write_images(here / "large", random_pixels(3, size=9))
    files = {path.name: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    line = fails(capsys, *COMMAND, *arguments)
    assert message in line
    assert not Path("report").exists()
    after = {p.name: p.stat().st_mtime_ns for p in here.rglob("*") if p.is_file() and "partial" not in str(p)}
    assert after == files


def test_unreadable_images_are_counted_and_listed(here, capsys):
    for number, content in ((10, b""), (11, b"no image")):
        Path(f"generated/000{number}.png").write_bytes(content)
    run()
    facts = metrics()["sets"]["generated"]
    assert (facts["found"], facts["used"]) == (40, 38)
    assert [skip["name"] for skip in facts["skipped"]] == ["00010.png", "00011.png"]
    assert metrics()["generated"]["copies"]["total"] == 38
    assert "generated: 2 of 40 could not be read" in " ".join(capsys.readouterr().out.split())
    page = Path("report/report.html").read_text()
    assert "38 of 40 found; 2 could not be read" in page
    assert "00010.png: the file is empty" in page
    with Path("report/pairs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 38


@pytest.mark.usefixtures("drawn")
def test_names_of_any_bytes(here):
    name = os.fsdecode(b"generated/<script>alert(1)<!--\"'\n\xff.png")
    Path("generated/00000.png").rename(name)
    run()
    with Path("report/pairs.csv").open(newline="", encoding="utf-8") as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert "<script>alert(1)<!--\"'\\n\\xff.png" in names
    assert "<script>alert" not in Path("report/report.html").read_text()


# --- a full disk, an interruption, several processes -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["write_pairs", "render_page", "save_figure"])
def test_a_full_disk_leaves_no_half_report_and_the_work_can_go_on(here, capsys, monkeypatch, name):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(page, name, full)
        line = fails(capsys, *COMMAND)
    assert "The disk is full (No space left on device): no report was written" in line
    assert "report.partial" in line
    assert left_behind(here) == {"report.partial"}
    monkeypatch.setattr(search, "search_rows", None)  # the search is not done again
    run()
    assert left_behind(here) == {"report"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_disk_that_fills_while_images_are_read(here, capsys, monkeypatch, workers):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "The disk is full (No space left on device): no report" in fails(capsys, *COMMAND, "--num-workers", workers)
    assert not list(here.glob("report*/*"))


def test_a_failure_leaves_the_old_report(here, monkeypatch):
    run()
    before = {file.name: file.read_bytes() for file in Path("report").iterdir()}

    def fail(*_args, **_kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(page, "save_figure", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(overwrite=True, k=10)
    assert {file.name: file.read_bytes() for file in Path("report").iterdir()} == before
    assert left_behind(here) == {"report", "report.partial"}


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_an_interrupted_audit_goes_on_with_the_same_result(here, monkeypatch, capsys, stop_after):
    monkeypatch.setattr(search, "BLOCK", 16)
    monkeypatch.setattr(reading, "BLOCK", 16)
    run(out=Path("whole"), held_out=Path("held_out"))
    calls, search_rows = [], search.search_rows

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        return search_rows(*args, **kwargs)

    monkeypatch.setattr(search, "search_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(held_out=Path("held_out"))
    assert "The same command goes on from here" in capsys.readouterr().err
    assert left_behind(here) == {"whole", "report.partial"}
    run(held_out=Path("held_out"))
    assert len(calls) == 11 + 1  # 4 + 3 + 2 + 2 blocks, and the one that was cut off
    assert left_behind(here) == {"whole", "report"}
    for name in FILES:
        assert Path("whole", name).read_bytes() == Path("report", name).read_bytes()


def run_shared(folder):
    os.chdir(folder)
    os.environ["SOURCE_DATE_EPOCH"] = DATE
    search.BLOCK = reading.BLOCK = 16
    with drawing():
        return run(out=Path("shared"), held_out=Path("held_out"), invariance="flip").as_dict()


@pytest.mark.usefixtures("drawn")
def test_processes_share_the_work_and_find_the_same(here, monkeypatch, processes):
    monkeypatch.setattr(search, "BLOCK", 16)
    monkeypatch.setattr(reading, "BLOCK", 16)
    torch.set_num_threads(1)
    alone = run(out=Path("alone"), held_out=Path("held_out"), invariance="flip").as_dict()
    assert processes(2).run(run_shared, here) == [alone, alone]
    for name in FILES:
        assert Path("alone", name).read_bytes() == Path("shared", name).read_bytes()
    assert left_behind(here) == {"alone", "shared"}


def run_failing(folder):
    os.chdir(folder)
    try:
        run(out=Path("shared"))
    except ValueError as error:
        return str(error)
    return "no error"


def test_all_processes_hear_of_an_error(here, processes):
    Path("generated/00007.png").unlink()
    write_images(here / "generated", random_pixels(1, size=9), start=7)
    messages = processes(2).run(run_failing, here)
    assert all("expected images of one size" in message for message in messages)
    assert "shared" not in left_behind(here)
