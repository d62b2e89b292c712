"""UNet2DConditionModel, however many blocks: the layers of SD1.x, SD2.x and their kin, in diffusers' names."""

_BLOCKS = ("down_blocks.{}", "mid_block", "up_blocks.{}")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMER = (*(f"attn{n}.{layer}" for n in (1, 2) for layer in _ATTENTION), "ff.net.0.proj", "ff.net.2")
_IN_BLOCK = (
    "attentions.{}.proj_in",
    "attentions.{}.proj_out",
    *(f"attentions.{{}}.transformer_blocks.{{}}.{layer}" for layer in _TRANSFORMER),
    *(f"resnets.{{}}.{layer}" for layer in ("conv1", "conv2", "time_emb_proj", "conv_shortcut")),
    "downsamplers.{}.conv",
    "upsamplers.{}.conv",
)
LAYERS = (
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "time_embedding.cond_proj",
    "class_embedding.linear_1",
    "class_embedding.linear_2",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
    *(f"{block}.{layer}" for block in _BLOCKS for layer in _IN_BLOCK),
)
