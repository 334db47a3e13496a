"""What is pretrained, what it is fine-tuned on, and for how long; and the presets."""

from dataclasses import dataclass, replace

from benchmarks.mitigation.settings import Setting as Comparison


@dataclass(frozen=True)
class Setting(Comparison):
    """A network that is pretrained on some classes of a data set, and fine-tuned on few images of the others.

    ``stop`` is the unit of length of a fine-tuning, ``learning_rate`` that of full fine-tuning, ``patch``,
    ``channels`` and ``layers`` are the network's.

    Attributes:
        classes: that it is fine-tuned on; it is pretrained on all others.
        num_pretrain: images that it is pretrained on.
        pretrain_steps: of pretraining.
        pretrain_batch: images in its batches.
        pretrain_rate: learning rate of pretraining.
        num_trials: masks that the search tries, references on top.
        search_length: length of a trial, in units of ``stop``.
        checkpoints: how often a trial is judged.
        family: that is searched.
        search_rates: lowest and highest learning rate of the search.
        num_random: random masks to compare with the one that is found.
        transfer_from: preset whose masks are tried here; ``""`` = none.
    """

    classes: tuple[int, ...] = (8, 9)
    num_pretrain: int = 1_000
    pretrain_steps: int = 2_000
    pretrain_batch: int = 64
    pretrain_rate: float = 2e-3
    num_trials: int = 20
    search_length: float = 1.0
    checkpoints: int = 3
    family: str = "svdiff"
    search_rates: tuple[float, float] = (1e-3, 3e-2)
    num_random: int = 3
    transfer_from: str = ""

    @property
    def copies(self) -> str:
        """The figure by which a search sees memorization.

        MQ moves long before the share of copies does, but takes an image that occurs many times for many: where some
        do, it is the share of copies by d1/d2 < 1/2, whose d2 is the distance to something else.
        """
        return "copies_half" if self.is_uneven else "mq_0.15"


@dataclass(frozen=True)
class Preset:
    """Settings, seeds, and names of rows.

    Attributes:
        setting: what is compared.
        seeds: of split, training and drawing; the pretrained network is the same for all.
        rows: names of rows; ``None`` = all but those for uneven training sets.
    """

    setting: Setting
    seeds: tuple[int, ...]
    rows: tuple[str, ...] | None = None


DIGITS = Setting(
    "digits", "digits", num_train=20, batch_size=20, stop=150, num_unseen=24, num_control=80, num_selection=90,
    num_reference=140, channels=(16, 32), learning_rate=2e-3, warmup=20, ema_decay=0.98, num_samples=320,
    inference_steps=15, lengths=(0.5, 1, 2), plain_lengths=(0.25, 0.375, 0.5, 0.75, 1, 1.5, 2), family="all",
    search_rates=(1e-3, 1.6e-2), checkpoints=2, num_random=5,
)  # fmt: skip
DIGITS_UNEVEN = replace(
    DIGITS, name="digits_uneven", num_train=33, num_repeated=3, repeats=8, batch_size=19, stop=200,
    num_unseen=16, num_selection=82, num_random=3,
)  # fmt: skip
FASHION = Setting(
    "fashion_50", "fashion_mnist", num_train=50, batch_size=25, stop=400, num_unseen=50, num_control=400,
    num_selection=1_000, num_reference=2_000, patch=4, channels=(48, 48), prediction="v_prediction",
    learning_rate=2e-3, warmup=20, ema_decay=0.98, num_samples=320, inference_steps=15, classes=(8,),
    num_pretrain=10_000, lengths=(0.5, 1, 2), plain_lengths=(0.25, 0.375, 0.5, 0.75, 1, 1.5, 2), family="all",
    search_rates=(1e-3, 1.6e-2), checkpoints=2, num_random=1, transfer_from="digits",
)  # fmt: skip

_TINY = {
    "num_train": 20, "batch_size": 10, "stop": 8, "lengths": (0.5, 1), "plain_lengths": (0.5, 1), "num_control": 24,
    "num_selection": 24, "num_reference": 48, "num_unseen": 8, "num_samples": 24, "inference_steps": 2, "warmup": 2,
    "num_pretrain": 64, "pretrain_steps": 4, "pretrain_batch": 16, "num_trials": 4, "checkpoints": 2, "num_random": 1,
    "channels": (8, 16), "search_rates": (2e-3, 2e-3),
}  # fmt: skip

_FASHION_ROWS = (
    "full", "attention", "norm_bias", "lora", "svdiff", "whole", "random_1", "found", "found_agc", "found_iet_agc",
    "other",
)  # fmt: skip

_UNEVEN_ROWS = (
    "full", "deduplicated", "record_draws", "attention", "norm_bias", "lora", "svdiff", "whole", "random_1",
    "random_2", "random_3", "found", "found_iet_agc", "found_record_draws",
)  # fmt: skip

PRESETS = {
    "digits": Preset(DIGITS, (0, 1, 2)),
    "uneven": Preset(DIGITS_UNEVEN, (0, 1, 2), _UNEVEN_ROWS),
    "fashion": Preset(FASHION, (0, 1, 2), _FASHION_ROWS),
    "fashion_200": Preset(
        replace(FASHION, name="fashion_200", num_train=200, stop=800, num_trials=12, transfer_from=""),
        (0, 1, 2),
        _FASHION_ROWS,
    ),
    "smoke": Preset(
        replace(DIGITS, name="smoke", **_TINY), (0,), ("full", "svdiff", "random_1", "found", "found_iet_agc")
    ),
}
