"""What the commands show while they work."""

from diffpeft.train.progress import Progress

__all__ = ["Progress"]
