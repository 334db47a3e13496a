"""Pictures of the report: histograms and thumbnails."""

from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from math import floor, log10
from textwrap import fill
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import resize, to_pil_image

from lightning_iet.plots import CONTROL, DPI, GENERATED, INK, QUIET

BINS = 50
LETTERS = 88  # of a line of the title
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 330, 100, 880, 14, 292


def shares(ratios: Tensor) -> Tensor:
    """Return the share of ratios in each of 50 equal steps from 0 to 1, float64.

    Example:
        >>> shares(torch.tensor([0.0, 0.01, 0.5, 1.0]))[[0, 25, 49]]
        tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    steps = (ratios.double() * BINS).floor().clamp(0, BINS - 1).long()
    return torch.bincount(steps, minlength=BINS).double() / len(ratios)


def chart(
    measure: str, title: str, ratios: Mapping[str, Tensor], *, threshold: float, end: float = 1.0
) -> dict[str, Any]:
    """Work out a histogram as paths of SVG, with a logarithmic scale upwards.

    Args:
        measure: name of the measure.
        title: what it is, for those who do not see the picture.
        ratios: of the generated and perhaps of the held-out images.
        threshold: where the line stands.
        end: where the scale ends; larger ratios are in the last step.

    Returns:
        What the template needs.
    """
    lowest = floor(log10(1 / max(map(len, ratios.values()))))
    decades = range(lowest, 1)

    def height(share: float) -> float:
        if share <= 0:
            return BOTTOM
        return round(BOTTOM - (BOTTOM - TOP) * (log10(share) - lowest + 0.15) / (0.15 - lowest), 1)

    heights = {name: [height(share) for share in shares(values / end).tolist()] for name, values in ratios.items()}
    below = {name: float((values < threshold).double().mean()) for name, values in ratios.items()}
    words = ", ".join(f"{name.replace('_', '-')} images {100 * value:.2g} percent" for name, value in below.items())
    return {
        "measure": measure,
        "text": f"Histogram of {title}. Below the threshold of {threshold:.2f}: {words}.",
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM,
        "rows": [(height(10.0**decade), _percent(decade)) for decade in decades],
        "columns": [(_x(tick / 5), f"{end * tick / 5:.1f}") for tick in range(6)],
        "bars": _bars(heights["generated"]),
        "steps": _steps(heights["held_out"]) if "held_out" in heights else "",
        "threshold": _x(threshold / end),
    }  # fmt: skip


def ratio_figure(ratios: Mapping[str, Tensor], *, threshold: float, label: str, end: float, title: str = "") -> Figure:
    """Draw the histogram with matplotlib.

    Args:
        ratios: of the generated and perhaps of the held-out images.
        threshold: where the line stands.
        label: what the ratio is.
        end: where the scale ends; larger ratios are in the last step.
        title: how to read it.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(6.4, 3.8), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.subplots()
    edges = torch.linspace(0, end, BINS + 1).tolist()
    axes.stairs(
        shares(ratios["generated"] / end), edges, fill=True, color=GENERATED, alpha=0.75, label="generated images"
    )
    if "held_out" in ratios:
        axes.stairs(shares(ratios["held_out"] / end), edges, color=CONTROL, linewidth=1.6, label="held-out images")
    axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"threshold {threshold:.2f}")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7 / max(map(len, ratios.values())), top=1.4)
    axes.set_xlim(0, end)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_xlabel(label, fontsize=8.5, color=INK)
    axes.set_ylabel(f"share of images in a step of {end / BINS:.2g}", fontsize=8.5, color=INK)
    axes.tick_params(labelsize=8, colors=QUIET, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    figure.suptitle(fill(title, LETTERS), fontsize=9, color=INK)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure


def _x(value: float) -> float:
    return round(LEFT + value * (RIGHT - LEFT), 1)


def _bars(heights: list[float]) -> str:
    edges = [_x(step / BINS) for step in range(BINS + 1)]
    places = zip(edges, edges[1:], heights, strict=False)
    return "".join(f"M{a} {BOTTOM}V{y}H{b}V{BOTTOM}Z" for a, b, y in places if y < BOTTOM)


def _steps(heights: list[float]) -> str:
    edges = [_x(step / BINS) for step in range(BINS + 1)]
    return (
        f"M{edges[0]} {BOTTOM}" + "".join(f"V{y}H{b}" for b, y in zip(edges[1:], heights, strict=True)) + f"V{BOTTOM}"
    )


def _percent(decade: int) -> str:
    return f"{10.0 ** (decade + 2):g}\u00a0%"


PIXELATED = 64  # pixels up to which an image is stored as it is, and shown with its pixels as squares
LARGEST = 160  # pixels of a thumbnail: a card of the gallery shows it at about 110, a phone at 165


def data_uri(pixels: Tensor, *, largest: int = LARGEST) -> str:
    """Encode an image: without loss if it is small, else reduced and as JPEG.

    Args:
        pixels: uint8, shape ``(C, H, W)``, grey or RGB.
        largest: width and height that a reduced image has at most.

    Returns:
        A ``data:`` address.

    Example:
        >>> import torch
        >>> data_uri(torch.zeros(1, 8, 8, dtype=torch.uint8))[:30]
        'data:image/png;base64,iVBORw0K'
    """
    image, file = to_pil_image(pixels), BytesIO()
    kind = "png" if max(image.size) <= PIXELATED else "jpeg"
    if kind == "png":
        image.save(file, "png", optimize=True)
    else:
        image.thumbnail((largest, largest), Image.Resampling.BICUBIC)
        image.save(file, "jpeg", quality=80)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


def shrink(images: Tensor, side: int) -> Tensor:
    """Reduce images, shape ``(N, C, H, W)`` and uint8, to at most ``side`` pixels; smaller ones stay."""
    height, width = images.shape[-2:]
    if max(height, width) <= side:
        return images
    factor = side / max(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return resize(images, list(size), antialias=True)
