"""How files spell adapters. One file a format, one line here."""

from diffpeft.converters.formats.base import Answer, Format, KeyParts
from diffpeft.converters.formats.bfl import BFL
from diffpeft.converters.formats.comfyui import ComfyUI
from diffpeft.converters.formats.diffusers import Diffusers
from diffpeft.converters.formats.diffusers_old import DiffusersOld
from diffpeft.converters.formats.kohya import Kohya, Wrapper
from diffpeft.converters.formats.onetrainer import OneTrainer
from diffpeft.converters.formats.peft import Peft
from diffpeft.converters.formats.safeloras import SafeLoras
from diffpeft.converters.formats.xlabs import XLabs

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
