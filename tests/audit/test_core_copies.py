import pytest
import torch

from lightning_iet.audit import Settings, audit_images, image_set, make_findings
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.disguises import undo
from lightning_iet.audit.features import build_features
from lightning_iet.audit.report.page import limits
from lightning_iet.functional.memorization import memorized_fraction, memorized_quantity
from tests.helpers.image_folders import random_pixels, random_set
from tests.helpers.phantoms import eight_bits, phantoms


@pytest.fixture
def run(tmp_path):
    def audit(generated, train, held_out=None, **settings):
        settings = Settings(**{"k": 20} | settings)
        cache = BlockCache(tmp_path / "cache")
        return audit_images(
            generated, train, held_out, features=build_features("pixels"), cache=cache, settings=settings
        )

    return audit


def planted(train, *copies, count=100):
    return image_set(torch.cat([*copies, random_pixels(count, seed=7)]), location="generated")


def test_figures_are_those_of_the_functional_measures(run):
    train = random_set(80)
    near = (train.pixels[:30].float() * torch.linspace(0, 1, 30).view(-1, 1, 1, 1)).to(torch.uint8)
    generated = planted(train, near)
    findings = make_findings(run(generated, train))
    fraction = memorized_fraction(generated.pixels, train.pixels)
    assert findings.generated.memorized_fraction.share == pytest.approx(float(fraction))
    quantity = memorized_quantity(generated.pixels, train.pixels, k=20)
    counts = {name.removeprefix("mq_"): round(float(share) * len(generated)) for name, share in quantity.items()}
    assert {a: part.count for a, part in findings.generated.memorized_quantity.items()} == counts
    assert findings.generated.copies == findings.generated.memorized_fraction  # there are no duplicates


def test_a_near_copy_of_a_duplicated_image_is_found(run):
    """Where d1 / d2 as published sees none: both duplicates are as near."""
    train = random_set(80)
    train.pixels[40] = train.pixels[3]
    copy = (train.pixels[3:4].float() * 0.9).to(torch.uint8)
    found = run(planted(train, copy), train)
    ratios = {name: float(ratio[0]) for name, ratio in found.copies["generated"].ratios.items()}
    assert ratios["nearest"] == 1
    assert ratios["distinct"] < 1 / 3
    findings = make_findings(found)
    assert (findings.measure, findings.generated.copies.count, findings.generated.memorized_fraction.count) == (
        "distinct",
        1,
        0,
    )
    assert findings.duplicates.groups == [["3", "40"]]
    assert findings.duplicates.among_copied.share == 1
    without = make_findings(run(planted(train, copy), train, duplicates=False))
    assert (without.measure, without.generated.copies.count, without.duplicates) == ("nearest", 0, None)


@pytest.mark.parametrize(("k", "invariance"), [(2, "none"), (20, "none"), (20, "flip")])
def test_a_near_copy_of_an_image_with_more_duplicates_than_neighbours_is_found(run, k, invariance):
    """As :func:`memorized_fraction` finds it, with near-duplicates grouped."""
    train = random_set(80)
    noise = torch.randint(-2, 3, (30, *train.pixels.shape[1:]), generator=torch.Generator().manual_seed(0))
    train.pixels[40:70] = (train.pixels[3:4].int() + noise).clamp(0, 255).to(torch.uint8)
    copies = (train.pixels[3:5].float() * 0.9).to(torch.uint8)
    generated = planted(train, copies.flip(-1) if invariance == "flip" else copies)
    findings = make_findings(run(generated, train, k=k, invariance=invariance))
    assert len(findings.duplicates.groups[0]) == 31
    assert (findings.measure, findings.generated.copies.count) == ("distinct", 2)
    expected = memorized_fraction(torch.cat([copies, generated.pixels[2:]]), train.pixels, duplicates="group")
    assert findings.generated.copies.share == pytest.approx(float(expected))


@pytest.mark.parametrize("duplicates", [True, False])
def test_a_mirrored_copy_of_an_image_with_many_near_duplicates_is_noticed(run, duplicates):
    """More of them than a search has candidates; where they are not looked for, each hides the others."""
    pixels = eight_bits(phantoms(120))
    noise = torch.randint(-6, 7, (21, *pixels.shape[1:]), generator=torch.Generator().manual_seed(0))
    noisy = (pixels[:1].int() + noise).clamp(0, 255).to(torch.uint8)
    train = image_set(torch.cat([pixels[:1], noisy[:19], pixels[1:60]]), location="train")
    generated = image_set(torch.cat([noisy[19:20].flip(-1), pixels[60:90]]), location="generated")
    found = run(generated, train, image_set(pixels[90:], location="held-out"), duplicates=duplicates, moved=False)
    assert bool(found.evidence.noticed[0]) == duplicates
    assert not found.evidence.noticed[1:].any()


def test_images_are_identical_only_if_all_pixels_are(run):
    """Also those that are not looked at first."""
    train = random_set(80)
    copies = train.pixels[:2].clone()
    copies[1, 0, 0, 1] ^= 1
    found = run(planted(train, copies), train)
    assert found.copies["generated"].identical.nonzero().flatten().tolist() == [0]


def test_noise_is_that_of_each_search(run):
    """Although what several searches have found is undone once."""
    train = random_set(80, size=16)
    copies = torch.cat([train.pixels[:3], train.pixels[5:7].flip(-1), 255 - train.pixels[8:9]])
    copies[:, :, 3, 3] = 0
    generated = image_set(torch.cat([copies, random_set(30, size=16, seed=5).pixels]), location="generated")
    found = run(generated, train).copies["generated"]
    expected = torch.full_like(found.search_noise, torch.nan)
    for column, matches in enumerate(found.matches.values()):
        for place in (matches.ratios <= 0.5).nonzero().flatten().tolist():
            original, map_ = train.pixels[matches.indices[place]][None], matches.maps[place][None]
            expected[place, column] = undo(generated.pixels[place][None], original, map_)[1]
    assert found.search_noise[:6].isfinite().any(dim=1).all()
    torch.testing.assert_close(found.search_noise, expected, equal_nan=True)


def test_the_variance_is_that_of_each_channel(run):
    generated, train = random_set(60, seed=3), random_set(80)
    generated.pixels[0] = 7
    found = run(image_set(generated.pixels, location="generated"), train).copies["generated"].variance
    torch.testing.assert_close(found, generated.pixels.double().var(dim=(2, 3), correction=0).mean(dim=1).float())
    assert found[0] == 0


def test_training_images_copied_most_come_first(run):
    train = random_set(80)
    copies = train.pixels[[5, 9, 5, 2, 5, 9]]
    findings = make_findings(run(planted(train, copies), train))
    assert [(item.index, item.count, item.copies) for item in findings.most_copied] == [
        (5, 3, ["0", "2", "4"]),
        (9, 2, ["1", "5"]),
        (2, 1, ["3"]),
    ]
    assert findings.originals == 3
    assert findings.generated.identical == 6


def test_mirrored_copies_are_found_when_asked_for(run):
    train = random_set(80)
    mirrored = planted(train, train.pixels[:4].flip(-1))
    assert make_findings(run(mirrored, train)).generated.copies.count == 0
    findings = make_findings(run(mirrored, train, invariance="flip"))
    assert (findings.generated.copies.count, findings.generated.identical) == (4, 4)


def test_grey_images_are_compared_with_coloured_ones(run):
    train = random_set(80, channels=3)
    grey = random_set(30)
    train.pixels[11] = grey.pixels[4]
    findings = make_findings(run(grey, train))
    assert [(item.index, item.copies) for item in findings.most_copied] == [(11, ["4"])]


def faded(train, count):
    """Copies that are a little darker."""
    return (train.pixels[:count].float() * 0.97).to(torch.uint8)


def test_held_out_images_that_were_trained_on_are_noted(run):
    train = random_set(80)
    held_out = image_set(torch.cat([train.pixels[:2], random_pixels(50, seed=8)]), location="held-out")
    findings = make_findings(run(random_set(30, seed=1), train, held_out))
    assert findings.held_out.identical == 2
    assert any(sentence.startswith("2 of the held-out images equal") for sentence in limits(findings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generated": random_set(5, size=9)}, r"`generated` expected images of 8x8 pixels.*but got 9x9.*--image-size"),
        ({"generated": random_set(80)}, "`train` expected other images than `generated`"),
        ({"held_out": random_set(80)}, "`held_out` expected other images than `train`"),
        ({"held_out": random_set(30, seed=1)}, "`held_out` expected other images than `generated`"),
        ({"train": random_set(19)}, "`train` expected at least k = 20 images, but got 19. Add images, or lower --k"),
    ],
)
def test_sets_that_cannot_be_compared(run, change, message):
    sets = {"generated": random_set(30, seed=1), "train": random_set(80), "held_out": None} | change
    with pytest.raises(ValueError, match=message) as error:
        run(**sets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"k": 1}, {"ratio": 0}, {"ratio": 1.5}])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f"^Argument `{next(iter(settings))}` expected"):
        Settings(**settings)
