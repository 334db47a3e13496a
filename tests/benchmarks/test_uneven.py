"""Uneven training sets in the benchmark: sets, copies by what images show, and stopping in time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.mitigation.data import Sets, kept_occurrences
from benchmarks.mitigation.points import row_named
from benchmarks.mitigation.scoring import NEIGHBORS, Judge, copies_by_source, quarters
from benchmarks.mitigation.settings import PRESETS, TYPICAL_DIGITS, UNEVEN_DIGITS
from benchmarks.mitigation.summary import TOLERANCE, stopped_in_time, summarize
from benchmarks.mitigation.tables import tables_of
from lightning_iet.data import DrawnByWeight
from lightning_iet.data.duplicates import FirstOfGroups
from lightning_iet.functional.duplicates import duplicate_groups
from lightning_iet.metrics import feature_extractor

SMALL = replace(UNEVEN_DIGITS, num_train=30, num_repeated=3, repeats=4)
KINDS = (
    "copies_repeated", "copies_repeated_half", "copies_once", "copies_once_half", "nearest_repeated",
    "membership_auc_repeated", "membership_auc_once",
)  # fmt: skip


def test_repeated_images_occur_as_often_as_asked_and_only_rows_that_deduplicate_leave_some_out():
    plain = Sets(SMALL, row_named("plain"), seed=0)
    assert len(plain.train_set) == 30 + 3 * 4
    assert plain.source.bincount().tolist() == [4] * 3 + [1] * 30
    unique = Sets(SMALL, row_named("deduplicated"), seed=0)
    assert torch.equal(unique.train_set.images, plain.train_set.images[:33])
    assert torch.equal(unique.every_image.images, plain.every_image.images)
    half = Sets(SMALL, row_named("half_deduplicated"), seed=0)
    assert len(half.train_set) == 33 + 3 * 2  # of 3 near-duplicates each, 1 is removed


def test_what_drop_finds_is_removed_and_copies_are_still_judged_by_all_images():
    plain, found = Sets(UNEVEN_DIGITS, row_named("plain"), seed=1), Sets(UNEVEN_DIGITS, row_named("found"), seed=1)
    groups = duplicate_groups(plain.train_set.images).members
    left_out = {index for group in groups for index in group[1:]}
    kept = [index for index in range(len(plain.train_set)) if index not in left_out]
    assert torch.equal(found.train_set.images, plain.train_set.images[kept])
    assert torch.equal(found.train_set.targets, plain.train_set.targets[kept])
    assert torch.equal(found.every_image.images, plain.every_image.images)
    both = Sets(UNEVEN_DIGITS, row_named("found_record_draws_unseen"), seed=1)
    assert torch.equal(both.train_set.images, found.train_set.images)
    assert isinstance(both.drawn, DrawnByWeight)


@pytest.mark.parametrize(
    ("setting", "repeated", "once"),
    [
        ("uneven_digits", (10, 10, 10), (394, 400, 395)),
        ("uneven_digits_exact", (10, 10, 10), (394, 400, 395)),
        ("uneven_digits_10x5", (10, 10, 10), (394, 399, 395)),
        ("uneven_digits_40x20", (40, 40, 40), (397, 400, 400)),
        ("uneven_digits_moved", (64, 81, 69), (396, 399, 397)),
    ],
)
def test_how_many_images_drop_leaves_as_the_page_says(setting, repeated, once):
    [chosen] = [found for found in PRESETS["uneven"].settings if found.name == setting]
    for seed in range(3):
        sets = Sets(chosen, row_named("plain"), seed=seed)
        shown = sets.source[FirstOfGroups(sets.train_set, duplicate_groups(sets.train_set.images).group).places]
        is_repeated = shown < chosen.num_repeated
        assert (int(is_repeated.sum()), int((~is_repeated).sum())) == (repeated[seed], once[seed])


@pytest.mark.parametrize("name", ["randaugment", "iet_agc_taa"])
def test_augmented_sets_know_their_images_as_they_are(name):
    plain, augmented = (Sets(SMALL, row_named(row), seed=0).train_set for row in ("plain", name))
    assert torch.equal(augmented.images, plain.images)
    assert torch.equal(augmented.targets, plain.targets)
    draws = [augmented[index][0] for _ in range(20) for index in range(len(plain))]
    changed = sum(not torch.equal(image, plain[i % len(plain)][0]) for i, image in enumerate(draws)) / len(draws)
    assert changed == 0 if name == "iet_agc_taa" else 0.03 < changed <= 0.2  # of 12 % some operations change nothing


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.floats(0, 1))
def test_what_is_kept_holds_every_image_and_its_first_occurrence(source, share):
    kept = kept_occurrences(torch.tensor(source), share=share).tolist()
    firsts = {source.index(image) for image in source}
    assert firsts <= set(kept)
    for image in set(source):
        others = source.count(image) - 1
        assert sum(source[i] == image for i in kept) == 1 + others - int(share * others)


@given(st.integers(0, 10_000))
def test_copies_agree_with_a_loop_over_all_distances(seed):
    generator = torch.Generator().manual_seed(seed)
    source = torch.tensor([0, 1, 2, 3, 0, 0, 1])
    distances = torch.rand(5, 7, generator=generator) ** 4 + 1e-6
    order = distances.argsort(dim=1)
    found = copies_by_source(distances.gather(1, order), order, source, num_repeated=2)
    expected = dict.fromkeys(found, 0.0)
    for row in distances.tolist():
        nearest = min(range(7), key=row.__getitem__)
        second = min(d for d, s in zip(row, source.tolist(), strict=True) if s != source[nearest])
        ratio = (row[nearest] / second) ** 0.5
        kind = "repeated" if source[nearest] < 2 else "once"
        expected["nearest_repeated"] += (kind == "repeated") / 5
        expected[f"copies_{kind}"] += (ratio < 1 / 3) / 5
        expected[f"copies_{kind}_half"] += (ratio < 1 / 2) / 5
        expected["memorized_fraction"] += (ratio < 1 / 3) / 5
    assert found == pytest.approx(expected)


def test_too_few_neighbours_to_see_another_image_are_refused():
    with pytest.raises(ValueError, match="Argument `nearest` expected an image of another source"):
        copies_by_source(torch.ones(1, 2), torch.tensor([[0, 1]]), torch.tensor([0, 0]), num_repeated=1)


def point(row, seed, length, fid, copies, *, selection):
    return {
        "setting": "uneven", "row": row, "seed": seed, "length": length, "mark": int(100 * length),
        "steps": int(100 * length), "fid": fid, "seconds": length, "skip_rate": 0.25, "unseen_loss": 1.0,
        "fid_selection": selection, "fid_train": 3.0, "memorized_fraction": copies, "membership_auc": 0.5,
        **dict.fromkeys(KINDS, copies), **{f"{name}_control": 0.0 for name in ("fid", *KINDS)},
    }  # fmt: skip


def test_a_row_is_stopped_at_its_best_mark_that_does_not_copy():
    points = [
        point("plain", 0, 1, 9.0, 0.0, selection=9.0),
        point("plain", 0, 2, 7.0, TOLERANCE, selection=7.5),
        point("plain", 0, 3, 5.0, 0.1, selection=5.0),  # better, but it copies
        point("plain", 1, 1, 8.0, 0.2, selection=8.0),  # copies from the start
        point("plain", 1, 2, 6.0, 0.3, selection=6.0),
    ]
    (line,) = stopped_in_time(points)
    assert line["fid"] == pytest.approx((7.0 + 8.0) / 2)
    assert line["never"] == 1
    assert line["length"] == 1.5


def test_the_table_of_an_uneven_setting_shows_both_ends_and_the_control():
    points = [point("plain", 0, 1, 9.0, 0.0, selection=9.0), point("plain", 0, 2, 7.0, 0.25, selection=7.0)]
    table = tables_of(summarize(points), [], stopped_in_time(points))["uneven"].splitlines()
    assert table[2] == ("| plain | 7.0 (7.0–7.0) | 25.0 % (25.0) | 25.0 % | 25 % | 0.25 / 0.25 | 9.0 (9.0–9.0) |")
    assert table[-1].startswith("| *held-out images* | *0.0* | *0.0 % (0.0)* |")


@pytest.fixture(scope="module")
def judge():
    """Of a set of 40 images that is judged by quarters."""
    setting = replace(TYPICAL_DIGITS, num_train=40, num_control=60, num_selection=40, num_reference=80)
    return Judge(setting, row_named("plain"), 0, feature_extractor("digits"))


def test_quarters_go_from_the_images_farthest_from_others_to_the_nearest(judge):
    train = judge.sets.every_image.images
    reference = judge.features(judge.sets.reference_set.images)
    expected = []
    for image in train:
        distances = sorted((judge.features(image[None]) - other).norm().item() for other in reference)
        expected.append(sum(distances[:NEIGHBORS]) / NEIGHBORS)
    found = judge._distance_to_others(train)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    quarter = quarters(found, found)
    assert quarter.bincount().tolist() == [0, 10, 10, 10, 10]
    order = found.argsort(descending=True)
    assert quarter[order].tolist() == sorted(quarter.tolist())


def test_planted_copies_are_counted_in_the_quarter_of_what_they_copy(judge):
    train = judge.sets.every_image.images
    distance = judge._distance_to_others(train)
    quarter = quarters(distance, distance)
    least, most = (train[quarter == q] for q in (1, 4))
    drawn = torch.cat([least[:6], most[:3], judge.sets.control_set.images[:31]])
    found, control = judge.of_images(drawn), judge.of_images(judge.sets.control_set.images[:31])
    for name in ("copies_quarter_{}", "copies_quarter_{}_half", "nearest_quarter_{}"):
        for q, planted in ((1, 6), (2, 0), (3, 0), (4, 3)):
            expected = (planted + 31 * control[name.format(q)]) / 40
            assert found[name.format(q)] == pytest.approx(expected)
    assert sum(found[f"copies_quarter_{q}"] for q in (1, 2, 3, 4)) == pytest.approx(found["memorized_fraction"])


def test_the_attack_by_quarters_sets_members_against_others_as_typical(judge, monkeypatch):
    """A loss that is larger the less typical an image is tells nothing, once equally typical ones are compared."""
    monkeypatch.setattr(Judge, "_losses", lambda self, module, images: self._distance_to_others(images.images))
    found = judge.of_losses(None)
    train, control = (judge._distance_to_others(s.images) for s in (judge.sets.every_image, judge.sets.control_set))
    for q in (1, 2, 3, 4):
        mine, others = train[quarters(train, train) == q], control[quarters(control, train) == q]
        wins = [(m < o).double() + (m == o).double() / 2 for m in mine for o in others]
        assert found[f"membership_auc_quarter_{q}"] == pytest.approx(float(torch.stack(wins).mean()))


def test_the_table_by_quarters_shows_each_and_the_control():
    names = [f"{name}_quarter_{q}" for name in ("copies", "nearest", "membership_auc") for q in (1, 2, 3, 4)]
    names += [f"copies_quarter_{q}_half" for q in (1, 2, 3, 4)]
    figures = {name: 0.01 * place for place, name in enumerate(names)} | {"mq_0.15": 0.5, "mq_0.3": 0.75}
    base = {key: value for key, value in point("plain", 0, 1, 9.0, 0.0, selection=9.0).items() if key[:6] != "copies"}
    points = [base | {"copied_images": 0.0} | figures | {f"{n}_control": 0.125 for n in (*figures, "copied_images")}]
    points[0]["memorized_fraction_control"] = 0.0
    table = tables_of(summarize(points), [])["uneven quarters"].splitlines()
    cells = ("plain, 1 ×", "9.0 (9.0–9.0)", "50.0 %", "12.0 / 13.0 / 14.0 / 15.0 %", "4 / 5 / 6 / 7 %",
             "0.08 / 0.09 / 0.10 / 0.11")  # fmt: skip
    assert table[2] == f"| {' | '.join(cells)} |"
    assert table[3].startswith("| *held-out images* | *0.0* | *12.5 %* | *12.5 / 12.5 / 12.5 / 12.5 %* |")
