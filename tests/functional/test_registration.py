import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import gaussian_blur

from lightning_iet.functional.registration import (
    STRETCH,
    _distorted,
    correlate_templates,
    grey_images,
    pyramid_sizes,
    refine,
    register,
)


def scene(count=1, *, seed=0, size=32):
    """Smooth images with detail on every scale that an alignment may use."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        F.interpolate(torch.rand(count, 1, n, n, generator=generator), (size, size), mode="bicubic") for n in (4, 8, 14)
    ]
    return (sum(parts) / 3).clamp(0, 1)


def moved(images, angle=0.0, zoom=1.0, dx=0.0, dy=0.0, mirror=False):
    """Turned in pixels, whatever the shape of the images."""
    aspect = images.shape[2] / images.shape[3]
    cos, sin = math.cos(math.radians(angle)) / zoom, math.sin(math.radians(angle)) / zoom
    sign = -1 if mirror else 1
    theta = torch.tensor([[[cos * sign, -sin * aspect, dx], [sin * sign / aspect, cos, dy]]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1), theta


def align(queries, candidates, side=32):
    sizes = grey_images(queries, (16, 16)), grey_images(candidates, (16, 16))
    aspect = queries.shape[2] / queries.shape[3]
    correlation, maps = correlate_templates(sizes[0], sizes[1].transpose(0, 1), aspect=aspect)
    assert correlation.shape == (len(queries), len(candidates), 2)
    height, width = queries.shape[-2:]
    pyramid = pyramid_sizes(height, width, side)
    pairs = [(grey_images(queries, size), grey_images(candidates, size)) for size in pyramid]
    return register(pairs, maps[:, 0], aspect=height / width)


@given(
    st.floats(-18, 18),
    st.floats(0.82, 1.22),
    st.floats(-0.3, 0.3),
    st.floats(-0.3, 0.3),
    st.booleans(),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=25)
def test_the_map_that_moved_an_image_is_found(angle, zoom, dx, dy, mirror, seed):
    image = scene(seed=seed)
    other, theta = moved(image, angle, zoom, dx, dy, mirror)
    found = align(other, image)
    assert float(found.distances) < 0.12
    points = torch.tensor([[x, y, 1.0] for x in (-0.3, 0.3) for y in (-0.3, 0.3)]).T
    assert torch.allclose(found.maps[0] @ points, theta[0] @ points, atol=2 / 32)  # a pixel


def test_images_that_show_something_else_stay_apart():
    images = scene(8)
    for other in images[1:]:
        assert float(align(images[:1], other[None]).distances) > 0.3


@pytest.mark.parametrize("change", [lambda x: 1 - x, lambda x: 0.3 * x + 0.5, lambda x: 0.9 - 0.5 * x])
def test_brightness_contrast_and_inversion_make_no_difference(change):
    image = scene()
    other, _ = moved(image, angle=7, dx=0.1)
    assert float(align(change(other), image).distances) == pytest.approx(float(align(other, image).distances), abs=0.01)


def test_the_order_of_channels_makes_no_difference():
    image = torch.rand(1, 3, 8, 8)
    assert torch.allclose(grey_images(image, (8, 8)), grey_images(image.flip(1), (8, 8)))


def test_correlations_equal_those_of_a_naive_search():
    """Shifts of whole pixels, without turning: over the overlap, by numpy's own correlation."""
    query, candidate = scene(size=16), scene(seed=1, size=16)
    least = 0.0
    for flip in (False, True):
        image = query[0, 0].flip(-1) if flip else query[0, 0]
        for dy in range(-4, 5):
            for dx in range(-4, 5):
                here = image[max(0, dy) : 16 + min(0, dy), max(0, dx) : 16 + min(0, dx)]
                there = candidate[0, 0][max(0, -dy) : 16 + min(0, -dy), max(0, -dx) : 16 + min(0, -dx)]
                if here.numel() >= 128:
                    least = max(least, abs(float(torch.corrcoef(torch.stack([here.flatten(), there.flatten()]))[0, 1])))
    correlation, _ = correlate_templates(query, candidate)
    assert float(correlation.max()) >= least - 1e-4  # it tries angles and zooms besides


def test_a_pair_of_equal_images_needs_no_step():
    image = scene()
    found = refine(image, image, torch.eye(2, 3)[None], steps=3, aspect=1)
    assert float(found.distances) < 1e-3
    assert torch.allclose(found.maps[0], torch.eye(2, 3), atol=1e-3)


def test_the_distance_is_that_of_the_correlation():
    images = scene(2)
    found = refine(images[:1], images[1:], torch.eye(2, 3)[None], steps=0, aspect=1)
    correlation = float(torch.corrcoef(images.flatten(1))[0, 1])
    assert float(found.distances) == pytest.approx(math.sqrt(1 - correlation**2), abs=1e-4)


@pytest.mark.parametrize("pixels", [torch.zeros(1, 1, 32, 32), torch.full((1, 1, 32, 32), 0.7)])
def test_an_image_of_one_colour_is_like_nothing(pixels):
    found = align(pixels, scene())
    assert float(found.distances) == 1
    assert bool(found.maps.isfinite().all())
    assert float(align(scene(), pixels).distances) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (20, 31), (90, 70)])
def test_images_of_any_shape(shape):
    image = F.interpolate(scene(size=40), shape, mode="bilinear")
    assert float(align(image, image, side=64).distances) < 0.02
    assert float(align(image.expand(1, 3, *shape), image, side=64).distances) < 0.02


def test_blurred_images_are_found():
    noise = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(noise, (28, 28), mode="bilinear")
    blurred = gaussian_blur(image, [9, 9], [1.3, 1.3])
    found = align(blurred, image)
    sharp = refine(blurred, image, torch.eye(2, 3)[None], steps=0, aspect=1)
    assert float(found.distances) < 0.5 * float(sharp.distances)


@pytest.mark.parametrize(("height", "width"), [(64, 128), (120, 40)])
@pytest.mark.parametrize("angle", [15, -12])
def test_turned_copies_of_elongated_images_are_found(height, width, angle):
    """They are turned in pixels, and compared squeezed to squares."""
    image = F.interpolate(scene(size=40), (height, width), mode="bicubic").clamp(0, 1)
    other, theta = moved(image, angle=angle)
    found = align(other, image)
    assert float(found.distances) < 0.12
    points = torch.tensor([[x, y, 1.0] for x in (-0.3, 0.3) for y in (-0.3, 0.3)]).T
    assert torch.allclose(found.maps[0] @ points, theta[0] @ points, atol=2 / 32)


@given(st.floats(0.25, 4), st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_distortion_is_that_of_pixels(aspect, seed):
    """Against the singular values of the map between pixels, whose sides are 1 over the width and the height."""
    maps = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(seed))
    sides = torch.diag(torch.tensor([1.0, aspect]))
    for linear, found in zip(maps[:, :, :2].double(), _distorted(maps, aspect).tolist(), strict=True):
        values = torch.linalg.svdvals(sides.double() @ linear @ torch.linalg.inv(sides.double()))
        if abs(float(values[0] / values[1]) - STRETCH) > 1e-3:
            assert found == bool(values[0] > STRETCH * values[1])


def test_many_large_images_become_grey_a_few_at_a_time(monkeypatch):
    from lightning_iet.functional import registration

    images = torch.randint(256, (7, 3, 10, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = grey_images(images, (4, 4))
    sizes, interpolate = [], F.interpolate

    def counting(part, *rest, **named):
        sizes.append(len(part))
        return interpolate(part, *rest, **named)

    monkeypatch.setattr(registration, "_VALUES", 3 * images[0].numel())
    monkeypatch.setattr(F, "interpolate", counting)
    assert torch.equal(grey_images(images, (4, 4)), whole)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_is_the_mean_in_float32_whatever_the_type(dtype, channels):
    images = torch.randint(256, (2, channels, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = images if dtype == torch.uint8 else (images.double() / 255).to(dtype)
    grey = grey_images(images, (4, 6))
    expected = images.double().mean(dim=1, keepdim=True) / (255 if dtype == torch.uint8 else 1)
    assert grey.dtype == torch.float32
    assert torch.allclose(grey.double(), expected, atol=1e-6)
