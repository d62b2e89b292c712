"""Merging ten files of SDXL and extracting an adapter of SD1.5 at rank 16, against sd-scripts' algorithms, written here from their description.

sd-scripts builds each layer's sum (or difference) as a matrix in fp32, takes the whole SVD of it (with square matrices of singular vectors), multiplies the
singular values into U, and clamps both factors to the 0.99 quantile of their values. That takes half an hour, so its time is that of one layer of each
shape, times how many layers have it; ours is measured whole. One thread, process CPU. `error`: |ours - truncated| / |truncated|, exact in float64, the worst
of one layer a shape; `excess`: by how much the norm of what is left out is above the least.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from diffpeft import converters, io
from diffpeft.converters.families import TABLES
from tests.benchmarks.files import SDXL, run

RANKS = (16, 16, 24, 32, 32, 32, 48, 64, 64, 64)
QUANTILE = 0.99
Shapes = dict[str, tuple[int, ...]]


def layers_of(config: Mapping[str, object], only: str) -> Shapes:
    """{layer: shape of its weight} of what sd-scripts adapts in a UNet: all of the attention blocks but norms."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, kinds) and ".attentions." in name and re.search(only, name)
    }


def clamped_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """sd-scripts' factors of a matrix: up [out, r], down [r, columns]."""
    U, S, Vh = torch.linalg.svd(matrix)
    up, down = U[:, :rank] * S[:rank], Vh[:rank]
    most = torch.quantile(torch.cat([up.flatten(), down.flatten()]), QUANTILE)
    return up.clamp(-most, most), down.clamp(-most, most)


def seconds(job: Callable[[], object]) -> float:
    """Process CPU seconds."""
    start = time.process_time()
    job()
    return time.process_time() - start


def per_shape(layers: Shapes, job: Callable[[str], object]) -> float:
    """The seconds of a job on all layers, from one of each shape."""
    examples = {shape: name for name, shape in layers.items()}
    counts = Counter(layers.values())
    return sum(counts[shape] * seconds(lambda name=name: job(name)) for shape, name in examples.items())


def key_of(family: str, name: str) -> str:
    rule, _ = TABLES[family].to_original("unet", name)
    return "lora_unet_" + rule.original.replace(".", "_")


def made(folder: Path, layers: Shapes) -> list[Path]:
    """Ten LoRAs in fp16, in sd-scripts' spelling."""
    paths = []
    for n, rank in enumerate(RANKS):
        torch.manual_seed(n)
        tensors = {}
        for name, (o, i, *_) in layers.items():
            key = key_of("sdxl", name)
            tensors[f"{key}.lora_down.weight"] = (torch.randn(rank, i) / math.sqrt(i)).half()
            tensors[f"{key}.lora_up.weight"] = (torch.randn(o, rank) / math.sqrt(rank)).half()
            tensors[f"{key}.alpha"] = torch.tensor(float(rank) / 2)
        paths.append(folder / f"{n}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def merged_densely(paths: Sequence[Path], key: str, rank: int) -> tuple[Tensor, Tensor]:
    """sd-scripts' merge of one layer."""
    return clamped_svd(summed(paths, key, torch.float32), rank)


def summed(paths: Sequence[Path], key: str, dtype: torch.dtype) -> Tensor:
    """The sum of the files' matrices for a layer, each at the weight 1 / 10."""
    total = torch.zeros(())
    for path in paths:
        handles = io.header(path)[0]
        up, down, alpha = io.load(handles[f"{key}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        total = total + 0.1 * (up.to(dtype) @ down.to(dtype)) * (alpha.to(dtype) / len(down))
    return total


def worst(layers: Shapes, exact: Callable[[str], Tensor], out: Path, rank: int, family: str) -> tuple[float, float]:
    """(error, excess) of a file's layers against the truncated exact, one layer of each shape."""
    entries = {entry.layer: entry for entry in converters.read(out, family=family).entries}
    errors, excesses = [0.0], [0.0]
    for name in {shape: name for name, shape in layers.items()}.values():
        matrix = exact(name)
        B, A = (
            io.load([entries[f"unet.{name}"].tensors[role]])[0].double().flatten(1) for role in ("lora_B", "lora_A")
        )
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        truncated = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        ours = B @ A
        errors.append(float((ours - truncated).norm() / truncated.norm()))
        least = float(S[rank:].norm())
        excesses.append(float((matrix - ours).norm()) / least - 1 if least > 1e-9 * float(S[0]) else 0.0)
    return max(errors), max(excesses)


def told(name: str, ours: Sequence[float], theirs: float, errors: tuple[float, float] | None = None) -> None:
    cpu, wall, _, peak = ours
    beside = "" if errors is None else f"  error {errors[0]:.1e}  excess {errors[1]:.1e}"
    against = f"sd-scripts {theirs:8.1f} s  ratio 1/{theirs / cpu:.0f}" if theirs else ""
    print(f"{name:34} diffpeft {cpu:7.2f} s (wall {wall:.1f}, peak {peak:.0f} MiB)  {against}{beside}", flush=True)


def merging(only: str) -> None:
    """Ten files of SDXL."""
    layers = layers_of(SDXL, only)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = made(folder, layers)
        theirs = per_shape(layers, lambda layer: merged_densely(paths, key_of("sdxl", layer), 64))
        weights = {str(path): 0.1 for path in paths}
        before = "import torch, diffpeft.tools.merging; torch.set_num_threads(1)"
        print(f"{len(layers)} layers of SDXL, ten files of ranks {RANKS}")
        for how, rank in (("svd", 64), ("cat", None)):
            out = folder / f"{how}.safetensors"
            job = f"diffpeft.tools.merging.merge({weights!r}, {str(out)!r}, how={how!r}, rank={rank}, dtype='fp32', family='sdxl')"
            ours = run(before, job)
            errors = None
            if how == "svd":
                exact = lambda layer: summed(paths, key_of("sdxl", layer), torch.float64)  # noqa: E731
                errors = worst(layers, exact, out, 64, "sdxl")
            told(f"merge, {how}{f' at rank {rank}' if rank else ''}", ours, theirs, errors)


def difference(shape: Sequence[int]) -> Tensor:
    """What a fine-tune may have learnt: singular values that fall like 1 / k, and some noise."""
    o, i = shape[0], math.prod(shape[1:])
    r = min(o, i, 128)
    falling = 1 / torch.arange(1, r + 1)
    return ((torch.randn(o, r) * falling) @ torch.randn(r, i) / math.sqrt(i) + 1e-4 * torch.randn(o, i)).reshape(
        shape
    ) * 0.02


def models(folder: Path, layers: Shapes) -> tuple[Path, Path]:
    """SD1.5's attention, before and after."""
    torch.manual_seed(0)
    before = {f"{name}.weight": 0.05 * torch.randn(shape) for name, shape in layers.items()}
    after = {key: W + difference(W.shape) for key, W in before.items()}
    config = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768}
    for name, tensors in (("base", before), ("tuned", after)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder / "base", folder / "tuned"


def extracting(only: str) -> None:
    """SD1.5 at rank 16."""
    layers = layers_of({"cross_attention_dim": 768}, only)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, tuned = models(folder, layers)
        handles = [io.header(path / "diffusion_pytorch_model.safetensors")[0] for path in (base, tuned)]

        def changed(layer: str, dtype: torch.dtype = torch.float32) -> Tensor:
            before, after = io.load(side[f"{layer}.weight"] for side in handles)
            return (after.to(dtype) - before.to(dtype)).flatten(1)

        theirs = per_shape(layers, lambda layer: clamped_svd(changed(layer), 16))
        out = folder / "out.safetensors"
        before = "import torch, diffpeft.tools.extracting; torch.set_num_threads(1)"
        job = f"diffpeft.tools.extracting.extract({str(base)!r}, {str(tuned)!r}, {str(out)!r}, rank=16, family='sd15')"
        ours = run(before, job)
        errors = worst(layers, lambda layer: changed(layer, torch.float64), out, 16, "sd15")
        print(f"{len(layers)} layers of SD1.5")
        told("extract at rank 16", ours, theirs, errors)


def main(quick: bool) -> None:
    """Both. `quick`: the blocks in the middle only."""
    merging("mid_block" if quick else "")
    extracting("mid_block|down_blocks.0" if quick else "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main("--quick" in sys.argv)
