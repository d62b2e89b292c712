"""Checkpoint formats: every adapter file becomes a Bundle, and a Bundle becomes a file. From the file alone; no model is needed."""

from diffpeft.converters.bundled import embeddings, write_embeddings
from diffpeft.converters.conversion import ConvertReport, convert
from diffpeft.converters.detection import Detection, Fit
from diffpeft.converters.engine import detect, fitting, read, unknown_family
from diffpeft.converters.families import TABLES
from diffpeft.converters.formats import FORMATS
from diffpeft.converters.holding import refusal
from diffpeft.converters.inspection import Inspection, inspect
from diffpeft.converters.locating import located
from diffpeft.converters.opening import components_in
from diffpeft.converters.short_name import SHORT, share
from diffpeft.converters.writing import write

__all__ = [
    "FORMATS",
    "TABLES",
    "ConvertReport",
    "Detection",
    "Fit",
    "Inspection",
    "components_in",
    "convert",
    "detect",
    "embeddings",
    "fitting",
    "inspect",
    "located",
    "read",
    "refusal",
    "unknown_family",
    "write",
    "write_embeddings",
]

if __name__ == SHORT:  # by its place in a checkout
    share()
