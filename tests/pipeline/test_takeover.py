"""Pipelines that were taken over against diffusers with peft: the same pictures, values and kinds of errors after the same methods."""

from __future__ import annotations

import copy
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import diffpeft
from diffpeft.errors import AdapterStateError, ConfigError
from tests.families import pipelines

MAKERS = {"sd": pipelines._sd, "sdxl": pipelines._sdxl, "flux": lambda: pipelines._flux(False)}
ENDS = ("to_q", "to_v", "to_out.0", "q_proj", "fc1")
pytestmark = pytest.mark.filterwarnings("ignore")


def made(kind):
    torch.manual_seed(0)
    pipe = MAKERS[kind]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def factors(pipe, seed, rank, parts=None):
    """{key: tensor} of a LoRA in diffusers' words."""
    g, tensors = torch.Generator().manual_seed(seed), {}
    for part in parts or pipe._lora_loadable_modules:
        for name, module in getattr(pipe, part).named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith(ENDS):
                tensors[f"{part}.{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=g) * 0.3
                tensors[f"{part}.{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=g) * 0.3
    return tensors


class Lazily(dict):
    """{key: what is made of it when it is asked for}."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{kind: {name: path of a LoRA for it}}."""
    folder = tmp_path_factory.mktemp("loras")

    def of_kind(kind):
        pipe, paths = made(kind), {}
        denoiser = pipe._lora_loadable_modules[:1]
        for name, seed, rank, parts in (("a", 1, 2, None), ("b", 2, 3, None), ("c", 3, 2, denoiser)):
            paths[name] = folder / f"{kind}-{name}.safetensors"
            save_file(factors(pipe, seed, rank, parts), paths[name])
        return paths

    return Lazily(of_kind)


def draw(pipe, **scale):
    size = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}
    return pipe("cat", generator=torch.manual_seed(0), **size, **scale).images


def scaled(pipe, s):
    name = "joint_attention_kwargs" if hasattr(pipe, "transformer") else "cross_attention_kwargs"
    return draw(pipe, **{name: {"scale": s}})


def denoiser(pipe):
    return getattr(pipe, pipe._lora_loadable_modules[0])


def load(name):
    return lambda pipe, paths: pipe.load_lora_weights(str(paths[name]), adapter_name=name)


# what is done to a pipeline, and what it answers
STEPS = {
    "load a": load("a"),
    "load b": load("b"),
    "load c": load("c"),
    "load of tensors": lambda pipe, paths: pipe.load_lora_weights(factors(pipe, 4, 2)),
    "load of nothing": lambda pipe, paths: pipe.load_lora_weights({"foo": torch.zeros(2)}),
    "load of no file": lambda pipe, paths: pipe.load_lora_weights(str(paths["a"].parent), weight_name="no.safetensors"),
    "set a": lambda pipe, paths: pipe.set_adapters("a"),
    "set ab": lambda pipe, paths: pipe.set_adapters(["a", "b"], [0.5, -0.7]),
    "set ba": lambda pipe, paths: pipe.set_adapters(["b", "a"], 0.4),
    "set a by component": lambda pipe, paths: pipe.set_adapters("a", {pipe._lora_loadable_modules[0]: 0.3}),
    "set unknown": lambda pipe, paths: pipe.set_adapters("zz"),
    "set too few weights": lambda pipe, paths: pipe.set_adapters(["a", "b"], [1.0]),
    "disable": lambda pipe, paths: pipe.disable_lora(),
    "enable": lambda pipe, paths: pipe.enable_lora(),
    "delete a": lambda pipe, paths: pipe.delete_adapters("a"),
    "delete ab": lambda pipe, paths: pipe.delete_adapters(["a", "b"]),
    "fuse": lambda pipe, paths: pipe.fuse_lora(),
    "fuse at 0.5": lambda pipe, paths: pipe.fuse_lora(components=pipe._lora_loadable_modules, lora_scale=0.5),
    "fuse nothing": lambda pipe, paths: pipe.fuse_lora(components=[]),
    "fuse the vae": lambda pipe, paths: pipe.fuse_lora(components=["vae"]),
    "unfuse": lambda pipe, paths: pipe.unfuse_lora(components=pipe._lora_loadable_modules),
    "unload": lambda pipe, paths: pipe.unload_lora_weights(),
    "move": lambda pipe, paths: pipe.set_lora_device(["a", "zz"], "cpu"),
    "model: set a": lambda pipe, paths: denoiser(pipe).set_adapter("a"),
    "model: set unknown": lambda pipe, paths: denoiser(pipe).set_adapter("zz"),
    "model: set b": lambda pipe, paths: denoiser(pipe).set_adapters("b", 0.6),
    "model: disable": lambda pipe, paths: denoiser(pipe).disable_adapters(),
    "model: enable": lambda pipe, paths: denoiser(pipe).enable_adapters(),
    "model: active": lambda pipe, paths: denoiser(pipe).active_adapters(),
    "model: add x": lambda pipe, paths: denoiser(pipe).add_adapter("x"),
    "model: load a": lambda pipe, paths: denoiser(pipe).load_lora_adapter(
        str(paths["a"]), prefix=pipe._lora_loadable_modules[0], adapter_name="a"
    ),
    "model: delete a": lambda pipe, paths: denoiser(pipe).delete_adapters("a"),
    "model: fuse": lambda pipe, paths: denoiser(pipe).fuse_lora(),
    "model: unfuse": lambda pipe, paths: denoiser(pipe).unfuse_lora(),
    "model: unload": lambda pipe, paths: denoiser(pipe).unload_lora(),
    "draw at half scale": lambda pipe, paths: scaled(pipe, 0.5),
    "save nothing": lambda pipe, paths: pipe.save_lora_weights("nowhere"),
}
KINDS = (ValueError, TypeError, OSError, RuntimeError, KeyError, AttributeError)


def outcome(pipe, step, paths):
    """What a step gives: a value, or what kind of error."""
    try:
        return STEPS[step](pipe, paths)
    except Exception as error:
        return tuple(kind.__name__ for kind in KINDS if isinstance(error, kind))


def told(pipe):
    return pipe.get_list_adapters(), pipe.get_active_adapters(), pipe.fused_loras, pipe.num_fused_loras


def agree(one, other, where):
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(other, one, rtol=2e-4, atol=2e-4, msg=lambda text: f"{where}: {text}")
    elif isinstance(one, tuple) and one and isinstance(one[0], str):  # an error may be of more kinds than diffusers'
        assert {*one} & {*other} or not one, f"{where}: {one} and {other}"
    else:
        assert one == other, where


def compared(kind, script, files):
    """Run a script on a pipeline of diffusers with peft and on one that was taken over, and compare them after each step."""
    native, ours = made(kind), diffpeft.take_over(made(kind))
    for number, step in enumerate(script):
        where = f"{kind}: {', '.join(script[: number + 1])}"
        agree(outcome(native, step, files[kind]), outcome(ours, step, files[kind]), where)
        if step != "model: fuse":  # of which diffusers' pipelines know nothing
            agree(told(native), told(ours), where)
        agree(draw(native), draw(ours), where)


SCRIPTS = (
    ("load a", "load b", "set ab", "disable", "enable", "delete a", "draw at half scale", "delete ab"),
    ("load a", "load b", "load a", "set unknown", "set too few weights", "set ba", "set a", "unload", "load a"),
    ("load a", "fuse", "unfuse", "unfuse", "fuse", "unload", "load b"),
    ("load c", "load a", "set a by component", "model: set unknown", "model: set a", "model: disable", "model: enable"),
    ("load of tensors", "load of nothing", "load of no file", "fuse nothing", "fuse the vae", "move", "save nothing"),
    ("load a", "load b", "model: set b", "model: active", "model: delete a", "model: fuse", "model: unfuse", "unload"),
    ("model: active", "model: disable", "unfuse", "fuse", "set a", "model: load a", "model: load a", "model: unload"),
    ("load a", "model: add x", "delete ab", "disable", "enable", "unload", "model: set a"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("script", SCRIPTS, ids="+".join)
def test_a_script_gives_what_it_gives_with_peft(kind, script, files):
    compared(kind, script, files)


@pytest.mark.slow
def test_a_short_script_gives_what_it_gives_with_peft(files):
    compared("sd", ("load a", "load b", "set ab", "fuse", "unload"), files)


LOOSE = (
    "load a",
    "load b",
    "load c",
    "set a",
    "set ab",
    "set ba",
    "delete a",
    "model: set b",
    "move",
    "fuse",
    "unload",
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", MAKERS)
def test_a_walk_gives_what_it_gives_with_peft(kind, seed, files):
    """Of what peft does rightly: it forgets a scale of fusing, and what is loaded on top of fused adapters has no effect."""
    g, script = random.Random(seed), ["load a"]
    while len(script) < 10:
        fused = script[-1] == "fuse"
        script.append(g.choice(("unfuse", "unload") if fused else LOOSE))
    compared(kind, script, files)


# -- in and out ---------------------------------------------------------------------------------------------------------


def state(pipe):
    """All that tells a pipeline from one that nothing was done to."""
    models = {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    modules = {f"{n}.{k}": type(m) for n, model in models.items() for k, m in model.named_modules()}
    tensors = {f"{n}.{k}": t.clone() for n, model in models.items() for k, t in model.state_dict().items()}
    attributes = {name: {*vars(model)} for name, model in models.items()}
    return type(pipe), {*vars(pipe)} - {"_merged_adapters"}, modules, attributes, tensors


def test_release_leaves_no_trace(files):
    pipe = made("sd")
    before = state(pipe)
    diffpeft.take_over(pipe)
    pipe.load_lora_weights(str(files["sd"]["a"]), adapter_name="a")
    pipe.fuse_lora(lora_scale=0.3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert diffpeft.release(pipe) is pipe
    *plain, tensors = state(pipe)
    assert plain == list(before[:-1])
    assert tensors.keys() == before[-1].keys() and all(torch.equal(t, before[-1][k]) for k, t in tensors.items())


def test_adapters_outlive_both_ways(files):
    """What diffpeft has loaded is there after `take_over`, and what was loaded by diffusers' names after `release`."""
    pipe = made("sd")
    diffpeft.load_lora(pipe, files["sd"]["a"], name="a", weight=0.5)
    picture = draw(pipe)
    diffpeft.take_over(pipe)
    assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]} and pipe.unet.peft_config["a"].r == 2
    torch.testing.assert_close(draw(pipe), picture)
    pipe.set_adapters("a", 0.8)
    picture = draw(pipe)
    diffpeft.release(pipe)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert diffpeft.get_adapters(pipe)["a"].strength == pytest.approx(0.8)
    torch.testing.assert_close(draw(pipe), picture)
    diffpeft.unload(pipe)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe))}


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_taken_over_too(how, files):
    pipe = diffpeft.take_over(made("sd"))
    pipe.load_lora_weights(str(files["sd"]["a"]), adapter_name="a")
    other = COPIES[how](pipe)
    torch.testing.assert_close(draw(other), draw(pipe))
    other.set_adapters("a", 0.0)
    assert not torch.equal(draw(other), draw(pipe))
    assert type(other) is type(pipe) and type(other.unet) is type(pipe.unet)


@pytest.mark.slow
def test_a_pipeline_of_the_same_models_is_made(files, tmp_path):
    pipe = diffpeft.take_over(made("sd"))
    pipe.load_lora_weights(str(files["sd"]["a"]), adapter_name="a")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert diffpeft.take_over(other).get_active_adapters() == ["a"]
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is diffusers.StableDiffusionPipeline
    pipe.unload_lora_weights()
    assert {*again.unet.state_dict()} == {*pipe.unet.state_dict()}


def test_from_pipe_takes_a_model_with_adapters(files):
    pipe = made("sd")
    diffpeft.load_lora(pipe, files["sd"]["a"], name="a")
    assert diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet


def test_what_cannot_be_taken_over_says_so(files):
    with pytest.raises(ConfigError, match="none of diffusers' LoRA methods"):
        diffpeft.take_over(diffusers.DDPMPipeline(diffusers.UNet2DModel(**SMALL), diffusers.DDPMScheduler()))
    pipe = made("sd")
    pipe.load_lora_weights(str(files["sd"]["a"]), adapter_name="a")
    before = state(pipe)[:3]
    with pytest.raises(AdapterStateError, match=r"peft.*unload_lora_weights"):
        diffpeft.take_over(pipe)
    assert state(pipe)[:3] == before


SMALL = {
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "sample_size": 8,
}


# -- beyond diffusers ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_formats_that_diffusers_does_not_read(files, tmp_path):
    plain = made("sd")
    diffpeft.attach(plain, diffpeft.LoHaConfig(r=2, init_weights=False), targets="attn", name="h")
    diffpeft.save_lora(plain, tmp_path / "h.safetensors", name="h")
    pipe = diffpeft.take_over(made("sd"))
    pipe.load_lora_weights(str(tmp_path / "h.safetensors"))
    assert pipe.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}
    torch.testing.assert_close(draw(pipe), draw(plain))


def test_a_model_that_is_put_in_is_taken_over(files):
    pipe = diffpeft.take_over(made("sd"))
    pipe.unet = made("sd").unet
    pipe.load_lora_weights(str(files["sd"]["a"]), adapter_name="a")
    assert pipe.unet.active_adapters() == ["a"]


@pytest.mark.slow
def test_swapping_in_place(files):
    plain, pipe = made("sd"), diffpeft.take_over(made("sd"))
    diffpeft.load_lora(plain, files["sd"]["b"], name="b")
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(str(files["sd"]["a"]), adapter_name="x")
    pipe.load_lora_weights(str(files["sd"]["b"]), adapter_name="x", hotswap=True)
    torch.testing.assert_close(draw(pipe), draw(plain))
    with pytest.raises(ValueError, match="no existing adapter"):
        pipe.load_lora_weights(str(files["sd"]["b"]), adapter_name="y", hotswap=True)
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        pipe.enable_lora_hotswap(target_rank=4)


@pytest.mark.slow
def test_a_model_writes_its_adapter(files, tmp_path):
    pipe = diffpeft.take_over(made("sd"))
    pipe.unet.add_adapter(diffpeft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False), "x")
    assert any(p.requires_grad for p in pipe.unet.parameters())
    pipe.unet.save_lora_adapter(tmp_path, adapter_name="x")
    other = made("sd")
    name = "pytorch_lora_weights.safetensors"
    other.unet.load_lora_adapter(str(tmp_path), weight_name=name, prefix=None, adapter_name="x")  # with peft
    torch.testing.assert_close(draw(other), draw(pipe), rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="not found"):
        pipe.unet.save_lora_adapter(tmp_path, adapter_name="y")


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import torch, diffpeft, warnings
from tests.pipeline.test_takeover import made, draw, factors
pipe = made("sd")
base = draw(pipe)
diffpeft.take_over(pipe)
pipe.load_lora_weights(factors(pipe, 1, 2), adapter_name="a")
on = draw(pipe)
pipe.fuse_lora(); assert pipe.fused_loras == {"a"}; pipe.unfuse_lora()
pipe.set_adapters("a", 0.5); pipe.disable_lora(); assert torch.equal(draw(pipe), base); pipe.enable_lora()
pipe.unet.add_adapter(diffpeft.LoraConfig(r=2, target_modules=["to_q"]), "x"); pipe.delete_adapters("x")
pipe.set_adapters("a"); torch.testing.assert_close(draw(pipe), on)
pipe.unload_lora_weights(); diffpeft.release(pipe); assert torch.equal(draw(pipe), base) and not torch.equal(on, base)
"""


@pytest.mark.slow
def test_peft_need_not_be_there():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_PEFT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# -- without take_over: adapters of peft and of diffpeft on one pipeline ---------------------------------------------------


def natively(kind, files, names):
    """What diffusers draws with adapters, each fully on."""
    pipe = made(kind)
    for name in names:
        pipe.load_lora_weights(str(files[kind][name]), adapter_name=name)
    if names:
        pipe.set_adapters([*names])
    return draw(pipe)


@pytest.fixture(scope="module")
def pictures(files):
    return Lazily(lambda names: natively("sd", files, names))


OURS, THEIRS = "a", "b"  # diffpeft's adapter, and peft's
ACTS = {  # what is done, whose picture it changes, and whether the adapter is on after it
    "ours off": lambda pipe: diffpeft.set_adapters(pipe, {}),
    "ours on": lambda pipe: diffpeft.set_adapters(pipe, {OURS: 1.0}),
    "ours fused": lambda pipe: diffpeft.fuse(pipe),
    "ours unfused": lambda pipe: diffpeft.unfuse(pipe),
    "theirs off": lambda pipe: pipe.disable_lora(),
    "theirs on": lambda pipe: pipe.enable_lora(),
    "theirs fused": lambda pipe: pipe.fuse_lora(),
    "theirs unfused": lambda pipe: pipe.unfuse_lora(),
    "ours unloaded": lambda pipe: diffpeft.unload(pipe),
    "theirs unloaded": lambda pipe: pipe.unload_lora_weights(),
}
ORDERS = {"theirs over ours": (OURS, THEIRS), "ours into theirs": (THEIRS, OURS)}


def both(order, files):
    pipe = made("sd")
    for name in ORDERS[order]:
        if name == OURS:
            diffpeft.load_lora(pipe, files["sd"][name], name=name)
        else:
            pipe.load_lora_weights(str(files["sd"][name]), adapter_name=name)
    return pipe


def expected(done, pictures):
    """The picture after what was done."""
    on = {OURS: True, THEIRS: True}
    for act in done:
        whose, what = act.split()
        if what in ("off", "unloaded", "on"):
            on[OURS if whose == "ours" else THEIRS] = what == "on"
    return pictures["".join(name for name in (OURS, THEIRS) if on[name])]


PAIRS = [
    (first, second)
    for first in ACTS
    for second in ACTS
    if first != second
    and first.split()[1] != "unloaded"
    and second.split()[1] not in ("on", "unfused")
    and (first, second) != ("ours off", "ours fused")  # of which there is none to fuse
]


def check_pair(order, pair, files, pictures):
    pipe, done = both(order, files), []
    for act in (*pair, "theirs unfused", "ours unfused"):
        fused = {a.split()[0] for a in done if a.endswith(" fused")}
        if act in ("theirs unfused", "ours unfused") and act.split()[0] not in fused - {
            a.split()[0] for a in done if a.endswith("unloaded")
        }:
            continue
        if act == "ours off" and "ours fused" in done:
            continue  # what is fused is refused to be set
        if act == "theirs unloaded" and "theirs fused" in done:
            continue  # peft leaves it in the weights
        ACTS[act](pipe)
        done.append(act)
        torch.testing.assert_close(draw(pipe), expected(done, pictures), rtol=2e-4, atol=2e-4, msg=str((order, done)))
    diffpeft.unload(pipe)
    pipe.unload_lora_weights()
    assert type(pipe.unet) is diffusers.UNet2DConditionModel and "a" not in diffpeft.get_adapters(pipe)
    torch.testing.assert_close(draw(pipe), pictures[""], rtol=2e-4, atol=2e-4, msg=str((order, done)))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pair", PAIRS, ids=" then ".join)
def test_theirs_and_ours_on_one_pipeline(order, pair, files, pictures):
    check_pair(order, pair, files, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_theirs_and_ours_in_one_pair(order, files, pictures):
    check_pair(order, ("ours fused", "theirs fused"), files, pictures)


SILENT = ("disable_lora", "enable_lora", "fuse_lora", "unload_lora_weights")


def test_what_would_do_nothing_says_so(files):
    """diffusers' methods look for layers of peft's, and ours are none."""
    pipe = made("sd")
    diffpeft.load_lora(pipe, files["sd"]["a"], name="a")
    for method in SILENT:
        with pytest.raises(AdapterStateError, match=r"peft.*'a'.*take_over"):
            getattr(pipe, method)()
    diffpeft.unload(pipe)
    for method in SILENT:
        getattr(pipe, method)()


# -- the page --------------------------------------------------------------------------------------------------------------


def rows():
    """(what is typed with diffusers, what with diffpeft) of the page's table."""
    text = (Path(diffpeft.__file__).parent.parent / "docs" / "diffusers.md").read_text()
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)


def run(line, pipe, config, state_dict):
    names = {"pipe": pipe, "diffpeft": diffpeft, "LoraConfig": config, "get_peft_model_state_dict": state_dict}
    exec(line, names)


@pytest.mark.slow
def test_both_columns_of_the_page_draw_the_same(files, tmp_path, monkeypatch):
    import peft

    monkeypatch.chdir(tmp_path)
    for name, source in (("style", "a"), ("person", "b")):
        shutil.copy(files["sd"][source], f"{name}.safetensors")
    native, taken, ours = made("sd"), diffpeft.take_over(made("sd")), made("sd")
    assert len(rows()) > 12
    for theirs, here in rows():
        if theirs.startswith("pipe("):
            continue
        run(theirs, native, peft.LoraConfig, peft.get_peft_model_state_dict)
        run(theirs, taken, diffpeft.LoraConfig, diffpeft.get_peft_model_state_dict)
        run(here, ours, diffpeft.LoraConfig, None)
        agree(draw(native), draw(taken), theirs)
        agree(draw(native), draw(ours), here)
