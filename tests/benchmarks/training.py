"""Training steps of `diffpeft train` against the loop of diffusers' train_dreambooth_lora.py with peft, all encoders' work cached in both.

A UNet shaped as Stable Diffusion 1.5's at a quarter of its width, random weights, rank 16 on the attention layers, AdamW. One thread; blocks of steps turn by
turn: after each block of the real command its watcher runs a block of the others. Printed are medians of process CPU milliseconds a step.

`floor` is what nobody can beat without another model: forward and backward of the frozen UNet with a gradient for its input, no adapter, no optimiser.
`peak` is the most that tensors made in a step take at once, `assembly` the share of our step in which a batch is put together.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.utils.data import DataLoader

from diffpeft.pipeline.open import EMBEDDED, open_pipeline
from diffpeft.train import dreambooth
from diffpeft.train.assembly import Assembly
from diffpeft.train.config import TrainConfig
from diffpeft.train.objective import Batch
from diffpeft.train.watch import Quiet
from tests.benchmarks.layers import memory_profile, most_alive, peak

RANK, BLOCK, SIDE, IMAGES = 16, 4, 256, 8
WIDTHS, HEADS = (80, 160, 320, 320), 2  # a quarter of 320 and 8, so that heads are as wide as there
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
PEERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION),
    "dora": lambda: peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ATTENTION, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=RANK, alpha=RANK, target_modules=ATTENTION),
    "lokr": lambda: peft.LoKrConfig(r=RANK, alpha=RANK, target_modules=ATTENTION),
}
GOALS = {"lora": 1.15, "dora": 1.3, "loha": 1.5, "lokr": 1.5}  # peft's time over ours
NEAR = 1.03  # or ours over the floor's
MOST_ASSEMBLY = 0.01


def model(folder: Path) -> Path:
    """A pipeline in a folder: its UNet is what is measured, its VAE makes latents of 1/8 of the pictures' sides."""
    torch.manual_seed(0)
    small = open_pipeline()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
    )
    unet = UNet2DConditionModel(
        block_out_channels=WIDTHS, attention_head_dim=HEADS, norm_num_groups=16, cross_attention_dim=192, sample_size=32
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=small.text_encoder,
        tokenizer=small.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(EMBEDDED, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def pictures(folder: Path) -> Path:
    """A few pictures of noise."""
    folder.mkdir()
    g = np.random.default_rng(0)
    for n in range(IMAGES):
        Image.fromarray(g.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return folder


def theirs(folder: Path, method: str) -> Iterator[None]:
    """The example's loop, a step at a time: latents and embeddings come from memory."""
    accelerator = Accelerator(cpu=True)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    if method in ("lora", "dora"):
        unet.add_adapter(PEERS[method]())
    else:
        peft.inject_adapter_in_model(PEERS[method](), unet)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    scheduler = get_scheduler("constant", optimizer)
    levels = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    latents, texts = torch.randn(IMAGES, 4, SIDE // 8, SIDE // 8), torch.randn(IMAGES, 32, 192)
    loader = DataLoader(list(zip(latents, texts, strict=True)), batch_size=1, shuffle=True)
    unet, optimizer, loader, scheduler = accelerator.prepare(unet, optimizer, loader, scheduler)
    unet.train()
    while True:
        for z, text in loader:
            with accelerator.accumulate(unet):
                noise = torch.randn_like(z)
                t = torch.randint(0, levels.config.num_train_timesteps, (len(z),)).long()
                prediction = unet(levels.add_noise(z, noise, t), t, text, return_dict=False)[0]
                loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            loss.detach().item()
            yield


def floor(folder: Path) -> Iterator[None]:
    """The frozen UNet forwards and backwards."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    x, noise, text = (torch.randn(*shape) for shape in ((1, 4, SIDE // 8, SIDE // 8),) * 2 + ((1, 32, 192),))
    x.requires_grad_()
    while True:
        x.grad = None
        F.mse_loss(unet(x, torch.tensor([500]), text, return_dict=False)[0], noise).backward()
        yield


@dataclass
class Turns(Quiet):
    """Watches our run: takes the time of its steps, and after each block of them lets the others do as many. The last block is for memory.

    `times` are CPU milliseconds a step by block, without the first, which warms up.
    """

    others: dict[str, Iterator[None]]
    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    spent: float = 0.0
    recorded: torch.profiler.profile | None = None

    def __post_init__(self) -> None:
        self.since = time.process_time()

    def step(self, done: int, steps: int, loss: float) -> None:
        """A step of ours is done."""
        self.spent += time.process_time() - self.since
        if self.recorded is not None:
            self.recorded.__exit__(None, None, None)
            self.peaks["ours"], self.recorded = most_alive(self.recorded), None
        if done % BLOCK == 0:
            self._others(counted=done > BLOCK)
        if done == steps - 1:
            self.peaks = {name: peak(lambda steps=steps: next(steps)) for name, steps in self.others.items()}
            self.recorded = memory_profile()
            self.recorded.__enter__()
        self.since = time.process_time()

    def _others(self, counted: bool) -> None:
        block = {"ours": self.spent}
        for name, steps in self.others.items():
            start = time.process_time()
            for _ in range(BLOCK):
                next(steps)
            block[name] = time.process_time() - start
        for name, seconds in block.items() if counted else ():
            self.times.setdefault(name, []).append(1000 * seconds / BLOCK)
        self.spent = 0.0


@contextlib.contextmanager
def assembling() -> Iterator[list[float]]:
    """The CPU seconds that each putting together of a batch takes."""
    seconds: list[float] = []
    at = Assembly.at

    def timed(self: Assembly, step: int, part: int = 0, parts: int = 1) -> list[Batch]:
        start = time.process_time()
        batches = at(self, step, part, parts)
        seconds.append(time.process_time() - start)
        return batches

    Assembly.at = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Assembly.at = at  # type: ignore[method-assign]


def compare(method: str, folder: Path, data: Path, rounds: int) -> None:
    """One line of the table."""
    config = TrainConfig(
        model=str(folder),
        data=str(data),
        out=str(folder / method),
        method=method,
        rank=RANK,
        instance_prompt="an emoji of noise",
        steps=(rounds + 1) * BLOCK + 1,
        save_every=0,
        allow_unchanged=".*",
    )
    turns = Turns({"peft": theirs(folder, method), "floor": floor(folder)})
    with assembling() as seconds:
        dreambooth.train(config, turns)
    ms = {name: statistics.median(times) for name, times in turns.times.items()}
    gain, near, goal = ms["peft"] / ms["ours"], ms["ours"] / ms["floor"], GOALS[method]
    share = 1000 * statistics.median(seconds) / ms["ours"]
    a, b = (turns.peaks[name] / 2**20 for name in ("ours", "peft"))
    print(
        f"{method:6} ours {ms['ours']:7.1f}  peft {ms['peft']:7.1f}  floor {ms['floor']:7.1f} ms   "
        f"peft/ours {gain:.2f} (>= {goal}), ours/floor {near:.2f} (<= {NEAR}): {_met(gain >= goal or near <= NEAR)}   "
        f"peak {a:.1f} / {b:.1f} MiB {_met(a <= b)}   assembly {share:.2%} {_met(share < MOST_ASSEMBLY)}",
        flush=True,
    )


def _met(good: bool) -> str:
    return "met" if good else "MISSED"


def main(quick: bool = False, only: str = "") -> None:
    """The table. `only`: those methods whose name contains this word."""
    with tempfile.TemporaryDirectory() as place:
        folder, data = model(Path(place) / "model"), pictures(Path(place) / "data")
        for method in GOALS:
            if only.lower() in method:
                compare(method, folder, data, 3 if quick else 9)
