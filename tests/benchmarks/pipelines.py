"""Pipelines: loading, mixing, fusing and unloading LoRAs on the UNets of SD1.5 and SDXL (random weights), against diffusers with peft.

Both work on the same UNet, turn by turn, with the other one's adapters off; what is fused for good stays in it.
Printed are process CPU seconds (medians) and their ratio.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import diffpeft
from diffpeft.model.merge import merge_for_good
from tests.benchmarks.files import SDXL

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
RANK, MANY = 16, 10


def unet(config: dict[str, Any]) -> Any:
    """With weights that cost nothing to draw."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    return model.eval().requires_grad_(False)


def lora(model: Any, path: Path, every: bool) -> int:
    """A file in diffusers' names for the attentions (every linear layer in them, or q, k, v and out)."""
    tensors = {}
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    for name, m in model.named_modules():
        if isinstance(m, torch.nn.Linear) and "attentions" in name and (every or name.endswith(ends)):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(RANK, m.in_features).bfloat16()
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(m.out_features, RANK).bfloat16() / 100
    save_file(tensors, path)
    return len(tensors) // 2


def timed(job: Callable[[], object]) -> float:
    """CPU seconds."""
    start = time.process_time()
    job()
    return time.process_time() - start


class Ours:
    """diffpeft."""

    def __init__(self, model: Any):
        self.model = model

    def load(self, file: Path, name: str) -> None:
        """One more."""
        diffpeft.load_lora(self.model, file, name=name)

    def mix(self, names: list[str]) -> None:
        """At strengths that differ."""
        diffpeft.set_adapters(self.model, {name: 1 / (n + 2) for n, name in enumerate(names)})

    def fuse(self) -> None:
        """Base kept."""
        diffpeft.fuse(self.model)

    def fuse_for_good(self) -> None:
        """No base kept."""
        diffpeft.fuse(self.model, keep_base="none")

    def leave(self) -> None:
        """What is fused stays in the weights."""
        merge_for_good(self.model)

    def unfuse(self) -> None:
        """All."""
        diffpeft.unfuse(self.model)

    def unload(self) -> None:
        """All."""
        diffpeft.unload(self.model)


class Theirs(Ours):
    """diffusers with peft."""

    def load(self, file: Path, name: str) -> None:
        """One more."""
        self.model.load_lora_adapter(str(file), prefix="unet", adapter_name=name)

    def mix(self, names: list[str]) -> None:
        """At strengths that differ."""
        self.model.set_adapters(names, [1 / (n + 2) for n in range(len(names))])

    def fuse(self) -> None:
        """All that are active."""
        self.model.fuse_lora()

    def fuse_for_good(self) -> None:
        """As ever: no base is kept."""
        self.model.fuse_lora()

    def leave(self) -> None:
        """What is fused stays in the weights."""
        self.model.unload_lora()

    def unfuse(self) -> None:
        """All."""
        self.model.unfuse_lora()

    def unload(self) -> None:
        """All."""
        self.model.unload_lora()


def one(who: Ours, file: Path) -> dict[str, float]:
    """CPU seconds of each job of one of them, which leaves the model without adapters."""
    found = {"load the first": timed(lambda: who.load(file, "a0"))}
    found["fuse"] = timed(who.fuse)
    found["unfuse"] = timed(who.unfuse)
    found["fuse again"] = timed(who.fuse)
    who.unfuse()
    names = ["a0"]
    for n in range(1, MANY):
        names.append(f"a{n}")
        spent = timed(lambda name=names[-1]: who.load(file, name))
    found["load the tenth"] = spent
    found["set_adapters, ten names"] = timed(lambda: who.mix(names))
    found["unload ten"] = timed(who.unload)
    who.load(file, "last")
    found["fuse for good"] = timed(who.fuse_for_good)
    who.leave()
    return found


def forward(model: Any, file: Path, times: int) -> None:
    """One denoising step of a 32 x 32 latent with no adapter, and with five, in fp32: few CPUs compute in bf16."""
    x, text = torch.randn(1, 4, 32, 32), torch.randn(1, 77, model.config.cross_attention_dim)
    names = [f"f{n}" for n in range(5)]
    found: dict[str, list[float]] = {"base": [], "diffpeft": [], "diffusers": []}
    with torch.no_grad():
        for _ in range(times + 1):
            found["base"].append(timed(lambda: model(x, 10, text)))
            for title, who in (("diffpeft", Ours(model)), ("diffusers", Theirs(model))):
                for name in names:
                    who.load(file, name)
                who.mix(names)
                model(x, 10, text)
                found[title].append(timed(lambda: model(x, 10, text)))
                who.unload()
    base, ours, theirs = (statistics.median(spent[1:]) for spent in found.values())
    print(
        f"  forward with five              {ours / base:.2f} x of the base's {base:.3f} s, diffusers {theirs / base:.2f} x"
    )


def main(quick: bool) -> None:
    """All of it."""
    for title, config, every in (("SD1.5", SD15, False), ("SDXL", SDXL, True)):
        model = unet(config)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "a.safetensors"
            layers = lora(model, file, every)
            runs: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
            for _ in range(1 if quick else 3):
                for n, who in enumerate((Ours(model), Theirs(model))):
                    runs[n].append(one(who, file))
            read = timed(lambda f=file: _read(f))
            if model.config.cross_attention_dim == 768:
                forward(model.float(), file, 1 if quick else 3)
        print(f"{title}: {layers} layers; reading the file {read:.3f} s")
        for job in runs[0][0]:
            ours, theirs = (statistics.median(run[job] for run in side) for side in runs)
            print(
                f"  {job:28} diffpeft {ours:8.4f} s   diffusers {theirs:8.4f} s   {theirs / max(ours, 1e-9):6.1f} x",
                flush=True,
            )
        del model


def _read(file: Path) -> list[torch.Tensor]:
    return [t.clone() for t in load_file(file).values()]
