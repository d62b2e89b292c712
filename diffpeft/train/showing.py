"""What a run shows of itself: samples, and the page. It ties them to the run's options, its model and its loop."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft.train import state
from diffpeft.train.cache import Texts
from diffpeft.train.check import sides_of
from diffpeft.train.report import FINISHED, Page, PictureRow, Pictures, Status, Use
from diffpeft.train.report.live import Live
from diffpeft.train.report.page import STRENGTHS
from diffpeft.train.sample_model import open_other, other_stage
from diffpeft.train.samples import Gallery, Sampler, Spot, forget, settled, stage, texts_of

if TYPE_CHECKING:
    from diffpeft.families import Family
    from diffpeft.train.checkpoints import SavedState
    from diffpeft.train.config import Options, TrainConfig
    from diffpeft.train.loop import Events
    from diffpeft.train.run import TrainRun
    from diffpeft.train.sample_prompts import SamplePrompt
    from diffpeft.train.watch import Watch

PAGE = "report.html"


@dataclass(frozen=True)
class Drawing:
    """The samples of a run before its model is loaded: the settled prompts, the model that draws them, and what its text encoders make of them."""

    prompts: tuple[SamplePrompt, ...]
    family: Family
    texts: Texts

    def read_by(self, family: Family) -> list[str]:
        """The texts that the encoders of a family must read for it."""
        return texts_of(self.prompts) if family is self.family and self.prompts else []

    def learn(self, trained: Family) -> None:
        """Read the prompts where that is for another model than the one that is trained; its encoders are given up again."""
        if self.family is not trained and self.prompts:
            self.texts.learn(texts_of(self.prompts))
            self.family.parts.free(*self.family.text_encoders)


def interval(config: TrainConfig) -> int:
    """Steps between two times that samples are drawn; 0 if none are."""
    return (config.save_every or config.steps) if config.sample_every is None else config.sample_every


def drawing_of(
    config: TrainConfig,
    family: Family,
    prompts: Sequence[SamplePrompt],
    chosen: Mapping[str, Mapping[str, object]],
    texts: Texts,
    device: str,
) -> Drawing:
    """The samples of a run with resolved options. `chosen` says which layers are trained; `texts` are those of the model that is trained.

    Raises ConfigError for what cannot be drawn, CheckpointError for a sample model that does not fit.
    """
    drawer, drawn_texts = family, texts
    if config.sample_model is not None and prompts:
        drawer = open_other(config, family, chosen, device)
        drawn_texts = Texts(drawer, texts.live, None, device)
    side = max(sides_of(config, family.resolution))
    return Drawing(settled(config, drawer, prompts, side), drawer, drawn_texts)


def sampler_of(config: TrainConfig, family: Family, name: str, drawing: Drawing, watch: Watch) -> Sampler:
    """What draws the samples of a run, whose adapter is on the model by now. Samples of steps that this run has not done are removed."""
    other = drawing.family is not family
    ready = (
        functools.partial(other_stage, family, name, drawing.family)
        if other
        else functools.partial(stage, family, name)
    )
    gallery = Gallery(config.output(), drawing.prompts, Path(str(config.sample_model or config.model)).name)
    return Sampler(gallery, name, drawing.texts, ready, config.init_from is not None, config.sample_first, watch.tick)


def removed_beyond(out: Path, resumed: SavedState | None) -> None:
    """Remove the samples of steps that a run has not done, of one that begins anew all of them."""
    forget(out, resumed.step if resumed else -1)


def page_of(config: Options, title: str, data: Sequence[str] = (), origins: Mapping[str, str] | None = None) -> Page:
    """The page of a run that begins, with its options as they came to be."""
    return Page(
        title,
        Status("running"),
        total=config.steps,
        options=config.resolved(),
        origins=origins or {},
        defaults={f.name: f.default for f in fields(config)},
        data=data,
    )


def losses_until(resumed: SavedState | None) -> list[float]:
    """The losses of the steps that a run goes on from."""
    return state.read_parts(resumed.folder / state.FILE)[state.RUN]["losses"].tolist() if resumed else []


def pictures_of(gallery: Gallery, drawn_on: str) -> dict[str, object]:
    """The samples of a run as a page has them: of the first prompt the newest at each strength, and all prompts by step."""
    steps = gallery.pictures()
    if not steps:
        return {}
    return {"before_after": _strengths(gallery, steps), "samples": _by_step(gallery, steps), "drawn_on": drawn_on}


def _strengths(gallery: Gallery, steps: Mapping[int, Mapping[Spot, Path]]) -> Pictures:
    """The first prompt at each strength, of the newest step that has it."""
    newest = {spot: path for pictures in steps.values() for spot, path in pictures.items()}
    heads = [f"strength {strength:g}" for strength in STRENGTHS]
    return Pictures(heads, [PictureRow(gallery.prompts[0].prompt, [newest.get(Spot(0, s)) for s in STRENGTHS])])


def _by_step(gallery: Gallery, steps: Mapping[int, Mapping[Spot, Path]]) -> Pictures:
    """All prompts at strength 1, by step."""
    shown = [step for step, pictures in steps.items() if any(spot.strength == 1 for spot in pictures)]
    rows = [
        PictureRow(prompt.prompt, [steps[step].get(Spot(number, 1.0)) for step in shown])
        for number, prompt in enumerate(gallery.prompts)
    ]
    return Pictures([str(step) for step in shown], rows)


def uses_of(
    config: TrainConfig, files: Sequence[Path], readers: Mapping[str, str], prompt: str, family: Family
) -> list[Use]:
    """The commands that use the adapter, for the programs that read its files."""
    model = str(Path(str(config.model)).resolve()) if Path(str(config.model)).exists() else str(config.model)
    files = [file.resolve() for file in files]
    by = {program: next((f for f in files if program in readers.get(f.name, "")), None) for program in _PROGRAMS}
    base = ["--base", config.base] if config.base else []
    words = ["-p", prompt or "...", "--lora", str(files[0]), "-o", "picture.png"] if files else []
    ours = shlex.join(["diffpeft", "generate", "-m", model, *base, *words])
    uses = [Use("diffpeft", ours)] if files else []
    if (file := by["diffusers"]) is not None:
        load = f'pipe.load_lora_weights("{file.parent}", weight_name="{file.name}")'
        uses.append(Use("diffusers", f"pipe = {type(family.pipe).__name__}.from_pretrained({model!r})\n{load}"))
    if (file := by["ComfyUI"]) is not None:
        uses.append(Use("ComfyUI", f"cp {shlex.quote(str(file))} ComfyUI/models/loras/   # then the node Load LoRA"))
    if (file := by["A1111"]) is not None:
        uses.append(
            Use("A1111, Forge", f"cp {shlex.quote(str(file))} models/Lora/   # then in a prompt: <lora:{file.stem}:1>")
        )
    return uses


_PROGRAMS = ("diffusers", "ComfyUI", "A1111")


def live_of(
    run: TrainRun, sampler: Sampler | None, resumed: SavedState | None, rate: Callable[[int], float], command: str
) -> Live:
    """The page of a training run on images, which goes on from a state if there is one."""
    config = run.config
    drawn_on = Path(config.sample_model).name if config.sample_model else ""
    page = page_of(config, f"diffpeft: {run.name}", run.account.lines(), run.origins)
    pictures = functools.partial(pictures_of, sampler.gallery, drawn_on) if sampler else dict
    return Live(config.output() / PAGE, replace(page, losses=losses_until(resumed)), rate, pictures, command)


def events_of(events: Events, steps: int, every: int, sampler: Sampler | None, live: Live) -> Events:
    """The events of a run that is shown: samples at the beginning, every so many steps and at the end, each time with a new page; the page at least
    at both ends.
    """

    def point(step: int) -> None:
        if sampler is not None:
            sampler(step)
        live.renew()

    def step(done: int, loss: float) -> None:
        events.step(done, loss)
        live.step(done, loss)

    ends = [] if every and steps % every == 0 else [(steps, point)]
    return replace(events, step=step, at=[*events.at, *([(every, point)] if every else []), *ends])


def finish(run: TrainRun, files: Sequence[Path], readers: Mapping[str, str]) -> None:
    """Write the page of a run that has ended well, and whose files are written."""
    if run.live is None:
        return
    prompt = next((row.label for row in run.live.page.before_after.rows), "") if run.live.page.before_after else ""
    uses = uses_of(run.config, files, readers, prompt or run.config.instance_prompt or "", run.family)
    run.live.renew(status=FINISHED, files=[*files, run.live.path], readers=readers, uses=uses)
