"""How files spell adapters. One file a format, one line here."""

from converters.formats.base import Answer, Format, KeyParts
from converters.formats.bfl import BFL
from converters.formats.comfyui import ComfyUI
from converters.formats.diffusers import Diffusers
from converters.formats.diffusers_old import DiffusersOld
from converters.formats.kohya import Kohya, Wrapper
from converters.formats.onetrainer import OneTrainer
from converters.formats.peft import Peft
from converters.formats.safeloras import SafeLoras
from converters.formats.xlabs import XLabs

# Where a file could be of several, the first counts.
FORMATS: dict[str, Format] = {
    "kohya": Kohya("kohya", originals=True),
    "kohya-diffusers": Kohya("kohya-diffusers", originals=False),
    "diffusers": Diffusers(),
    "peft": Peft(),
    "comfyui": ComfyUI(),
    "lycoris": Wrapper(),
    "diffusers-old": DiffusersOld(),
    "xlabs": XLabs(),
    "bfl": BFL(),
    "safeloras": SafeLoras(),
    "onetrainer": OneTrainer(),
}

__all__ = ["FORMATS", "Answer", "Format", "KeyParts"]
