"""One page of all that was measured, from the committed files of results: the paper's tables beside ours."""

from retentive.report.page import build, page

__all__ = ["build", "page"]
