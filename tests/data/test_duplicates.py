"""Repeated images: how many there are, what they show, and how far they are changed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_iet.data import DigitsDataModule, ImageDataModule, IndexedImages, ShardedDataModule
from lightning_iet.data.duplicates import FirstOfGroups, OncePerGroup, Repeated, images_of, repeat_images
from lightning_iet.data.images import SyntheticImages
from lightning_iet.data.samples import Samples
from lightning_iet.functional.duplicates import duplicate_groups
from tests.helpers.models import tiny_diffusion


@given(
    number=st.integers(1, 6),
    repeats=st.integers(1, 5),
    change=st.sampled_from(["exact", "recolored", "moved"]),
    data=st.data(),
)
def test_every_image_occurs_as_often_as_asked_and_first_as_it_is(number, repeats, change, data):
    repeated = data.draw(st.integers(0, number))
    images = torch.rand(number, 2, 8, 8)
    found, source = repeat_images(images, repeated=repeated, repeats=repeats, change=change)
    occurrences = [int((source == i).sum()) for i in range(number)]
    assert occurrences == [repeats] * repeated + [1] * (number - repeated)
    assert torch.equal(found[:number], images)
    assert found.min() >= 0
    assert found.max() <= 1


def test_exact_repeats_are_equal_and_changed_ones_are_not_but_stay_near():
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    distance = float((images[0] - images[1]).norm())
    for change, least, most in (("exact", 0, 0), ("recolored", 0.01, 0.5), ("moved", 0.01, 1)):
        found, source = repeat_images(images, repeated=2, repeats=10, change=change)
        others = found[2:] - images[source[2:]]
        norms = others.flatten(1).norm(dim=1) / distance
        assert norms.max() <= most + 1e-6, change
        assert norms.min() >= least, change


def test_a_moved_image_shows_the_same_thing_elsewhere():
    image = torch.zeros(1, 1, 32, 32)
    image[..., 12:20, 12:20] = 1
    found, _ = repeat_images(image, repeated=1, repeats=30, change="moved")
    rows = torch.arange(32.0)
    centres = torch.stack([(x[0].sum(1) * rows).sum() / x.sum() for x in found])
    assert centres.std() > 0.5
    assert (centres - centres[0]).abs().max() <= 32 / 16 * 1.2  # a sixteenth of the side, scaled by up to 8/7


def test_the_seed_decides_the_changes():
    images = torch.rand(2, 1, 8, 8)
    first, again, other = (repeat_images(images, repeated=1, repeats=3, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeated": 4, "repeats": 2}, "Argument `repeated` expected an integer from 0 to 3, but got 4"),
        ({"repeated": 1, "repeats": 0}, "Argument `repeats` expected an integer ≥ 1, but got 0"),
        ({"repeated": 1, "repeats": 2, "change": "turned"}, "Argument `change` expected one of"),
    ],
)
def test_what_cannot_be_repeated_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        repeat_images(torch.rand(3, 1, 8, 8), **options)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_each_group_is_one_item_shown_by_its_members_alone(numbers):
    group = torch.tensor(numbers).unique(return_inverse=True)[1]
    samples = [(f"image {i}", i, i) for i in range(len(group))]
    once = OncePerGroup(samples, group)
    assert len(once) == len(set(numbers))
    for item in range(len(once)):
        members = {i for i, g in enumerate(group.tolist()) if g == item}
        drawn = {once[item] for _ in range(60)}
        assert {condition for _, condition, _ in drawn} <= members
        assert {index for _, _, index in drawn} == {item}
    first = FirstOfGroups(samples, group)
    kept = sorted(group.tolist().index(g) for g in set(group.tolist()))
    assert [first[i] for i in range(len(first))] == [(f"image {k}", k, i) for i, k in enumerate(kept)]


def test_members_of_a_group_are_drawn_equally_often():
    torch.manual_seed(0)
    once = OncePerGroup([("a", 0, 0), ("b", 1, 1), ("c", 2, 2)], torch.tensor([0, 0, 0]))
    counts = [0, 0, 0]
    for _ in range(3000):
        counts[once[0][1]] += 1
    assert min(counts) > 900


def test_classes_are_those_of_the_first_members():
    samples = IndexedImages(torch.rand(4, 1, 2, 2), torch.tensor([5, 6, 7, 8]))
    assert OncePerGroup(samples, torch.tensor([1, 0, 1, 2])).targets.tolist() == [6, 5, 8]
    assert FirstOfGroups(samples, torch.tensor([1, 0, 1, 2])).targets.tolist() == [5, 6, 8]


def test_groups_for_other_samples_are_refused():
    with pytest.raises(ValueError, match="Argument `group` expected one number for each of 1 samples"):
        OncePerGroup([("a", 0, 0)], torch.tensor([0, 0]))


def of_digits(**options):
    digits = DigitsDataModule(num_train=60, **options)
    digits.setup("fit")
    return digits


def test_repeated_images_make_the_training_set_uneven_and_dropping_makes_it_even_again():
    plain, uneven = of_digits(), of_digits(repeated_images=5, repeats=8)
    assert len(uneven.train_set) == 60 + 5 * 7
    assert uneven.train_set.targets[:5].unique().numel() == 5  # of five classes
    dropped = of_digits(repeated_images=5, repeats=8, duplicates="drop")
    alone = of_digits(duplicates="drop")
    assert len(alone.train_set) <= len(dropped.train_set) <= 60  # a few digits are alike of themselves
    groups = dropped.duplicate_groups.members[:5]
    assert [len(group) for group in groups] == [8] * 5
    assert torch.equal(plain.control_set.images, uneven.control_set.images)


def test_balanced_groups_are_split_into_shards_as_one_image():
    digits = DigitsDataModule(num_train=60, batch_size=4, repeated_images=4, repeats=10, duplicates="balance")
    sharded = ShardedDataModule(digits, num_shards=2)
    sharded.setup("fit")
    groups = len(digits.train_set)
    assert groups == len(digits.duplicate_groups.group.unique())
    read = [index for _, _, indices in sharded.train_dataloader() for index in indices.tolist()]
    assert len(read) <= groups  # not one near-duplicate more
    assert len(set(read)) == len(read)


class Uneven(ImageDataModule):
    """Images the first ones of which occur many times; ``source`` says which image each shows, in mixed order."""

    def __init__(self, *, different=100, repeated=10, repeats=11, change="recolored", **options):
        super().__init__(channels=1, **options)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(different, 1, 8, 8, generator=generator)
        images, self.source = repeat_images(images, repeated=repeated, repeats=repeats, change=change)
        order = torch.randperm(len(images), generator=generator)
        self.images, self.source = images[order], self.source[order]

    def load(self):
        return IndexedImages(self.images, self.source % 2)


def sources(data, samples):
    """Which image each sample shows: samples of no file are named by their position."""
    return [int(data.source[int(samples.name(index))]) for index in range(len(samples))]


@pytest.mark.parametrize("how", ["drop", "balance"])
def test_near_duplicates_of_training_images_are_not_held_out(how):
    plain, uneven = (Uneven(num_control=40, duplicates=duplicates) for duplicates in ("keep", how))
    for data in (plain, uneven):
        data.setup("fit")
    trained_on = set(sources(plain, plain.train_set))
    gone = 0
    for name in ("control_set", "reference_set"):
        before, after = getattr(plain, name), getattr(uneven, name)
        rest = [place for place, image in enumerate(sources(plain, before)) if image not in trained_on]
        assert [after.name(index) for index in range(len(after))] == [before.name(place) for place in rest]
        assert after.targets.tolist() == before.targets[rest].tolist()
        assert all(torch.equal(after[index][0], before[place][0]) for index, place in enumerate(rest))
        gone += len(before) - len(after)
    assert uneven.num_look_alikes == gone > 20
    assert len(uneven.train_set) == len(trained_on)
    assert torch.equal(uneven.duplicate_groups.group, duplicate_groups(images_of(plain.train_set)).group)


def test_held_out_near_duplicates_of_one_another_stay():
    plain, uneven = (Uneven(num_control=30, repeats=2, duplicates=duplicates) for duplicates in ("keep", "drop"))
    for data in (plain, uneven):
        data.setup("fit")
    held_out = sources(plain, plain.control_set) + sources(plain, plain.reference_set)
    pairs = [image for image in held_out if held_out.count(image) == 2]
    assert pairs  # else this test shows nothing
    assert set(pairs) <= set(sources(uneven, uneven.control_set) + sources(uneven, uneven.reference_set))


def test_where_held_out_images_are_different_the_sets_stay_as_they_are(caplog):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    data = Uneven(repeated=0, num_control=20, duplicates="drop")
    data.setup("fit")
    assert all(isinstance(samples, Samples) for samples in (data.control_set, data.reference_set))
    assert caplog.messages == ["None of 60 training images are near-duplicates of one another."]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"different": 1, "repeated": 1, "repeats": 60},
            "different images to train on, but all 20 are near-duplicates",
        ),
        ({"different": 2, "repeated": 2, "repeats": 30}, "but all 20 of `control_set` are near-duplicates of training"),
    ],
)
def test_sets_that_would_be_empty_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Uneven(**options, change="exact", num_control=20, duplicates="drop").setup("fit")


def of_a_run(folder, **options):
    return Trainer(
        max_steps=1, limit_val_batches=0, logger=CSVLogger(folder), enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def test_groups_of_data_that_were_set_up_before_the_run_are_listed_by_name(tmp_path, caplog):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    data = Uneven(num_control=40, duplicates="drop")
    data.setup("fit")  # as to count the steps of a run
    assert list(tmp_path.iterdir()) == []
    found = data.duplicate_groups
    (told,) = caplog.messages
    assert told.startswith(f"{found.images} of 120 training images lie in {len(found.members)} groups of near-")
    assert f" {data.num_look_alikes} of 80 held-out images are near-duplicates of training images, and left" in told
    of_a_run(tmp_path / "a").fit(tiny_diffusion(), data)
    assert caplog.messages.count(told) == 1
    _, *rows = next(tmp_path.rglob("duplicates.csv")).read_text().splitlines()
    names = [str(int(data.train_set.samples.indices[index])) for group in found.members for index in group]
    assert [row.split(",")[2] for row in rows] == names
    assert [int(data.source[int(name)]) for name in names[:11]].count(int(data.source[int(names[0])])) >= 2


def test_a_trial_and_a_run_that_does_not_train_list_nothing(tmp_path):
    of_a_run(tmp_path / "trial", fast_dev_run=True).fit(tiny_diffusion(), Uneven(num_control=40, duplicates="drop"))
    data = Uneven(num_control=40, duplicates="drop")
    of_a_run(tmp_path / "validated").validate(tiny_diffusion(), data, verbose=False)
    assert list(tmp_path.rglob("duplicates.csv")) == []


def test_groups_are_listed_in_the_run_folder(tmp_path):
    digits = DigitsDataModule(num_train=60, batch_size=16, repeated_images=2, repeats=5, duplicates="drop")
    of_a_run(tmp_path).fit(tiny_diffusion(), digits)
    lines = (next(tmp_path.rglob("duplicates.csv"))).read_text().splitlines()
    assert lines[0] == "group,images,name,kept_by_drop"
    assert [line.split(",")[1] for line in lines[1:11]] == ["5"] * 10


class Captioned(ImageDataModule):
    """Noise with captions, which is read when it is asked for."""

    captioned = True

    def load(self):
        return SyntheticImages(30, channels=1, size=(4, 4), captioned=True)


def test_images_with_captions_repeat_in_exact_copies():
    plain, uneven = Captioned(num_control=5), Captioned(num_control=5, repeated_images=3, repeats=4)
    for data in (plain, uneven):
        data.setup("fit")
    assert len(uneven.train_set) == 20 + 3 * 3
    source = [*range(20), 0, 0, 0, 1, 1, 1, 2, 2, 2]
    for index, place in enumerate(source):
        (image, caption, number), (other, words, _) = uneven.train_set[index], plain.train_set[place]
        assert torch.equal(image, other)
        assert (caption, number) == (words, index)


@pytest.mark.parametrize("numbers", [(4, 1), (-1, 1), (1, 0)])
def test_more_copies_than_there_can_be(numbers):
    with pytest.raises(ValueError, match=r"Argument `repeat(ed|s)` expected an integer"):
        Repeated([("a", 0, 0)] * 3, repeated=numbers[0], repeats=numbers[1])


@pytest.mark.parametrize(
    ("options", "argument"), [({"duplicates": "remove"}, "duplicates"), ({"repeated_images": 99}, "repeated")]
)
def test_options_out_of_range_are_refused(options, argument):
    with pytest.raises(ValueError, match=f"Argument `{argument}` expected"):
        of_digits(**options)
