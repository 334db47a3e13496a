"""On what the methods are compared: data, model, length, and how everything is judged; and the presets."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Setting:
    """A data set, what is trained on it, and how it is judged.

    Attributes:
        name: of the setting, in tables and files.
        source: ``"digits"`` or ``"fashion_mnist"``.
        num_train: images that are trained on.
        num_unseen: images that no method trains on: anchors of anchored AGC, and what early stopping watches.
        num_control: held-out images that stand in for generated ones, and non-members of the membership attack.
        num_selection: held-out images by which early stopping on FID chooses.
        num_reference: held-out images with which the reported FID compares.
        batch_size: images in a batch.
        patch: side of the squares of pixels that the U-Net sees as one pixel with more channels.
        channels: of the U-Net's levels.
        layers: residual blocks on each level.
        learning_rate: of Adam, after ``warmup`` steps.
        warmup: steps.
        ema_decay: of the averaged weights, which are judged.
        num_bins: entries of the bank of published AGC; a bank with one for each of 1,000 timesteps would see too few
            samples in runs this short.
        schedule: of the noise. On small images the linear one spends most timesteps on noise alone (Nichol & Dhariwal
            2021, arXiv:2102.09672).
        prediction: what the U-Net predicts.
        stop: steps after which the held-out loss of plain training is least, about: the unit of length in the tables.
        lengths: when a run is judged, in units of ``stop``; the last one ends it.
        plain_lengths: the same for plain training, whose course is what everything else is compared with.
        num_samples: images drawn for each judgement.
        inference_steps: DDIM steps.
        round_epochs: epochs of a round of shard training, where the row does not say.
        precision: of the Trainer.
        num_feature_images: images from which features of Fashion-MNIST are learnt; the digits' come with the package.
        num_repeated: further training images that occur ``repeats`` times each; 0 = an even training set, in which
            every image occurs once.
        repeats: how often each of them occurs.
        change: what tells the occurrences of an image from one another, see
            :func:`lightning_iet.data.duplicates.repeat_images`.
        by_typicality: whether copies and the membership attack are told apart by quarters of the training set, from
            the least typical images to the most typical ones.
    """

    name: str
    source: str
    num_train: int
    batch_size: int
    stop: int
    num_unseen: int = 64
    num_control: int = 512
    num_selection: int = 400
    num_reference: int = 700
    patch: int = 1
    channels: tuple[int, ...] = (32, 64)
    layers: int = 1
    learning_rate: float = 3e-3
    warmup: int = 100
    ema_decay: float = 0.99
    num_bins: int = 100
    schedule: str = "squaredcos_cap_v2"
    prediction: str = "epsilon"
    lengths: tuple[float, ...] = (1, 2, 4)
    plain_lengths: tuple[float, ...] = (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4)
    num_samples: int = 400
    inference_steps: int = 20
    round_epochs: int = 25
    precision: str = "32-true"
    num_feature_images: int = 10_000
    num_repeated: int = 0
    repeats: int = 20
    change: str = "recolored"
    by_typicality: bool = False

    @property
    def is_uneven(self) -> bool:
        """Whether some training images occur many times."""
        return self.num_repeated > 0

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return 8 if self.source == "digits" else 32

    def marks(self, *, dense: bool, times_as_long: int = 1) -> list[int]:
        """Steps after which a run is judged."""
        lengths = self.plain_lengths if dense else self.lengths
        return [round(length * times_as_long * self.stop) for length in lengths]


@dataclass(frozen=True)
class Preset:
    """Settings and the rows that are run on them.

    Attributes:
        settings: data sets with their models.
        seeds: of split, initial weights, training and drawing; each row is run once with each.
        rows: names of rows, by the name of the setting; ``None`` = all that suit it.
        device: ``"cpu"``: one process for each core; ``"gpu"``: one process on the accelerator, if there is one.
    """

    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    rows: dict[str, tuple[str, ...] | None]
    device: str = "cpu"


DIGITS = Setting("digits", "digits", num_train=50, batch_size=13, stop=700, channels=(16, 32), learning_rate=4e-3)
FASHION = Setting(
    "fashion_mnist", "fashion_mnist", num_train=50, batch_size=13, stop=700, patch=4, channels=(48, 48),
    prediction="v_prediction", num_selection=1_000, num_reference=2_000,
)  # fmt: skip

_UNEVEN = {
    "num_train": 400, "num_repeated": 10, "batch_size": 32, "stop": 1_600, "lengths": (0.5, 1, 1.5, 2),
    "plain_lengths": (0.5, 1, 1.5, 2), "num_control": 300, "num_selection": 300, "ema_decay": 0.995,
}  # fmt: skip
UNEVEN_DIGITS = replace(DIGITS, name="uneven_digits", **_UNEVEN)
UNEVEN_FASHION = replace(
    FASHION, name="uneven_fashion_mnist", **(_UNEVEN | {"num_selection": 1_000, "num_control": 512})
)

TYPICAL_DIGITS = replace(
    DIGITS, name="typical_digits", num_train=100, batch_size=25, by_typicality=True, lengths=(1, 2, 4)
)

_TINY = {
    "num_control": 32, "num_selection": 32, "num_reference": 64, "channels": (8, 16), "lengths": (1, 2),
    "plain_lengths": (0.5, 1, 2), "num_samples": 24, "inference_steps": 2, "round_epochs": 1, "num_feature_images": 200,
    "num_unseen": 16, "stop": 8, "warmup": 2,
}  # fmt: skip

_GPU = {
    "num_train": 500,
    "batch_size": 64,
    "stop": 4_000,
    "num_bins": 1_000,
    "learning_rate": 4e-4,
    "ema_decay": 0.999,
    "warmup": 500,
}

_GPU_ROWS = (
    "plain", "dropout_flips", "half_width", "iet_4", "agc_0.5", "agc_0.9", "iet_agc_2", "iet_agc_4", "iet_agc_10",
    "anchored_64", "iet_anchored", "plain_with_unseen",
)  # fmt: skip

_FASHION_ROWS = (
    "plain", "plain_with_unseen", "dropout_flips", "half_width", "iet_4", "agc_0.5", "agc_0.9", "iet_agc_2",
    "iet_agc_4", "iet_agc_10", "anchored_16", "anchored_64", "iet_anchored",
)  # fmt: skip

_UNEVEN_ROWS = (
    "plain", "plain_with_unseen", "dropout_flips", "deduplicated", "found", "half_deduplicated", "agc_0.5", "agc_0.8",
    "anchored_64", "quantile", "record_1", "record_0.5", "record_median", "record_weights", "record_weights_0.1",
    "record_draws", "record_draws_below", "record_draws_unseen", "record_draws_strict",
    "found_record_draws_unseen", "half_deduplicated_record_weights", "iet_4", "iet_agc_4", "iet_agc_random",
    "iet_agc_msr", "iet_agc_taa", "iet_agc_plus", "iet_agc_4_twice", "iet_agc_plus_twice", "randaugment",
)  # fmt: skip

_TYPICAL_ROWS = ("plain", "agc_0.8", "record_weights", "record_draws", "iet_agc_4")
_OTHER_UNEVEN_ROWS = (
    "plain", "deduplicated", "agc_0.8", "record_1", "record_weights", "record_draws", "record_draws_below",
    "record_draws_unseen",
)  # fmt: skip

PRESETS = {
    "uneven": Preset(
        (
            UNEVEN_DIGITS,
            replace(UNEVEN_DIGITS, name="uneven_digits_moved", change="moved"),
            replace(UNEVEN_DIGITS, name="uneven_digits_10x5", repeats=5),
            replace(UNEVEN_DIGITS, name="uneven_digits_40x20", num_repeated=40, num_reference=680),
            replace(UNEVEN_DIGITS, name="uneven_digits_exact", change="exact"),
            UNEVEN_FASHION,
            TYPICAL_DIGITS,
        ),
        (0, 1, 2),
        {
            "uneven_digits": _UNEVEN_ROWS,
            "uneven_digits_moved": (*_OTHER_UNEVEN_ROWS, "found", "found_record_draws_unseen"),
            "uneven_digits_10x5": (*_OTHER_UNEVEN_ROWS, "found"),
            "uneven_digits_40x20": (*_OTHER_UNEVEN_ROWS, "found"),
            "uneven_digits_exact": ("plain", "deduplicated", "agc_0.8", "record_draws", "record_draws_unseen"),
            "typical_digits": _TYPICAL_ROWS,
            "uneven_fashion_mnist": (*_OTHER_UNEVEN_ROWS, "record_draws_strict", "anchored_64"),
        },
    ),
    "laptop": Preset((DIGITS, FASHION), (0, 1, 2), {"fashion_mnist": _FASHION_ROWS}),
    "smoke": Preset(
        (replace(DIGITS, **_TINY), replace(FASHION, **_TINY)),
        (0, 1),
        {"digits": ("plain", "iet_agc_2"), "fashion_mnist": ("plain", "dropout_flips")},
    ),
    "gpu": Preset(
        (
            replace(
                FASHION, name="fashion_mnist_500", patch=1, channels=(96, 192, 192), layers=2, inference_steps=50,
                num_samples=2_048, num_reference=5_000, num_control=2_048, precision="bf16-mixed", **_GPU,
            ),
            replace(
                FASHION, name="fashion_mnist_5000", patch=1, channels=(96, 192, 192), layers=2, inference_steps=50,
                num_samples=2_048, num_reference=5_000, num_control=2_048, precision="bf16-mixed",
                **(_GPU | {"num_train": 5_000, "stop": 10_000, "round_epochs": 10}),
            ),
        ),
        (0, 1, 2),
        {"fashion_mnist_500": _GPU_ROWS, "fashion_mnist_5000": _GPU_ROWS},
        device="gpu",
    ),
}  # fmt: skip
