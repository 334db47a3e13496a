"""What must not be lost, overlooked or believed: found by people who tried to break the audit."""

import hashlib
import os
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_iet.audit import core
from lightning_iet.audit.cache import BlockCache
from tests.helpers.audits import COMMAND, FILES, fails, metrics, run
from tests.helpers.image_folders import random_pixels, write_images


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("thesis.txt", "precious", "which holds other files, among them 'thesis.txt'"),
        ("metrics.json", "{}", "which holds a report"),  # another audit was faster
    ],
)
def test_what_appears_in_the_reports_place_meanwhile_is_not_lost(here, capsys, monkeypatch, name, content, message):
    original = core.find_copies

    def slowly(*args, **kwargs):
        Path("report").mkdir(exist_ok=True)
        Path("report", name).write_text(content)
        return original(*args, **kwargs)

    monkeypatch.setattr(core, "find_copies", slowly)
    assert message in fails(capsys, *COMMAND)
    assert Path("report", name).read_text() == content
    assert not Path("report/report.html").exists()


@pytest.mark.parametrize("cache", ["report", "report/cache"])
def test_a_cache_does_not_lie_in_the_report(here, capsys, cache):
    assert "Option --cache expected a folder outside of --out" in fails(capsys, *COMMAND, "--cache", cache)


def test_files_of_others_in_the_partial_folder_stay(here):
    Path("report.partial").mkdir()
    Path("report.partial/my_weights.safetensors").write_text("mine")
    run()
    assert [path.name for path in Path("report.partial").iterdir()] == ["my_weights.safetensors"]


def test_a_cache_tells_grey_images_from_the_same_as_colour(here):
    run(cache=Path("kept"), out=Path("grey"))
    write_images(here / "colour", random_pixels(20, seed=9, channels=3))
    run(cache=Path("kept"), out=Path("cached"), held_out=Path("colour"))
    run(out=Path("fresh"), held_out=Path("colour"))
    assert metrics("cached")["generated"] == metrics("fresh")["generated"]
    ratio = metrics("cached")["generated"]["median_distance"] / metrics("grey")["generated"]["median_distance"]
    assert ratio == pytest.approx(3**0.5)  # a grey image stands in all three channels


def test_rotten_blocks_are_made_again(here):
    run(cache=Path("kept"), out=Path("first"))
    for block in Path("kept").iterdir():
        content = bytearray(block.read_bytes())
        content[-200:-40] = bytes(160)
        block.write_bytes(content)
    run(cache=Path("kept"), out=Path("second"))
    assert Path("first/pairs.csv").read_bytes() == Path("second/pairs.csv").read_bytes()


def test_a_block_is_sealed_by_its_hash(tmp_path):
    cache = BlockCache(tmp_path)
    cache.store("key", {"x": torch.arange(3)})
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()
    assert cache.load("key")["x"].tolist() == [0, 1, 2]
    file.write_bytes(content[:20])
    assert cache.load("key") is None


@pytest.mark.parametrize("inner", ["train/generated", "generated"])
def test_sets_do_not_lie_in_one_another(here, capsys, inner):
    write_images(here / "train" / "generated", random_pixels(30, seed=5))
    outer = "train" if inner != "generated" else "."
    message = fails(capsys, "--generated", inner, "--train", outer, "--out", "../report")
    assert "Option --generated expected a folder outside of --train" in message


class Constant(torch.nn.Module):
    def forward(self, images):
        return torch.ones(images.shape[0], 4)


class Scaled(torch.nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, images):
        return images.flatten(1) * self.factor


class OfOneSize(torch.nn.Module):
    def forward(self, images):
        return images.reshape(-1, 999)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Constant(), "features that are the same for all training images"),
        (Scaled(1e-25), "features of up to 1e-25"),
        (Scaled(1e18), "features of up to 1e+18"),
        (
            OfOneSize(),
            "a network that takes images of shape (1, 8, 8), but got 'net.ts', which fails",
        ),
    ],
)
def test_features_that_cannot_tell_images_apart_are_refused(here, capsys, network, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what networks come in
        torch.jit.script(network).save("net.ts")
    assert message in fails(capsys, *COMMAND, "--features", "net.ts")
    assert not Path("report").exists()


def test_damaged_containers_are_one_line(here, capsys):
    with zipfile.ZipFile("cut.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY garbage")
    Path("empty.npy").touch()
    Path("no.npz").write_bytes(b"PK garbage")
    Path("bad.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    os.symlink("loop", "loop")
    for name in ("cut.npz", "empty.npy", "no.npz", "bad.parquet"):
        assert f"Option --generated expected images, but got '{name}', which cannot be read" in fails(
            capsys, "--generated", name, "--train", "train"
        )
    assert "'loop', which does not exist" in fails(capsys, "--generated", "loop", "--train", "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "Option --device expected a device of this machine"),
        (["--feature-weights", "nowhere"], "Option --feature-weights expected None with features='pixels'"),
        (["--image-size", "99999"], "which takes"),
        (
            ["--cache", "train/00000.png"],
            "Option --cache expected a folder, but got 'train/00000.png'",
        ),
    ],
)
def test_options_that_could_only_fail_later(here, capsys, arguments, message):
    assert message in fails(capsys, *COMMAND, *arguments)


def test_paths_are_not_taken_for_markup(here, capsys):
    run(out=Path("rep[/x] [bold]"))
    assert {path.name for path in Path("rep[/x] [bold]").iterdir()} == FILES
    assert "rep[/x] [bold]: report.html" in capsys.readouterr().out


def test_links_in_archives_are_listed(here):
    with tarfile.open("set.tar", "w") as archive:
        archive.add("generated", arcname=".")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "./00000.png"
        archive.addfile(link)
    run(generated=Path("set.tar"))
    assert metrics()["sets"]["generated"]["skipped"] == [
        {"name": "set.tar/link.png", "reason": "a link inside an archive, not a file"}
    ]


def test_the_median_is_that_of_numpy(here):
    run()
    train, generated = (
        np.stack([image.numpy().astype(float).ravel() / 255 for image in images])
        for images in (random_pixels(60), torch.cat([random_pixels(60)[:3], random_pixels(37, seed=1)]))
    )
    nearest = [min(np.linalg.norm(image - other) for other in train) for image in generated]
    assert metrics()["generated"]["median_distance"] == pytest.approx(np.median(nearest), rel=1e-5)
