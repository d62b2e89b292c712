"""What a run shows of itself: samples, and the page. It ties them to the run's options, its model and its loop."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffpeft import converters
from diffpeft.files import Json
from diffpeft.train import state
from diffpeft.train.cache import Prompt, Texts
from diffpeft.train.formats import for_a_program, for_the_second
from diffpeft.train.gallery import Gallery, Spot, forget
from diffpeft.train.outputs import ACCOUNT, CONFIG, METRICS, PAGE, README, ROWS
from diffpeft.train.report import FINISHED, Page, PictureRow, Pictures, Status, Use
from diffpeft.train.report.live import Live
from diffpeft.train.sample_model import open_other, other_stage
from diffpeft.train.samples import Sampler, settled, stage, texts_of
from diffpeft.train.team import team

if TYPE_CHECKING:
    from diffpeft.drawing.prompts import SamplePrompt
    from diffpeft.families import Family
    from diffpeft.train.checkpoints import SavedState
    from diffpeft.train.config import Options, TrainConfig
    from diffpeft.train.data import Account
    from diffpeft.train.journal import Logbook
    from diffpeft.train.loop import Events, Keeper
    from diffpeft.train.run import TrainRun
    from diffpeft.train.usage import Stopwatch
    from diffpeft.train.watch import Watch


@dataclass(frozen=True)
class Drawing:
    """The samples of a run before its model is loaded: the settled prompts, the model that draws them, and what its text encoders make of them."""

    prompts: tuple[SamplePrompt, ...]
    family: Family
    texts: Texts

    def read_by(self, family: Family) -> list[Prompt]:
        """The texts that the encoders of a family must read for it."""
        return texts_of(family, self.prompts) if family is self.family and self.prompts else []

    def learn(self, trained: Family) -> None:
        """Read the prompts where that is for another model than the one that is trained; its encoders are given up again."""
        if self.family is not trained and self.prompts:
            self.texts.learn(texts_of(self.family, self.prompts))
            self.family.parts.free(*self.family.text_encoders)


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
    side = max(config.sides(family.resolution))
    return Drawing(settled(config, drawer, prompts, side), drawer, drawn_texts)


def begun_with(prompts: Sequence[SamplePrompt], family: Family, account: Account) -> tuple[SamplePrompt, ...]:
    """Prompts with what they begin with: where a model is shown a first frame, and nothing is said, that of the first example."""
    if not family.first_frame or not account.examples:
        return tuple(prompts)
    example = str(account.examples[0].path)
    return tuple(replace(prompt, image=prompt.image or example) for prompt in prompts)


def page_of(config: Options, title: str, data: Sequence[str] = (), origins: Mapping[str, str] | None = None) -> Page:
    """The page of a run that begins, with its options as they came to be."""
    return Page(
        title,
        Status("running"),
        total=config.steps,
        options=config.resolved(),
        origins=origins or {},
        defaults={f.name: f.default for f in fields(config) if f.name in config.names()},
        data=data,
    )


def losses_until(resumed: SavedState | None) -> list[float]:
    """The losses of the steps that a run goes on from."""
    return state.read_parts(resumed.folder / state.FILE)[state.RUN]["losses"].tolist() if resumed else []


def _strengths(gallery: Gallery, steps: Mapping[int, Mapping[Spot, Path]]) -> Pictures:
    """The first prompt at each strength, or all that are drawn at each, of the newest step that has it."""
    newest = {spot: path for pictures in steps.values() for spot, path in pictures.items()}
    heads = [f"strength {strength:g}" for strength in gallery.strengths]
    shown = list(enumerate(gallery.prompts[:1] if gallery.first else gallery.prompts))
    rows = [PictureRow(p.prompt, [newest.get(Spot(number, s)) for s in gallery.strengths]) for number, p in shown]
    return _with_controls(Pictures(heads, rows), [prompt for _, prompt in shown])


def _with_controls(pictures: Pictures, prompts: Sequence[SamplePrompt]) -> Pictures:
    """The same with the control images of each row's prompt before it, if there are any."""
    most = max(len(prompt.controls) for prompt in prompts)
    heads = [f"control {number}" if most > 1 else "control" for number in range(1, most + 1)]
    rows = [
        PictureRow(row.label, [*_filled(prompt.controls, most), *row.pictures])
        for row, prompt in zip(pictures.rows, prompts, strict=True)
    ]
    return Pictures([*heads, *pictures.heads], rows)


def _filled(files: Sequence[str], most: int) -> list[Path | None]:
    """So many files, or places without one."""
    return [Path(files[number]) if number < len(files) else None for number in range(most)]


def _by_step(gallery: Gallery, steps: Mapping[int, Mapping[Spot, Path]]) -> Pictures:
    """All prompts at strength 1, by step."""
    shown = [step for step, pictures in steps.items() if any(spot.strength == 1 for spot in pictures)]
    rows = [
        PictureRow(prompt.prompt, [steps[step].get(Spot(number, 1.0)) for step in shown])
        for number, prompt in enumerate(gallery.prompts)
    ]
    return _with_controls(Pictures([str(step) for step in shown], rows), gallery.prompts)


def uses_of(config: TrainConfig, files: Sequence[Path], prompt: str, family: Family) -> list[Use]:
    """The commands that use an adapter, for the programs that read its files."""
    model = str(Path(str(config.model)).resolve()) if Path(str(config.model)).exists() else str(config.model)
    files = [file.resolve() for file in files]
    base = ["--base", config.base] if config.base else []
    words = ["-p", prompt or "...", "--lora", str(files[0]), "-o", "picture.png"]
    uses = [Use("diffpeft", shlex.join(["diffpeft", "generate", "-m", model, *base, *words]))]
    read_by = {file: converters.inspect(file).readable_by for file in files if file.is_file()}
    for program, command in _COMMANDS.items():
        files_read = [file for file, programs in read_by.items() if program in programs]
        names = {"model": model, "pipeline": type(family.pipe).__name__}
        lines = [_line(command, file, str(config.name), names) for file in for_a_program(files_read, str(config.name))]
        if lines:
            uses.append(Use(program, "\n".join([lines[0], *(line.split("\n")[-1] for line in lines[1:])])))
    return uses


def _line(command: str, file: Path, name: str, names: Mapping[str, str]) -> str:
    """A command for a file."""
    return command.format(file=file, quoted=shlex.quote(str(file)), second=for_the_second(name, file), **names)


_COMMANDS = {
    "diffusers": 'pipe = {pipeline}.from_pretrained("{model}")\npipe.load_lora_weights("{file.parent}", weight_name="{file.name}"{second})',
    "ComfyUI": "cp {quoted} ComfyUI/models/loras/   # then the node Load LoRA",
    "A1111": "cp {quoted} models/Lora/   # then in a prompt: <lora:{file.stem}:1>",
}


@dataclass
class RunShown:
    """What shows a run while it trains: samples, if any are drawn, and the page.

    Args:
        every: steps between two times that samples are drawn; 0: they are not.
    """

    run: TrainRun
    live: Live
    sampler: Sampler | None
    every: int
    log: Logbook

    def events(self, events: Events) -> Events:
        """The events of the run: samples at the beginning, every so many steps and at the end, each time with a new page; a page at least at both ends."""

        def step(done: int, loss: float) -> None:
            events.step(done, loss)
            self.live.step(done, loss)

        steps = self.run.config.steps
        ends = [] if self.every and steps % self.every == 0 else [(steps, self.at)]
        return replace(events, step=step, at=[*events.at, *([(self.every, self.at)] if self.every else []), *ends])

    def at(self, step: int) -> None:
        """Draw after so many steps, and renew the page."""
        if self.sampler is not None and (pictures := self.sampler(step)):
            self.log.images(step, {f"sample/{path.stem}": path for path in pictures})
        self.live.renew()

    def end(self) -> None:
        """The steps are done. The adapter may be that of an earlier one: what it draws is seen too."""
        draws = team().main or team().sharded
        if self.run.best is not None and self.sampler is not None and draws:
            self.sampler(self.run.best.step)
        self.live.renew()


def showing(
    run: TrainRun,
    drawing: Drawing,
    keeper: Keeper,
    rate: Callable[[int], float],
    log: Logbook,
    watch: Watch,
    clock: Stopwatch,
) -> RunShown:
    """What shows a run whose adapter is on its model. Samples of steps that it has not done are removed, and the page is written."""
    config = run.config
    if team().main:
        forget(config.output(), keeper.resume.step if keeper.resume else -1)
    sampler = _sampler(run, drawing, watch) if drawing.prompts else None
    page = page_of(config, f"diffpeft: {run.name}", run.account.lines(), run.origins)
    page = replace(page, losses=losses_until(keeper.resume))
    run.live = Live(
        config.output() / PAGE, page, rate, functools.partial(_changes, run, sampler), keeper.command, clock
    )
    run.live.renew()
    every = config.save_every or config.steps if config.sample_every is None else config.sample_every
    return RunShown(run, run.live, sampler, every, log)


def _sampler(run: TrainRun, drawing: Drawing, watch: Watch) -> Sampler:
    config, family, name = run.config, run.family, run.name
    other = drawing.family is not family
    ready = (
        functools.partial(other_stage, family, name, drawing.family)
        if other
        else functools.partial(stage, family, name)
    )
    model = Path(str(config.sample_model or config.model)).name
    start = config.sample_start or 0.0
    gallery = Gallery(config.output(), drawing.prompts, model, start, config.EVERY, config.FIRST, family.rate or 16.0)
    return Sampler(gallery, name, drawing.texts, ready, config.init_from is not None, config.sample_first, watch.tick)


def _changes(run: TrainRun, sampler: Sampler | None) -> Json:
    """What there is to show of a run by now: samples, held-out losses and the best step."""
    changes: Json = {"heldout": tuple(run.heldout), "best": run.best}
    if (measured := next((loss for loss in run.heldout if loss.step == run.step), None)) is not None:
        changes["measures"] = {"heldout_loss": measured.table()}
    steps = sampler.gallery.pictures() if sampler else {}
    if sampler and steps:
        until = {step: pictures for step, pictures in steps.items() if run.best is None or step <= run.best.step}
        changes["before_after"] = _strengths(sampler.gallery, until or steps)
        changes["samples"] = _by_step(sampler.gallery, steps)
        changes["drawn_on"] = sampler.gallery.model if run.config.sample_model else ""
    return changes


@contextlib.contextmanager
def told(run: TrainRun) -> Iterator[None]:
    """What ends this block before its time is on the page of a run."""
    with run.live.told() if run.live else contextlib.nullcontext():
        yield


def finish(run: TrainRun, files: Sequence[Path], readers: Mapping[str, str]) -> None:
    """Write the page of a run that has ended well, and whose files are written."""
    if run.live is None:
        return
    prompt = next((row.label for row in run.live.page.before_after.rows), "") if run.live.page.before_after else ""
    uses = uses_of(run.config, files, prompt or run.config.instance_prompt or "", run.family) if files else []
    others = [path for name in _OTHERS if (path := run.live.path.with_name(name)).is_file()]
    run.live.renew({"status": FINISHED, "files": [*files, *others], "readers": readers, "uses": uses})


_OTHERS = (README, METRICS, ROWS, CONFIG, ACCOUNT)  # that a run may have written
