"""The report of an audit: a page, a table of pairs, figures for machines, pictures."""

from typing import TYPE_CHECKING

from lightning_iet.utilities.lazy import lazy_exports

if TYPE_CHECKING:
    from lightning_iet.audit.report.page import write_report
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["write_report"]
