"""One HTML page of all committed results: the paper's tables beside ours."""

from retentive.report.page import build, page

__all__ = ["build", "page"]
