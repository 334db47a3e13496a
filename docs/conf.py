"""How the site is built: ``sphinx-build -W docs site``. Nothing of it comes from a network, formulas included."""

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")
OPTION = re.compile(r"(?<=>)--?[A-Za-z][\w.-]*")  # where an element of the page begins or ends
DECLARATIONS = {
    "full_state_update",
    "higher_is_better",
    "is_differentiable",
    "plot_lower_bound",
    "plot_upper_bound",
    "settings",
}
FRAMEWORKS = ("lightning.", "pytorch_lightning.", "torch.", "argparse", "jsonargparse")

project = "lightning-iet"
author = "The lightning-iet developers"
version = release = installed_version("lightning-iet")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_static"]
smartquotes = False  # two dashes begin an option

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_use_ivar = True  # attributes that a docstring lists are not listed again
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"lightning-iet {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_dark_style = "github-dark"


def visit_math(translator: Any, node: nodes.Node) -> None:
    """Write a formula as MathML, which browsers draw without a script."""
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def name_what_is_outside(_: Sphinx, page: str, source: list[str]) -> None:
    """Name files of the repository that are no part of the site; a link would lead nowhere."""
    folder = (DOCS / page).parent

    def plain(link: re.Match[str]) -> str:
        path = (folder / link[2]).resolve()
        if path.is_relative_to(DOCS):
            return link[0]
        name = path.relative_to(DOCS.parent).as_posix()
        return f"`{name}`" if link[1].strip("`") == name else f"{link[1]} (`{name}`)"

    source[0] = LINK.sub(plain, source[0])


def skip_hooks(_: Sphinx, what: str, name: str, member: object, skip: bool, __: object) -> bool | None:
    """Leave out what frameworks call, and what they are told; their own pages say when and why."""
    if name in DECLARATIONS:
        return True
    owner, _, method = getattr(member, "__qualname__", "").rpartition(".")
    kind = getattr(sys.modules.get(getattr(member, "__module__", None) or ""), owner, None)
    if skip or what != "class" or not isinstance(kind, type) or method.startswith("__"):
        return None
    bases = (base for base in kind.__mro__[1:] if base.__module__.startswith(FRAMEWORKS))
    return True if any(method in vars(base) for base in bases) else None


def draw_dashes(_: Sphinx, tree: nodes.document, __: str) -> None:
    """Put a dash between a parameter and what it means; autodoc leaves that to smart quotes."""
    for text in list(tree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def keep_options_whole(_: Sphinx, __: str, ___: str, context: dict[str, Any], ____: nodes.document | None) -> None:
    """Let options break after a dot or an underscore, where they are wider than their place, not after dashes."""

    def whole(option: re.Match[str]) -> str:
        return f'<span class="option">{re.sub("(?<=[._])", "<wbr>", option[0])}</span>'

    context["body"] = OPTION.sub(whole, context.get("body", ""))


def setup(app: Sphinx) -> None:
    """Add what the theme and the extensions do not do."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", name_what_is_outside)
    app.connect("autodoc-skip-member", skip_hooks)
    app.connect("doctree-resolved", draw_dashes)
    app.connect("html-page-context", keep_options_whole)
