"""Undo what moves an image: align pairs of images by an affine map, and measure how unlike they then are.

Two stages, both on grey images and over the overlap only. A coarse one compares templates of the first image, turned,
scaled, mirrored and shifted on a grid, with the second by normalised correlation. A fine one improves the best of them
by Gauss-Newton steps on six numbers of the map, with brightness and contrast fitted at every step (as in Lucas and
Kanade 1981; Evangelidis and Psarakis, IEEE TPAMI 2008), and at last by the blur that fits best.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COARSE = 16  # pixels on each side of the images that templates are compared at
ANGLES = (-15.0, 0.0, 15.0)  # degrees
ZOOMS = (0.82, 1.0, 1.22)
CROP = 1.4  # zoom of a template that is not turned, for a crop that was enlarged
SHIFT = 4  # pixels of the coarse image: a quarter of its side
OVERLAP = 0.5  # share of an image that has to lie inside the other
ENERGY = 0.15  # share of its variance that has to: else a dark wall beside anything is a copy of every dark wall
STRETCH = 1.4  # how much more a map may enlarge in one direction than in another
_PIXELS = 2**18  # of the images that are aligned together on a CPU: more do not stay in its caches
_VALUES = 2**24  # of images that are turned into floating point at once
# Standard deviations in pixels of an image of 28 pixels, and in proportion of larger ones; the first is none.
BLURS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.5, 1.9, 2.4)


class Registration(NamedTuple):
    """How each of ``P`` pairs of images is aligned.

    Attributes:
        distances: ``sqrt(1 - c²)`` with the correlation ``c`` over the overlap, in [0, 1], shape ``(P,)``.
        maps: from coordinates of the first image to those of the second, both from -1 to 1, shape ``(P, 2, 3)``.
    """

    distances: Tensor
    maps: Tensor


def grey_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Average the channels, and bring images to a size.

    The plain mean of the channels does not depend on their order. Images are worked on a few at a time, so that many
    large ones take no more memory than they do afterwards.

    Args:
        images: uint8 or floating point in [0, 1], shape ``(N, C, H, W)``.
        size: height and width.

    Returns:
        In [0, 1], float32, shape ``(N, 1, *size)``.

    Example:
        >>> grey_images(torch.full((1, 3, 32, 24), 255, dtype=torch.uint8), (16, 16)).mean()
        tensor(1.)
    """
    block = max(1, _VALUES // max(1, images[:1].numel()))
    if len(images) > block:
        return torch.cat([grey_images(part, size) for part in images.split(block)])
    grey = images[:, :1].to(torch.float32, copy=True)
    for channel in images.unbind(dim=1)[1:]:  # one by one: a fraction of the time of a mean over channels
        grey.add_(channel[:, None].float())
    grey.div_(images.shape[1] * (255 if images.dtype == torch.uint8 else 1))
    if grey.shape[-2:] == size:
        return grey
    return F.interpolate(grey, size, mode="bilinear", antialias=True, align_corners=False)


def correlate_templates(queries: Tensor, candidates: Tensor, *, aspect: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Find the templates of each query that correlate best with its candidates: one as it is, and one mirrored.

    .. math:: c = \frac{|\sum (t - \bar t)(y - \bar y)|}{\sqrt{\sum (t - \bar t)^2 \sum (y - \bar y)^2}}

    over the pixels of the candidate ``y`` that the template ``t`` covers, for 3 angles and 3 zooms, and a larger zoom
    without a turn, at 81 shifts of each.
    The absolute value finds inverted images as well. Both are kept, for many things look nearly the same in a mirror.

    Args:
        queries: grey, shape ``(Q, 1, 16, 16)``.
        candidates: of each query, grey, shape ``(Q, K, 16, 16)``.
        aspect: height over width of the images before they were brought to this size.

    Returns:
        The correlations, shape ``(Q, K, 2)``, in [0, 1], and the maps from query to candidate, shape
        ``(Q, K, 2, 2, 3)``.
    """
    grid, mask, maps, mirrored = (part.to(queries.device) for part in _templates(aspect))
    size = mask.sum(dim=1, keepdim=True)
    halves = [(~mirrored).nonzero().flatten(), mirrored.nonzero().flatten()]
    best, chosen = [], []
    for query, others in zip(queries, candidates.flatten(2), strict=True):
        templates = F.grid_sample(query[None], grid, padding_mode="border", align_corners=False).view(mask.shape)
        templates = (templates - (templates * mask).sum(dim=1, keepdim=True) / size) * mask
        norms = torch.linalg.vector_norm(templates, dim=1, keepdim=True)
        spread = (mask @ others.square().T - (mask @ others.T).square() / size).clamp(min=0).sqrt()
        correlation = (templates @ others.T).abs() / (norms * spread).clamp(min=1e-6)
        values, places = zip(*(correlation[half].max(dim=0) for half in halves), strict=True)
        best.append(torch.stack(values, dim=1))
        chosen.append(torch.stack([maps[half[place]] for half, place in zip(halves, places, strict=True)], dim=1))
    return torch.stack(best).clamp(max=1), torch.stack(chosen)


@lru_cache(maxsize=4)
def _templates(aspect: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sampling grid ``(1, T, 256, 2)``, masks ``(T, 256)``, maps to the candidate ``(T, 2, 3)``, and which mirror."""
    linear = []
    for mirror in (1, -1):
        for angle in ANGLES:
            for zoom in ZOOMS:
                cos, sin = math.cos(math.radians(angle)) * zoom, math.sin(math.radians(angle)) * zoom
                linear.append([[cos * mirror, -sin * aspect], [sin * mirror / aspect, cos]])
    linear += [[[CROP * mirror, 0.0], [0.0, CROP]] for mirror in (1, -1)]
    turned = torch.tensor(linear)[:, None]
    steps = torch.arange(-SHIFT, SHIFT + 1) * 2.0 / COARSE
    moved = torch.cartesian_prod(steps, steps)[None, :, :, None]
    shape = len(linear), moved.shape[1]
    maps = torch.cat([turned.expand(*shape, 2, 2), moved.expand(*shape, 2, 1)], dim=-1).flatten(0, 1)
    grid = F.affine_grid(maps, [len(maps), 1, COARSE, COARSE], align_corners=False)
    mask = (grid.abs() <= 1).all(dim=-1).flatten(1)
    enough = mask.float().mean(dim=1) >= OVERLAP
    square = torch.cat([maps, torch.tensor([[[0.0, 0.0, 1.0]]]).expand(len(maps), 1, 3)], dim=1)
    inverse = torch.linalg.inv(square)[enough, :2]  # templates are drawn by the way back
    mirrored = inverse[:, :, :2].det() < 0
    return grid[enough].view(1, -1, COARSE**2, 2), mask[enough].float(), inverse, mirrored


def refine(
    queries: Tensor, candidates: Tensor, maps: Tensor, *, steps: int, aspect: float, mode: str = "bilinear"
) -> Registration:
    """Improve maps by Gauss-Newton steps, damped as by Levenberg and Marquardt.

    Args:
        queries: grey, shape ``(P, 1, H, W)``.
        candidates: likewise.
        maps: where to start, shape ``(P, 2, 3)``.
        steps: number of steps.
        aspect: height over width of the images before they were brought to this size: a turn looks like a distortion in
            images that were squeezed.
        mode: interpolation, ``"bilinear"`` or ``"bicubic"``.

    Returns:
        The best map on the way; the distance is 1 where no step kept enough overlap, or none that turns and zooms
        without much distortion.
    """
    total, _, height, width = queries.shape
    padded = F.pad(candidates, (1, 1, 1, 1), mode="replicate")
    along_x = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) * width / 4  # per unit of coordinates from -1 to 1
    along_y = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) * height / 4
    layers = torch.cat([candidates, along_x, along_y], dim=1)
    x, y = F.affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False).to(maps).flatten(1, 2).mT[0]
    best = Registration(torch.full((total,), torch.inf, device=maps.device), maps)
    normal, right = torch.zeros(total, 6, 6, device=maps.device), torch.zeros(total, 6, device=maps.device)
    damping, current = torch.full((total,), 1e-3, device=maps.device), maps
    for step in range(steps + 1):
        warped, inside = _warped(layers, current, mode)
        image, slope_x, slope_y = warped.unbind(dim=1)
        rest, gain, distances = _residual(queries.flatten(1), image, inside)
        distances = distances.masked_fill(_distorted(current, aspect), 1)
        better = distances < best.distances
        best = _nearer(best, Registration(distances, current))
        if step == steps:
            break
        damping = torch.where(better, damping / 2, damping * 8)
        slopes = torch.stack([slope_x * x, slope_x * y, slope_x, slope_y * x, slope_y * y, slope_y], dim=-1)
        slopes = slopes * gain[:, :, None] * inside[:, :, None]
        size = inside.sum(dim=1).clamp(min=1)[:, None, None]
        slopes = slopes - slopes.sum(dim=1, keepdim=True) / size * inside[:, :, None]
        # Where the last step was too long, a shorter one is taken from the best map again.
        normal = torch.where(better[:, None, None], slopes.mT @ slopes, normal)
        right = torch.where(better[:, None], (slopes * rest[:, :, None]).sum(dim=1), right)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        added = diagonal * damping[:, None] + 1e-6 * diagonal.mean(dim=1, keepdim=True) + 1e-8
        change = torch.linalg.solve(normal + torch.diag_embed(added), right)
        current = best.maps + change.clamp(-0.2, 0.2).view(-1, 2, 3)
    return best


def overlap_distances(queries: Tensor, candidates: Tensor, maps: Tensor) -> Tensor:
    """Measure ``sqrt(1 - c²)`` with the correlation ``c`` over the overlap of queries and warped candidates.

    Args:
        queries: grey, shape ``(P, 1, H, W)``.
        candidates: likewise.
        maps: from query to candidate, shape ``(P, 2, 3)``.

    Returns:
        Shape ``(P,)``, in [0, 1]; 1 where the overlap is less than half of the image, shows one colour only, or has
        less than 15 % of the variance of the query.

    Example:
        >>> images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> overlap_distances(images, 1 - images, torch.eye(2, 3).expand(2, 2, 3)).max() < 1e-3
        tensor(True)
    """
    warped, inside = _warped(candidates, maps, "bilinear")
    return _residual(queries.flatten(1), warped[:, 0], inside)[2]


def _warped(layers: Tensor, maps: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Layers in the place of the query, shape ``(P, L, H * W)``, and which pixels are known, shape ``(P, H * W)``."""
    grid = F.affine_grid(maps, [len(layers), 1, *layers.shape[-2:]], align_corners=False)
    warped = F.grid_sample(layers, grid, mode, "border", align_corners=False).flatten(2)
    inside = grid.abs() <= 1
    return warped, (inside[..., 0] & inside[..., 1]).flatten(1).float()  # `all` takes three times as long


def _residual(target: Tensor, warped: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What brightness and contrast leave of the difference, the contrast, and the norm as a share of the target's."""
    size = inside.sum(dim=1, keepdim=True).clamp(min=1)
    goal, found = ((part - (part * inside).sum(dim=1, keepdim=True) / size) * inside for part in (target, warped))
    gain = (goal * found).sum(dim=1, keepdim=True) / found.square().sum(dim=1, keepdim=True).clamp(min=1e-8)
    rest, energy = goal - gain * found, goal.square().sum(dim=1)
    distances = (rest.square().sum(dim=1) / energy.clamp(min=1e-8)).sqrt().clamp(max=1)
    total = (target - target.mean(dim=1, keepdim=True)).square().sum(dim=1)
    poor = (size[:, 0] < OVERLAP * target.shape[1]) | (energy < 1e-6 * target.shape[1]) | (energy < ENERGY * total)
    return rest, gain, torch.where(poor, 1.0, distances)


def _distorted(maps: Tensor, aspect: float) -> Tensor:
    """Tell which maps enlarge one direction much more than another; ``aspect`` is height over width."""
    linear = maps[:, :, :2] * torch.tensor([[1.0, 1 / aspect], [aspect, 1.0]], device=maps.device)
    squares, product = linear.square().sum(dim=(1, 2)), linear.det().abs()
    # Of singular values a and b: a² + b² > (r + 1 / r) a b where a / b > r.
    return squares > (STRETCH + 1 / STRETCH) * product


def pyramid_sizes(height: int, width: int, side: int) -> list[tuple[int, int]]:
    """Return the sizes that images are aligned at, from coarse to fine.

    Args:
        height: of the images.
        width: of the images.
        side: pixels of the finest: larger images are brought to that many on each side.

    Example:
        >>> pyramid_sizes(48, 40, 64), pyramid_sizes(256, 192, 64)
        ([(16, 16), (48, 40)], [(16, 16), (32, 32), (64, 64)])
    """
    finest = (height, width) if max(height, width) <= side else (side, side)
    middle = [(32, 32)] if min(finest) > 40 else []
    return [(COARSE, COARSE), *middle, finest]


def register(pairs: Sequence[tuple[Tensor, Tensor]], maps: Tensor, *, aspect: float) -> Registration:
    """Align pairs of grey images from coarse to fine, and fit how much the second has to be blurred.

    Args:
        pairs: the images and their candidates at all :func:`pyramid_sizes`, in [0, 1], shape ``(P, 1, *size)`` each.
        maps: where to start, two for each pair as :func:`correlate_templates` finds them, shape ``(P, 2, 2, 3)``.
        aspect: height over width of the images that these were.

    Example:
        >>> image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> image = F.interpolate(image, (32, 32), mode="bicubic").clamp(0, 1)
        >>> pairs = [(grey_images(image.roll(2, 3), size), grey_images(image, size)) for size in ((16, 16), (32, 32))]
        >>> found = register(pairs, torch.eye(2, 3).expand(1, 2, 2, 3), aspect=1.0)
        >>> bool(found.distances < 0.02), round(float(found.maps[0, 0, 2]), 3)  # 2 of 32 pixels are 0.125
        (True, -0.125)
    """
    block = max(1, _PIXELS // pairs[-1][0][0].numel()) if maps.device.type == "cpu" else max(1, len(maps))
    if len(maps) > block:
        parts = zip(*([*zip(*(part.split(block) for part in pair), strict=True)] for pair in pairs), strict=True)
        done = [register(part, start, aspect=aspect) for part, start in zip(parts, maps.split(block), strict=True)]
        return Registration(*(torch.cat(part) for part in zip(*done, strict=True)))
    finest = pairs[-1]
    found = Registration(torch.ones(len(maps), device=maps.device), maps[:, 0])
    for start in maps.unbind(dim=1):
        part = Registration(found.distances, start)
        for pair in pairs:
            steps = 4 if pair[0].shape == finest[0].shape else 5
            part = refine(*pair, part.maps, steps=steps, aspect=aspect)
        found = _nearer(found, part)
    sharper = refine(*finest, found.maps, steps=1, aspect=aspect, mode="bicubic")  # as moved images often are
    found = _nearer(found, sharper)
    versions = _blurs(finest[1])
    for _ in range(2):  # the best blur depends on the map, and the map on the blur
        blurred, distances = _best_blur(finest[0], versions, found.maps)
        found = _nearer(found, refine(finest[0], blurred, found.maps, steps=3, aspect=aspect))
        found = _nearer(found, Registration(distances, found.maps))
    return found


def _blurs(candidates: Tensor) -> list[Tensor]:
    """Blur each candidate by all :data:`BLURS`."""
    return [_blurred(candidates, blur * max(candidates.shape[-2:]) / 28) if blur else candidates for blur in BLURS]


def _best_blur(queries: Tensor, versions: Sequence[Tensor], maps: Tensor) -> tuple[Tensor, Tensor]:
    """Take the version of each candidate that fits its query best, and return the distances as well."""
    best, least = versions[0], torch.full((len(queries),), torch.inf, device=queries.device)
    for blurred in versions:
        distances = overlap_distances(queries, blurred, maps)
        better = distances < least
        best = torch.where(better[:, None, None, None], blurred, best)
        least = torch.where(better, distances, least)
    return best, least


def _nearer(one: Registration, other: Registration) -> Registration:
    """Take the better of two alignments of each pair."""
    better = other.distances < one.distances
    return Registration(
        torch.where(better, other.distances, one.distances), torch.where(better[:, None, None], other.maps, one.maps)
    )


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Convolve with a Gaussian, borders repeated."""
    reach = max(1, math.ceil(2.5 * deviation))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / deviation).square())
    weights = weights / weights.sum()
    wide = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), weights.view(1, 1, 1, -1))
    return F.conv2d(F.pad(wide, (0, 0, reach, reach), mode="replicate"), weights.view(1, 1, -1, 1))
