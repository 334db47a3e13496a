import pickle
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.metrics import MemorizedFraction
from tests.helpers.neighbors import on_the_way

matplotlib.use("Agg")

draw = partial(on_the_way, num_train=40)


def naive(generated, train, ratio=1 / 3):
    """Every pair in float64, one after the other."""
    memorized = 0
    for image in generated.double():
        first, second = sorted(((image - other) ** 2).sum().sqrt().item() for other in train.double())[:2]
        memorized += first < ratio * second or second == 0
    return pytest.approx(memorized / len(generated))


@pytest.mark.parametrize("ratio", [0.1, 1 / 3, 0.7, 1.0])
def test_equals_the_double_loop(ratio):
    generated, train = draw()
    metric = MemorizedFraction(train, ratio=ratio)
    metric.update(generated)
    assert metric.compute().item() == naive(generated, train, ratio)
    assert metric.compute().ndim == 0


@given(seed=st.integers(0, 1000), levels=st.sampled_from([2, 4, 17]))
def test_thresholds_that_are_met_exactly(seed, levels):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(levels, (40, 1, 3, 3), generator=generator) / 16  # as scikit-learn's digits have them
    metric = MemorizedFraction(images[:20], ratio=0.5)
    metric.update(images[20:])
    assert metric.compute().item() == naive(images[20:], images[:20], 0.5)


def test_planted_copies_are_found_and_only_those():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(256, (100, 3, 8, 8), dtype=torch.uint8, generator=generator)
    generated = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)
    generated[10:16] = train[40:46]
    generated[10:16, 0, 0, 0] ^= 1
    metric = MemorizedFraction(train)
    metric.update(generated)
    assert metric.compute() == 6 / 50


def test_an_exact_copy_of_a_duplicated_training_image_counts():
    _, train = draw()
    metric = MemorizedFraction(torch.cat([train, train]))
    metric.update(train[:5])
    assert metric.compute() == 1


def near_duplicates(image, number, generator):
    """Change an image slightly, in brightness and by noise, as a data set holds it again and again."""
    brightness = 1 + 0.04 * torch.randn(number, 1, 1, 1, generator=generator)
    return (image * brightness + 0.01 * torch.randn(number, *image.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("times", [3, 30, 80, 200])
@pytest.mark.parametrize("seed", range(3))
def test_copies_of_an_image_that_occurs_often_are_found_by_groups(times, seed):
    generator = torch.Generator().manual_seed(seed)
    repeated, *others = torch.rand(301, 1, 8, 8, generator=generator)
    train = torch.cat([near_duplicates(repeated, times, generator), torch.stack(others)])
    train = train[torch.randperm(len(train), generator=generator)]
    copies, held_out = near_duplicates(repeated, 30, generator), torch.rand(50, 1, 8, 8, generator=generator)
    grouped, published = MemorizedFraction(train, duplicates="group"), MemorizedFraction(train)
    for metric in (grouped, published):
        metric.update(torch.cat([held_out, copies]))
    assert grouped.compute() == 30 / 80
    assert published.compute() <= 5 / 80, "the published measure does not see them"
    found = grouped.copies()
    assert found.generated.tolist() == list(range(50, 80))
    assert (train[found.train] - repeated).abs().mean() < 0.1
    assert (found.ratios < 1 / 3).all()


def test_groups_change_nothing_where_no_image_occurs_twice():
    generated, train = draw()
    for images in (generated, train):
        grouped, published = MemorizedFraction(train, duplicates="group"), MemorizedFraction(train)
        assert grouped(images) == published(images)
        assert all(map(torch.equal, grouped.copies(), published.copies()))


def test_groups_survive_reset_and_pickling_and_follow_the_device():
    generated, train = draw()
    metric = MemorizedFraction(torch.cat([train, train]), duplicates="group")
    expected = metric(generated)
    metric.reset()
    copied = pickle.loads(pickle.dumps(metric))
    assert copied(generated) == expected
    assert metric.metric_state.keys().isdisjoint({"groups"})
    assert copied.to("meta").groups.device.type == "meta"


def test_repr_says_the_settings():
    metric = MemorizedFraction(torch.rand(40, 1, 4, 4), duplicates="group")
    assert repr(metric) == "MemorizedFraction(train=<40 x (1, 4, 4)>, ratio=0.333333, duplicates='group')"


def test_copies_name_their_originals():
    generated, train = draw()
    metric = MemorizedFraction(train, ratio=0.5)
    for batch in generated.split(8):
        metric.update(batch)
    distances = torch.cdist(generated.flatten(1).double(), train.flatten(1).double())
    first, second = distances.sort(dim=1).values[:, :2].T
    expected = (first < 0.5 * second).nonzero()[:, 0]
    found = metric.copies()
    assert found.generated.tolist() == expected.tolist() != []
    assert found.train.tolist() == distances.argmin(dim=1)[expected].tolist()
    torch.testing.assert_close(found.ratios.double(), (first / second)[expected], rtol=1e-4, atol=0)
    metric.reset()
    assert [len(part) for part in metric.copies()] == [0, 0, 0]


@given(seed=st.integers(0, 1000), splits=st.lists(st.integers(0, 20), max_size=3).map(sorted))
def test_batches_do_not_matter(seed, splits):
    generated, train = draw(seed)
    metric = MemorizedFraction(train)
    for batch in generated.tensor_split(splits):
        metric.update(batch)
    assert metric.compute().item() == naive(generated, train)


def test_forward_returns_the_batch_and_counts_it_in():
    generated, train = draw()
    metric = MemorizedFraction(train)
    for batch in generated.split(8):
        assert metric(batch).item() == naive(batch, train)
    assert metric.compute().item() == naive(generated, train)


def test_reset_starts_anew():
    generated, train = draw()
    metric = MemorizedFraction(train)
    metric.update(train)
    metric.reset()
    metric.update(generated)
    assert metric.compute().item() == naive(generated, train)


def test_uint8_equals_float():
    generated, train = ((images * 255).byte() for images in draw())
    results = []
    for g, t in ((generated, train), (generated / 255, train), (generated / 255, train / 255)):
        metric = MemorizedFraction(t)
        metric.update(g)
        results.append(metric.compute())
    assert results[0] == results[1] == results[2]
    assert results[0].item() == naive(generated / 255, train / 255)


def test_no_images_give_nan():
    metric = MemorizedFraction(draw()[1])
    metric.update(torch.zeros(0, 1, 4, 4))
    with pytest.warns(UserWarning, match="has seen no generated images, so that its result is NaN"):
        found = metric.compute()
    assert found.isnan()


def on_ranks(shares):
    """``MemorizedFraction`` on each rank's share of the generated images."""
    dist.init_process_group("gloo")
    metric = MemorizedFraction(draw()[1])
    for batch in shares[dist.get_rank()]:
        metric.update(batch)
    return metric.compute().item()


@pytest.mark.parametrize("split", [10, 3, 0], ids=["even", "uneven", "empty rank"])
def test_two_processes_equal_one(split, processes):
    generated, train = draw()
    shares = [generated[:split].split(2), generated[split:].split(7)]
    assert processes(2).run(on_ranks, shares) == [naive(generated, train)] * 2


def test_other_words_for_duplicates_are_refused():
    with pytest.raises(ValueError, match="Argument `duplicates` expected 'keep' or 'group', but got 'drop'"):
        MemorizedFraction(torch.rand(30, 1, 4, 4), duplicates="drop")


@pytest.mark.parametrize("ratio", [0, -1, 1.5, float("nan")])
def test_bad_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match=r"Argument `ratio` expected a number in \(0, 1\], but got"):
        MemorizedFraction(torch.rand(30, 1, 4, 4), ratio=ratio)


def test_plot_draws_one_share_or_several():
    generated, train = draw()
    metric = MemorizedFraction(train)
    values = [metric(batch) for batch in generated.split(10)]
    figure, axes = metric.plot()
    assert axes.figure is figure
    assert axes.get_ylim() == pytest.approx((-0.1, 1.1))
    _, given_axes = plt.subplots()
    assert metric.plot(values, ax=given_axes)[1] is given_axes
    assert given_axes.lines[0].get_ydata() == pytest.approx([value.item() for value in values])
    plt.close("all")
