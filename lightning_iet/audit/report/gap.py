"""What the generator's loss gives away, as words, numbers and a picture in the page."""

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from lightning_iet.audit.membership import Membership, TimestepGap
from lightning_iet.audit.report.histogram import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from lightning_iet.audit.verdict import membership_words, percent

__all__ = ["membership_section"]


def membership_section(membership: Membership | None) -> dict[str, Any] | None:
    """Describe what the generator's loss gives away.

    Args:
        membership: the figures.

    Returns:
        What the template needs, or ``None`` if losses were not measured.
    """
    if membership is None:
        return None
    rates = membership.true_positive_rates.items()
    return {
        "words": membership_words(membership),
        "train": f"{membership.train:,}",
        "held_out": f"{membership.held_out:,}",
        "rates": [(percent(float(rate)), percent(found), _allowed(membership, float(rate))) for rate, found in rates],
        "chart": _chart(membership.timesteps),
        "timesteps": [_row(gap) for gap in membership.timesteps],
    }


def _allowed(membership: Membership, rate: float) -> str:
    count = int(rate * membership.held_out + 1e-9)
    return f"{count:,} of {membership.held_out:,} held-out images"


def _row(gap: TimestepGap) -> list[str]:
    figures = (gap.train, gap.held_out, gap.gap, gap.low, gap.high)
    return [str(gap.timestep), *(f"{figure:.4g}" for figure in figures)]


def _chart(gaps: Sequence[TimestepGap]) -> dict[str, Any]:
    """Work out the gap and its band as paths of SVG, in percent of the held-out loss."""
    parts = [[100 * value / gap.held_out for value in (gap.gap, gap.low, gap.high)] for gap in gaps]
    ticks = list(MaxNLocator(5, min_n_ticks=3).tick_values(*_range(parts)))
    end = gaps[0].timestep + gaps[-1].timestep  # timesteps are the middles of equal parts of 0 ... end

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    def x(timestep: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * timestep / max(end, 1), 1)

    line, low, high = (
        [f"{x(gap.timestep)} {y(part[which])}" for gap, part in zip(gaps, parts, strict=True)] for which in range(3)
    )
    apart = sum(part[1] > 0 for part in parts)
    return {
        "text": f"Gap between held-out and training loss over the timesteps, in percent of the held-out loss. At "
        f"{apart} of {len(gaps)} timesteps the 95 percent interval lies above zero.",
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM,
        "rows": [(y(tick), f"{tick:g}\u00a0%", tick == 0) for tick in ticks],
        "columns": [(x(tick), f"{tick:g}") for tick in MaxNLocator(6).tick_values(0, max(end, 1)) if 0 <= tick <= end],
        "band": "M" + "L".join(high + low[::-1]) + "Z",
        "line": "M" + "L".join(line if len(line) > 1 else line * 2),
    }  # fmt: skip


def _range(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    values = [value for part in parts for value in part] + [0.0]
    return min(values), max(values)
