"""Which tensors a method has. A role is PEFT's parameter name; how a format spells it is the format's affair."""

ROLES = {"lora": ("lora_A", "lora_B")}

# Tensor names of methods that exist in files and that no method here reads: {how the last part of a key starts: method}.
FOREIGN = {
    "lora_mid": "lora with a Tucker core",
    "dora_scale": "dora",
    "lora_magnitude_vector": "dora",
    "magnitude": "dora",
    "lora_embedding_": "lora on an embedding",
    "hada_": "loha",
    "lokr_": "lokr",
    "oft_": "oft",
    "boft_": "boft",
    "ia3_l": "ia3",
    "on_input": "ia3",
    "a1.": "glora",
    "a2.": "glora",
    "b1.": "glora",
    "b2.": "glora",
    "bm.": "glora",
    "diff": "full",
    "set_weight": "full",
    "w_norm": "norm",
    "b_norm": "norm",
    "vera_lambda_": "vera",
    "rescale": "oft",
    "lora_B.bias": "lora with a bias",
}
