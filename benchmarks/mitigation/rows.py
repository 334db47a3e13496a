"""The methods that are compared: the rows of the tables."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One way of training.

    Attributes:
        name: in files, and on the command line.
        label: in tables and pictures.
        num_shards: shards; 1 = none.
        round_epochs: epochs between two averagings; ``None`` = the setting's.
        threshold: of anti-gradient control; 0 = off.
        reference: whose losses its bank holds.
        reference_every: steps between two looks at unseen images; ``None`` = the package's default.
        num_anchors: unseen images that feed the bank, of the setting's ``num_unseen``; 0 = none are read.
        dropout: in the U-Net.
        flip: whether training images are mirrored at random.
        width: share of the U-Net's channels.
        with_unseen: whether the unseen images, which other rows leave out, are trained on.
        train_factor: times the setting's number of training images.
        epsilon: that DP-SGD may spend until its end; 0 = ordinary training.
        agc: further options of anti-gradient control, as pairs of name and value.
        exchange: how samples move between shards: ``"most_skipped"``, ``"random"``, or ``""`` = not at all.
        max_magnitude: of threshold-aware augmentation; 0 = off.
        deduplicated: share of the near-duplicates in an uneven training set that are removed before training, by one
            who knows them all.
        drops_found: whether those near-duplicates are removed that the package finds, as by ``--data.duplicates drop``.
        times_as_long: as the setting's lengths; for rows whose quality still rises fast at their end.
        randaugment: share of draws that RandAugment changes, and its magnitude, without regard to any threshold.
        only: the settings' sources that the row is for; empty = all.
    """

    name: str
    label: str
    num_shards: int = 1
    round_epochs: int | None = None
    threshold: float = 0.0
    reference: str = "train"
    reference_every: int | None = None
    num_anchors: int = 0
    dropout: float = 0.0
    flip: bool = False
    width: float = 1.0
    with_unseen: bool = False
    train_factor: float = 1
    epsilon: float = 0.0
    agc: tuple[tuple[str, Any], ...] = ()
    exchange: str = ""
    max_magnitude: int = 0
    deduplicated: float = 0.0
    drops_found: bool = False
    randaugment: tuple[float, int] = (0.0, 0)
    times_as_long: int = 1
    only: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is the training that others are compared with."""
        return self.name.startswith("plain") and not self.with_unseen

    @property
    def rival(self) -> str:
        """Name of the plain row on as many images."""
        return "plain" if self.train_factor == 1 else f"plain_x{self.train_factor:g}"


_UNEVEN = ("uneven",)  # no data source: these rows belong to the settings that name them
_RECORD: dict[str, Any] = {"threshold": 1.0, "only": _UNEVEN}
_UNSEEN: dict[str, Any] = {"reference": "held_out", "num_anchors": 64}


def _options(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


_BELOW_UNSEEN: dict[str, Any] = {
    "agc": _options(criterion="record", eta=0.2, z0=1.0, weigh="draws"), **_RECORD, **_UNSEEN,
}  # fmt: skip
_DIGITS: dict[str, Any] = {"only": ("digits",)}
_ANCHORED: dict[str, Any] = {"threshold": 0.5, "reference": "held_out"}
_IET_AGC: dict[str, Any] = {"num_shards": 4, "threshold": 0.5}

ROWS = (
    Row("plain", "plain"),
    Row("plain_with_unseen", "plain, also on the 64 unseen", with_unseen=True),
    Row("dropout_flips", "dropout 0.1 and flips", dropout=0.1, flip=True),
    Row("half_width", "a quarter of the parameters", width=0.5),
    Row("iet_4", "IET, K = 4", num_shards=4),
    *(Row(f"agc_{value:g}", f"AGC {value:g}", threshold=value) for value in (0.3, 0.5, 0.7, 0.9)),
    *(Row(f"iet_agc_{k}", f"IET-AGC, K = {k}", num_shards=k, threshold=0.5) for k in (2, 4)),
    Row("iet_agc_10", "IET-AGC, K = 10, batches of 5", num_shards=10, threshold=0.5),
    *(Row(f"anchored_{n}", f"anchored AGC, {n} unseen", num_anchors=n, **_ANCHORED) for n in (16, 64)),
    Row(
        "anchored_often", "anchored AGC, 64 unseen, every 2nd step",
        num_anchors=64, reference_every=2, **_ANCHORED, **_DIGITS,
    ),
    Row(
        "anchored_strict", "anchored AGC 0.9, 64 unseen",
        num_anchors=64, **(_ANCHORED | {"threshold": 0.9}), **_DIGITS,
    ),
    Row("iet_anchored", "IET + anchored on other shards", num_shards=4, threshold=0.5, reference="other_shards"),
    # For uneven training sets: near-duplicates removed, and AGC by a sample's own record.
    Row("deduplicated", "near-duplicates removed first", deduplicated=1.0, only=_UNEVEN),
    Row("found", "near-duplicates that `drop` finds removed", drops_found=True, only=_UNEVEN),
    Row("half_deduplicated", "half of the near-duplicates removed", deduplicated=0.5, only=_UNEVEN),
    Row("agc_0.8", "AGC 0.8, published", threshold=0.8, only=_UNEVEN),
    *(
        Row(name, f"AGC by {what}, 64 unseen", agc=_options(criterion=criterion, z0=z0), **_RECORD, **_UNSEEN)
        for name, what, criterion, z0 in (
            ("quantile", "quantile", "quantile", 1.64),
            ("record_1", "record, z0 = 1", "record", 1.0),
            ("record_0.5", "record, z0 = 0.5", "record", 0.5),
        )
    ),
    Row("record_median", "AGC by record, 0.3 below the median", agc=_options(criterion="record", delta=0.3), **_RECORD),
    *(
        Row(name, f"AGC by record, weights {eta:g}", agc=_options(criterion="record", eta=eta), **_RECORD)
        for name, eta in (("record_weights", 0.03), ("record_weights_0.1", 0.1))
    ),
    Row(
        "record_draws", "AGC by record, drawn by weight 0.03",
        agc=_options(criterion="record", eta=0.03, weigh="draws"), **_RECORD,
    ),
    # Weights that fall only below a limit: images that are merely easy keep theirs.
    Row(
        "record_draws_below", "AGC by record, drawn by weight 0.1, 0.3 below the median",
        agc=_options(criterion="record", eta=0.1, delta=0.3, weigh="draws"), **_RECORD,
    ),
    Row("record_draws_unseen", "AGC by record, drawn by weight 0.2, z0 = 1, 64 unseen", **_BELOW_UNSEEN),
    Row(
        "record_draws_strict", "AGC by record, drawn by weight 0.1, z0 = 0.5, 64 unseen",
        agc=_options(criterion="record", eta=0.1, z0=0.5, weigh="draws"), **_RECORD, **_UNSEEN,
    ),
    Row(
        "found_record_draws_unseen", "what `drop` finds removed, then drawn by weight, 64 unseen",
        drops_found=True, **_BELOW_UNSEEN,
    ),
    Row(
        "half_deduplicated_record_weights", "half removed, then weights 0.03",
        agc=_options(criterion="record", eta=0.03), deduplicated=0.5, **_RECORD,
    ),
    # IET-AGC+ and what it must beat, on even training sets (digits) and on uneven ones (presets that name these rows).
    *(
        Row(name, f"IET-AGC, K = 4, {what}", exchange=exchange, max_magnitude=magnitude, **_IET_AGC, **_DIGITS)
        for name, what, exchange, magnitude in (
            ("iet_agc_random", "samples exchanged at random", "random", 0),
            ("iet_agc_msr", "most skipped samples exchanged", "most_skipped", 0),
            ("iet_agc_taa", "augmentation near the threshold", "", 5),
            ("iet_agc_plus", "both: IET-AGC+", "most_skipped", 5),
        )
    ),
    *(
        Row(f"{name}_twice", f"{label}, twice as long", exchange=exchange, max_magnitude=magnitude, times_as_long=2,
            **_IET_AGC, only=_UNEVEN)
        for name, label, exchange, magnitude in (
            ("iet_agc_4", "IET-AGC, K = 4", "", 0), ("iet_agc_plus", "IET-AGC+, K = 4", "most_skipped", 5),
        )
    ),
    # Of the same mean strength as the augmentation of iet_agc_taa: 12 % of its draws, at a mean magnitude of 1.9.
    # On the even digits that is so in the first quarter of a run.
    Row("randaugment", "RandAugment of 12 % of draws, magnitude 2", randaugment=(0.12, 2), **_DIGITS),
    Row("dp_sgd", "DP-SGD, ε = 10, δ = 0.001, at 1 ×", epsilon=10.0, **_DIGITS),
    # Where the methods help: rounds of other lengths, a higher threshold with shards, fewer images.
    Row("iet_agc_4_short", "IET-AGC, K = 4, rounds of 5 epochs", round_epochs=5, **_IET_AGC, **_DIGITS),
    Row("iet_agc_4_long", "IET-AGC, K = 4, rounds of 75 epochs", round_epochs=75, **_IET_AGC, **_DIGITS),
    Row("iet_agc_4_strict", "IET-AGC 0.8, K = 4", **(_IET_AGC | {"threshold": 0.8}), **_DIGITS),
    Row("plain_x0.5", "plain, half the images", train_factor=0.5, **_DIGITS),
    Row("iet_agc_4_x0.5", "IET-AGC, K = 4, half the images, batches of 6", train_factor=0.5, **_IET_AGC, **_DIGITS),
)  # fmt: skip
