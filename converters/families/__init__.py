"""How models name their layers. One file an architecture, one line a family here."""

from diffpeft.converters.families.ace_step import ACE_STEP, ACE_STEP_COMFYUI
from diffpeft.converters.families.auraflow import AURAFLOW
from diffpeft.converters.families.base import Encoder, Rule, Table
from diffpeft.converters.families.cogvideox import COGVIDEOX
from diffpeft.converters.families.cogview4 import COGVIEW4, GLM_IMAGE
from diffpeft.converters.families.cosmos import COSMOS
from diffpeft.converters.families.ernie_image import ERNIE_IMAGE
from diffpeft.converters.families.flux import BRIA, BRIA_FIBO, CHROMA, FLUX, FLUX2, LONGCAT_IMAGE, OVIS_IMAGE
from diffpeft.converters.families.flux3 import FLUX3
from diffpeft.converters.families.hidream import HIDREAM
from diffpeft.converters.families.hunyuan_image import HUNYUAN_IMAGE
from diffpeft.converters.families.hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO
from diffpeft.converters.families.hunyuan_video15 import HUNYUAN_VIDEO15, HUNYUAN_VIDEO15_COMFYUI
from diffpeft.converters.families.ideogram4 import IDEOGRAM4
from diffpeft.converters.families.kandinsky5 import KANDINSKY5
from diffpeft.converters.families.krea2 import KREA2
from diffpeft.converters.families.ltx import LTX, LTX2
from diffpeft.converters.families.lumina import BRIA_FIBO2, LUMINA2, OMNIGEN2, Z_IMAGE
from diffpeft.converters.families.minimax_h3 import MINIMAX_H3
from diffpeft.converters.families.mochi import MOCHI
from diffpeft.converters.families.nucleus_image import NUCLEUS_IMAGE
from diffpeft.converters.families.pixart import PIXART, SANA, SANA_VIDEO
from diffpeft.converters.families.prx import PRX
from diffpeft.converters.families.qwen_image import QWEN_IMAGE, QWEN_IMAGE21
from diffpeft.converters.families.sd3 import SD3
from diffpeft.converters.families.unet import SD2, SD15, SDXL, SDXL_REFINER
from diffpeft.converters.families.wan import CHRONO_EDIT, HELIOS, SKYREELS_V2, WAN, WAN_ANIMATE2

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
    "krea2": KREA2,
    "cosmos": COSMOS,
    "ideogram4": IDEOGRAM4,
    "ernie_image": ERNIE_IMAGE,
    "cogview4": COGVIEW4,
    "hunyuan_image": HUNYUAN_IMAGE,
    "qwen_image21": QWEN_IMAGE21,
    "omnigen2": OMNIGEN2,
    "longcat_image": LONGCAT_IMAGE,
    "ovis_image": OVIS_IMAGE,
    "bria": BRIA,
    "bria_fibo": BRIA_FIBO,
    "bria_fibo2": BRIA_FIBO2,
    "prx": PRX,
    "glm_image": GLM_IMAGE,
    "nucleus_image": NUCLEUS_IMAGE,
}
# families of which ComfyUI calls layers otherwise than the original program
COMFYUI: dict[str, Table] = {**TABLES, "hunyuan_video15": HUNYUAN_VIDEO15_COMFYUI, "ace_step": ACE_STEP_COMFYUI}

__all__ = ["COMFYUI", "TABLES", "Encoder", "Rule", "Table"]
