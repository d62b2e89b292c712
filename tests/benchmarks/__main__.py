"""`make bench`: this package against its peers, in one process, one thread, turn by turn.

`python -m tests.benchmarks [layers | training | pipeline | pipelines | files | mergers | llm] [--quick]`: single layers (layers.py), steps of
`diffpeft train` (training.py), the embedded base with diffusers and peft, the UNets of SD1.5 and SDXL with one and ten adapters (pipelines.py),
converting and inspecting files (files.py), merging and extracting (mergers.py), language models (llm.py); without a word all. Printed is process CPU
time (medians) and its ratio; only ratios mean something on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging

import diffpeft
from diffpeft.pipeline.open import open_pipeline
from tests.benchmarks import files, layers, llm, mergers, pipelines, training
from tests.benchmarks.layers import seconds

ROUNDS, RANK = 7, 16


def compare(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], undo: tuple[Callable[[], object], ...] = ()
) -> None:
    """Run both in turn and print the medians. `undo` (ours, theirs) follows each call and is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for i, job in enumerate((ours, theirs)):
            times[i].append(seconds(job))
            if undo:
                undo[i]()
    a, b = map(statistics.median, times)
    print(f"{name:32} diffpeft {a:8.4f} s   peft {b:8.4f} s   ratio {a / b:.2f}", flush=True)


def training_step(pipe: object) -> Callable[[], None]:
    """Forward and backward of the UNet at batch 8."""
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(8, 4, 16, 16, generator=g), torch.randn(8, 32, 192, generator=g)

    def step() -> None:
        pipe.unet.zero_grad()
        pipe.unet(x, torch.tensor(500), text).sample.square().mean().backward()

    return step


def pipeline() -> None:
    """The embedded base with LoRA on 122 layers."""
    ours, theirs = open_pipeline(), open_pipeline()
    for pipe in (ours, theirs):
        pipe.unet.requires_grad_(False)
        pipe.text_encoder.requires_grad_(False)
    diffpeft.attach(ours.unet, diffpeft.LoraConfig(r=RANK, init_lora_weights=False), "a", targets="full")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        diffpeft.save_lora(ours, file)
        diffpeft.unload(ours)
        compare(
            "load_lora, 122 layers",
            lambda: diffpeft.load_lora(ours, file),
            lambda: theirs.load_lora_weights(str(file)),
            (lambda: diffpeft.unload(ours), theirs.unload_lora_weights),
        )
        diffpeft.load_lora(ours, file, trainable=True)
        theirs.load_lora_weights(str(file), adapter_name="a")
        theirs.unet.set_adapter("a")
        for name, p in theirs.unet.named_parameters():
            p.requires_grad_("lora" in name)
        compare("set_adapters", lambda: diffpeft.set_adapters(ours, {"a": 0.5}), lambda: theirs.set_adapters("a", 0.5))
        compare("training step, batch 8", training_step(ours), training_step(theirs))
        with torch.no_grad():
            x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 32, 192)
            run = [lambda pipe=pipe: pipe.unet(x, torch.tensor(500), text) for pipe in (ours, theirs)]
            compare("UNet forward, batch 2", *run)


def main() -> None:
    """What the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "what", nargs="?", choices=("layers", "training", "pipeline", "pipelines", "files", "mergers", "llm")
    )
    parser.add_argument("--quick", action="store_true", help="fewer layers, fewer rounds")
    parser.add_argument("--only", default="", help="methods with this word in their name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if given.what in (None, "layers"):
        layers.main(given.quick, given.only)
    if given.what in (None, "training"):
        training.main(given.quick, given.only)
    if given.what in (None, "pipeline"):
        pipeline()
    if given.what in (None, "pipelines"):
        pipelines.main(given.quick)
    if given.what in (None, "files"):
        files.main(given.quick)
    if given.what in (None, "mergers"):
        mergers.main(given.quick)
    if given.what in (None, "llm"):
        llm.main(given.quick)


if __name__ == "__main__":
    main()
