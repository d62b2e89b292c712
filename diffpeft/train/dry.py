"""A run that is none: what would be trained, written and needed, from configs, tokenizers and the headers of files. Models are on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from diffpeft.families import Family, family_of
from diffpeft.model.state import bundle_of, slots_of, trained_parameters
from diffpeft.train.budget import fitted
from diffpeft.train.check import Checked
from diffpeft.train.config import TrainConfig
from diffpeft.train.estimate import Outline, Phase, sized
from diffpeft.train.formats import asked, chosen, file_of, halves_of
from diffpeft.train.outputs import ACCOUNT, CONFIG, METRICS, PAGE, ROWS


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Args:
        family: the pipeline's class; dtype: what its weights are held in; device: where; memory: what is done to save some.
        layers, parameters: {component: how many are adapted, how many numbers are trained}.
        account: what the data holds, as `diffpeft data check --json` prints it; `lines` in words.
        files: what is written in the end; `states` how many states stay, of `state_bytes` each.
        phases: what is in memory, part after part.
    """

    model: str
    family: str
    dtype: str
    device: str
    memory: str
    layers: Mapping[str, int]
    parameters: Mapping[str, int]
    steps: int
    epochs: float
    account: Mapping[str, object]
    lines: tuple[str, ...]
    files: tuple[str, ...]
    states: int
    state_bytes: int
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        """The part that needs the most."""
        return max(self.phases, key=lambda phase: phase.total)

    def table(self) -> dict[str, object]:
        """All of it, for programs."""
        table = asdict(self)
        table["phases"] = [asdict(phase) | {"total": phase.total} for phase in self.phases]
        return {name: value for name, value in table.items() if name != "lines"} | {"peak_bytes": self.peak.total}

    def __str__(self) -> str:
        """All of it, for people."""
        counts = [
            f"{component}: {n} layers, {self.parameters[component]:,} parameters"
            for component, n in self.layers.items()
        ]
        return "\n".join(
            [
                f"model: {self.model}, a {self.family} in {self.dtype} on {self.device}",
                f"memory: {self.memory}",
                *(f"trained: {text}" for text in counts),
                *(f"data: {line}" for line in self.lines),
                f"steps: {self.steps}, {self.epochs:.3g} epochs",
                f"files: {', '.join(self.files)}",
                f"states: {self.states} of {sized(self.state_bytes)}"
                if self.states
                else "states: none but when stopped",
                "memory, estimated (what PyTorch itself takes, and fragments, come on top):",
                *(f"  {_row(phase)}" for phase in self.phases),
                f"  peak: {sized(self.peak.total)}, {self.peak.what}",
            ]
        )


def _row(phase: Phase) -> str:
    parts = {
        "weights": phase.weights,
        "adapter": phase.adapter,
        "optimiser": phase.optimizer,
        "activations": phase.computed,
    }
    named = ", ".join(f"{name} {sized(size)}" for name, size in parts.items() if size)
    named += ", and activations, which cannot be counted for this model" if phase.computed is None else ""
    return f"{phase.what}: {sized(phase.total)} ({named})"


def plan(typed: TrainConfig, checked: Checked) -> DryRun:
    """What a run would do. No weight is read, and nothing is written.

    Raises as `dreambooth.train` does before it loads a model.
    """
    typed, checked = fitted(checked)
    outline = Outline(typed, checked)
    config, family, name, account = outline.config, outline.family, checked.name, outline.checked.account
    layers = [layer.partition(".")[0] for layer in slots_of(family.pipe, name)]
    trained = trained_parameters(family.pipe, name)
    numbers = {part: sum(p.numel() for n, p in trained.items() if n.partition(".")[0] == part) for part in layers}
    states = 0 if not config.save_every else min(config.keep, -(-config.steps // config.save_every))
    phases = outline.phases(config.offload)
    return DryRun(
        model=str(config.model),
        family=type(family.pipe).__name__,
        dtype=outline.dtype,
        device=outline.device,
        memory=outline.held_so(),
        layers={part: layers.count(part) for part in dict.fromkeys(layers)},
        parameters=numbers,
        steps=config.steps,
        epochs=config.steps * config.examples() / account.pictures,
        account=account.table(),
        lines=tuple(account.lines()),
        files=_files(config, family, name),
        states=states,
        state_bytes=outline.adapter + outline.optimizer,
        phases=phases,
    )


def _files(config: TrainConfig, family: Family, name: str) -> tuple[str, ...]:
    """What is written into the output folder, besides states and samples."""
    for slot in slots_of(
        family.pipe, name
    ).values():  # some formats ask whether tensors are alike: those of a trained adapter are not
        slot.to_empty(device="cpu")
        for tensor in slot.state_dict().values():
            tensor.uniform_()
    bundle = bundle_of(family.pipe, name, family_of(family.pipe) or "")
    written = [
        file_of(name, format, half)
        for format in chosen(bundle, asked(config)).written
        for half in halves_of(bundle, format)
    ]
    return (*written, PAGE, METRICS, ROWS, CONFIG, ACCOUNT)
