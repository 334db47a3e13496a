from dataclasses import replace

import pytest
import torch

from lightning_iet.audit import Settings, audit_images, image_set, make_findings
from lightning_iet.audit.cache import BlockCache
from lightning_iet.audit.comparability import Difference
from lightning_iet.audit.features import Features, build_features
from lightning_iet.audit.findings import PlantedFindings
from lightning_iet.audit.pairs import Review, apply_review, pair_rows
from lightning_iet.audit.planted import reencode
from lightning_iet.audit.reading import Origin
from lightning_iet.audit.report.page import counts_apart
from lightning_iet.audit.statistics import Nearer, share
from lightning_iet.audit.verdict import (
    membership_words,
    named_above,
    not_counted,
    not_looked_for,
    planted_words,
    remarks,
    rows,
    verdict,
)
from lightning_iet.data.samples import Skip
from lightning_iet.evaluation.membership import Membership
from tests.helpers.image_folders import random_pixels, random_set
from tests.helpers.phantoms import eight_bits, phantoms


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Audit sets of images; what is searched for again is found in the cache."""
    cache = BlockCache(tmp_path_factory.mktemp("cache"))

    def run(generated, train, held_out=None, **settings):
        settings = Settings(**{"k": 20} | settings)
        sets = {"generated": generated, "train": train, "held_out": held_out}
        return make_findings(audit_images(**sets, features=build_features("pixels"), cache=cache, settings=settings))

    return run


def planted(train, *copies, count=100):
    return image_set(torch.cat([*copies, random_pixels(count, seed=7)]), location="generated")


def faded(train, count, by=0.97):
    return (train.pixels[:count].float() * by).to(torch.uint8)


def rough(train, count, amount=60):
    """Copies that are no sure ones: with much noise."""
    noise = torch.randint(-amount, amount + 1, (count, 1, 8, 8), generator=torch.Generator().manual_seed(4))
    return (train.pixels[:count].int() + noise).clamp(0, 255).to(torch.uint8)


def held_out_set(*copies):
    return image_set(torch.cat([*copies, random_pixels(100, seed=8)]), location="held-out")


@pytest.mark.parametrize(
    ("copied", "control", "level"),
    [
        (20, 0, "copies"),
        (20, None, "copies"),  # so near that they need no control
        (1, 0, "copies"),
        (0, 0, "none"),
        (0, None, "none"),
        (1, 1, "none"),  # held-out images come as near: what is seen is no copy by itself
    ],
)
def test_the_level(judge, copied, control, level):
    train = random_set(80)
    held_out = None if control is None else held_out_set(faded(train, control))
    words = verdict(judge(planted(train, faded(train, copied)), train, held_out))
    assert words.level == level if control != 1 else words.level in ("none", "open", "control")
    if level == "copies":
        is_one = copied == 1
        assert words.answer == (
            f"The generator copies: {copied} of {100 + copied} generated images "
            f"({copied / (100 + copied):.1%}) {'is a copy' if is_one else 'are copies'} of training images."
        )
        assert words.details.startswith(f"{copied} {'is' if is_one else 'are'} ")


@pytest.mark.parametrize(
    ("name", "kind", "files", "words"),
    [
        (
            "generated",
            "generated",
            {".npy": 8, ".jxl": 4},
            "lie 12 files that may hold more, and were not read (8 .npy, 4",
        ),
        ("train", "training", {".npz": 10}, "lie 10 files that may hold more, and were not read (10 .npz)"),
        ("train", "training", {".npz": 8}, ""),  # fewer than a tenth of all
        ("held_out", "held-out", {".npz": 99}, ""),
    ],
)
def test_files_that_may_hold_images_leave_it_open(judge, name, kind, files, words):
    """A thousand arrays beside three pictures are most of what was generated."""
    sets = {"generated": planted(random_set(80)), "train": random_set(80), "held_out": held_out_set()}
    sets[name] = replace(sets[name], beside=files)
    found = judge(**sets)
    if not words:
        assert verdict(found).level == "none"
        return
    assert verdict(found).level == "open"
    assert f"beside the {len(sets[name])} {kind} images {words}" in verdict(found).answer
    assert found.sets[name].beside == files


def test_copies_without_a_control_that_are_not_sure_stay_open(judge):
    train = random_set(80)
    words = verdict(judge(planted(train, rough(train, 20, 50)), train))
    assert words.level == "open"
    assert "Add --held-out" in words.answer
    assert "17 of 120 generated images" in words.answer
    words = verdict(judge(planted(train, rough(train, 20, 50)), train, held_out_set()))
    assert words.level == "copies"


def test_few_rough_copies_are_never_within_chance(judge):
    """Ranks cannot name 4 of 104 beside 100 held-out images: the verdict says how many would decide."""
    train = random_set(80)
    findings = judge(planted(train, rough(train, 4, 50)), train, held_out_set())
    words = verdict(findings)
    assert words.level == "open"
    assert "4 of 104 generated images (3.8%) are far nearer to one training image than real images are" in words.answer
    assert f"About {findings.evidence.held_out_needed:,} held-out images would decide" in words.answer
    assert findings.evidence.held_out_needed == 519


def named_but_not_noticed(findings):
    return sum(row["named"] and not row["noticed"] for row in findings.pairs)


def test_why_more_images_are_named_than_would_be_noticed(judge):
    train = eight_bits(phantoms(100))
    images = reencode(torch.cat([train[:40], eight_bits(phantoms(30, seed=5))]), quality=45)
    control = image_set(eight_bits(phantoms(60, seed=1)), location="held-out")
    findings = judge(image_set(images, location="a"), image_set(train, location="b"), control, moved=False)
    evidence, words = findings.evidence, verdict(findings)
    assert words.level == "copies"
    assert (evidence.sure, evidence.named_by_pixels) == (0, 0)
    assert 0 < evidence.named_by_number == named_but_not_noticed(findings)
    alone = evidence.named.count - evidence.named_by_number
    assert (
        f"Only {alone} of the {evidence.named.count} would be noticed alone; the others are named since so many images "
        "lie so near to a training image, but so few held-out ones." in words.details
    )
    table = {line[0].partition(":")[0]: line[1] for line in rows(findings)[1:]}
    assert table["named as copies, all judged together"].startswith(f"{evidence.named.count} (")
    assert table["noticed, each judged alone"].startswith(f"{evidence.noticed.count} (")


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"named_by_number": 0}, ""),
        ({"named_by_number": 20}, "None of the 20 would be noticed alone; they are named since so many images lie"),
        (
            {"named_by_number": 1, "named_by_pixels": 2},
            "Only 17 of the 20 would be noticed alone; the others are named since so many images lie so near to a "
            "training image, but so few held-out ones (1), or since they equal a training image once the disguise is "
            "undone (2).",
        ),
    ],
)
def test_reasons_for_naming_images(judge, counts, sentence):
    train = random_set(80)
    findings = judge(planted(train, faded(train, 20)), train)
    found = named_above(replace(findings, evidence=replace(findings.evidence, **counts)))
    assert "".join(found).startswith(sentence)
    assert bool(found) == bool(sentence)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((1, 0, 1), "It would not be noticed alone; it is named since it equals a training image once the disguise is"),
        ((1, 1, 0), "It would not be noticed alone; it is named since so many images lie so near to a training image"),
        ((20, 0, 1), "Only 19 of the 20 would be noticed alone; the other is named since it equals a training image"),
        ((20, 0, 20), "None of the 20 would be noticed alone; they are named since they equal a training image once"),
    ],
)
def test_one_image_is_spoken_of_as_one(clean, counts, words):
    named, by_number, by_pixels = counts
    evidence = replace(
        clean.evidence, named=share(named, 100), named_by_number=by_number, named_by_pixels=by_pixels, by_search={}
    )
    findings = replace(clean, evidence=evidence)
    assert named_above(findings)[0].startswith(words)
    judged = "image named as a copy was judged together with all others" if named == 1 else "judged together, by all"
    assert judged in counts_apart(findings)[0]


@pytest.mark.parametrize(("name", "words"), [("generated", "of them."), ("train", "of copies of them.")])
@pytest.mark.parametrize(("unread", "level"), [(1, "none"), (11, "none"), (12, "open"), (100, "open")])
def test_where_much_cannot_be_read_nothing_is_decided(clean, name, words, unread, level):
    facts = replace(clean.sets[name], found=100 + unread, skipped=[Skip(f"{i}.dcm", "cut off") for i in range(unread)])
    found = verdict(replace(clean, sets=clean.sets | {name: facts}))
    assert found.level == level
    if level == "open":
        kind = "training" if name == "train" else name
        assert (
            f"{unread} of {100 + unread} {kind} images could not be read, and nothing is known {words}" in found.answer
        )
    elif name == "generated":
        assert found.answer == f"No copies found among 100 generated images; {unread} more could not be read."
        assert "of this generator's images that can be read are" in found.details
    else:
        words = "image could not be read: copies of it" if unread == 1 else "images could not be read: copies of them"
        assert f"{unread} training {words} are not found." in found.details
        assert "that can be read" not in found.details


@pytest.mark.parametrize(("unread", "level"), [(0.1, "none"), (0.2, "open")])
def test_files_of_many_pages_are_counted_as_files(clean, unread, level):
    """One of five stacks is one of 101 images where each of the others has 25 pages."""
    facts = clean.sets["train"]
    origin = replace(facts.origin, unread=unread)
    facts = replace(facts, origin=origin, found=facts.used + 1, skipped=[Skip("e.tif", "cut off")])
    found = verdict(replace(clean, sets=clean.sets | {"train": facts}))
    assert found.level == level
    if level == "open":
        assert "20.0% of the files of training images could not be read, and nothing is known of copies of them." in (
            found.answer
        )


def test_what_cannot_be_read_is_told_beside_a_control_that_passes(clean):
    facts = replace(clean.sets["generated"], found=101, skipped=[Skip("a.png", "cut off")])
    passing = replace(clean.evidence, passing=3)
    found = verdict(replace(clean, evidence=passing, sets=clean.sets | {"generated": facts}))
    assert found.level == "control"
    assert found.answer.endswith(" 1 more generated image could not be read.")


@pytest.mark.parametrize(("train", "generated", "told"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_windows_of_dicom_files_are_told_of(clean, train, generated, told):
    sets = dict(clean.sets)
    for name, windowed in (("train", train), ("generated", generated)):
        kinds = {"windowed DICOM": 80} if windowed else {"DICOM": 80}
        sets[name] = replace(sets[name], origin=replace(sets[name].origin, kinds=kinds))
    assert ("audit again with --range LOW:HIGH or --range full" in verdict(replace(clean, sets=sets)).details) == told


def test_identical_images_in_the_control_are_told_of(judge):
    train = random_set(80)
    words = verdict(judge(planted(train, train.pixels[:1]), train, held_out_set(train.pixels[70:71])))
    assert words.level == "open"
    assert "1 of 101 generated images equals a training image in every pixel, but so does 1 of the held" in words.answer
    assert "Beware: 1 held-out image equals a training image in every pixel" in words.details


def test_what_was_looked_for_and_the_bound(judge):
    train = random_set(80)
    findings = judge(planted(train), train, held_out_set())
    words = verdict(findings)
    assert words.headline.startswith("No copies found among 100 generated images. Looked for exact, mirrored and")
    assert "recoloured copies (10 of 10 planted found)." in words.headline
    # 1 - 0.025 ** (1 / 100) of images below the score, over the 69 % of planted copies that are found at least
    assert findings.fewer_than == pytest.approx((1 - 0.025 ** (1 / 100)) / 0.025 ** (1 / 10))
    assert "fewer than 5.2% of this generator's images are exact, mirrored or recoloured copies" in words.details
    left_out = (
        "Degraded copies (blurred, noisy, strongly compressed) and moved copies (shifted, turned, zoomed) were not "
        "looked for"
    )
    assert f"{left_out}: images of fewer than 16 pixels" in words.details


def test_small_images_may_be_searched_for_moved_copies_alone(judge):
    """Asked for, moved copies are looked for in small images, and noticed below their own limit; degraded are not."""
    train = random_set(60)
    findings = judge(planted(train, count=20), train, moved=True)
    assert findings.evidence.noticed_below == pytest.approx({"plain": 1 / 3, "recoloured": 1 / 3, "moved": 1 / 3})
    assert [part.kind for part in findings.planted] == ["exact", "mirrored", "recoloured", "moved"]
    assert not findings.not_moved
    reason = "images of fewer than 16 pixels are too small for it"
    assert not_looked_for(findings) == [
        f"Degraded copies (blurred, noisy, strongly compressed) were not looked for: {reason}."
    ]
    assert not_looked_for(findings)[0] in verdict(findings).details


@pytest.fixture(scope="module")
def clean(judge):
    train = random_set(80)
    return judge(planted(train), train, held_out_set())


def test_sets_that_differ_are_not_compared_in_silence(clean):
    difference = Difference("brightness", 3.1, 120.0, 1.0, 0.1, "Say so with --range.")
    words = verdict(replace(clean, differences=[difference]))
    assert words.level == "open"
    assert words.answer == (
        "Not decided: generated and training images differ in brightness (3.1 against 120). Say so with --range."
    )


def test_what_to_do_is_said_once(clean):
    """Three properties of one cause, and two options that the command does not take."""
    more = ("Here images are read as the run read them.",)
    differences = [
        Difference(name, 3.1, 120.0, 1.0, 0.1, remedy, more=more)
        for name, remedy in (("contrast", "Use --range."), ("brightness", "Use --range."), ("sharpness", "Resize."))
    ]
    words = verdict(replace(clean, differences=differences))
    assert words.answer == (
        "Not decided: generated and training images differ in contrast (3.1 against 120). Use --range. Here images are "
        "read as the run read them."
    )
    assert words.details.startswith(
        "Generated and training images differ in brightness (3.1 against 120). Generated and training images differ in "
        "sharpness (3.1 against 120). Resize. "
    )


def test_nothing_is_named_by_a_control_that_is_none(clean):
    """Held-out images that were read in another way lie far away: then innocent images are nearer than they are."""
    difference = Difference("brightness", 3.1, 120.0, 1.0, 0.1, "Use --range.", compared="held_out")
    said = "held-out and training images differ in brightness (3.1 against 120): they are no control. Use --range."
    words = verdict(replace(clean, differences=[difference]))
    assert (words.level, words.answer) == ("open", f"Not decided: {said}")
    evidence = replace(clean.evidence, named=share(5, 100), discovered=5)
    scan = replace(clean.evidence, scan=clean.evidence.scan._replace(p_value=1e-9))
    for found in (evidence, scan):
        assert verdict(replace(clean, evidence=found)).level == "copies"
        words = verdict(replace(clean, evidence=found, differences=[difference]))
        assert (words.level, words.answer) == ("open", f"Not decided: {said}")
    words = verdict(replace(clean, evidence=replace(evidence, sure=2), differences=[difference]))
    assert words.level == "copies"
    assert f"Beware: {said}" in words.details


def test_only_sure_copies_count_where_the_control_is_none(clean):
    """One sure copy does not make copies of what only the doubted comparison names."""
    difference = Difference("brightness", 3.1, 120.0, 1.0, 0.1, "Use --range.", compared="held_out")
    kinds = {"by_search": {"identical": 1, "plain": 59}, "sure_by_search": {"identical": 1}}
    evidence = replace(clean.evidence, named=share(60, 100), discovered=59, sure=1, held_out_alike=4, **kinds)
    trusted = replace(clean, evidence=evidence)
    doubted = replace(trusted, differences=[difference])
    assert verdict(trusted).answer.startswith("The generator copies: 60 of 100 generated images (60.0%) are copies")
    words = verdict(doubted)
    assert words.answer == "The generator copies: 1 of 100 generated images (1.0%) is a copy of training images."
    assert words.details.startswith(
        "1 equals a training image in every pixel. 59 more are not counted: they would be named only by comparison "
        "with held-out images, which is doubted here. Beware: held-out and training images differ in brightness"
    )
    table = {line[0]: line[1:] for line in rows(doubted)}
    assert table["named as copies"] == ["1 (1.0%)", ""]
    assert table["not counted: named only by a comparison that is doubted"] == ["59", "4 as near"]
    assert counts_apart(doubted) == not_counted(doubted)
    for found, allowed, status in ((trusted, 0.5, 3), (doubted, 0.5, 0), (doubted, 0.005, 3), (doubted, True, 3)):
        assert replace(found, settings=found.settings | {"fail_on_copies": allowed}).exit_status == status
    undecided = replace(doubted, evidence=replace(evidence, sure=0, sure_by_search={}))
    assert verdict(undecided).level == "open"
    assert counts_apart(undecided) == []
    assert next(line for line in rows(undecided) if line[0] == "named as copies")[1] == "0 (0.0%)"


@pytest.mark.parametrize("reason", ["differs", "planted", "unread", "one colour", "nearer"])
def test_where_nothing_is_decided_no_bound_is_said(clean, reason):
    assert "With 95 % confidence, fewer than 5.2%" in verdict(clean).details
    train, generated = clean.sets["train"], clean.sets["generated"]
    changes = {
        "differs": {"differences": [Difference("brightness", 3.1, 120.0, 1.0, 0.1, "Say so with --range.")]},
        "planted": {"planted": [PlantedFindings("exact", 3, 10, 0.07), *clean.planted[1:]]},
        "unread": {"sets": clean.sets | {"train": replace(train, found=160, skipped=[Skip("a", "cut off")] * 80)}},
        "one colour": {"sets": clean.sets | {"generated": replace(generated, one_colour=60)}},
        "nearer": {"nearer": [Nearer("memorized quantity at 0.15", 0.7, 0.1, True, 1e-20, True)]},
    }
    words = verdict(replace(clean, **changes[reason]))
    assert words.level == "open"
    assert "confidence" not in words.details
    assert "Not looked for are" in words.details


def test_every_reason_says_what_to_do(clean):
    """Each text ends in a sentence that tells the reader to do something."""
    train, generated = clean.sets["train"], clean.sets["generated"]
    identical = {name: replace(getattr(clean, name), identical=2) for name in ("generated", "held_out")}
    failed = [PlantedFindings("exact", 3, 10, 0.07), *clean.planted[1:]]
    weak = [clean.planted[0], PlantedFindings("mirrored", 3, 10, 0.07)]
    cases = [
        (identical, "Remove such images from --held-out."),
        ({"planted": failed}, "Remove the former from --held-out, or add others."),
        ({"planted": failed, "held_out": None}, "Give each of them once, in its full size, and add --held-out."),
        ({"planted": weak}, "Add images to --held-out, or give all images in their full size."),
        (
            {"sets": clean.sets | {"train": replace(train, found=160, skipped=[Skip("a", "cut off")] * 80)}},
            "The report lists each with what ails it: save them anew, or in another format.",
        ),
        ({"sets": clean.sets | {"generated": replace(generated, repeated=60)}}, "each of them once."),
        ({"sets": clean.sets | {"generated": replace(generated, one_colour=60)}}, "Leave them out, and audit again."),
        (
            {"nearer": [Nearer("memorized quantity at 0.15", 0.7, 0.1, True, 1e-20, True)]},
            "Look at the pairs, and take held-out images from the source of the training images.",
        ),
    ]
    for changes, option in cases:
        words = verdict(replace(clean, **changes))
        assert words.level == "open"
        assert words.answer.endswith(option)


def test_how_files_were_stored_is_said_before_what_was_noticed_all_the_same(clean):
    """An alpha channel hides most of 60 copies: two are noticed, and further held-out images would decide nothing."""
    stored = [
        Difference("transparency", 1.0, 0.0, 1.0, 0.0, "Say with --background what colour."),
        Difference("grey levels in the set", 2, 256, 1.0, 0.0, "Say it with --range."),
    ]
    evidence = replace(clean.evidence, noticed=share(2, 100), beyond=7, held_out_needed=599)
    failed = [PlantedFindings("exact", 0, 10, 0.0), *clean.planted[1:]]
    words = verdict(replace(clean, evidence=evidence, planted=failed, differences=stored))
    assert words.level == "open"
    assert words.answer == (
        "Not decided: generated and training images differ in transparency (100.0% against 0.0% of the images). Say "
        "with --background what colour."
    )
    assert words.details.startswith("Generated and training images differ in grey levels in the set (2 against 256)")
    assert "2 of 100 generated images (2.0%) are far nearer" in words.details
    assert "would decide" not in words.details
    assert "They were brought to the form of the generated images" in words.details


def test_a_control_that_fails_decides_nothing(clean):
    failed = [PlantedFindings("exact", 3, 10, 0.07), *clean.planted[1:]]
    words = verdict(replace(clean, planted=failed))
    assert words.level == "open"
    assert "only 3 of 10 exact copies that were planted were found" in words.answer


@pytest.mark.parametrize(
    ("kind", "found", "level"), [("recoloured", 4, "open"), ("mirrored", 4, "open"), ("mirrored", 5, "none")]
)
def test_copies_that_are_found_of_nearly_all_sets_must_be_found(clean, kind, found, level):
    planted = [PlantedFindings(p.kind, found, 10, 0.1) if p.kind == kind else p for p in clean.planted]
    assert kind in [part.kind for part in planted]
    words = verdict(replace(clean, planted=planted))
    assert words.level == level
    said = f"only {found} of 10 {kind} copies that were planted were found" in words.answer
    assert said == (level == "open")


def test_kinds_that_are_not_found_are_not_claimed(clean):
    weak = [*clean.planted[:2], PlantedFindings("degraded", 4, 10, 0.12)]
    words = verdict(replace(clean, planted=weak))
    assert words.level == "none"
    assert "Nothing is said of degraded copies: 4 of 10 planted were found." in words.details
    assert "are exact or mirrored copies" in words.details


def test_most_images_of_one_colour_or_equal_to_one_another(judge):
    train = random_set(80)
    blank = image_set(torch.cat([torch.zeros(60, 1, 8, 8, dtype=torch.uint8), random_pixels(40, seed=7)]), location="g")
    findings = judge(blank, train, held_out_set())
    words = verdict(findings)
    assert words.level == "open"
    assert findings.fewer_than is None
    assert "60 of 100 generated images show one colour only" in f"{words.answer} {words.details}"
    same = image_set(random_pixels(1, seed=7).expand(100, 1, 8, 8).contiguous(), location="g")
    words = verdict(judge(same, train, held_out_set()))
    assert words.level == "open"
    assert "99 of 100 generated images equal another one of them" in f"{words.answer} {words.details}"
    words = verdict(judge(held_out_set(), train, blank))
    assert words.level == "open"
    assert "60 of 100 held-out images show one colour only" in f"{words.answer} {words.details}"


def test_repeated_images_are_counted_without_those_of_one_colour(judge):
    """What is said of the set, and of those that are judged, is the same count."""
    train = random_set(80)
    parts = [torch.zeros(3, 1, 8, 8, dtype=torch.uint8), random_pixels(1, seed=7).expand(61, -1, -1, -1)]
    same = image_set(torch.cat([*parts, random_pixels(36, seed=9)]), location="g")
    found = judge(same, train, held_out_set())
    seen = replace(found, evidence=replace(found.evidence, named=share(1, 100), discovered=1))
    words = verdict(seen)
    said = f"{words.answer} {words.details}"
    assert words.level == "open"
    assert said.count("equal another one") == said.count("60 of 97 generated images equal another one of them.") == 1
    assert remarks(found.sets["generated"]) == [
        "3 of 100 images show one colour only, which tells nothing of copies.",
        "60 of 97 images equal another one of them.",
    ]


def test_held_out_images_of_one_colour_are_no_control(judge):
    """Somebody who gave them is not asked to give some, and no image counts as compared with them."""
    train = random_set(80)
    blank = image_set(
        torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 8, 8).clone(), location="h"
    )
    findings = judge(planted(train, rough(train, 20, 50)), train, blank)
    words = verdict(findings)
    assert words.level == "open"
    assert (
        "as no held-out image shows more than one colour, nobody can tell how many of them are chance" in words.answer
    )
    assert words.answer.endswith("Give others with --held-out.")
    assert "Add --held-out" not in words.answer
    assert "which nobody copied" not in words.details
    assert not [line for line in rows(findings) if "nearer than any" in line[0]]
    assert {row["beyond_held_out"] for row in findings.pairs} == {""}


def nearly_black(count, seed):
    return random_pixels(count, seed=seed) % 4


def test_nearly_black_images_are_alike_without_being_copies(judge):
    """The last slices of a volume: 35 dB are less than their own noise."""
    train = image_set(torch.cat([random_pixels(80), nearly_black(1, 3)]), location="train")
    images = torch.cat([random_pixels(100, seed=7), nearly_black(3, 4)])
    for control in (held_out_set(), None):
        findings = judge(image_set(images, location="generated"), train, control)
        assert findings.evidence.sure == 0
        assert verdict(findings).level == "open"
        assert findings.evidence.noticed.count >= 3
    identical = image_set(torch.cat([images[:100], train.pixels[80:]]), location="generated")
    assert verdict(judge(identical, train, held_out_set())).level == "copies"


def test_slices_of_one_colour_are_neither_copies_nor_contamination(judge):
    black = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    train = image_set(torch.cat([random_pixels(80), black]), location="train")
    control = held_out_set(black[:2])
    findings = judge(planted(train, train.pixels[:20], black), train, control)
    words = verdict(findings)
    assert words.answer.startswith("The generator copies: 20 of 123 generated images")
    assert "20 equal a training image in every pixel" in words.details
    assert "Beware" not in words.details
    assert (findings.generated.identical, findings.held_out.identical) == (20, 0)
    words = verdict(judge(planted(train, black), train, control))
    assert words.level == "control"
    assert words.answer.startswith("No sure sign of copying: 3 of 103 generated images (2.9%) pass for copies by the")


@pytest.mark.parametrize(("times", "level"), [(30, ("none", "open")), (60, ("open",))])
def test_one_image_that_is_drawn_again_and_again_is_no_copier(judge, times, level):
    """An innocent one which by chance lies nearer than any held-out image: only as many different ones could tell."""
    train = image_set(eight_bits(phantoms(60)), location="train")
    control = image_set(eight_bits(phantoms(60, seed=1)), location="held-out")
    pool = eight_bits(phantoms(200, seed=5))
    options = {"moved": False, "duplicates": False}
    order = [row["index"] for row in judge(image_set(pool, location="pool"), train, control, **options).pairs]
    images = torch.cat([pool[order[:1]].expand(times, -1, -1, -1), pool[order[-40:]]])
    findings = judge(image_set(images, location="generated"), train, control, **options)
    words = verdict(findings)
    assert words.level in level
    assert findings.evidence.judged == 41
    if times == 60:
        assert "59 of 100 generated images equal another one of them. Give images that differ" in words.headline


def test_generated_images_far_from_everything_are_not_called_innocent(judge):
    train = image_set(random_pixels(80) // 8, location="train")
    control = image_set(random_pixels(100, seed=8) // 8, location="held-out")
    far = image_set(random_pixels(100, seed=7) // 8 * 7, location="generated")
    words = verdict(judge(far, train, control))
    assert words.level == "open"
    said = f"{words.answer} {words.details}"
    assert "enerated images lie much farther from training images than held-out images do" in said


def test_other_measures_speak_in_the_headline(clean):
    membership = Membership(100, 100, 0.994, 0.99, 0.998, {"0.01": 0.8}, [])
    words = verdict(replace(clean, membership=membership))
    assert words.level == "none"
    assert words.headline.endswith("Loss: gives its training images away, AUC 0.994.")
    for unsure in (
        replace(membership, auc=0.52, auc_low=0.47),
        replace(membership, train=10_000, held_out=10_000, auc=0.51, auc_low=0.502),  # hardly better than chance
        replace(
            membership, train=3, held_out=3, auc=1.0, auc_low=1.0
        ),  # perfect by luck: DeLong's interval has no width
    ):
        assert "Loss" not in verdict(replace(clean, membership=unsure)).headline
        assert "gives no sure sign of which images were trained on" in membership_words(unsure)
    assert "tells training images from held-out ones" in membership_words(membership)
    given, without = (membership_words(replace(membership, labels_given=given)) for given in (True, False))
    assert given.startswith("The generator's loss, given the images' labels, tells")
    assert without.startswith("The generator's loss without labels tells")
    nearer = Nearer("memorized quantity at 0.15", 0.705, 0.098, True, 1e-20, True)
    words = verdict(replace(clean, nearer=[nearer]))
    assert words.level == "open"
    assert words.answer == (
        "Not decided: the images lie nearer to training images than held-out images do "
        "(memorized quantity at 0.15: 70.5% against 9.8%). Look at the pairs, and take held-out images from the source "
        "of the training images."
    )


def test_smaller_differences_are_in_the_headline_but_leave_the_verdict(clean):
    """A significant difference below 10 percentage points is told; it decides nothing, and is no reason to doubt."""
    small = [
        Nearer("memorized quantity at 0.15", 0.12, 0.08, True, 0.003, False),
        Nearer("median distance to the nearest training image", 4.1234, 4.1299, False, 1e-5, False),
    ]
    words = verdict(replace(clean, nearer=small))
    told = (
        "The images lie nearer to training images than held-out images do (memorized quantity at 0.15: 12.0% against "
        "8.0%; median distance to the nearest training image: 4.123 against 4.13)."
    )
    assert words.level == "none"
    assert words.headline.endswith(told)
    large = Nearer("memorized quantity at 0.3", 0.5, 0.2, True, 1e-9, True)
    words = verdict(replace(clean, nearer=[*small, large]))
    assert words.level == "open"
    assert "4.123 against 4.13; memorized quantity at 0.3: 50.0% against 20.0%). Look at the pairs" in words.answer
    assert not words.also
    differs = Difference("brightness", 3.1, 120.0, 1.0, 0.1, "Say so with --range.")
    words = verdict(replace(clean, nearer=small, differences=[differs]))
    assert words.level == "open"
    assert words.headline.endswith(told)


def test_what_lies_nearer_is_said_once_where_it_is_not_the_first_reason(clean):
    differs = Difference("brightness", 3.1, 120.0, 1.0, 0.1, "Say so with --range.")
    nearer = Nearer("memorized quantity at 0.15", 0.705, 0.098, True, 1e-20, True)
    words = verdict(replace(clean, differences=[differs], nearer=[nearer]))
    assert "differ in brightness" in words.answer
    said = f"{words.headline} {words.details}"
    assert said.count("nearer to training images than held-out images do") == 1


@pytest.mark.parametrize(
    ("own", "control", "level", "words"),
    [
        (
            (1, 1000),
            (0, 200),
            "control",
            "passes for a copy by the published measure, but only 0 of 200 held-out images",
        ),
        ((6, 1000), (1, 200), "control", "but only 1 of 200 held-out images (0.5%) does, which may be chance."),
        ((5, 1000), (5, 1000), "control", "and so do 5 of 1,000 held-out images (0.5%)."),
        ((5, 1000), (1, 100), "control", "and so does 1 of 100 held-out images (1.0%)."),
        (
            (30, 1000),
            (5, 1000),
            "open",
            "30 of 1,000 generated images (3.0%) pass for copies by the published measure, but",
        ),
    ],
)
def test_images_that_pass_for_copies_are_held_against_held_out_ones(clean, own, control, level, words):
    """By the published measure, which may take no part in the evidence: a class's features tell no images apart."""
    found = verdict(passing(clean, own, control))
    assert found.level == level
    assert words in found.answer


def passing(findings, own, control, *, dismissed=0):
    """Let so many of so many images pass for copies by the published measure, beside those that were dismissed."""
    (count, judged), (held_out_count, held_out_judged) = own, control
    evidence = replace(
        findings.evidence,
        named=share(0, judged),
        judged=judged,
        held_out_judged=held_out_judged,
        passing=count,
        held_out_passing=held_out_count,
        dismissed=dismissed,
    )
    held_out = replace(findings.held_out, copies=share(held_out_count, held_out_judged))
    generated = replace(findings.generated, copies=share(count + dismissed, judged))
    return replace(findings, evidence=evidence, generated=generated, held_out=held_out)


@pytest.mark.parametrize(
    ("left", "level", "words"),
    [
        (
            30,
            "open",
            "30 of 1,000 generated images (3.0%) pass for copies by the published measure, but only 5 of 1,000",
        ),
        (5, "control", "5 of 1,000 generated images (0.5%) pass for copies by the published measure, and so do 5 of"),
        (
            0,
            "control",
            "30 of 1,000 generated images (3.0%) pass for copies by the published measure, each of which shows one "
            "colour or was dismissed.",
        ),
    ],
)
def test_images_that_a_person_has_dismissed_do_not_pass(clean, left, level, words):
    words_now = verdict(passing(clean, (left, 1000), (5, 1000), dismissed=30 - left))
    assert words_now.level == level
    assert words in words_now.answer
    assert ("A person has looked at pairs" in words_now.details) == (left < 30)
    assert (f"0 confirmed, and {30 - left} dismissed" in words_now.details) == (left < 30)


def test_images_of_one_colour_do_not_pass_for_copies(judge):
    """Black slices are no evidence, although one stands in the training set."""
    black = torch.zeros(30, 1, 8, 8, dtype=torch.uint8)
    train = image_set(torch.cat([random_pixels(80), black[:1]]), location="train")
    findings = judge(planted(train, black, count=200), train, held_out_set())
    assert findings.generated.copies.count == 30
    assert (findings.evidence.passing, findings.evidence.judged) == (0, 200)
    assert (findings.evidence.held_out_passing, findings.evidence.held_out_judged) == (0, 100)
    words = verdict(findings)
    assert words.level == "control"
    assert words.answer == (
        "No sure sign of copying: 30 of 230 generated images (13.0%) pass for copies by the published measure, each of "
        "which shows one colour or was dismissed."
    )


def blocks(images):
    """Features of a network that tells classes apart: the grey levels of 16 parts."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


@pytest.fixture
def by_classes(tmp_path):
    """Audit by features that tell classes apart, which take no part in the evidence."""

    def run(*generated, train):
        sets = {"generated": planted(train, *generated, count=400), "train": train, "held_out": held_out_set()}
        features = Features("digits", "1", blocks)
        cache = BlockCache(tmp_path / "cache")
        return audit_images(**sets, features=features, cache=cache, settings=Settings(k=20, moved=False))

    return run


def test_equal_images_pass_for_copies_once(by_classes):
    train = random_set(80)
    same_class = mirrored_blocks(train.pixels[:1])
    findings = make_findings(by_classes(same_class.repeat(30, 1, 1, 1), train=train))
    assert findings.generated.copies.count == 30
    assert (findings.evidence.passing, findings.evidence.judged) == (1, 401)
    words = verdict(findings)
    assert words.level == "control"
    assert words.answer == (
        "No sure sign of copying: 1 of 401 different generated images (0.2%) passes for a copy by the published "
        "measure, but only 0 of 100 held-out images (0.0%) do, which may be chance."
    )


def test_equal_images_pass_for_copies_until_all_of_them_are_dismissed(by_classes):
    """Decisions are of files, and equal pixels may lie in files that differ."""
    train = random_set(80)
    audit = by_classes(mirrored_blocks(train.pixels[:1]).repeat(30, 1, 1, 1), train=train)
    hashes = [f"{number:064x}" for number in range(len(audit.sets["generated"]))]
    audit = replace(audit, sets=dict(audit.sets) | {"generated": replace(audit.sets["generated"], hashes=hashes)})
    rows = pair_rows(audit)
    for count in (1, 29, 30):
        decided = frozenset((row["sha256"], row["source_sha256"]) for row in rows if row["index"] < count)
        findings = make_findings(apply_review(audit, Review(dismissed=decided)))
        assert (findings.evidence.dismissed, findings.evidence.passing) == (count, int(count < 30))
        assert ("or was dismissed" in verdict(findings).answer) == (count == 30)


def mirrored_blocks(pixels):
    """Other images with the same :func:`blocks`."""
    parts = pixels.unflatten(2, (4, 2)).unflatten(4, (4, 2))
    return parts.flip(3, 5).flatten(4, 5).flatten(2, 3)


def test_only_dismissed_images_that_pass_leave_the_share_of_those(by_classes):
    train = random_set(80)
    audit = by_classes(mirrored_blocks(train.pixels[:40]), train=train)
    rows = pair_rows(audit)

    def dismiss(images):
        decided = frozenset((row["sha256"], row["source_sha256"]) for row in rows if row["index"] in images)
        return make_findings(apply_review(audit, Review(dismissed=decided)))

    assert make_findings(audit).evidence.passing == 40
    others = dismiss(range(40, 80))
    assert (others.evidence.dismissed, others.evidence.passing) == (40, 40)
    assert verdict(others).level == "open"
    assert "40 of 440 generated images (9.1%) pass for copies" in verdict(others).answer
    words = verdict(dismiss(range(40)))
    assert words.level == "control"
    assert words.answer.endswith("by the published measure, each of which shows one colour or was dismissed.")
    own = dismiss(range(38))
    assert (own.evidence.dismissed, own.evidence.passing) == (38, 2)
    assert verdict(own).answer.startswith("No sure sign of copying: 2 of 440 generated images (0.5%) pass for copies")


@pytest.mark.parametrize("count", [1, 7])
def test_images_nearer_than_any_held_out_image_are_counted_as_the_rows_mark_them(judge, count):
    train = random_set(80)
    findings = judge(planted(train, rough(train, count, 50)), train, held_out_set())
    marked = sum(row["beyond_held_out"] for row in findings.pairs)
    assert marked == findings.evidence.beyond >= count
    words = verdict(findings)
    are = "image is" if marked == 1 else "images are"
    assert (
        f"{marked} generated {are} nearer to a training image than any of 100 held-out images"
        in words.details + words.answer
    )
    line = next(line for line in rows(findings) if line[0] == "nearer than any held-out image")
    assert line[1:] == [str(marked), f"up to {(100 + count) / 101:.1f} by chance"]
    alone = judge(planted(train, rough(train, count, 50)), train)
    assert {row["beyond_held_out"] for row in alone.pairs} == {""}
    assert "nearer than any held-out image" not in [line[0] for line in rows(alone)]
    assert "marked in the list of pairs" not in verdict(alone).headline + verdict(alone).details


def test_images_nearer_than_any_held_out_image_are_counted_once_beside_chance(judge):
    """Chance is that of the images that are judged, equal ones once."""
    train = random_set(80)
    copied = rough(train, 2, 50)
    findings = judge(planted(train, copied, copied[:1], copied[:1]), train, held_out_set())
    beyond = {findings.pairs[place]["index"] for place in range(104) if findings.pairs[place]["beyond_held_out"]}
    assert {0, 2, 3} <= beyond
    line = next(line for line in rows(findings) if line[0].startswith("nearer than any held-out image"))
    assert line == [
        "nearer than any held-out image, equal ones counted once",
        str(len(beyond - {2, 3})),
        f"up to {102 / 101:.1f} by chance",
    ]
    assert f"{len(beyond)} generated images are nearer" in verdict(findings).details + verdict(findings).answer


def test_what_was_looked_for_in_words():
    def words(*counts):
        return planted_words([PlantedFindings(kind, found, 20, 0.5) for kind, found in counts])

    assert words() == ""
    assert words(("exact", 20)) == "Looked for exact copies (20 of 20 planted found)."
    assert words(("exact", 20), ("mirrored", 19), ("recoloured", 19), ("moved", 17)) == (
        "Looked for exact (20 of 20 planted found), mirrored, recoloured (19 of 20) and moved copies (17 of 20)."
    )


def test_remarks_on_how_a_set_was_read(clean):
    facts = clean.sets["train"]
    assert remarks(facts) == []
    origin = Origin(pages=1140, deep=60, value_range=(0, 4095), values=(3, 4080))
    skipped = [Skip("a.png", "the file is empty"), Skip("b.png", "cut off")]
    lines = " ".join(remarks(replace(facts, origin=origin, skipped=skipped, one_colour=2, found=82)))
    for part in ("1,140 images are pages", "from 3 to 4080", "white at 4095", "--range", "2 of 80 images show one"):
        assert part in lines
    assert "2 of 82 could not be read: 'a.png' (the file is empty), 'b.png' (cut off)." in lines
    both = replace(origin, value_range=(0, 65535), mixed=True)
    assert "white at 65535 (1 in floating point); --range" in " ".join(remarks(replace(facts, origin=both)))


@pytest.mark.parametrize(
    ("allowed", "copied", "status"),
    [(False, 20, 0), (True, 20, 3), (0.5, 20, 0), (0.1, 20, 3), (True, 0, 0), (0.0, 1, 3)],
)
def test_the_exit_status(judge, allowed, copied, status):
    train = random_set(80)
    findings = judge(planted(train, train.pixels[:copied]), train, held_out_set())
    findings.settings["fail_on_copies"] = allowed
    assert findings.exit_status == status


def test_the_exit_status_of_what_is_not_decided(judge):
    train = random_set(80)
    findings = judge(planted(train, rough(train, 4, 50)), train, held_out_set())
    assert findings.exit_status == 0
    findings.settings["fail_on_copies"] = True
    assert findings.exit_status == 4


@pytest.mark.parametrize(
    ("fit", "sizes", "words"),
    [
        (
            "stretch",
            {"12x8": 80},
            "were stretched, as --fit says: if the generator saw them cropped, audit again with --fit crop",
        ),
        ("crop", {"12x8": 80}, "were cropped, as --fit says: if the generator saw them stretched"),
        ("crop", {"16x16": 80}, ""),
        (None, {"8x8": 80}, ""),
    ],
)
def test_a_shape_that_was_changed_is_said(clean, fit, sizes, words):
    train = replace(clean.sets["train"], origin=Origin(sizes=sizes))
    found = replace(clean, sets=clean.sets | {"train": train}, settings=clean.settings | {"fit": fit})
    details = verdict(found).details
    assert words in details
    assert ("--fit" in details) == bool(words)
