"""`diffpeft.helpers`, `diffpeft.functional` and `diffpeft.utils`: what PEFT's say and do."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import AdapterStateError, ConfigError, functional, helpers, utils
from tests.llm.models import batch, model

peft = pytest.importorskip("peft")
theirs = pytest.importorskip("peft.helpers")

CONFIG = dict(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def pair(**fields):
    """PEFT's model and ours with the same LoRA."""
    models = [lib.get_peft_model(model(), lib.LoraConfig(**CONFIG, **fields)).eval() for lib in (peft, diffpeft)]
    diffpeft.set_peft_model_state_dict(models[1], peft.get_peft_model_state_dict(models[0]))
    return models


def logits(net) -> torch.Tensor:
    with torch.no_grad():
        return net(**batch()).logits


@pytest.mark.parametrize("multiplier", [0.5, -1.5, 0, 3])
def test_rescaling_is_pefts(multiplier):
    their_model, ours = pair()
    before = logits(ours)
    with theirs.rescale_adapter_scale(their_model, multiplier), helpers.rescale_adapter_scale(ours, multiplier):
        torch.testing.assert_close(logits(ours), logits(their_model), rtol=1e-4, atol=1e-5)
        layer = ours.get_base_model().model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == pytest.approx(multiplier * 5 / 3)
        ours.add_adapter("other")
        ours.set_adapter("other")
        ours.set_adapter("default")
    assert torch.equal(logits(ours), before) and layer.scaling["default"] == 5 / 3


def test_a_merge_in_the_block_is_of_what_acts_there():
    ours = pair()[1]
    with helpers.rescale_adapter_scale(ours, 0.5):
        scaled = logits(ours)
        merged = ours.merge_and_unload()
    torch.testing.assert_close(logits(merged), scaled, rtol=1e-4, atol=1e-5)
    ours = pair()[1]
    plain = logits(ours)
    with helpers.rescale_adapter_scale(ours, 0.5):
        ours.merge_adapter()
        torch.testing.assert_close(logits(ours), scaled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(ours), scaled, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    ours.set_adapter("default")
    assert torch.equal(logits(ours), plain)


def test_blocks_nest_and_end_after_errors():
    ours = pair()[1].get_base_model()  # what carries it may be a bare model too
    before = logits(ours)
    with pytest.raises(ZeroDivisionError), helpers.rescale_adapter_scale(ours, 2.0):
        with helpers.rescale_adapter_scale(ours, 0.5):
            torch.testing.assert_close(logits(ours), before, rtol=1e-5, atol=1e-6)
        raise ZeroDivisionError
    assert torch.equal(logits(ours), before)


def test_what_cannot_be_rescaled_is_refused():
    with pytest.raises(TypeError, match="Argument multiplier should be of type float"):
        helpers.rescale_adapter_scale(pair()[1], "a").__enter__()
    with pytest.raises(ConfigError, match="scaling is only supported for models with `LoraLayer`s"):
        helpers.rescale_adapter_scale(model(), 0.5).__enter__()
    ours = pair()[1]
    ours.merge_adapter()
    with pytest.raises(AdapterStateError, match="merged"):
        helpers.rescale_adapter_scale(ours, 0.5).__enter__()


def test_other_methods_are_not_rescaled():
    net = model().eval()
    diffpeft.inject_adapter_in_model(diffpeft.LoHaConfig(target_modules=["k_proj"], init_weights=False), net, "loha")
    alone = logits(net)
    diffpeft.inject_adapter_in_model(
        diffpeft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), net, "lora"
    )
    functional.set_adapter(net, ["loha", "lora"])
    with helpers.rescale_adapter_scale(net, 0.0):
        torch.testing.assert_close(logits(net), alone, rtol=1e-5, atol=1e-6)


def test_check_if_peft_model(tmp_path):
    assert not helpers.check_if_peft_model(tmp_path) and not helpers.check_if_peft_model("nobody/nothing")
    pair()[1].save_pretrained(tmp_path)
    assert helpers.check_if_peft_model(tmp_path) and helpers.check_if_peft_model(str(tmp_path))


@pytest.mark.parametrize("method", ["forward", "generate", "all"])
def test_signatures_are_updated(method):
    ours = pair()[1]
    plain = inspect.signature(ours.forward)
    before = logits(ours)
    helpers.update_signature(ours, method)
    base = type(ours.get_base_model())
    for name in ("forward", "generate"):
        updated = method in (name, "all")
        expected = list(inspect.signature(getattr(base, name)).parameters)[1:]
        assert (list(inspect.signature(getattr(ours, name)).parameters) == expected) is updated
        assert not updated or getattr(ours, name).__doc__ == getattr(base, name).__doc__
    assert "forward" not in vars(ours) or inspect.signature(ours.forward) != plain
    assert torch.equal(logits(ours), before)
    if method != "forward":
        assert (
            ours.generate(**batch(), max_new_tokens=2, min_new_tokens=2).shape[1] == batch()["input_ids"].shape[1] + 2
        )
    with pytest.raises(ConfigError, match="nope is not supported"):
        helpers.update_signature(ours, "nope")


def test_inputs_keep_their_dtype():
    """Nothing casts inputs, inside of the block or outside: adapters compute in the dtype that their layer does."""
    net = nn.Sequential(nn.Linear(4, 3, dtype=torch.bfloat16))
    net = diffpeft.get_peft_model(net, diffpeft.LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    with helpers.disable_input_dtype_casting(net):
        inside = net(x)
    assert inside.dtype == torch.bfloat16 and torch.equal(inside, net(x))


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bare"])
def test_functions_on_models(wrapped):
    """PEFT's functions act on models with a wrapper and without."""
    ours = pair()[1]
    net = ours if wrapped else ours.get_base_model()
    base = ours.get_base_model()
    default = logits(base)
    diffpeft.inject_adapter_in_model(
        diffpeft.LoraConfig(r=2, target_modules=["q_proj"]), base, "other"
    ) if not wrapped else (
        ours.add_adapter("other", diffpeft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    )
    functional.set_adapter(net, "other")
    layer = base.model.layers[1].self_attn.q_proj
    assert layer.active_adapters == ["other"] and layer.adapters["other"].lora_A.requires_grad
    assert not layer.adapters["default"].lora_A.requires_grad
    functional.set_adapter(net, ["default", "other"], inference_mode=True)
    assert layer.active_adapters == ["default", "other"] and not layer.adapters["other"].lora_A.requires_grad
    functional.set_requires_grad(net, "other")
    assert layer.adapters["other"].lora_A.requires_grad and not layer.adapters["default"].lora_A.requires_grad
    layer.adapters["other"].to(torch.bfloat16)
    functional.cast_adapter_dtype(net, "other", autocast_adapter_dtype=False)
    assert layer.adapters["other"].lora_A.dtype == torch.bfloat16
    functional.cast_adapter_dtype(net, "other")
    assert layer.adapters["other"].lora_A.dtype == torch.float32
    functional.set_adapter(net, "other")
    assert functional.delete_adapter(net, "other", "lora_") == ["default"]
    assert torch.equal(logits(base), default)


def test_base_state_dicts():
    net = model()
    plain = {key: t.clone() for key, t in net.state_dict().items()}
    config = dict(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    ours = diffpeft.get_peft_model(net, diffpeft.LoraConfig(**config))
    their_model = peft.get_peft_model(model(), peft.LoraConfig(**config))
    found = diffpeft.get_base_model_state_dict(ours)
    assert list(found) == list(plain) and {*found} == {*peft.get_base_model_state_dict(their_model)}
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    ours.eval()
    before, other = logits(ours), {key: t + 0.1 for key, t in plain.items()}
    assert diffpeft.set_base_model_state_dict(ours, other) == ([], [])
    assert not torch.equal(logits(ours), before) and torch.equal(
        net.lm_head.base_layer.weight if False else found["lm_head.weight"], other["lm_head.weight"]
    )
    del other["lm_head.weight"]
    for lib, wrapped in ((peft, their_model), (diffpeft, ours)):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict.*lm_head.weight"):
            lib.set_base_model_state_dict(wrapped, other)
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict.*nope"):
            lib.set_base_model_state_dict(wrapped, {**plain, "nope": torch.ones(1)})
        missing, unexpected = lib.set_base_model_state_dict(wrapped, {**other, "nope": torch.ones(1)}, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], ["nope"])
    ours.set_adapter("default")
    bare = diffpeft.get_peft_model(model(), diffpeft.LoraConfig(r=2, target_modules=["q_proj"]))
    bare.merge_adapter()
    with pytest.raises(AdapterStateError, match="merged"):
        diffpeft.set_base_model_state_dict(bare, plain)


def test_small_functions_are_pefts():
    from peft import utils as reference

    W = nn.Parameter(torch.randn(3, 4))
    assert torch.equal(utils.transpose(W, True), reference.transpose(W, True)) and utils.transpose(W, False) is W
    assert isinstance(utils.transpose(W, True), nn.Parameter)
    ids = torch.tensor([[5, -100, 7, 8]])
    assert torch.equal(utils.shift_tokens_right(ids, 9, 2), reference.shift_tokens_right(ids, 9, 2))
    with pytest.raises(ValueError, match="pad_token_id has to be defined"):
        utils.shift_tokens_right(ids, None, 2)
    assert utils.infer_device() == reference.infer_device()
    assert utils.id_tensor_storage(W[1:]) == reference.id_tensor_storage(W[1:])
    past = [torch.randn(2, 3, 4, 5, 6) for _ in range(4)]
    for a, b in zip(
        utils.bloom_model_postprocess_past_key_value(past),
        reference.bloom_model_postprocess_past_key_value(past),
        strict=True,
    ):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    models = pair()
    for lib, net in zip((reference, utils), models, strict=True):
        lib.cast_mixed_precision_params(net, torch.bfloat16)
        dtypes = {(p.requires_grad, p.dtype) for p in net.parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert utils.get_quantization_config(model(), "gptq") is None


def test_configs_from_fields():
    config = diffpeft.get_peft_config({"peft_type": "LORA", "r": 3, "target_modules": ["q"]})
    assert isinstance(config, diffpeft.LoraConfig) and config.r == 3
    with pytest.raises(KeyError):
        diffpeft.get_peft_config({})
    with pytest.raises(TypeError, match="foo"):
        diffpeft.get_peft_config({"peft_type": "LORA", "foo": 1})
    with pytest.raises(ValueError, match="NOPE"):
        diffpeft.get_peft_config({"peft_type": "NOPE"})


def test_no_module_is_pefts_error():
    for fields in (
        {"target_modules": ["nope"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    ):
        for lib in (peft, diffpeft):
            with pytest.raises(lib.NoMatchingPeftModuleError) as raised:
                lib.get_peft_model(model(), lib.LoraConfig(**fields))
            assert isinstance(raised.value, lib.PeftError) and isinstance(raised.value, ValueError)
