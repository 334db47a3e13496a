"""What an evaluation says in a sentence: a case of each kind."""

from math import comb

import pytest
from scipy.stats import mannwhitneyu

from lightning_iet.evaluation.verdict import Counts, copies_exceed, fid_note, telling_thresholds, verdict


def report(copies=0, near=14, usual=200, *, held_out=(0, 14, 200), num=400, num_control=400, num_train=400, **further):
    def part(number, counts):
        mq = dict(zip(("0.15", "0.3"), (count / number for count in counts[1:]), strict=True))
        return {"num_images": number, "memorized_fraction": 0.0, "copied_fraction": counts[0] / number, "mq": mq}

    generated = part(num, (copies, near, usual)) | {"further": further}
    return {"generated": generated, "control": part(num_control, held_out), "data": {"num_train": num_train}}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (report(60, 107, 168), "The model copies training images: 60 of 400 images (of held-out images 0) pass"),
        (report(60, 0, 0), "The model copies training images"),  # copies count first, whatever the rest is like
        (report(2, 107, 168), "Hardly any exact copies (2 of 400), but 107 of 400 images (of held-out images 14)"),
        (report(0, 0, 12), "The model draws nothing like the data: 12 of 400 images (of held-out images 200) lie"),
        (report(0, 0, 0), "The model draws nothing like the data"),  # noise
        (report(0, 9, 150), "Hardly any exact copies (0 of 400), but the images are less like the training images"),
        (report(1, 16, 210), "No sign of memorization: 1 of 400 images (of held-out images 0) pass for copies."),
        (report(0, 1, 20, num=40, num_control=40, held_out=(0, 1, 20)), "but 40 images are too few to rule it out"),
        (report(20, 14, 200, held_out=(18, 14, 200)), "No sign of memorization: 20 of 400"),
        (report(0, 14, 200, num_control=200, held_out=(1, 7, 100)), "(of held-out images 1 of 200)"),
        # more than hardly any copies
        (report(9, 107, 200, held_out=(8, 14, 200)),
         "9 of 400 images pass for copies, about as many as of held-out images (8), and 107 of 400 images (of"),
        (report(9, 107, 200, held_out=(3, 14, 200)),
         "9 of 400 images (of held-out images 3) pass for copies, which may be chance, and 107 of 400 images"),
        (report(18, 9, 150, held_out=(18, 14, 200)), "18 of 400 images pass for copies, about as many as of held-out"),
        # controls that are too few to tell copies from chance
        (report(8, 4, 4, num=8, num_control=2, held_out=(0, 0, 1)),
         "8 of 8 images (of held-out images 0 of 2) pass for copies: the images are too few to tell this from chance."),
        (report(12, 4, 8, num=16, num_control=4, held_out=(0, 0, 2)), "12 of 16 images (of held-out images 0 of 4)"),
        (report(6, 14, 200), "6 of 400 images (of held-out images 0) pass for copies: the images are too few to tell"),
        (report(0, 0, 0, num=8, num_control=2, held_out=(0, 0, 1)), "Too few images for a verdict: 0 of 8"),
        # near-duplicates across the split
        (report(80, 80, 90, held_out=(320, 330, 340)),
         "No verdict is possible: 330 of 400 held-out images are near-duplicates of training images."),
        (report(80, 80, 90, held_out=(50, 14, 200)), "The model copies training images"),  # more than of these
    ],
)  # fmt: skip
def test_cases(found, says):
    assert says in verdict(found)
    longer = verdict(found).count("nothing like") + verdict(found).count("No verdict")
    assert verdict(found).count(".") == 1 + longer


@pytest.mark.parametrize("num_control", [4, 40, 400])
def test_no_sign_only_where_copies_hardly_exceed_those_of_the_control(num_control):
    for copies in range(num_control // 10):
        for found in range(0, 100, 3):
            says = verdict(report(found, 0, 200, num_control=num_control, held_out=(copies, 0, num_control // 2)))
            if found / 400 > 1.25 * copies / num_control + 1 / 400:
                assert "No sign" not in says
                assert ("The model copies" in says) or ("tell this from chance" in says)


@pytest.mark.parametrize("members", [2, 3, 6, 12, 60])
@pytest.mark.parametrize("others", [2, 3, 6, 60])
def test_a_handful_of_images_tells_nothing_of_membership(members, others):
    attack = {"membership_inference_auc": 1.0, "membership_inference_auc_low": 1.0}  # DeLong's interval has no width
    held_out = (0, 0, others // 2)
    found = report(0, 0, 30, num=60, num_control=others, num_train=members, held_out=held_out, **attack)
    exact = mannwhitneyu(range(members), range(members, members + others), alternative="less", method="exact").pvalue
    assert ("memorization is likely" in verdict(found)) == (exact < 0.01)


def test_the_loss_is_spoken_of_where_it_tells_members_from_others():
    attack = {"membership_inference_auc": 0.73, "membership_inference_auc_low": 0.7}
    assert verdict(report(**attack)).endswith(
        "training images from others (AUC 0.73; 0.5 is chance): memorization is likely."
    )
    assert verdict(report(60, **attack)).endswith(
        "; the loss tells training images from others (AUC 0.73; 0.5 is chance)."
    )
    chance = {"membership_inference_auc": 0.73, "membership_inference_auc_low": 0.49}
    assert verdict(report(**chance)).startswith("No sign of memorization")
    assert verdict(report(0, 0, 0, **attack)).startswith("The model draws nothing like the data")


@pytest.mark.parametrize("total", [10, 100, 400, 512, 1000])
def test_one_image_more_than_held_out_ones_is_allowed_whatever_the_rounding(total):
    for control in range(total):
        assert not copies_exceed((control + 1) / total, control / total, total)
        assert copies_exceed((control + 2) / total, control / total, total) or control + 2 > total


def test_copies_among_reports_of_versions_that_did_not_count_them():
    old = report(60, 14, 200)
    for part in ("generated", "control"):
        del old[part]["copied_fraction"]
    assert verdict(old).startswith("No sign of memorization: 0 of 400")


def test_chance_is_that_of_the_hypergeometric_distribution():
    def p_value(a, n, b, m):  # of a or more of a + b marked images among the n
        return sum(comb(n, k) * comb(m, a + b - k) for k in range(a, min(n, a + b) + 1)) / comb(n + m, a + b)

    for a in range(15):
        counts = Counts(a, 40, 2, 60)
        assert counts.is_higher == (p_value(a, 40, 2, 60) < 0.01)
        assert Counts(2, 60, a, 40).is_lower == counts.is_higher


def test_thresholds_that_tell_nothing_are_left_out():
    levels = ("0.15", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
    saturated = dict(zip(levels, (0.9, 0.95, 1, 1, 1, 1, 1, 1, 1), strict=True))
    control = dict(zip(levels, (0, 0.02, 0.3, 0.6, 0.9, 0.98, 1, 1, 1), strict=True))
    assert telling_thresholds(saturated, control) == ["0.15", "0.2", "0.3"]
    assert telling_thresholds(dict.fromkeys(levels, 0.0), dict.fromkeys(levels, 0.0)) == []
    assert telling_thresholds(dict.fromkeys(levels, 1.0), dict.fromkeys(levels, 1.0)) == []


@pytest.mark.parametrize(("num", "reference", "dimensions", "few"), [
    (512, 1221, 64, False), (64, 1221, 64, True), (512, 40, 64, True), (512, 1221, 1280, True), (2, 2, None, False),
])  # fmt: skip
def test_fid_of_fewer_images_than_features(num, reference, dimensions, few):
    found = {"settings": {"feature_dimensions": dimensions}, "generated": {"num_images": num}}
    assert bool(fid_note(found | {"data": {"num_reference": reference}})) == few
