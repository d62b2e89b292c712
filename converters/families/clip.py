"""CLIP text encoders (and their kin in transformers), with the level `text_model.` that files have."""

LAYERS = (
    *(
        f"text_model.encoder.layers.{{}}.{layer}"
        for layer in (*(f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")), "mlp.fc1", "mlp.fc2")
    ),
    "text_projection",
)
