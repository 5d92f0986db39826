"""One HTML page of all committed results, the paper's tables beside ours; and the curve of a run while it trains."""

from retentive.report.live import LivePlot
from retentive.report.page import build, page

__all__ = ["LivePlot", "build", "page"]
