"""A run that is none: what would be trained, written and needed, from configs, tokenizers and the headers of files. Models are on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from diffpeft.families import Conditions, Family, Frame, family_of
from diffpeft.model.state import bundle_of, slots_of, trained_parameters
from diffpeft.pipeline.open import default_device, default_dtype, dtype_of
from diffpeft.train import dreambooth
from diffpeft.train.check import Checked
from diffpeft.train.config import TrainConfig
from diffpeft.train.experts import experts_of
from diffpeft.train.formats import asked, chosen, file_of, halves_of
from diffpeft.train.job import checked_dtype
from diffpeft.train.memory import peak, size_of
from diffpeft.train.optimizers import row_of
from diffpeft.train.outputs import ACCOUNT, CONFIG, METRICS, PAGE, ROWS
from diffpeft.train.watch import Quiet

GIB = 2**30


@dataclass(frozen=True)
class Phase:
    """What a part of a run has in memory at its peak, in bytes: weights of models, the adapter with its optimiser, and what is computed.

    The last is None where a model's code asks for numbers, which there are none of.
    """

    what: str
    weights: int
    adapter: int
    computed: int | None

    @property
    def total(self) -> int:
        """All of it that is known."""
        return self.weights + self.adapter + (self.computed or 0)


@dataclass(frozen=True)
class DryRun:
    """What a run would do.

    Args:
        family: the pipeline's class; dtype: what its weights are held in; device: where.
        layers, parameters: {component: how many are adapted, how many numbers are trained}.
        account: what the data holds, as `diffpeft data check --json` prints it; `lines` in words.
        files: what is written in the end; `states` how many states stay, of `state_bytes` each.
        phases: what is in memory, part after part.
    """

    model: str
    family: str
    dtype: str
    device: str
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
                *(f"trained: {text}" for text in counts),
                *(f"data: {line}" for line in self.lines),
                f"steps: {self.steps}, {self.epochs:.3g} epochs",
                f"files: {', '.join(self.files)}",
                f"states: {self.states} of {_size(self.state_bytes)}"
                if self.states
                else "states: none but when stopped",
                "memory, estimated (what PyTorch itself takes, and fragments, come on top):",
                *(f"  {_row(phase)}" for phase in self.phases),
                f"  peak: {_size(self.peak.total)}, {self.peak.what}",
            ]
        )


def _row(phase: Phase) -> str:
    parts = {"weights": phase.weights, "adapter and optimiser": phase.adapter, "activations": phase.computed}
    named = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    named += ", and activations, which cannot be counted for this model" if phase.computed is None else ""
    return f"{phase.what}: {_size(phase.total)} ({named})"


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def plan(typed: TrainConfig, checked: Checked) -> DryRun:
    """What a run would do. No weight is read, and nothing is written.

    Raises as `dreambooth.train` does before it loads a model.
    """
    device = default_device()
    dtype = checked_dtype(typed.dtype or default_dtype(device), device)
    family = outlined(replace(typed, base_lora=None), dtype)
    checked = dreambooth.sized(checked, dreambooth.sizing_of(typed, family), Quiet())
    config = dreambooth.settled(typed, checked, family, dtype)
    config = dreambooth.adapt(replace(config, compile=False), family, checked.name)
    trained = trained_parameters(family.pipe, checked.name)
    layers = [layer.partition(".")[0] for layer in slots_of(family.pipe, checked.name)]
    numbers = {part: sum(p.numel() for n, p in trained.items() if n.partition(".")[0] == part) for part in layers}
    adapter = size_of(trained.values())
    moments = sum(p.numel() for p in trained.values()) * row_of(config.optimizer).state
    average = adapter if config.ema is not None else 0
    states = 0 if not config.save_every else min(config.keep, -(-config.steps // config.save_every))
    account, phases = checked.account, _phases(config, family, checked, adapter + round(moments) + average)
    return DryRun(
        model=str(config.model),
        family=type(family.pipe).__name__,
        dtype=dtype,
        device=device,
        layers={part: layers.count(part) for part in dict.fromkeys(layers)},
        parameters=numbers,
        steps=config.steps,
        epochs=config.steps * config.examples() / account.pictures,
        account=account.table(),
        lines=tuple(account.lines()),
        files=_files(config, family, checked.name),
        states=states,
        state_bytes=round(adapter + moments + average),
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


def outlined(config: TrainConfig, dtype: str) -> Family:
    """The family of a model whose components are all there without numbers, and stay."""
    family = dreambooth.opened(config, dtype, "meta")
    parts = family.parts
    for name in (*family.text_encoders, "vae", *family.denoisers):
        setattr(parts.pipe, name, parts.outline(name).to(dtype_of(dtype)).eval())
    parts.pin(*family.text_encoders, "vae", *family.denoisers)
    family.denoiser = next(iter(experts_of(config, family).spans))  # the one that a step is counted with
    return family


def _phases(config: TrainConfig, family: Family, checked: Checked, adapter: int) -> tuple[Phase, ...]:
    """What is in memory while captions are read, images are encoded, class images are drawn, and while the adapter is trained."""
    pipe = family.pipe
    weights = {
        name: _of_model(getattr(pipe, name)) - _of_adapter(family, checked.name, name)
        for name in (*family.text_encoders, "vae", *family.denoisers)
    }
    live = family.adaptable if config.train_text_encoder else ()
    experts = sum(weights[name] for name in experts_of(config, family).spans)
    resident = sum(weights[name] for name in live)
    largest = max(checked.account.buckets, key=lambda size: size[0] * size[1])
    phases = [
        Phase(f"captions ({name})", weights[name], 0, peak(lambda name=name: _embed(family, name, 1)))  # type: ignore[misc]
        for name in family.text_encoders
    ]
    frames = max((len(example.frames) for example in checked.account.examples), default=0)
    pixels = torch.empty(1, 3, *([frames] if frames else []), largest[1], largest[0], device="meta")
    phases.append(Phase("images (vae)", weights["vae"] + resident, 0, peak(lambda: family.encode(pixels))))
    if checked.prior and checked.prior.missing:
        phases.append(Phase("class images", weights["vae"] + experts + resident, 0, 0))
    (_, *latents) = family.encode(pixels)[0].shape
    controls = max((len(example.controls) for example in checked.account.examples), default=0)
    still = torch.empty(1, 3, largest[1], largest[0], device="meta")
    read = family.condition(pixels, [still] * controls)
    with dreambooth.prepared(config, family):
        computed = peak(lambda: _step(config, family, largest, latents, read, live))
    together = sum(weights.values()) if config.cache == "none" else experts + resident
    return (*phases, Phase("training", together, adapter, computed))


def _of_model(model: torch.nn.Module) -> int:
    return size_of([*model.parameters(), *model.buffers()])


def _of_adapter(family: Family, name: str, component: str) -> int:
    trained = trained_parameters(family.pipe, name)
    return size_of(p for where, p in trained.items() if where.partition(".")[0] == component)


def _embed(family: Family, encoder: str, number: int, grad: bool = False) -> Conditions:
    """What an encoder makes of so many prompts."""
    with torch.set_grad_enabled(grad):
        return family.embed(encoder, [""] * number)


def _step(
    config: TrainConfig,
    family: Family,
    size: tuple[int, int],
    latents: Sequence[int],
    read: Conditions,
    live: tuple[str, ...],
) -> None:
    """A pass of a step, forward and backward, of a batch of pictures (width, height) with latents [c, *size], and what is `read` of one beside them.

    Class images are in the batch; the base's prior is a pass of its own.
    """
    batch = config.batch_size * (2 if config.prior == "images" else 1)
    losses = [_loss(batch, family, size, latents, read, live) for _ in range(2 if config.prior == "base" else 1)]
    torch.stack(losses).sum().backward()


def _loss(
    batch: int,
    family: Family,
    size: tuple[int, int],
    latents: Sequence[int],
    read: Conditions,
    live: tuple[str, ...],
) -> Tensor:
    width, height = size
    device = family.parts(family.denoiser).device
    x = torch.empty(batch, *latents, device=device)
    conditions = {n: t for name in family.text_encoders for n, t in _embed(family, name, batch, name in live).items()}
    frames = [Frame((height, width), (0, 0), (height, width))] * batch
    conditions |= {name: tensor.to(device) for name, tensor in family.framed(frames).items()}
    conditions |= {name: torch.empty(batch, *t.shape[1:], device=device) for name, t in read.items()}
    return (family.predict(x, torch.zeros(batch, device=device), conditions) - x).square().mean()
