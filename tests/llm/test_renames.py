"""Adapters that were made with a former version of transformers, whose models had other names: what PEFT does with them, on models of the same kinds."""

from __future__ import annotations

import contextlib
import json
import time

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import diffpeft
from diffpeft import CheckpointError, ConfigError, LoraConfig, MissingKeysError, PeftModel, UnknownKeysError
from tests.llm.test_target_parameters import mixtral, qwen
from tests.test_patterns import SLOW

SAME = dict(rtol=1e-4, atol=1e-5)
IDS = torch.tensor([[3, 5, 9, 20, 3, 50], [1, 2, 7, 9, 60, 4]])
TEXT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=96,
)
EYES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
pytestmark = pytest.mark.filterwarnings("ignore")


def llava(kind="Llava"):
    config = getattr(transformers, f"{kind}Config")
    text = transformers.LlamaConfig(**TEXT)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(
        config(vision_config=transformers.CLIPVisionConfig(**EYES), text_config=text, image_token_index=95)
    )


def gemma3():
    text = dict(**TEXT, head_dim=8, sliding_window=8)
    eyes = transformers.SiglipVisionConfig(**EYES)
    config = transformers.Gemma3Config(
        vision_config=eyes, text_config=text, mm_tokens_per_image=4, image_token_index=95
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl():
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
    text = dict(**TEXT, rope_parameters=rope, pad_token_id=0)
    eyes = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, patch_size=4, mlp_ratio=2)
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=eyes)
    )


VISION = {  # {model: (how its text layers were called before, how the text model's q_proj is found now)}
    "llava": (llava, "language_model.model.layers.{}.self_attn."),
    "llava next": (lambda: llava("LlavaNext"), "language_model.model.layers.{}.self_attn."),
    "gemma3": (gemma3, "language_model.model.layers.{}.self_attn."),
    "qwen2-vl": (qwen2_vl, "model.layers.{}.self_attn."),
}
EXPERTS = {
    "mixtral": (mixtral, "model.layers.{}.block_sparse_moe.", ("w1", "w3"), "w2"),
    "qwen3": (qwen, "model.layers.{}.mlp.", ("gate_proj", "up_proj"), "down_proj"),
}


def base(make):
    torch.manual_seed(0)
    return make().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def factors(name, o, i, r=4):
    generator = torch.Generator().manual_seed(len(name) * o + i + sum(map(ord, name)))
    pair = {"A": torch.randn(r, i, generator=generator), "B": torch.randn(o, r, generator=generator)}
    return {f"base_model.model.{name}.lora_{n}.weight": t * 0.3 for n, t in pair.items()}


def written(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def of_text(case):
    make, old = VISION[case]
    out = {"q_proj": 32, "v_proj": 32 if case == "none" else 16}
    return make, {k: t for i in range(2) for n, o in out.items() for k, t in factors(old.format(i) + n, o, 32).items()}


def of_experts(case, parts=None, experts=range(4), router=True):
    make, old, fused, down = EXPERTS[case]
    parts, tensors = parts or (*fused, down), {}
    model = make()
    inner = model.model.layers[0].mlp.experts.down_proj.shape[-1]
    for i in range(2):
        where = old.format(i)
        tensors |= factors(f"model.layers.{i}.self_attn.q_proj", 32, 32)
        tensors |= factors(f"{where}gate", 4, 32) if router else {}
        for e in experts:
            for part in parts:
                o, i_ = (32, inner) if part == down else (inner, 32)
                tensors |= factors(f"{where}experts.{e}.{part}", o, i_)
    return make, tensors, ["q_proj", *parts, *(["gate"] if router else [])]


@pytest.mark.parametrize("case", VISION)
def test_renamed_layers_of_vision_language_models_have_their_effect(case, tmp_path):
    make, tensors = of_text(case)
    targets = r".*(language_model|model\.layers).*\.(q_proj|v_proj)"
    folder = written(tmp_path / "old", tensors, target_modules=targets)
    before = VISION[case][1].partition("layers")[0]
    now = {k.replace(f"model.{before}layers", "model.model.language_model.layers"): t for k, t in tensors.items()}
    want = logits(peft.PeftModel.from_pretrained(base(make), written(tmp_path / "now", now, target_modules=targets)))
    assert not torch.allclose(want, logits(base(make)), **SAME)
    if case != "qwen2-vl":  # which PEFT loads without any effect
        torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base(make), folder)), want, **SAME)
    ours = PeftModel.from_pretrained(base(make), folder)
    torch.testing.assert_close(logits(ours), want, **SAME)
    ours.save_pretrained(tmp_path / "new")
    for lib in (peft, diffpeft):
        torch.testing.assert_close(logits(lib.PeftModel.from_pretrained(base(make), tmp_path / "new")), want, **SAME)
    fresh = diffpeft.get_peft_model(base(make), LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    diffpeft.set_peft_model_state_dict(fresh, tensors)
    torch.testing.assert_close(logits(fresh), want, **SAME)
    fresh.load_adapter(folder, "other")
    fresh.set_adapter("other")
    torch.testing.assert_close(logits(fresh), want, **SAME)


@pytest.mark.parametrize("how", ["names", "expression"])
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_one_by_one_become_a_lora_on_their_parameter_as_in_peft(case, how, tmp_path):
    make, tensors, names = of_experts(case)
    targets = names if how == "names" else rf".*\.({'|'.join(names)})"
    folder = written(tmp_path / "old", tensors, target_modules=targets)
    theirs = peft.PeftModel.from_pretrained(base(make), folder)
    want = logits(theirs)
    ours = PeftModel.from_pretrained(base(make), folder)
    torch.testing.assert_close(logits(ours), want, **SAME)
    assert not torch.allclose(want, logits(base(make)), **SAME)
    one, other = ours.peft_config["default"], theirs.peft_config["default"]
    for field in ("target_modules", "target_parameters"):
        assert {*getattr(one, field)} == {*getattr(other, field)}
    assert one.rank_pattern == other.rank_pattern and one.alpha_pattern == other.alpha_pattern
    ours.save_pretrained(tmp_path / "new")
    for lib in (peft, diffpeft):
        torch.testing.assert_close(logits(lib.PeftModel.from_pretrained(base(make), tmp_path / "new")), want, **SAME)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("parts", "router"), [("fused", False), ("down", True)])
@pytest.mark.parametrize("case", EXPERTS)
def test_a_part_of_the_experts_is_what_it_was(case, parts, router, rslora, tmp_path):
    """By the definition: PEFT takes the fused parameter for an inner one also where it is the only one, and has another scale with use_rslora."""
    make, tensors, names = of_experts(
        case, EXPERTS[case][2] if parts == "fused" else (EXPERTS[case][3],), router=router
    )
    folder = written(tmp_path / "old", tensors, target_modules=names, use_rslora=rslora)
    want, scale = base(make), 6 / (2 if rslora else 4)
    for i, layer in enumerate(want.model.layers):

        def get(name):
            A, B = (tensors[f"base_model.model.{name}.lora_{n}.weight"] for n in "AB")
            return B @ A

        where, (_, _, fused, down) = EXPERTS[case][1].format(i), EXPERTS[case]
        layer.self_attn.q_proj.weight.data += scale * get(f"model.layers.{i}.self_attn.q_proj")
        if router:
            layer.mlp.gate.weight.data += scale * get(f"{where}gate")
        for e in range(4):
            if parts == "fused":
                layer.mlp.experts.gate_up_proj.data[e] += scale * torch.cat(
                    [get(f"{where}experts.{e}.{p}") for p in fused]
                )
            else:
                layer.mlp.experts.down_proj.data[e] += scale * get(f"{where}experts.{e}.{down}")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(make), folder)), logits(want), **SAME)


def test_what_is_not_whole_is_named():
    make, tensors, names = of_experts("mixtral", experts=range(3))
    wrapped = diffpeft.get_peft_model(base(make), LoraConfig(r=4, lora_alpha=6, target_modules=names))
    before = logits(wrapped)
    with pytest.raises(MissingKeysError, match=r"experts\.3\.w1"):
        diffpeft.set_peft_model_state_dict(wrapped, tensors)
    _, tensors, _ = of_experts("mixtral")
    key = next(k for k in tensors if "experts.2.w2.lora_A" in k)
    with pytest.raises(CheckpointError, match="different ranks"):
        diffpeft.set_peft_model_state_dict(wrapped, {**tensors, key: tensors[key][:2]})
    assert torch.equal(logits(wrapped), before)
    for lib in (peft, diffpeft):
        with pytest.raises(ValueError, match="without also targeting w3"):
            lib.get_peft_model(base(make), lib.LoraConfig(target_modules=["q_proj", "w1"]))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "w1", "w2", "w3"], ["gate"], r".*\.(q_proj|w2)"])
def test_fresh_adapters_are_on_what_peft_chooses(targets):
    found = []
    for lib in (peft, diffpeft):
        wrapped = lib.get_peft_model(base(mixtral), lib.LoraConfig(r=4, target_modules=targets))
        config = wrapped.peft_config["default"]
        found.append(
            (
                {*config.target_modules},
                {*(config.target_parameters or ())},
                dict(config.rank_pattern),
                sorted(tuple(p.shape) for p in wrapped.parameters() if p.requires_grad),
            )
        )
    assert found[0] == found[1]


def test_other_models_names_stay_unknown(tmp_path):
    folder = written(tmp_path, factors("model.layers.0.somewhere.q_proj", 32, 32), target_modules=["q_proj"])
    with pytest.raises(UnknownKeysError, match="somewhere"):
        PeftModel.from_pretrained(base(llava), folder)


# key_mapping

MAPPING = {r"^old\.(\d+)\.": r"model.layers.\1.", "^never": "x"}


def renamed_folder(path):
    names = [f"old.{i}.self_attn.q_proj" for i in range(2)]
    return written(path, {k: t for n in names for k, t in factors(n, 32, 32).items()}, target_modules=["q_proj"])


def test_keys_are_mapped_as_in_peft(tmp_path):
    folder = renamed_folder(tmp_path)
    theirs = peft.utils.load_peft_weights(str(folder), device="cpu", key_mapping=MAPPING)
    ours = diffpeft.load_peft_weights(folder, key_mapping=MAPPING)
    assert ours.keys() == theirs.keys() and all("model.layers" in k for k in ours)
    want = logits(peft.PeftModel.from_pretrained(base(mixtral), folder, key_mapping=MAPPING))
    assert not torch.allclose(want, logits(base(mixtral)), **SAME)
    wrapped = PeftModel.from_pretrained(base(mixtral), folder, key_mapping=MAPPING)
    torch.testing.assert_close(logits(wrapped), want, **SAME)
    wrapped.load_adapter(folder, "two", key_mapping=MAPPING)
    wrapped.load_adapter(folder, "two", key_mapping=MAPPING)
    wrapped.set_adapter("two")
    torch.testing.assert_close(logits(wrapped), want, **SAME)
    model = base(mixtral)
    type(model)._checkpoint_conversion_mapping = MAPPING
    try:
        torch.testing.assert_close(logits(PeftModel.from_pretrained(model, folder)), want, **SAME)
    finally:
        del type(model)._checkpoint_conversion_mapping


@pytest.mark.parametrize("pattern", SLOW)
def test_no_mapping_runs_for_ever(pattern, tmp_path):
    began = time.perf_counter()
    with contextlib.suppress(ConfigError):
        diffpeft.load_peft_weights(renamed_folder(tmp_path), key_mapping={f"^{pattern}": "x"})
    assert time.perf_counter() - began < 3


def test_a_mapping_for_other_keys_is_refused(tmp_path):
    folder = renamed_folder(tmp_path)
    save_file({"other": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="key_mapping"):
        diffpeft.load_peft_weights(folder, key_mapping=MAPPING)
    assert load_file(folder / "adapter_model.safetensors").keys() == {"other"}
