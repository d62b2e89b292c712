"""How models name their layers. One file an architecture, one line a family here."""

from converters.families.auraflow import AURAFLOW
from converters.families.base import Encoder, Rule, Table
from converters.families.cogvideox import COGVIDEOX
from converters.families.flux import CHROMA, FLUX, FLUX2
from converters.families.hidream import HIDREAM
from converters.families.hunyuan_video import HUNYUAN_VIDEO
from converters.families.ltx import LTX, LTX2
from converters.families.lumina import LUMINA2, Z_IMAGE
from converters.families.mochi import MOCHI
from converters.families.pixart import PIXART, SANA
from converters.families.qwen_image import QWEN_IMAGE
from converters.families.sd3 import SD3
from converters.families.unet import SD2, SD15, SDXL, SDXL_REFINER
from converters.families.wan import WAN

TABLES: dict[str, Table] = {
    "sd15": SD15,
    "sd2": SD2,
    "sdxl": SDXL,
    "sdxl_refiner": SDXL_REFINER,
    "sd3": SD3,
    "flux": FLUX,
    "chroma": CHROMA,
    "flux2": FLUX2,
    "wan": WAN,
    "qwen_image": QWEN_IMAGE,
    "z_image": Z_IMAGE,
    "lumina2": LUMINA2,
    "hunyuan_video": HUNYUAN_VIDEO,
    "pixart": PIXART,
    "sana": SANA,
    "auraflow": AURAFLOW,
    "ltx": LTX,
    "ltx2": LTX2,
    "mochi": MOCHI,
    "cogvideox": COGVIDEOX,
    "hidream": HIDREAM,
}

__all__ = ["TABLES", "Encoder", "Rule", "Table"]
