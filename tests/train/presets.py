"""What `--memory` picks for published models, recorded in presets.json, which docs/families.md has a table of.

`python -m tests.train.presets [model ...]` computes it anew: at the model's own resolution, of one picture, at rank 16 in bf16.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from diffpeft import TrainConfig
from diffpeft.train import budget
from diffpeft.train.check import check
from tests.train import published
from tests.train.pictures import photos_in

RECORDED = Path(__file__).with_name("presets.json")
MEMORIES = ("8GB", "12GB", "16GB", "24GB")
TOO_LITTLE = "not"


def config_for(name: str, folder: Path, memory: str) -> TrainConfig:
    """A run on a published model whose configs are written into a folder."""
    model = folder / "model"
    if not model.exists():
        photos_in(folder)
        (published.write_grown if name in published.GROWN else published.write)(name, model)
    usual = {"model": str(model), "data": str(folder / "photos"), "out": str(folder / "out")}
    return TrainConfig(**usual, instance_prompt="x", dtype="bf16", rank=16, batch_size=1, memory=memory)


def computed(name: str) -> dict[str, str]:
    """{memory: the options that are picked}, all of them by one pass over what is estimated."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_for(name, Path(folder), MEMORIES[0])
        checked = check(config)
        estimates = list(budget.estimates(config, checked))
    picked = {}
    for memory in MEMORIES:
        limit = TrainConfig(memory=memory).memory_left()
        picked[memory] = next((str(way) for way, phase in estimates if phase.total <= limit), TOO_LITTLE)
    return picked


def recorded() -> dict[str, dict[str, str]]:
    """{model: {memory: the options that are picked}}."""
    table: dict[str, dict[str, str]] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    return table


def main() -> None:
    """Compute, and record each as soon as it is there."""
    for name in sys.argv[1:] or (*published.MODELS, *published.GROWN):
        row = computed(name)
        RECORDED.write_text(json.dumps(recorded() | {name: row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
