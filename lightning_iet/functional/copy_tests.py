"""Tests of whether a generator copies, and of which images are copies, by scores of held-out images as the control.

A score says how near an image lies to one training image and to no other: the lower, the more like a copy. Held-out
images whose scores were found by exactly the same search are exchangeable with generated images that nobody copied.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import chi2, false_discovery_control, hypergeom
from torch import Tensor

_STEPS = 256  # thresholds that a scan looks at, at most
_LEAST_SCORE = 1e-4  # scores below it count as it: the tail of scores is fitted to their logarithms
_TAIL, _LEAST_TAIL = 10, 10  # a tail is the lowest tenth of the scores, but at least 10 of them
_ROWS = 256  # images that are compared with all held-out images at once


class Scan(NamedTuple):
    """The threshold below which the excess of generated images is the least likely.

    Attributes:
        threshold: the score; NaN if no threshold was looked at.
        generated: generated images at or below it.
        held_out: held-out images at or below it.
        p_value: probability that some threshold shows an excess this unlikely if labels are exchanged at random.
    """

    threshold: float
    generated: int
    held_out: int
    p_value: float


def scan_test(generated: Tensor, held_out: Tensor, *, largest: float = float("inf")) -> Scan:
    r"""Test at all thresholds at once whether generated images have lower scores than held-out images.

    At each threshold ``t`` the excess is measured by the tail of the hypergeometric distribution,

    .. math:: p(t) = P\big(G \ge g(t)\big), \qquad G \sim \mathrm{Hypergeometric}(m + n,\ m,\ k(t)),

    with ``g`` generated ones among the ``k`` images whose scores are at most ``t``. The statistic is the smallest of
    them, a scan as that of Berk and Jones (1979). Its p-value is that of all ways to exchange the labels, each as
    likely as the others: the probability that a random path of labels crosses the boundary that the statistic draws,
    computed exactly by recursion over the ranks. Ties share one threshold.

    Args:
        generated: scores of the ``m`` generated images, shape ``(m,)``.
        held_out: scores of the ``n`` held-out images, shape ``(n,)``.
        largest: no threshold beyond it is looked at. Of more than 256 thresholds a geometric series is taken, every one
            of the first among them *(our choice)*.

    Raises:
        ValueError: if a score is NaN, or a set is empty.

    Example:
        >>> held_out = torch.linspace(0.5, 1, 20)
        >>> found = scan_test(torch.cat([torch.tensor([0.1, 0.1, 0.2, 0.2]), held_out[4:]]), held_out)
        >>> found.generated, found.held_out, round(found.p_value, 3)
        (4, 0, 0.21)
    """
    m, n = _checked(generated, "generated"), _checked(held_out, "held_out")
    scores, order = torch.cat([generated, held_out]).double().cpu().sort(stable=True)
    is_last = torch.cat([scores[1:] > scores[:-1], torch.tensor([True])]) & (scores <= largest)
    ends = is_last.nonzero().flatten().numpy() + 1
    ends = ends[ends < m + n]  # all images together say nothing
    if not len(ends):
        return Scan(float("nan"), 0, 0, 1.0)
    if len(ends) > _STEPS:
        ends = ends[np.unique(np.geomspace(1, len(ends), _STEPS).round().astype(int)) - 1]
    counts = (order < m).cumsum(0).numpy()[ends - 1]
    tails = hypergeom.sf(counts - 1, m + n, m, ends)
    best = int(tails.argmin())
    p_value = _crossing_probability(ends, float(tails[best]), m, n)
    return Scan(float(scores[ends[best] - 1]), int(counts[best]), int(ends[best] - counts[best]), p_value)


def _crossing_probability(ends: np.ndarray, statistic: float, m: int, n: int) -> float:
    """Sum the probabilities of all paths of labels whose tail is at most ``statistic`` at one of ``ends``."""
    # The least count whose tail is at most the statistic; rounding may put the inverse off by one.
    near = hypergeom.isf(statistic, m + n, m, ends).astype(int)[:, None] + np.arange(-1, 3)
    reached = (hypergeom.sf(near - 1, m + n, m, ends[:, None]) <= statistic * (1 + 1e-9)) & (near >= 0)
    least = np.where(reached, near, np.iinfo(int).max).min(axis=1)
    limit = dict(zip(ends.tolist(), least.tolist(), strict=True))
    alive, crossed = np.zeros(m + 2), 0.0
    alive[0] = 1.0
    generated = np.arange(m + 2)
    for rank in range(1, int(ends[-1]) + 1):
        chance = (m - generated) / (m + n - rank + 1)  # that the next image is a generated one
        step = alive * chance.clip(0, 1)
        alive -= step
        alive[1:] += step[:-1]
        if rank in limit and limit[rank] < len(alive):
            crossed += float(alive[limit[rank] :].sum())
            alive[limit[rank] :] = 0
    return min(crossed, 1.0)


class Combined(NamedTuple):
    """Conformal p-values of ``m`` images that went through several searches.

    Attributes:
        p_values: shape ``(m,)``, float64, in (0, 1].
        searches: the search whose score is the least likely, int64, shape ``(m,)``.
    """

    p_values: Tensor
    searches: Tensor


def combined_p_values(scores: Tensor, held_out: Tensor) -> Combined:
    r"""Return conformal p-values of images that went through several searches, each calibrated by its own tail.

    With one search they are the probability of so low a score if the image were one more held-out image,
    :math:`p_i = (1 + \#\{j : x_j \le x_i\}) / (n + 1)` (Bates, Candès, Lei, Romano, Sesia, *Testing for Outliers with
    Conformal p-values*, Annals of Statistics 2023, arXiv:2104.08279).

    What is a low score in one search may be a usual one in another. So the scores of each search ``s`` are turned into
    logarithms of tail probabilities before the least of them is taken. Of the held-out images together with image
    ``i``, and nothing else,

    .. math:: c_j = \min_s a_s \log (x_{js} / t_s),\qquad
        1 / a_s = \frac{1}{k} \sum_{l \le k} \log (t_s / x_{(l) s}),\qquad t_s = x_{(k+1) s}

    with the ``k`` lowest scores :math:`x_{(l) s}` of the search (Hill 1975), a tenth of all, but at least 10 *(our
    choice)*. Then :math:`p_i = (1 + \#\{j : c_j \le c_i\}) / (n + 1)`. Since ``c`` treats all of these ``n + 1``
    images alike, the rank of an innocent one is as likely to be any as any other, so that :math:`P(p_i \le u) \le u`
    exactly, whatever the fit (a transductive score, as in Liang, Sesia, Sun, *Integrative conformal p-values for
    out-of-distribution testing with labelled outliers*, JRSS B 2024, arXiv:2208.11111).

    Args:
        scores: shape ``(m, S)``, at least 0; the lower, the more like a copy. Those below 0.0001 count as 0.0001.
        held_out: shape ``(n, S)``.

    Raises:
        ValueError: if a score is NaN, there are no held-out images, or the numbers of searches differ.

    Example:
        >>> held_out = torch.stack([torch.linspace(0.6, 1, 9), torch.linspace(0.1, 1, 9)], dim=1)
        >>> combined_p_values(torch.tensor([[0.2, 0.5], [0.9, 0.2]]), held_out)  # 0.2 is low in the first search only
        Combined(p_values=tensor([0.1000, 0.3000], dtype=torch.float64), searches=tensor([0, 1]))
    """
    if scores.ndim != 2 or held_out.ndim != 2 or scores.shape[1] != held_out.shape[1] or not len(held_out):
        raise ValueError(
            "Arguments `scores` and `held_out` expected shapes (m, S) and (n, S) with n ≥ 1, but got "
            f"{tuple(scores.shape)} and {tuple(held_out.shape)}."
        )
    if scores.isnan().any() or held_out.isnan().any():
        raise ValueError("Arguments `scores` and `held_out` expected numbers, but got NaN.")
    own, others = (part.double().clamp(min=_LEAST_SCORE).log() for part in (scores, held_out))
    n = len(others)
    k = min(max(_LEAST_TAIL, (n + 1) // _TAIL), n)
    lowest = others.sort(dim=0).values[: k + 1].T
    p_values, searches = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    for rows in own.split(_ROWS):
        tail = torch.cat([lowest.expand(len(rows), -1, -1), rows[:, :, None]], dim=2).sort(dim=2).values[..., : k + 1]
        start = tail[..., k]
        exponents = 1 / (start[..., None] - tail[..., :k]).mean(dim=2).clamp(min=1e-9)
        combined, search = (exponents * (rows - start)).min(dim=1)
        control = (exponents[:, None] * (others - start[:, None])).amin(dim=2)
        p_values.append((1 + (control <= combined[:, None]).sum(dim=1)).double() / (n + 1))
        searches.append(search)
    return Combined(torch.cat(p_values), torch.cat(searches))


def false_discoveries(p_values: Tensor, *, level: float = 0.05) -> Tensor:
    """Tell which hypotheses to reject so that the expected share of false ones among them is at most ``level``.

    The procedure of Benjamini and Hochberg (1995). With conformal p-values of one set of held-out images it keeps its
    promise although these depend on one another (Bates et al. 2023, theorem 2). For those of
    :func:`combined_p_values`, whose fit differs a little from image to image, this is measured, not proved.

    Args:
        p_values: shape ``(m,)``.
        level: the share, in (0, 1).

    Returns:
        Bool, shape ``(m,)``.

    Example:
        >>> false_discoveries(torch.tensor([0.001, 0.3, 0.02, 0.9]))
        tensor([ True, False,  True, False])
    """
    if not len(p_values):
        return torch.zeros(0, dtype=torch.bool)
    adjusted = false_discovery_control(p_values.double().cpu().numpy())
    return torch.from_numpy(adjusted <= level).to(p_values.device)


def noticeable_below(held_out: Tensor, images: int, *, level: float = 0.05) -> float:
    r"""Return the score below which one of ``images`` innocent images lies with a probability of at most ``level``.

    Ranks cannot tell an image that is somewhat nearer than every held-out image from one that is far nearer. The lower
    tail of the held-out scores can: of ratios of distances to the nearest and the next of points that lie evenly around
    in ``a`` dimensions, :math:`P(s < r) = r^a` (Facco, d'Errico, Rodriguez, Laio, *Estimating the intrinsic dimension
    of datasets by a minimal neighborhood information*, Scientific Reports 2017). The exponent is fitted to the ``k``
    lowest held-out scores (Hill 1975), and its lower 95 % confidence limit is taken:

    .. math:: s^* = s_{(k+1)} \left( \frac{\alpha n}{m k} \right)^{1 / a}

    *(our choice)*, with ``k`` the square root of ``n``, but at least 10: the more scores there are, the smaller a part
    of them is fitted. A tenth is too much where images are of many kinds: among 1,000 crops of photographs some pairs,
    such as two edges of one retina, are far more alike than the tenth says. It is a rule for what to look at, not a
    test: named as copies are only images that need no tail.

    Args:
        held_out: scores of the ``n`` held-out images, shape ``(n,)``.
        images: ``m``.
        level: ``α``.

    Returns:
        The score; 0 where the held-out scores say nothing, since some of them are 0 or there are fewer than 3.

    Example:
        >>> scores = torch.linspace(0.001, 1, 1000) ** (1 / 20)  # of points in 20 dimensions
        >>> round(noticeable_below(scores, 100), 2), 0.0005 ** (1 / 20)
        (0.64, 0.6838...)
    """
    n = _checked(held_out, "held_out")
    lowest = held_out.double().sort().values
    k = min(max(_LEAST_TAIL, round(n**0.5)), n - 1)
    if k < 2 or float(lowest[0]) <= 0:
        return 0.0
    logarithms = float((lowest[k] / lowest[:k]).log().sum())
    if logarithms <= 0:
        return float(lowest[0])
    exponent = float(chi2.ppf(0.05, 2 * k)) / 2 / logarithms
    return float(lowest[k]) * min(1.0, level * n / (images * k)) ** (1 / exponent)


def held_out_needed(copies: int, generated: int, *, level: float = 0.05) -> int:
    r"""Return the number of held-out images at which :func:`false_discoveries` can name ``copies`` images.

    .. math:: n \ge \frac{m}{\alpha c} - 1

    since ``c`` copies that are nearer than every held-out image have the p-value ``1 / (n + 1)``, and the procedure
    names them if that is at most ``α c / m``.

    Args:
        copies: ``c``, at least 1.
        generated: ``m``.
        level: ``α``.

    Example:
        >>> held_out_needed(6, 900)
        2999
    """
    # A fraction of integers: 900 / (0.05 * 6) in floating point is a little more than 3000.
    return max(1, -(-generated * 10**6 // (round(level * 10**6) * copies)) - 1)


def _checked(scores: Tensor, name: str) -> int:
    if scores.ndim != 1 or not len(scores) or bool(scores.isnan().any()):
        found = f"shape {tuple(scores.shape)}" if scores.ndim != 1 or not len(scores) else "NaN among them"
        raise ValueError(f"Argument `{name}` expected one score for each of at least one image, but got {found}.")
    return len(scores)
