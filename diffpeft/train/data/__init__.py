"""Images and their captions from a folder, and the account of what was found. No torch is imported before pixels are asked for."""

from diffpeft.train.data.account import Account
from diffpeft.train.data.find import ENDINGS, Example, captioned, find, images_in, survey
from diffpeft.train.data.read import framed, pixels, stacked

__all__ = ["ENDINGS", "Account", "Example", "captioned", "find", "framed", "images_in", "pixels", "stacked", "survey"]
