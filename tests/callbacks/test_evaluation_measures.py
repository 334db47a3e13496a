"""Further measures of an evaluation: the same figures as the metrics give that a user would call by hand."""

import json

import diffusers
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.metrics import roc_auc_score

from lightning_iet.callbacks.evaluation import Evaluation
from lightning_iet.evaluation import report as publishing
from lightning_iet.evaluation.measures import TextNorm
from lightning_iet.functional.seeding import derive_seed
from lightning_iet.metrics import (
    AverageMinimumDistance,
    DensityCoverage,
    ExtractionAttack,
    MiFID,
    NearestTrainingDistance,
    PrecisionRecall,
    feature_extractor,
)
from lightning_iet.modules import TextToImageModule
from tests.helpers.evaluations import FewDigits, Untrained, fit, images_of, rows_of
from tests.helpers.models import tiny_diffusion
from tests.helpers.text_to_image import Captioned, CaptionedData

OF_IMAGES = (
    "average_minimum_distance", "density_coverage", "extraction_attack", "mifid", "nearest_training_distance",
    "precision_recall",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr(publishing, "write_pictures", lambda *args, **kwargs: None)


def by_hand(images, train, reference):
    """Call every metric as its page in the docs does."""
    network, figures = feature_extractor("digits"), {}
    single = {
        "average_minimum_distance": AverageMinimumDistance(train, features=network),
        "mifid": MiFID(train, features=network),
    }
    several = {
        "extraction_attack": ExtractionAttack(train),
        "nearest_training_distance": NearestTrainingDistance(train),
    }
    for name, metric in (single | several).items():
        metric.update(images)
        found = metric.compute()
        figures |= {name: found} if name in single else {f"{name}_{key}": value for key, value in found.items()}
    for metric in (PrecisionRecall(network), DensityCoverage(network)):
        metric.update(reference, real=True)
        metric.update(images, real=False)
        figures |= metric.compute()
    return {name: float(figure) for name, figure in figures.items()}


def test_measures_of_images_are_those_of_the_metrics(tmp_path):
    evaluation = Evaluation(40, k=20, every_n_epochs=1, measures=OF_IMAGES)
    logger = CSVLogger(tmp_path)
    trainer, module = fit(tmp_path, evaluation, trainer={"logger": logger, "max_epochs": 2})
    train, control, reference = (
        images_of(getattr(trainer.datamodule, f"{name}_set")) for name in ("train", "control", "reference")
    )
    generated = torch.cat([module.image(0, i) for i in range(40)])
    expected = by_hand(generated, train, reference)
    assert evaluation.report["generated"]["further"] == pytest.approx(expected)
    chosen = torch.randperm(len(control), generator=torch.Generator().manual_seed(0))[:40]
    assert evaluation.report["control"]["further"] == pytest.approx(by_hand(control[chosen], train, reference))
    assert expected["precision"] > 0
    rows = [row for row in rows_of(logger) if row.get("eval/mifid")]
    assert len(rows) >= 2  # at the interval, and at the end
    assert float(rows[-1]["eval/recall"]) == pytest.approx(expected["recall"])
    assert float(rows[-1]["eval/recall_control"]) == pytest.approx(evaluation.report["control"]["further"]["recall"])


def smallest():
    return tiny_diffusion(unet={"mid_block_type": None})


def naive_losses(module, dataset):
    """Mean over timesteps, one image and one timestep at a time."""
    means = []
    for index in range(len(dataset)):
        image, losses = dataset[index][0][None], []
        for draw in range(20):
            timestep = torch.tensor([(2 * draw + 1) * 1000 // 40])
            generator = torch.Generator().manual_seed(derive_seed(0, index, 1 + draw))
            noise = torch.randn(image.shape[1:], generator=generator)[None]
            losses.append(float(module.losses(image, timestep, noise, use_ema=True)))
        means.append(sum(losses) / 20)
    return means


def test_membership_inference_is_a_loop_over_images(tmp_path):
    evaluation = Evaluation(4, measures=["membership_inference"], num_inference_steps=2, k=10)
    data = FewDigits(10, num_control=8, batch_size=5)
    _, module = fit(tmp_path, evaluation, module=smallest(), data=data, trainer={"max_epochs": 1})
    with torch.no_grad():
        members, others = naive_losses(module, data.train_set), naive_losses(module, data.control_set)
    expected = roc_auc_score([1] * 10 + [0] * 8, [-loss for loss in members + others])
    assert evaluation.report["generated"]["further"]["membership_inference_auc"] == pytest.approx(expected)
    assert module.training


def naive_text_norms(module, dataset):
    """One image and one timestep at a time."""
    means = []
    for index in range(len(dataset)):
        image, caption, _ = dataset[index]
        latents = module.latents(image[None], at_mean=True)
        words, nothing = module.captions([caption]), module.captions([""])
        norms = []
        for draw, part in enumerate((0.2, 0.4, 0.6, 0.8)):
            generator = torch.Generator().manual_seed(derive_seed(0, index, 1 + draw))
            noise = torch.randn(latents.shape[1:], generator=generator)[None]
            timestep = torch.tensor([int(part * module.num_timesteps)])
            noisy = module.scheduler.add_noise(latents, noise, timestep)
            with_words, without = (module(noisy, timestep, c, use_ema=True) for c in (words, nothing))
            norms.append(float(((with_words - without) ** 2).sum() ** 0.5 / latents.numel() ** 0.5))
        means.append(sum(norms) / 4)
    return np.array(means)


def text_to_image():
    return TextToImageModule(
        synthetic=True, image_size=16, ema_decay=0.5, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2)
    )


def test_text_norm_is_a_loop_over_captions():
    module, train, held_out = text_to_image(), Captioned(4), Captioned(3)
    found = TextNorm(train, held_out, batch_size=2)(module, use_ema=True)
    with torch.no_grad():
        expected, control = (naive_text_norms(module.eval(), part) for part in (train, held_out))
    assert found == pytest.approx(
        {
            "text_norm": expected.mean(),
            "text_norm_quantile_90": np.quantile(expected, 0.9),
            "text_norm_control": control.mean(),
            "text_norm_quantile_90_control": np.quantile(control, 0.9),
            "text_norm_control_standard_error": control.std(ddof=1) / 3**0.5,
        },
        rel=1e-4,
    )
    assert expected.std() > 0
    with pytest.raises(ValueError, match="at least 2 images for text_norm, but got 1"):
        TextNorm(train, Captioned(1))


def test_text_norm_has_the_noise_of_training_whatever_the_class_of_the_scheduler():
    module, measure = text_to_image(), TextNorm(Captioned(3), Captioned(3))
    module.scheduler = diffusers.DDPMScheduler()
    expected = measure(module, use_ema=True)
    module.scheduler = diffusers.EulerDiscreteScheduler()
    assert measure(module, use_ema=True) == pytest.approx(expected, rel=1e-4)
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.EDMEulerScheduler()):
        module.scheduler, calls = scheduler, []
        handle = module.unet.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[1]))
        assert all(map(np.isfinite, measure(module, use_ema=False).values()))
        handle.remove()
        told = module.process.noised(torch.zeros(3, 1), torch.full((3,), 200), torch.zeros(3, 1))[1]
        assert torch.equal(calls[0].flatten()[:3], told)


def test_text_norm_is_measured_at_every_evaluation(tmp_path):
    evaluation = Evaluation(4, measures=["text_norm"], num_inference_steps=2, k=3, features="none", every_n_steps=1)
    module, data = text_to_image(), CaptionedData(4)
    fit(tmp_path, evaluation, module=module, data=data, trainer={"max_epochs": 1})
    first, last = evaluation.report["course"]
    assert first["further"].keys() == last["further"].keys()
    assert first["further"] != last["further"]
    with torch.no_grad():
        expected = naive_text_norms(module.eval(), data.train_set)
    assert last["further"]["text_norm"] == pytest.approx(expected.mean(), rel=1e-4)


def test_the_table_and_the_file_hold_them(tmp_path, capsys):
    fit(tmp_path, Evaluation(6, measures=["precision_recall"]), trainer={"max_epochs": 1})
    assert "recall" in capsys.readouterr().out
    (file,) = tmp_path.rglob("metrics.json")
    assert set(json.loads(file.read_text())["generated"]["further"]) == {"precision", "recall"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measures": ["fid"]}, "`measures` expected a list of .*, but got 'fid'"),
        ({"measures": "mifid"}, "`measures` expected a list of .*, but got 'mifid'"),
        ({"measures": ["mifid"], "measure_weights": {"clean_fid": "x.pt"}}, "for mifid, but got one for clean_fid"),
        ({"measures": ["membership_inference"]}, "`measures` expected a module with .* but got Untrained"),
        ({"measures": ["text_norm"]}, "expected a TextToImageModule for text_norm, but got Untrained"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(tmp_path, Evaluation(4, **settings), module=Untrained())


def test_training_takes_the_same_course(tmp_path):
    few = {"num_train": 16, "num_control": 10, "batch_size": 8}
    plain = fit(tmp_path / "a", trainer={"max_epochs": 2}, module=smallest(), data=FewDigits(**few))[1]
    measures = ["membership_inference", "precision_recall"]
    evaluation = Evaluation(4, every_n_epochs=1, measures=measures, num_inference_steps=1, k=10)
    watched = fit(tmp_path / "b", evaluation, trainer={"max_epochs": 2}, module=smallest(), data=FewDigits(**few))[1]
    for expected, found in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected, found)
