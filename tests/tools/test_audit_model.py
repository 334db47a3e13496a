import inspect
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from lightning_iet import DiffusionModule
from lightning_iet.audit import search
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.reading import image_set
from lightning_iet.cli import main
from lightning_iet.data import DigitsDataModule
from lightning_iet.data.splits import select_disjoint
from lightning_iet.evaluation.membership import mean_losses, spread_timesteps
from lightning_iet.functional.membership_inference import membership_inference
from lightning_iet.tools.audit import AuditJob
from lightning_iet.tools.audit_model import _run_of, audit_model
from tests.helpers.audits import DATE, FILES, QUICK_MODEL, metrics, said
from tests.helpers.digit_models import digit_pixels, fresh_model, overfitted_model, save_checkpoint, save_pipeline
from tests.helpers.image_folders import random_pixels, write_images
from tests.helpers.undrawn import leave_pictures_empty

DEFAULTS = inspect.signature(audit_model).parameters
OF_RUN = QUICK_MODEL | {"batch_size": 256, "loss_timesteps": 2, "show_images": False}
DATA = {"num_train": 30, "num_control": 40, "classes": [8, 9]}  # of whose 354 digits 324 are held out


def options(settings):
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


COMMAND = [*options(QUICK_MODEL), "--train", "train", "--held-out", "held_out", "--out", "report"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Training and held-out digits, and a model that has seen none of them."""
    folder = tmp_path_factory.mktemp("written")
    write_images(folder / "train", digit_pixels(0, 30))
    write_images(folder / "held_out", digit_pixels(100, 140))
    save_checkpoint(fresh_model(), folder / "model.ckpt")
    return folder


@pytest.fixture
def here(written, tmp_path, monkeypatch):
    """The same for one test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", DATE)
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run(**given):
    settings = {"train": Path("train"), "held_out": Path("held_out"), "ckpt": Path("model.ckpt"), "out": Path("report")}
    return audit_model(**settings | QUICK_MODEL | given)


def left_behind(here):
    return {path.name for path in here.iterdir()} - {"train", "held_out", "model.ckpt"}


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["audit-model", *COMMAND, *arguments])
    assert stop.value.code == 2
    lines = said(capsys.readouterr().err)
    assert len(lines) == 1
    return lines[0]


@pytest.mark.usefixtures("drawn")
def test_a_report_with_all_its_files(here, capsys):
    main(["audit-model", *COMMAND, "--ckpt", "model.ckpt"])
    assert {path.name for path in Path("report").iterdir()} == FILES
    assert left_behind(here) == {"report"}
    figures = metrics()
    assert figures["generated"]["copies"]["total"] == 20
    assert (figures["membership"]["train"], figures["membership"]["held_out"]) == (30, 40)
    assert [gap["timestep"] for gap in figures["membership"]["timesteps"]] == [10, 30, 50, 70, 90]
    assert figures["settings"]["model"] == "model.ckpt"
    assert (figures["settings"]["num_samples"], figures["settings"]["loss_timesteps"]) == (20, 5)
    printed = " ".join(capsys.readouterr().out.split())
    auc = f"AUC {figures['membership']['auc']:.3f}"
    assert auc in printed
    page = Path("report/report.html").read_text(encoding="utf-8")
    for text in (auc, "What the loss gives away", 'href="#membership"', "drawn by model.ckpt"):
        assert text in page


def run_folder(here):
    """The folder of a run that trained on 30 digits, 40 held out as the control and the others for FID."""
    folder = here / "runs" / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(here / "model.ckpt", folder / "checkpoints" / "last.ckpt")
    options = DATA | {"seed": 1}
    config = {"data": {"class_path": "lightning_iet.DigitsDataModule", "init_args": options}}
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_run_is_audited_with_its_own_images(here, capsys):
    folder = run_folder(here)
    command = options(OF_RUN)
    main(["audit-model", "runs", *command, "--out", "own"])
    own = json.loads(Path("own/metrics.json").read_text(encoding="utf-8"))

    digits = DigitsDataModule(**DATA, seed=1)
    digits.setup("fit")
    for name, parts in {"t": [digits.train_set], "h": [digits.control_set, digits.reference_set]}.items():
        images = torch.cat([part.images for part in parts])
        assert len(images) == {"t": 30, "h": 324}[name]
        np.save(f"{name}.npy", (images[:, 0].numpy() * 255).round().astype(np.uint8))
    given = ["--train", "t.npy", "--held-out", "h.npy", "--out", "given"]
    main(["audit-model", str(folder), *command, *given])
    expected = json.loads(Path("given/metrics.json").read_text(encoding="utf-8"))
    for part in ("generated", "held_out", "evidence", "membership", "planted"):
        assert own[part] == expected[part]
    assert own["sets"]["train"]["location"] == f"training images of the run '{folder}' (DigitsDataModule)"
    assert own["sets"]["held_out"]["used"] == 324


def test_a_class_conditional_run_is_audited_with_its_own_classes(here):
    """Without a null label there is no loss without a class; the run's data know the classes."""
    path = own_images(here, DATA)
    save_checkpoint(fresh_model(unet={"num_class_embeds": 10}), path)
    found = audit_model(ckpt=Path("runs"), out=Path("report"), **OF_RUN)
    assert (found.membership.train, found.membership.held_out) == (30, 324)
    digits = DigitsDataModule(**DATA)
    digits.setup("fit")
    run = own_run(path)
    run.read()
    assert torch.equal(run.labels()["train"], digits.train_set.targets)


def test_losses_are_those_of_the_labels_that_are_known(here):
    """As in the evaluation of the run, although the model also takes a null label; of a folder none are known."""
    path = own_images(here, DATA)
    model = fresh_model(unet={"num_class_embeds": 11}, num_classes=10)
    torch.nn.init.normal_(model.unet.class_embedding.weight, generator=torch.Generator().manual_seed(0))
    assert model.conditioning.null == 10
    save_checkpoint(model, path)
    own = audit_model(ckpt=Path("runs"), out=Path("own"), **OF_RUN).membership
    digits = DigitsDataModule(**DATA)
    digits.setup("fit")
    parts = {"t": [digits.train_set], "h": [digits.control_set, digits.reference_set]}
    steps, losses, plain = spread_timesteps(2, model.num_timesteps), [], []
    for name, sets in parts.items():
        images, labels = (torch.cat([getattr(part, what) for part in sets]) for what in ("images", "targets"))
        np.save(f"{name}.npy", (images[:, 0].numpy() * 255).round().astype(np.uint8))
        shared = (model, (images * 255).round().to(torch.uint8), torch.arange(len(images)), steps)
        losses.append(mean_losses(*shared, condition=labels))
        plain.append(mean_losses(*shared))
    expected, without = (float(membership_inference(*part)["auc"]) for part in (losses, plain))
    assert expected != pytest.approx(without, abs=1e-3)
    assert (own.auc, own.labels_given) == (pytest.approx(expected, abs=1e-4), True)
    given = {"train": Path("t.npy"), "held_out": Path("h.npy"), "out": Path("given")}
    folder = audit_model(ckpt=Path("runs"), **given, **OF_RUN).membership
    assert (folder.auc, folder.labels_given) == (pytest.approx(without, abs=1e-4), False)


def test_the_runs_images_are_read_as_it_read_them(here, capsys):
    pixels = random_pixels(60, size=12, channels=1)
    write_images(here / "mine", pixels[:, :, :, :10])  # of another shape than the model's
    arguments = {"root": "mine", "image_size": [8, 8], "channels": 1, "num_control": 20}
    folder = run_folder(here)
    config = {"data": {"class_path": "lightning_iet.data.ImageFolderDataModule", "init_args": arguments}}
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    found = audit_model(ckpt=Path("runs"), out=Path("report"), **QUICK_MODEL)
    assert (found.sets["train"].used, found.sets["held_out"].used) == (20, 40)
    names = {row["source"] for row in found.pairs}
    assert names <= {path.name for path in (here / "mine").iterdir()}
    assert "(ImageFolderDataModule of mine)" in found.sets["train"].location


def own_images(here, arguments, kind="DigitsDataModule", **files):
    folder = run_folder(here)
    config = {"data": {"class_path": f"lightning_iet.data.{kind}", "init_args": arguments}}
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    if files:
        (folder / "metrics.json").write_text(json.dumps(files), encoding="utf-8")
    return folder / "checkpoints" / "last.ckpt"


def test_all_members_of_balanced_groups_are_audited_in_their_order(here):
    """The run trained on one member of each group at a time, drawn by chance, and on all of them in the end."""
    arguments = DATA | {"repeated_images": 4, "repeats": 5}
    path = own_images(here, arguments | {"duplicates": "balance"})
    digits = DigitsDataModule(**arguments)
    digits.setup("fit")
    found = [read_own_images(path)["train"] for _ in range(2)]
    assert torch.equal(found[0].pixels, (digits.train_set.images * 255).round().to(torch.uint8))
    assert found[0].names == [str(number) for number in range(30 + 4 * 4)]
    assert found[0].sha256 == found[1].sha256


@pytest.mark.parametrize("asked", [8, None])
def test_images_that_steered_the_training_are_not_held_out(here, asked):
    path = own_images(here, DATA)
    whole = read_own_images(path)["held_out"]
    config = path.parents[1] / "config.yaml"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["agc"] = {"reference": "held_out", "reference_images": asked}
    config.write_text(json.dumps(settings), encoding="utf-8")
    run = own_run(path)
    found = run.read()["held_out"]

    digits = DigitsDataModule(**DATA)
    digits.setup("fit")
    (taken,) = select_disjoint(digits.control_set.targets, [asked or 16], seed=0)
    rest = [place for place in range(len(whole)) if place not in taken.tolist()]
    assert len(whole) == 324
    assert torch.equal(found.pixels, whole.pixels[rest])
    targets = torch.cat([digits.control_set.targets, digits.reference_set.targets])
    assert torch.equal(run.labels()["held_out"], targets[rest])


def own_run(path):
    job = AuditJob(**{field.name: DEFAULTS[field.name].default for field in fields(AuditJob)})
    return _run_of(path, job, None, None)


def read_own_images(path):
    return own_run(path).read()


def test_what_the_run_left_out_is_told_of(here):
    write_images(here / "mine", random_pixels(60))
    (here / "mine" / "cut.png").write_bytes(b"none")
    path = own_images(
        here, {"root": "mine", "channels": 1, "num_control": 20, "on_error": "skip"}, "ImageFolderDataModule"
    )
    found = read_own_images(path)
    assert [skip.name for skip in found["train"].skipped] == ["cut.png"]
    assert not found["held_out"].skipped


@pytest.mark.parametrize(("recorded", "refused"), [(30, False), (31, True), ("many", False)])
def test_data_that_have_changed_since_the_run_are_refused(here, recorded, refused):
    path = own_images(here, DATA, data={"num_train": recorded})
    if refused:
        with pytest.raises(ValueError, match=r"^Argument `train` expected the 31 images .* but got 30: the data have"):
            read_own_images(path)
    else:
        assert len(read_own_images(path)["train"]) == 30


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "Options --train and --held-out expected images, since no config.yaml lies beside"),
        ("model: 1", "names no data"),
        ("[: ", "names no data"),
        ("data: {class_path: os.system, init_args: {command: x}}", "os.system, is none of this package"),
        ("data: {class_path: lightning_iet.DigitsDataModule, init_args: {no_such: 1}}", "cannot be built"),
        ("data: {class_path: lightning_iet.DigitsDataModule, init_args: text}", "names no data"),
        ("data: {class_path: lightning_iet.DigitsDataModule, init_args: [1]}", "names no data"),
        ("data: {class_path: lightning_iet.ImageFolderDataModule, init_args: {root: nowhere}}", "nowhere"),
    ],
)
def test_a_run_whose_images_are_unknown(here, capsys, config, message):
    file = run_folder(here) / "config.yaml"
    file.unlink() if config is None else file.write_text(config, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["audit-model", "runs", "--out", "report"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path("report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "train"], "Option --held-out expected images, but got none. Give both, or neither"),
        (["--range", "0:1"], "Option --range expected nothing where a run is audited with its own images"),
        (["--background", "black"], "Option --background expected nothing where a run is audited with its own"),
        (["--pages", "first"], "Option --pages expected nothing where a run is audited with its own images"),
        (["--strict", "true"], "Option --strict expected nothing where a run is audited with its own images"),
    ],
)
def test_half_of_the_images_or_another_reading_of_the_runs_is_refused(here, capsys, arguments, message):
    run_folder(here)
    with pytest.raises(SystemExit):
        main(["audit-model", "runs", "--out", "report", *arguments])
    assert message in capsys.readouterr().err


def test_what_a_model_has_memorized(here):
    write_images(here / "few", digit_pixels(0, 6))
    save_checkpoint(overfitted_model(digit_pixels(0, 6)), here / "overfitted.ckpt")
    few = {"train": Path("few"), "loss_timesteps": 10, "overwrite": True, "show_images": False}
    found = {name: run(ckpt=Path(f"{name}.ckpt"), **few).membership for name in ("model", "overfitted")}
    assert found["model"].auc_low < 0.5 < found["model"].auc_high
    assert found["overfitted"].auc > 0.9
    assert found["overfitted"].true_positive_rates["0.01"] > 0.3
    # The averaged weights have seen the digits, the last ones have not.
    assert run(ckpt=Path("overfitted.ckpt"), use_ema=False, **few).membership.auc < 0.9


def test_a_pipeline_of_diffusers_gives_the_same_figures(here):
    model = fresh_model()
    save_checkpoint(model, here / "model.ckpt")
    save_pipeline(model, here / "pipeline")
    expected = run(out=Path("a"), show_images=False).as_dict()
    found = run(out=Path("b"), ckpt=None, pipeline=Path("pipeline"), show_images=False).as_dict()
    for part in ("generated", "held_out", "membership"):
        assert found[part] == expected[part]


def test_drawn_images_are_those_of_the_sample_command(here, capsys):
    found = []
    original = BlockCache.store

    def store(self, key, tensors):
        found.extend(tensors["pixels"] if set(tensors) == {"pixels"} else ())
        original(self, key, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockCache, "store", store)
        run(num_samples=4, show_images=False)
    main(["sample", "--ckpt", "model.ckpt", "--num-samples", "4", "--num-inference-steps", "3", "--out", "samples"])
    for number, pixels in enumerate(found):
        with Image.open(f"samples/{number:05d}.png") as image:
            assert np.array_equal(np.asarray(image), pixels[0])
    assert len(found) == 4


def test_grey_images_for_a_model_of_colours(here):
    unet = {"in_channels": 3, "out_channels": 3}
    save_checkpoint(fresh_model(unet=unet), here / "model.ckpt")
    run()
    assert {facts["channels"] for facts in metrics()["sets"].values()} == {3}


def test_colours_are_left_aside_in_the_comparison_alone(here):
    unet = {"in_channels": 3, "out_channels": 3}
    save_checkpoint(fresh_model(unet=unet), here / "model.ckpt")
    coloured = run(out=Path("coloured"), show_images=False)
    grey = run(out=Path("grey"), grey=True, show_images=False)
    assert {facts["channels"] for facts in metrics("grey")["sets"].values()} == {1}
    assert metrics("grey")["settings"]["grey"] is True
    assert grey.membership == coloured.membership


def remedies(findings):
    return {part.name: " ".join([part.remedy, *part.more]) for part in findings.differences}


def draw_dim_blurred_digits(generator, drawing, cache):
    pixels = gaussian_blur(digit_pixels(200, 260), [3, 3], [1.0, 1.0]) // 8
    return image_set(pixels, location="drawn")


def test_remedies_that_are_refused_say_what_to_do(here, monkeypatch):
    """A model that draws dim and blurred digits, which differ in all that a range changes, and in sharpness."""
    monkeypatch.setattr("lightning_iet.tools.audit_model.draw", draw_dim_blurred_digits)
    settings = {"num_samples": 60, "loss_images": 20, "show_images": False}
    of_folders = remedies(run(**settings))
    assert of_folders["brightness"].startswith("All files have 8 bits, which no range changes")
    assert "a model that draws noise is not trained yet" in of_folders["brightness"]
    assert "give that to `lightning-iet audit`" in of_folders["sharpness"]
    run_folder(here)
    found = audit_model(ckpt=Path("runs"), out=Path("own"), **QUICK_MODEL | settings)
    of_run = remedies(found)
    assert "give --train and --held-out besides" in of_run["brightness"]
    assert "give that to `lightning-iet audit`" in of_run["sharpness"]
    text = " ".join([found.verdict.headline, found.verdict.details])
    assert text.count("Here images are read as the run read them") == 1
    page = Path("own/report.html").read_text(encoding="utf-8").partition("What was checked")[2]
    assert page.count("Here images are read as the run read them") == 1
    assert (metrics("own")["settings"]["fit"], metrics("own")["settings"]["range"]) == ("crop", "auto")


def test_a_model_that_draws_noise_is_told_so_and_no_option_is_named(here):
    """Neither of folders nor of a run, whose audits name other options."""
    run_folder(here)
    settings = {"num_samples": 60, "loss_images": 20, "show_images": False}
    own = audit_model(ckpt=Path("runs"), out=Path("own"), **QUICK_MODEL | settings)
    for found in (run(**settings), own):
        assert found.verdict.level == "open"
        assert found.verdict.answer.startswith(
            "Not decided: the generated images look like noise: the model is trained"
        )
        text = " ".join([found.verdict.headline, found.verdict.details])
        assert (
            "Train longer, or draw in more steps (--num-inference-steps where they are drawn), then audit again."
            in text
        )
        named = {option for option in ("--image-size", "--range", "--background", "--grey", "--fit") if option in text}
        assert not named


def test_images_are_brought_to_what_the_model_samples(here, capsys):
    """Size and channels; a shape is changed as the model was trained, and refused where its checkpoint does not say."""
    write_images(here / "large", random_pixels(30, size=16, channels=3))
    main(["audit-model", *COMMAND, "--ckpt", "model.ckpt", "--train", "large"])
    facts = metrics()["sets"]["train"]
    assert [facts[name] for name in ("channels", "height", "width")] == [1, 8, 8]
    wide = random_pixels(30, size=16)[..., :8]
    write_images(here / "wide", wide)
    line = fails(capsys, "--ckpt", "model.ckpt", "--train", "wide", "--out", "other")
    assert "expected images of the shape of 8x8, but got some of 8x16" in line
    assert "other" not in left_behind(here)
    content = torch.load("model.ckpt", weights_only=True)
    trained = {"image_size": (8, 8), "fit": "crop", "channels": 1, "range": "0:4095"}
    torch.save({**content, "ImageFolderDataModule": trained}, "trained.ckpt")
    run(ckpt=Path("trained.ckpt"), train=Path("wide"), out=Path("by_checkpoint"), show_images=False)
    run(train=Path("wide"), out=Path("by_option"), fit="crop", show_images=False)
    assert metrics("by_checkpoint")["generated"] == metrics("by_option")["generated"]
    used = [[metrics(name)["settings"][key] for key in ("fit", "range")] for name in ("by_checkpoint", "by_option")]
    assert used == [["crop", "0:4095"], ["crop", "auto"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of them, a checkpoint or a folder of diffusers, but got neither"),
        (["--ckpt", "model.ckpt", "--pipeline", "train"], "but got both"),
        (["--ckpt", "nowhere.ckpt"], "Option --ckpt expected a checkpoint file, but got 'nowhere.ckpt'"),
        (["--ckpt", "other.ckpt"], "Option --ckpt expected a whole checkpoint, but got 'other.ckpt'"),
        (["--pipeline", "nowhere"], "Option --pipeline expected a folder with an unconditional DDPMPipeline"),
        (["--ckpt", "model.ckpt", "--num-samples", "0"], "Option --num-samples expected an integer ≥ 1"),
        (["--ckpt", "model.ckpt", "--seed", "-1"], "Option --seed expected an integer ≥ 0"),
        (["--ckpt", "model.ckpt", "--num-inference-steps", "101"], "expected at most 100, the timesteps of the model"),
        (["--ckpt", "model.ckpt", "--loss-timesteps", "0"], "Option --loss-timesteps expected an integer ≥ 1"),
        (["--ckpt", "model.ckpt", "--loss-images", "1"], "Option --loss-images expected an integer ≥ 2"),
        (
            ["--ckpt", "model.ckpt", "--image-size", "16"],
            "Option --image-size expected 8x8, the size of the model's images",
        ),
        (["--ckpt", "model.ckpt", "--held-out", "train"], "expected other images than --train, but got the same ones"),
        (["--ckpt", "model.ckpt", "--held-out", "one"], "Option --held-out expected at least 2 images"),
        (["--ckpt", "model.ckpt", "--k", "31"], "Option --train expected at least k = 31 images, but got 30"),
        (["--ckpt", "broken.ckpt"], "expected images with a finite loss"),
        (["--ckpt", "model.ckpt", "--out", "train"], "holds other files"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_drawn(here, capsys, monkeypatch, arguments, message):
    Path("other.ckpt").write_text("x")
    write_images(here / "one", random_pixels(1))
    if "broken.ckpt" in arguments:
        broken = fresh_model()
        broken.ema.module.conv_in.weight.data.fill_(torch.nan)
        save_checkpoint(broken, here / "broken.ckpt")
    monkeypatch.setattr(DiffusionModule, "sample", None)
    assert message in fails(capsys, *arguments)
    assert not Path("report").exists()


def test_an_interrupted_audit_goes_on_with_the_same_result(here, monkeypatch, capsys):
    run(out=Path("whole"))
    calls = {"sample": 0, "losses": 0}
    for name, last in (("losses", 12), ("sample", 2)):
        original = getattr(DiffusionModule, name)

        def interrupted(self, *args, _name=name, _last=last, _original=original, **kwargs):
            calls[_name] += 1
            if calls[_name] == _last:
                raise KeyboardInterrupt
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(DiffusionModule, name, interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run()
        assert left_behind(here) == {"whole", "report.partial"}
    assert "The same command goes on from here" in capsys.readouterr().err
    run()
    # 9 blocks of 5 timesteps, of which one was cut off at its second; 3 blocks of images, of which one was cut off.
    assert calls == {"losses": 9 * 5 + 2, "sample": 3 + 1}
    assert left_behind(here) == {"whole", "report"}
    for name in FILES:
        assert Path("whole", name).read_bytes() == Path("report", name).read_bytes()


def test_other_thresholds_draw_and_search_nothing_anew(here, monkeypatch):
    """Unless near-duplicates become so many that all neighbours which are known of an image show the same."""
    run(cache=Path("cache"))
    monkeypatch.setattr(DiffusionModule, "sample", None)
    monkeypatch.setattr(DiffusionModule, "losses", None)
    monkeypatch.setattr(search, "search_rows", None)
    run(cache=Path("cache"), ratio=0.7, out=Path("again"))
    assert metrics("again")["membership"] == metrics()["membership"]
    assert metrics("again")["sets"] == metrics()["sets"]
    assert metrics("again")["held_out"]["copies"]["count"] > metrics()["held_out"]["copies"]["count"]
    with pytest.raises(TypeError):
        run(cache=Path("cache"), seed=1, out=Path("other"))


def run_shared(folder):
    os.chdir(folder)
    os.environ["SOURCE_DATE_EPOCH"] = DATE
    torch.set_num_threads(1)
    leave_pictures_empty()  # as in the process of the test: this one has imported what draws them just now
    return json.dumps(run(out=Path("shared")).as_dict())


def test_processes_share_the_work_and_find_the_same(here, processes):
    torch.set_num_threads(1)
    alone = json.dumps(run(out=Path("alone")).as_dict())
    assert processes(2).run(run_shared, here) == [alone, alone]
    for name in FILES:
        assert Path("alone", name).read_bytes() == Path("shared", name).read_bytes()
    assert left_behind(here) == {"alone", "shared"}
