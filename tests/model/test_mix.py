"""How strong: patterns, finiteness, order."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from diffpeft import (
    AdapterStateError,
    ConfigError,
    LoraConfig,
    UnknownNameError,
    adapters,
    attach,
    get_adapters,
    load_lora,
    set_adapters,
    unload,
)
from diffpeft.model.attach import mix_of
from diffpeft.model.mix import choose

LAYERS = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.proj_in",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "up_blocks.1.resnets.10.conv1",
)


def strengths(patterns, component="unet", layers=LAYERS):
    """{layer: strength} under these patterns."""
    return dict(zip(layers, choose(component, layers, {"a": None}, {"a": patterns}).strengths["a"], strict=True))


@pytest.mark.parametrize(
    "patterns, want",
    [
        ({}, (1, 1, 1, 1, 1)),
        ({"unet": 0.5}, (0.5,) * 5),
        ({"unet.up_blocks": 0.5}, (1, 1, 1, 0.5, 0.5)),
        ({"unet.up_blocks.*": 0.5}, (1, 1, 1, 0.5, 0.5)),
        ({"unet.*_blocks": 0.5}, (0.5, 0.5, 1, 0.5, 0.5)),
        ({"unet.*.*.attentions": 0.5}, (1, 0.5, 1, 0.5, 1)),  # the mid block has one level less
        ({"unet.text_model": 0.5, "unet.text_model.mid_block": 0.5}, (1,) * 5),  # a level of text encoders
        ({"unet.????_blocks.1": 0.5}, (1, 0.5, 1, 1, 1)),
        ({"unet.*.1": 0.5}, (1, 0.5, 1, 1, 0.5)),
        ({"unet.up_blocks.1.resnets.1": 0.5}, (1, 1, 1, 1, 1)),  # a whole segment: resnets.10 is another
        ({"unet.up": 0.5, "blocks": 0.2, "unet.blocks": 0.2}, (1,) * 5),
        ({"*": 0.5}, (0.5,) * 5),
        ({"unet": 0.8, "unet.up_blocks.*": 0.2}, (0.8, 0.8, 0.8, 0.2, 0.2)),
        (
            {"unet.up_blocks.*": 0.2, "unet": 0.8},
            (0.8, 0.8, 0.8, 0.2, 0.2),
        ),  # the order of patterns of different weight does not matter
        (
            {"unet.up_blocks.1": 0.1, "unet.*.*.resnets.*": 0.2},
            (0.2, 1, 1, 1, 0.1),
        ),  # literal segments first: 3 against 2
        ({"unet.up_blocks": 0.1, "unet.up_blocks.*": 0.2}, (1, 1, 1, 0.2, 0.2)),  # then the longer
        ({"unet.up_blocks.*": 0.2, "unet.up_blocks": 0.1}, (1, 1, 1, 0.2, 0.2)),
        ({"unet.*.0": 0.1, "unet.*_blocks.0": 0.2}, (0.2, 1, 1, 0.2, 1)),  # then the later
        ({"unet.*_blocks.0": 0.2, "unet.*.0": 0.1}, (0.1, 1, 1, 0.1, 1)),
        ({"unet.mid.block": 0.1, "unet.mid_block.[a]*": 0.1}, (1,) * 5),  # a dot and brackets are themselves
    ],
)
def test_the_most_literal_then_longer_then_later_pattern_wins(patterns, want):
    assert tuple(strengths(patterns).values()) == want


@pytest.mark.parametrize("layer", ["encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"])
@pytest.mark.parametrize(
    "patterns",
    [
        {"text_encoder.encoder.layers.0": 0.5},
        {"text_encoder.text_model.encoder.layers.0": 0.5},
        {"text_encoder.text_model": 0.5},
        {"text_encoder.*.encoder.layers.0": 0.5},
        {
            "text_encoder.text_model.encoder.layers.*": 0.2,
            "text_encoder.encoder.layers.0": 0.5,
        },  # the level counts for nothing
    ],
)
def test_both_spellings_of_clip_match(layer, patterns):
    assert strengths(patterns, "text_encoder", [layer]) == {layer: 0.5}


@pytest.fixture
def adapted(pipe):
    attach(
        pipe,
        LoraConfig(r=1, init_lora_weights=False),
        "a",
        targets=["conv_in", "mid_block.attentions.0.proj_in", "layers.0.mlp.fc1"],
    )
    attach(pipe.unet, LoraConfig(r=1, init_lora_weights=False), "b", targets=["conv_out"])
    return pipe


@pytest.mark.parametrize(
    "mix, error, said",
    [
        ({"c": 1.0}, UnknownNameError, "Known: a, b"),
        ({"a": {"unet.mid_blok": 1.0}}, UnknownNameError, "unet.mid_block"),
        ({"a": {"unet.conv_out": 1.0}}, UnknownNameError, "matches no layer of adapter 'a'"),
        ({"b": {"text_encoder_2": 1.0}}, UnknownNameError, "matches no layer of adapter 'b'"),
        ({"b": {"text_encoder.encoder.layrs": 1.0}}, UnknownNameError, "matches no layer of adapter 'b'"),
        ({"b": {"text_encoder.encoder.layers.99": 1.0}}, UnknownNameError, "matches no layer of adapter 'b'"),
        ({"b": {"text_*.layers": 1.0}}, UnknownNameError, "matches no layer of adapter 'b'"),
        ({"a": {"": 1.0}}, UnknownNameError, "matches no layer"),
        ({"a": math.nan}, ConfigError, "nan"),
        ({"a": math.inf}, ConfigError, "inf"),
        ({"a": {"unet": 1.0, "text_encoder": -math.inf}}, ConfigError, "text_encoder"),
        ({"a": 1e39}, ConfigError, "fp32"),
        ({"a": {"unet": -1e308}}, ConfigError, "fp32"),
        ({"a": 10**400}, ConfigError, "fp32"),
        ({"a": "1.0"}, ConfigError, "finite number"),
        ({"a": None}, ConfigError, "finite number"),
        ({"a": True}, ConfigError, "finite number"),
        ({"a": {1: 0.5}}, ConfigError, "block"),
        (["a"], ConfigError, "dict"),
        ({"b": 1.0, "a": {"nowhere": 1.0}}, UnknownNameError, "nowhere"),
    ],
)
def test_a_bad_mix_is_refused_and_changes_nothing(adapted, mix, error, said):
    before = get_adapters(adapted)
    for use in (set_adapters, lambda pipe, mix: adapters(pipe, mix).__enter__()):
        with pytest.raises(error) as caught:
            use(adapted, mix)
        assert said in str(caught.value)
        assert get_adapters(adapted) == before


def test_those_named_are_active_in_that_order(adapted):
    set_adapters(adapted, {"b": 0.5, "a": {"unet": 0.8, "text_encoder": 0.0}})
    assert mix_of(adapted.unet).choice.order == ("b", "a") and mix_of(adapted.text_encoder).choice.order == ("a",)
    status = get_adapters(adapted)
    assert (
        list(status) == ["a", "b"]
        and status["a"].strength == {"unet": 0.8, "text_encoder": 0.0}
        and status["b"].strength == 0.5
    )
    assert (
        status["a"].components == {"unet", "text_encoder"}
        and status["a"].ranks == (1,)
        and status["a"].methods == {"lora"}
        and not status["a"].fused
    )
    set_adapters(adapted, {"b": 1})
    assert [s.active for s in get_adapters(adapted).values()] == [False, True]


def test_a_new_adapter_comes_after_those_already_active(adapted):
    set_adapters(adapted, {"b": 0.5})
    attach(adapted, LoraConfig(r=1), "c", targets=["conv_in"])
    assert mix_of(adapted.unet).choice.given == {"b": 0.5, "c": 1.0}


def test_what_the_user_holds_is_no_way_into_the_mix(adapted):
    mix = {"unet": 0.8}
    set_adapters(adapted, {"a": mix})
    mix["unet"] = math.nan
    get_adapters(adapted)["a"].strength["unet"] = math.nan
    assert get_adapters(adapted)["a"].strength == {"unet": 0.8}


def test_strengths_survive_other_adapters_coming_and_going(adapted):
    given = {"a": {"unet": 0.3, "text_encoder": 0.6}}
    set_adapters(adapted, given)
    attach(adapted, LoraConfig(r=1), "c", targets="full")
    unload(adapted, ["c", "b"])
    assert get_adapters(adapted)["a"].strength == given["a"]
    mix = mix_of(adapted.unet)
    assert dict(zip(mix.layers, mix.choice.strengths["a"], strict=True))["conv_in"] == 0.3


def test_the_compiled_table_is_what_eager_code_reads(adapted):
    set_adapters(adapted, {"b": -1, "a": {"unet.conv_in": 0.25}})
    choice = mix_of(adapted.unet).choice
    assert torch.equal(choice.first.table, torch.tensor([choice.strengths[name] for name in choice.order]))


def test_a_block_is_local_to_its_pipeline_and_its_copies_are_not_in_it(adapted):
    with adapters(adapted, {"a": 0.0}):
        twin = copy.deepcopy(adapted.unet)
        assert mix_of(twin).current().of is mix_of(twin).choice
        assert mix_of(adapted.unet).current().order == ("a",)
        unload(twin)  # the copy is not busy


def test_a_strength_of_load_lora_is_checked_like_any(pipe, adapter):
    file = adapter()
    for weight in (math.nan, "1", None, True):
        with pytest.raises(ConfigError, match="finite"):
            load_lora(pipe, file, weight=weight)
    assert get_adapters(pipe) == {}


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "a" * 129, "a\n", None, 3])
def test_a_bad_name_is_refused(name, pipe, adapter):
    with pytest.raises(ConfigError, match="name"):
        attach(pipe, LoraConfig(), name, targets="attn")
    if name is not None:
        with pytest.raises(ConfigError, match="name"):
            load_lora(pipe, adapter(), name=name)


def test_a_name_in_use_is_refused(adapted, adapter):
    with pytest.raises(AdapterStateError, match="'a'"):
        attach(adapted, LoraConfig(), "a", targets="attn")
    with pytest.raises(AdapterStateError, match="'b'"):
        load_lora(adapted, adapter(), name="b")


def test_nothing_to_unload_is_nothing_to_do(pipe):
    unload(pipe)
    set_adapters(pipe, {})
    unload(nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match="Known: none"):
        unload(pipe, "a")


@pytest.mark.parametrize(
    "pattern", ["text_encoder", "text_*", "text_encoder.encoder.layers.0", "text_encoder.text_model.encoder.layers.*"]
)
def test_a_component_that_an_adapter_lacks_may_be_named(adapted, pattern):
    """One mix is for many adapters: what the pipeline has and the adapter lacks is passed over, in rows and blocks too."""
    mix = {"b": {pattern: 0.0, "unet": 0.5}}
    set_adapters(adapted, mix)
    assert mix_of(adapted.unet).choice.levels["b"][-1] == 0.5 and get_adapters(adapted)["b"].active
    set_adapters(adapted, [mix, {"a": {pattern: 0.0}}])
    with adapters(adapted, mix):
        pass
    set_adapters(adapted, {"b": {pattern: 0.0}})
