"""Which layers: names, suffixes, expressions and presets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffpeft import AdapterStateError, ConfigError, LoraConfig, UnknownNameError, attach, detach, unload
from diffpeft.model.target import PRESETS, components, layers_of, select


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"to_q": nn.Linear(2, 2), "to_k": nn.Linear(2, 2), "my_to_q": nn.Linear(2, 2)})
        self.conv = nn.Conv2d(2, 2, 3)
        self.norm = nn.LayerNorm(2)
        self.table = nn.Embedding(3, 2)


@pytest.mark.parametrize(
    "targets, exclude, want",
    [
        (["to_q"], None, {"encoder.to_q"}),  # a suffix begins at a dot
        (["encoder.to_q", "conv"], None, {"encoder.to_q", "conv"}),
        ("encoder\\..*", None, {"encoder.to_q", "encoder.to_k", "encoder.my_to_q"}),
        (".*to_q", None, {"encoder.to_q", "encoder.my_to_q"}),  # an expression is for the whole name
        ("full", None, {"encoder.to_q", "encoder.to_k", "encoder.my_to_q", "conv"}),
        ("attn", None, {"encoder.to_q", "encoder.to_k"}),
        (["*"], ["conv", "to_k"], {"encoder.to_q", "encoder.my_to_q"}),
        ("full", ".*to_.*", {"conv"}),
        ("full", "attn", {"encoder.my_to_q", "conv"}),  # a preset excludes what it chooses
        (("to_q", "to_k"), {"to_k"}, {"encoder.to_q"}),
    ],
)
def test_targets_choose(targets, exclude, want):
    assert set(select({"": Net()}, targets, exclude)[""]) == want


@pytest.mark.parametrize(
    "targets, exclude, error, said",
    [
        (["to_p"], None, UnknownNameError, "to_q"),
        (["to_q", "konv"], None, UnknownNameError, "conv"),
        ("to_q", None, UnknownNameError, "to_q"),  # a string is an expression for the whole name
        ("atn", None, UnknownNameError, "attn"),
        (["norm"], None, UnknownNameError, "norm"),
        ("(", None, ConfigError, "expression"),
        ("full", "(", ConfigError, "expression"),
        (None, None, ConfigError, "presets?"),
        ([], None, ConfigError, "presets?"),
        (["conv"], ["conv"], UnknownNameError, "exclude"),
    ],
)
def test_bad_targets_are_refused_with_the_near_matches(targets, exclude, error, said):
    with pytest.raises(error, match=said):
        select({"": Net()}, targets, exclude)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_finds_layers_of_a_pipeline_in_every_component(preset, pipe):
    assert all(found for found in select(components(pipe), preset).values())


@pytest.mark.parametrize(
    "targets",
    [
        ["text_model.encoder.layers.0.mlp.fc1"],
        ["encoder.layers.0.mlp.fc1"],
        "text_model.encoder.layers.0.mlp.fc1",
        r"encoder\.layers\.0\.mlp\.fc1",
    ],
)
def test_both_spellings_of_clip_choose(targets, pipe):
    assert attach(pipe, LoraConfig(), targets=targets, dry_run=True).layers == (
        "text_encoder.encoder.layers.0.mlp.fc1",
    )


def test_an_attention_brings_its_output_projection_along():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    both = ("self_attn", "self_attn.out_proj")
    assert attach(model, LoraConfig(), targets=["self_attn"], dry_run=True).layers == both
    assert attach(model, LoraConfig(), targets=["self_attn"], exclude=["out_proj"], dry_run=True).layers == both[:1]
    assert attach(model, LoraConfig(), targets=["out_proj"], dry_run=True).layers == both[1:]
    assert {*attach(model, LoraConfig(), targets="full", dry_run=True).layers} == {*both, "linear1", "linear2"}


def test_an_attention_without_one_projection_for_all_is_refused():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    model.self_attn = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    with pytest.raises(AdapterStateError, match="Only same embed for query/key/value"):
        attach(model, LoraConfig(), targets=["self_attn"])
    assert attach(model, LoraConfig(), targets=["out_proj"], dry_run=True).layers == ("self_attn.out_proj",)


def test_a_parametrised_layer_is_refused():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.conv)
    with pytest.raises(AdapterStateError, match="parametrised"):
        attach(model, LoraConfig(), targets=["conv"])


def test_an_integer_weight_is_refused():
    model = Net()
    model.conv.weight = nn.Parameter(torch.zeros(2, 2, 3, 3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterStateError, match="quantised"):
        attach(model, LoraConfig(), targets=["conv"])


def test_fused_projections_are_refused(pipe):
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(AdapterStateError, match="unfuse_qkv_projections"):
        attach(pipe.unet, LoraConfig(), targets=["attn1.to_q"])


def test_a_module_has_the_name_it_has_in_pipelines(pipe):
    assert list(components(pipe)) == ["unet", "text_encoder"]
    assert (
        list(components(pipe.unet)) == ["unet"]
        and list(components(pipe.text_encoder)) == ["text_encoder"]
        and list(components(Net())) == [""]
    )
    for wrong in (None, 3, "unet", {"unet": pipe.unet}):
        with pytest.raises(ConfigError, match="cannot adapt"):
            components(wrong)


def test_the_level_of_torch_compile_is_not_in_names(pipe, adapter):
    import diffpeft

    plain, file = list(layers_of(pipe.unet)), adapter()
    before = diffpeft.load_lora(pipe, file, name="before").matched
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert list(layers_of(pipe.unet)) == plain and list(components(pipe.unet)) == ["unet"]
    assert diffpeft.load_lora(pipe, file, name="after").matched == before
    unload(pipe)


def test_adapters_are_not_layers(pipe):
    before = list(layers_of(pipe.unet))
    attach(pipe.unet, LoraConfig(), targets="full")
    assert list(layers_of(pipe.unet)) == before
    with pytest.raises(UnknownNameError):
        attach(pipe.unet, LoraConfig(), "b", targets=["lora_A"])


def test_a_child_that_is_called_adapters_is_a_layer_like_any():
    model = nn.ModuleDict({"adapters": nn.Linear(2, 2)})
    assert attach(model, LoraConfig(), targets=["adapters"]).layers == ("adapters",)
    detach(model, "default")
    assert type(model["adapters"]) is nn.Linear


@pytest.mark.parametrize(
    "field, value",
    [
        ("r", 0),
        ("r", 1.5),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "8"),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", "0.1"),
        ("init_lora_weights", "pisa"),
        ("rank_pattern", {"to_q": 0}),
        ("alpha_pattern", {"to_q": float("inf")}),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"(": 2}),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        attach(Net(), LoraConfig(**{field: value}), targets="full")


def test_what_is_no_config_is_refused():
    import peft

    for wrong in (None, {"r": 8}, peft.LoraConfig()):
        with pytest.raises(ConfigError, match="LoraConfig"):
            attach(Net(), wrong, targets="full")


def test_the_config_names_layers_as_peft_does():
    report = attach(Net(), LoraConfig(r=2, target_modules=["to_q", "conv"], exclude_modules=["conv"]))
    assert report.layers == ("encoder.to_q",) and report.parameters == 8 and report.bytes == 32
    assert attach(Net(), LoraConfig(target_modules=["to_q"]), targets=["conv"]).layers == ("conv",)


def test_patterns_of_ranks_and_alphas_are_pefts():
    import peft

    ranks, alphas = {"to_q": 3, "^encoder.to_k": 5}, {"encoder.*": 7}
    fields = dict(r=2, lora_alpha=4, rank_pattern=ranks, alpha_pattern=alphas, target_modules=".*to_.*|conv")
    ours, theirs = Net(), peft.inject_adapter_in_model(peft.LoraConfig(**fields), Net())
    attach(ours, LoraConfig(**fields))
    for name, m in theirs.named_modules():
        if hasattr(m, "scaling"):
            slot = ours.get_submodule(name).adapters["default"]
            assert (slot.rank, slot.scale) == (m.r["default"], m.scaling["default"]), name


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_fresh_values_have_pefts_distribution(init):
    import peft

    big, std = nn.Sequential(nn.Linear(512, 512)), {}
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=64, target_modules=["0"], init_lora_weights=init), nn.Sequential(nn.Linear(512, 512))
    )
    attach(big, LoraConfig(r=64, init_lora_weights=init), targets=["0"])
    for ab in "AB":
        std[ab] = [
            t.std().item()
            for t in (
                big[0].adapters["default"].get_parameter(f"lora_{ab}"),
                getattr(theirs[0], f"lora_{ab}")["default"].weight,
            )
        ]
        # the std of 32768 numbers is known to 1 / sqrt(65536), or 0.4 %; five times that
        assert std[ab][0] == pytest.approx(std[ab][1], rel=0.02), (ab, std)


def test_a_generator_decides_the_fresh_values():
    values = []
    for _ in range(2):
        model = Net()
        attach(model, LoraConfig(), targets="full", generator=torch.Generator().manual_seed(3))
        values.append([p for n, p in model.named_parameters() if "lora_A" in n])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
