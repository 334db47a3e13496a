import math

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from lightning_iet import plots as charts
from lightning_iet import plots as figures
from lightning_iet.plots import label_points


def pixels(figure, path):
    figures.save_figure(figure, path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("num", "columns", "rows"), [(1, 1, 1), (9, 3, 3), (10, 4, 3), (64, 8, 8)])
def test_image_grid_has_the_size_of_its_images(tmp_path, num, columns, rows):
    picture = pixels(figures.image_grid(torch.zeros(num, 1, 8, 8), side=64), tmp_path / "grid.png")
    gap = 6 if num > 1 else 0
    assert picture.shape == (rows * 64 + (rows + 1) * gap + 40, columns * 64 + (columns + 1) * gap + 40, 3)


def test_image_grid_shows_each_pixel_enlarged_and_unblurred(tmp_path):
    images = torch.rand(4, 3, 8, 8)
    picture = pixels(figures.image_grid(images, side=64), tmp_path / "grid.png")
    for number, image in enumerate(images):
        top, left = (20 + 6 + 70 * position for position in divmod(number, 2))
        for y in range(8):
            for x in range(8):
                block = picture[top + 8 * y : top + 8 * y + 8, left + 8 * x : left + 8 * x + 8]
                expected = (image[:, y, x] * 255).numpy()
                assert np.abs(block - expected).max() <= 1, (number, y, x)


def test_transparency_is_laid_over_white_in_every_picture():
    images = torch.rand(2, 4, 8, 8)
    opaque = torch.stack([1 - image[3] * (1 - image[:3]) for image in images])
    runs = [figures.RunPairs("plain", batch[None], [0.1], [1]) for batch in (images, opaque)]
    for transparent, expected in (
        (figures.image_grid(images), figures.image_grid(opaque)),
        (
            figures.nearest_pairs(images, images, [0.1] * 2, "ab"),
            figures.nearest_pairs(opaque, opaque, [0.1] * 2, "ab"),
        ),
        (figures.captioned_grid(images, "ab", title=""), figures.captioned_grid(opaque, "ab", title="")),
        *([figures.pairs_of_runs([run]) for run in runs],),
    ):
        shown, wanted = ([axes.images[0].get_array() for axes in figure.axes] for figure in (transparent, expected))
        for ours, theirs in zip(shown, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_image_grid_with_title_is_wide_enough_for_it(tmp_path):
    picture = pixels(figures.image_grid(torch.zeros(4, 1, 8, 8), title="4 generated images"), tmp_path / "grid.png")
    assert picture.shape[1] == 760


def test_large_images_are_not_enlarged(tmp_path):
    picture = pixels(figures.image_grid(torch.zeros(1, 3, 100, 200)), tmp_path / "grid.png")
    assert picture.shape == (100 + 40, 200 + 40, 3)


def test_nearest_pairs_labels_ratio_and_training_image_and_colours_copies():
    images = torch.rand(3, 1, 8, 8)
    figure = figures.nearest_pairs(
        images, images, [0.1, 0.2, 0.9], ["17", "a$b.png", "cats/IMG_20210101_1234.jpg"], limit=1 / 3
    )
    panels = figure.axes[:3]
    assert [panel.get_title() for panel in panels] == [f"$d_1 / d_2$ = {r:.3f}" for r in (0.1, 0.2, 0.9)]
    assert [panel.title.get_color() == figures.GENERATED for panel in panels] == [True, True, False]
    assert [panel.texts[1].get_text() for panel in panels] == [
        "training #17", r"a\$b.png", "cats/IM…1234.jpg",
    ]  # fmt: skip


@pytest.mark.parametrize(("num", "size"), [(1, (840, 280)), (4, (1260, 280)), (16, (1260, 874))])
def test_nearest_pairs_size(tmp_path, num, size):
    images = torch.rand(num, 3, 8, 8)
    picture = pixels(figures.nearest_pairs(images, images, [0.5] * num, ["0"] * num), tmp_path / "nearest.png")
    assert picture.shape[1::-1] == pytest.approx(size, abs=1)


def test_no_name_of_a_run_covers_the_course_of_another():
    course = [(9.0, [0.0]), (6.0, [0.02]), (4.6, [0.1])]
    runs = {
        "baseline": charts.RunPoint(4.0, [0.185], course),
        "iet_agc": charts.RunPoint(5.2, [0.01]),
        "uneven_record_with_a_long_name": charts.RunPoint(4.15, [0.004]),
    }
    [panel] = charts.runs_against_fid(runs, control=charts.RunPoint(0.6, [0.0]), measures=["copies"]).axes
    names = [text.get_window_extent() for text in panel.texts if text.get_text() in runs]
    assert len(names) == 3
    points = panel.transData.transform([(fid, shares[0]) for fid, shares in course])
    assert [box.contains(x, y) for box in names for x, y in points] == [False] * 9


def test_training_curves_draws_what_is_there():
    assert len(charts.training_curves([0.3, 0.2]).axes) == 1
    both = charts.training_curves([0.3], skip_rate=[0.0, 0.5], loss_by_timestep=[1.0, math.nan], threshold=0.5)
    assert len(both.axes) == 3
    assert "threshold 0.5" in both.axes[1].get_title(loc="left")
    values, edges, _ = both.axes[1].patches[0].get_data()
    assert list(values) == [0.0, 0.5]
    assert list(edges) == [0, 500, 1000]


def test_training_curves_draw_weights_in_the_place_of_skips():
    figure = charts.training_curves([0.3, 0.2], weights={1: [0.9, 0.5], 3: [0.8, 0.25]}, skip_rate=[0.0, 0.0])
    _, panel = figure.axes
    mean, lowest = panel.lines
    assert mean.get_xydata().tolist() == [[1, 0.9], [3, 0.8]]
    assert lowest.get_xydata().tolist() == [[1, 0.5], [3, 0.25]]
    assert [text.get_text() for text in panel.get_legend().texts] == [
        "mean of all training images", "mean of the tenth that counts least",
    ]  # fmt: skip


def test_training_curves_survive_unknown_values(tmp_path):
    nothing = [math.nan] * 5
    figure = charts.training_curves([], skip_rate=nothing, loss_by_timestep=nothing)
    assert pixels(figure, tmp_path / "curves.png").shape == (525, 1890, 3)


def test_memorized_quantity_curve_draws_both_columns():
    figure = charts.memorized_quantity_curve({0.2: 0.5, 0.4: 1.0}, {0.2: 0.0, 0.4: 0.1}, k=7)
    generated, control = figure.axes[0].lines
    assert generated.get_xydata().tolist() == [[0.2, 0.5], [0.4, 1.0]]
    assert control.get_xydata().tolist() == [[0.2, 0.0], [0.4, 0.1]]
    assert "7 nearest" in figure.axes[0].get_xlabel()


def test_held_out_losses_and_rounds_are_drawn_beside_the_training_loss():
    figure = charts.training_curves([3.0, 2.0, 1.0, 0.9], validation={2: 2.5, 4: 1.5, 5: math.nan}, round_epochs=1.5)
    training, held_out, rounds = figure.axes[0].lines
    assert training.get_xydata().tolist() == [[1, 3.0], [2, 2.0], [3, 1.0], [4, 0.9]]
    assert held_out.get_xydata().tolist() == [[2, 2.5], [4, 1.5]]
    assert list(rounds.get_xdata()) == [1.5, 3.0]
    crowded = charts.training_curves([1.0] * 200, round_epochs=1)
    assert len(crowded.axes[0].lines) == 2  # the loss and its mean


def test_what_was_not_measured_is_filled_and_the_bar_has_a_name():
    ratios = torch.full((4, 10), 0.5)
    ratios[1, 3] = torch.nan
    figure = charts.loss_gap(ratios, torch.ones(4, 10), torch.zeros(4, 10))
    _, image, bar = figure.axes
    assert image.images[0].get_array().tolist() == [[0.5] * 4] * 10
    assert "no memorization" in bar.get_ylabel()


def chart_of(runs, **options):
    points = {name: charts.RunPoint(fid, [copies, copies / 2]) for name, (fid, copies) in runs.items()}
    control = charts.RunPoint(0.6 if options.pop("measured", True) else math.nan, [0.01, 0.02])
    return charts.runs_against_fid(points, control=control, measures=["copies", "MQ"], **options)


def test_every_run_has_its_name_and_colour_in_each_panel_and_in_the_legend():
    figure = chart_of({"baseline": (1.4, 0.9), "iet": (3.0, 0.0)}, training_fid=0.9)
    for number, panel in enumerate(figure.axes):
        names = {text.get_text(): text.get_color() for text in panel.texts if text.get_text()}
        assert list(names) == ["baseline", "iet"]
        assert len(set(names.values())) == 2
        ends = [line.get_xydata().tolist()[0] for line in panel.lines if line.get_label() in names]
        assert ends == [[1.4, 0.9 / (1 + number)], [3.0, 0.0]]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["held-out real images (control)", "FID of the training images themselves"]
    assert legend[2:] == ["baseline", "iet"]


def test_a_crowd_of_runs_is_numbered_and_listed():
    figure = chart_of({f"run {i}": (i, 0.1) for i in range(12)})
    texts = [text.get_text() for text in figure.axes[-1].texts]
    listed = next(text for text in texts if "\n" in text)
    assert all(f"run {i}" in listed for i in range(12))
    assert {str(i) for i in range(1, 13)} <= set(texts)


def test_runs_without_fid_are_compared_by_their_shares_alone():
    figure = chart_of({"a": (math.nan, 0.5), "b": (math.nan, 0.1)}, measured=False)
    copies, near = figure.axes
    assert [bar.get_width() for bar in copies.patches] == [0.5, 0.1]
    assert [bar.get_width() for bar in near.patches] == [0.25, 0.05]
    assert list(copies.lines[0].get_xdata()) == [0.01, 0.01]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_labels_cover_neither_labels_nor_leave_the_chart(places):
    axes = Figure(figsize=(6, 6)).subplots()
    axes.set(xlim=(-0.5, 1.5), ylim=(-0.5, 1.5))
    boxes = [
        text.get_window_extent() for text in label_points(axes, {f"run {i}": place for i, place in enumerate(places)})
    ]
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:i]) == 0
        assert axes.bbox.count_contains(box.corners()) == 4


def test_no_global_state_of_matplotlib_is_touched(tmp_path):
    before = dict(mpl.rcParams), mpl.get_backend()
    pixels(charts.training_curves([1.0, 0.5]), tmp_path / "curves.png")
    assert (dict(mpl.rcParams), mpl.get_backend()) == before


def test_the_course_of_a_run_is_a_line_to_its_point():
    run = charts.RunPoint(4.0, [0.1], course=[(9.0, [0.0]), (5.0, [0.02])])
    figure = charts.runs_against_fid({"plain": run}, control=charts.RunPoint(0.6, [0.0]), measures=["copies"])
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[9.0, 5.0, 4.0]]
    assert [list(line.get_ydata()) for line in lines] == [[0.0, 0.02, 0.1]]
    assert figure.axes[0].get_xlim()[1] > 9


def test_shares_of_a_histogram():
    ratios = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    expected = [sum(1 for r in ratios.tolist() if i / 50 <= r < (i + 1) / 50) / 1000 for i in range(50)]
    assert figures.shares(ratios).tolist() == pytest.approx(expected)
