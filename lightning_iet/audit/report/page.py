"""``report.html``: one file that is complete in itself."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from lightning_iet.audit.core import Audit
from lightning_iet.audit.findings import Findings
from lightning_iet.audit.report.gallery import cards, duplicate_groups, originals
from lightning_iet.audit.report.gap import membership_section
from lightning_iet.audit.report.histogram import LEFT, RIGHT, chart
from lightning_iet.audit.report.limits import limits
from lightning_iet.audit.report.thumbnails import PIXELATED
from lightning_iet.audit.statistics import Share
from lightning_iet.audit.table import rows
from lightning_iet.audit.verdict import percent, verdict
from lightning_iet.data.decoding import RULES
from lightning_iet.functional.memorization import count_below

__all__ = ["render_page"]

SKIPS = 200  # images that could not be read, of each set
LABELS = {"generated": "generated images", "held_out": "held-out images", "train": "training images"}
MEASURES = {
    "distinct": ("Nearest over next, near-duplicates counted once", "d1/d2 of distances; our choice"),
    "nearest": ("Nearest over second nearest", "d1/d2 of distances; Yoon et al. 2023, Gu et al. 2023"),
    "mean": ("Nearest over the mean of the {k} nearest", "squared distances; memorized quantity, Liu et al. 2024"),
}
SECTIONS = (
    ("how-many", "How many"),
    ("which", "Which images"),
    ("most-copied", "Copied most"),
    ("duplicates", "Duplicates"),
    ("membership", "Membership"),
    ("figures", "All figures"),
    ("how", "How measured"),
    ("limits", "Limits"),
)


def render_page(audit: Audit, findings: Findings, *, pairs: int) -> str:
    """Write the report of an audit.

    Every name is escaped, and what the page may do is fixed by a content security policy: it loads nothing, and runs
    no script but its own.

    Args:
        audit: what was found.
        findings: its figures.
        pairs: generated images to show, for each measure those with the lowest ratios.

    Returns:
        HTML.
    """
    css, js = _resource("report.css"), _resource("report.js")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_resource("report.html.j2"))
    stops = sorted({step / 100 for step in range(101)} | {audit.settings.ratio})
    ratios = {name: copies.ratios for name, copies in audit.copies.items()}
    measures = list(ratios["generated"])
    defaults = {name: stops.index(0.15 if name == "mean" else audit.settings.ratio) for name in measures}
    return template.render(
        css=Markup(css),  # noqa: S704 (our own files)
        js=Markup(js),  # noqa: S704
        policy=_policy(css, js),
        verdict=verdict(findings),
        rates=_rates(findings),
        sections=[section for section in SECTIONS if section[0] != "membership" or findings.membership],
        measures=[_measure(name, defaults[name], audit.settings.k) for name in measures],
        stops=stops,
        counts=_counts(findings),
        charts=[_chart(name, ratios, stops[defaults[name]], audit.settings.k) for name in measures],
        held_out=findings.held_out,
        cards=cards(audit, pairs=pairs),
        any_below=findings.generated.copies.count > 0,
        pixelated=max(audit.sets["train"].pixels.shape[2:]) <= PIXELATED,
        originals=originals(audit),
        originals_found=f"{findings.originals:,}",
        originals_total=findings.originals,
        duplicates=duplicate_groups(audit, findings),
        membership=membership_section(findings.membership),
        table=rows(findings),
        sets=[_set(findings, name) for name in audit.sets],
        settings=_settings(findings),
        rules=RULES,
        limits=limits(findings),
        version=findings.versions["lightning-iet"],
        data=_data(ratios, stops, defaults),
    )


def _resource(name: str) -> str:
    return (files("lightning_iet.audit.report") / name).read_text(encoding="utf-8")


def _policy(css: str, js: str) -> str:
    style, script = (b64encode(sha256(text.encode()).digest()).decode() for text in (css, js))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _data(
    ratios: Mapping[str, Mapping[str, Tensor]], stops: Sequence[float], defaults: dict[str, int]
) -> dict[str, Any]:
    sets = {
        name: {
            "total": len(next(iter(by_measure.values()))),
            "below": {measure: count_below(values, stops).tolist() for measure, values in by_measure.items()},
        }
        for name, by_measure in ratios.items()
    }
    return {"stops": stops, "defaults": defaults, "sets": sets, "left": LEFT, "width": RIGHT - LEFT}


def _rates(findings: Findings) -> list[dict[str, Any]]:
    shares = {"generated": findings.generated.copies}
    if findings.held_out is not None:
        shares["held_out"] = findings.held_out.copies
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
    }


def _measure(name: str, default: int, k: int) -> dict[str, Any]:
    title, source = MEASURES[name]
    return {"name": name, "title": title.format(k=k), "source": source, "default": default}


def _counts(findings: Findings) -> list[dict[str, str]]:
    return [
        {**rate, "name": name, "label": LABELS[name]}
        for rate, name in zip(_rates(findings), ("generated", "held_out"), strict=False)
    ]


def _chart(measure: str, ratios: Mapping[str, Mapping[str, Tensor]], threshold: float, k: int) -> dict[str, Any]:
    values = {name: by_measure[measure] for name, by_measure in ratios.items()}
    return chart(measure, MEASURES[measure][0].format(k=k).lower(), values, threshold=threshold)


def _set(findings: Findings, name: str) -> dict[str, Any]:
    facts = findings.sets[name]
    return {
        "title": LABELS[name].capitalize(),
        "location": facts.location,
        "found": f"{facts.found:,}",
        "used": f"{facts.used:,}",
        "size": f"{facts.width} × {facts.height} pixels, {'grey' if facts.channels == 1 else 'RGB'}",
        "sha256": facts.sha256,
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
