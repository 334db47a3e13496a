"""The ways of fine-tuning that are compared: the rows of the tables."""

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.mitigation.rows import Row as Comparison

Mask = Literal["", "found", "random", "other"]


@dataclass(frozen=True)
class Row(Comparison):
    """One way of fine-tuning.

    Attributes:
        family: of the parameters that train; ``"searched"`` = that of the setting's search.
        mask: ``""`` = the whole family; ``"found"`` by the search on the same images; ``"random"``, as large as that;
            ``"other"`` = found on another data set.
        number: of the random mask.
        rate: its learning rate as a multiple of full fine-tuning's; 0 = that which the search found.
    """

    family: str = "all"
    mask: Mask = ""
    number: int = 0
    rate: float = 1.0

    @property
    def needs_search(self) -> bool:
        """Whether a search must come first."""
        return self.rate == 0


_UNEVEN = ("uneven",)  # no data source: these rows belong to the presets that name them
_BY_RECORD: dict[str, Any] = {
    "threshold": 1.0, "only": _UNEVEN,
    "agc": (("criterion", "record"), ("delta", 0.3), ("eta", 0.1), ("weigh", "draws")),
}  # fmt: skip

SEARCH = Row("search", "the search itself", family="searched")

ROWS = (
    Row("full", "full fine-tuning"),
    Row("deduplicated", "near-duplicates removed first, full fine-tuning", deduplicated=1.0, only=_UNEVEN),
    Row("record_draws", "AGC by record, drawn by weight, full fine-tuning", **_BY_RECORD),
    Row("attention", "attention", family="attention", rate=2),
    Row("norm", "norms", family="norm", rate=10),
    Row("bias", "biases", family="bias", rate=10),
    Row("norm_bias", "norms and biases", family="norm_bias", rate=10),
    Row("lora", "LoRA of rank 4", family="lora", rate=5),
    Row("difffit", "DiffFit", family="difffit", rate=10),
    Row("svdiff", "SV-DIFF", family="svdiff", rate=25),
    Row("whole", "the searched family whole, at the learning rate found", family="searched", rate=0),
    Row(
        "whole_iet_agc", "the same, IET-AGC, K = 2", family="searched", rate=0, threshold=0.5, num_shards=2,
    ),
    *(
        Row(f"random_{n}", f"random mask {n}", family="searched", mask="random", number=n, rate=0)
        for n in range(1, 6)
    ),
    Row("found", "the found mask", family="searched", mask="found", rate=0),
    Row("found_agc", "the found mask, AGC 0.5", family="searched", mask="found", rate=0, threshold=0.5),
    Row(
        "found_iet_agc", "the found mask, IET-AGC, K = 2",
        family="searched", mask="found", rate=0, threshold=0.5, num_shards=2,
    ),
    Row(
        "found_record_draws", "the found mask, AGC by record, drawn by weight",
        family="searched", mask="found", rate=0, **_BY_RECORD,
    ),
    Row("other", "the mask of another data set", family="searched", mask="other", rate=0),
)  # fmt: skip


def row_named(name: str) -> Row:
    """The row of that name."""
    return next(row for row in ROWS if row.name == name)
