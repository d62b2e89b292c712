"""hotswap_adapter: what it does and says is what PEFT does and says, and a compiled model is not compiled again."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from peft.utils import hotswap as theirs
from safetensors.torch import load_file, save_file

from diffpeft.errors import AdapterStateError, ConfigError, ShapeMismatchError, UnknownNameError
from diffpeft.llm.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from diffpeft.llm.peft_model import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from diffpeft.methods import LoHaConfig, LoraConfig
from diffpeft.methods.peft_config import PeftConfig
from diffpeft.model.state import slots_in
from tests.llm.models import batch, model, output, run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "first": {"r": 4, "lora_alpha": 8},
    "same": {"r": 4, "lora_alpha": 8},
    "alpha": {"r": 4, "lora_alpha": 3},
    "small": {"r": 2, "lora_alpha": 8},
    "large": {"r": 7, "lora_alpha": 5},
    "fewer layers": {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj"]},
    "more layers": {"r": 4, "target_modules": [*TARGETS, "k_proj"]},
    "rslora": {"r": 4, "use_rslora": True},
    "rslora too": {"r": 3, "use_rslora": True, "lora_alpha": 5},
    "dora": {"r": 4, "use_dora": True},
    "dora too": {"r": 2, "use_dora": True, "lora_alpha": 5},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "embedding too": {"r": 4, "target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 3},
    "dropout": {"r": 4, "lora_dropout": 0.1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a folder that PEFT has saved}."""
    found = {}
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        it = peft.get_peft_model(model(), peft.LoraConfig(**{"target_modules": TARGETS} | fields))
        g = torch.Generator().manual_seed(seed)
        for key, p in it.named_parameters():
            if "lora_" in key:
                p.data = p.data + torch.randn(p.shape, generator=g) * 0.3
        found[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        it.save_pretrained(str(found[name]))
    return found


def loaded(folder):
    return PeftModel.from_pretrained(model(), folder)


SWAPS = [
    ("first", "same"),
    ("first", "alpha"),
    ("first", "small"),
    ("first", "large"),
    ("small", "first"),
    ("first", "fewer layers"),
    ("rslora", "rslora too"),
    ("dora", "dora too"),
    ("embedding", "embedding too"),
]

GROWING = [("first", "large"), ("small", "first"), ("embedding", "embedding too")]  # new tensors without room


@pytest.mark.parametrize("room", [None, 9])
@pytest.mark.parametrize("old,new", SWAPS)
def test_the_outputs_are_those_of_a_fresh_load(old, new, room, folders, tmp_path):
    it, want = loaded(folders[old]), run(loaded(folders[new]))
    before = run(it)
    if room is not None:
        prepare_model_for_compiled_hotswap(it, target_rank=room)
        torch.testing.assert_close(run(it), before, rtol=1e-5, atol=1e-5)
    places = {key: p.data_ptr() for key, p in it.named_parameters()}
    hotswap_adapter(it, folders[new], "default", torch_device="cpu")
    if (old, new) not in GROWING or (room is not None and "embedding" not in old):
        assert {key: p.data_ptr() for key, p in it.named_parameters()} == places
    torch.testing.assert_close(run(it), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, before, atol=1e-3)
    # the file is the new one's, to the byte
    it.save_pretrained(tmp_path, save_embedding_layers=False)
    mine = load_file(tmp_path / WEIGHTS)
    own = {key: t for key, t in load_file(folders[new] / WEIGHTS).items() if "lora_" in key}
    assert mine.keys() == own.keys() and all(torch.equal(mine[key], own[key]) for key in own)
    config, other = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, folders[new]))
    assert all(config[name] == other[name] for name in ("r", "lora_alpha", "use_rslora", "use_dora"))
    assert sorted(config["target_modules"]) == sorted(other["target_modules"])
    torch.testing.assert_close(run(loaded(tmp_path)), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("old,new", [s for s in SWAPS if s[0] not in ("dora", "embedding")])
def test_the_outputs_are_pefts(old, new, folders):
    it, other = loaded(folders[old]), peft.PeftModel.from_pretrained(model(), str(folders[old]))
    prepare_model_for_compiled_hotswap(it, target_rank=8)
    theirs.prepare_model_for_compiled_hotswap(other, target_rank=8)
    hotswap_adapter(it, folders[new], "default")
    theirs.hotswap_adapter(other, str(folders[new]), "default", torch_device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(run(it), output(other(**batch())), rtol=1e-5, atol=1e-5)


def test_back_again_is_the_first(folders, tmp_path):
    it = loaded(folders["first"])
    want = run(it)
    prepare_model_for_compiled_hotswap(it, target_rank=8)
    for new in ("large", "small", "fewer layers", "first"):
        hotswap_adapter(it, folders[new], "default")
    torch.testing.assert_close(run(it), want, rtol=1e-5, atol=1e-5)
    it.save_pretrained(tmp_path)
    mine, own = load_file(tmp_path / WEIGHTS), load_file(folders["first"] / WEIGHTS)
    assert all(torch.equal(mine[key], own[key]) for key in own)


def test_other_adapters_and_names_stay(folders):
    it = PeftModel.from_pretrained(model(), folders["first"], adapter_name="my.style")
    it.load_adapter(folders["small"], "other")
    hotswap_adapter(it, folders["alpha"], "my.style")
    torch.testing.assert_close(run(it), run(loaded(folders["alpha"])), rtol=1e-5, atol=1e-5)
    assert it.active_adapters == ["my.style"]
    it.set_adapter("other")
    assert torch.equal(run(it), run(loaded(folders["small"])))


# Compiled


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile(model)", "model.compile()"])
def test_one_graph_before_and_after(whole, folders):
    torch._dynamo.reset()
    it = loaded(folders["first"])
    prepare_model_for_compiled_hotswap(it, target_rank=8)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(it, backend=backend, dynamic=False) if whole else it
    if not whole:
        it.compile(backend=backend, dynamic=False)
    torch.testing.assert_close(run(compiled), run(loaded(folders["first"])), rtol=1e-5, atol=1e-5)
    before = len(graphs)
    assert before == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for new in ("alpha", "small", "large", "fewer layers"):
            hotswap_adapter(compiled, folders[new], "default")
            torch.testing.assert_close(run(compiled), run(loaded(folders[new])), rtol=1e-5, atol=1e-5)
    assert len(graphs) == before
    torch._dynamo.reset()


def test_a_compiled_model_has_no_room_for_more(folders):
    torch._dynamo.reset()
    compiled = torch.compile(loaded(folders["small"]), backend="eager")
    with pytest.raises(ShapeMismatchError, match="prepare_model_for_compiled_hotswap"):
        hotswap_adapter(compiled, folders["first"], "default")
    hotswap_adapter(compiled, folders["small"], "default")


def test_prepare_comes_before_compile_and_after_the_adapter(folders):
    compiled = torch.compile(loaded(folders["small"]), backend="eager")
    for it in (compiled, theirs_compiled(folders["small"])):
        prepare = prepare_model_for_compiled_hotswap if it is compiled else theirs.prepare_model_for_compiled_hotswap
        with pytest.raises(ValueError, match=r"\*before\* compiling"):
            prepare(it, target_rank=8)
        with pytest.warns(UserWarning):
            prepare(it, target_rank=8, check_compiled="warn")
        with pytest.raises(ValueError, match="wrong"):
            prepare(it, target_rank=8, check_compiled="wrong")
    prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="ignore")
    with pytest.raises(ConfigError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(model(), target_rank=8)
    with pytest.raises(ConfigError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(get_peft_model(model(), LoHaConfig(target_modules=["q_proj"])))


def theirs_compiled(folder):
    return torch.compile(peft.PeftModel.from_pretrained(model(), str(folder)), backend="eager")


def test_the_target_rank_is_the_highest(folders, tmp_path):
    it = loaded(folders["first"])
    it.load_adapter(folders["large"], "large")
    keys = {key: p.shape for key, p in it.named_parameters()}
    with pytest.raises(ValueError, match="the original rank is larger"):
        prepare_model_for_compiled_hotswap(it, target_rank=5)
    assert {key: p.shape for key, p in it.named_parameters()} == keys
    prepare_model_for_compiled_hotswap(it)
    assert {key: p.shape for key, p in it.named_parameters()} == keys
    config, other = (kind(r=4, rank_pattern={"q_proj": 2}) for kind in (LoraConfig, peft.LoraConfig))
    for given in (config, {"a": config}):
        config.r = 4
        prepare_model_for_compiled_hotswap(it, target_rank=9, config=given)
        assert (config.r, config.rank_pattern) == (9, {"q_proj": 9})
    prepare_model_for_compiled_hotswap(it, target_rank=9, config=it.peft_config)
    assert it.peft_config["default"].r == 9
    it.save_pretrained(tmp_path)  # what its files say stays right
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 4
    torch.testing.assert_close(run(loaded(tmp_path)), run(it), rtol=1e-5, atol=1e-5)
    it = peft.PeftModel.from_pretrained(model(), str(folders["first"]))
    theirs.prepare_model_for_compiled_hotswap(it, target_rank=9, config=other)
    assert (other.r, other.rank_pattern) == (9, {"q_proj": 9})


# From tensors, and what is trained


def test_keys_with_and_without_the_adapters_name(folders):
    tensors, config = load_file(folders["alpha"] / WEIGHTS), PeftConfig.from_pretrained(folders["alpha"])
    want = run(loaded(folders["alpha"]))
    for infix in ("", ".default"):
        it = loaded(folders["first"])
        named = {key.replace(".weight", f"{infix}.weight"): t for key, t in tensors.items()}
        hotswap_adapter_from_state_dict(it, named, "default", config)
        torch.testing.assert_close(run(it), want, rtol=1e-5, atol=1e-5)


def test_a_bare_module_too(folders):
    bare = inject_adapter_in_model(LoraConfig(r=4, target_modules=TARGETS), model())
    want = loaded(folders["alpha"])
    tensors = {key.removeprefix("base_model.model."): t for key, t in load_file(folders["alpha"] / WEIGHTS).items()}
    with pytest.warns(UserWarning, match="no longer trained"):
        hotswap_adapter_from_state_dict(bare, tensors, "default", want.peft_config["default"])
    torch.testing.assert_close(run(bare), run(want), rtol=1e-5, atol=1e-5)
    saved = get_peft_model_state_dict(bare)
    assert all(torch.equal(saved[key], t) for key, t in tensors.items())


def test_a_trained_adapter_stays_so_if_ranks_and_alpha_do(folders, tmp_path):
    it = PeftModel.from_pretrained(model(), folders["first"], is_trainable=True)
    hotswap_adapter(it, folders["same"], "default")
    slots = slots_in(it.get_base_model(), "default").values()
    assert all(p.requires_grad for slot in slots for p in slot.parameters())
    with torch.no_grad():
        for slot in slots:
            slot.lora_B += 0.5
    it.save_pretrained(tmp_path)
    torch.testing.assert_close(run(loaded(tmp_path)), run(it), rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="no longer trained"):
        hotswap_adapter(it, folders["large"], "default")
    assert not any(
        p.requires_grad for slot in slots_in(it.get_base_model(), "default").values() for p in slot.parameters()
    )
    torch.testing.assert_close(run(it), run(loaded(folders["large"])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("room_first", [True, False])
def test_room_for_ranks_leaves_what_is_trained_trained_and_the_file_small(folders, tmp_path, room_first):
    it = PeftModel.from_pretrained(model(), folders["first"], is_trainable=room_first)
    prepare_model_for_compiled_hotswap(it, target_rank=9)
    if not room_first:
        it.set_adapter("default")
    slots = slots_in(it.get_base_model(), "default").values()
    assert all(p.requires_grad for slot in slots for p in slot.parameters())
    before, optimizer = run(it), torch.optim.AdamW([p for p in it.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        it(**batch()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(run(it), before, atol=1e-3)
    it.save_pretrained(tmp_path, save_embedding_layers=False)
    shapes = {key: t.shape for key, t in load_file(tmp_path / WEIGHTS).items()}
    assert shapes == {k: t.shape for k, t in load_file(folders["first"] / WEIGHTS).items() if "lora_" in k}
    torch.testing.assert_close(run(loaded(tmp_path)), run(it), rtol=1e-5, atol=1e-5)


def test_a_key_of_a_layer_that_the_first_lacks_is_named_as_a_module_has_it(folders):
    it, tensors = loaded(folders["first"]), load_file(folders["first"] / WEIGHTS)
    before, config = state(it), PeftConfig.from_pretrained(folders["first"])
    half = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)}
    with pytest.raises(RuntimeError, match=r"unexpected keys found: base_model\.\S*up_proj\.lora_A\.default\.weight"):
        hotswap_adapter_from_state_dict(it, tensors | half, "default", config)
    assert unchanged(it, before)


# Errors


def state(it):
    return {key: t.clone() for key, t in it.state_dict().items()}


def unchanged(it, before):
    now = it.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in now)


@pytest.mark.parametrize("new", ["rslora", "dora", "dropout"])
def test_configs_that_differ_are_refused_as_peft_does(new, folders):
    it, other = loaded(folders["first"]), peft.PeftModel.from_pretrained(model(), str(folders["first"]))
    before = state(it)
    with pytest.raises(ValueError) as mine:
        hotswap_adapter(it, folders[new], "default")
    with pytest.raises(ValueError) as own:
        theirs.hotswap_adapter(other, str(folders[new]), "default", torch_device="cpu")
    assert str(mine.value).startswith(str(own.value)) and unchanged(it, before)


def test_only_lora():
    for one, other, said in (
        (LoHaConfig(), LoHaConfig(), "only supports LORA but LOHA"),
        (LoraConfig(), LoHaConfig(), "types found: LORA and LOHA"),
        (LoraConfig(alpha_pattern={"q": 2}), LoraConfig(), "alpha_pattern"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_hotswap_configs_compatible(one, other)
    check_hotswap_configs_compatible(LoraConfig(r=3), LoraConfig())


def test_layers_that_the_first_lacks_are_refused_as_peft_does(folders):
    it, other = loaded(folders["first"]), peft.PeftModel.from_pretrained(model(), str(folders["first"]))
    before = state(it)
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*k_proj"):
        theirs.hotswap_adapter(other, str(folders["more layers"]), "default", torch_device="cpu")
    with pytest.raises(RuntimeError, match=r"unexpected keys found: .*k_proj"):
        hotswap_adapter(it, folders["more layers"], "default")
    tensors = load_file(folders["same"] / WEIGHTS)
    config = PeftConfig.from_pretrained(folders["same"])
    for extra in ("base_model.model.model.norm.weight", "new_key"):
        with pytest.raises(RuntimeError, match=f"unexpected keys found: .*{extra}"):
            hotswap_adapter_from_state_dict(it, tensors | {extra: torch.full((32,), 7.0)}, "default", config)
    assert unchanged(it, before)


def test_what_is_merged_or_damaged_or_unknown_is_refused_and_nothing_changes(folders, tmp_path):
    it = loaded(folders["small"])
    before, names = state(it), dict(it.peft_config)
    with pytest.raises(UnknownNameError, match="nope"):
        hotswap_adapter(it, folders["same"], "nope")
    tensors = load_file(folders["first"] / WEIGHTS)
    last = sorted(tensors)[-1]
    save_file(tensors | {last: tensors[last] * float("nan")}, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text((folders["first"] / CONFIG).read_text())
    with pytest.raises(ValueError, match="finite"):  # after room has been made for rank 4
        hotswap_adapter(it, tmp_path, "default")
    assert unchanged(it, before) and it.peft_config == names
    it.merge_adapter()
    with pytest.raises(AdapterStateError, match="fused"):
        hotswap_adapter(it, folders["small"], "default")
    it.unmerge_adapter()
    assert unchanged(it, before)


def test_it_still_pickles_and_copies(folders):
    it = loaded(folders["first"])
    prepare_model_for_compiled_hotswap(it, target_rank=8)
    hotswap_adapter(it, folders["small"], "default")
    assert torch.equal(run(copy.deepcopy(it)), run(it))


def test_an_adapter_that_trains_more_than_layers_is_not_swapped(tmp_path):
    from diffpeft import AdapterStateError, LoraConfig, get_peft_model, hotswap_adapter
    from tests.llm.models import model, run

    get_peft_model(model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    for more in (dict(modules_to_save=["lm_head"]), dict(trainable_token_indices=[3])):
        ours = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], **more)).eval()
        before = run(ours)
        with pytest.raises(AdapterStateError, match="more than layers"):
            hotswap_adapter(ours, tmp_path, "default")
        assert torch.equal(run(ours), before)
