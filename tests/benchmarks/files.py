"""Files: converting and inspecting a Kohya LoRA of SDXL, each run in a process of its own, against diffusers' own conversion.

Printed are process CPU and wall seconds and the peak of resident memory above a process that has only imported torch.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from diffpeft.converters.families import TABLES

SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
ROUNDS = 5
MEASURE = """
import json, resource, sys, time
{before}
wall, cpu = time.perf_counter(), time.process_time()
{job}
used = [time.process_time() - cpu, time.perf_counter() - wall]
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([*used, time.process_time(), peak / 1024]))
"""
OURS = "import converters; converters.convert({source!r}, {out!r}, to={to!r})"
THEIRS = """
from types import SimpleNamespace
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
config = SimpleNamespace(layers_per_block=2)
state, alphas = StableDiffusionXLPipeline.lora_state_dict({source!r}, unet_config=config)[:2]
save_file({{k: t.contiguous() for k, t in state.items()}}, {out!r}, {{"format": "pt"}})
"""


def kohya_sdxl(path: Path, rank: int) -> None:
    """A LoRA on all attention layers of SDXL's UNet, in sd-scripts' spelling."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and "attentions" in name:
            rule, _ = TABLES["sdxl"].to_original("unet", name)
            key = "lora_unet_" + rule.original.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, module.in_features).half()
            tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, rank).half()
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path, {"ss_network_module": "networks.lora"})


def run(before: str, job: str) -> list[float]:
    """[CPU seconds, wall seconds, CPU seconds of the whole process, peak MiB]."""
    out = subprocess.run(
        [sys.executable, "-c", MEASURE.format(before=before, job=job)], check=True, capture_output=True, text=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def main(quick: bool) -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = str(Path(folder) / "a.safetensors"), str(Path(folder) / "b.safetensors")
        kohya_sdxl(Path(source), 16 if quick else 192)
        size = Path(source).stat().st_size / 2**20
        base = run("import torch", "pass")[3]
        jobs = {
            "diffusers, kohya -> diffusers": ("from diffusers import StableDiffusionXLPipeline", THEIRS),
            "kohya -> diffusers": ("import torch, converters", OURS.replace("{to!r}", "'diffusers'")),
            "kohya -> comfyui": ("import torch, converters", OURS.replace("{to!r}", "'comfyui'")),
            "kohya -> comfyui, bf16": (
                "import torch, converters",
                OURS.replace("to={to!r}", "to='comfyui', dtype='bf16'"),
            ),
            "inspect": ("", "import converters; converters.inspect({source!r})"),
        }
        found: dict[str, list[list[float]]] = {name: [] for name in jobs}
        for _ in range(1 if quick else ROUNDS):
            for name, (before, job) in jobs.items():
                found[name].append(run(before, job.format(source=source, out=out)))
        theirs = statistics.median(row[1] for row in found["diffusers, kohya -> diffusers"])
        print(f"a file of {size:.0f} MiB; a process with torch alone has {base:.0f} MiB")
        for name, rows in found.items():
            cpu, wall, whole, peak = (statistics.median(column) for column in zip(*rows, strict=True))
            print(
                f"{name:32} CPU {cpu:6.2f} s  wall {wall:6.2f} s ({wall / theirs:.2f})  process {whole:.2f} s  "
                f"{peak - base:+7.0f} MiB above torch",
                flush=True,
            )
