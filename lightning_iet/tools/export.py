"""A checkpoint as a pipeline of diffusers, for whoever does not have this package."""

from pathlib import Path

from lightning_iet.audit.folders import whole_folder
from lightning_iet.modules.loading import load_any_module
from lightning_iet.modules.sampling import Sampler
from lightning_iet.tools.model_card import CARD_FILE, model_card
from lightning_iet.tools.run_folder import check_writable
from lightning_iet.utilities.errors import first_line

__all__ = ["export"]

_INDEX = "model_index.json"


def export(
    ckpt: Path,
    *,
    out: Path,
    use_ema: bool = True,
    sampler: Sampler = "ddpm",
    audit: Path | None = None,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Write a checkpoint as a folder that diffusers loads, with a model card.

    ``DDPMPipeline.from_pretrained(FOLDER)`` loads what was trained from images (``DiffusionPipeline`` loads all kinds),
    and draws the same images from the same seeds. The card, README.md, tells data, method and settings of the run from
    the config.yaml and metrics.json that lie beside the checkpoint.

    Args:
        ckpt: A checkpoint, such as runs/digits/iet_agc/version_0/checkpoints/last.ckpt.
        out: The folder; it appears whole, or not at all.
        use_ema: Whether the averaged weights are exported rather than the last ones.
        sampler: The scheduler of the pipeline, "ddpm" or "ddim".
        audit: Folder of a report of `lightning-iet audit` or `audit-model`, whose figures the card is to show.
        overwrite: Whether an earlier export in that folder is replaced.
        push_to_hub: Name of a repository on the Hugging Face hub, USER/NAME, that gets the folder too.
        private: Whether that repository, if it is new, is private.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: If there is no such checkpoint or report.
        ValueError: If the file is something else, or the folder holds something, or the hub cannot be reached.
        TypeError: If the denoiser is none of diffusers'.
    """
    ckpt, folder = Path(ckpt), Path(out)
    _check_free(folder, overwrite=overwrite)
    check_writable(folder.absolute().parent, argument="out", remedy="Give another folder with `--out`.", make=False)
    module = load_any_module(ckpt)
    pipeline = module.pipeline(use_ema=use_ema, sampler=sampler)
    name = push_to_hub or folder.name
    card = model_card(module, ckpt=ckpt, use_ema=use_ema, sampler=sampler, audit=audit, name=name)
    with whole_folder(folder) as unfinished:
        pipeline.save_pretrained(unfinished)
        (unfinished / CARD_FILE).write_text(card, encoding="utf-8")
    print(f"Written to {folder}: a {type(pipeline).__name__} of diffusers, and its model card, {CARD_FILE}")
    if push_to_hub is not None:
        print(f"Uploaded to {_upload(folder, push_to_hub, private=private)}")
    return folder


def _check_free(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    is_export = (folder / _INDEX).is_file()
    if not (is_export and overwrite):
        held = "a pipeline: replace it with --overwrite, or give" if is_export else "something else: give"
        raise ValueError(f"Argument `out` expected a new folder, but got '{folder}', which holds {held} another one.")


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
