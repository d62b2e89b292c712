"""PyTorch's attention and transformer, which read the weights of layers inside them: adapters there act on every path, as fused ones do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import diffpeft
from diffpeft import (
    LoraConfig,
    adapters,
    attach,
    detach,
    fuse,
    get_adapters,
    load_lora,
    save_lora,
    set_adapters,
    unfuse,
)
from diffpeft.errors import AdapterStateError, MixedBatchError
from diffpeft.model.state import slots_of

LAYERS = ("self_attn", "linear1", "linear2")
EXACT = dict(rtol=1e-12, atol=1e-12)  # float64


def encoder(dtype=torch.float64, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, **{"batch_first": True, "dropout": 0.0, **options})
    return nn.TransformerEncoder(layer, 2).to(dtype).requires_grad_(False)


def inputs(batch_first: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of three sequences, and a mask of what is padding in them."""
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    return (x, padding) if batch_first else (x.transpose(0, 1), padding)


def give(model, targets=LAYERS, name="default", randomize=None):
    attach(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False), name, targets=list(targets))
    return model.double()


@pytest.fixture
def calls(monkeypatch):
    """The names of PyTorch's fused kernels, in the order in which they run."""
    names: list[str] = []
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        kernel = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, name=name, kernel=kernel: names.append(name) or kernel(*args))
    return names


@pytest.mark.parametrize("targets", [LAYERS, ("self_attn",), ("out_proj",), ("linear1",), ("linear2",)])
@pytest.mark.parametrize("norm_first", [False, True])
def test_every_path_of_the_transformer_applies_adapters(targets, norm_first, calls, subtests):
    for batch_first in (True, False):
        model = give(encoder(batch_first=batch_first, norm_first=norm_first), targets)
        x, padding = inputs(batch_first)
        masks = {"none": {}, "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(5)}}
        masks["padding"] = {"src_key_padding_mask": padding}
        for training in (True, False):
            for name, options in masks.items():
                with subtests.test(f"{batch_first=} {training=} {name}"):
                    model.train(training)
                    merged = copy.deepcopy(model)
                    set_adapters(merged, {"default": 0.7})
                    set_adapters(model, {"default": 0.7})
                    fuse(merged)
                    calls.clear()
                    with torch.no_grad():
                        y, ran = model(x, **options), list(calls)
                        calls.clear()
                        want = merged(x, **options)
                    assert ran == calls  # and by the same kernels
                    torch.testing.assert_close(y, want, **EXACT)
                    keep = ~(padding if batch_first else padding.t())
                    grown = model(x, **options)  # trained adapters keep PyTorch from its kernels
                    torch.testing.assert_close(grown[keep], want[keep], **EXACT)
        assert {"_transformer_encoder_layer_fwd"} == {*calls} or not batch_first


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_is_that_of_its_effective_weights(batch_first, training, calls, subtests):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 2, batch_first=batch_first, add_bias_kv=training).double().train(training)
    plain = copy.deepcopy(model)
    give(model, ["out_proj"], "b")
    attach(model, LoraConfig(r=3, bias="lora_only", init_lora_weights=False), targets="full")
    model.double()
    set_adapters(model, {"default": -0.6, "b": 0.5})
    for slot in slots_of(model, "default").values():
        nn.init.normal_(slot.diff_b)
    products = {n: {k: s.lora_B @ s.lora_A for k, s in slots_of(model, n).items()} for n in ("default", "b")}
    with torch.no_grad():
        plain.in_proj_weight -= 0.6 * 8 / 3 * products["default"][""]
        plain.out_proj.weight += (
            -0.6 * 8 / 3 * products["default"]["out_proj"] + 0.5 * 3 / 2 * products["b"]["out_proj"]
        )
        plain.in_proj_bias -= 0.6 * slots_of(model, "default")[""].diff_b
        plain.out_proj.bias -= 0.6 * slots_of(model, "default")["out_proj"].diff_b
    query, other = torch.randn(4, 4, 6).double(), torch.randn(4, 4, 6).double()
    upper, padding = torch.ones(4, 4).triu(1).bool(), torch.arange(4) >= torch.tensor([[4], [3], [2], [4]])
    cases = {
        "itself": ((query, query, query), {}),
        "without weights": ((query, query, query), {"need_weights": False}),
        "weights of heads": ((query, query, query), {"average_attn_weights": False}),
        "another": ((query, other, other), {}),
        "three": ((query, other, query), {"attn_mask": upper}),
        "padding": ((query, query, query), {"key_padding_mask": padding}),
        "both": ((query, query, query), {"key_padding_mask": padding, "attn_mask": upper}),
        "no batch": ((query[0], query[0], query[0]), {"attn_mask": upper.double()}),
    }
    for name, (args, options) in cases.items():
        for grad in (True, False):
            with subtests.test(f"{name} {grad=}"), torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(*args, **options), plain(*args, **options), **EXACT)
    merged, kind = model.merge_masks(upper, padding, query)
    assert kind == 2 and torch.equal(merged, plain.merge_masks(upper, padding, query)[0])
    assert ("_native_multi_head_attention" in calls) == (batch_first and not training)


def test_who_else_reads_a_weight_gets_the_bases():
    model, (x, _) = encoder(), inputs()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    give(model)
    attention = model.layers[0].self_attn
    for train in (True, False):
        model.train(train)(x)
        for module, name in (
            (attention, "in_proj_weight"),
            (attention.out_proj, "weight"),
            (model.layers[1].linear1, "weight"),
        ):
            assert getattr(module, name) is module._parameters[name] and not getattr(module, name).requires_grad
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert isinstance(attention, nn.MultiheadAttention) and type(attention).__name__ == "MultiheadAttention"
    assert (attention.embed_dim, attention.head_dim, attention.batch_first) == (8, 4, True)


def test_the_last_one_out_leaves_no_trace_on_any_of_them(trace):
    model, (x, padding) = encoder().eval(), inputs()
    before, want = trace(model), model(x, src_key_padding_mask=padding)
    give(model, ["linear2"], "a")
    give(model, ["self_attn"], "b")
    detach(model, "b")
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert type(model.layers[0]) is not nn.TransformerEncoderLayer
    detach(model, "a")
    assert trace(model) == before and torch.equal(model(x, src_key_padding_mask=padding), want)


def test_copies_and_pickles_keep_acting():
    model, (x, padding) = give(encoder()).eval(), inputs()
    want = model(x, src_key_padding_mask=padding)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, src_key_padding_mask=padding), want)
        set_adapters(other, {})
        assert not torch.equal(other(x, src_key_padding_mask=padding), want)
    assert torch.equal(model(x, src_key_padding_mask=padding), want)


def test_strength_0_and_a_block_of_its_own_are_the_base():
    model, (x, padding) = encoder().eval(), inputs()
    base = model(x, src_key_padding_mask=padding)
    give(model)
    set_adapters(model, {"default": 0.0})
    assert torch.equal(model(x, src_key_padding_mask=padding), base)
    set_adapters(model, {"default": 1.0})
    with adapters(model, {"default": 0.0}):
        assert torch.equal(model(x, src_key_padding_mask=padding), base)
    assert not torch.allclose(model(x, src_key_padding_mask=padding), base)


def test_unfusing_gives_back_the_bytes_and_a_cut_is_a_lora():
    model, (x, _) = encoder(torch.bfloat16), inputs()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attach(model, LoraConfig(r=2, init_lora_weights=False), targets=["self_attn"])
    want = model(x.bfloat16())
    fuse(model)
    assert torch.equal(model(x.bfloat16()), want)  # what is read is what is fused: rounded once
    assert not torch.equal(model.layers[0].self_attn.in_proj_weight, before["layers.0.self_attn.in_proj_weight"])
    unfuse(model)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_a_batch_with_a_mix_a_row_is_refused_on_attention_and_done_beside_it():
    model, (x, padding) = encoder().eval(), inputs()
    give(model, ["linear1"], "a")
    each = []
    for mix in ({"a": 1.0}, {}, {"a": -0.5}):
        set_adapters(model, mix)
        each.append(model(x, src_key_padding_mask=padding))
    set_adapters(model, [{"a": 1.0}, {}, {"a": -0.5}])
    y = model(x, src_key_padding_mask=padding)
    for row, want in enumerate(each):
        torch.testing.assert_close(y[row][~padding[row]], want[row][~padding[row]], **EXACT)
    set_adapters(model, {})
    give(model, ["self_attn"], "b")
    set_adapters(model, [{"b": 1.0}, {}, {"b": -0.5}])
    for error in (TypeError, ValueError, MixedBatchError):
        with pytest.raises(error, match=r"lora\.MultiheadAttention does not support mixed adapter batches"):
            model(x)
    set_adapters(model, [{"b": 1.0}] * 3)
    y = model(x)
    set_adapters(model, {"b": 1.0})
    torch.testing.assert_close(y, model(x), **EXACT)


def test_gradients_are_those_of_the_weights():
    model = nn.MultiheadAttention(6, 2, batch_first=True).double().requires_grad_(False)
    attach(model, LoraConfig(r=2, init_lora_weights=False), targets="full")
    model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert len(parameters) == 4 and torch.autograd.gradcheck(lambda x, *_: model(x, x, x)[0], (x, *parameters))


@pytest.mark.parametrize("make", [lambda: nn.MultiheadAttention(8, 2, batch_first=True), encoder])
def test_compiled_code_applies_adapters(make):
    model = make().double().eval()
    give(model, ["out_proj", ""] if isinstance(model, nn.MultiheadAttention) else LAYERS)
    x, _ = inputs()
    args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for s in (1.0, 0.3):
            set_adapters(model, {"default": s})
            y, want = compiled(*args), model(*args)
            y, want = (y[0], want[0]) if isinstance(y, tuple) else (y, want)
            torch.testing.assert_close(y, want, **EXACT)


def test_accelerates_hooks_stay_on_an_attention():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x, _ = inputs()
    plain = model(x, x, x)[0]
    add_hook_to_module(model, ModelHook())
    give(model, ["out_proj"])
    want = model(x, x, x)[0]
    assert not torch.allclose(want, plain)
    remove_hook_from_module(model)
    assert torch.equal(model(x, x, x)[0], want)
    detach(model, "default")
    assert torch.equal(model(x, x, x)[0], plain)


@pytest.mark.parametrize("format", ["diffusers", "lycoris"])
def test_files_of_attentions_load_again(format, tmp_path):
    model, (x, _) = give(encoder(), ["self_attn"]), inputs()
    save_lora(model, tmp_path / "a.safetensors", name="default", format=format)
    other = encoder()
    assert {*load_lora(other, tmp_path / "a.safetensors", name="a").matched} == {*slots_of(model, "default")}
    torch.testing.assert_close(other(x), model(x), **EXACT)
    assert get_adapters(other)["a"].ranks == (2,)


def test_an_attention_trained_whole_is_read_too():
    from diffpeft import get_peft_model

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder(), nn.Linear(8, 2).double()

        def forward(self, x):
            return self.head(self.encoder(x))

    model = get_peft_model(Model(), LoraConfig(target_modules=["linear1"], modules_to_save=["self_attn"])).eval()
    x, _ = inputs()
    before = model(x)
    (whole,) = (m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.copies.default"))
    nn.init.normal_(whole.out_proj.weight)
    with torch.no_grad():
        y = model(x)
    assert not torch.allclose(y, before)
    torch.testing.assert_close(y, model.train()(x), **EXACT)
    torch.testing.assert_close(model.merge_and_unload()(x), y, **EXACT)


def test_a_quantised_weight_that_is_read_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.TransformerEncoderLayer(32, 2, 32)
    torchao.quantize_(model.linear1, torchao.Int8WeightOnlyConfig())
    with pytest.raises(AdapterStateError, match="TransformerEncoderLayer reads its weight directly"):
        diffpeft.attach(model, LoraConfig(), targets=["linear1"])


class Mixed(nn.Module):
    """An attention, a transformer, a norm and a parameter of a layer's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.norm(self.encoder(self.attention(x, x, x)[0])))


FIELDS = {
    "attention": {"target_modules": ["attention"]},
    "encoder": {"target_modules": ["self_attn", "linear1", "linear2"]},
    "biases": {"target_modules": ["out"], "bias": "all"},
    "parameter": {"target_modules": [], "target_parameters": ["out.weight", "attention.in_proj_weight"]},
}


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/g", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_fsdp_puts_beside_parameters_are_not_read_past_adapters(fields, training, process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = diffpeft.get_peft_model(Mixed(), LoraConfig(r=2, init_lora_weights=False, **fields)).train(training)
    for name, p in model.named_parameters():
        if name.endswith("diff_b"):
            nn.init.normal_(p)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        want = model(x)
        assert not torch.allclose(want, Mixed().train(training)(x), atol=1e-3)
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        torch.testing.assert_close(sharded(x), want)
