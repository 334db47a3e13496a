import json
import os
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.linalg
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from lightning_iet import AntiGradientControl, ParameterAveragingCallback, ShardedDataModule
from lightning_iet.callbacks.evaluation import Evaluation, RunHistory
from lightning_iet.callbacks.interruptions import StopSignal
from lightning_iet.evaluation import report as publishing
from lightning_iet.metrics.features import feature_extractor
from tests.helpers.evaluations import Copier, FewDigits, Untrained, fit, images_of, rows_of
from tests.helpers.models import quiet_trainer, tiny_diffusion

PICTURES = ("samples.png", "nearest.png", "curves.png", "mq.png")
THRESHOLDS = (0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def naive_ratios(images, train, k):
    """Loops over everything, in float64."""
    plain, mq = [], []
    for image in images.double():
        squared = sorted(float(((image - other) ** 2).sum()) for other in train.double())
        plain.append((squared[0] / squared[1]) ** 0.5)
        mq.append(squared[0] / (sum(squared[:k]) / k))
    return plain, mq


def naive_fid(images, reference):
    """Fréchet distance by its formula, with scipy's matrix root."""
    a, b = (feature_extractor("digits")(x).double().numpy() for x in (images, reference))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root.real))


def size_of(path):
    with Image.open(path) as image:
        image.load()
        return image.size


@pytest.fixture
def pictures(drawn):
    """A test that asks for it gets pictures; drawing them takes most of a test's time."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(publishing, "write_pictures", lambda *args, **kwargs: None)


# --- the figures -----------------------------------------------------------------------------------------------------


def test_figures_equal_naive_loops(tmp_path):
    evaluation = Evaluation(40, k=20, seed=3)
    trainer, module = fit(tmp_path, evaluation)
    data = trainer.datamodule
    train, reference = images_of(data.train_set), images_of(data.reference_set)
    generated = torch.cat([module.image(3, i) for i in range(40)])
    plain, mq = naive_ratios(generated, train, 20)
    scores = evaluation.report["generated"]
    assert scores["num_images"] == 40
    assert scores["memorized_fraction"] == sum(r < 1 / 3 for r in plain) / 40 == 0.5
    assert scores["mq"] == {f"{a:g}": sum(r < a for r in mq) / 40 for a in THRESHOLDS}
    assert scores["mq_count"] == {f"{a:g}": sum(r < a for r in mq) for a in THRESHOLDS}
    assert scores["fid"] == pytest.approx(naive_fid(generated, reference), rel=1e-4)
    assert evaluation.report["train"] == {"num_images": 64, "fid": pytest.approx(naive_fid(train, reference), rel=1e-4)}


def test_control_figures_equal_naive_loops(tmp_path):
    evaluation = Evaluation(200, k=20)  # more than the 100 control images: all of them count
    trainer, _ = fit(tmp_path, evaluation)
    control, train, reference = (
        images_of(getattr(trainer.datamodule, name)) for name in ("control_set", "train_set", "reference_set")
    )
    plain, mq = naive_ratios(control, train, 20)
    scores = evaluation.report["control"]
    assert scores["num_images"] == 100
    assert scores["memorized_fraction"] == sum(r < 1 / 3 for r in plain) / 100
    assert scores["mq"] == {f"{a:g}": sum(r < a for r in mq) / 100 for a in THRESHOLDS}
    assert scores["fid"] == pytest.approx(naive_fid(control, reference), rel=1e-4)


def test_control_has_as_many_images_as_were_generated(tmp_path):
    evaluation = Evaluation(40)
    fit(tmp_path, evaluation)
    assert evaluation.report["control"]["num_images"] == 40


def test_loss_curve_is_the_mean_over_all_samples_of_an_epoch(tmp_path):
    losses = []

    class Recorder(Copier):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            losses.append((self.current_epoch, output["sample_loss"].detach()))
            return output

    evaluation = Evaluation(4)
    fit(tmp_path, evaluation, module=Recorder(), data=FewDigits(70, num_control=10, batch_size=32))
    expected = [float(torch.cat([values for at, values in losses if at == epoch]).mean()) for epoch in (0, 1)]
    assert evaluation.report["curves"]["loss_by_epoch"] == pytest.approx(expected, rel=1e-6)


def test_anti_gradient_control_is_reported(tmp_path):
    class Short(Copier):
        num_timesteps = 10

    agc = AntiGradientControl(0.9, num_timesteps=10)
    evaluation = Evaluation(4, num_inference_steps=10)
    fit(tmp_path, evaluation, module=Short(), callbacks=[agc], trainer={"max_epochs": 8})
    run, curves = evaluation.report["run"], evaluation.report["curves"]
    assert (run["threshold"], run["num_timesteps"], run["epochs"], run["steps"]) == (0.9, 10, 8, 16)
    assert 0 < run["skip_rate"] == agc.skip_rate()
    assert curves["skip_rate_by_timestep"] == agc.skip_rate_by_timestep().tolist()
    assert curves["loss_by_timestep"] == agc.loss_by_timestep().tolist()


@pytest.mark.parametrize(
    ("weigh", "what"), [("losses", "AGC by record, weights of losses:"), ("draws", "AGC by record, drawn by weight:")]
)
def test_weights_by_record_are_reported_epoch_by_epoch_and_go_on_with_a_resumed_run(tmp_path, capsys, weigh, what):
    class Spy(pl.Callback):
        def on_train_epoch_end(self, trainer, module):  # groups of options come first
            weights = sorted(agc.records.weights().tolist())
            expected.append([sum(weights) / 64, sum(weights[:6]) / 6])

    expected, evaluation, data = [], Evaluation(4), {"data": FewDigits(64, num_control=10, batch_size=16)}
    agc = AntiGradientControl(criterion="record", eta=0.5, num_bins=2, weigh=weigh)
    trainer, _ = fit(tmp_path, evaluation, callbacks=[agc, Spy()], **data, trainer={"max_epochs": 4})
    found = evaluation.report["curves"]["weights_by_epoch"]
    assert list(found) == [1, 2, 3, 4]
    assert torch.tensor([*found.values()]).allclose(torch.tensor(expected))
    assert found[4][1] < found[4][0] < 1
    assert evaluation.report["run"]["lowest_weights"] == found[4][1]
    printed = capsys.readouterr().out
    assert what in printed
    assert "skipped by AGC" not in printed
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    agc, resumed = AntiGradientControl(criterion="record", eta=0.5, num_bins=2, weigh=weigh), Evaluation(4)
    fit(tmp_path, resumed, callbacks=[agc], **data, trainer={"max_epochs": 5}, ckpt_path=tmp_path / "first.ckpt")
    later = resumed.report["curves"]["weights_by_epoch"]
    assert list(later) == [1, 2, 3, 4, 5]
    assert {epoch: later[epoch] for epoch in found} == found


@pytest.mark.parametrize(("num_train", "k"), [(20, 20), (64, 50)])
def test_without_k_it_is_50_or_all_images(tmp_path, num_train, k):
    evaluation = Evaluation(4, k=None, num_inference_steps=2)
    fit(tmp_path, evaluation, data=FewDigits(num_train, num_control=10, batch_size=16))
    assert evaluation.report["settings"]["k"] == k


def test_without_weights_none_are_reported(tmp_path):
    evaluation = Evaluation(4)
    fit(tmp_path, evaluation, callbacks=[AntiGradientControl(0.5)])
    assert evaluation.report["curves"]["weights_by_epoch"] is None
    assert evaluation.report["run"]["lowest_weights"] is None


# --- the files -------------------------------------------------------------------------------------------------------


def test_run_folder_has_figures_and_pictures(tmp_path, pictures):
    logger = CSVLogger(tmp_path, name="digits")
    evaluation = Evaluation(100)
    fit(tmp_path, evaluation, trainer={"logger": logger, "log_every_n_steps": 1})
    folder = tmp_path / "digits" / "version_0"
    assert {file.name for file in folder.iterdir()} == {"metrics.json", "metrics.csv", *PICTURES}
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored == evaluation.report
    assert stored["settings"] == {
        "num_samples": 100, "sampler": "ddim", "num_inference_steps": 50, "use_ema": True, "seed": 0,
        "features": "digits", "k": 50, "ratio": 1 / 3, "feature_dimensions": 64,
    }  # fmt: skip
    sizes = [stored["data"][f"num_{name}"] for name in ("train", "control", "held_out", "reference")]
    assert sizes == [64, 100, 100, 200]
    sizes = {name: size_of(folder / name) for name in PICTURES}
    assert sizes["samples.png"] == (760, 8 * 64 + 9 * 6 + 76)
    assert sizes["nearest.png"] == (1260, 874)
    assert sizes["mq.png"] == (840, 570)


@pytest.mark.parametrize("use_ema", [True, False])
def test_the_report_says_which_weights_were_sampled(tmp_path, use_ema):
    module = Copier()
    for average, used in ((None, False), (module.net, use_ema)):
        module.ema = average
        evaluation = Evaluation(4, features="none", use_ema=use_ema)
        fit(tmp_path, evaluation, module=module)
        assert evaluation.report["settings"]["use_ema"] is used


def test_loggers_get_every_figure_with_its_control(tmp_path):
    logger = CSVLogger(tmp_path, name="digits")
    evaluation, agc = Evaluation(10), AntiGradientControl(0.9, num_bins=1)
    fit(tmp_path, evaluation, callbacks=[agc], trainer={"logger": logger, "log_every_n_steps": 1})
    logged = rows_of(logger)[-1]
    report = evaluation.report
    names = ["fid", "memorized_fraction", *(f"mq_{a:g}" for a in THRESHOLDS)]
    assert set(logged) >= {f"eval/{name}{suffix}" for name in names for suffix in ("", "_control")}
    assert float(logged["eval/fid"]) == report["generated"]["fid"]
    assert float(logged["eval/mq_0.15_control"]) == report["control"]["mq"]["0.15"]
    assert float(logged["eval/fid_train"]) == report["train"]["fid"]
    assert 0 < float(logged["eval/skip_rate"]) == report["run"]["skip_rate"] == agc.skip_rate()  # of the whole run


def test_loggers_that_take_pictures_get_them(tmp_path, pictures):
    class Gallery(CSVLogger):
        def log_image(self, key, images):
            shown[key] = [size_of(image) for image in images]

    shown = {}
    fit(tmp_path, Evaluation(4), trainer={"logger": Gallery(tmp_path), "log_every_n_steps": 1})
    assert set(shown) == {"eval/samples", "eval/nearest", "eval/curves", "eval/mq"}


def test_table_shows_both_columns(tmp_path, capsys):
    evaluation = Evaluation(40)
    fit(tmp_path, evaluation, callbacks=[AntiGradientControl(0.5)])
    printed = capsys.readouterr().out
    for text in (
        "40 generated",
        "held out",
        "FID of the 64 training images",
        "MQ < 0.15",
        "20 (50.0%)",
        "skipped by AGC",
    ):
        assert text in printed
    assert str(tmp_path) in printed.replace("\n", "")


def test_without_logger_the_files_go_to_the_root(tmp_path, pictures):
    fit(tmp_path, Evaluation(4))
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.json", *PICTURES}


def test_fast_dev_run_evaluates_a_few_images_and_keeps_nothing(tmp_path, capsys, pictures):
    evaluation = Evaluation(100, every_n_epochs=1)
    _, module = fit(tmp_path, evaluation, trainer={"fast_dev_run": True})
    assert sum(num for _, num in module.draws[1:]) == 4
    assert list(tmp_path.iterdir()) == []
    assert "nothing is kept" in capsys.readouterr().out


def test_num_samples_0_switches_it_off(tmp_path):
    _, module = fit(tmp_path, Evaluation(0))
    assert module.draws == []
    assert list(tmp_path.iterdir()) == []


def test_a_diffusion_module_is_evaluated(tmp_path, pictures):
    evaluation = Evaluation(6, num_inference_steps=3, sampler="ddpm", use_ema=False, num_pairs=3)
    _, module = fit(tmp_path, evaluation, module=tiny_diffusion(), trainer={"max_epochs": 1})
    again = module.sample(6, num_inference_steps=3, sampler="ddpm", use_ema=False)
    plain, _ = naive_ratios(again, images_of(module.trainer.datamodule.train_set), 50)
    assert evaluation.report["generated"]["memorized_fraction"] == sum(r < 1 / 3 for r in plain) / 6


# --- when ------------------------------------------------------------------------------------------------------------


def test_training_is_the_same_with_evaluations_in_between(tmp_path):
    plain = fit(tmp_path / "a", trainer={"max_epochs": 4})[1]
    watched = fit(tmp_path / "b", Evaluation(4, every_n_epochs=1), trainer={"max_epochs": 4})[1]
    assert len(watched.draws) > 4
    for expected, found in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_training_modes_are_put_back(tmp_path):
    class Frozen(Copier):
        def on_train_start(self):
            self.net[1].eval()

        def training_step(self, batch, batch_idx):
            assert self.training
            assert not self.net[1].training
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Evaluation(4, every_n_epochs=1), module=Frozen(), trainer={"max_epochs": 3})


def test_interval_is_logged_and_can_be_monitored(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="eval/memorized_fraction", every_n_epochs=2)
    logger = CSVLogger(tmp_path, name="digits")
    settings = {"max_epochs": 4, "logger": logger, "enable_checkpointing": True, "log_every_n_steps": 1}
    fit(tmp_path, Evaluation(10, every_n_epochs=2), callbacks=[best], trainer=settings)
    rows = [row for row in rows_of(logger) if row["eval/fid"]]
    assert [row["step"] for row in rows] == ["3", "7", "8"]  # two epochs, four epochs, and the end
    assert float(rows[-1]["eval/fid"]) == pytest.approx(float(rows[0]["eval/fid"]))
    assert best.best_model_score == 0.5


def test_an_evaluation_at_the_last_epoch_is_not_done_again(tmp_path):
    _, module = fit(tmp_path, Evaluation(4, every_n_epochs=2))
    assert sum(num for _, num in module.draws[1:]) == 4


def test_every_few_steps_the_course_goes_on(tmp_path):
    logger = CSVLogger(tmp_path, name="digits")
    evaluation = Evaluation(10, every_n_steps=3, every_n_epochs=3)
    settings = {"max_epochs": 4, "logger": logger, "log_every_n_steps": 1}
    _, module = fit(tmp_path, evaluation, trainer=settings)
    course = evaluation.report["course"]
    assert [entry["step"] for entry in course] == [3, 6, 8]  # two steps an epoch; the third epoch ends with the sixth
    assert sum(num for _, num in module.draws[1:]) == 30
    assert course[-1] == {"step": 8} | {k: v for k, v in evaluation.report["generated"].items() if k != "mq_count"}
    rows = {row["step"]: row for row in rows_of(logger) if row["eval/fid"]}
    assert float(rows["3"]["eval/fid"]) == course[0]["fid"]
    written = json.loads((tmp_path / "digits" / "version_0" / "metrics.json").read_text())
    assert [entry["step"] for entry in written["course"]] == [3, 6, 8]


def test_steps_of_several_batches_are_evaluated_once(tmp_path):
    evaluation = Evaluation(4, every_n_steps=1)
    _, module = fit(tmp_path, evaluation, trainer={"accumulate_grad_batches": 2, "max_epochs": 3})
    assert [entry["step"] for entry in evaluation.report["course"]] == [1, 2, 3]
    assert sum(num for _, num in module.draws[1:]) == 12


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_is_taken_up_keeps_its_course(tmp_path):
    checkpointing = ModelCheckpoint(tmp_path, filename="first", save_top_k=-1)
    settings = {"max_epochs": 1, "enable_checkpointing": True}
    fit(tmp_path, Evaluation(4, every_n_steps=1), callbacks=[checkpointing], trainer=settings)
    evaluation = Evaluation(4, every_n_steps=1)
    settings["max_epochs"] = 2
    again = ModelCheckpoint(tmp_path, filename="second", save_top_k=-1)
    fit(tmp_path, evaluation, callbacks=[again], trainer=settings, ckpt_path=checkpointing.best_model_path)
    assert [entry["step"] for entry in evaluation.report["course"]] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed")
@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_steps": 2}])
def test_a_run_that_was_cut_off_between_a_checkpoint_and_its_evaluation_makes_up_for_it(tmp_path, every):
    """Checkpoints are written first: that of a step does not know the evaluation after the same step."""

    class CutOff(Copier):
        def on_train_epoch_start(self):
            if self.trainer.current_epoch == 2 and not (tmp_path / "again").exists():
                raise KeyError("the power")

    when = {"every_n_epochs": 1} if "every_n_epochs" in every else {"every_n_train_steps": 2}
    settings = {"max_epochs": 3, "enable_checkpointing": True, "limit_val_batches": 1}
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=False, **when)  # after validation
    with pytest.raises(KeyError):
        fit(tmp_path, Evaluation(4, **every), module=CutOff(), callbacks=[saving], trainer=settings)
    (tmp_path / "again").mkdir()
    evaluation = Evaluation(4, **every, keep_best="every_n_epochs" in every)
    last = tmp_path / "epoch=1-step=4.ckpt"
    assert [entry["step"] for entry in torch.load(last, weights_only=True)["evaluation"]["course"]] == [2]
    fit(tmp_path / "again", evaluation, module=CutOff(), trainer=settings, ckpt_path=last)
    assert [entry["step"] for entry in evaluation.report["course"]] == [2, 4, 6]


def test_the_verdict_stands_above_the_table_and_in_the_file(tmp_path, capsys):
    evaluation = Evaluation(64, num_inference_steps=1)  # every second image is a copy
    fit(tmp_path, evaluation)
    printed = capsys.readouterr().out
    assert evaluation.report["verdict"].startswith("The model copies training images: 32 of 64 images")
    assert printed.index("The model copies training images") < printed.index("Quality and memorization")
    assert "lower" not in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["verdict"] == evaluation.report["verdict"]
    assert evaluation.report["settings"]["feature_dimensions"] == 64
    assert "FID means little here: 64 images" in " ".join(printed.split())


def test_pictures_can_be_left_out(tmp_path, pictures):
    fit(tmp_path, Evaluation(4, pictures=False))
    assert (tmp_path / "metrics.json").is_file()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("rounds", [2, 3])
def test_evaluation_in_mid_round_sees_the_average_and_leaves_the_shards(tmp_path, rounds):
    def run(folder, evaluation):
        averaging = ParameterAveragingCallback(2, every_n_epochs=rounds)
        data = ShardedDataModule(FewDigits(64, num_control=10, batch_size=16), num_shards=2)
        watch = Watch()
        _, module = fit(folder, evaluation, data=data, callbacks=[watch, averaging], trainer={"max_epochs": 3})
        return module, watch.means

    class Watch(pl.Callback):
        """Averages the shards by hand, from their states."""

        def __init__(self):
            self.means = []

        def on_train_epoch_end(self, trainer, module):
            engine = next(c for c in trainer.callbacks if isinstance(c, ParameterAveragingCallback)).engine
            engine.park()
            weights = []
            for shard in sorted(engine.states):
                engine.activate(shard)
                weights.append(module.net[0].weight.detach().clone())
            self.means.append(torch.stack(weights).mean(0))

    plain, _ = run(tmp_path / "plain", None)
    watched, means = run(tmp_path / "watched", Evaluation(8, every_n_epochs=1))
    shown = watched.shown[1:]  # the first call is the rehearsal
    per_evaluation = len(shown) // 3
    for epoch, mean in enumerate(means):
        torch.testing.assert_close(shown[per_evaluation * epoch], mean)
    for expected, found in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_final_evaluation_comes_after_all_other_callbacks(tmp_path):
    class Finish(pl.Callback):
        def on_train_end(self, trainer, module):
            nn.init.constant_(module.net[0].weight, 7.0)

    evaluation = Evaluation(4)
    callbacks = [Finish(), ModelCheckpoint(tmp_path)]
    trainer, module = fit(tmp_path, evaluation, callbacks=callbacks, trainer={"enable_checkpointing": True})
    assert trainer.callbacks[-1] is evaluation
    assert (module.shown[-1] == 7).all()


class CutOff(Copier):
    """Sends its own process a signal while it draws images for the second time (the first is a check)."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def sample(self, *args, **kwargs):
        if self.draws:
            os.kill(os.getpid(), self.number)
        return super().sample(*args, **kwargs)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 1)], ids=["SIGTERM", "SIGINT"]
)
@pytest.mark.parametrize("is_command", [True, False])
def test_a_signal_ends_the_final_evaluation_at_once_and_it_is_said_how_to_get_it(
    tmp_path, caplog, number, status, is_command
):
    handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if is_command:
        (tmp_path / "config.yaml").touch()
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    module = CutOff(number)
    saving = {"enable_checkpointing": True, "callbacks": [Evaluation(40, k=20), ModelCheckpoint(save_last=True)]}
    try:
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path, module=module, trainer=saving)
    finally:
        signal.signal(signal.SIGINT, handlers[signal.SIGINT])  # which Lightning lets be ignored from then on
    assert stop.value.code == status
    assert signal.getsignal(signal.SIGTERM) is handlers[signal.SIGTERM]
    assert len(module.draws) == 1
    command = f" `lightning-iet test --ckpt_path {tmp_path}` evaluates it." if is_command else ""
    said = f"The evaluation was cut off. The model is saved in '{tmp_path}'.{command}"
    assert caplog.messages.count(said) == 1


def test_sigterm_between_the_last_step_and_the_evaluation_leaves_it_out(tmp_path, caplog):
    class Late(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == trainer.max_epochs - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    module = Copier()
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, Evaluation(40, k=20), module=module, callbacks=[Late(), StopSignal()])
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(module.draws) == 1  # the check before training
    assert caplog.messages.count("The evaluation was cut off.") == 1


def test_a_resumed_run_goes_on_with_its_curve(tmp_path):
    first, resumed = Evaluation(4), Evaluation(4)
    trainer, _ = fit(tmp_path / "first", first)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    fit(tmp_path / "resumed", resumed, trainer={"max_epochs": 4}, ckpt_path=tmp_path / "first.ckpt")
    losses = [evaluation.report["curves"]["loss_by_epoch"] for evaluation in (first, resumed)]
    assert (len(losses[0]), len(losses[1])) == (2, 4)
    assert losses[1][:2] == losses[0]
    assert resumed.report["run"]["seconds"] > first.report["run"]["seconds"]


def test_a_run_taken_up_in_mid_epoch_continues_the_mean_of_that_epoch():
    strategy = SingleDeviceStrategy()
    before, after = RunHistory(), RunHistory()
    before.add({"sample_loss": torch.tensor([1.0, 2.0])}, epoch=0)
    before.add({"sample_loss": torch.tensor([3.0])}, epoch=1)
    after.load_state_dict(before.state_dict(strategy))
    after.add({"sample_loss": torch.tensor([5.0, 7.0])}, epoch=1)
    after.add({"loss": torch.tensor(2.0)}, epoch=2, accumulated=2)  # Lightning has divided it
    assert after.losses(strategy) == [1.5, 5.0, 4.0]


class Mean(Copier):
    """Returns the mean alone, of losses that are 3."""

    def training_step(self, batch, batch_idx):
        return 3 + 0 * self.net(batch[0].flatten(1)).mean()


def test_curves_of_accumulated_gradients_have_the_units_of_others(tmp_path):
    """A round of two batches of each of two shards, of which an epoch has four: half an epoch."""
    evaluation = Evaluation(4, k=20)
    data = ShardedDataModule(FewDigits(64, num_control=100, batch_size=8), 2)
    averaging = ParameterAveragingCallback(2, every_n_train_steps=2)
    fit(tmp_path, evaluation, module=Mean(), data=data, callbacks=[averaging], trainer={"accumulate_grad_batches": 2})
    curves = evaluation.report["curves"]
    assert curves["round_epochs"] == 0.5
    assert curves["loss_by_epoch"] == pytest.approx([3.0, 3.0])


def test_two_processes_draw_a_part_each_and_find_the_same(tmp_path, processes):
    alone = Evaluation(7, k=20)
    fit(tmp_path / "alone", alone)
    results = processes(2).run(evaluate_on_two, str(tmp_path / "both"))
    assert [draws for _, draws in results] == [[(0, 1), (1, 1), (2, 1), (3, 1)], [(4, 1), (5, 1), (6, 1), (7, 1)]]
    for report, _ in results:
        assert report["generated"] == alone.report["generated"]
        assert report["control"] == alone.report["control"]
        assert report["run"]["processes"] == 2
    assert {file.name for file in (tmp_path / "both").iterdir()} == {"metrics.json", *PICTURES}


def evaluate_on_two(folder):
    evaluation = Evaluation(7, k=20)
    _, module = fit(folder, evaluation, trainer={"devices": 2, "strategy": "ddp"})
    return evaluation.report, module.draws[1:]


def test_two_processes_evaluate_in_mid_round_beside_a_progress_bar(tmp_path, processes):
    """A bar on the first process alone asks for values that are summed over processes."""
    results = processes(2).run(evaluate_shards_on_two, str(tmp_path))
    (first, weights), (second, other) = results
    assert first["curves"]["loss_by_epoch"] == second["curves"]["loss_by_epoch"]
    assert first["generated"] == second["generated"]
    assert len(first["curves"]["loss_by_epoch"]) == 3
    assert torch.equal(weights, other)


def evaluate_shards_on_two(folder):
    evaluation = Evaluation(4, every_n_epochs=1)
    callbacks = [AntiGradientControl(0.5), ParameterAveragingCallback(2, every_n_epochs=2)]
    data = ShardedDataModule(FewDigits(64, num_control=10, batch_size=16), num_shards=2)
    settings = {"devices": 2, "strategy": "ddp", "enable_progress_bar": True, "max_epochs": 3}
    _, module = fit(folder, evaluation, data=data, callbacks=callbacks, trainer=settings)
    return evaluation.report, module.net[0].weight.detach()


# --- bad input -------------------------------------------------------------------------------------------------------


class Bare(pl.LightningDataModule):
    def train_dataloader(self):
        raise AssertionError("training has started")

    def val_dataloader(self):
        return []


class WrongSize(Copier):
    def image(self, seed, i):
        return torch.zeros(1, 1, 16, 16)


@pytest.mark.parametrize(
    ("evaluation", "change", "message"),
    [
        ({}, {"data": Bare()}, "`datamodule` expected .* got Bare without `train_set`, `control_set`, `reference_set`"),
        ({"k": 65}, {}, "expected at least k=65 images, but got 64. Pass k=64"),
        ({"num_inference_steps": 1001}, {}, "`num_inference_steps` expected at most 1000"),
        ({"feature_weights": "no.pt"}, {}, "`feature_weights` expected an existing file, but got no.pt"),
        ({}, {"module": WrongSize()}, r"draws images like those of training, \(1, 8, 8\), but got \(1, 16, 16\)"),
        ({}, {"data": FewDigits(64, num_control=1, batch_size=16)}, "`control_set` expected at least 2 images"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_training(tmp_path, evaluation, change, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as error:
        fit(tmp_path, Evaluation(4, **evaluation), **({"module": Untrained()} | change))
    assert "\n" not in str(error.value)


def test_diverged_weights_are_named(tmp_path):
    class Diverged(Copier):
        def image(self, seed, i):
            return torch.full((1, 1, 8, 8), 0.5 if self.trainer.global_step == 0 else torch.nan)

    with pytest.raises(ValueError, match="got NaN or infinite values: its weights have diverged"):
        fit(tmp_path, Evaluation(4), module=Diverged())
    assert list(tmp_path.iterdir()) == []


def test_loaders_without_data_module_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`datamodule` expected .* but got none"):
        quiet_trainer(tmp_path, callbacks=[Evaluation(4)]).fit(Untrained(), DataLoader([0]), DataLoader([0]))


def test_unwritable_folder_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"`default_root_dir` expected a folder that can be written, but got .*/file/runs"
    ):
        fit(tmp_path / "file" / "runs", Evaluation(4), module=Untrained())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 1}, "`num_samples` expected an integer ≥ 2, or 0"),
        ({"num_samples": -2}, "`num_samples`"),
        ({"sampler": "euler"}, "`sampler` expected 'ddim', 'ddpm' or 'own', but got 'euler'"),
        ({"every_n_epochs": 0}, "`every_n_epochs` expected an integer ≥ 1"),
        ({"num_inference_steps": 0}, "`num_inference_steps`"),
        ({"num_pairs": 0}, "`num_pairs`"),
        ({"batch_size": 0}, "`batch_size`"),
    ],
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**settings)
