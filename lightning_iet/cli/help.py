"""Help in plain text: the options of the methods first, those of a class alone, and what was probably meant."""

import argparse
import os
import re
import shutil
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import NoReturn

from jsonargparse import DefaultHelpFormatter, Namespace

from lightning_iet.cli import PROGRAM
from lightning_iet.utilities.errors import TRACEBACK_VARIABLE, fail


def plain(text: str) -> str:
    """Return a docstring's text without the markup of Sphinx.

    Example:
        >>> plain("See :class:`~lightning_iet.data.ImageDataModule`; ``None`` = :math:`T`. *(our choice: 512)*")
        'See ImageDataModule; None = T.'
    """
    text = re.sub(r"\s*\*\([^*]*\)\*", "", text)  # where a value comes from
    text = re.sub(r"\n *\.\. math::.*?(?=\n *\n|$)", "", text, flags=re.DOTALL)
    text = re.sub(r":[\w:]+:`~[\w.]*?(\w+)`", r"\1", text)
    text = re.sub(r":[\w:]+:`([^`]*)`", r"\1", text)
    text = re.sub(r"\\(?:mathrm\{(\w+)\}|([A-Za-z]+))", lambda found: found[1] or found[2], text)
    return re.sub(r"\*\*(.*?)\*\*", r"\1", text).replace("``", "").replace("\\_", "_")


def first_sentence(text: str) -> str:
    """Return the first sentence of a text.

    Example:
        >>> first_sentence("Skip samples of low loss, e.g. copies. Others are kept.")
        'Skip samples of low loss, e.g. copies.'
    """
    return re.split(r"(?<=[^.]{2}[.])\s+(?=[A-Z`])", " ".join(text.split()), maxsplit=1)[0]


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the lines of a description as they are written, and write help in plain text."""

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r", known subclasses: [^)]*", "", plain(super()._expand_help(action)))


class OneLineErrors:
    """Let a parser of jsonargparse report an error in one line, without all options before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, with what was probably meant, and exit with status 2."""
        if os.environ.get(TRACEBACK_VARIABLE) and ex is not None:
            raise ex
        fail(PROGRAM, self.explained(message))

    def explained(self, message: str) -> str:
        """Return what a message means, and what was probably meant."""
        return explain_error(message, self.known_options())

    def known_options(self) -> list[str]:
        """Return all options, as a user writes them."""
        return [option for action in self._actions for option in action.option_strings]  # type: ignore[attr-defined]


def explain_error(message: str, options: Iterable[str], *, names: Mapping[str, str] | None = None) -> str:
    r"""Say in plain words what a message of jsonargparse means, and what was probably meant.

    Args:
        message: Of jsonargparse.
        options: All that the command has, with their dashes.
        names: What to write for each class, by its bare name.

    Example:
        >>> explain_error("unrecognized arguments: --agc.treshold 1", ["--agc.threshold", "--agc.decay"])
        'There is no option --agc.treshold. Did you mean --agc.threshold?'
        >>> explain_error("the following arguments are required: generated, train", [])
        'Options --generated and --train are missing. The command with --help lists all.'
        >>> explain_error("Parser key \"agc.decay\": Expected a <class 'float'>. Got value: high", [])
        "Option --agc.decay expected a number, but got 'high'."
    """
    text = " ".join(message.split())
    if found := re.search(r"nrecognized arguments: (\S+)", text):
        unknown = found[1].partition("=")[0]
        if not unknown.startswith("-"):
            return f"There is no place for '{unknown}': options begin with --. {_SEE_HELP}"
        return f"There is no option {unknown}. {meant(unknown, options)}"
    if found := re.search(r"(?:(?:Group '([\w.-]+)' )?does not accept option|Option) '([\w.-]+)'", text):
        unknown = f"{found[1]}.{found[2]}" if found[1] else found[2]
        return f"There is no option `{unknown}`. {meant(unknown, options)}"
    if found := re.search(r"the following arguments are required: (.*)", text):
        missing = [f"--{name.rpartition('.')[2]}" for name in found[1].split(", ")]
        which = f"Option {missing[0]} is" if len(missing) == 1 else f"Options {' and '.join(missing)} are"
        return f"{which} missing. {_SEE_HELP}"
    if found := re.search(r"argument (--[\w.]+): expected one argument", text):
        return f"Option {found[1]} expected a value behind it, but got none."
    if found := re.match(r'Parser key "([\w.-]+)": Unable to load config \'(.*?)\' - ', text):
        return f"Option --{found[1]} has options of its own, --{found[1]}.…, but got '{found[2]}'. {_SEE_HELP}"
    found = re.match(r'(?:Parser key "(?P<key>[\w.-]+)": )?(?P<problem>.*?)Got value: ?(?P<value>.*)', text)
    found = found or re.match(r'Parser key "(?P<key>[\w.-]+)": (?P<problem>.*?)Given value: (?P<value>.*)', text)
    found = found or re.match(r'Parser key "(?P<key>[\w.-]+)": (?P<problem>.*path string: (?P<value>\S+)).*', text)
    if found is None or not found["key"]:
        return text
    option, value, problem = f"Option --{found['key']}", found["value"], found["problem"]
    kinds = dict.fromkeys(re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>", problem))
    words = [_TYPE_NAMES[kind] for kind in kinds if kind in _TYPE_NAMES]
    of_class = re.search(r"dot import path string: (\S+)", problem)
    if of_class and "float" not in kinds:  # a learning rate may be a tensor, too
        close = meant(of_class[1], names or {})
        if close == _SEE_HELP and found["key"] == "data":
            close = "Give a folder of images with --images."
        if (names or {}).get(of_class[1]) == of_class[1]:
            return f"{option} expected a class of another kind, but got '{of_class[1]}'. {_SEE_HELP}"
        return f"{option} expected the name of a class, but got '{of_class[1]}'. {close}"
    if literals := re.findall(r"Literal\[(.*?)\]", problem):
        choices = list(dict.fromkeys(name for literal in literals for name in re.findall(r"[\w-]+", literal)))
        close = meant(value, choices)
        remedy = "" if close == _SEE_HELP else f" {close}"
        return f"{option} expected one of {', '.join(choices)}, but got '{value}'.{remedy}"
    if not words or len(words) < len(kinds):
        return text
    if found["key"] in ("model", "data"):
        words = ["a class, as class_path and init_args"]
    return f"{option} expected {' or '.join(words)}, but got '{value}'."


def without_values(message: str) -> str:
    """Say why a class cannot be built, without all that jsonargparse has tried.

    Example:
        >>> tried = "Errors: - 32 is too few. - Expected a <class 'NoneType'> Given value: "
        >>> without_values(f"{tried}Namespace(class_path='diffusers.UNet2DModel', init_args=Namespace())")
        'diffusers.UNet2DModel cannot be built with these init_args: 32 is too few.'
    """
    text = " ".join(message.split())
    found = re.search(r"Errors: - (.*?)(?= - Expected| Given value)", text)
    name = re.search(r"Given value: \w+\(class_path='([^']+)'", text)
    if not found or not name:
        return text
    return f"{name[1]} cannot be built with these init_args: {found[1]}"


def check_dashes(arguments: Iterable[str], options: Collection[str]) -> None:
    """Refuse options with one dash, of which argparse would take the first letter for an option.

    What follows an option may be its value, and a configuration may be attached to ``-c``.

    Raises:
        ValueError: If there is one.

    Example:
        >>> check_dashes(["fit", "-cmy.yaml", "--agc.threshold", "-Infinity"], ["--config", "--agc.threshold"])
        >>> check_dashes(["fit", "-config", "digits/iet"], ["--config", "--agc.threshold"])
        Traceback (most recent call last):
        ...
        ValueError: There is no option -config. Did you mean --config?
    """
    before, known = "", {option.replace("_", "-") for option in options}
    for argument in arguments:
        name = argument.partition("=")[0]
        is_known = f"-{name}".replace("_", "-") in known  # then it is no value, even behind an option
        is_free = is_known or not before.startswith("-") or "=" in before
        if is_free and re.fullmatch(r"-[A-Za-z][\w.-]+", name) and not re.fullmatch(r"-c.+\.ya?ml", argument):
            raise ValueError(f"There is no option {name}. {meant(f'-{name}', options)}")
        before = argument


_SEE_HELP = "The command with --help lists all."
_TYPE_NAMES = {
    "int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null",
    "Sequence": "a list, such as [a,b]", "list": "a list, such as [a,b]",
    "tuple": "a list, such as [a,b]",
}  # fmt: skip


_SYNONYMS = {
    "checkpoint": ("ckpt", "ckpt_path"),
    "ckpt": ("ckpt_path",),
    "ckpt-path": ("ckpt",),
    "count": ("trials",),
    "epochs": ("max-epochs", "trainer.max_epochs"),
    "gpus": ("trainer.devices", "device"),
    "device": ("trainer.accelerator",),
    "images": ("show-images", "train"),
    "no-images": ("no-show-images",),
    "learning-rate": ("model.optimizer.init_args.lr", "lr"),
    "lr": ("model.optimizer.init_args.lr",),
    "num": ("num-samples",),
    "out": ("trainer.logger.save_dir",),
    "output": ("out", "trainer.logger.save_dir"),
    "output-dir": ("out", "trainer.logger.save_dir"),
    "pairs": ("num-pairs",),
    "resize": ("image-size", "data.image_size"),
    "resume": ("ckpt_path",),
    "sampler": ("algorithm",),
    "seed": ("seed_everything",),
    "size": ("data.image_size", "image-size"),
    "steps": ("max-steps", "trainer.max_steps", "num-inference-steps"),
    "weights": ("feature-weights",),
    "workers": ("num-workers",),
}
"""What options are called elsewhere, or were called once, and here; of several, the first that a command has."""


def meant(typed: str, known: Iterable[str]) -> str:
    """Say which of the known names was probably meant.

    Args:
        typed: What a user has written.
        known: Names, such as ``--agc.threshold``; of mappings, the values are what is shown.

    Example:
        >>> meant("DiffusionModul", ["DiffusionModule", "TextToImageModule"])
        'Did you mean DiffusionModule?'
        >>> meant("--treshold", ["--agc.threshold", "--agc.decay"])
        'Did you mean --agc.threshold?'
        >>> meant("--resume", ["--ckpt_path", "--agc.decay"])
        'Did you mean --ckpt_path?'
        >>> meant("nothing", ["DiffusionModule"])
        'The command with --help lists all.'
    """
    shown = known if isinstance(known, Mapping) else {name: name for name in sorted(set(known))}
    for other in _SYNONYMS.get(typed.lstrip("-").replace("_", "-"), ()):
        positive = other.removeprefix("no-")
        if f"--{positive}" in shown:
            return f"Did you mean --{other}?"
    ends = {name.rpartition(".")[2].lstrip("-"): text for name, text in reversed(list(shown.items()))}
    end = typed.rpartition(".")[2].lstrip("-")
    for word, texts in ((typed, shown), (end, ends)):
        if close := get_close_matches(word, texts, n=1, cutoff=0.7):
            return f"Did you mean {texts[close[0]]}?"
    return _SEE_HELP


def option_lines(actions: Iterable[argparse.Action], *, brief: bool) -> Iterator[str]:
    """Yield the lines that explain options; in brief, the first sentence of each alone, and no type."""
    lines = (2 if width() >= 115 else 1) if brief else None
    for action in actions:
        text = re.sub(r"\bNone\b", "null", plain(action.help or ""))  # as a configuration has it
        text = first_sentence(text) if brief else " ".join(text.split())
        notes = [] if brief or not _type(action) else [_type(action)]
        if default := _written(action.default):
            notes.append(f"default: {default}")
        note = f" ({'; '.join(notes)})" if notes else ""
        yield from wrapped(action.option_strings[-1].rstrip("+"), text + note, lines=lines)


def wrapped(name: str, text: str, *, lines: int | None = None) -> list[str]:
    """Return a name and its text in lines that fit the terminal; beyond a number of lines the text is cut.

    Example:
        >>> wrapped("--agc.threshold", "0 = off")
        ['  --agc.threshold                 0 = off']
    """
    column = 34
    first = f"  {name}".ljust(column - 1) + " "
    return textwrap.wrap(
        text or " ",
        width(),
        initial_indent=first,
        subsequent_indent=" " * column,
        max_lines=lines,
        placeholder=" …",
    ) or [first.rstrip()]


def width() -> int:
    """Return the number of columns to write in: those of the terminal, from 80 to 120."""
    return min(max(shutil.get_terminal_size((120, 24)).columns, 80), 120)


def _type(action: argparse.Action) -> str:
    """Return a type in a few words; nothing, if it takes many."""
    kind = getattr(action, "_typehint", None) or action.type
    text = kind.__name__ if isinstance(kind, type) else re.sub(r"[\w.]+\.(?=\w)", "", str(kind or ""))
    text = re.sub(r"Optional\[(.*)\]$", r"\1 or null", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda found: " | ".join(re.findall(r"'(.*?)'", found[1])), text)
    return text if len(text) <= 60 and "<" not in text and "object at" not in text else ""


def _written(default: object) -> str:
    """Write a default as on the command line; nothing, if there is none to speak of."""
    if default in (None, argparse.SUPPRESS) or default == () or default == []:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Mapping | Namespace):
        return str(default.get("class_path", "")).rpartition(".")[2]
    return f"{default:g}" if isinstance(default, float) else str(default)
