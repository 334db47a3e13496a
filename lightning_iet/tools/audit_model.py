"""Find out whether a diffusion model copies, and what its loss gives away of its training images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from lightning_iet import data
from lightning_iet.audit.core import check_sets
from lightning_iet.audit.findings import Findings
from lightning_iet.audit.generator import (
    Drawing,
    Generator,
    Probing,
    draw,
    load_checkpoint,
    load_pipeline,
    measure_losses,
)
from lightning_iet.audit.reading import ImageSet, image_set, with_channels
from lightning_iet.audit.search import Invariance
from lightning_iet.callbacks.anti_gradient_control.reference import choose_images
from lightning_iet.data import ImageDataModule
from lightning_iet.data.augmentation import every_image
from lightning_iet.data.decoding import Background, Channels, Fit
from lightning_iet.data.duplicates import SomeSamples
from lightning_iet.data.formats import format_range
from lightning_iet.data.samples import Skip, labels_of, name_of
from lightning_iet.evaluation.membership import Membership, infer_membership, spread_timesteps
from lightning_iet.evaluation.report import read_metrics
from lightning_iet.modules.noise_processes import Sampler
from lightning_iet.tools.audit import AUTO, AuditJob, Pages
from lightning_iet.utilities.configurations import instantiate
from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.files import CONFIG, METRICS, checkpoint_of, file_beside


def audit_model(
    train: Path | None = None,
    held_out: Path | None = None,
    *,
    ckpt: Path | None = None,
    pipeline: Path | None = None,
    num_samples: int = 10_000,
    seed: int = 0,
    sampler: Sampler = "ddim",
    num_inference_steps: int = 50,
    use_ema: bool = True,
    batch_size: int = 256,
    loss_images: int | None = 10_000,
    loss_timesteps: int = 20,
    out: Path = Path("audit"),
    features: str = AUTO,
    feature_weights: Path | None = None,
    image_size: int | str | None = None,
    fit: Fit | None = None,
    range: str | None = None,
    background: Background | None = None,
    grey: bool = False,
    pages: Pages = "all",
    moved: bool | None = None,
    invariance: Invariance = "none",
    k: int | None = None,
    ratio: float = 1 / 3,
    duplicates: bool = True,
    false_finds: float = 0.05,
    review: Path | None = None,
    title: str = "",
    show_images: bool = True,
    num_pairs: int = 100,
    fail_on_copies: bool | float = False,
    strict: bool = False,
    overwrite: bool = False,
    cache: Path | None = None,
    num_workers: int | None = None,
    device: str = "auto",
) -> Findings:
    """Find out whether a diffusion model copies its training images.

    Draws images and audits them as `audit` does; measures besides whether the model's loss tells training images from
    held-out ones (membership inference), and how far the two losses are apart at each timestep.

    The model is a checkpoint of a DiffusionModule, or a folder with an unconditional DDPMPipeline or DDIMPipeline of
    diffusers. Of a run of `fit` the images need not be given: those that it trained on and held out are taken, as its
    config.yaml says. An audit that is interrupted goes on when the same command is given again; several processes of
    torchrun share the work and find the same figures.

    Args:
        train: The images that the model was trained on, in any form that `audit` takes; by default those of the run.
        held_out: Real images from the same source that it was not trained on; by default those that the run held out.
        ckpt: The folder of a run, or a checkpoint of a DiffusionModule; may stand first, without --ckpt.
        pipeline: A folder of diffusers; nothing is fetched from a network.
        num_samples: Number of images to draw. Image i depends on the model, the seed and i alone.
        seed: Seed of the images, and of the noise that losses are measured with.
        sampler: "ddim" (50 steps suffice), "ddpm" (ancestral, with as many steps as in training for best quality), or
            "own", the model's scheduler. Flow matching and EDM have the last alone, for "ddim" too.
        num_inference_steps: Denoiser calls per image.
        use_ema: Whether the averaged weights are audited rather than the last ones.
        batch_size: Images at once; finished work is kept after each of these.
        loss_images: At most so many images of each set whose loss is measured, chosen at random; null = all.
        loss_timesteps: Timesteps at which the loss of each image is measured.
        out: Folder for the report.
        features: What the published measures are taken in: pixels, or a network: efficientnet, sscd, clip, inception,
            clean-inception, digits, or a TorchScript file (.ts). auto = pixels, and moved copies are looked for by a
            small network; pixels = without it.
        feature_weights: The network's weight file.
        image_size: Size of the images that the model draws, which is the default; another one is refused.
        fit: Whether resizing crops the middle of an image of another shape or stretches it; by default as the model was
            trained, if its checkpoint says so.
        range: Values of black and white in images of more than 8 bits, such as 0:4095 or -1:1; auto = 0 to the least of
            8, 10, 12, 14 and 16 bits that holds all integers, and 0:1 for floating point; full = 0:65535 for integers;
            by default as the model was trained, if its checkpoint says so, else auto.
        background: Colour under transparent pixels, by default white; where training images have such pixels, the
            verdict is left open until a colour is named.
        grey: Leave colours aside: bring all images to grey before they are compared. Losses are measured as the model
            was trained.
        pages: Whether every page of a file (TIFF stack, animation) is an image, or only the first.
        moved: Look for shifted, turned and zoomed copies; by default where that takes less than about 15
            minutes.
        invariance: Versions of a generated image that the published measures compare too: mirrored (twice the time),
            shifted by one pixel (9 times), both (18 times).
        k: Neighbours in the mean of the memorized quantity; by default 50, or all where there are fewer images.
        ratio: By the published measure an image counts as a copy if its nearest training image is nearer than this
            times the next.
        duplicates: Look for near-duplicates inside the training set.
        false_finds: Level of the share of innocent images among those named by comparison with held-out images.
        review: File of confirmed and dismissed pairs that was saved in the page of an earlier report.
        title: Title of the report.
        show_images: Show images in the report. Without them it holds names and figures only.
        num_pairs: Generated images, nearest to training images first, that the report shows.
        fail_on_copies: Exit with status 3 if more than this share of the images are copies (alone: any), with 4 if it
            cannot be decided.
        strict: Refuse images that cannot be read, instead of listing them.
        overwrite: Replace an earlier report.
        cache: Folder to keep finished work in, for further audits; by default it lies in OUT.partial until the report
            is written.
        num_workers: Processes that decode images; by default one for each core.
        device: "cpu", "cuda", "cuda:1" ...; "auto" = a GPU if there is one.

    Returns:
        The figures, as in metrics.json.

    Raises:
        FileNotFoundError: If there is no such model, or there are no such images.
        ValueError: If the model or the images cannot be used, or the report cannot be written.
    """
    names = [field.name for field in fields(AuditJob)]
    options = {name: value for name, value in locals().items() if name in names}
    job = AuditJob(**options)
    drawing = Drawing(
        num_samples=num_samples,
        seed=seed,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
    )
    probing = Probing(images=loss_images, timesteps=loss_timesteps, seed=seed, batch_size=batch_size)
    path = None if ckpt is None else checkpoint_of(Path(ckpt))
    generator = _load(path, pipeline, use_ema=use_ema)
    run = _run_of(path, job, train, held_out)
    _check_fitting(job, drawing, generator)
    generator.module.to(job.on)
    reading = replace(job.reading, size=generator.module.image_shape[1:], fit=job.fit or generator.fit)
    if job.range is None and generator.value_range is not None:
        reading = replace(reading, value_range=generator.value_range)
    given = {} if run else {"train": train, "held_out": held_out}
    with job.read(given, reading=reading) as sets:
        channels = cast("Channels", generator.module.image_shape[0])  # as a data module gives them for training
        sets = {name: with_channels(images, channels) for name, images in (run.read() if run else sets).items()}
        check_sets(sets, job.settings_for(sets["train"]).k)
        membership = _membership(generator, sets, probing, job, labels={} if run is None else run.labels())
        sets["generated"] = draw(generator, drawing, cache=job.blocks)
        settings = {
            "model": generator.location,
            "model_sha256": generator.sha256,
            "averaged_weights": generator.use_ema,
            "fit": run.data.fit if run else reading.fit,
            "range": format_range(run.data.value_range if run else reading.value_range),
        }
        losses = {"loss_images": loss_images, "loss_timesteps": loss_timesteps}
        refused = _REFUSED | (dict.fromkeys(map("--{}".format, _OF_READING), _READ_BY_RUN) if run else {})
        return job.finish(sets, settings=settings | asdict(drawing) | losses, membership=membership, refused=refused)


@dataclass(frozen=True)
class _Run:
    """A run of `fit` whose own images are audited.

    Attributes:
        data: what it trained on and held out.
        name: of the run and its data module, for people.
        num_train: number of images that it trained on, as its own evaluation has written; ``None`` if it has not.
        agc: options of its anti-gradient control.
    """

    data: ImageDataModule
    name: str
    num_train: int | None
    agc: Mapping[str, Any]

    def labels(self) -> dict[str, Tensor | None]:
        """Return the classes of these images, in their order, once they have been read; None where there are none."""
        return {"train": labels_of(self._trained_on()), "held_out": labels_of(ConcatDataset(self._held_out()))}

    def _trained_on(self) -> Any:
        return every_image(self.data.train_set)

    def _held_out(self) -> list[Dataset[Any]]:
        """Return what was held out, without the images whose losses steered the training."""
        control: Any = self.data.control_set
        if control is not None and self.agc.get("reference") == "held_out":
            steered = choose_images(control, self.agc.get("reference_images"), datamodule=self.data)
            rest = torch.ones(len(control), dtype=torch.bool).index_fill(0, steered, value=False)
            control = SomeSamples(control, rest.nonzero()[:, 0])
        return [part for part in (control, self.data.reference_set) if part is not None and len(part)]  # type: ignore[arg-type]

    def read(self) -> dict[str, ImageSet]:
        """Return the images as they were trained on, before mirroring, and those that were held out.

        Raises:
            ValueError: If none were held out, or the data have changed since.
        """
        self.data.setup("fit")
        train = self._trained_on()
        # Earlier evaluations counted groups whose near-duplicates count as one.
        if self.num_train not in (None, len(train), len(self.data.train_set)):  # type: ignore[arg-type]
            raise ValueError(
                f"Argument `train` expected the {self.num_train:,} images that {self.name} has trained on, as its "
                f"{METRICS} says, but got {len(train):,}: the data have changed. Give --train and --held-out."
            )
        held_out = self._held_out()
        if not held_out:
            raise ValueError(
                f"Argument `held_out` expected images that the model was not trained on, but {self.name} held out "
                "none. Give --train and --held-out."
            )
        return {
            # Which set the images that were left out would have gone to is not known.
            "train": self._images([self._trained_on()], "training", skipped=self.data.skipped),
            "held_out": self._images(held_out, "held-out"),
        }

    def _images(self, parts: list[Dataset[Any]], kind: str, *, skipped: Sequence[Skip] = ()) -> ImageSet:
        samples: Any = ConcatDataset(parts)
        pixels = torch.stack([samples[i][0].mul(255).round().to(torch.uint8) for i in range(len(samples))])
        names = [name_of(part, index) for part in parts for index in range(len(part))]  # type: ignore[arg-type]
        return replace(image_set(pixels, location=f"{kind} images of {self.name}"), names=names, skipped=skipped)


_OF_READING = {"fit": None, "range": None, "background": None, "pages": "all", "strict": False}
"""Options that say how images are read, and what they are where nobody gives them."""


_READ_BY_RUN = "Here images are read as the run read them: give --train and --held-out besides to say otherwise."
_REFUSED = {
    "--image-size": "Here all images have the size that the model draws: save what it draws, and give that to "
    "`lightning-iet audit`, which brings images to any size."
}


def _run_of(path: Path | None, job: AuditJob, train: Path | None, held_out: Path | None) -> _Run | None:
    """Build the data module of the run that a checkpoint is of, unless images are given.

    Only data modules of this package are built: a file must not name code to run.

    Raises:
        ValueError: If images are neither given nor known.
    """
    missing = [f"`{name}`" for name, value in (("train", train), ("held_out", held_out)) if value is None]
    if not missing:
        return None
    wanted = f"Argument{'s' if len(missing) > 1 else ''} {' and '.join(missing)} expected images"
    if len(missing) == 1:
        raise ValueError(
            f"{wanted}, but got none. Give both, or neither, to audit a run of `lightning-iet fit` with its own."
        )
    config = None if path is None else file_beside(path, CONFIG)
    if path is None or config is None:
        unknown = f"no {CONFIG} lies beside '{path}'"
        if path is None:
            unknown = "a pipeline does not say what it was trained on"
        raise ValueError(f"{wanted}, since {unknown}, but got none. Give --train and --held-out.")
    try:
        saved = yaml.safe_load(config.read_text(encoding="utf-8"))
        settings, agc = saved["data"], saved.get("agc") or {}
        name = settings["class_path"].rpartition(".")[2]
        kind = getattr(data, name, None) if settings["class_path"].startswith("lightning_iet.") else None
        options = settings.get("init_args") or {}
        if not isinstance(options, Mapping) or not isinstance(agc, Mapping):
            raise TypeError(f"init_args is {type(options).__name__}, agc {type(agc).__name__}")
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{wanted}, since '{config}' names no data, but got none. Give --train and --held-out."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, ImageDataModule)):
        raise ValueError(
            f"{wanted}, since the data module of '{config}', {settings['class_path']}, is none of this package, but "
            "got none. Give --train and --held-out."
        )
    unused = [name for name, default in _OF_READING.items() if getattr(job, name) != default]
    if unused:
        raise ValueError(
            f"Argument `{unused[0]}` expected nothing where a run is audited with its own images, which are read as it "
            f"read them, but got '{getattr(job, unused[0])}'. Give --train and --held-out besides, or leave it out."
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "data")
    try:
        built = instantiate(parser, parser.parse_object({"data": options})).data
    except ArgumentError as error:
        reason = first_line(error)
        raise ValueError(
            f"{wanted}, since the data of '{config}' cannot be built ({reason}), but got none. Give --train and "
            "--held-out."
        ) from error
    name = f"the run '{config.parent}' ({name}{'' if built.root is None else f' of {built.root}'})"
    return _Run(built, name, _num_train(config.parent / METRICS), agc)


def _num_train(metrics: Path) -> int | None:
    """Read the number of training images from what a run's own evaluation has written, if it has."""
    try:
        found = read_metrics(metrics, kind="evaluation")["data"]["num_train"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def _load(ckpt: Path | None, pipeline: Path | None, *, use_ema: bool) -> Generator:
    if ckpt is not None and pipeline is None:
        return load_checkpoint(ckpt, use_ema=use_ema)
    if pipeline is not None and ckpt is None:
        return load_pipeline(Path(pipeline))
    raise ValueError(
        "Arguments `ckpt` and `pipeline` expected one of them, a checkpoint or a folder of diffusers, but got "
        f"{'neither' if ckpt is None else 'both'}."
    )


def _check_fitting(job: AuditJob, drawing: Drawing, generator: Generator) -> None:
    """Refuse more steps than the model has, and another size than that of its images."""
    most, (_, height, width) = generator.module.num_timesteps, generator.module.image_shape
    if drawing.num_inference_steps > most:
        raise ValueError(
            f"Argument `num_inference_steps` expected at most {most}, the timesteps of the model, but got "
            f"{drawing.num_inference_steps}."
        )
    if job.reading.size not in (None, (height, width)):
        raise ValueError(
            f"Argument `image_size` expected {width}x{height}, the size of the model's images, but got "
            f"'{job.image_size}'."
        )


def _membership(
    generator: Generator,
    sets: dict[str, ImageSet],
    probing: Probing,
    job: AuditJob,
    *,
    labels: Mapping[str, Tensor | None],
) -> Membership:
    is_conditional = getattr(generator.module, "conditioning", None) is not None
    are_given = is_conditional and all(labels.get(name) is not None for name in sets)  # as in an evaluation
    losses = {}
    for name, images in sets.items():
        of_set = labels[name] if are_given else None
        losses[name] = measure_losses(generator, images, probing, cache=job.blocks, argument=name, labels=of_set)
    timesteps = spread_timesteps(probing.timesteps, generator.module.num_timesteps)
    return infer_membership(**losses, timesteps=timesteps, labels_given=are_given if is_conditional else None)
