"""One batch, another mix for each prompt."""

from __future__ import annotations

import copy
import functools

import diffusers
import pytest
import torch

from diffpeft import (
    AdapterStateError,
    ConfigError,
    LoraConfig,
    ShapeMismatchError,
    UnknownNameError,
    adapters,
    attach,
    detach,
    fuse,
    get_adapters,
    schedule,
    set_adapters,
    unfuse,
    unload,
)
from diffpeft.model.attach import mix_of
from diffpeft.model.root import ROOT
from tests.contracts.kinds import FORMS, METHOD_FORMS, blocks, fits, give, layer
from tests.pairwise import params
from tests.pipeline.denoisers import model

EXACT = dict(rtol=0, atol=1e-10)  # float64, 16 digits; sums of up to 64 products in another order
MIXES = [{"a": 0.8, "b": -0.5}, {}, {"b": 1.3, "a": 0.4}]
SHAPES = {
    "linear": (6, 3, 6),
    "linear without bias": (6, 6),
    "gpt-2's Conv1D": (6, 3, 6),
    "conv1d circular": (6, 4, 7),
    "conv2d 1x1": (6, 4, 5, 5),
    "conv2d strided": (6, 4, 6, 7),
    "conv2d grouped": (6, 4, 5, 5),
    "transposed conv2d": (6, 4, 5, 5),
    "conv3d": (6, 2, 3, 4, 4),
    "embedding": (6, 5),
}


def adapted(form, kind, randomize):
    model, x = layer(kind)
    x = torch.randint(1, 10, SHAPES[kind]) if kind == "embedding" else torch.randn(SHAPES[kind], dtype=torch.float64)
    for name in ("a", "b"):
        give(model, form, name)
        randomize(model, name)
    return model, x


def alone(model, x, mixes, images=1):
    """What each row has with its mix alone."""
    out = []
    for i in range(len(x)):
        mix = mixes[i // images % len(mixes)]
        set_adapters(model, {n: s if isinstance(s, (float, dict)) else s.at(0.5) for n, s in mix.items()})
        out.append(model(x[i : i + 1]))
    return torch.cat(out)


CELLS = [(form, kind) for form in FORMS for kind in SHAPES if fits(form, kind)]


# each method on each kind, and its other forms on a matrix and on a kernel
@pytest.mark.parametrize(
    ("form", "kind"),
    params(CELLS, [c for c in CELLS if c[0] in METHOD_FORMS.values() or c[1] in ("linear", "conv2d strided")]),
)
def test_each_row_has_its_mix(form, kind, randomize):
    model, x = adapted(form, kind, randomize)
    for mixes, images in ((MIXES, 1), (MIXES, 2), (MIXES[:2], 3), (MIXES[2:], 1)):
        want = alone(model, x, mixes, images)
        set_adapters(model, mixes, images_per_prompt=images)
        torch.testing.assert_close(model(x), want, **EXACT)
        torch.testing.assert_close(model[0](x), want, **EXACT)  # by itself, too
        with adapters(model, {}):
            with adapters(model, mixes, images_per_prompt=images):
                torch.testing.assert_close(model(x), want, **EXACT)


@pytest.mark.parametrize("form", METHOD_FORMS.values())
def test_schedules_in_rows(form, randomize):
    model, x = adapted(form, "linear", randomize)
    line = schedule.linear(1.0, -1.0)
    mixes = [{"a": line, "b": 0.5}, {"a": schedule.constant(0.3)}, {"b": schedule.steps({0.0: 1.0, 0.5: 0.0})}]
    want = alone(model, x, mixes)
    set_adapters(model, mixes)
    with schedule.step(0.5):
        torch.testing.assert_close(model(x), want, **EXACT)
    with pytest.raises(AdapterStateError, match=r"schedule\.step"):
        model(x)


def test_gradients_reach_the_adapters_of_their_rows(randomize):
    model, x = adapted("lora", "linear", randomize)
    set_adapters(model, [{"a": 1.0}, {"b": 1.0}])
    y = model(x)
    grads = torch.autograd.grad(y[::2].sum(), list(model[0].adapters["a"].parameters()), retain_graph=True)
    set_adapters(model, {"a": 1.0})
    want = torch.autograd.grad(model(x[::2]).sum(), list(model[0].adapters["a"].parameters()))
    for got, g in zip(grads, want, strict=True):
        torch.testing.assert_close(got, g, **EXACT)
    set_adapters(model, [{"a": 1.0}, {"b": 1.0}])
    rest = torch.autograd.grad(model(x)[::2].sum(), list(model[0].adapters["b"].parameters()))
    assert all(not g.any() for g in rest)


@pytest.mark.parametrize("form", METHOD_FORMS.values())
def test_rows_of_strength_0_are_the_base_bit_for_bit(form, randomize):
    model, x = adapted(form, "linear", randomize)
    set_adapters(model, {})
    plain = model(x)
    set_adapters(model, [{"a": 0.0}, {}, {"b": 0.0}])
    assert torch.equal(model(x), plain)
    set_adapters(model, [{"a": 1.0}, {"b": 0.0}])
    # the base runs on these rows, alone or with others: float64, sums of 6 products
    torch.testing.assert_close(model(x)[1::2], plain[1::2], rtol=0, atol=1e-14)


@pytest.mark.parametrize("b", [1, 2, 3, 5, 8])
def test_another_batch_size_is_refused_with_the_sizes(b, randomize):
    model, _ = adapted("lora", "linear", randomize)
    set_adapters(model, MIXES, images_per_prompt=2)
    for call, x in ((model, torch.randn(b, 3, 6)), (model[0], torch.randn(b, 6))):
        if b == 1 and call is model[0]:  # what all rows share
            continue
        with pytest.raises(ShapeMismatchError, match=rf"{b}.*3 mixes"):
            call(x.double())
    with pytest.raises(ShapeMismatchError, match="3 mixes"):
        model[0](torch.randn(6).double())


@pytest.mark.parametrize(
    "mix, images, error, said",
    [
        ([], 1, ConfigError, "empty"),
        ([{"a": 1.0}, {"c": 1.0}], 1, UnknownNameError, "Known: a, b"),
        ([{"a": 1.0}, "a"], 1, ConfigError, "dict"),
        ([{"a": 1.0}], 0, ConfigError, "images_per_prompt"),
        ([{"a": 1.0}], True, ConfigError, "images_per_prompt"),
        ([{"a": 1.0}, {"a": {"nowhere": 1.0}}], 1, UnknownNameError, "nowhere"),
        ([{"a": 1.0}, {"a": float("nan")}], 1, ConfigError, "nan"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(mix, images, error, said, randomize):
    model, x = adapted("lora", "linear", randomize)
    want = model(x)
    for use in (set_adapters, lambda *args: adapters(*args).__enter__()):
        with pytest.raises(error, match=said):
            use(model, mix, images)
        assert torch.equal(model(x), want) and ROOT not in model.__dict__


def test_status_fuse_and_the_way_back(randomize, trace):
    model, x = adapted("lora", "linear", randomize)
    set_adapters(model, {"a": 0.8})
    normal, want = trace(model), model(x)
    set_adapters(model, MIXES)
    assert [s.strength for s in get_adapters(model).values()] == [(0.8, 0.0, 0.4), (-0.5, 0.0, 1.3)]
    assert all(s.active for s in get_adapters(model).values()) and "0.8 | 0 | 0.4" in repr(model)
    with pytest.raises(AdapterStateError, match="one mix first"):
        fuse(model)
    detach(model, "b")
    torch.testing.assert_close(model(x)[1::3], alone(model, x, [{}])[1::3], **EXACT)
    set_adapters(model, MIXES[1:2])
    give(model, "lora", "b")
    set_adapters(model, {"a": 0.8})
    detach(model, "b")
    give(model, "lora", "b")
    set_adapters(model, {"a": 0.8})
    assert [t[:2] for t in trace(model)] == [t[:2] for t in normal] and torch.equal(model(x), want)
    set_adapters(model, MIXES)
    unload(model)
    assert ROOT not in model.__dict__ and type(model) is torch.nn.Sequential


def test_a_later_adapter_is_in_every_row(randomize):
    model, x = adapted("lora", "linear", randomize)
    set_adapters(model, [{"a": 0.5}, {"b": 0.5}])
    give(model, "lora", "c")
    randomize(model, "c")
    got = model(x)
    torch.testing.assert_close(got, alone(model, x, [{"a": 0.5, "c": 1.0}, {"b": 0.5, "c": 1.0}]), **EXACT)


def test_rows_on_top_of_what_is_fused(randomize):
    model, x = adapted("lora", "linear", randomize)
    set_adapters(model, {"a": 0.5})
    fuse(model)
    mixes = [{"a": 0.5}, {"a": 0.5, "b": 1.0}]
    set_adapters(model, mixes)
    got = model(x)
    with pytest.raises(AdapterStateError, match="fused"):
        set_adapters(model, [{"a": 0.5}, {"b": 1.0}])
    unfuse(model)
    torch.testing.assert_close(got, alone(model, x, mixes), **EXACT)


# compiled code differs by the kind of path: low-rank, rotation, product
@pytest.mark.parametrize("form", params([(f,) for f in METHOD_FORMS.values()], [("lora",), ("oft",), ("loha",)]))
def test_compiled_rows(form, randomize):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, x = blocks(2, torch.float32), torch.randn(4, 8)
    for name in ("a", "b"):
        give(model, form, name, targets=["0.up", "1.down"])
        randomize(model, name, torch.float32)
    twin = copy.deepcopy(model)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    count = None
    with torch.no_grad():
        for s in (0.5, -0.7, 0.0):
            mixes = [{"a": s, "b": schedule.linear(1.0, 0.0)}, {"a": 1.0, "b": s}]
            for m in (model, twin):
                set_adapters(m, mixes)
            for f in (0.25, 0.75):
                with schedule.step(f):
                    # fp32 keeps 7 digits; rotations take another way in compiled code
                    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
                count = count or torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count > 0


class Frames(torch.nn.Module):
    """Frames as rows of their own, as video models have them, and positions that all rows share."""

    def __init__(self):
        super().__init__()
        self.mix, self.places = torch.nn.Linear(6, 6), torch.nn.Embedding(4, 6)

    def forward(self, x):
        return self.mix(x.flatten(0, 1)).unflatten(0, x.shape[:2]) + self.places(torch.arange(4)[None])[:, None]


@pytest.mark.parametrize("form", ["lora", "loha", "oft"])
def test_frames_belong_to_their_row_and_positions_to_all(form, randomize):
    model, x = Frames().double().requires_grad_(False), torch.randn(4, 3, 4, 6, dtype=torch.float64)
    for name in ("a", "b"):
        give(model, form, name, targets=["mix", "places"])
        randomize(model, name)
    want = alone(model, x, MIXES[::2])
    set_adapters(model, MIXES[::2])
    torch.testing.assert_close(model(x), want, **EXACT)


# ---- on a pipeline


@pytest.fixture
def adapted_pipe(pipe, randomize):
    for name in ("a", "b"):
        targets = ["conv_in", "attn1.to_q", "attn2.to_k", "time_embedding.linear_1", "q_proj", "position_embedding"]
        attach(pipe, LoraConfig(r=2), name, targets=targets)
        randomize(pipe, name)
    return pipe


def images(pipe, prompts, seeds, m=1, **kwargs):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    kwargs = {"num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": m, **kwargs}
    return pipe(prompts, generator=generators, **kwargs).images


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_an_image_is_the_one_that_its_mix_gives_alone(m, guidance, adapted_pipe):
    pipe, prompts = adapted_pipe, ["cat", "dog", "red house"]
    mixes = [
        {"a": 0.8},
        {"b": {"unet": schedule.linear(1.0, 0.0), "text_encoder": 0.3}, "a": 0.2},
        {"a": {"unet.mid_block": 0.0}},
    ]
    seeds = range(len(prompts) * m)
    wants = []
    for i, (prompt, mix) in enumerate(zip(prompts, mixes, strict=True)):
        set_adapters(pipe, mix)
        wants.append(images(pipe, prompt, seeds[i * m : (i + 1) * m], m, guidance_scale=guidance))
    set_adapters(pipe, mixes, images_per_prompt=m)
    got = images(pipe, prompts, seeds, m, guidance_scale=guidance)
    torch.testing.assert_close(got, torch.cat(wants), rtol=0, atol=1e-9)  # two steps of a net of 30 layers
    with pytest.raises(ShapeMismatchError, match="3 mixes"):
        images(pipe, prompts[:2], seeds[: 2 * m], m, guidance_scale=guidance)
    set_adapters(pipe, mixes[0])
    assert mix_of(pipe.unet).choice.rows == ()
    unload(pipe)
    assert ROOT not in vars(pipe.unet) and ROOT not in vars(pipe.text_encoder)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("encoder", [True, False])
def test_only_as_many_images_as_the_mixes_are_for_are_drawn(guidance, encoder, adapted_pipe):
    """2 mixes of the denoiser (and of the text encoder) and any number of prompts and images a prompt."""
    pipe = adapted_pipe
    mixes = [{"a": 0.8}, {"b": -0.5}]
    if not encoder:
        mixes = [{name: {"unet": s, "text_encoder": 0.0} for name, s in mix.items()} for mix in mixes]
    for images_per_prompt in (1, 2):
        set_adapters(pipe, mixes, images_per_prompt=images_per_prompt)
        for prompts in (1, 2, 3, 4):
            for m in (1, 2, 4):
                draw = functools.partial(
                    images, pipe, ["cat"] * prompts, range(prompts * m), m, guidance_scale=guidance
                )
                rows = prompts * m == len(mixes) * images_per_prompt
                if rows and (prompts == len(mixes)):
                    assert len(draw()) == prompts * m
                else:
                    with pytest.raises(ShapeMismatchError, match="2 mixes"):
                        draw()


def wan(**config):
    """A video pipeline that calls its denoiser twice for guidance, and takes prompts that are encoded already."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    made = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=model("wan"), scheduler=scheduler
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pipelines_that_call_twice_count_prompts_too(guidance, randomize):
    pipe = wan()
    for name in ("a", "b"):
        attach(pipe, LoraConfig(r=2), name, targets=["to_q", "ffn.net.2"])
        randomize(pipe, name)
    new = lambda n, seed: torch.randn(n, 5, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # noqa: E731

    def draw(prompts, m=1):
        embeds = torch.cat([new(1, i) for i in range(prompts)])
        kwargs = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)} | {
            "height": 16,
            "width": 16,
            "num_frames": 1,
            "num_inference_steps": 2,
            "output_type": "latent",
        }
        generators = [torch.Generator().manual_seed(i) for i in range(prompts * m)]
        return pipe(generator=generators, guidance_scale=guidance, num_videos_per_prompt=m, **kwargs).frames

    mixes, wants = [{"a": 0.8}, {"b": -0.5}], []
    for mix in mixes:
        set_adapters(pipe, mix)
        wants.append(draw(2)[len(wants)])
    set_adapters(pipe, mixes)
    torch.testing.assert_close(draw(2), torch.stack(wants), rtol=0, atol=1e-9)  # two steps of a net of two blocks
    for prompts, m in ((1, 1), (3, 1), (4, 1), (2, 2)):
        with pytest.raises(ShapeMismatchError, match=f"draws {prompts * m} images, and 2 mixes"):
            draw(prompts, m)
    with pytest.raises(ShapeMismatchError, match="draws 1 images"):
        draw(1)
