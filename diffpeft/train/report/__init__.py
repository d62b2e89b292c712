"""report.html: a run while it is under way and after it, as one self-contained page."""

from diffpeft.train.report.page import FINISHED, Page, PictureRow, Pictures, Status, Use

__all__ = ["FINISHED", "Page", "Pictures", "PictureRow", "Status", "Use"]
