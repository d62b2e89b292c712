"""Two adapters on one pipeline, in all mixes of three strengths each, as one picture.

python examples/mix_adapters.py A.safetensors B.safetensors "an emoji of lemon" -o mix.png [--model MODEL]
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image

import diffpeft
from diffpeft.pipeline.open import open_pipeline
from diffpeft.train.sample import pictures

STRENGTHS = (0.0, 0.5, 1.0)


def main(argv: list[str] | None = None) -> None:
    """Rows: the strength of A. Columns: the strength of B."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs=2)
    parser.add_argument("prompt")
    parser.add_argument("-o", "--out", default="mix.png")
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args(argv)

    pipe = open_pipeline(args.model)
    for name, path in zip("ab", args.adapters, strict=True):
        diffpeft.load_lora(pipe, path, name=name)
    rows = []
    for a in STRENGTHS:
        row = []
        for b in STRENGTHS:
            with diffpeft.adapters(pipe, {"a": a, "b": b}):
                row.append(pictures(pipe, [args.prompt], [0], steps=args.steps, guidance=4.0)[0])
        rows.append(np.concatenate(row, axis=1))
    Image.fromarray(np.concatenate(rows)).save(args.out)


if __name__ == "__main__":
    main()
