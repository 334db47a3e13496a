"""The pages hang together: links lead somewhere, every page can be reached, every public name is in the reference."""

import ast
import inspect
import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import lightning_iet
from lightning_iet.cli import COMMANDS as COMMANDS_OF_CLI
from lightning_iet.cli import OF_THE_TRAINER

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
CARDS = sorted((ROOT / "lightning_iet").rglob("*.md"))
PACKAGES = ["audit", "callbacks", "data", "metrics", "metrics.features", "modules", "search", "shards"]
COMMANDS = sorted({name for group in COMMANDS_OF_CLI.values() for name in group} - {*OF_THE_TRAINER})


def without_code(page):
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The names that GitHub and MyST give to headings: lower case, words joined by dashes, marks dropped."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_broken(page, link):
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return not target.exists() or bool(anchor and anchor not in anchors(target))


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_images_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    assert [link for link in links if "://" not in link and is_broken(page, link)] == []


def test_a_broken_link_is_seen():
    page = DOCS / "index.md"
    assert not is_broken(page, "howto/audit.md#long-audits")
    assert is_broken(page, "howto/audit.md#short-audits")
    assert is_broken(page, "howto/no-such-page.md")


def test_every_page_is_in_the_navigation():
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(), re.DOTALL | re.MULTILINE)
    entries = re.findall(r"^(?:.* <)?([\w/-]+)>?$", "\n".join(trees), re.MULTILINE)
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert len(entries) == len(set(entries))
    assert set(entries) - {"self"} == pages - {"index"}


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda page: page.relative_to(DOCS).as_posix())
def test_named_configurations_and_benchmarks_exist(page):
    configs = re.findall(r"\bconfigs/[\w/]+\.yaml", page.read_text())
    benchmarks = re.findall(r"python -m benchmarks\.(\w+)", page.read_text())
    files = [*configs, *(f"benchmarks/{name}" for name in benchmarks)]
    assert [file for file in files if not any((ROOT / (file + suffix)).exists() for suffix in ("", ".py"))] == []


def test_what_the_tutorial_saves_are_its_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)[1], {})
    assert np.load("train.npy").shape == (56, 1, 8, 8)
    assert np.load("held_out.npy").shape == (512, 1, 8, 8)


def described(module):
    """The constants of a module that have a docstring; autodoc leaves the others out."""
    body = ast.parse(Path(module.__file__).read_text()).body
    with_text = (first for first, then in pairwise(body) if isinstance(then, ast.Expr))
    targets = (getattr(node, "target", None) or getattr(node, "targets", [None])[0] for node in with_text)
    return {target.id for target in targets if isinstance(target, ast.Name)}


def shown():
    """What autodoc shows: of each module the members that the page names, or all that it exports or defines."""
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    options = r"((?:\n   :[\w-]+:.*)*)"
    for name, given in re.findall(r"^\.\. automodule:: ([\w.]+)" + options + "$", text, re.M):
        module = import_module(name)
        members, left_out = (
            set(re.findall(r"\w+", found[1])) if (found := re.search(rf":{option}: (.*)", given)) else set()
            for option in ("members", "exclude-members")
        )
        exported = getattr(module, "__all__", None) or [
            member for member, thing in vars(module).items()
            if not member.startswith("_") and getattr(thing, "__module__", None) == name
        ]  # fmt: skip
        for member in (members or set(exported)) - left_out:
            thing = getattr(module, member)
            if inspect.isclass(thing) or inspect.isfunction(thing) or member in described(module):
                yield thing
    for name, member in re.findall(r"^\.\. auto(?:data|function):: ([\w.]+)\.(\w+)$", text, re.M):
        yield getattr(import_module(name), member)


def test_every_public_name_is_in_the_reference():
    things = list(shown())  # kept, so that no two of them have one id
    identities = {id(thing) for thing in things}
    modules = [import_module(f"lightning_iet.{name}") for name in PACKAGES]
    public = [(module.__name__, name, getattr(module, name)) for module in modules for name in module.__all__]
    names = [name.replace("-", "_") for name in COMMANDS]
    public += [("tools", name, getattr(import_module(f"lightning_iet.tools.{name}"), name)) for name in names]
    for path in (ROOT / "lightning_iet" / "functional").glob("[!_]*.py"):  # of each measure and method its own function
        module = import_module(f"lightning_iet.functional.{path.stem}")
        if inspect.isfunction(function := getattr(module, path.stem, None)):
            public.append((module.__name__, path.stem, function))
    assert [(module, name) for module, name, thing in public if id(thing) not in identities] == []


def test_what_the_reference_shows_has_a_docstring():
    assert [thing for thing in shown() if not (inspect.getdoc(thing) or isinstance(thing, tuple))] == []


def test_the_packages_are_all():
    inits = (ROOT / "lightning_iet").glob("*/__init__.py")
    public = {
        path.parent.name for path in inits if hasattr(import_module(f"lightning_iet.{path.parent.name}"), "__all__")
    }
    assert public == {name for name in PACKAGES if "." not in name}


def test_the_names_of_the_package_itself_are_in_its_table():
    table = re.findall(r"^\| \[?`(\w+)`", (DOCS / "reference" / "index.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(lightning_iet.__all__)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.relative_to(ROOT).as_posix())
def test_cards_of_methods_name_files_that_are_there(card):
    names = re.findall(r"`([\w/]+\.py)`", card.read_text())
    places = (card.parent, ROOT / "lightning_iet")
    assert [name for name in names if not any((place / name).is_file() for place in places)] == []
