"""Write a checkpoint as a pipeline of diffusers with a model card, to be used without this package."""

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import OmegaConf

from lightning_iet.evaluation.report import read_metrics
from lightning_iet.evaluation.verdict import fid_note, telling_thresholds, verdict
from lightning_iet.modules import DiffusionModule
from lightning_iet.modules.noise_processes import Sampler
from lightning_iet.modules.pipelines import looks_like_a_path
from lightning_iet.modules.pretrained import load_any_module
from lightning_iet.utilities.checkpoints import outline
from lightning_iet.utilities.errors import first_line
from lightning_iet.utilities.files import (
    CONFIG,
    METRICS,
    check_free,
    check_writable,
    checkpoint_of,
    file_beside,
    named_folder,
    whole_folder,
)
from lightning_iet.utilities.text import percent, three_digits

CARD_FILE, _INDEX = "README.md", "model_index.json"
_PACKAGES = ("lightning-iet", "diffusers", "torch", "lightning")
# Settings of data that say nothing about the model, or where they lie on the machine that it was trained on.
_LEFT_OUT = ("root", "download", "num_workers", "path", "folder", "cache_dir", "check", "on_error")
_DRAWN = 4  # images that the code in the card draws
_TASKS = {"text": "text-to-image"}  # on the hub, class-conditional models go under unconditional ones


def model_card(
    module: Any,
    *,
    ckpt: Path,
    use_ema: bool,
    sampler: Sampler,
    name: str,
    audit: Path | None = None,
    pipeline: str = "DDPMPipeline",
) -> str:
    """Write the card of an exported model.

    Args:
        module: The model.
        ckpt: Its checkpoint; ``config.yaml`` and ``metrics.json`` are looked for in its folder and the one above.
        use_ema: Whether the averaged weights were exported.
        sampler: The pipeline's sampler.
        name: What the model is called.
        audit: Folder of an audit's report.
        pipeline: Class of the pipeline.

    Returns:
        Markdown, behind the header that the Hugging Face hub reads.

    Raises:
        ValueError: If the audit's figures cannot be read.
    """
    config = _read(file_beside(ckpt, CONFIG))
    metrics = _read(file_beside(ckpt, METRICS))
    step = int(outline(ckpt, argument="ckpt").get("global_step", 0))
    kind, classes = _kind(module), getattr(module, "conditioning", None)
    has_average = module.ema is not None
    averaged = use_ema and has_average
    measured = "control" in metrics
    quality = _quality(metrics, step, has_average=has_average, averaged=averaged) if measured else None
    pretrained = _pretrained(config)
    header = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_TASKS.get(kind, "unconditional-image-generation"),
        tags=["diffusion", "memorization", "lightning-iet"],
        base_model=pretrained if pretrained and "/" in pretrained else None,
    )
    card = ModelCard.from_template(
        header,
        template_str=(files(__package__) / "model_card.md.j2").read_text(encoding="utf-8"),
        name=name,
        averaged=averaged,
        step=step,
        pretrained=pretrained,
        kind=kind,
        num_classes=getattr(classes, "num_classes", None),
        labels=[number % (getattr(classes, "num_classes", None) or _DRAWN) for number in range(_DRAWN)],
        null=getattr(classes, "null", None),
        pipeline=pipeline,
        scales=pipeline == "ConsistencyModelPipeline",
        shape=module.image_shape,
        steps=module.num_timesteps if sampler == "ddpm" else min(50, module.num_timesteps),
        training=list(_training(config, module)),
        quality=quality,
        audit=None if audit is None else _audit(audit),
        share=percent,
        versions={package: version(package) for package in _PACKAGES},
    )
    return str(card).strip() + "\n"


def _kind(module: Any) -> str:
    if not hasattr(module, "conditioning"):
        return "text"
    return "images" if module.conditioning is None else "classes"


# --- what lies beside the checkpoint ----------------------------------------------------------------------------------


def _read(file: Path | None) -> dict[str, Any]:
    """The content of a YAML or JSON file; empty if there is none."""
    if file is None:
        return {}
    content = OmegaConf.to_container(OmegaConf.load(file))
    return content if isinstance(content, dict) else {}  # type: ignore[return-value]


def _audit(folder: Path) -> dict[str, Any]:
    file = folder / METRICS if folder.is_dir() else folder
    try:
        found = read_metrics(file, kind="audit")
        found["generated"]["copies"]["total"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"Argument `audit` expected the folder of a report of `lightning-iet audit`, but got '{folder}', which has "
            f"no {METRICS} of one."
        ) from error
    return found


def _pretrained(config: Mapping[str, Any]) -> str | None:
    """What a model was fine-tuned from; of a local folder only its name, since paths are private."""
    given = _init_args(config.get("model")).get("pretrained")
    if not isinstance(given, str):
        return None
    return Path(given).name if looks_like_a_path(given) else given


# --- settings and figures ---------------------------------------------------------------------------------------------


def _training(config: Mapping[str, Any], module: Any) -> Iterator[tuple[str, str]]:
    """How the model was trained, as (setting, value)."""
    if not config:
        return
    data, model, trainer = (config.get(name) or {} for name in ("data", "model", "trainer"))
    given = {name: value for name, value in _init_args(data).items() if name not in _LEFT_OUT and value is not None}
    yield "data", f"{_class(data)} ({_listed(given)})"
    optimizer = _init_args(model).get("optimizer")
    if optimizer:
        yield (
            "optimizer",
            f"{_class(optimizer)} ({_listed(_init_args(optimizer), only=('lr', 'betas', 'weight_decay'))})",
        )
    settings = ("warmup_steps", "ema_decay", "label_dropout", "lora_rank")
    yield "model", _listed(_init_args(model), only=settings) or _class(model)
    limits = ("max_epochs", "max_steps", "precision", "gradient_clip_val", "accumulate_grad_batches")
    yield "trainer", _listed(trainer, only=limits)
    yield "seed", str(config.get("seed_everything"))
    averaging, agc = config.get("averaging") or {}, config.get("agc") or {}
    shards, steps = averaging.get("num_shards"), averaging.get("every_n_train_steps")
    length = f"{steps} steps of a shard" if steps else f"{averaging.get('every_n_epochs') or 1} epochs"
    many = f"{shards or 'one per process'} shards, averaged every {length}"
    yield "iterative ensemble training", "off" if shards == 1 else many
    yield "anti-gradient control", _criterion(agc)
    if part := getattr(module, "trained_part", ""):
        mask = "" if module.selection.mask is None else f"; mask {module.selection.mask}"
        yield "what was trained (MemControl)", f"{part}{mask}"
    redistribution, augmentation = config.get("redistribution") or {}, config.get("augmentation") or {}
    if fraction := redistribution.get("fraction"):
        yield "redistribution", f"{fraction:g} of each shard, {redistribution.get('at', 'half_round')}"
    if magnitude := augmentation.get("max_magnitude"):
        yield "threshold-aware augmentation", f"magnitude up to {magnitude} of 30"


def _criterion(agc: Mapping[str, Any]) -> str:
    """How anti-gradient control judged samples, in a few words."""
    criterion = agc.get("criterion", "ratio")
    if criterion == "ratio":
        threshold = agc.get("threshold", 0)
        return f"threshold {threshold:g}" if threshold else "off"
    given = [f"{name} {agc[name]:g}" for name in ("z0", "delta", "eta") if agc.get(name) is not None]
    drawn = ["drawn by weight"] if agc.get("weigh") == "draws" else []
    return ", ".join([f"by {criterion}", *given, *drawn])


def _class(thing: Mapping[str, Any]) -> str:
    return f"`{str(thing.get('class_path', 'unknown')).rpartition('.')[2]}`"


def _init_args(thing: Any) -> dict[str, Any]:
    return dict((thing or {}).get("init_args") or {}) if isinstance(thing, Mapping) else {}


def _listed(settings: Mapping[str, Any], *, only: tuple[str, ...] | None = None) -> str:
    """Settings in a row.

    Example:
        >>> _listed({"lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8}, only=("lr", "betas"))
        'lr 0.1, betas [0.9, 0.999]'
    """
    names = [name for name in (only or settings) if settings.get(name) is not None]
    return ", ".join(f"{name} {settings[name]}" for name in names)


def _quality(metrics: Mapping[str, Any], step: int, *, has_average: bool, averaged: bool) -> dict[str, Any]:
    """The measures of the evaluation at the end of the run, and its settings.

    Args:
        metrics: What the run has written.
        step: Of the exported weights.
        has_average: Whether the module keeps averaged weights; earlier versions wrote that they were used if not.
        averaged: Whether these were exported.
    """
    generated, control, settings = (metrics[part] for part in ("generated", "control", "settings"))
    fid = f"FID ({settings['features']} features)", three_digits(generated["fid"]), three_digits(control["fid"])
    rows = [
        *([] if settings["features"] is None else [fid]),
        ("memorized fraction", *(percent(part["memorized_fraction"]) for part in (generated, control))),
        *(
            (f"MQ < {level}", percent(generated["mq"][level]), percent(control["mq"][level]))
            for level in telling_thresholds(generated["mq"], control["mq"])
        ),
    ]
    measured_averaged = settings["use_ema"] and has_average
    weights, exported = ("averaged" if average else "last" for average in (measured_averaged, averaged))
    measured = metrics["run"]["steps"]
    how = (
        f"Sampled with {settings['sampler']}, {settings['num_inference_steps']} steps, {weights} weights, seed "
        f"{settings['seed']}. Shares are of the images; the control's are what images have that nobody can have "
        "memorised."
    )
    if note := fid_note(metrics):
        how += f" {note}"
    if measured != step:
        how += f" **Measured after {measured:,} steps; these weights are those after {step:,}.**"
    if weights != exported:
        how += f" **Measured with the {weights} weights; these are the {exported} ones.**"
    return {
        "verdict": verdict(metrics),
        "num": generated["num_images"],
        "num_control": control["num_images"],
        "rows": rows,
        "how": how,
    }


def export(
    ckpt: Path,
    *,
    out: Path,
    use_ema: bool = True,
    sampler: Sampler | None = None,
    audit: Path | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write a checkpoint as a folder that diffusers loads, with a model card.

    ``DDPMPipeline.from_pretrained(FOLDER)`` loads what was trained from images (``DiffusionPipeline`` loads all kinds),
    and samples the same images from the same seeds. The card, README.md, lists data, method and settings of the run
    from the config.yaml and metrics.json beside the checkpoint.

    Args:
        ckpt: The folder of a run, such as runs/digits/iet_agc, or a checkpoint; may stand without --ckpt.
        out: The folder; it appears whole, or not at all.
        use_ema: Whether the averaged weights are exported rather than the last ones.
        sampler: The scheduler of the pipeline: "ddpm" (the default), "ddim", or "own", the model's, which is the
            default for flow matching and EDM.
        audit: Folder of a report of `lightning-iet audit` or `audit-model`, whose figures the card is to show.
        overwrite: Whether an earlier export in that folder is replaced; one with other files in it is refused.
        push_to_hub: Name of a repository on the Hugging Face hub, USER/NAME, that gets the folder too.
        private: Whether that repository, if it is new, is private.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If there is no such checkpoint or report.
        ValueError: If the file is something else, or draws NaN, or the folder holds something, or the hub cannot be
            reached.
        TypeError: If the denoiser is none of diffusers'.
    """
    ckpt, folder = checkpoint_of(Path(ckpt)), named_folder(Path(out))
    _check_free(folder, overwrite=overwrite)
    check_writable(folder.absolute().parent, argument="out", remedy="Give another folder with `--out`.", make=False)
    module = load_any_module(ckpt)
    sampler = sampler or module.process.default_sampler
    pipeline = module.pipeline(use_ema=use_ema, sampler=sampler)
    prompts = {} if isinstance(module, DiffusionModule) else {"prompts": [""]}
    few = min(3, module.num_timesteps)  # an image in a few steps: a model that draws NaN is refused
    module.sample(1, num_inference_steps=few, sampler=sampler, use_ema=use_ema, **prompts)
    name = push_to_hub or folder.name
    kind = type(pipeline).__name__
    card = model_card(module, ckpt=ckpt, use_ema=use_ema, sampler=sampler, audit=audit, name=name, pipeline=kind)
    with whole_folder(folder, check=lambda: _check_free(folder, overwrite=overwrite)) as unfinished:
        pipeline.save_pretrained(unfinished)
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
    print(f"Written to {folder}: a {kind} of diffusers, and its model card, {CARD_FILE}")
    if _kind(module) == "classes":
        print(
            f"The model draws by class, but a {kind} called by itself gives no classes: call its `unet` with "
            f"`class_labels=`, as the code in {folder / CARD_FILE} does."
        )
    if push_to_hub is not None:
        print(f"Uploaded to {_upload(folder, push_to_hub, private=private)}")
    return folder


def _check_free(folder: Path, *, overwrite: bool) -> None:
    try:
        parts = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        own = [CARD_FILE, _INDEX, *(name for name in parts if not name.startswith("_"))]
    except (OSError, ValueError, TypeError):  # no pipeline: nothing there is one's own
        own = []
    check_free(folder, own=own, kind="a pipeline", overwrite=overwrite)


def _upload(folder: Path, repository: str, *, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository))
    except Exception as error:  # the hub's client, and the network beneath it, raise anything
        reason = first_line(error)
        raise ValueError(
            f"Argument `push_to_hub` expected a repository that can be written, but got '{repository}' ({reason}). The "
            f"export is in '{folder}': upload it with `hf upload {repository} {folder}` once you are logged in."
        ) from error
