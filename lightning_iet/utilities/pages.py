"""What reports in HTML share: templates that escape, files of a package, and the rules of their look."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined


def page_environment() -> Environment:
    """Return an environment of templates that escapes every value and refuses names that are not given.

    Example:
        >>> page_environment().from_string("{{ name }}").render(name="<b>")
        '&lt;b&gt;'
    """
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


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
