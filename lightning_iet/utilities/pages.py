"""What reports in HTML share: templates that escape, files of a package, and the rules of their look."""

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template


def page_environment() -> Environment:
    """Return an environment of templates that escapes every value and refuses names that are not given.

    Example:
        >>> page_environment().from_string("{{ name }}").render(name="<b>")
        '&lt;b&gt;'
    """
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def page_template(package: str, **filters: Callable[..., Any]) -> Template:
    """Return the template of a package's report, ``report.html.j2``, with filters of its own; compiled once.

    Example:
        >>> page_template("lightning_iet.search") is page_template("lightning_iet.search")
        True
    """
    environment = page_environment()
    environment.filters.update(filters)
    return environment.from_string(read_resource(package, "report.html.j2"))


def read_resource(package: str, name: str) -> str:
    """Return the text of a file in a package.

    Example:
        >>> read_resource("lightning_iet.utilities", "page.css").startswith("/* What all pages share.")
        True
    """
    return (files(package) / name).read_text(encoding="utf-8")


def stylesheet(package: str) -> str:
    """Return the rules that all pages share, and behind them those of a package's ``report.css``.

    Example:
        >>> stylesheet("lightning_iet.search").count("* { box-sizing: border-box; }")
        1
    """
    return read_resource("lightning_iet.utilities", "page.css") + read_resource(package, "report.css")
