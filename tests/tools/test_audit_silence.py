"""What was once passed over in silence: generators that copy, and an audit that must not say they do not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_iet.cli import main
from lightning_iet.data import ImageFolderDataModule
from lightning_iet.tools.audit import audit
from tests.helpers.audits import fails, metrics
from tests.helpers.image_folders import random_pixels, write_images
from tests.helpers.medical import dicom
from tests.helpers.phantoms import eight_bits, moved, phantoms


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(**options):
    given = {name: Path(name) for name in ("generated", "train", "held_out") if Path(name).exists()}
    settings = {"out": Path("report"), "num_workers": 0, "overwrite": True, "moved": False}
    return audit(**given | settings | {"show_images": False} | options)  # nobody looks at pictures


def write_deep(folder, images, top):
    Path(folder).mkdir()
    for number, image in enumerate(images[:, 0].numpy()):
        Image.fromarray(np.rint(image * top).astype(np.uint16)).save(f"{folder}/{number:03d}.png")


def test_mirrored_darkened_and_shifted_copies_among_innocent_images():
    train = phantoms(60)
    copies = [train[:6].flip(-1), 0.7 * train[6:12], moved(train[12:18], dx=4 / 24)]
    write_images(Path("train"), eight_bits(train))
    write_images(Path("generated"), eight_bits(torch.cat([*copies, phantoms(10, seed=2)])))
    write_images(Path("held_out"), eight_bits(phantoms(40, seed=1)))
    found = run(moved=True)
    assert found.verdict.level == "copies"
    named = [row["index"] for row in found.pairs if row["named"]]
    assert len(set(named) & set(range(18))) >= 17
    assert not set(named) - set(range(18))
    assert {row["search"] for row in found.pairs[:17]} >= {"recoloured", "moved"}
    assert [part.kind for part in found.planted] == ["exact", "mirrored", "recoloured", "degraded", "moved"]


@pytest.mark.parametrize("top", [100, 870, 4095])
def test_scans_of_12_bits_and_generated_images_of_8(top):
    train = phantoms(120)
    write_deep("train", train, top)
    write_deep("held_out", phantoms(60, seed=1), top)
    write_images(Path("generated"), eight_bits(train[:60]))
    found = run()
    assert found.verdict.level == "copies"
    assert found.evidence.named.count == 60
    assert metrics()["sets"]["train"]["origin"]["values"][1] == top


@pytest.mark.parametrize("top", [100, 4095])
def test_other_images_with_few_bits_are_not_all_equal(top):
    write_deep("train", phantoms(120), top)
    write_deep("generated", phantoms(60, seed=2), top)
    write_deep("held_out", phantoms(60, seed=1), top)
    found = run()
    assert found.verdict.level in ("none", "control")
    assert found.generated.identical == 0


def test_images_as_a_data_module_crops_them(capsys):
    """`fit` crops unless it is told otherwise; the audit refuses to guess, and finds the copies once it is told."""
    wide = torch.nn.functional.interpolate(phantoms(120, size=48, channels=3), (48, 72))
    write_images(Path("train"), eight_bits(wide))
    data = ImageFolderDataModule(Path("train"), image_size=24, num_control=2, num_reference=2, check=False)
    data.setup("fit")
    write_images(Path("generated"), eight_bits(torch.stack([data.train_set[i][0] for i in range(60)])))
    arguments = [
        "--generated",
        "generated",
        "--train",
        "train",
        "--image-size",
        "24",
        "--num-workers",
        "0",
        "--moved",
        "false",
    ]
    line = fails(capsys, *arguments)
    assert "expected images of the shape of 24x24, but got some of 72x48" in line
    assert "--fit crop takes the middle (as `lightning-iet fit` does)" in line
    main(["audit", *arguments, "--fit", "crop", "--out", "report"])
    assert metrics()["verdict"]["level"] == "copies"
    assert metrics()["evidence"]["named"]["count"] == 60


def test_slices_of_stacks_and_frames_of_animations():
    stacks = random_pixels(60, size=16).view(12, 5, 16, 16)
    Path("train").mkdir()
    for number, stack in enumerate(stacks):
        pages = [Image.fromarray(page.numpy()) for page in stack]
        pages[0].save(f"train/{number:02d}.tif", save_all=True, append_images=pages[1:])
    write_images(Path("generated"), stacks[:, 3:4])
    found = run(k=20)
    assert found.verdict.level == "copies"
    assert found.evidence.named.count == 12
    assert found.pairs[0]["source"].endswith(", page 4")
    assert run(k=10, pages="first").sets["train"].used == 12


def test_a_few_copies_saved_as_jpeg():
    train = torch.nn.functional.interpolate(phantoms(150, size=12, channels=3), (36, 36), mode="bicubic")
    innocent, control = (
        torch.nn.functional.interpolate(phantoms(n, seed=s, size=12, channels=3), (36, 36), mode="bicubic")
        for n, s in ((65, 2), (60, 1))
    )
    write_images(Path("train"), eight_bits(train))
    write_images(Path("held_out"), eight_bits(control))
    write_images(Path("generated"), eight_bits(innocent))
    for number in range(5):
        array = eight_bits(train[number]).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(f"generated/copy{number}.jpg", quality=90)
    found = run()
    assert found.verdict.level == "copies"
    assert {row["name"] for row in found.pairs if row["named"]} == {f"copy{number}.jpg" for number in range(5)}
    assert found.evidence.discovered == 0  # with 60 held-out images no five of 70 can be discovered by ranks


def test_alpha_over_another_background_is_not_compared_in_silence():
    def save(folder, images, colour):
        Path(folder).mkdir()
        for number, image in enumerate(eight_bits(images)[:, 0]):
            clear = (image.numpy() > 40).astype(np.uint8) * 255
            layers = [image.numpy()] * 3
            picture = Image.fromarray(np.dstack([*layers, clear]))
            if colour is not None:
                ground = Image.new("RGBA", picture.size, colour)
                picture = Image.alpha_composite(ground, picture).convert("RGB")
            picture.save(f"{folder}/{number:03d}.png")

    train = phantoms(120)
    save("train", train, "black")
    save("held_out", phantoms(60, seed=1), "black")
    save("generated", train[:60], None)
    found = run()
    assert found.verdict.level in ("copies", "open")
    assert found.verdict.level == "copies" or "--background" in found.verdict.headline
    assert run(background="black").evidence.named.count == 60
    named = run(background="white").verdict  # wrong, but said
    assert "transparency" not in named.headline


def test_narrow_windows_of_dicom_files_do_not_hide_copies_in_silence():
    """10 of 60 are copies of what lies beyond the window, where no search can see them."""
    low, width = 0.5, 0.05
    pytest.importorskip("pydicom")
    for folder, images in (("train", phantoms(60)), ("held_out", phantoms(60, seed=1))):
        Path(folder).mkdir()
        for number, image in enumerate(images[:, 0].numpy()):
            window = {"WindowCenter": 4095 * (low + width / 2), "WindowWidth": 4095 * width}
            data = dicom(np.rint(image * 4095).astype(np.uint16), **window)
            Path(folder, f"{number:03d}.dcm").write_bytes(data)
    write_images(Path("generated"), eight_bits(torch.cat([phantoms(60)[:10], phantoms(50, seed=5)])))
    found = run()
    assert found.verdict.level == "open"
    assert "--range" in found.verdict.answer
    found = run(range="0:4095")
    assert found.verdict.level == "copies"
    assert {row["index"] for row in found.pairs if row["named"]} == set(range(10))


def test_colours_can_be_left_aside():
    """Images in other hues, which nobody copied: the verdict is open, and names the option that mends it."""
    tint = torch.tensor([1.0, 0.6, 0.4]).view(1, 3, 1, 1)
    write_images(Path("train"), eight_bits(phantoms(120) * tint))
    write_images(Path("held_out"), eight_bits(phantoms(60, seed=1) * tint))
    write_images(Path("generated"), eight_bits(phantoms(60, seed=2) * tint.flip(1)))
    found = run()
    assert found.verdict.level == "open"
    assert "--grey" in found.verdict.answer
    found = run(grey=True)
    assert found.verdict.level == "none"
    assert metrics()["settings"]["grey"] is True
    assert {facts["channels"] for facts in metrics()["sets"].values()} == {1}


def test_an_ascii_terminal_gets_ascii(warm):
    train = random_pixels(60)
    write_images(Path("train"), train)
    write_images(Path("generated"), torch.cat([train[:3], random_pixels(37, seed=1)]))
    command = [sys.executable, "-m", "lightning_iet", "audit", "--generated", "generated", "--train", "train"]
    for encoding, options, status in (("ascii", ["--out", "a"], 0), ("cp1252", ["--k", "0"], 2)):
        environment = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run([*command, "--num-workers", "0", *options], capture_output=True, env=environment)
        assert done.returncode == status, done.stderr
        assert (done.stdout + done.stderr).decode(encoding)
    assert b"expected an integer >= 2" in done.stderr


@pytest.mark.parametrize(
    ("copies", "options", "status"), [(3, [], 0), (3, ["--fail-on-copies"], 3), (0, ["--fail-on-copies"], 0)]
)
def test_the_exit_status_tells_a_pipeline(copies, options, status):
    train = random_pixels(60)
    write_images(Path("train"), train)
    write_images(Path("held_out"), random_pixels(40, seed=2))
    write_images(Path("generated"), torch.cat([train[:copies], random_pixels(40, seed=1)]))
    arguments = ["--generated", "generated", "--train", "train", "--held-out", "held_out", "--num-workers", "0"]
    arguments += ["--show-images", "false"]
    for number, share in enumerate(([], ["0.01"], ["0.5"]) if status else ([],)):
        expected = 0 if share == ["0.5"] else status
        arguments_here = [*arguments, "--out", f"report{number}", *options, *share]
        if expected:
            with pytest.raises(SystemExit) as stop:
                main(["audit", *arguments_here])
            assert stop.value.code == expected
        else:
            main(["audit", *arguments_here])


@pytest.mark.parametrize("text", ["4095", "5:5", "9:1", "a:b", "0:", "nan:1"])
def test_ranges_that_are_none(capsys, text):
    write_images(Path("train"), random_pixels(60))
    line = fails(capsys, "--generated", "train", "--train", "train", "--range", text)
    wanted = "the values of black and white, such as 0:4095 or -1:1, or auto, or full"
    assert f"Option --range expected {wanted}, but got '{text}'" in line


def test_in_python_the_result_has_a_verdict_pairs_and_metrics():
    train = random_pixels(60)
    write_images(Path("train"), train)
    write_images(Path("generated"), torch.cat([train[:3], random_pixels(37, seed=1)]))
    found = run(title="Ward 7")
    assert found.verdict.level == "copies"
    assert found.metrics == metrics() | {"date": found.date}
    assert found.pairs[0]["sha256"] == found.pairs[0]["source_sha256"]
    assert metrics()["title"] == "Ward 7"
    assert not Path("report/pairs.png").exists()
