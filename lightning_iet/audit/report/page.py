"""The report of an audit: ``report.html``, one file that is complete in itself, and the files beside it."""

import re
from base64 import b64encode
from calendar import month_name
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from io import BytesIO
from math import floor, log10
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import resize, to_pil_image

from lightning_iet.audit.core import Audit, Copies, most_copied
from lightning_iet.audit.disguises import undo
from lightning_iet.audit.evidence import relative_ratios
from lightning_iet.audit.features import PIXELS
from lightning_iet.audit.findings import Findings, counted_as_copies, without_doubted
from lightning_iet.audit.pairs import write_pairs
from lightning_iet.audit.statistics import Share, share
from lightning_iet.audit.verdict import (
    counted,
    difference_sentences,
    limits_words,
    membership_words,
    named_above,
    not_counted,
    not_looked_for,
    remarks,
    reviewed,
    rows,
    said_once,
    verdict,
)
from lightning_iet.data.decoding import RULES
from lightning_iet.evaluation.membership import Membership, TimestepGap
from lightning_iet.functional.memorization import count_below
from lightning_iet.plots import BINS, nearest_pairs, ratio_histogram, save_figure, shares
from lightning_iet.utilities.files import (
    METRICS,
    PAIRS,
    PAIRS_PICTURE,
    RATIOS_PICTURE,
    REPORT,
    printable,
    write_json,
)
from lightning_iet.utilities.pages import page_template, read_resource, stylesheet
from lightning_iet.utilities.text import percent

_PACKAGE = "lightning_iet.audit.report"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 330, 100, 880, 14, 292  # of a chart
_FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}


def limits(findings: Findings) -> list[str]:
    """List what a reader must not conclude.

    Args:
        findings: the figures; what they leave open depends on the settings.
    """
    settings = findings.settings
    found = [
        "These are the images that were drawn, not all that the generator can draw. The interval speaks of further "
        "images drawn in the same way; other prompts, guidance or samplers may bring out other copies.",
        "A training image that no generated image resembles may still be memorized.",
    ]
    found.append(
        "Only copies of the kinds that were planted and found are ruled out. A copy of a part of an image, or one that "
        "was drawn anew with small changes everywhere, may go unseen."
    )
    if settings["features"] != PIXELS:
        found.append(
            "Distances between features find what the network was trained to see. Small details, such as a face or a "
            "text in the background, may be copied unnoticed."
        )
    if findings.held_out is None:
        found.append(
            "There are no held-out images to compare with, so that nobody can tell a copy from a data set of low "
            "variety, where everything is near to everything."
        )
    else:
        found.append(
            "Held-out images serve as a control only if they come from the same source as the training images and "
            "have no duplicates among them."
        )
        if findings.held_out.identical:
            found.append(
                f"{findings.held_out.identical:,} of the held-out images equal a training image in every pixel. They "
                "are no control: the share of copies among held-out images is too high by them."
            )
    if findings.membership is not None:
        found.append(
            "Membership is inferred from the loss alone, a weak attack: where it fails, a strong one may succeed. It "
            "proves nothing if held-out images come from another source than the training images."
        )
    if findings.duplicates is None:
        found.append("Near-duplicates inside the training set were not looked for; they hide copies from d1/d2.")
    if any(facts.skipped for facts in findings.sets.values()):
        found.append("Images that could not be read were not compared. They are listed above.")
    found.append(
        "Likeness is no proof of how it came about, nor a legal judgement: look at the pairs before speaking of copies."
    )
    return found


def membership_section(membership: Membership | None) -> dict[str, Any] | None:
    """Describe what the generator's loss gives away.

    Returns:
        What the template needs, or ``None`` if losses were not measured.
    """
    if membership is None:
        return None
    rates = membership.true_positive_rates.items()
    counts = {rate: int(float(rate) * membership.held_out + 1e-9) for rate, _ in rates}
    allowed = {rate: f"{count:,} of {membership.held_out:,} held-out images" for rate, count in counts.items()}
    return {
        "words": membership_words(membership),
        "train": f"{membership.train:,}",
        "held_out": f"{membership.held_out:,}",
        "rates": [(percent(float(rate)), percent(found), allowed[rate]) for rate, found in rates],
        "chart": _gap_chart(membership.timesteps),
        "timesteps": [_row(gap) for gap in membership.timesteps],
    }


def _row(gap: TimestepGap) -> list[str]:
    figures = (gap.train, gap.held_out, gap.gap, gap.low, gap.high)
    return [str(gap.timestep), *(f"{figure:.4g}" for figure in figures)]


def _gap_chart(gaps: Sequence[TimestepGap]) -> dict[str, Any]:
    """Work out the gap and its band as paths of SVG, in percent of the held-out loss."""
    parts = [[100 * value / gap.held_out for value in (gap.gap, gap.low, gap.high)] for gap in gaps]
    values = [0.0, *(value for part in parts for value in part)]
    ticks = list(MaxNLocator(5, min_n_ticks=3).tick_values(min(values), max(values)))
    end = gaps[0].timestep + gaps[-1].timestep  # timesteps are the middles of equal parts of 0 ... end

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - ticks[0]) / (ticks[-1] - ticks[0]), 1)

    def x(timestep: float) -> float:
        return _x(timestep / max(end, 1))

    line, low, high = (
        [f"{x(gap.timestep)} {y(part[which])}" for gap, part in zip(gaps, parts, strict=True)] for which in range(3)
    )
    apart = sum(part[1] > 0 for part in parts)
    return _FRAME | {
        "text": f"Gap between held-out and training loss over the timesteps, in percent of the held-out loss. At "
        f"{apart} of {len(gaps)} timesteps the 95 percent interval lies above zero.",
        "rows": [(y(tick), f"{tick:g}\u00a0%", tick == 0) for tick in ticks],
        "columns": [(x(tick), f"{tick:g}") for tick in MaxNLocator(6).tick_values(0, max(end, 1)) if 0 <= tick <= end],
        "band": "M" + "L".join(high + low[::-1]) + "Z",
        "line": "M" + "L".join(line if len(line) > 1 else line * 2),
    }


ORIGINALS, GROUPS, STRIP = 24, 24, 6  # training images copied most, groups of duplicates, images in a row


def cards(audit: Audit, findings: Findings, *, pairs: int, images: bool) -> list[dict[str, Any]]:
    """Describe the generated images that are nearest to a training image, and those that are by another measure.

    Args:
        audit: what was found.
        findings: its figures.
        pairs: images for each measure.
        images: whether images are shown.

    Returns:
        What the template needs of each pair, in the order of ``pairs.csv``.
    """
    copies = audit.copies["generated"]
    order = torch.tensor([row["index"] for row in findings.pairs], dtype=torch.int64)
    lowest = [values.sort(stable=True).indices[:pairs] for values in copies.ratios.values()]
    chosen = set(torch.cat([order[:pairs], *lowest]).tolist())
    rows = [row for row in findings.pairs if row["index"] in chosen]
    places = torch.tensor([row["index"] for row in rows], dtype=torch.int64)
    sources, maps = copies.sources[places], copies.maps[places]
    generated, train = audit.sets["generated"].pixels[places], audit.sets["train"].pixels[sources]
    undone, _ = undo(generated, train, maps)
    return [
        _card(audit, row, *pixels, images=images) for row, *pixels in zip(rows, generated, train, undone, strict=True)
    ]


def _card(
    audit: Audit, row: Mapping[str, Any], generated: Tensor, train: Tensor, undone: Tensor, *, images: bool
) -> dict[str, Any]:
    copies, index = audit.copies["generated"], row["index"]
    part = float(parts_of_limits(audit, copies)[index])
    remarks = ["identical" if row["identical"] else SEARCH_WORDS[row["search"]]]
    beyond = row["beyond_held_out"] == 1
    if row["noise"] not in ("", float("inf")):
        remarks.append(f"{row['noise']:.0f}\u00a0dB")
    pictures = {}
    if images:
        difference = (generated.int() - undone.int()).abs().to(torch.uint8)
        pixels = {"image": generated, "train_image": train, "undone": undone, "difference": difference}
        pictures = {name: data_uri(picture) for name, picture in pixels.items()}
    return {
        "index": index,
        "train_index": row["source_index"],
        "name": row["name"],
        "train": row["source"],
        "sha256": row["sha256"],
        "source_sha256": row["source_sha256"],
        "pictures": pictures,
        "distance": float(copies.distances[index]),
        "ratios": {"score": part} | {name: float(values[index]) for name, values in copies.ratios.items()},
        "ratio": part,
        "named": bool(row["named"]),
        "beyond": f"nearer than any of {audit.evidence.held_out_judged:,} held-out images" if beyond else "",
        "remark": ", ".join(remarks),
    }


def parts_of_limits(audit: Audit, copies: Copies) -> Tensor:
    """Return of each image the lowest ratio of all searches as a part of the search's limit, at most 3.

    Args:
        audit: the limits are those of its evidence.
        copies: what the searches found.

    Returns:
        Shape ``(Q,)``; exactly those that are noticed lie below 1. Images of one colour never are.
    """
    parts = relative_ratios(copies.search_ratios, audit.evidence.noticed_below).amin(dim=1).clamp(max=PARTS_END)
    return parts.masked_fill(copies.blank, PARTS_END)


def originals(audit: Audit, *, images: bool) -> list[dict[str, Any]]:
    """Describe the training images with the most copies, each before the first of its copies."""
    generated, train, copies = audit.sets["generated"], audit.sets["train"], audit.copies["generated"]
    found = most_copied(copies.sources, counted_as_copies(audit))[:ORIGINALS]
    described = []
    for index, places in found:
        shown = [_image(train.pixels[index], f"Training image {printable(train.names[index])}", images=images)]
        shown += [
            _image(generated.pixels[place], f"Generated image {printable(generated.names[place])}", images=images)
            for place in places[: STRIP - 1]
        ]
        described.append({"count": f"{len(places):,}", "name": printable(train.names[index]), "images": shown})
    return described


def duplicate_groups(audit: Audit, findings: Findings, *, images: bool) -> dict[str, Any] | None:
    """Describe the largest groups of near-duplicates inside the training set.

    Returns:
        What the template needs, or ``None`` if they were not looked for.
    """
    if audit.duplicates is None or findings.duplicates is None:
        return None
    train, facts = audit.sets["train"], findings.duplicates
    summary = (
        f"{facts.images:,} of {facts.among_train.total:,} training images ({percent(facts.among_train.share)}) have a "
        f"near-duplicate, in {facts.groups_found:,} {'group' if facts.groups_found == 1 else 'groups'}."
    )
    if facts.features != audit.features.name:
        summary += f" They were looked for in {facts.features}: {audit.features.name} tells classes apart, not images."
    if facts.among_copied is not None:
        summary += (
            " Of the images that are named as copies, or pass for copies by the published measure, "
            f"{percent(facts.among_copied.share)} are copies of such images."
        )
    return {
        "summary": summary,
        "groups_found": facts.groups_found,
        "groups": [
            _group(train.pixels, train.names, group, images=images) for group in audit.duplicates.members[:GROUPS]
        ],
    }


def _group(pixels: Tensor, names: Sequence[str], group: list[int], *, images: bool) -> dict[str, Any]:
    shown = group[:STRIP]
    listed = ", ".join(printable(names[index]) for index in shown)
    return {
        "count": f"{len(group):,}",
        "names": listed if len(shown) == len(group) else f"{listed}, …",
        "images": [
            _image(pixels[index], f"Training image {printable(names[index])}", images=images) for index in shown
        ],
    }


def _image(pixels: Tensor, text: str, *, images: bool) -> dict[str, str]:
    return {"data": data_uri(pixels, largest=128) if images else "", "text": text}


SKIPS = 200  # images that could not be read, of each set
LABELS = {"generated": "generated images", "held_out": "held-out images", "train": "training images"}
SEARCH_WORDS = {
    "plain": "as it is",
    "recoloured": "mirrored, turned by right angles or recoloured",
    "degraded": "blurred or noisy",
    "moved": "moved",
}
OF_LIMIT = "ratio ÷ limit"
"""What is shown of an image: the lowest ratio of all searches, divided by the search's limit."""
MEASURES = {
    "score": (
        "Lowest ratio of all searches, divided by the search's limit",
        "below 1 an image is noticed, alone; our choice",
    ),
    "distinct": ("Nearest over next, near-duplicates counted once", "d1/d2 of distances; our choice"),
    "nearest": ("Nearest over second nearest", "d1/d2 of distances; Yoon et al. 2023, Gu et al. 2023"),
    "mean": ("Nearest over the mean of the {k} nearest", "squared distances; memorized quantity, Liu et al. 2024"),
}
PARTS_END = 3.0  # parts of a limit are shown up to it
SECTIONS = (
    ("how-many", "How many"),
    ("which", "Which images"),
    ("checks", "Checks"),
    ("most-copied", "Copied most"),
    ("duplicates", "Duplicates"),
    ("membership", "Membership"),
    ("figures", "All figures"),
    ("how", "How measured"),
    ("limits", "Limits"),
)


def render_page(audit: Audit, findings: Findings, *, pairs: int, images: bool = True) -> str:
    """Write the report of an audit.

    Every name is escaped, and what the page may do is fixed by a content security policy: it loads nothing, and runs
    no script but its own.

    Args:
        audit: what was found.
        findings: its figures.
        pairs: generated images to show, for each measure those with the lowest ratios.
        images: whether images are shown, rather than names and figures only.
    """
    audit = without_doubted(audit, findings)
    css, js = stylesheet(_PACKAGE), read_resource(_PACKAGE, "report.js")
    template = page_template(_PACKAGE, breakable=breakable, whole_options=whole_options)
    ratios = {name: {"score": parts_of_limits(audit, copies), **copies.ratios} for name, copies in audit.copies.items()}
    measures = list(ratios["generated"])
    stops = {name: sorted({step / 100 for step in range(101)} | {audit.settings.ratio}) for name in measures}
    stops["score"] = [step / 50 for step in range(round(50 * PARTS_END) + 1)]
    thresholds = {"score": 1.0, "mean": 0.15}
    defaults = {name: stops[name].index(thresholds.get(name, audit.settings.ratio)) for name in measures}
    absent = set() if findings.membership else {"membership"}
    absent |= set() if _several_copies(findings) else {"most-copied"}
    shown = cards(audit, findings, pairs=pairs, images=images)
    return template.render(
        css=Markup(css),  # noqa: S704 (our own files)
        js=Markup(js),  # noqa: S704
        policy=_policy(css, js),
        findings=findings,
        date=_date(findings.date),
        verdict=verdict(findings),
        rates=_rates(findings),
        shows_named=_shows_named(findings),
        sections=[section for section in SECTIONS if section[0] not in absent],
        measures=[_measure(name, defaults[name], audit.settings.k) for name in measures],
        stops=stops[measures[0]],
        parts_end=PARTS_END,
        counts=_counts(ratios, thresholds["score"]),
        charts=[_ratio_chart(name, ratios, stops[name][defaults[name]], audit.settings.k) for name in measures],
        held_out=findings.held_out,
        cards=shown,
        limits=limits(findings),
        noticed_below=limits_words(findings),
        apart=counts_apart(findings),
        any_below=any(card["ratio"] < 1 or card["named"] for card in shown) and not audit.evidence.decided_by_scan,
        images=images,
        pixelated=max(audit.sets["train"].pixels.shape[2:]) <= PIXELATED,
        originals=originals(audit, images=images) if _several_copies(findings) else [],
        originals_found=f"{findings.originals:,}",
        originals_total=findings.originals,
        duplicates=duplicate_groups(audit, findings, images=images),
        membership=membership_section(findings.membership),
        checks=_checks(findings),
        table=rows(findings),
        sets=[_set(findings, name) for name in audit.sets],
        settings=_settings(findings),
        rules=RULES,
        version=findings.versions["lightning-iet"],
        data=_data(ratios, stops, defaults)
        | {"named": counted(findings).count, "decisions": [] if audit.review is None else audit.review.as_list()},
    )


def counts_apart(findings: Findings) -> list[str]:
    """Say why the count below a threshold is another one than that of the images named.

    Returns:
        Sentences; none where no image is named, and none was dismissed.
    """
    sentences = reviewed(findings)
    count = counted(findings).count
    if count < findings.evidence.named.count:
        return [*not_counted(findings), *sentences] if count else sentences
    if count:
        named = f"the {count:,} named as copies were judged together"
        if count == 1:
            named = "the image named as a copy was judged together with all others"
        judged = f"A threshold judges each image alone; {named}, by all searches."
        sentences = [judged, *named_above(findings), *sentences]
    return sentences


def _date(stamp: str) -> str:
    """Write a time in UTC for people.

    Example:
        >>> _date("2026-03-01T09:05:00+00:00")
        '1 March 2026, 09:05 UTC'
    """
    time = datetime.fromisoformat(stamp)
    return f"{time.day} {month_name[time.month]} {time:%Y, %H:%M} UTC"


def _several_copies(findings: Findings) -> bool:
    """Tell whether some training image has more than one copy: a list of single copies says nothing."""
    return any(image.count > 1 for image in findings.most_copied)


def _checks(findings: Findings) -> dict[str, Any]:
    """Describe the positive control, the comparison of the sets, and the tests."""
    evidence, scan = findings.evidence, findings.evidence.scan
    tests = []
    if scan is not None:
        chance = f"p = {scan.p_value:.4f}" if scan.p_value >= 1e-4 else "p < 0.0001"
        where = "" if scan.threshold != scan.threshold else f", below {scan.threshold:.2f}"
        tests.append(
            f"Does the generator copy? Scan of all thresholds up to 0.5 of each search: {chance}, with "
            f"allowance for the number of searches ({scan.generated:,} generated and {scan.held_out:,} held-out images"
            f"{where}, {evidence.scan_search} search)."
        )
        tests.append(
            f"Which images are copies? {evidence.discovered:,} are named by conformal p-values and the procedure of "
            f"Benjamini and Hochberg at a level of {percent(evidence.false_finds)}. Each p-value is exact; that on "
            "average no larger share of such finds is false was measured in simulations, not proved."
        )
        if counted(findings) != evidence.named:
            tests[-1] += " Here the comparison is doubted: of these only sure copies count."
    tests.append(
        f"{evidence.sure - evidence.sure_by_review:,} are sure copies: equal to a training image, or nearly so once "
        "the disguise is undone, and far nearer than held-out images."
    )
    if evidence.sure_by_review:
        tests.append(f"{evidence.sure_by_review:,} more are copies since a person has confirmed them (--review).")
    if evidence.held_out_needed:
        tests.append(
            f"About {evidence.held_out_needed:,} held-out images would decide on the images that were noticed."
        )
    return {
        "planted": [
            (part.kind, f"{part.found:,} of {part.planted:,}", percent(part.least)) for part in findings.planted
        ],
        "not_looked_for": not_looked_for(findings),
        "tests": tests,
        "differences": said_once(difference_sentences(part) for part in findings.differences),
    }


def breakable(name: str) -> Markup:
    """Let a long name wrap after what joins its words, rather than within one.

    Example:
        >>> breakable("some_long-name.png")
        Markup('some_<wbr>long-<wbr>name.<wbr>png')
    """
    return Markup(re.sub(r"([_\-./ ,])(?=.)", r"\1<wbr>", str(escape(name))))  # noqa: S704 (escaped before)


def whole_options(text: str) -> Markup:
    """Keep the name of an option on one line.

    Example:
        >>> whole_options("Say so with --image-size.")
        Markup('Say so with <span class="option">--image-size</span>.')
    """
    option = r"(?<![\w-])(--[a-z][a-z-]*)"
    return Markup(re.sub(option, r'<span class="option">\1</span>', str(escape(text))))  # noqa: S704 (escaped before)


def _policy(css: str, js: str) -> str:
    style, script = (b64encode(sha256(text.encode()).digest()).decode() for text in (css, js))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _data(
    ratios: Mapping[str, Mapping[str, Tensor]], stops: Mapping[str, Sequence[float]], defaults: dict[str, int]
) -> dict[str, Any]:
    sets = {
        name: {
            "total": len(next(iter(by_measure.values()))),
            "below": {measure: count_below(values, stops[measure]).tolist() for measure, values in by_measure.items()},
        }
        for name, by_measure in ratios.items()
    }
    return {"stops": stops, "defaults": defaults, "sets": sets, "left": LEFT, "width": RIGHT - LEFT}


def _shows_named(findings: Findings) -> bool:
    """Whether the head of the page counts the images that are named and counted; else those that are noticed."""
    return counted(findings).count > 0


def _rates(findings: Findings) -> list[dict[str, Any]]:
    evidence = findings.evidence
    shares = {"generated": counted(findings) if _shows_named(findings) else evidence.noticed}
    is_doubted = _shows_named(findings) and counted(findings) != evidence.named
    if findings.held_out is not None and evidence.held_out_judged and not is_doubted:
        total = findings.held_out.copies.total
        held_out = (evidence.held_out_noticed, total)
        if _shows_named(findings):  # counted among those that are judged: of more than one colour, equal ones once
            held_out = (evidence.held_out_alike, evidence.held_out_judged)
        shares["held_out"] = share(*(count or 0 for count in held_out))
    widest = max(part.high for part in shares.values())
    return [_rate(name, part, widest) for name, part in shares.items()]


def _rate(name: str, part: Share, widest: float) -> dict[str, Any]:
    ends = {"x": part.share, "x_low": part.low, "x_high": part.high}
    positions = {name: round(300 * value / widest, 1) for name, value in ends.items()}
    return positions | {
        "kind": "generated" if name == "generated" else "control",
        "label": LABELS[name].capitalize(),
        "share": percent(part.share),
        "count": f"{part.count:,}",
        "total": f"{part.total:,}",
        "low": percent(part.low),
        "high": percent(part.high),
        "end": percent(widest),
    }


def _counts(ratios: Mapping[str, Mapping[str, Tensor]], limit: float) -> list[dict[str, str]]:
    counts = []
    for name, by_measure in ratios.items():
        total = len(by_measure["score"])
        count = int(count_below(by_measure["score"], (limit,)))
        kind = "generated" if name == "generated" else "control"
        figures = {"count": f"{count:,}", "total": f"{total:,}", "share": percent(count / total)}
        counts.append({"name": name, "kind": kind, "label": LABELS[name], **figures})
    return counts


def _measure(name: str, default: int, k: int) -> dict[str, Any]:
    title, source = MEASURES[name]
    short = OF_LIMIT if name == "score" else "ratio"
    return {"name": name, "title": title.format(k=k), "short": short, "source": source, "default": default}


def _set(findings: Findings, name: str) -> dict[str, Any]:
    facts = findings.sets[name]
    return {
        "title": LABELS[name].capitalize(),
        "location": facts.location,
        "found": f"{facts.found:,}",
        "used": f"{facts.used:,}",
        "size": f"{facts.width} × {facts.height} pixels, {'grey' if facts.channels == 1 else 'RGB'}",
        "sha256": facts.sha256,
        "remarks": remarks(facts),
        "stored": ", ".join(f"{count:,} {kind}" for kind, count in facts.origin.kinds.items()),
        "unread": f"{len(facts.skipped):,}" if facts.skipped else "",
        "skipped": facts.skipped[:SKIPS],
        "more": len(facts.skipped[SKIPS:]),
    }


def _settings(findings: Findings) -> list[tuple[str, str]]:
    software = ", ".join(f"{name} {version}" for name, version in findings.versions.items())
    chosen = [(name.replace("_", " "), _word(value)) for name, value in findings.settings.items() if value != ""]
    return [*chosen, ("software", software)]


def _word(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- charts and thumbnails --------------------------------------------------------------------------------------------


def _ratio_chart(measure: str, ratios: Mapping[str, Mapping[str, Tensor]], threshold: float, k: int) -> dict[str, Any]:
    """Work out a histogram as paths of SVG, with a logarithmic scale upwards; what lies beyond is in the last step."""
    end = PARTS_END if measure == "score" else 1.0
    title = MEASURES[measure][0].format(k=k).lower()
    of_sets = {name: by_measure[measure] for name, by_measure in ratios.items()}
    lowest = floor(log10(1 / max(map(len, of_sets.values()))))

    def height(share: float) -> float:
        if share <= 0:
            return BOTTOM
        return round(BOTTOM - (BOTTOM - TOP) * (log10(share) - lowest + 0.15) / (0.15 - lowest), 1)

    heights = {name: [height(share) for share in shares(values / end).tolist()] for name, values in of_sets.items()}
    below = {name: float((values < threshold).double().mean()) for name, values in of_sets.items()}
    words = ", ".join(f"{name.replace('_', '-')} images {100 * value:.2g} percent" for name, value in below.items())
    return _FRAME | {
        "measure": measure,
        "text": f"Histogram of {title}. Below the threshold of {threshold:.2f}: {words}.",
        "rows": [(height(10.0**decade), f"{10.0 ** (decade + 2):g}\u00a0%") for decade in range(lowest, 1)],
        "columns": [(_x(tick / 5), f"{end * tick / 5:.1f}") for tick in range(6)],
        "bars": _bars(heights["generated"]),
        "steps": _steps(heights["held_out"]) if "held_out" in heights else "",
        "threshold": _x(threshold / end),
    }


def _x(value: float) -> float:
    return round(LEFT + value * (RIGHT - LEFT), 1)


_EDGES = [_x(step / BINS) for step in range(BINS + 1)]


def _bars(heights: list[float]) -> str:
    places = zip(_EDGES, _EDGES[1:], heights, strict=False)
    return "".join(f"M{a} {BOTTOM}V{y}H{b}V{BOTTOM}Z" for a, b, y in places if y < BOTTOM)


def _steps(heights: list[float]) -> str:
    steps = "".join(f"V{y}H{b}" for b, y in zip(_EDGES[1:], heights, strict=True))
    return f"M{_EDGES[0]} {BOTTOM}{steps}V{BOTTOM}"


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


# --- the files --------------------------------------------------------------------------------------------------------

DRAWN = 16  # pairs in the picture
TITLE = (
    "Generated images that are the most like a training image\n"
    f"{OF_LIMIT}, as in report.html: below 1 an image is noticed, {PARTS_END:g} stands for more; "
    "in colour: named or noticed"
)
READING = (
    "The further left, the more an image looks like one training image and like no other. Left of the dashed line it "
    "is noticed. Copies are where generated images reach further left than held-out ones, which nobody copied."
)
LABEL = (
    f"{OF_LIMIT}, as in report.html: the lowest of all searches; last step: {PARTS_END:g} and more\n"
    "ratio: distance to the nearest over that to the next training image"
)


def write_report(audit: Audit, findings: Findings, folder: Path, *, pairs: int = 100, images: bool = True) -> None:
    """Write ``report.html``, ``pairs.csv``, ``metrics.json``, ``ratios.png`` and, with images, ``pairs.png``.

    Args:
        audit: what was found.
        findings: its figures.
        folder: an empty folder.
        pairs: generated images that the page shows.
        images: whether the page shows images, rather than names and figures only.
    """
    write_json(folder / METRICS, findings.as_dict())
    write_pairs(findings.pairs, folder / PAIRS)
    (folder / REPORT).write_text(render_page(audit, findings, pairs=pairs, images=images), encoding="utf-8")
    if images:
        save_figure(_nearest(audit, findings), folder / PAIRS_PICTURE)
    by_set = {name: parts_of_limits(audit, found) for name, found in audit.copies.items()}
    reading = READING if "held_out" in by_set else READING.rpartition(" Copies")[0]
    figure = ratio_histogram(by_set, threshold=1.0, label=LABEL, end=PARTS_END, title=reading)
    save_figure(figure, folder / RATIOS_PICTURE)


def _nearest(audit: Audit, findings: Findings) -> Figure:
    rows = findings.pairs[:DRAWN]
    places, sources = ([row[name] for row in rows] for name in ("index", "source_index"))
    return nearest_pairs(
        shrink(audit.sets["generated"].pixels[places], 192) / 255,
        shrink(audit.sets["train"].pixels[sources], 192) / 255,
        parts_of_limits(audit, audit.copies["generated"])[places].tolist(),
        [row["source"] for row in rows],
        marked=[bool(row["named"] or row["noticed"]) for row in rows],
        label=OF_LIMIT,
        title=TITLE,
    )
