"""A page about a curated dataset: what was kept, what was not, and why. It loads neither torch nor ray."""

from capfilt.report.report import AT_END, Limits, Report, make_report

__all__ = ["AT_END", "Limits", "Report", "make_report"]
