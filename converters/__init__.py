"""Checkpoint formats: every adapter file becomes a Bundle, and a Bundle becomes a file. From the file alone; no model is needed."""

from converters.bundled import embeddings, write_embeddings
from converters.conversion import ConvertReport, convert
from converters.detection import Detection, Fit
from converters.engine import detect, fitting, read, unknown_family
from converters.families import TABLES
from converters.formats import FORMATS
from converters.holding import refusal
from converters.inspection import Inspection, inspect
from converters.opening import components_in
from converters.writing import write

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
    "read",
    "refusal",
    "unknown_family",
    "write",
    "write_embeddings",
]
