"""Images and their captions from folders, and the account of what is there. No torch is imported before pixels are asked for."""

from diffpeft.train.data.account import Account, Example
from diffpeft.train.data.buckets import Sizing
from diffpeft.train.data.find import captioned, find, survey
from diffpeft.train.data.layout import ENDINGS, images_in, sources_of
from diffpeft.train.data.read import View, pixels, stacked

__all__ = [
    "ENDINGS",
    "Account",
    "Example",
    "Sizing",
    "View",
    "captioned",
    "find",
    "images_in",
    "pixels",
    "sources_of",
    "stacked",
    "survey",
]
