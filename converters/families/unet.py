"""UNet2DConditionModel: SD1.x, SD2.x, SDXL. diffusers' names for however many blocks, and the numbering of LDM and SGM for one layout."""

from collections.abc import Iterator, Sequence

from diffpeft.converters.families import text
from diffpeft.converters.families.base import Rule, renamed, same, table, within

_BLOCKS = ("down_blocks.{}", "mid_block", "up_blocks.{}")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMER = (
    *(f"attn{n}.{layer}" for n in (1, 2) for layer in _ATTENTION),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)
_IN_ATTENTION = ("norm", "proj_in", "proj_out", *(f"transformer_blocks.{{}}.{layer}" for layer in _TRANSFORMER))
_IN_BLOCK = (
    *(f"attentions.{{}}.{layer}" for layer in _IN_ATTENTION),
    *(f"resnets.{{}}.{layer}" for layer in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")),
    "downsamplers.{}.conv",
    "upsamplers.{}.conv",
)
LAYERS = (
    "conv_in",
    "conv_norm_out",
    "conv_out",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "time_embedding.cond_proj",
    "class_embedding.linear_1",
    "class_embedding.linear_2",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
    "encoder_hid_proj",  # Kolors': it is an SDXL that reads another text encoder
    *(f"{block}.{layer}" for block in _BLOCKS for layer in _IN_BLOCK),
)

_TOP = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_ADDED = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def numbered(attention: Sequence[bool], resnets: int = 2) -> Iterator[Rule]:
    """The rules of the blocks, of which LDM numbers all layers through. `attention`: which levels have it, the outermost first."""
    last = len(attention) - 1
    for level, attends in enumerate(attention):
        number, down = 1 + level * (resnets + 1), f"down_blocks.{level}"
        for n in range(resnets):
            yield from _layer(f"input_blocks.{number + n}", down, n, attends)
        if level < last:
            yield from renamed({f"input_blocks.{number + resnets}.0.op": f"{down}.downsamplers.0.conv"})
    yield from _layer("middle_block", "mid_block", 0, True)
    yield from within("middle_block.2.", "mid_block.resnets.1.", renamed(_RESNET))
    for level, attends in enumerate(reversed(attention)):
        number, up = level * (resnets + 1), f"up_blocks.{level}"
        for n in range(resnets + 1):
            yield from _layer(f"output_blocks.{number + n}", up, n, attends)
        if level < last:  # the upsampler comes after the attention, so its number tells whether there is one
            yield from renamed({f"output_blocks.{number + resnets}.{1 + attends}.conv": f"{up}.upsamplers.0.conv"})


def _layer(original: str, diffusers: str, n: int, attends: bool) -> Iterator[Rule]:
    yield from within(f"{original}.0.", f"{diffusers}.resnets.{n}.", renamed(_RESNET))
    if attends:
        yield from within(f"{original}.1.", f"{diffusers}.attentions.{n}.", same(*_IN_ATTENTION))


_SD = (*renamed(_TOP), *numbered((True, True, True, False)))
_SDXL = (*renamed(_TOP | _ADDED), *numbered((False, True, True)))
_REFINER = (*renamed(_TOP | _ADDED), *numbered((False, True, True, False)))
_CLIPS = {
    "text_encoder": text.clip("lora_te1_", "clip_l"),
    "text_encoder_2": text.clip("lora_te2_", "clip_g", projection=True),
}

SD15, SD2 = (
    table(
        _SD, {"text_encoder": text.clip("lora_te_", name)}, denoisers=("unet",), layers=LAYERS, flat_is_diffusers=True
    )
    for name in ("clip_l", "clip_h")
)
SDXL = table(_SDXL, _CLIPS, denoisers=("unet",), layers=LAYERS)
SDXL_REFINER = table(
    _REFINER, {"text_encoder_2": text.clip("lora_te_", "clip_g", projection=True)}, denoisers=("unet",), layers=LAYERS
)
