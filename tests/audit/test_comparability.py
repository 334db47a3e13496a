import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms.functional import gaussian_blur

from lightning_iet.audit import comparability
from lightning_iet.audit.comparability import (
    CUT_OFF,
    FAR,
    LEVELS_OF_SET,
    OCCUPIED,
    SHARPNESS,
    compare_distances,
    compare_sets,
    explained_by_noise,
    properties,
    unvaried,
    with_refused,
)
from lightning_iet.audit.reading import Origin, image_set, with_channels
from lightning_iet.audit.verdict import difference_sentences
from lightning_iet.data.decoding import decode
from tests.helpers.image_folders import random_pixels, random_set
from tests.helpers.phantoms import eight_bits, phantoms


def sets(generated, *, held_out=True, count=100):
    found = {"train": eight_bits(phantoms(200, channels=3)), "generated": generated}
    if held_out:
        found["held_out"] = eight_bits(phantoms(count, seed=1, channels=3))
    return {name: image_set(pixels, location=name) for name, pixels in found.items()}


FRESH = phantoms(100, seed=2, channels=3)


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: 0.9 * x, lambda x: x**1.2, lambda x: x + 0.02 * torch.randn_like(x)]
)
def test_images_of_the_same_kind_pass(change, held_out):
    assert compare_sets(sets(eight_bits(change(FRESH)), held_out=held_out)) == []


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x / 16, "brightness"),
        (lambda x: x / 16, "contrast"),
        (lambda x: 0.5 + x / 2, "brightness"),
        (lambda x: 0.4 + 0.1 * x, "contrast"),
        (lambda x: (3 * x).round() / 3, "grey levels in the set"),
        (lambda x: x / 4, OCCUPIED),
        (lambda x: 8 * x - 1.2, CUT_OFF),
        (lambda x: torch.where(x < 0.2, 1.0, x), "brightness"),
        (lambda x: gaussian_blur(x, [9, 9], [2.0, 2.0]), "sharpness"),
    ],
)
def test_other_ranges_and_filters_are_noticed(change, name, held_out):
    found = compare_sets(sets(eight_bits(change(FRESH)), held_out=held_out))
    assert name in {difference.name for difference in found}
    assert all(difference.remedy.endswith(".") and "--" in difference.remedy for difference in found)
    assert [d.distance for d in found] == sorted((d.distance for d in found), reverse=True)


@pytest.mark.parametrize(("deep", "words"), [(0, "GIF and palette PNG"), (100, "--range")])
def test_few_grey_levels_have_two_causes(deep, words):
    found = sets(eight_bits((3 * FRESH).round() / 3))
    found["generated"] = replace(found["generated"], origin=Origin(deep=deep))
    remedies = {difference.name: difference.remedy for difference in compare_sets(found)}
    assert words in remedies["grey levels in the set"]
    assert words in remedies["grey levels in an image"]


def test_options_that_are_refused_come_with_what_to_do_instead():
    found = compare_sets(sets(eight_bits(FRESH / 16)))
    brightness = next(difference for difference in found if difference.name == "brightness")
    refused = dict.fromkeys(("--range", "--background"), "Give --train.") | {"--image-size": "Save images."}
    assert with_refused(brightness, refused) == replace(brightness, more=("Give --train.",))
    assert with_refused(brightness, {"--image-size": "Save images."}) == brightness


@pytest.mark.parametrize(
    ("share", "is_noise"),  # of the variance that is noise
    [(1.0, True), (0.6, True), (0.1, False), (0.0, False)],
)
def test_noise_is_told_as_such_and_no_option_is_named(share, is_noise):
    noise = 0.5 + 0.4 * torch.randn(FRESH.shape, generator=torch.Generator().manual_seed(0))
    mixed = (1 - share) ** 0.5 * FRESH + share**0.5 * noise
    found = explained_by_noise(
        [with_refused(d, {"--image-size": "No."}) for d in compare_sets(sets(eight_bits(mixed)))]
    )
    assert [difference.name == "noise" for difference in found[:1]] == ([is_noise] if found else [])
    if is_noise:
        assert len(found) > 1
        assert {difference.remedy for difference in found} == {
            "Train longer, or draw in more steps (--num-inference-steps where they are drawn), then audit again."
        }
        assert not any(difference.more for difference in found)
        assert difference_sentences(found[0])[0].startswith(
            "the generated images look like noise: the model is trained too little, or was sampled in too few steps "
        )


def test_dithered_images_are_not_called_noise():
    """They are as sharp as noise; what they lack are grey levels."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in FRESH.shape[-2:]), indexing="ij")
    threshold = 0.1 + 0.8 * ((rows + columns) % 2)
    found = compare_sets(sets(eight_bits((threshold < FRESH).float())))
    names = [difference.name for difference in found]
    sharpness = next(difference for difference in found if difference.name == SHARPNESS)
    assert sharpness.generated > 2
    assert LEVELS_OF_SET in names
    assert explained_by_noise(found) == found


def test_noise_is_no_difference_from_noise():
    found = {name: random_set(100, seed=seed) for seed, name in enumerate(("train", "generated", "held_out"))}
    assert explained_by_noise(compare_sets(found)) == []


@pytest.mark.parametrize(
    ("kinds", "facts", "remedies"),
    [
        ({"PNG": 100}, {}, ("All files have 8 bits, which no range changes", "All files have 8 bits, which")),
        ({"PNG": 100}, {"transparent": 3}, ("over another colour, say so with --background", "All files have 8 bits")),
        ({"PNG": 100}, {"deep": 3}, ("say so with --range.", "say so with --range.")),
        ({"PNG": 100}, {"deep": 3, "transparent": 3}, ("with --range or --background.", "say so with --range.")),
        ({"DICOM": 100}, {}, ("say so with --range.", "say so with --range.")),
        ({"windowed DICOM": 100}, {}, ("say so with --range.", "say so with --range.")),
        ({}, {}, ("with --range or --background.", "say so with --range.")),  # nobody knows what they were read from
    ],
)
@pytest.mark.parametrize("drawn", [True, False])
def test_a_remedy_is_one_that_can_help(kinds, facts, remedies, drawn):
    """Options of reading change nothing in files of 8 bits without transparency; drawn images come from no files."""
    found = with_origin(sets(eight_bits(FRESH / 16)), "train", kinds=kinds, **facts)
    if not drawn:
        found = with_origin(found, "generated", kinds={"PNG": 100})
    named = {difference.name: difference.remedy for difference in compare_sets(found)}
    assert remedies[0] in named["brightness"]
    assert all(remedies[1] in named[name] for name in ("contrast", OCCUPIED))


def test_only_files_that_can_be_cut_off_have_a_window():
    found = with_origin(sets(eight_bits(8 * FRESH - 1.2)), "train", kinds={"PNG": 200})
    (cut_off,) = (difference for difference in compare_sets(found) if difference.name == CUT_OFF)
    assert cut_off.remedy.startswith("All files have 8 bits")
    (cut_off,) = (d for d in compare_sets(with_origin(found, "train", kinds={"DICOM": 200})) if d.name == CUT_OFF)
    assert "as a DICOM file's window does" in cut_off.remedy


def named_by_set(differences):
    return {which: {d.name for d in differences if d.compared == which} for which in ("generated", "held_out")}


def test_held_out_images_of_another_range_are_no_control():
    """Training images behind a narrow window, all others without: each is as far from them as the other."""
    found = sets(eight_bits(FRESH))
    found["train"] = image_set(eight_bits(8 * phantoms(200, channels=3) - 1.2), location="train")
    differences = compare_sets(found)
    names = named_by_set(differences)
    assert CUT_OFF in names["generated"] & names["held_out"]
    assert f"held-out and training images differ in {CUT_OFF}" in " ".join(map(how_different, differences))
    as_train = compare_sets(found | {"generated": image_set(found["train"].pixels[::2], location="generated")})
    assert named_by_set(as_train) == {"generated": set(), "held_out": names["held_out"]}


def how_different(difference):
    return difference_sentences(difference)[0]


def test_held_out_images_whose_range_was_read_in_another_way_are_no_control():
    found = sets(eight_bits(0.75 * FRESH))
    found["held_out"] = image_set(eight_bits(0.75 * phantoms(100, seed=1, channels=3)), location="held-out")
    assert compare_sets(found) == []
    names = named_by_set(compare_sets(with_origin(found, "train", kinds={"windowed DICOM": 200})))
    assert names == {"generated": {"brightness", "contrast", OCCUPIED}, "held_out": {"contrast", OCCUPIED}}


@pytest.mark.parametrize(("shift", "differ"), [(65, True), (55, False)])
def test_a_large_difference_counts_however_far_held_out_images_are(shift, differ):
    """Brightness as even as the numbers from 0 to 99, held-out images 35 brighter: a distance of 0.35."""
    noise = random_pixels(100, seed=1) // 4
    levels = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1)
    found = {
        name: image_set(noise + levels + by, location=name)
        for name, by in (("train", 0), ("held_out", 35), ("generated", shift))
    }
    names = named_by_set(compare_sets(found))
    assert ("brightness" in names["generated"]) == differ
    assert not names["held_out"]


def half(image):
    """As ``--image-size`` does it."""
    return torch.tensor(decode(image.permute(1, 2, 0).numpy(), size=(12, 12))).permute(2, 0, 1)


@pytest.mark.parametrize("levels", [4, 8, 32])
def test_half_the_size_mends_few_grey_levels(levels):
    """As the remedy says: neighbouring pixels are mixed to shades."""
    found = sets(eight_bits((FRESH * (levels - 1)).round() / (levels - 1)))
    differences = {difference.name: difference.remedy for difference in compare_sets(found)}
    assert "--image-size" in differences["grey levels in an image"]
    halves = {
        name: image_set(torch.stack([half(image) for image in s.pixels]), location=name) for name, s in found.items()
    }
    assert compare_sets(halves) == []


def test_few_images_do_not_differ_by_chance():
    for seed in range(15):
        few = eight_bits(phantoms(8, seed=10 + seed, channels=3))
        assert compare_sets(sets(few)) == []


VALUES = st.lists(st.floats(0, 1, width=32), min_size=2, max_size=80).map(torch.tensor)


@given(VALUES, VALUES)
@settings(max_examples=20)
def test_distances_and_their_p_values_equal_those_of_scipy(one, other):
    expected = ks_2samp(one.numpy(), other.numpy(), method="asymp")
    distance = comparability._distance(one, other)
    assert distance == expected.statistic
    assert comparability._p_value(distance, len(one), len(other)) == expected.pvalue


def test_an_image_and_another_one_do_not_differ_beyond_chance():
    assert comparability._p_value(1.0, 1, 1) == comparability._p_value(0.0, 0, 5) == 1


REDDISH = torch.tensor([1.0, 0.6, 0.4]).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda x: x.flip(1), "red against green"),
        (lambda x: x.roll(1, dims=1), "blue against yellow"),
        (lambda x: x.mean(dim=1, keepdim=True) + 0.2 * (x - x.mean(dim=1, keepdim=True)), "colourfulness"),
    ],
)
def test_other_hues_are_noticed_and_mended_by_leaving_colours_aside(change, name):
    found = {
        kind: image_set(eight_bits(phantoms(100, seed=seed) * REDDISH), location=kind)
        for seed, kind in enumerate(("train", "held_out", "generated"))
    }
    assert compare_sets(found) == []
    found["generated"] = image_set(eight_bits(change(phantoms(100, seed=2) * REDDISH)), location="generated")
    differences = {difference.name: difference for difference in compare_sets(found)}
    assert name in differences
    assert "--grey" in differences[name].remedy
    grey = compare_sets({kind: with_channels(images, 1) for kind, images in found.items()})
    assert not {difference.name for difference in grey} & {"red against green", "blue against yellow", "colourfulness"}


def with_origin(found, name, **origin):
    return found | {name: replace(found[name], origin=Origin(**origin))}


@pytest.mark.parametrize(
    ("origin", "differ"),
    [
        ({"kinds": {"windowed DICOM": 200}}, True),
        ({"kinds": {"DICOM": 200}}, False),
        ({"deep": 200, "range_found": True}, True),
        ({"deep": 200, "range_found": False}, False),  # the range was given
        ({"deep": 60, "range_found": True}, False),  # few of them
    ],
)
def test_less_is_enough_where_the_range_of_one_set_was_found_out(origin, differ):
    """A difference between 0.3 and 0.6, which by itself might be the generator's."""
    found = sets(eight_bits(0.75 * FRESH))
    assert compare_sets(found) == []
    names = {difference.name for difference in compare_sets(with_origin(found, "train", **origin))}
    assert names == ({"brightness", "contrast", OCCUPIED} if differ else set())
    if differ:  # and of both sets, as of two that a scanner made
        both = with_origin(with_origin(found, "train", **origin), "generated", kinds={"windowed DICOM": 100})
        assert compare_sets(both) == []


def test_three_properties_of_range_that_differ_together_need_less():
    """The middle third of the range, as black to white: no property alone differs by 0.6."""
    drawn = torch.cat([phantoms(150, channels=3)[:10], phantoms(30, seed=5, channels=3)])
    found = {
        "train": phantoms(150, channels=3),
        "held_out": phantoms(60, seed=1, channels=3),
        "generated": 3 * drawn - 1,
    }
    found = {name: image_set(eight_bits(pixels), location=name) for name, pixels in found.items()}
    differences = compare_sets(found)
    assert {difference.name for difference in differences} == {"brightness", "contrast", OCCUPIED, CUT_OFF}
    assert all(0.45 <= difference.distance < 0.6 for difference in differences)


def test_images_with_the_same_share_cut_off_are_alike():
    window = lambda x: (8 * x - 1.2).clamp(0, 1)  # noqa: E731
    found = sets(eight_bits(window(FRESH)))
    found |= {
        name: image_set(eight_bits(window(phantoms(100, seed=seed, channels=3))), location=name)
        for seed, name in enumerate(("train", "held_out"))
    }
    assert compare_sets(found) == []


def test_grey_images_beside_colours_are_not_held_against_them():
    grey = FRESH.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    assert "colourfulness" not in {difference.name for difference in compare_sets(sets(eight_bits(grey)))}


@pytest.mark.parametrize(
    ("generated", "train", "differ"), [(100, 0, True), (15, 0, True), (9, 0, False), (30, 40, False), (0, 200, True)]
)
def test_transparency_of_a_part_of_a_set(generated, train, differ):
    """More than a tenth of the images, and more than chance: so many copies would be hidden."""
    found = with_origin(sets(eight_bits(FRESH)), "generated", transparent=generated)
    differences = compare_sets(with_origin(found, "train", transparent=train))
    assert [difference.name for difference in differences] == ["transparency"] * differ


@pytest.mark.parametrize(
    ("transparent", "count", "differ"), [(1, 1, True), (2, 2, True), (1, 2, True), (2, 4, True), (0, 2, False)]
)
@pytest.mark.parametrize("background", [None, "white", "black"])
def test_transparency_of_few_images(transparent, count, differ, background):
    """So few never differ by more than chance, but some of them lie over a background that nobody has named."""
    found = sets(eight_bits(FRESH[:count]))
    found["train"] = image_set(found["train"].pixels[:40], location="train")
    found = with_origin(found, "generated", transparent=transparent, background=background)
    expected = ["transparency"] * (differ and background is None)
    assert [difference.name for difference in compare_sets(found)] == expected


@pytest.mark.parametrize("background", [None, "white", "black"])
def test_transparency_of_training_images_beside_drawn_ones(background):
    """The generated images of `audit-model` are not read; a background is named for the others."""
    found = with_origin(sets(eight_bits(FRESH)), "train", transparent=200, background=background)
    assert [difference.name for difference in compare_sets(found)] == ["transparency"] * (background is None)


def test_transparency_of_one_set_only():
    found = sets(eight_bits(FRESH))
    found["generated"] = replace(found["generated"], origin=Origin(transparent=100))
    (difference,) = compare_sets(found)
    assert (difference.name, difference.generated, difference.train) == ("transparency", 1.0, 0.0)
    assert "--background white or black" in difference.remedy
    dark = replace(found["generated"], pixels=found["generated"].pixels // 4)
    names = [difference.name for difference in compare_sets(found | {"generated": dark})]
    assert names[0] == "transparency"  # the cause of what else differs
    assert "contrast" in names


@pytest.mark.parametrize(
    ("generated", "train", "differ"),
    [
        ({"24x24": 100}, {"24x24": 200}, False),
        ({"24x24": 100}, {"96x64": 200}, False),  # training images were fitted to the generator's shape
        ({"96x64": 100}, {"96x64": 200}, False),  # both were changed alike
        ({"96x64": 100}, {"144x96": 150, "24x24": 50}, False),
        ({"48x24": 100}, {"24x24": 200}, True),
        ({"24x24": 40, "48x24": 60}, {"24x24": 200}, True),
        ({"24x24": 60, "48x24": 40}, {"24x24": 200}, True),
        ({"24x24": 89, "48x24": 11}, {"24x24": 200}, True),
        ({"24x24": 90, "48x24": 10}, {"24x24": 200}, False),
        ({"24x24": 60, "96x64": 40}, {"96x64": 200}, False),  # as the training images were
        ({"64x96": 100}, {"96x64": 200}, True),
    ],
)
def test_no_more_than_a_tenth_of_generated_images_is_brought_to_another_shape(generated, train, differ):
    found = sets(eight_bits(FRESH))
    for name, sizes in (("generated", generated), ("train", train)):
        found[name] = replace(found[name], origin=Origin(sizes=sizes))
    differences = [difference for difference in compare_sets(found) if difference.name == "width over height"]
    assert bool(differences) == differ
    for difference in differences:
        assert "--image-size" in difference.remedy
        share = 1 if len(generated) == 1 else generated["48x24"] / 100
        assert (difference.distance, difference.generated) == (share, 2 / 3 if "64x96" in generated else 2)
        assert (f"{share:.1%} of the generated images" in how_different(difference)) == (share < 1)


@given(st.integers(1, 3).filter(lambda c: c != 2), st.integers(0, 99))
@settings(deadline=None, max_examples=15)
def test_properties_one_by_one(channels, seed):
    pixels = random_pixels(4, channels=channels, seed=seed)
    found = properties(pixels)
    for i, image in enumerate(pixels.double()):
        grey = image.mean(dim=0)
        around = torch.nn.functional.pad(grey[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        edges = [
            abs(around[y, x + 1] + around[y + 2, x + 1] + around[y + 1, x] + around[y + 1, x + 2] - 4 * grey[y, x])
            for y in range(8)
            for x in range(8)
        ]
        assert float(found["brightness"][i]) == pytest.approx(float(grey.mean()), rel=1e-5)
        assert float(found["contrast"][i]) == pytest.approx(float(grey.std(unbiased=False)), rel=1e-4)
        assert float(found["sharpness"][i]) == pytest.approx(
            float(sum(edges) / 64 / grey.std(unbiased=False)), rel=1e-4
        )
        assert int(found["grey levels in an image"][i]) == len(pixels[i, 0].unique())
        values = sorted(grey.flatten().tolist())
        assert float(found[OCCUPIED][i]) == pytest.approx(values[-2] - values[1], rel=1e-5)  # of 64, one at each end
        cut_off = sum(value <= 16 or value >= 239 for value in values) / 64
        assert float(found[CUT_OFF][i]) == pytest.approx(cut_off)
        red, green, blue = ([float(image[c].mean()) for c in range(3)]) if channels == 3 else [float(image.mean())] * 3
        assert float(found["red against green"][i]) == pytest.approx(red - green, rel=1e-4, abs=1e-4)
        assert float(found["blue against yellow"][i]) == pytest.approx(blue - (red + green) / 2, rel=1e-4, abs=1e-4)
        spread = float(image.std(dim=0, unbiased=False).mean())
        assert float(found["colourfulness"][i]) == pytest.approx(spread, rel=1e-4, abs=1e-6)


def test_images_of_one_colour_and_repeated_ones_are_counted():
    images = random_set(10)
    images.pixels[2] = images.pixels[7] = 5
    images.pixels[9] = images.pixels[1]
    assert unvaried(images) == (2, 1)  # those of one colour are not counted again as repeated ones


def test_equal_images_are_counted_without_a_copy_of_all():
    images = image_set(random_pixels(40, size=64)[torch.arange(40) % 30], location="")
    tracemalloc.start()
    assert unvaried(images) == (0, 10)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < images.pixels.numel() / 2


@pytest.mark.parametrize(("times", "far"), [(1.0, False), (0.3, False), (1.4, False), (1.6, True), (5.0, True)])
def test_generated_images_far_from_all_training_images_are_noticed(times, far):
    near = 1 + 0.1 * torch.rand(80, generator=torch.Generator().manual_seed(0))
    found = compare_distances(times * near.flip(0), near)
    assert bool(found) == far
    for difference in found:
        assert difference.name == FAR
        assert difference.generated == pytest.approx(times * difference.train, rel=0.1)


def test_few_distances_or_wide_ones_do_not_differ():
    near = torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert compare_distances(2 * near[:4], near[4:8]) == []  # by chance
    assert compare_distances(1.6 * near[:100] + 0.3, 1.6 * near[100:]) == []  # mostly among the others


@pytest.mark.parametrize("channels", [1, 3])
def test_many_large_images_are_measured_a_few_at_a_time(monkeypatch, channels):
    pixels = random_pixels(7, channels=channels)
    whole = properties(pixels)
    monkeypatch.setattr(comparability, "_VALUES", 3 * pixels[0].numel())
    parts = properties(pixels)
    assert parts.keys() == whole.keys()
    for name, values in whole.items():
        assert torch.equal(parts[name], values)
    assert comparability.count_levels(pixels) == len(set(pixels.flatten().tolist()))
