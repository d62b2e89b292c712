"""Checkpoint formats: every adapter file becomes a Bundle, and a Bundle becomes a file. From the file alone; no model is needed."""

from converters.conversion import ConvertReport, convert
from converters.engine import FORMATS, TABLES, Detection, detect, fitting, read, refusal, write
from converters.inspection import Inspection, inspect

__all__ = [
    "FORMATS",
    "TABLES",
    "ConvertReport",
    "Detection",
    "Inspection",
    "convert",
    "detect",
    "fitting",
    "inspect",
    "read",
    "refusal",
    "write",
]
