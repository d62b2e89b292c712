"""Every format into every other, by method and family: what a conversion may cost, that no update changes, that the way back gives the same bytes.

The files and the updates are factory.py's. LEVELS says what each cell must be: a cell that gets worse fails, and so does one that gets better.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffpeft import CannotConvertError, converters
from diffpeft.converters import TABLES
from tests.converters import factory, test_families
from tests.converters.factory import FORMATS, METHODS, NORMS, ORIGINAL, SINGLE, SITES, checkpoint, sites
from tests.pairwise import pairwise, params

NO = "refused"
# {method: the level into a format with the same layers, over a border that takes fused layers apart or turns rows, into diffusers, into peft}
LEVELS = {
    "lora": ("L0", "L0", "L0", "L0"),
    "tucker": ("L0", "L0", "L1", "L1"),
    "dora": ("L0", "L0", "L0", "L0"),
    "dora-in": ("L0", NO, NO, NO),
    "loha": ("L0", "L0", "L1", "L0"),
    "loha-tucker": ("L0", "L0", "L1", "L0"),
    "lokr": ("L0", "L0", NO, "L0"),  # diffusers: its rank is the layer's
    "lokr-second": ("L0", "L0", "L1", "L0"),
    "lokr-first": ("L0", "L0", "L1", "L1"),  # peft: from no rank does it factor the first half alone
    "lokr-both": ("L0", "L0", "L1", "L0"),
    "lokr-tucker": ("L0", "L0", "L1", "L0"),
    "oft": ("L0", "L0", NO, NO),
    "oft-rescaled": ("L0", "L0", NO, NO),
    "boft": ("L0", NO, NO, NO),
    "ia3-in": ("L0", "L0", NO, "L1"),
    "ia3-out": ("L0", "L0", NO, NO),
    "glora": ("L0", "L0", NO, NO),
    "full": ("L0", "L0", NO, NO),
    "norm": ("L0", "L0", NO, NO),
}
HIDDEN = ("loha", "lokr-second", "lokr-both")  # methods that write a kernel as columns
WHERE = {  # families of renames alone; of fused layers and turned rows; with convolutions; with norms
    **dict.fromkeys(METHODS, ("sdxl", "wan", "flux")),
    "lora": tuple(SITES),
    "dora": ("sd15", "sdxl", "flux", "lumina2", "cogvideox", "mochi", "sd3"),
    "loha": ("sd15", "sdxl", "wan", "flux", "lumina2", "cogvideox"),
    "tucker": ("sd15", "sdxl"),
    "loha-tucker": ("sd15", "sdxl"),
    "lokr-tucker": ("sd15", "sdxl"),
    "norm": tuple(NORMS),
}
SOURCES = {  # which formats other programs write a method in
    **dict.fromkeys(METHODS, ("kohya", "comfyui", "kohya-diffusers", "lycoris")),
    "lora": FORMATS,
    "dora": FORMATS,
    **dict.fromkeys(
        ("loha", "loha-tucker", "lokr", "lokr-second", "lokr-both", "lokr-tucker"),
        ("kohya", "comfyui", "kohya-diffusers", "lycoris", "peft"),
    ),
    **dict.fromkeys(("ia3-in", "ia3-out"), ("kohya", "kohya-diffusers", "lycoris")),
}


def fused(family: str) -> bool:
    return not all(site.rule.renames for site in sites(family))


def crosses(source: str, target: str, family: str) -> bool:
    """Whether one format has fused or turned layers that the other has not."""
    return (source in ORIGINAL) != (target in ORIGINAL) and fused(family)


def hidden(method: str, family: str) -> bool:
    """Whether the file does not show what the kernels of convolutions are."""
    return family.startswith("sd") and method in HIDDEN


def expected(method: str, source: str, target: str, family: str) -> str:
    same, over, diffusers, peft = LEVELS[method]
    if method.startswith("ia3") and target == "comfyui":
        return NO  # it reads none
    if target == "diffusers" and hidden(method, family):
        return NO
    if target == "peft" and method.startswith("lokr") and fused(family):
        return NO if method == "lokr" else "L1"  # the halves of the parts are not those that PEFT would make
    if source == "peft" and method.startswith("lokr") and crosses(source, target, family):
        return NO if method == "lokr" else "L1"  # parts with halves of their own
    if target in ("diffusers", "peft"):
        return diffusers if target == "diffusers" else peft
    return over if crosses(source, target, family) else same


def plain(site: factory.Site, method: str) -> bool:
    """Patch embeddings have a test of their own where PEFT has no such layer and the kernel is hidden."""
    return method in ("lora", "dora") or site.original != "patch_embedding"


def exists(format: str, family: str) -> bool:
    """SD1.x in diffusers' flat names is kohya."""
    return format != "kohya-diffusers" or family not in ("sd15", "sd2")


CELLS = [
    (method, family, source, target)
    for method in METHODS
    for family in WHERE[method]
    for source in SOURCES[method]
    for target in FORMATS
    if source != target and exists(source, family) and exists(target, family)
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NOISE = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of factors rounded anew: 2 to 3 roundings


def output(folder: Path, format: str, name: str) -> Path:
    return folder / (name if format == "peft" else f"{name}.safetensors")


def weights(path: Path) -> Path:
    return path / "adapter_model.safetensors" if path.is_dir() else path


def metadata(path: Path) -> dict[str, str] | None:
    with safe_open(weights(path), "pt") as file:
        return file.metadata()


def assert_deltas(path: Path, family: str, want: dict, base: dict, tolerance: float = 1e-6) -> None:
    """To a relative `tolerance` of each layer's largest number; fp32 alphas and scales are right to 1e-7."""
    got = converters.read(path, family=family).deltas(base)
    assert got.keys() == want.keys()
    for layer, delta in want.items():
        error = (got[layer].reshape(delta.shape) - delta).abs().max()
        assert error <= tolerance * delta.abs().max(), (layer, float(error), float(delta.abs().max()))


def assert_same_file(a: Path, b: Path) -> None:
    """Byte for byte; of a folder also the config, field for field."""
    assert weights(a).read_bytes() == weights(b).read_bytes(), difference(a, b)
    if a.is_dir():
        configs = [json.loads((path / "adapter_config.json").read_text()) for path in (a, b)]
        assert configs[0] == configs[1]


def assert_same_tensors(a: Path, b: Path) -> None:
    """The tensors, and the metadata but for what is diffpeft's."""
    one, two = ({key: raw(t) for key, t in load_file(weights(path)).items()} for path in (a, b))
    assert one == two, difference(a, b)
    told = [{k: v for k, v in (metadata(path) or {}).items() if not k.startswith("diffpeft.")} for path in (a, b)]
    assert told[0] == told[1]


def raw(t: torch.Tensor) -> tuple:
    return t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_kernels(path: Path, made: factory.Checkpoint) -> None:
    """A LoRA of a convolution has its kernel, which a flat one would hide from the model that is to load it."""
    A = {k.split(".lora_A")[0]: t for k, t in load_file(weights(path)).items() if k.endswith(".lora_A.weight")}
    for layer, W in made.base.items():
        for name in (layer, f"base_model.model.{layer.partition('.')[2]}"):
            assert name not in A or max(W.shape[2:], default=1) == 1 or A[name].shape[1:] == W.shape[1:], name


def difference(a: Path, b: Path) -> str:
    """For people."""
    one, two = load_file(weights(a)), load_file(weights(b))
    said = [f"lost {sorted({*one} - {*two})[:4]}", f"new {sorted({*two} - {*one})[:4]}"]
    said += [
        f"{k}: {one[k].dtype} {tuple(one[k].shape)} -> {two[k].dtype} {tuple(two[k].shape)}"
        for k in one
        if k in two and (one[k].dtype, one[k].shape) != (two[k].dtype, two[k].shape)
    ][:4]
    said += [k for k in one if k in two and one[k].shape == two[k].shape and not torch.equal(one[k], two[k])][:4]
    return "; ".join([*said, f"{metadata(a)} -> {metadata(b)}"])


def named_in(error: CannotConvertError, made: factory.Checkpoint) -> bool:
    return any(
        layer in str(error) for layer in (*made.layers, *made.deltas, *(d.partition(".")[2] for d in made.deltas))
    )


def chosen() -> list[tuple]:
    """Cells that show each pair first; whether fused layers are taken apart decides together with the method and either format."""
    rows = [(*cell, crosses(cell[2], cell[3], cell[1])) for cell in CELLS]
    return [row[:-1] for row in pairwise(rows, together=[(0, 2, 4), (0, 3, 4)])]


@pytest.mark.parametrize("method, family, source, target", params(CELLS, chosen()))
def test_a_cell(method, family, source, target, tmp_path):
    one = source in SINGLE or target in SINGLE
    at = CELLS_AT[method, family, source, target]
    dtype = DTYPES[at % 3]
    made = checkpoint(source, family, method, seed=at, dtype=dtype, text=not one, layers=lambda s: plain(s, method))
    a, b = made.save(tmp_path), output(tmp_path, target, "b")
    want = expected(method, source, target, family)
    if want == NO:
        with pytest.raises(CannotConvertError) as error:
            converters.convert(a, b, to=target, family=family)
        assert named_in(error.value, made) and not b.exists()
        assert {p.name for p in tmp_path.iterdir()} == {a.name}
        return
    report = converters.convert(a, b, to=target, family=family)
    assert (report.format, report.level) == (source, want)
    assert sorted((*report.mapped, *report.carried)) == sorted(made.tensors) and report.carried == ("_aux.3f2a",)
    assert converters.fitting(b).format == target
    assert TABLES[family].yields or converters.detect(b).format == target  # others may need their size to be told
    assert_deltas(b, family, made.deltas, made.base, NOISE[dtype] if want == "L1" else 1e-6)
    if target in ("diffusers", "peft"):
        assert_kernels(b, made)
    if want == "L0":
        c = output(tmp_path, source, "c")
        assert converters.convert(b, c, to=source, family=family).level == "L0"
        assert_same_file(a, c)


CELLS_AT = {cell: n for n, cell in enumerate(CELLS)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_file_in_its_own_format_again(family, format, tmp_path):
    made = checkpoint(format, family, text=format not in SINGLE)
    a, b = made.save(tmp_path), output(tmp_path, format, "b")
    assert converters.convert(a, b, to=format, family=family).level == "L0"
    assert_same_tensors(a, b)
    assert_deltas(b, family, made.deltas, made.base)


PATHS = ("kohya-diffusers", "kohya-peft", "comfyui-lycoris", "lycoris-kohya", "diffusers-kohya")
ALPHAS = [*itertools.product(("sdxl", "flux"), PATHS, factory.ALPHAS, DTYPES)]


@pytest.mark.parametrize("family, path, alpha, dtype", params(ALPHAS, pairwise(ALPHAS, together=[(1, 2)])))
def test_every_alpha_in_every_dtype(family, path, alpha, dtype, tmp_path):
    source, target = path.split("-")
    text = not {source, target} & {*SINGLE}
    made = checkpoint(source, family, alpha=alpha, dtype=dtype, text=text, carried=False)
    a, b, c = made.save(tmp_path), output(tmp_path, target, "b"), output(tmp_path, source, "c")
    assert converters.convert(a, b, to=target, family=family).level == "L0"
    assert_deltas(b, family, made.deltas, made.base)
    converters.convert(b, c, to=source, family=family)
    assert_same_file(a, c)


@pytest.mark.parametrize(
    "route",
    [
        "kohya diffusers comfyui kohya",
        "kohya peft kohya",
        "comfyui lycoris peft diffusers comfyui",
        "diffusers kohya comfyui diffusers",
        "peft kohya kohya-diffusers peft",
        "lycoris comfyui kohya lycoris",
    ],
)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", ["sdxl", "flux", "lumina2", "cogvideox", "wan"])
def test_a_chain_ends_in_the_bytes_that_it_began_with(family, method, route, tmp_path):
    formats = route.split()
    made = checkpoint(formats[0], family, method, text=not {*SINGLE} & {*formats})
    path = first = made.save(tmp_path)
    for n, target in enumerate(formats[1:]):
        path, before = output(tmp_path, target, f"to{n}"), path
        assert converters.convert(before, path, to=target, family=family).level == "L0"
        assert_deltas(path, family, made.deltas, made.base)
    assert_same_file(first, path)


# Parts with factors of their own, in fused layers


def qkv(ranks, alphas, names="qkv", shared=False):
    """diffusers' q, k and v of one Flux block, with the deltas."""
    tensors, deltas, config = {}, {}, {"rank_pattern": {}, "alpha_pattern": {}, "r": 1, "lora_alpha": 1}
    same = torch.randn(ranks[0], 12)
    for r, alpha, letter in zip(ranks, alphas, names, strict=True):
        layer = f"transformer_blocks.0.attn.to_{letter}"
        A, B = same.clone() if shared else torch.randn(r, 12), torch.randn(12, r)
        tensors |= {f"transformer.{layer}.lora_A.weight": A, f"transformer.{layer}.lora_B.weight": B}
        deltas[f"transformer.{layer}"] = alpha / r * B.double() @ A.double()
        config["rank_pattern"][layer], config["alpha_pattern"][layer] = r, alpha
    told = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return tensors, deltas, {"format": "pt", "lora_adapter_metadata": told}


@pytest.mark.parametrize("target", ORIGINAL)
@pytest.mark.parametrize(
    "ranks, alphas, names, level",
    [
        ((4, 4, 4), (4, 4, 4), "qkv", "L0"),
        ((4, 4, 4), (2, 2, 2), "qkv", "L0"),
        ((4, 4), (4, 4), "qv", "L0"),
        ((4, 4), (2, 2), "kv", "L0"),
        ((3,), (1,), "k", "L0"),
        ((1, 4, 7), (1, 4, 7), "qkv", "L0"),
        ((2, 4, 6), (1, 2, 3), "qkv", "L0"),  # unequal ranks and alphas, one scale
        ((4, 4, 4), (8, 4, 1), "qkv", "L0"),  # scales 2, 1 and 1/4: powers of two go into a factor without rounding
        ((4, 2), (4, 4), "qv", "L0"),
        ((4, 4, 4), (4, 3, 4), "qkv", "L1"),
        ((1, 4, 7), (1, 1, 1), "qkv", "L1"),
    ],
)
def test_q_k_and_v_with_factors_of_their_own(ranks, alphas, names, level, target, tmp_path):
    tensors, deltas, told = qkv(ranks, alphas, names)
    a, b, c = (tmp_path / f"{n}.safetensors" for n in "abc")
    save_file(tensors, a, told)
    assert converters.convert(a, b, to=target, family="flux").level == level
    assert_deltas(b, "flux", missing_as_zero(deltas), {})
    converters.convert(b, c, to="diffusers", family="flux")
    assert_deltas(c, "flux", deltas, {})
    if level == "L0":
        assert_same_file(a, c)


def missing_as_zero(deltas):
    layers = [f"transformer.transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    return {layer: deltas.get(layer, torch.zeros(12, 12, dtype=torch.float64)) for layer in layers}


def test_q_k_and_v_that_share_a_factor_keep_their_rank(tmp_path):
    tensors, _, told = qkv((4, 4, 4), (2, 2, 2), shared=True)
    save_file(tensors, tmp_path / "a.safetensors", told)
    converters.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya", family="flux")
    found = load_file(tmp_path / "b.safetensors")
    assert found["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (4, 12)
    assert found["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 2


@pytest.mark.parametrize(
    "method, level", [("loha", "L1"), ("lokr-both", "L1"), ("ia3-in", NO), ("glora", NO), ("full", "L0"), ("oft", "L0")]
)
def test_parts_without_a_common_factor(method, level, tmp_path):
    """A LoHa's parts become LoRAs, whose blocks can stand in one layer; what has no such blocks is refused."""
    made = checkpoint(
        "lycoris", "flux", method, apart=True, text=False, alpha="one", layers=lambda s: "qkv" in s.original
    )
    a, b = made.save(tmp_path), tmp_path / "b.safetensors"
    if level == NO:
        with pytest.raises(CannotConvertError) as error:
            converters.convert(a, b, to="kohya", family="flux")
        assert named_in(error.value, made) and not b.exists()
    else:
        assert converters.convert(a, b, to="kohya", family="flux").level == level
        assert_deltas(b, "flux", made.deltas, made.base)


@pytest.mark.parametrize("method", HIDDEN)
@pytest.mark.parametrize(
    "family, layer", [("wan", "patch_embedding"), ("sd3", "x_embedder.proj"), ("sdxl", "output_blocks.2.2.conv")]
)
def test_a_kernel_that_the_file_does_not_show_is_not_lost(family, layer, method, tmp_path):
    """diffusers needs A [r, in, *kernel]: a flat one, however right its numbers, no convolution takes."""
    made = checkpoint("kohya", family, method, text=False, layers=lambda s: s.original == layer)
    with pytest.raises(CannotConvertError) as error:
        converters.convert(made.save(tmp_path), tmp_path / "b.safetensors", to="diffusers", family=family)
    assert named_in(error.value, made)


@pytest.mark.parametrize("method", ["dora-in", "glora", "ia3-in", "full", "lokr", "oft"])
def test_turned_rows_alone_take_no_layer_apart(method, tmp_path):
    """A magnitude for each input does not depend on the order of the outputs."""
    made = checkpoint("kohya", "flux", method, text=False, layers=lambda s: s.original.startswith("final_layer"))
    a, b, c = (tmp_path / f"{n}.safetensors" for n in "abc")
    made.save(tmp_path)
    assert converters.convert(a, b, to="lycoris", family="flux").level == "L0"
    assert_deltas(b, "flux", made.deltas, made.base)
    converters.convert(b, c, to="kohya", family="flux")
    assert_same_file(a, c)


def test_the_change_of_a_bias_has_the_rows_of_its_layer(tmp_path):
    made = checkpoint("kohya", "flux", "full", text=False)
    a, b = made.save(tmp_path), tmp_path / "b.safetensors"
    converters.convert(a, b, to="lycoris", family="flux")
    before, after = load_file(a), load_file(b)
    for site in sites("flux")[:5]:
        own = before[f"lora_unet_{site.original.replace('.', '_')}.diff_b"]
        for n, (name, _) in enumerate(site.rule.parts):
            rows = list(site.rule.rows(n, len(own)))
            assert torch.equal(after[f"lycoris_{name.replace('.', '_')}.diff_b"], own[rows])


@pytest.mark.parametrize("target", SINGLE)
def test_a_format_of_one_component_gets_a_file_for_each_if_it_is_given_a_folder(target, tmp_path):
    made = checkpoint("kohya", "flux")
    a, c = made.save(tmp_path), tmp_path / "c.safetensors"
    if target == "lycoris":
        with pytest.raises(CannotConvertError, match="text_encoder") as error:
            converters.convert(a, tmp_path / "b.safetensors", to=target, family="flux")
        assert named_in(error.value, made) and not (tmp_path / "b.safetensors").exists()
    report = converters.convert(a, tmp_path / "b", to=target, family="flux")
    assert report.level == "L0" and len(list((tmp_path / "b").iterdir())) > 1
    converters.convert(tmp_path / "b", c, to="kohya", family="flux")
    assert_same_file(a, c)


@pytest.mark.parametrize("source, target", [("kohya", "diffusers"), ("comfyui", "kohya"), ("diffusers", "kohya")])
def test_hashes_do_not_outlive_the_bytes_they_are_of(source, target, tmp_path):
    made = checkpoint(source, "flux")
    hashes = {"sshs_model_hash": "ab", "sshs_legacy_hash": "cd", "modelspec.hash_sha256": "0xef"}
    plain, made.metadata = made.metadata, {**made.metadata, **hashes}
    a, b, c = (tmp_path / f"{n}.safetensors" for n in "abc")
    made.save(tmp_path)
    converters.convert(a, b, to=target, family="flux")
    converters.convert(b, c, to=source, family="flux")
    assert not {*hashes} & {*metadata(b)} and metadata(c) == plain
    assert {k: raw(t) for k, t in load_file(c).items()} == {k: raw(t) for k, t in made.tensors.items()}


# Oracle: diffusers' converters of whole checkpoints


def as_diffusers(model: test_families.Model, checkpoint: dict) -> dict:
    found = test_families.Checkpoint({key: t.clone() for key, t in checkpoint.items()})
    if model.convert is not None:
        return model.convert(found)
    tried = [f"convert_{model.converter}{end}_to_diffusers" for end in ("", "_checkpoint")]
    return next(getattr(test_families.single_files, n) for n in tried if hasattr(test_families.single_files, n))(found)


@pytest.mark.parametrize("target", ["diffusers", "peft"])
@pytest.mark.parametrize("model", test_families.TRACED, ids=test_families.named)
def test_diffusers_own_converter_of_the_merged_checkpoint_agrees(model, target, tmp_path):
    """W and W + dW in the original's names, converted by diffusers, differ by the deltas on diffusers' side. All layers; columns are few."""
    generator = torch.Generator().manual_seed(0)
    tensors, before, after = {}, {}, {}
    for n, (original, (rule, parts)) in enumerate(test_families.originals(model).items()):
        rows = sum(part.weight.shape[0] for part in parts)
        own, *kernel = parts[0].weight.shape[1:]
        columns = own if rule.aspect else min(own, 2)
        r = 1 + n % 2
        down = torch.randn(r, columns, *kernel, generator=generator)
        up = torch.randn(rows, r, *(1,) * len(kernel), generator=generator)
        W = torch.randn(rows, columns, *kernel, generator=generator)
        tensors |= {f"diffusion_model.{original}.lora_A.weight": down, f"diffusion_model.{original}.lora_B.weight": up}
        tensors[f"diffusion_model.{original}.alpha"] = torch.tensor(0.5 * r)
        before[f"{original}.weight"] = W
        after[f"{original}.weight"] = W + 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(W.shape)
        if parts[0].bias is not None:
            before[f"{original}.bias"] = after[f"{original}.bias"] = torch.zeros(rows)
    save_file(tensors, tmp_path / "a.safetensors")
    b = output(tmp_path, target, "b")
    converters.convert(tmp_path / "a.safetensors", b, to=target, family=model.family)
    W0, W1 = as_diffusers(model, before), as_diffusers(model, after)
    deltas = converters.read(b, family=model.family).deltas()
    told = {name for name in test_families.layers(model) if not re.search(model.without, name)}
    assert {layer.partition(".")[2] for layer in deltas} == told
    for layer, delta in deltas.items():
        key = f"{layer.partition('.')[2]}.weight"
        want = W1[key].double() - W0[key].double()
        torch.testing.assert_close(delta.reshape(want.shape), want, rtol=0, atol=1e-5)  # sums in fp32
