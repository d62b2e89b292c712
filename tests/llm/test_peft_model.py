"""PeftModel beyond the quickstarts: adapters come, go and change; modules that are trained whole; errors; files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import diffpeft
from diffpeft import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    LoraConfig,
    NonFiniteError,
    PeftConfig,
    PeftModel,
    ShapeMismatchError,
    UnknownKeysError,
    UnknownNameError,
    UnsafeFileError,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tests.llm.models import batch, model, run
from tests.llm.test_quickstarts import SAME, seeded

CONFIGS = {
    "lora": (dict(r=4, init_lora_weights=False), "LoraConfig"),
    "rslora": (dict(r=4, use_rslora=True, init_lora_weights=False), "LoraConfig"),
    "dora": (dict(r=4, use_dora=True, init_lora_weights=False), "LoraConfig"),
    "lora patterns": (
        dict(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 3}, init_lora_weights=False),
        "LoraConfig",
    ),
    "lora bias": (dict(r=4, lora_bias=True, init_lora_weights=False), "LoraConfig"),
    "lora biases all": (dict(r=4, bias="all", init_lora_weights=False), "LoraConfig"),
    "lora biases": (dict(r=4, bias="lora_only", init_lora_weights=False), "LoraConfig"),
    "loha": (dict(r=4, init_weights=False), "LoHaConfig"),
    "lokr": (dict(r=2, init_weights=False), "LoKrConfig"),
    "lokr, full": (dict(r=64, init_weights=False), "LoKrConfig"),
    "oft": (dict(oft_block_size=4, init_weights=False), "OFTConfig"),
    "oft, exact": (dict(oft_block_size=4, use_cayley_neumann=False, init_weights=False), "OFTConfig"),
    "boft": (dict(boft_block_size=4, init_weights=False), "BOFTConfig"),
    "ia3": (dict(init_ia3_weights=False), "IA3Config"),
}


def made(lib, name, kind="bert-cls", **more):
    """A model with a random adapter."""
    fields, cls = CONFIGS[name]
    fields = {
        "target_modules": ["query", "value"] if kind.startswith("bert") else ["q_proj", "v_proj"],
        **fields,
        **more,
    }
    fields |= {"feedforward_modules": []} if cls == "IA3Config" else {}
    if cls == "LoraConfig" and "rank_pattern" in fields and kind.startswith("bert"):
        fields |= {"rank_pattern": {"query": 2}, "alpha_pattern": {"layer.1.attention.self.value": 3}}
    torch.manual_seed(5)
    return lib.get_peft_model(model(kind), getattr(lib, cls)(**fields)).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["bert-cls", "llama"])
def test_folders_of_each_library_in_the_other(name, kind, tmp_path):
    theirs = made(peft, name, kind)
    if name.startswith("lora biases"):
        for n, p in theirs.named_parameters():
            if n.endswith("bias") and p.requires_grad:
                p.data += 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(model(kind), tmp_path / "theirs")
    torch.testing.assert_close(run(ours, kind), run(theirs, kind), **SAME)
    ours.save_pretrained(tmp_path / "ours")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert a.keys() == b.keys()
    for key in a:
        if key.endswith(".bias") and not key.endswith("lora_B.bias"):  # kept as a difference to the base's
            torch.testing.assert_close(a[key], b[key], **SAME)
        else:
            assert torch.equal(a[key], b[key]), key
    one, other = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    assert one.keys() == other.keys()
    for field in one:
        same = (
            sorted(one[field]) == sorted(other[field]) if isinstance(one[field], list) else one[field] == other[field]
        )
        assert same, field
    again = peft.PeftModel.from_pretrained(model(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(run(again, kind), run(theirs, kind), **SAME)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "loftq"])
def test_inits_from_the_weight_leave_the_base_alone(init, tmp_path):
    base = model()
    want, weight = run(base), base.model.layers[0].self_attn.q_proj.weight.clone()
    ours = get_peft_model(base, LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj"])).eval()
    torch.testing.assert_close(run(ours), want, **SAME)
    assert torch.equal(base.model.layers[0].self_attn.q_proj.weight, weight)
    seeded(ours)
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["lora_alpha"] == 16 and config["init_lora_weights"] is True
    for lib in (diffpeft, peft):
        torch.testing.assert_close(run(lib.PeftModel.from_pretrained(model(), tmp_path)), run(ours), **SAME)


def test_a_classifier_trains_its_head_in_a_copy_for_each_adapter(tmp_path):
    base = model("bert-cls")
    plain = run(model("bert-cls"), "bert-cls")
    ours = seeded(get_peft_model(base, LoraConfig(task_type="SEQ_CLS")), seed=1).eval()
    ours.add_adapter("other", LoraConfig(task_type="SEQ_CLS"))
    names = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert any("classifier.copies.default" in n for n in names) and not any("other" in n for n in names)
    first = run(ours, "bert-cls")
    ours.set_adapter("other")
    assert torch.equal(run(ours, "bert-cls"), plain)  # a fresh copy is the module itself
    assert {n for n, p in ours.named_parameters() if p.requires_grad and "classifier" in n} == {
        f"base_model.model.classifier.copies.other.{n}" for n in ("weight", "bias")
    }
    seeded(ours, seed=9)
    second = run(ours, "bert-cls")
    mixed = run(ours, "bert-cls", adapter_names=["default", "other"])
    torch.testing.assert_close(mixed[0], first[0], **SAME)
    torch.testing.assert_close(mixed[1], second[1], **SAME)
    with ours.disable_adapter():
        assert torch.equal(run(ours, "bert-cls"), plain)
    ours.set_adapter("default")
    assert torch.equal(run(ours, "bert-cls"), first)
    keys = load_file(_saved(ours, tmp_path) / "adapter_model.safetensors").keys()
    assert {k for k in keys if "classifier" in k} == {f"base_model.model.classifier.{n}" for n in ("weight", "bias")}
    merged = ours.merge_and_unload()
    torch.testing.assert_close(run(merged, "bert-cls"), first, **SAME)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in model("bert-cls").named_parameters()}
    assert type(merged.classifier) is nn.Linear


def _saved(ours, folder):
    ours.save_pretrained(folder)
    return folder


def test_unload_leaves_no_trace():
    base = model("bert-cls")
    want = {k: t.clone() for k, t in base.state_dict().items()}
    classes = [type(m) for m in base.modules()]
    ours = seeded(get_peft_model(base, LoraConfig(task_type="SEQ_CLS", use_dora=True)))
    ours.add_adapter("b", diffpeft.OFTConfig(oft_block_size=4, target_modules=["query"]))
    assert ours.unload() is base
    assert [type(m) for m in base.modules()] == classes and base.state_dict().keys() == want.keys()
    assert all(torch.equal(t, want[k]) for k, t in base.state_dict().items())
    assert not any("diffpeft" in k for m in base.modules() for k in vars(m))


@pytest.mark.parametrize("name", [n for n in CONFIGS if "bias" not in n])
def test_every_method_merges_and_comes_out_exactly(name):
    ours = made(diffpeft, name, "llama")
    base = {n: p.clone() for n, p in ours.named_parameters()}
    want = run(ours)
    ours.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(ours), want, **SAME)
    with ours.disable_adapter():  # the base, though merged
        assert torch.equal(run(ours), run(model()))
    torch.testing.assert_close(run(ours), want, **SAME)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        ours.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        ours.delete_adapter("default")
    ours.unmerge_adapter()
    assert all(torch.equal(p, base[n]) for n, p in ours.named_parameters())
    with pytest.warns(UserWarning, match="Already unmerged"):
        ours.unmerge_adapter()


def test_merging_some_leaves_the_others_acting():
    ours = made(diffpeft, "lora", "llama")
    ours.add_adapter("b", LoraConfig(r=2, target_modules=["k_proj", "q_proj"], init_lora_weights=False))
    ours.set_adapter(["default", "b"])
    want = run(ours)
    ours.merge_adapter(["default"])
    torch.testing.assert_close(run(ours), want, **SAME)
    ours.unmerge_adapter()
    assert torch.equal(run(ours), want)
    with pytest.raises(TypeError, match="list of strings"):
        ours.merge_adapter("b")


def test_add_adapter_without_a_config_copies_the_active_ones():
    ours = made(diffpeft, "dora", "llama")
    ours.add_adapter("b")
    assert ours.peft_config["b"].use_dora and ours.peft_config["b"].r == 4 and ours.active_adapters == ["default"]
    assert ours.peft_config["b"] is not ours.peft_config["default"]


def test_trainability_follows_set_adapter_as_in_peft():
    for lib in (peft, diffpeft):
        wrapped = made(lib, "lora", "llama")
        wrapped.add_adapter("b", lib.LoraConfig(target_modules=["q_proj"]))
        count = lambda name: sum(p.requires_grad for n, p in wrapped.named_parameters() if f".{name}" in n)  # noqa: B023, E731
        assert (count("default") > 0, count("b")) == (True, 0)
        wrapped.set_adapter("b")
        assert (count("default"), count("b") > 0) == (0, True)
        wrapped.set_adapter("b", inference_mode=True)
        assert count("b") == 0
        wrapped.set_requires_grad("default")
        assert count("default") > 0 and wrapped.active_adapters == ["b"]


def test_names_and_states_that_are_refused():
    ours = made(diffpeft, "lora", "llama")
    cases = [
        (
            AdapterStateError,
            "already exists",
            lambda: ours.add_adapter("default", LoraConfig(target_modules=["q_proj"])),
        ),
        (UnknownNameError, "nope not found", lambda: ours.set_adapter("nope")),
        (UnknownNameError, "does not exist", lambda: ours.delete_adapter("nope")),
        (UnknownNameError, "nope", lambda: run(ours, adapter_names=["nope", "default"])),
        (ConfigError, "Length of `adapter_names`", lambda: run(ours, adapter_names=["default"])),
        (ConfigError, "Invalid task type", lambda: LoraConfig(task_type="CAUSAL")),
        (
            ConfigError,
            "cannot be used when `target_modules` is a str",
            lambda: LoraConfig(target_modules="q", layers_to_transform=1),
        ),
        (ConfigError, "r is 0", lambda: get_peft_model(model(), LoraConfig(r=0))),
        (ConfigError, "use_qalora", lambda: get_peft_model(model(), LoraConfig(use_qalora=True))),
        (ConfigError, "eva_config", lambda: get_peft_model(model(), LoraConfig(eva_config={"rho": 2}))),
        (ConfigError, "adapter name", lambda: get_peft_model(model(), LoraConfig(), adapter_name="a b")),
    ]
    before = run(ours)
    for error, text, job in cases:
        with pytest.raises(error, match=text):
            job()
        assert error is AdapterStateError or issubclass(error, ValueError)
    ours.train()
    with pytest.raises(AdapterStateError, match="training mode"):
        run(ours, adapter_names=["default", "default"])
    assert torch.equal(run(ours.eval()), before) and list(ours.peft_config) == ["default"]


def test_names_with_dots_and_names_of_modules():
    ours = get_peft_model(model(), LoraConfig(target_modules=["q_proj"]), adapter_name="v1.5")
    ours.add_adapter("items", LoraConfig(target_modules=["q_proj"]))
    ours.set_adapter("items")
    assert ours.active_adapter == "items" and len(get_peft_model_state_dict(ours, adapter_name="v1.5")) == 4


@pytest.fixture
def folder(tmp_path):
    made(diffpeft, "lora", "llama").save_pretrained(tmp_path)
    return tmp_path


def edited(folder, change, config=None):
    """The folder with its tensors, or its config, changed."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {**tensors, **change(tensors)}
    save_file({k: t for k, t in tensors.items() if t is not None}, file)
    if config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN = {
    "nan": (lambda t: {f"{LAYER}.lora_A.weight": t[f"{LAYER}.lora_A.weight"] * float("nan")}, NonFiniteError),
    "a shape": (lambda t: {f"{LAYER}.lora_A.weight": torch.zeros(4, 31)}, ShapeMismatchError),
    "a missing half": (lambda t: {f"{LAYER}.lora_A.weight": None}, CheckpointError),
    "a weight of the base": (lambda t: {f"{LAYER}.weight": torch.zeros(32, 32)}, UnknownKeysError),
    "a base layer": (lambda t: {f"{LAYER}.base_layer.weight": torch.zeros(32, 32)}, UnknownKeysError),
    "a norm of the base": (lambda t: {"base_model.model.model.norm.weight": torch.zeros(32)}, UnknownKeysError),
    "another model": (
        lambda t: {k: None for k in t} | {k.replace("self_attn", "attention"): v for k, v in t.items()},
        CheckpointError,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_changes_nothing(case, folder):
    change, error = BROKEN[case]
    edited(folder, change)
    base = model()
    before = {k: t.clone() for k, t in base.state_dict().items()}
    with pytest.raises(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(base, folder)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[k]) for k, t in base.state_dict().items())
    assert all(p.requires_grad for p in base.parameters())
    ours = made(diffpeft, "lora", "llama")
    want = run(ours)
    with pytest.raises(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.load_adapter(folder, "b")
    assert list(ours.peft_config) == ["default"] and torch.equal(run(ours), want)


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at"):
        PeftModel.from_pretrained(model(), tmp_path / "nowhere")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeFileError):
        PeftModel.from_pretrained(model(), folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        PeftModel.from_pretrained(model(), folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot read"):
        PeftConfig.from_pretrained(folder)


def test_a_missing_layer_is_named(folder):
    edited(folder, lambda t: {k: None for k in t if "layers.1" in k})
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers\.1\.self_attn\.q_proj"):
        ours = PeftModel.from_pretrained(model(), folder)
    assert not torch.allclose(run(ours), run(model()))


def test_unknown_config_fields_and_types(folder):
    edited(folder, lambda t: {}, {"a_new_field": 3})
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['a_new_field'\] for class LoraConfig"):
        assert PeftConfig.from_pretrained(folder).r == 4
    edited(folder, lambda t: {}, {"peft_type": "NEW"})
    with pytest.raises(ConfigError, match="peft_type"):
        PeftConfig.from_pretrained(folder)


def test_loading_under_a_name_in_use_reloads(folder):
    ours = made(diffpeft, "lora", "llama")
    want = run(ours)
    seeded(ours, seed=77)
    assert not torch.allclose(run(ours), want)
    result = ours.load_adapter(folder, "default")
    assert torch.equal(run(ours), want) and not result.missing_keys and not result.unexpected_keys


def test_state_dicts_both_ways():
    ours = made(diffpeft, "lora", "llama")
    state = get_peft_model_state_dict(ours)
    theirs = made(peft, "lora", "llama")
    assert state.keys() == peft.get_peft_model_state_dict(theirs).keys()
    peft.set_peft_model_state_dict(theirs, state)
    torch.testing.assert_close(run(theirs), run(ours), **SAME)
    fresh = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    assert set_peft_model_state_dict(fresh, state).unexpected_keys == []
    assert torch.equal(run(fresh), run(ours))
    gathered = {k: t * 2 if "lora_B" in k else t for k, t in ours.state_dict().items()}
    doubled = get_peft_model_state_dict(ours, state_dict=gathered)
    assert all(torch.equal(doubled[k], t * 2 if "lora_B" in k else t) for k, t in state.items())
    before = {k: t.clone() for k, t in get_peft_model_state_dict(fresh).items()}
    with pytest.raises(NonFiniteError):
        set_peft_model_state_dict(fresh, {k: t * float("nan") for k, t in state.items()})
    with pytest.raises(CheckpointError, match="the rank is 4, not 8"):
        set_peft_model_state_dict(
            fresh, {k: torch.cat([t, t]) if "lora_A" in k else torch.cat([t, t], 1) for k, t in state.items()}
        )
    assert all(torch.equal(t, before[k]) for k, t in get_peft_model_state_dict(fresh).items())
    with pytest.raises(UnknownNameError):
        get_peft_model_state_dict(fresh, adapter_name="b")


def test_inject_by_the_keys_of_a_state_dict():
    state = get_peft_model_state_dict(made(diffpeft, "lora", "llama"))
    net = inject_adapter_in_model(LoraConfig(r=4, target_modules=["typo"]), model(), state_dict=state)
    set_peft_model_state_dict(net, state)
    torch.testing.assert_close(run(net.eval()), run(made(diffpeft, "lora", "llama")), **SAME)


def test_embeddings_are_saved_with_adapters_on_them(tmp_path):
    for lib in (peft, diffpeft):
        wrapped = lib.get_peft_model(model(), lib.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
        with pytest.warns(UserWarning, match="save_embedding_layers"):
            wrapped.save_pretrained(tmp_path / lib.__name__)
    ours = load_file(tmp_path / "diffpeft" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(run(PeftModel.from_pretrained(model(), tmp_path / "peft")), run(model()), **SAME)


def test_a_resized_vocabulary_comes_back(tmp_path):
    base = model()
    base.resize_token_embeddings(100)
    seeded(get_peft_model(base, LoraConfig(target_modules=["q_proj"]))).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    with pytest.raises(ShapeMismatchError, match=r"resize_token_embeddings\(100\)"):
        PeftModel.from_pretrained(model(), tmp_path)
    other = model()
    other.resize_token_embeddings(100)
    with torch.no_grad():
        other.get_input_embeddings().weight[96:] += 1
    with pytest.warns(UserWarning, match="embeddings of its own"):
        PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(other.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_the_weights_of_a_folder(folder):
    ours, theirs = (
        lib.load_peft_weights(str(folder))
        if lib is diffpeft
        else peft.utils.load_peft_weights(str(folder), device="cpu")
        for lib in (diffpeft, peft)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


def test_vllm_finds_its_fields(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys() and config["modules_to_save"] is None
    assert config["bias"] == "none" and config["use_dora"] is False and config["peft_version"] == "0.21.2"
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert all(k.startswith("base_model.model.") and k.endswith((".lora_A.weight", ".lora_B.weight")) for k in keys)


def test_transformers_loads_our_folders(folder):
    base = model()
    base.load_adapter(str(folder))
    torch.testing.assert_close(run(base), run(made(diffpeft, "lora", "llama")), **SAME)


def test_configs_do_not_depend_on_the_hash_seed():
    code = "from diffpeft import LoraConfig as C; print(C(target_modules={'b', 'a', 'c'}, rank_pattern={'z': 1, 'y': 2}).to_json())"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in range(2)
    }
    assert len(runs) == 1 and b'"a",\n    "b",\n    "c"' in runs.pop()


def test_status_totals_are_counts():
    ours = made(diffpeft, "lora", "llama")
    theirs = made(peft, "lora", "llama")
    mine, their = ours.get_model_status(), theirs.get_model_status()
    assert vars(mine) == vars(their)
    layers, others = ours.get_layer_status(), theirs.get_layer_status()
    assert [s.name.removeprefix("model.") for s in layers] == [s.name.removeprefix("model.") for s in others]
    ours.add_adapter("b", diffpeft.LoHaConfig(target_modules=["q_proj"]))
    status = ours.get_model_status()
    assert status.available_adapters == ["b", "default"] and status.active_adapters == ["default"]
    assert status.requires_grad == {"b": False, "default": True} and status.peft_types == {
        "default": "LORA",
        "b": "LOHA",
    }
    ours.merge_adapter()
    assert ours.get_model_status().merged_adapters == ["default"]
    with pytest.raises(ValueError, match="No adapter layers found"):
        diffpeft.get_layer_status(model())


def test_both_are_peft_models_to_who_asks_peft():
    ours = made(diffpeft, "lora", "llama", task_type="CAUSAL_LM")
    assert isinstance(ours, peft.PeftModel) and isinstance(ours, peft.PeftModelForCausalLM)
    assert (
        isinstance(ours, PeftModel) and isinstance(ours, nn.Module) and not isinstance(ours, peft.PeftModelForSeq2SeqLM)
    )
    assert isinstance(LoraConfig(), peft.PeftConfig) and isinstance(LoraConfig(), peft.LoraConfig)
    assert type(ours) is diffpeft.PeftModelForCausalLM


def test_peft_builds_from_our_configs():
    ours = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert peft.get_peft_model(model(), ours).get_nb_trainable_parameters()[0] == 4 * 64 * 2


def test_the_hub_gets_what_is_saved(monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            sent["repo"] = repo_id
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            sent["files"] = set(os.listdir(folder_path))
            return "done"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert made(diffpeft, "lora", "llama").push_to_hub("me/adapter", commit_message="hello") == "done"
    assert sent == {"repo": "me/adapter", "files": {"README.md", "adapter_config.json", "adapter_model.safetensors"}}


def test_two_models_share_nothing():
    a, b = made(diffpeft, "lora", "llama"), made(diffpeft, "lora", "llama")
    want = run(b)
    a.set_adapter("default")
    a.unload()
    assert torch.equal(run(b), want) and batch()["input_ids"].shape == (2, 7)


def test_the_bases_keys_stay():
    ours = made(diffpeft, "lora", "llama")
    own = {k.removeprefix("base_model.model."): t for k, t in ours.state_dict().items() if ".adapters." not in k}
    want = model().state_dict()
    assert own.keys() == want.keys() and all(torch.equal(t, want[k]) for k, t in own.items())


def test_a_tie_is_named_and_kept():
    base = model("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    with pytest.warns(UserWarning, match=r"'transformer\.wte' share their weight"):
        ours = get_peft_model(base, LoraConfig(target_modules=["wte", "c_attn"], init_lora_weights=False)).eval()
    assert base.lm_head.weight is base.transformer.wte.weight
    want = run(ours, "gpt2")
    ours.merge_adapter()
    torch.testing.assert_close(run(ours, "gpt2"), want, **SAME)
    assert base.lm_head.weight is not base.transformer.wte.weight
    ours.unmerge_adapter()
    assert base.lm_head.weight is base.transformer.wte.weight
    ours.unload()
    assert torch.equal(run(base, "gpt2"), run(model("gpt2"), "gpt2"))


def test_configs_of_peft_are_taken_too():
    config = dataclasses.replace(
        LoraConfig(r=3, target_modules=["q_proj"]), r=4
    )  # peft's class, since ours passes for it
    for given in (
        config,
        peft.LoraConfig(r=4, target_modules=["q_proj"]),
        LoraConfig(r=4, target_modules=["q_proj"]).to_dict(),
    ):
        ours = get_peft_model(model(), given)
        assert type(ours.peft_config["default"]) is LoraConfig and ours.peft_config["default"].r == 4
    with pytest.raises(ConfigError, match="is no config"):
        get_peft_model(model(), "lora")


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)], ids=["number", "buffer"])
def test_embeddings_that_scale_their_rows(scale):
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    def net():
        torch.manual_seed(0)
        table = BartScaledWordEmbedding(10, 8, 0, embed_scale=3.0)
        if isinstance(scale, torch.Tensor):
            del table.embed_scale
            table.register_buffer("embed_scale", scale)
        return nn.Sequential(table, nn.Linear(8, 4))

    ids = torch.arange(10)[None]
    found = []
    for lib in (peft, diffpeft):
        wrapped = seeded(lib.get_peft_model(net(), lib.LoraConfig(r=2, target_modules=["0"]))).eval()
        found.append(wrapped(ids))
    torch.testing.assert_close(*found, **SAME)
    wrapped.merge_adapter()
    torch.testing.assert_close(wrapped(ids), found[1], **SAME)


def test_what_only_a_folder_can_hold_is_not_dropped(tmp_path):
    ours = get_peft_model(model("bert-cls"), LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(diffpeft.CannotConvertError, match="trains more than layers"):
        diffpeft.save_lora(ours.get_base_model(), tmp_path / "x", format="peft")
    ours.merge_adapter()
    assert ours.get_model_status().merged_adapters == ["default"]


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_adapter_is_trained_alone_or_not_at_all(is_trainable, folder):
    ours, theirs = (
        lib.PeftModel.from_pretrained(model(), folder, is_trainable=is_trainable) for lib in (diffpeft, peft)
    )
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.training == theirs.training == is_trainable
    ours.load_adapter(folder, "b", is_trainable=True)
    theirs.load_adapter(folder, "b", is_trainable=True)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
