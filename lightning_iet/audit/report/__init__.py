"""The report of an audit: a page, a table of pairs, figures for machines, pictures."""

from lightning_iet.audit.report.writing import write_report

__all__ = ["write_report"]
