"""Every method in every file format that can hold it, and the same files in PEFT, LyCORIS and stock diffusers."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffpeft import (
    CannotConvertError,
    CheckpointError,
    LoraConfig,
    MissingKeysError,
    OFTConfig,
    ShapeMismatchError,
    UnknownKeysError,
    UnsafeFileError,
    WrongBaseError,
    attach,
    converters,
    load_lora,
    save_lora,
    unload,
)
from diffpeft.methods import METHODS
from diffpeft.model.state import bundle_of, slots_of
from tests.contracts.kinds import FORMS as ALL
from tests.contracts.kinds import METHOD_FORMS, config
from tests.pairwise import params
from tests.pipeline.test_load import lora, same

TARGETS = (  # a 3 x 3 convolution, a 1 x 1 convolution, linear layers with and without a bias
    "conv_in",
    "mid_block.attentions.0.proj_in",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
)
# those of glora, full and LyCORIS's (IA)^3 are only in files: see tests/converters/test_matrix.py
FORMS = {form: row for form, row in ALL.items() if row.tensors is None}
OUTPUT = {form for form, row in FORMS.items() if row.keywords.get("side") == "output"}
INPUT = {form for form, row in FORMS.items() if row.method in ("oft", "boft")} - OUTPUT
PLAIN = {"lora", "lora, pissa", "lora, olora", "lora, orthogonal", "dora"}
ONLY_PEFT = {
    "hra",
    "hra, gram-schmidt",
    "vera",
    "hira",
    "c3a",
    "c3a, random start",
    "road",
    "road, 2",
    "road, 4",
    "delora",
    "miss",
    "miss, mini",
    "miss, bat",
}  # methods that no other program has
LYCORIS = set(FORMS) - INPUT - ONLY_PEFT - {"lora, rank-stabilised, with biases", "adalora", "ia3", "ia3, feedforward"}
HELD = {
    "kohya": LYCORIS,
    "kohya-diffusers": LYCORIS,
    "diffusers": PLAIN,
    "peft": PLAIN
    | INPUT
    | ONLY_PEFT
    | {"adalora", "ia3", "ia3, feedforward"}
    | {form for form, row in FORMS.items() if row.method in ("loha", "lokr")},
    "comfyui": LYCORIS - {form for form in FORMS if form.startswith("ia3")},
    "lycoris": LYCORIS,
}
PAIRS = [(form, format) for format, forms in HELD.items() for form in FORMS if form in forms]


def chosen():
    quick = [pair for pair in PAIRS if pair[0] in METHOD_FORMS.values()]
    for n, form in enumerate(FORMS):
        own = [pair for pair in PAIRS if pair[0] == form]
        quick += [own[(n + k) % len(own)] for k in range(2) if own]
    return quick


def attached(pipe, form, randomize, dtype=torch.float32, name="default"):
    fields = {"boft_block_size": 4} if form == "boft, output, rescaled" else {}
    attach(pipe, config(form, **fields), name, targets=TARGETS, **FORMS[form].keywords)
    randomize(pipe, name, dtype)
    return pipe


@torch.no_grad()
def output(unet):
    """What a UNet makes of a fixed input."""
    g = torch.Generator().manual_seed(1)
    x, text = (torch.randn(*shape, generator=g).to(unet.dtype) for shape in ((2, 4, 8, 8), (2, 5, 32)))
    return unet(x, torch.tensor([3, 9]), text).sample


def out_path(tmp_path, format):
    return tmp_path / ("a" if format == "peft" else "a.safetensors")


# the first form of each method in every format, the others in two in turn
@pytest.mark.parametrize("form, format", params(PAIRS, chosen()))
@pytest.mark.filterwarnings("ignore:adapter")
def test_an_adapter_comes_back_from_a_file_with_the_same_output(form, format, fresh, randomize, tmp_path):
    there, back = attached(fresh(), form, randomize), fresh()
    path = out_path(tmp_path, format)
    plain = output(back.unet)
    save_lora(there, path, format=format)
    report = load_lora(back, path, name="default")
    assert (
        report.format == {"kohya-diffusers": "kohya"}.get(format, format)
        and not report.carried
        and len(report.matched) == len(TARGETS)
    )
    assert report.methods == {FORMS[form].method, FORMS[form].of} - {""}
    want = output(there.unet)
    assert torch.equal(output(back.unet), want) and not torch.equal(want, plain)
    assert {p.dtype for slot in slots_of(back, "default").values() for p in slot.parameters()} == {torch.float32}
    again = out_path(tmp_path / "again", format)
    save_lora(back, again, format=format)
    same(*(load_file(p / "adapter_model.safetensors" if format == "peft" else p) for p in (again, path)))
    if format == "peft":
        assert (again / "adapter_config.json").read_text() == (path / "adapter_config.json").read_text()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", HELD)
def test_what_a_format_cannot_hold_is_refused_with_those_that_can(form, format, fresh, randomize, tmp_path):
    if form in HELD[format]:
        return
    pipe = attached(fresh(), form, randomize)
    with pytest.raises(CannotConvertError, match=r"conv_in|to_q|to_out") as caught:
        save_lora(pipe, out_path(tmp_path, format), format=format)
    able = [name for name in converters.FORMATS if form in HELD.get(name, ())]
    assert (", ".join(able) if able else "No format") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_default_format_is_the_first_that_can_hold_it(form, fresh, randomize, tmp_path):
    pipe = attached(fresh(), form, randomize)
    want = next((f for f in ("diffusers", "kohya") if form in HELD[f]), None)
    if want:
        save_lora(pipe, tmp_path / "a.safetensors")
        assert converters.detect(tmp_path / "a.safetensors").format == want
    else:
        with pytest.raises(CannotConvertError):
            save_lora(pipe, tmp_path / "a.safetensors")
    if form in HELD["peft"]:
        save_lora(pipe, tmp_path / "a")
        assert converters.detect(tmp_path / "a").format == "peft"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form, format", [("dora", "diffusers"), ("lokr", "kohya"), ("oft", "peft")])
def test_the_dtype_is_the_file_s(form, format, dtype, fresh, randomize, tmp_path):
    pipe = attached(fresh(torch.float32), form, randomize, dtype)
    save_lora(pipe, out_path(tmp_path, format), format=format)
    back = fresh(torch.float32)
    load_lora(back, out_path(tmp_path, format), name="default")
    assert {p.dtype for slot in slots_of(back, "default").values() for p in slot.parameters()} == {dtype}
    assert torch.equal(output(back.unet), output(pipe.unet))
    save_lora(back, out_path(tmp_path / "cast", format), format=format, dtype=torch.float16)
    file = out_path(tmp_path / "cast", format)
    tensors = load_file(file / "adapter_model.safetensors" if format == "peft" else file)
    assert {t.dtype for key, t in tensors.items() if not key.endswith("alpha")} == {torch.float16}


@pytest.mark.parametrize("form", FORMS)
def test_deltas_are_what_attached_layers_do(form, pipe, randomize):
    attached(pipe, form, randomize, torch.float64)
    bundle = bundle_of(pipe, "default", "sd15")
    layers = {f"unet.{name}": pipe.unet.get_submodule(name) for name in TARGETS}
    base = {name: layer.weight.detach() for name, layer in layers.items()}
    deltas = bundle.deltas(base)
    assert deltas.keys() == layers.keys()
    if all(entry.method in ("lora", "loha", "lokr") for entry in bundle.entries):
        assert all(torch.equal(d, deltas[name]) for name, d in bundle.deltas().items())
    for name, layer in layers.items():
        cin = layer.weight.shape[1]
        x = torch.randn(2, 3, cin).double() if layer.weight.dim() == 2 else torch.randn(2, cin, 5, 5).double()
        bias = layer.bias
        with torch.no_grad():
            shift = 0 if bias is None else bias
            W, zero = base[name] + deltas[name], torch.zeros_like(x)
            got = layer(x) - layer(zero)  # less what the adapter does to the bias
            want = nn.functional.linear(x, W) if W.dim() == 2 else nn.functional.conv2d(x, W, padding=layer.padding)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10, msg=f"{name} {shift}")


# ---- PEFT


class Net(nn.Module):
    """A model of no family, with the layers that PEFT has for every method, and names with dots."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"one": nn.Linear(12, 8), "two": nn.Linear(8, 12)})
        self.pointwise, self.wide = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x, image):
        return self.inner["two"](torch.tanh(self.inner["one"](x))), self.wide(torch.tanh(self.pointwise(image)))


LAYERS = ("inner.one", "inner.two", "pointwise", "wide")
# {case: (form of ours, PEFT's config, its fields)}
IN_PEFT = {
    "LoRA": ("LoraConfig", dict(r=3, lora_alpha=2, rank_pattern={"two": 2}, alpha_pattern={"^inner.one": 5})),
    "rsLoRA": ("LoraConfig", dict(r=3, lora_alpha=2, use_rslora=True)),
    "LoRA with biases": ("LoraConfig", dict(r=2, lora_bias=True)),
    "DoRA": ("LoraConfig", dict(r=2, lora_alpha=3, use_dora=True)),
    "LoHa": ("LoHaConfig", dict(r=2, alpha=3, rank_pattern={"wide": 3})),
    "LoHa with cores": ("LoHaConfig", dict(r=2, alpha=3, use_effective_conv2d=True)),
    "LoKr": ("LoKrConfig", dict(r=1, alpha=3, rank_pattern={"inner.two": 2}, decompose_factor=2)),
    "LoKr with cores": ("LoKrConfig", dict(r=1, alpha=3, use_effective_conv2d=True, decompose_both=True)),
    "LoKr of whole halves": ("LoKrConfig", dict(r=8, alpha=8)),
    "OFT": ("OFTConfig", dict(oft_block_size=4, use_cayley_neumann=False)),
    "OFT by a series": ("OFTConfig", dict(oft_block_size=4)),
    "OFT of other sizes": ("OFTConfig", dict(oft_block_size=6, use_cayley_neumann=False)),
    "OFT by number": ("OFTConfig", dict(r=2, oft_block_size=0, num_cayley_neumann_terms=3)),
    "OFT, shared": ("OFTConfig", dict(oft_block_size=4, block_share=True)),
    "OFT, constrained": ("OFTConfig", dict(oft_block_size=4, coft=True, eps=0.05, use_cayley_neumann=False)),
    "BOFT": ("BOFTConfig", dict(boft_block_size=4)),
    "HRA": ("HRAConfig", dict(r=4)),
    "HRA of an odd chain, by Gram-Schmidt": ("HRAConfig", dict(r=3, apply_GS=True)),
    "HiRA": ("HiraConfig", dict(r=3)),
    "MiSS": ("MissConfig", dict(r=5)),
    "MiSS, mini": ("MissConfig", dict(r=5, init_weights="mini", mini_r=2)),
    "MiSS, bat": ("MissConfig", dict(r=4, init_weights="bat")),
    "RoAd 1": ("RoadConfig", dict(group_size=4)),
    "RoAd 2": ("RoadConfig", dict(variant="road_2", group_size=2)),
    "RoAd 4": ("RoadConfig", dict(variant="road_4", group_size=4)),
    "DeLoRA": ("DeloraConfig", dict(r=3, delora_lambda=2, rank_pattern={"two": 2})),
    "C3A": ("C3AConfig", dict(block_size=4)),
    "C3A of other blocks": ("C3AConfig", dict(block_size=4, block_size_pattern={"inner.two": 2})),
    "BOFT by number": ("BOFTConfig", dict(boft_block_size=0, boft_block_num=2)),
}
LINEAR_IN_PEFT = {"DeloraConfig", "RoadConfig", "C3AConfig", "MissConfig"}  # what PEFT has for linear layers alone
every_case = pytest.mark.parametrize("case", IN_PEFT)


def layers_of(case):
    """The layers that PEFT's method has."""
    return LAYERS[:2] if IN_PEFT[case][0] in LINEAR_IN_PEFT else LAYERS


@pytest.fixture
def net():
    return Net().requires_grad_(False).eval()


def inputs():
    g = torch.Generator().manual_seed(2)
    return torch.randn(3, 12, generator=g), torch.randn(2, 4, 5, 5, generator=g)


def theirs(net, case):
    """A PeftModel with random tensors."""
    import peft

    name, fields = IN_PEFT[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            copy.deepcopy(net), getattr(peft, name)(**fields, target_modules=[*layers_of(case)])
        )
    for key, p in model.named_parameters():
        if p.requires_grad or "magnitude" in key:
            nn.init.normal_(p, mean=1.0 if "boft_s" in key or "magnitude" in key else 0.0, std=0.2)
    return model.eval()


@torch.no_grad()
def merged(model):
    """What a PeftModel's merged weights do: its OFT on kernels is right only there."""
    return copy.deepcopy(model).merge_and_unload()(*inputs())


def close(ours, want):
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@every_case
@torch.no_grad()
def test_what_peft_saves_gives_its_output_here(case, net, tmp_path):
    model = theirs(net, case)
    model.save_pretrained(tmp_path / "a")
    report = load_lora(net, tmp_path / "a")
    assert report.format == "peft" and set(report.matched) == set(layers_of(case)) and not report.carried
    close(net(*inputs()), merged(model))
    save_lora(net, tmp_path / "b")  # its own config, field for field, and its bytes
    assert json.loads((tmp_path / "b/adapter_config.json").read_text()) == json.loads(
        (tmp_path / "a/adapter_config.json").read_text()
    )
    same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in "ba"))


@every_case
@torch.no_grad()
def test_what_we_save_gives_our_output_in_peft(case, net, tmp_path):
    import peft

    base, model = copy.deepcopy(net), theirs(net, case)
    model.save_pretrained(tmp_path / "a")
    load_lora(net, tmp_path / "a")
    bundle = bundle_of(net, "a", "")
    bundle.metadata.clear()  # a config of our own
    converters.write(bundle, tmp_path / "b", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings(
            "ignore", "The symmetric init|Invalid|Adjusted|.*oft_block_size|Failed to load the CUDA|Setting boft_n"
        )
        again = peft.PeftModel.from_pretrained(base, str(tmp_path / "b")).eval()
    close(net(*inputs()), merged(again))
    same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in "ba"))
    own = json.loads((tmp_path / "b/adapter_config.json").read_text())
    always = {"peft_type", "r", "target_modules", "peft_version", "base_model_name_or_path", "task_type"}
    their_fields = json.loads((tmp_path / "a/adapter_config.json").read_text()).keys()
    assert always & their_fields <= own.keys() and own["peft_version"] == "0.21.2"
    assert own["target_modules"] == sorted(layers_of(case))
    assert own.keys() <= their_fields
    unload(net)
    load_lora(net, tmp_path / "b")
    close(net(*inputs()), merged(again))


@torch.no_grad()
def test_a_folder_of_ours_can_be_injected_by_peft(pipe, fresh, randomize, tmp_path):
    import peft

    attached(pipe, "lokr", randomize)
    save_lora(pipe, tmp_path / "a")
    theirs = fresh().unet
    own = peft.PeftConfig.from_pretrained(str(tmp_path / "a"))
    peft.inject_adapter_in_model(own, theirs)
    found = peft.set_peft_model_state_dict(theirs, load_file(tmp_path / "a/adapter_model.safetensors"))
    assert not found.unexpected_keys
    torch.testing.assert_close(output(theirs), output(pipe.unet), rtol=0, atol=1e-9)


@pytest.fixture
def scaled(net):
    """A LoKr of two whole halves, which PEFT scales by alpha / r."""
    IN_PEFT["scaled"] = ("LoKrConfig", dict(r=8, alpha=3))
    yield theirs(net, "scaled")
    del IN_PEFT["scaled"]


def test_whole_halves_keep_peft_s_scale_and_their_bytes(scaled, net, tmp_path):
    scaled.save_pretrained(tmp_path / "a")
    load_lora(net, tmp_path / "a")
    with torch.no_grad():
        close(net(*inputs()), merged(scaled))
        save_lora(net, tmp_path / "b")
        close(peft_of(net, tmp_path / "b")(*inputs()), merged(scaled))
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_whole_halves_take_peft_s_scale_where_there_is_none(fresh, randomize, tmp_path):
    save_lora(attached(fresh(), "lokr, both full", randomize), tmp_path / "a", format="peft")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    config["alpha"] *= 0.375  # PEFT's alpha / r is 0.375 now
    config["alpha_pattern"] = {name: 0.375 * alpha for name, alpha in config["alpha_pattern"].items()}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    pipe = fresh()
    load_lora(pipe, tmp_path / "a", name="a")
    assert all(slot.scale == 0.375 for slot in slots_of(pipe, "a").values())
    want = output(pipe.unet)
    report = converters.convert(tmp_path / "a", tmp_path / "b.safetensors", to="kohya", family="sd15")
    assert report.level == "L1" and any("lokr_w1" in said for said in report.warnings)
    converters.convert(tmp_path / "b.safetensors", tmp_path / "c", to="peft")
    converters.convert(tmp_path / "a", tmp_path / "d", to="peft", family="sd15")
    for name in ("b.safetensors", "c", "d"):
        back = fresh()
        load_lora(back, tmp_path / name)
        torch.testing.assert_close(output(back.unet), want, rtol=0, atol=1e-6)
    same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in "da"))


def test_whole_halves_train_on_as_in_peft(scaled, net, tmp_path):
    scaled.save_pretrained(tmp_path / "a")
    load_lora(net, tmp_path / "a", trainable=True)
    for model in (scaled.train(), net.train()):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            sum(t.square().mean() for t in model(*inputs())).backward()
            optimizer.step()
            optimizer.zero_grad()
    close(net(*inputs()), scaled(*inputs()))


def peft_of(net, folder):
    """PEFT's model of a folder."""
    import peft

    plain = copy.deepcopy(net)
    unload(plain)
    return peft.PeftModel.from_pretrained(plain, str(folder)).eval()


def test_an_old_series_is_read_and_written_as_such(net, tmp_path):
    model = theirs(net, "OFT by a series")
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k != "peft_version"}
    file.write_text(json.dumps(old))
    load_lora(net, tmp_path / "a")
    bundle = bundle_of(net, "a", "")
    assert {e.options["neumann_last"] for e in bundle.entries} == {2}
    bundle.metadata.clear()
    converters.write(bundle, tmp_path / "b", format="peft")
    again = converters.read(tmp_path / "b")
    assert [e.options for e in again.entries] == [e.options for e in bundle.entries]
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["peft_version"].startswith("0.17")


def test_a_peft_folder_of_a_text_encoder_has_the_model_s_own_names(pipe, fresh, randomize, tmp_path):
    attach(pipe.text_encoder, LoraConfig(r=2), targets=["q_proj", "fc1"])
    randomize(pipe.text_encoder)
    save_lora(pipe.text_encoder, tmp_path / "a")
    keys = list(load_file(tmp_path / "a/adapter_model.safetensors"))
    assert all(key.removeprefix("base_model.model.").startswith("encoder.layers") for key in keys)
    for target in (fresh(), fresh().text_encoder):
        report = load_lora(target, tmp_path / "a")
        assert len(report.matched) == 4
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(target(ids)[0], pipe.text_encoder(ids)[0])


def test_a_folder_of_several_components_has_a_folder_for_each(pipe, fresh, randomize, tmp_path):
    attach(pipe, LoraConfig(r=2), targets=["conv_in", "q_proj"])
    randomize(pipe, "default", torch.float32)
    save_lora(pipe, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["text_encoder", "unet"]
    for component in ("unet", "text_encoder"):
        assert converters.detect(tmp_path / "a" / component).format == "peft"
    back = fresh()
    assert len(load_lora(back, tmp_path / "a", name="default").matched) == len(slots_of(pipe, "default"))
    for layer, slot in slots_of(back, "default").items():
        for role, tensor in slot.tensors.items():
            assert torch.equal(tensor, slots_of(pipe, "default")[layer].tensors[role])


def test_a_folder_keeps_what_else_it_holds(pipe, tmp_path):
    attach(pipe, LoraConfig(r=2), targets=["conv_in"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a/README.md").write_text("mine")
    save_lora(pipe, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "README.md",
        "a",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(CannotConvertError, match="folder"):
        save_lora(pipe, tmp_path / "a.safetensors", format="peft")


SLOW = "(?:|.|.?)" * 60 + "(?:!|x!)"  # even for names of three letters
BAD_CONFIGS = {
    "no table": ([], CheckpointError, "table"),
    "another type": ({"peft_type": "LOHA"}, CheckpointError, "LOHA"),
    "an unknown type": ({"peft_type": "VERA"}, CheckpointError, "VERA"),
    "another rank": ({"r": 7}, CheckpointError, "rank is 7"),
    "another rank by pattern": ({"rank_pattern": {"one": 7}}, CheckpointError, "rank is 7"),
    "DoRA": ({"use_dora": True}, CheckpointError, "use_dora"),
    "a target without tensors": ({"target_modules": ["one", "three"]}, CheckpointError, "three"),
    "a slow target": ({"target_modules": SLOW}, UnsafeFileError, "long"),
    "a slow pattern": ({"alpha_pattern": {SLOW: 3}}, UnsafeFileError, "long"),
    "no pattern": ({"alpha_pattern": {"[": 3}}, CheckpointError, "cannot read"),
    "code": ({"megatron_core": "os"}, UnsafeFileError, "import"),
    "no depth": ("[" * 100_000, CheckpointError, "cannot read"),
    "no number": ({"lora_alpha": "many"}, CheckpointError, "lora_alpha is 'many'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_disagrees_is_refused(case, net, tmp_path):
    theirs(net, "rsLoRA").save_pretrained(tmp_path / "a")
    change, error, said = BAD_CONFIGS[case]
    file = tmp_path / "a/adapter_config.json"
    text = json.dumps(json.loads(file.read_text()) | change if isinstance(change, dict) else change)
    file.write_text(change if isinstance(change, str) else text)
    with pytest.raises(error, match=said):
        load_lora(net, tmp_path / "a")
    assert slots_of(net, "a") == {}


@pytest.mark.parametrize("case, fields", [("OFT", {"oft_block_size": 2}), ("BOFT", {"boft_block_size": 2})])
def test_a_config_with_other_blocks_is_refused(case, fields, net, tmp_path):
    theirs(net, case).save_pretrained(tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match="blocks"):
        load_lora(net, tmp_path / "a")


@pytest.mark.parametrize("terms", [-1, 10**9])
def test_a_series_without_end_is_refused(terms, net, tmp_path):
    theirs(net, "OFT by a series").save_pretrained(tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_cayley_neumann_terms": terms}))
    with pytest.raises(CheckpointError, match="terms"):
        load_lora(net, tmp_path / "a")


@pytest.mark.parametrize("fields", [dict(use_rslora=True), dict(use_dora=True), dict(alpha_pattern={"conv_in": 5})])
def test_a_folder_s_config_survives_other_formats(fields, fresh, tmp_path):
    import peft

    there = fresh().unet
    own = peft.LoraConfig(r=3, lora_alpha=2, lora_dropout=0.1, target_modules=["conv_in", "to_q"], **fields)
    model = peft.get_peft_model(there, own)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    model.save_pretrained(tmp_path / "a")
    for format, source in (("kohya", "a"), ("diffusers", "kohya.safetensors"), ("peft", "diffusers.safetensors")):
        bundle = converters.read(tmp_path / source)
        converters.write(bundle, tmp_path / (format if format == "peft" else f"{format}.safetensors"), format=format)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("a", "peft")]
    assert configs[0] == configs[1]
    same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "a")))


def test_a_repository_may_be_a_peft_folder(net, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    theirs(net, "rsLoRA").save_pretrained(tmp_path / "a")

    def download(repo, name, revision=None):
        if not (tmp_path / "a" / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / "a" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_lora(net, "some/adapter").format == "peft"


def test_tensors_outside_the_targets_are_named(net, tmp_path):
    theirs(net, "rsLoRA").save_pretrained(tmp_path / "a")
    file = tmp_path / "a/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": r".*\.(one|two)|wide"}))
    with pytest.warns(UserWarning, match="pointwise"):
        load_lora(net, tmp_path / "a")


def test_peft_s_weights_without_their_config_are_refused(net, tmp_path):
    theirs(net, "LoRA").save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    (tmp_path / "a/adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*alpha="):
        load_lora(net, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"adapter_config\.json.*alpha="):
        load_lora(net, tensors, name="rank")
    load_lora(net, tensors, name="half", alpha=1)
    load_lora(net, tmp_path / "a", name="folder", alpha=1)
    for name, alpha in (("rank", None), ("half", 1.0), ("folder", 1.0)):
        assert {slot.parts[0].alpha for slot in slots_of(net, name).values()} == {alpha}


def test_a_layer_that_a_bare_module_lacks_is_refused_with_the_near_match(net, tmp_path):
    theirs(net, "rsLoRA").save_pretrained(tmp_path / "a")
    del net.pointwise
    net.pointwise_ = nn.Conv2d(4, 8, 1)
    with pytest.raises(UnknownKeysError, match="Did you mean 'pointwise_'"):
        load_lora(net, tmp_path / "a")


def test_weights_of_the_base_in_a_folder_are_refused(net, tmp_path):
    theirs(net, "rsLoRA").save_pretrained(tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.wide.bias": torch.zeros(4)}, file)
    with pytest.raises(UnknownKeysError, match=r"wide\.bias"):
        load_lora(net, tmp_path / "a")


def test_a_folder_for_another_model_is_refused_by_a_pipeline(net, pipe, tmp_path):
    theirs(net, "rsLoRA").save_pretrained(tmp_path / "a")
    with pytest.raises(WrongBaseError):
        load_lora(pipe, tmp_path / "a")


# ---- LyCORIS

LYCORIS = {
    "LoCon": ("locon", dict(lora_dim=2, alpha=3)),
    "LoCon with cores": ("locon", dict(lora_dim=2, alpha=3, use_tucker=True)),
    "DoRA": ("locon", dict(lora_dim=2, alpha=3, weight_decompose=True, wd_on_out=True)),
    "DoRA of inputs": ("locon", dict(lora_dim=2, alpha=3, weight_decompose=True, wd_on_out=False)),
    "LoHa": ("loha", dict(lora_dim=2, alpha=3)),
    "LoHa with cores": ("loha", dict(lora_dim=2, alpha=3, use_tucker=True)),
    "LoKr": ("lokr", dict(lora_dim=1, alpha=3)),
    "LoKr with cores": ("lokr", dict(lora_dim=1, alpha=3, use_tucker=True, factor=2, decompose_both=True)),
    "LoKr of whole halves": ("lokr", dict(lora_dim=100, alpha=3)),
    "DoRA over LoKr": ("lokr", dict(lora_dim=1, alpha=3, weight_decompose=True, wd_on_out=True)),
    "DoRA of inputs over LoHa": ("loha", dict(lora_dim=2, alpha=3, weight_decompose=True, wd_on_out=False)),
    "OFT": ("diag-oft", dict(lora_dim=4)),
    "OFT, constrained": ("diag-oft", dict(lora_dim=4, alpha=0.02, constraint=0.02, rescaled=True)),
    "BOFT": ("boft", dict(lora_dim=4)),
    "BOFT, constrained": ("boft", dict(lora_dim=4, alpha=0.02, constraint=0.02, rescaled=True)),
}


def lycoris_modules(unet, case):
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    classes = dict(
        zip(
            ("locon", "loha", "lokr", "diag-oft", "boft"),
            (LoConModule, LohaModule, LokrModule, DiagOFTModule, ButterflyOFTModule),
            strict=True,
        )
    )
    algo, fields = LYCORIS[case]
    found = {}
    for name in TARGETS:
        module = classes[algo](f"lora_unet_{name.replace('.', '_')}", unet.get_submodule(name), **fields).to(unet.dtype)
        for key, p in module.named_parameters():
            nn.init.normal_(p, mean=1.0 if "scale" in key else 0.0, std=0.3)
        found[name] = module.eval()
    return found


@pytest.mark.parametrize("case", LYCORIS)
@torch.no_grad()
def test_what_lycoris_makes_gives_its_output_here(case, fresh, tmp_path):
    dtype = torch.float32 if "OFT" in case else torch.float64  # its rotations are made in float32
    pipe, there = fresh(dtype), fresh(dtype)
    modules = lycoris_modules(there.unet, case)
    tensors = {f"{m.lora_name}.{k}": t.contiguous() for m in modules.values() for k, t in m.state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    report = load_lora(pipe, tmp_path / "a.safetensors")
    assert len(report.matched) == len(TARGETS) and not report.carried
    for name, module in modules.items():
        base = pipe.unet.get_submodule(name)
        x = torch.randn(2, base.weight.shape[1], *([6, 6] if base.weight.dim() == 4 else []), dtype=dtype)
        torch.testing.assert_close(base(x), module(x), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    save_lora(pipe, tmp_path / "b.safetensors")
    if not (case.startswith("DoRA") and " " not in case) and case != "LoCon":
        same(load_file(tmp_path / "b.safetensors"), tensors)
    save_lora(pipe, tmp_path / "c.safetensors", format="kohya")
    same(load_file(tmp_path / "c.safetensors"), tensors)


# LyCORIS's own loader takes every magnitude for one of outputs, makes the halves of a LoKr whole or factored by its own rule,
# and repeats a BOFT's stages until there are as many as it would make
_NOT_IN_LYCORIS = {form for form in FORMS if form.endswith(", in") or form.startswith(("lokr", "boft"))} - {
    "lokr, both full"
}


@pytest.mark.parametrize("form", sorted(HELD["kohya"] - _NOT_IN_LYCORIS))
@torch.no_grad()
def test_what_we_save_gives_our_output_in_lycoris(form, fresh, randomize, tmp_path):
    from lycoris.modules import get_module, make_module

    ours, theirs = attached(fresh(torch.float32), form, randomize), fresh(torch.float32)
    save_lora(ours, tmp_path / "a.safetensors", format="kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    for name in TARGETS:
        base, layer = theirs.unet.get_submodule(name), ours.unet.get_submodule(name)
        key = f"lora_unet_{name.replace('.', '_')}"
        module = make_module(*get_module(tensors, key), key, base).eval()
        x = torch.randn(2, base.weight.shape[1], *([6, 6] if base.weight.dim() == 4 else []))
        torch.testing.assert_close(layer(x), module(x), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_sd_scripts_oft_has_its_own_bound(pipe, tmp_path):
    key = "oft_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    want = {f"{key}.oft_blocks": torch.randn(4, 8, 8), f"{key}.alpha": torch.tensor(0.0)}
    base = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(3, 32).double()
    plain = base(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a bound of 0 is not an adapter without effect
        assert load_lora(pipe, want, name="a").methods == {"oft"}
    torch.testing.assert_close(base(x), plain, rtol=0, atol=1e-6)
    save_lora(pipe, tmp_path / "a.safetensors")
    same(load_file(tmp_path / "a.safetensors"), want)
    unload(pipe)
    load_lora(pipe, {k.replace("oft_unet", "lora_unet"): t for k, t in want.items()})
    assert (base(x) - plain).abs().max() > 0.1


# ---- stock diffusers


def test_stock_diffusers_reads_our_dora(fresh, randomize, image, tmp_path):
    ours, theirs = fresh(), fresh()
    attach(ours, LoraConfig(r=2, lora_alpha=3, use_dora=True), targets=["conv_in", "proj_in", "to_q", "q_proj", "fc1"])
    randomize(ours)
    save_lora(ours, tmp_path / "a.safetensors", format="diffusers")
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors", adapter_name="a")
    assert theirs.unet.peft_config["a"].use_dora and theirs.text_encoder.peft_config["a"].use_dora
    want = image(theirs)
    assert (want - image(fresh())).abs().max() > 1e-3
    torch.testing.assert_close(image(ours), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_every_role_is_read_in_diffusers_namespace(form, fresh, randomize, tmp_path):
    """`component.layer.role`, with and without the adapter's name."""
    there, back = attached(fresh(), form, randomize), fresh()
    bundle = bundle_of(there, "default", "sd15")
    if form.startswith("oft, constrained"):
        return  # the bound stands in a config
    tensors = {}
    for e in bundle.entries:
        for role, h in e.tensors.items():
            role, end = (role.removesuffix("_bias"), ".bias") if role.endswith("_bias") else (role, "")
            end = end or (".weight" if role in ("lora_A", "lora_B", "oft_R") else "")
            tensors[f"{e.layer}.{role}.default{end}"] = h.tensor.contiguous()
        if e.alpha is not None:
            tensors[f"{e.layer}.alpha"] = torch.tensor(float(e.alpha), dtype=torch.float64)
    if FORMS[form].method == "oft" and form in INPUT and form != "oft, neumann":
        return  # without a config it is the series
    if form in ("hra, gram-schmidt", "vera") or form.startswith("road"):
        return  # without a config it is a chain; the seed, and the size of groups, stand there too
    if form.startswith("ia3"):
        return  # without a config nothing tells a convolution's inputs from its outputs
    load_lora(back, tensors, name="default")
    assert torch.equal(output(back.unet), output(there.unet))


# ---- several methods in one file


def test_several_methods_in_one_file_and_on_one_layer(fresh, tmp_path):
    pipe, layer = fresh(), "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    other = "lora_unet_conv_in"
    tensors = {
        f"{layer}.oft_blocks": torch.randn(8, 4, 4) * 0.1,
        f"{layer}.lora_down.weight": torch.randn(2, 32),
        f"{layer}.lora_up.weight": torch.randn(32, 2),
        f"{layer}.dora_scale": torch.rand(32, 1) + 1,
        f"{layer}.alpha": torch.tensor(2.0),
        f"{layer}.diff_b": torch.randn(32),
        f"{other}.lokr_w1": torch.randn(4, 2),
        f"{other}.lokr_w2": torch.randn(4, 2, 3, 3),
        **{k: t for k, t in lora().items() if k.startswith("lora_te")},
    }
    tensors[f"{other}.diff_b"] = torch.randn(16)
    tensors.pop(f"{layer}.diff_b")  # to_q has no bias
    base = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    W, x = base.weight.detach().clone(), torch.randn(5, 32).double()
    report = load_lora(pipe, tensors, name="a")
    assert report.methods == {"lora", "dora", "lokr", "oft"} and not report.carried
    bundle = converters.read(tensors)
    assert [e.method for e in bundle.entries if e.layer.endswith("to_q")] == ["dora", "oft"]
    delta = bundle.deltas({e.layer: W for e in bundle.entries if e.layer.endswith("to_q")} | {"unet.conv_in": None})
    with torch.no_grad():
        want = x @ (W + delta["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]).T
        torch.testing.assert_close(base(x), want, rtol=0, atol=1e-6)
    save_lora(pipe, tmp_path / "a.safetensors")
    same(load_file(tmp_path / "a.safetensors"), tensors)
    with pytest.raises(CannotConvertError, match="oft_blocks"):
        save_lora(pipe, tmp_path / "b")


HALVES = {
    "a LoKr without a half": ({"lokr_w1_a": (4, 1), "lokr_w2": (8, 8)}, MissingKeysError, "lokr_w1_b"),
    "a core without factors": (
        {"lora_down.weight": (2, 32), "lora_mid.weight": (2, 2, 1, 1)},
        MissingKeysError,
        "lora_B",
    ),
    "one core of two": (
        {**{f"hada_w{j}_{ab}": (2, 32) for j in "12" for ab in "ab"}, "hada_t1": (2, 2, 3, 3)},
        MissingKeysError,
        "hada_t2",
    ),
    "a magnitude alone": ({"dora_scale": (32, 1)}, MissingKeysError, "lora_A"),
    "a rescale alone": ({"rescale": (32, 1)}, MissingKeysError, "oft_blocks"),
    "a half whole and factored": (
        {"lokr_w1": (4, 4), "lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2": (8, 8)},
        CheckpointError,
        "more than one",
    ),
    "two ranks": (
        {"hada_w1_a": (32, 2), "hada_w1_b": (3, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)},
        ShapeMismatchError,
        "ranks",
    ),
    "two ranks in a LoKr": ({"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (1, 8)}, ShapeMismatchError, "ranks"),
    "rank 0": ({"lokr_w1": (4, 4), "lokr_w2_a": (8, 0), "lokr_w2_b": (0, 8)}, ShapeMismatchError, "rank 0"),
    "a magnitude of other size": (
        {"lora_down.weight": (2, 32), "lora_up.weight": (32, 2), "dora_scale": (31, 1)},
        ShapeMismatchError,
        "dora_scale",
    ),
    "other blocks": ({"oft_blocks": (3, 8, 8)}, ShapeMismatchError, "features"),
    "a difference of other size": ({"diff": (31, 32)}, ShapeMismatchError, "diff"),
    "IA3 of nobody knows what": ({"weight": (32,)}, MissingKeysError, "on_input"),
    "GLoRA of other size": ({f"{n}.weight": (2, 2) for n in ("a1", "a2", "b1", "b2")}, ShapeMismatchError, "glora"),
}


@pytest.mark.parametrize("case", HALVES)
def test_tensors_that_are_no_whole_are_refused(case, pipe, trace):
    shapes, error, said = HALVES[case]
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    before = trace(pipe.unet)
    with pytest.raises(error, match=said) as caught:
        load_lora(pipe, {f"{key}.{end}": torch.ones(shape) for end, shape in shapes.items()})
    assert type(caught.value) is error and "to_q" in str(caught.value)
    assert trace(pipe.unet) == before


def test_what_peft_has_no_config_for_is_refused(pipe, tmp_path):
    cases = {
        "decompose_factor": {"lokr_w1": (8, 4), "lokr_w2": (4, 8)},
        "whole or factored": {"lokr_w1": (4, 4), "lokr_w2_a": (8, 7), "lokr_w2_b": (7, 8)},
    }
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for said, shapes in cases.items():
        bundle = converters.read({f"{key}.{end}": torch.ones(shape) for end, shape in shapes.items()})
        with pytest.raises(CannotConvertError, match=rf"{said}(?s:.*)to_q(?s:.*)kohya"):
            converters.write(bundle, tmp_path / "a", format="peft")


def test_cores_on_some_kernels_only_are_refused_by_peft(pipe, randomize, tmp_path):
    attach(pipe, config("loha, tucker"), targets=["conv_in"])
    bundle = bundle_of(pipe, "default", "sd15")
    attach(pipe, config("loha"), "b", targets=["conv_out"])
    bundle.entries += bundle_of(pipe, "b", "sd15").entries
    with pytest.raises(CannotConvertError, match=r"core(?s:.*)conv_out"):
        converters.write(bundle, tmp_path / "a", format="peft")


def test_two_alphas_on_one_layer_are_refused_by_kohya(pipe, tmp_path):
    attach(pipe, config("lora"), targets=["conv_in"])
    bundle = bundle_of(pipe, "default", "sd15")
    attach(pipe, config("loha", alpha=7), "b", targets=["conv_in"])
    bundle.entries += bundle_of(pipe, "b", "sd15").entries
    with pytest.raises(CannotConvertError, match="one alpha"):
        converters.write(bundle, tmp_path / "a.safetensors", format="kohya")


def test_an_embedding_goes_into_a_peft_folder_and_back(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 8)

        def forward(self, ids):
            return self.words(ids)

    import peft

    net, ids = Words().requires_grad_(False), torch.tensor([1, 5, 9])
    cases = (
        (LoraConfig(r=2, lora_alpha=3), {}),
        (OFTConfig(oft_block_size=4), {}),
        (LoraConfig(r=2, lora_alpha=3, use_dora=True), {}),
    )
    for n, (own, kwargs) in enumerate(cases):
        name = f"a{n}"
        attach(net, own, name, targets=["words"], **kwargs)
        for slot in slots_of(net, name).values():
            for p in slot.parameters():
                nn.init.normal_(p, std=0.3)
        save_lora(net, tmp_path / name, name=name)
        with torch.no_grad():
            want = net(ids)
        unload(net)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / name))
        load_lora(net, tmp_path / name)
        with torch.no_grad():
            assert torch.equal(net(ids), want)
            torch.testing.assert_close(model.merge_and_unload()(ids), want, rtol=0, atol=1e-5)
        unload(net)


def test_every_method_has_a_row_and_every_row_a_method():
    from diffpeft.methods.layout import INNER, LAYOUTS, MAGNITUDES, ROLES

    assert {*METHODS} == {*LAYOUTS}
    for method, layout in LAYOUTS.items():
        assert {*layout.roles} <= {*METHODS[method].roles} and METHODS[method].name == method
        assert layout.off <= {*layout.roles}
        assert getattr(METHODS[method].config, "__name__", "") == layout.config
    assert {*METHODS["dora"].roles} >= {*MAGNITUDES} | {role for method in INNER for role in ROLES[method]}
