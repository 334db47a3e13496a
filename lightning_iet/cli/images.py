"""Settings of a run that are found from a folder of images: ``lightning-iet fit --images FOLDER``."""

import copy
import inspect
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from lightning_iet import modules
from lightning_iet.callbacks import Evaluation
from lightning_iet.data.decoding import decode_stored
from lightning_iet.data.folders import ImageFolderDataModule
from lightning_iet.data.formats import format_of
from lightning_iet.data.samples import reason_of
from lightning_iet.modules import DiffusionModule
from lightning_iet.tools.configs import find_configuration
from lightning_iet.utilities.configurations import named_devices
from lightning_iet.utilities.devices import training_threads
from lightning_iet.utilities.files import CONFIG, checkpoint_folders, file_beside, find_checkpoint

_OF_FOLDERS = (ImageFolderDataModule.__name__, "True")  # without a class, its options alone
LARGEST = 64  # pixels a side, unless a larger size is asked for
STEPS = 4000  # of training *(our choice: small models on a few hundred images have learnt their coarse shapes by then)*
LONGEST = 3600.0  # seconds of training and evaluation by estimate, unless a length is asked for *(our choice)*
JUDGING = LONGEST / 4  # of that, in which images are sampled to judge the model, likewise *(our choice)*
FEWEST = 32  # such images in any case *(our choice)*
LOOKED_AT = 256  # images whose size and channels are read
COMPARED = 20_000  # training images among which near-duplicates are looked for unasked: minutes *(our choice)*
UNSEEN = (16, 64)  # held-out images that sample records are compared with: at least, and at most *(our choice)*
_WIDTHS = {8: (32, 64), 16: (32, 64, 128), 32: (64, 128, 128), 64: (64, 64, 128, 256)}
_MORE = 256  # channels of each level beyond those of 64 pixels


@dataclass(frozen=True)
class Folder:
    """What a folder of images holds.

    Attributes:
        num: Number of images.
        side: Median of their shorter sides, in pixels.
        channels: 1 if all are grey, else 3.
        classes: Number of images of each class; empty where there are no sub-folders.
    """

    num: int
    side: int
    channels: int
    classes: tuple[int, ...] = ()


def look(path: Path, *, exclude: str | list[str] | None = None) -> Folder:
    """Count the images of a folder, and read the size and the channels of some of them, evenly spread.

    Args:
        path: The folder; its sub-folders are classes.
        exclude: Patterns of names that are left out, see :class:`~lightning_iet.data.ImageFolderDataModule`.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no images, or none that can be read.
    """
    if not path.is_dir():
        problem = "is no folder" if path.exists() else "does not exist"
        raise FileNotFoundError(
            f"Option --images expected a folder of images (its sub-folders are classes), but got '{path}', which "
            f"{problem}. Check the path."
        )
    source: Any = ImageFolderDataModule(path, exclude=exclude).load()
    total = len(source)
    shorter, colours, fault = [], False, ""
    for index in range(0, total, ceil(total / LOOKED_AT) or 1):
        try:
            side, coloured = _side_and_colour(source[index][0])
        except Exception as error:  # whatever damaged bytes provoke; named and counted when the data are set up
            fault = fault or f" ({source.name(index)}: {reason_of(error)})"
            continue
        shorter.append(side)
        colours = colours or coloured
    if not shorter:
        held = f"{total} of which none can be read{fault}" if total else "none"
        raise ValueError(
            f"Option --images expected a folder of images, but got '{path}', which holds {held}. Check it."
        )
    labels = getattr(source, "targets", None)
    classes = () if labels is None else tuple(torch.bincount(labels).tolist())
    return Folder(total, int(np.median(shorter)), 3 if colours else 1, classes)


def _side_and_colour(stored: Any) -> tuple[int, bool]:
    """The shorter side of an image, and whether some pixel is not grey; Pillow need not decode all of a large file."""
    if isinstance(stored, bytes) and format_of(stored) is None:
        with Image.open(io.BytesIO(stored)) as image:
            return min(image.size), _is_coloured(image)
    found = decode_stored(stored, size=(32, 32))  # a page of a file, DICOM, NIfTI, HEIC
    return min(found.size), found.pixels.shape[2] > 1 and _differ(found.pixels)


def _differ(pixels: np.ndarray[Any, Any]) -> bool:
    """Whether the channels of some pixel differ by more than what JPEG makes of grey."""
    return bool((np.ptp(pixels.astype(np.int16), axis=2) > 8).any())


def _is_coloured(image: Image.Image) -> bool:
    """Whether some pixel is not grey; small pictures are looked at, since one pixel decides."""
    if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"):
        return False
    image.draft("RGB", (64, 64))
    return _differ(np.asarray(image.convert("RGB").resize((32, 32))))


def settings_of(folder: Folder, path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run on the images of a folder.

    *(our choice)* A fifth of the images, at most 512, is held out as the control, and another for FID; the size is the
    largest power of two that the images have, from 8 to 64. Of near-duplicates one is trained on, and images that the
    model knows too well are drawn less often: what the benchmark on uneven data puts first.

    Args:
        folder: What it holds.
        path: Where it is.
        given: What the user has set, by the dotted names of options without ``init_args``: ``data.image_size``.

    Raises:
        ValueError: If there are too few images.

    Example:
        >>> found = settings_of(Folder(200, 70, 3, (100, 100)), Path("cats"), {})
        >>> [found["data"]["init_args"][name] for name in ("image_size", "num_control", "num_reference", "batch_size")]
        [64, 40, 40, 16]
        >>> found["model"]["init_args"]["unet"]["init_args"]["num_class_embeds"]
        2
    """
    if folder.num < 10:
        raise ValueError(
            f"Option --images expected at least 10 images, some of which are held out, but got '{path}' with "
            f"{folder.num}."
        )
    size = _size(folder, given)
    channels = _whole(given, "data.channels", folder.channels, least=1)
    held_out = max(2, min(folder.num // 5, 512))
    control = _whole(given, "data.num_control", held_out)
    reference = _whole(given, "data.num_reference", held_out)
    train = _whole(given, "data.subset", folder.num - control - reference, least=1)
    if given.get("data.held_out"):
        raise ValueError("Option --images expected no --data.held_out, for it holds some images out itself.")
    if train < 2:
        raise ValueError(
            f"Option --images expected images to train on, but {folder.num} leave {max(train, 0)}. Hold out fewer."
        )
    # Redistribution moves samples between shards.
    shards = _whole(given, "averaging.num_shards", 4 if _is_on(given, "redistribution.fraction") else 1, least=1)
    most = 64 if max(size) <= 32 else 16
    batch_size = _whole(given, "data.batch_size", min(most, _power_below(max(train // shards // 2, 1))), least=1)
    per_epoch = ceil(train / shards / batch_size)  # steps of a shard in an epoch
    length = _length(_steps_of_epoch(train, shards, batch_size), given)
    data = {
        "root": str(path),
        "image_size": size[0] if size[0] == size[1] else list(size),
        "channels": channels,
        "num_control": control,
        "num_reference": reference,
        "batch_size": batch_size,
    }
    if train <= COMPARED:
        data["duplicates"] = "drop"
    model: dict[str, Any] = {}
    if "model.pretrained" not in given and "model.unet" not in given:
        model["unet"] = {"class_path": "diffusers.UNet2DModel", "init_args": unet(size, channels, len(folder.classes))}
    return {
        "model": {"class_path": "DiffusionModule", "init_args": model},
        "data": {"class_path": "ImageFolderDataModule", "init_args": data},
        "agc": _agc(control, given, one_epoch=_is_one_epoch(length, given, _steps_of_epoch(train, shards, batch_size))),
        "averaging": {"num_shards": shards, "every_n_epochs": max(1, round(50 / per_epoch))},
        "evaluation": {"k": None, "num_samples": max(2, min(512, 4 * control))},
        "trainer": {
            **length,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "runs", "name": path.resolve().name},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {**_saving(length, given), "filename": "last"},
                }
            ],
        },
    }


def _agc(control: int, given: Mapping[str, Any], *, one_epoch: bool) -> dict[str, Any]:
    """Return the form of anti-gradient control: by sample records, unless an option asks for another."""
    published = "agc.threshold" in given or _is_on(given, "redistribution.fraction", "augmentation.max_magnitude")
    criterion = given.get("agc.criterion", "ratio" if published else "record")
    if criterion == "ratio":
        return {"threshold": 0.5}  # published
    if criterion != "record":
        return {}
    form: dict[str, Any] = {"criterion": "record"}
    if not one_epoch:
        form["weigh"] = "draws"
    least, most = UNSEEN
    number = min(most, control // 2)  # the others are left as the control of copies
    if number >= least and given.get("agc.reference", "held_out") == "held_out":
        form |= {"reference": "held_out", "reference_images": number}
    return form


def _is_on(given: Mapping[str, Any], *names: str) -> bool:
    """Whether a user has set one of some numbers above 0; what is no number is left to the parser to refuse."""
    values = (given.get(name) for name in names)
    return any(isinstance(value, int | float) and value > 0 for value in values)


def _is_one_epoch(length: Mapping[str, int], given: Mapping[str, Any], per_epoch: int) -> bool:
    """Whether a run has no second epoch, with which draws by weight begin."""
    steps = _whole(given, "trainer.max_steps", -1, least=-1)
    return length["max_epochs"] == 1 or 0 < steps <= per_epoch


def _steps_of_epoch(train: int, shards: int, batch_size: int) -> int:
    """Return the steps of all shards in an epoch."""
    return ceil(train / shards / batch_size) * shards


def _length(per_epoch: int, given: Mapping[str, Any]) -> dict[str, int]:
    """Return how long the run is, and when it validates: some ten times."""
    if (steps := _whole(given, "trainer.max_steps", -1, least=-1)) > 0:
        return {"max_epochs": -1, "check_val_every_n_epoch": max(1, steps // per_epoch // 10)}
    epochs = _whole(given, "trainer.max_epochs", 20 * ceil(STEPS / per_epoch / 20), least=-1)
    return {"max_epochs": epochs, "check_val_every_n_epoch": max(1, epochs // 10)}


def _saving(length: Mapping[str, int], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return when checkpoints are saved: some twenty times, and at the end, whether it is validated or not."""
    steps, epochs = _whole(given, "trainer.max_steps", -1, least=-1), length["max_epochs"]
    name, total = ("every_n_train_steps", steps) if steps > 0 else ("every_n_epochs", max(epochs, 1))
    often = max(1, total // 20)  # FinalCheckpoint writes the last step, whatever the interval leaves out
    return {name: often} if steps > 0 else {name: often, "save_on_train_epoch_end": True}


def _whole(given: Mapping[str, Any], name: str, default: int, *, least: int = 0) -> int:
    """An integer that a user has set, or the default."""
    value = given.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Option --{name} expected an integer ≥ {least}, but got {value!r}.")
    return value


def _size(folder: Folder, given: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width: as asked for, or the largest power of two that the images have."""
    asked = given.get("data.image_size")
    if asked is None:
        side = max(8, min(LARGEST, _power_below(folder.side)))
        return side, side
    sides = asked if isinstance(asked, list | tuple) else [asked, asked]
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(
            f"Option --data.image_size expected a number of pixels, or [height, width], but got {asked!r}."
        )
    return int(sides[0]), int(sides[1])


def unet(size: Sequence[int], channels: int, num_classes: int) -> dict[str, Any]:
    """Return the arguments of a U-Net of diffusers for images of a size.

    Args:
        size: Height and width, multiples of 2 to the number of levels less one.
        channels: Of the images.
        num_classes: Of which it takes labels; fewer than two = none.

    Example:
        >>> unet((128, 128), 3, 0)["block_out_channels"]
        [64, 64, 128, 256, 256]
    """
    side = min(size)
    known = max((known for known in _WIDTHS if known <= side), default=8)
    widths = [*_WIDTHS[known]]
    while side >= 2 * known:
        known *= 2
        widths.append(_MORE)
    while len(widths) > 1 and any(length % 2 ** (len(widths) - 1) for length in size):
        widths.pop()
    arguments: dict[str, Any] = {
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": widths,
        "down_block_types": ["DownBlock2D"] * len(widths),
        "up_block_types": ["UpBlock2D"] * len(widths),
        "norm_num_groups": 8,
        "attention_head_dim": 32,
        "add_attention": side > 8,
    }
    return arguments | ({"num_class_embeds": num_classes} if num_classes >= 2 else {})


def _power_below(number: int) -> int:
    """Return the largest power of two that is no larger."""
    return int(2 ** (number.bit_length() - 1))


def describe(folder: Folder, settings: Mapping[str, Any]) -> str:
    """Say in a line what was found and how the images are split.

    Example:
        >>> folder = Folder(200, 70, 3, (100, 100))
        >>> describe(folder, settings_of(folder, Path("cats"), {}))
        '200 images, 3 × 64 × 64, 2 classes: 120 to train on, 40 held out, 40 for FID'
    """
    data = settings["data"]["init_args"]
    size = data["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    control, reference = data["num_control"], data["num_reference"]
    train = data.get("subset") or folder.num - control - reference
    classes = f", {len(folder.classes)} classes" if len(folder.classes) > 1 else ""
    sets = f"{train:,} to train on, {control:,} held out, {reference:,} for FID"
    return f"{folder.num:,} images, {data['channels']} × {height} × {width}{classes}: {sets}"


def seconds_of_step(module: Any, batch_size: int, device: torch.device) -> float:
    """Return the time of one training step, the shortest of three with random images.

    The module, its random numbers and its weights stay as they are.

    Args:
        module: Of this package, with ``losses`` and ``image_shape``.
        batch_size: Images in a batch.
        device: Where it will train.
    """
    seconds = list[float]()
    threads = training_threads(module, batch_size, device)
    with threads, torch.random.fork_rng(), torch.enable_grad():
        module = copy.deepcopy(module).to(device)
        images = torch.rand(batch_size, *module.image_shape, device=device)
        timesteps = torch.randint(module.num_timesteps, (batch_size,), device=device)
        condition = None if module.conditioning is None else torch.zeros(batch_size, dtype=torch.long, device=device)
        for _ in range(3):
            began = time.perf_counter()
            module.losses(images, timesteps, torch.randn_like(images), condition).mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def seconds_of_sampling(
    step: float, batch_size: int, num: int, num_inference_steps: int, guidance_scale: float = 1
) -> float:
    """Return about how long images take to be sampled.

    To call the denoiser once takes a third of a training step with its gradients *(our choice: 0.24 to 0.61 measured)*.

    Args:
        step: Seconds of a training step.
        batch_size: Images in it.
        num: Images to sample.
        num_inference_steps: Calls of the denoiser for each.
        guidance_scale: A module's; with any but 1 a call takes twice as long.

    Example:
        >>> seconds_of_sampling(0.6, 16, 64, 50), seconds_of_sampling(0.6, 16, 64, 50, guidance_scale=3)
        (40.0, 80.0)
    """
    calls = num_inference_steps * (1 if guidance_scale == 1 else 2)
    return num * calls * step / (3 * batch_size)


def measured_step(unet: Mapping[str, Any], batch_size: int, device: torch.device) -> float:
    """Return the time of a training step of a U-Net on a device of this machine, see :func:`seconds_of_step`."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        module = DiffusionModule(UNet2DModel(**unet), ema_decay=0)
    return seconds_of_step(module, batch_size, device)


def device_of(given: Mapping[str, Any]) -> torch.device:
    """Return the device that a run will train on, from its ``trainer.accelerator``.

    What is not here, or unknown, Lightning will refuse; until then it is the CPU.

    Example:
        >>> device_of({"trainer.accelerator": "cpu"})
        device(type='cpu')
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    asked = given.get("trainer.accelerator") or "auto"
    for kind, is_here in here.items():
        if is_here and asked in ("auto", "gpu", kind):
            return torch.device(kind)
    return torch.device("cpu")


def num_processes(given: Mapping[str, Any]) -> int:
    """Return the number of processes of a run, or 2 where it is only known that there are several.

    Example:
        >>> num_processes({}), num_processes({"trainer.accelerator": "cpu", "trainer.devices": 4})
        (1, 4)
    """
    started = max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_NTASKS"))  # by torchrun, Slurm
    devices = given.get("trainer.devices") or "auto"
    are_all = devices in ("auto", -1, "-1") and device_of(given).type == "cuda"
    own = torch.cuda.device_count() if are_all else named_devices(devices)
    nodes = given.get("trainer.num_nodes") or 1
    return max(started, own * (nodes if isinstance(nodes, int) else 1))


def epochs_within(seconds: float, *, step: float, steps_of_epoch: int) -> int:
    """Return how many epochs fit into a time: at least one, and a multiple of 20 where there are more.

    Example:
        >>> epochs_within(3600, step=0.5, steps_of_epoch=100), epochs_within(3600, step=9, steps_of_epoch=900)
        (60, 1)
    """
    epochs = max(1, int(seconds / (step * steps_of_epoch)))
    return epochs - epochs % 20 if epochs > 20 else epochs


# --- on the command line ----------------------------------------------------------------------------------------------


def with_images(
    arguments: Sequence[str], *, measure: Callable[[Mapping[str, Any], int, torch.device], float] | None = None
) -> tuple[list[str], str | None]:
    """Replace ``--images FOLDER`` and the configurations by one configuration that holds what was found.

    What a user has set, in a configuration or as an option, wins over what was found. Where neither the length of the
    run nor the U-Net is set, the run gets as many epochs as take about an hour here with its evaluation, if the usual
    number takes longer, and is judged by as many images as are sampled in a quarter of an hour; a run that goes on
    keeps its numbers. Several processes, each of which would measure another time, train as long as is usual.

    Args:
        arguments: Command and options; configurations are paths.
        measure: Returns the seconds of a step from the arguments of a U-Net, the batch size and the device; ``None`` =
            the length is what it is.

    Returns:
        Arguments for LightningCLI, and what is to be told of the images; without ``--images``, the same and ``None``.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it cannot be trained on.
    """
    rest, files, folders = _taken(arguments)
    configurations = [_read(Path(file)) for file in files]
    folders = [*(content.pop("images") for content in configurations if "images" in content), *folders]
    if not folders:
        return list(arguments), None
    if folders[-1] is None:
        raise ValueError("Option --images expected a folder of images, but got none. Give one: --images FOLDER.")
    path = Path(folders[-1])
    template = _read(find_configuration("images"))
    template.pop("images")
    given: dict[str, Any] = {}
    for content in configurations:
        given |= _flat(content)
    given |= _options(rest)
    if (kind := str(given.get("data", ImageFolderDataModule.__name__)).rpartition(".")[2]) not in _OF_FOLDERS:
        raise ValueError(
            f"Option --images expected a configuration without data of its own, but got one with {kind}. Leave out one "
            "of --config and --images."
        )
    _check_model(given)
    folder = look(path, exclude=given.get("data.exclude"))
    found = settings_of(folder, path, given)
    note, run = "", _run_to_go_on_with(found, given)
    found = _as_begun(found, run)
    if measure is not None and _is_length_open(found, given):
        usual = int(found["trainer"]["max_epochs"])
        epochs = (run or {}).get("trainer", {}).get("max_epochs")
        begun = epochs if isinstance(epochs, int) and epochs > 0 else None
        if begun is None and num_processes(given) > 1:
            note = f"; {usual:,} epochs, which several processes do not fit to an hour (--trainer.max_epochs)"
        images = found["evaluation"]["num_samples"]
        epochs, judged, length = begun or usual, images, "an hour"
        if begun is None and not note:
            epochs, judged, length = _within_an_hour(found, folder, given, measure)
        if epochs < usual:
            found = _as_begun(settings_of(folder, path, given | {"trainer.max_epochs": epochs}), run)
            note = f"; {epochs:,} epochs, as many as take about {length} (--trainer.max_epochs {usual} trains on)"
        if judged < images and "evaluation.num_samples" not in given and run is None:
            found["evaluation"]["num_samples"] = judged
            note += f"; judged by {judged:,} images (--evaluation.num_samples {images} takes longer)"
    settings = _merged(template, found, *configurations)
    command = next((index for index, argument in enumerate(rest) if not argument.startswith("-")), 0)
    rest.insert(command + 1, f"--config={json.dumps(settings)}")
    shown = _merged(settings, {"data": {"init_args": {
        name.removeprefix("data."): value for name, value in given.items() if name.startswith("data.")
    }}})  # fmt: skip
    return rest, f"{describe(folder, shown)}{note}"


def _check_model(given: Mapping[str, Any]) -> None:
    """Refuse a model that trains on something else than images and classes; what is no class the parser refuses."""
    name = str(given.get("model", DiffusionModule.__name__))
    kind = locate(name) if "." in name else getattr(modules, name, None)
    if isinstance(kind, type) and not issubclass(kind, DiffusionModule):
        raise ValueError(
            f"Option --images expected --model {DiffusionModule.__name__}, which trains on a folder of images, but got "
            f"{name.rpartition('.')[2]}. Leave the model out, or give --data in the place of --images."
        )


def _is_length_open(found: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a user has set neither the length of the run nor the U-Net."""
    lengths = ("trainer.max_epochs", "trainer.max_steps")
    return "unet" in found["model"]["init_args"] and all(given.get(length) is None for length in lengths)


def _within_an_hour(
    found: Mapping[str, Any],
    folder: Folder,
    given: Mapping[str, Any],
    measure: Callable[[Mapping[str, Any], int, torch.device], float],
) -> tuple[int, int, str]:
    """Return how many epochs take about an hour here, by how many images the model is judged in it, and its name.

    Half an hour is left to training however long it takes to judge the model.
    """
    data = found["data"]["init_args"]
    train = given.get("data.subset") or folder.num - data["num_control"] - data["num_reference"]
    steps = _steps_of_epoch(train, found["averaging"]["num_shards"], data["batch_size"])
    step = measure(found["model"]["init_args"]["unet"]["init_args"], data["batch_size"], device_of(given))
    usual = inspect.signature(Evaluation).parameters["num_inference_steps"].default
    calls = _whole(given, "evaluation.num_inference_steps", usual, least=1)
    of_one = seconds_of_sampling(step, data["batch_size"], 1, calls, given.get("model.guidance_scale", 1))
    every_steps, every_epochs = (_whole(given, f"evaluation.every_n_{unit}", 0) for unit in ("steps", "epochs"))
    evaluations = steps / every_steps if every_steps else 1 / every_epochs if every_epochs else 0  # of an epoch
    times = 1 + int(evaluations * LONGEST / (steps * step))
    judged = found["evaluation"]["num_samples"]
    if judged * of_one * times > JUDGING:  # a power of two, so that two runs of one machine have the same
        judged = min(judged, max(FEWEST, _power_below(max(1, int(JUDGING / (of_one * times))))))
    judged = _whole(given, "evaluation.num_samples", judged)
    seconds = max(LONGEST - judged * of_one, LONGEST / 2)
    epochs = epochs_within(seconds, step=step + evaluations * judged * of_one / steps, steps_of_epoch=steps)
    return epochs, judged, "an hour" if seconds > LONGEST / 2 else "half an hour without its evaluation"


def _as_begun(found: dict[str, Any], run: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return ``found`` with the method, duplicates, batch size and images to judge by of the run that goes on."""
    if run is None:
        return found
    options = run.get("data", {}).get("init_args", {})
    kept = {name: options[name] for name in ("duplicates", "batch_size") if name in options}
    method = {name: run[name] for name in ("agc", "averaging") if name in run}  # whole: of a form, no key is left over
    judged = run.get("evaluation", {}).get("num_samples") or found["evaluation"]["num_samples"]
    evaluation = {"num_samples": judged}
    return _merged(found, {"data": {"init_args": {"duplicates": "keep"} | kept}, "evaluation": evaluation}) | method


def _run_to_go_on_with(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of the run that goes on, which lies beside its checkpoint; ``None`` = no such file.

    ``last`` is the newest checkpoint in the folders of the run, where
    :func:`~lightning_iet.utilities.checkpoints.last_checkpoint` looks for it.
    """
    asked = given.get("ckpt_path")
    if asked is None:
        return None
    if asked == "last":
        files = [file for folder in _checkpoint_folders(found, given) for file in folder.glob("*.ckpt")]
        checkpoint = max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    else:
        path = Path(asked)
        checkpoint = find_checkpoint(path) if path.is_dir() else path
    file = None if checkpoint is None else file_beside(checkpoint, CONFIG)
    return None if file is None else _own_configuration(file)


def _checkpoint_folders(found: Mapping[str, Any], given: Mapping[str, Any]) -> list[Path]:
    """Return the folders in which the run and its earlier versions have checkpoints."""
    callbacks = given.get("trainer.callbacks")
    settings = [_flat(one) for one in (callbacks if isinstance(callbacks, list) else []) if isinstance(one, Mapping)]
    places = [given.get("trainer.callbacks.dirpath"), *(one.get("dirpath") for one in settings)]
    folders = [Path(place) for place in places if isinstance(place, str)]
    if given.get("trainer.logger") is False:
        return [*folders, Path(given.get("trainer.default_root_dir") or ".", "checkpoints")]
    logger = found["trainer"]["logger"]["init_args"]
    save_dir, name = (given.get(f"trainer.logger.{key}") or logger[key] for key in ("save_dir", "name"))
    return [*folders, *checkpoint_folders(Path(save_dir, name), version=given.get("trainer.logger.version"))]


def _own_configuration(file: Path) -> dict[str, Any] | None:
    """Return the configuration of a run of this package; ``None`` for another program's."""
    try:
        run = _read(file)
    except ValueError:
        return None
    data = run.get("data", {})
    parts = [data, *(run.get(name, {}) for name in ("agc", "averaging", "evaluation", "trainer"))]
    parts.append(data.get("init_args", {}) if isinstance(data, dict) else None)
    return run if all(isinstance(part, dict) for part in parts) else None


def _taken(arguments: Sequence[str]) -> tuple[list[str], list[str], list[Any]]:
    """Take configurations and folders out of the arguments."""
    rest: list[str] = []
    found: dict[str, list[Any]] = {"--config": [], "--images": []}
    following = iter(arguments)
    for argument in following:
        name, equals, value = argument.partition("=")
        name = "--config" if name == "-c" else name
        if name in found:
            found[name].append(value if equals else next(following, None))
        else:
            rest.append(argument)
    return rest, found["--config"], found["--images"]


def _read(file: Path) -> dict[str, Any]:
    """Return a configuration as a mapping; what is none is left to the parser to refuse."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"Option --config expected YAML, but got '{file}' ({' '.join(str(error).split())})."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"Option --config expected a mapping in YAML, but got '{file}' with {content!r}.")
    return content


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration by dotted names, without ``init_args``; of classes, the name alone as well."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "init_args":
            found |= _flat(value or {}, prefix)
        elif isinstance(value, Mapping):
            found[f"{prefix}{name}"] = value.get("class_path", True)
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None and name != "class_path":
            found[f"{prefix}{name}"] = value
    return found


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options among arguments by their dotted names, without ``init_args``."""
    found: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            text = value if equals else "".join(arguments[position + 1 : position + 2])
            found[name[2:].replace(".init_args", "")] = _value(text)
    return found


def _value(text: str) -> Any:
    """Read a value as the parser does: what is no YAML, such as ``*_mask.png``, is text."""
    try:
        return yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return text


def _merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested configurations; later ones win."""
    found: dict[str, Any] = {}
    for content in settings:
        for name, value in content.items():
            both = isinstance(value, Mapping) and isinstance(found.get(name), Mapping)
            found[name] = _merged(found[name], value) if both else value
    return found
