"""The search for a mask, on the images of one seed, and the masks that it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetuning.rows import ROWS
from benchmarks.finetuning.settings import Setting
from benchmarks.finetuning.training import Judge, Tuning, fine_tune, make_denoiser
from lightning_iet.functional.parameter_groups import ParameterGroups, find_groups
from lightning_iet.functional.pareto import choose_point
from lightning_iet.search import Candidate, SelectionSearch, search_selection

TRAINING_SEED = 1_000  # of trials, beyond those of the rows: what is found is trained anew, from other random numbers
SPREAD = 0.1  # random masks train as many parameters as the found one, to a tenth
DRAWN = 20_000


@dataclass(frozen=True)
class Trial:
    """Fine-tunes as a candidate says, and returns the figures of its checkpoints."""

    setting: Setting
    pretrained: Path
    judge: Judge
    folder: Path

    def __call__(self, candidate: Candidate) -> list[dict[str, float]]:
        """Train and judge; the pretrained network as it is counts as step 0."""
        setting, judge = self.setting, self.judge
        control = {f"{name}_control": value for name, value in judge.control().items()}
        error = standard_error(control[f"{setting.copies}_control"], setting.num_control)
        control[f"{setting.copies}_control_standard_error"] = error
        steps = round(setting.search_length * setting.stop)
        marks = [round(steps * part / setting.checkpoints) for part in range(1, setting.checkpoints + 1)]
        family = "all" if candidate.kind == "plain" else setting.family
        tuning = Tuning(family, candidate.mask or None, candidate.learning_rate)
        if candidate.kind == "pretrained":
            tuning, marks = Tuning("all", None, 0.0), [1]
        points = fine_tune(
            setting, ROWS[0], tuning, self.pretrained, judge,
            marks=marks, seed=TRAINING_SEED + judge.seed, folder=self.folder / candidate.name,
        )  # fmt: skip
        step = "mark" if candidate.kind != "pretrained" else ""
        return [{**point, **control, "step": point[step] if step else 0} for point in points]


def groups_of(setting: Setting, family: str | None = None) -> ParameterGroups:
    """The groups of the setting's network, in the family that is searched or in another one."""
    denoiser = make_denoiser(setting)
    return find_groups(getattr(denoiser, "unet", denoiser), family or setting.family)  # type: ignore[arg-type]


def search(setting: Setting, pretrained: Path, judge: Judge, folder: Path) -> SelectionSearch:
    """Search; a search that was cut off goes on."""
    return search_selection(
        Trial(setting, pretrained, judge, folder / "trials"),
        groups_of(setting),
        out=folder,
        objectives=("fid_selection", setting.copies),
        trials=setting.num_trials,
        learning_rates=setting.search_rates,
        settings={"setting": setting.name, "seed of the images": judge.seed},
        seed=judge.seed,
        progress=False,
    )


def choose(trials: Sequence[Mapping[str, Any]], *, control: float, setting: Setting) -> dict[str, Any]:
    """Choose among the trials of a search, by the rule of `lightning-iet memcontrol`.

    The best quality among the points that memorize at most as much as held-out images and one standard error, else the
    knee of the front. This package's choice, of the checkpoints that :func:`trials_of` keeps.

    Args:
        trials: every checkpoint of every trial.
        control: the share of held-out images that counts as copied.
        setting: which figure that is, and how many such images there are.
    """
    able = [trial for trial in trials if trial["kind"] == "mask" and "1" in trial["mask"]]
    values = torch.tensor(
        [[trial["fid_selection"], max(0.0, trial[setting.copies] - control)] for trial in able], dtype=torch.float64
    )
    limits = [standard_error(control, setting.num_control)]
    choice = choose_point(values, limits=limits, trained=[round(1e9 * trial["share"]) for trial in able])
    tried = len({trial["trial"] for trial in trials if trial["kind"] == "mask"})
    return {**able[choice.point], "rule": choice.rule, "trials": tried}


def standard_error(share: float, total: int) -> float:
    """Of a share of so many images, not 0 where none of them counts, as `lightning-iet memcontrol` has it.

    Example:
        >>> round(standard_error(0.0, 98), 4)
        0.0099
    """
    smoothed = (share * total + 1) / (total + 2)
    return sqrt(smoothed * (1 - smoothed) / (total + 2))


def trials_of(result: SelectionSearch, setting: Setting) -> list[dict[str, Any]]:
    """Every checkpoint of every trial, for a table."""
    shares = ("copies_half", "copies_repeated", "copies_once") if setting.is_uneven else ("mq_0.15", "copies_half")
    return [
        {
            "trial": point.candidate.name,
            "kind": point.candidate.kind,
            "mask": point.candidate.mask,
            "rate": point.candidate.learning_rate,
            "step": point.step,
            "share": 0.0 if point.share is None else point.share,
            **{name: point.figures[name] for name in ("fid_selection", "fid", *shares)},
        }
        for point in result.all_points
        if not point.copied_from
    ]


def random_mask(setting: Setting, found: str, *, seed: int, number: int) -> str:
    """Draw a mask that trains as many parameters as the found one, to a tenth, or as near to it as there is.

    The number of the mask and the seed decide; masks of different numbers differ.

    Args:
        setting: whose network it is for.
        found: the mask to compare with, which is never drawn.
        seed: of the images.
        number: 1, 2, ….
    """
    groups = groups_of(setting)
    bits = range(len(found))
    sizes = torch.tensor([groups.count("".join("01"[bit == other] for other in bits)) for bit in bits])
    generator = torch.Generator().manual_seed(1_000 + seed)
    drawn = torch.randint(0, 2, (DRAWN, len(found)), generator=generator).unique(dim=0)
    drawn = drawn[torch.randperm(len(drawn), generator=generator)]
    own = torch.tensor([int(bit) for bit in found])
    drawn = drawn[(drawn != own).any(1)]
    off = ((drawn @ sizes) / (own @ sizes) - 1).abs()
    near = drawn[off <= SPREAD]
    if len(near) < number:
        near = drawn[off.argsort(stable=True)]
    return "".join(map(str, near[number - 1].tolist()))
