"""How models name their layers. One file an architecture, one line a family here."""

from converters.families.ace_step import ACE_STEP, ACE_STEP_COMFYUI
from converters.families.auraflow import AURAFLOW
from converters.families.base import Encoder, Rule, Table
from converters.families.cogvideox import COGVIDEOX
from converters.families.flux import CHROMA, FLUX, FLUX2
from converters.families.flux3 import FLUX3
from converters.families.hidream import HIDREAM
from converters.families.hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO
from converters.families.hunyuan_video15 import HUNYUAN_VIDEO15, HUNYUAN_VIDEO15_COMFYUI
from converters.families.kandinsky5 import KANDINSKY5
from converters.families.ltx import LTX, LTX2
from converters.families.lumina import LUMINA2, Z_IMAGE
from converters.families.minimax_h3 import MINIMAX_H3
from converters.families.mochi import MOCHI
from converters.families.pixart import PIXART, SANA, SANA_VIDEO
from converters.families.qwen_image import QWEN_IMAGE
from converters.families.sd3 import SD3
from converters.families.unet import SD2, SD15, SDXL, SDXL_REFINER
from converters.families.wan import CHRONO_EDIT, HELIOS, SKYREELS_V2, WAN, WAN_ANIMATE2

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
    "hunyuan_video15": HUNYUAN_VIDEO15,
    "framepack": FRAMEPACK,
    "kandinsky5": KANDINSKY5,
    "sana_video": SANA_VIDEO,
    "skyreels_v2": SKYREELS_V2,
    "helios": HELIOS,
    "chrono_edit": CHRONO_EDIT,
    "wan_animate2": WAN_ANIMATE2,
    "minimax_h3": MINIMAX_H3,
    "flux3": FLUX3,
    "ace_step": ACE_STEP,
}
# families of which ComfyUI calls layers otherwise than the original program
COMFYUI: dict[str, Table] = {**TABLES, "hunyuan_video15": HUNYUAN_VIDEO15_COMFYUI, "ace_step": ACE_STEP_COMFYUI}

__all__ = ["COMFYUI", "TABLES", "Encoder", "Rule", "Table"]
