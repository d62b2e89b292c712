"""The model card of a run, OUT/README.md: what the Hub wants to know, how the files are used, and what they were trained on; nothing of the machine.

A README.md that is not ours is kept, and its head completed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import diffpeft
from diffpeft.families import Family, family_of
from diffpeft.io import replacing
from diffpeft.train.cards import CardFacts, completed, tell
from diffpeft.train.data.account import Account, footage_of
from diffpeft.train.formats import FIRST, SECOND, for_a_program, for_the_second, half_of
from diffpeft.train.gallery import newest_samples, record_of
from diffpeft.train.metadata import is_id
from diffpeft.train.outputs import README
from diffpeft.train.prompt_account import PromptAccount
from diffpeft.train.run import TrainRun

OURS = "<!-- written by diffpeft train; a card without this line is kept -->"
# {family: what the Hub's search calls it}
_TAGS = {
    "sd15": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sd2": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sdxl": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "flux": ("flux", "flux-diffusers"),
}


def write_card(
    run: TrainRun, folder: Path, readers: Mapping[str, Sequence[str]], repository: str | None = None
) -> Path:
    """Write the card into a folder; its path. `readers`: {file: which programs read it}; `repository`: where on the Hub the files are."""
    from huggingface_hub import ModelCard

    path, facts = folder / README, _facts(run, folder)
    there = path.read_bytes().decode(errors="replace") if path.is_file() else OURS
    if OURS in there:
        card = ModelCard(
            f"---\nlibrary_name: diffusers\n---\n\n{_text(run, readers, repository or folder.resolve().name)}"
        )
        tell(card, facts)
        text: str | None = str(card)
    else:
        text = completed(folder, facts)
    if text is not None:
        with replacing(path) as f:
            f.write(text.encode(errors="replace"))
    return path


def _facts(run: TrainRun, folder: Path) -> CardFacts:
    """What the head says."""
    config, words = run.config, prompt_of(run)
    family, model = family_of(run.family.pipe) or "", config.model or ""
    low_rank = ("lora", "template:sd-lora") if config.method in ("lora", "dora") else ()
    tags = {task_of(run.family), "diffusers", "diffpeft", config.method, *low_rank, *_TAGS.get(family, ())}
    more = {
        "license": config.license,
        "instance_prompt": words,
        "base_model_relation": "adapter" if is_id(model) else None,
        "widget": _widget(folder, words),
    }
    return CardFacts(
        model if is_id(model) else None,
        frozenset(tags),
        task_of(run.family),
        f"- diffpeft {diffpeft.__version__}",
        "diffusers",
        {name: value for name, value in more.items() if value},
    )


def prompt_of(run: TrainRun) -> str | None:
    """A prompt that shows what was learnt."""
    trigger, instance = run.config.trigger, run.config.instance_prompt
    return instance.replace("[trigger]", trigger or "[trigger]") if instance else trigger


def _widget(folder: Path, words: str | None) -> list[dict[str, object]]:
    """The newest pictures, one for each prompt, that a run drew with the adapter, with their prompts as the pictures say them."""
    rows = [(_prompt_in(path) or words, path.relative_to(folder)) for path in newest_samples(folder).values()]
    return [{"text": text, "output": {"url": place.as_posix()}} for text, place in rows if text]


def _prompt_in(path: Path) -> str | None:
    """The prompt that a picture says it was drawn for."""
    facts = record_of(path).get("facts")
    prompt = facts.get("prompt") if isinstance(facts, dict) else None
    return prompt if isinstance(prompt, str) else None


def _text(run: TrainRun, readers: Mapping[str, Sequence[str]], place: str) -> str:
    """The card below its head."""
    config, words = run.config, prompt_of(run)
    trigger = config.trigger or config.instance_prompt
    parts = [
        OURS,
        f"# {run.name}",
        config.description or "",
        f"A {_METHODS.get(config.method, config.method)} for {_model(run)}, trained with diffpeft.",
        "<Gallery />",
        f"Put `{trigger}` into the prompt." if trigger else "",
        "## Use",
        *_uses(run, readers, place, words or "a photo"),
        "## Files",
        _table(
            ("file", "read by"),
            [(f"`{name}`", ", ".join(programs) or "diffpeft alone") for name, programs in readers.items()],
        ),
        "## Training",
        _table(("", ""), [(name, str(value)) for name, value in _training(run).items() if value is not None]),
        "### Framework versions",
        f"- diffpeft {diffpeft.__version__}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_METHODS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "boft": "BOFT"}


def _model(run: TrainRun) -> str:
    """The base in words."""
    model = run.config.model or ""
    return (
        f"[{model}](https://huggingface.co/{model})"
        if is_id(model)
        else f"`{Path(model).name}` ({run.family.architecture})"
    )


def _uses(run: TrainRun, readers: Mapping[str, Sequence[str]], place: str, prompt: str) -> list[str]:
    """How each program that reads a file uses it."""
    model = run.config.model or ""
    base = model if is_id(model) else Path(model).name
    file, *_ = readers
    of = {
        program: for_a_program([Path(name) for name, by in readers.items() if program in by], run.name)
        for program in _PROGRAMS
    }
    drawing, *helpers = _DRAWING[task_of(run.family)]
    imports = (
        "import torch",
        "from diffusers import DiffusionPipeline",
        *([f"from diffusers.utils import {', '.join(helpers)}"] if helpers else []),
    )
    opening = f"pipe = DiffusionPipeline.from_pretrained({base!r}, torch_dtype=torch.bfloat16)"
    ours = f"{place!r}, filename={file!r}" if is_id(place) else repr(f"{place}/{file}")
    drawing = drawing.format(prompt=repr(prompt), image="control_image" if run.family.aligned else "image")
    loading = {
        "diffusers": [
            f"pipe.load_lora_weights({place!r}, weight_name={path.name!r}{for_the_second(run.name, path)})"
            for path in of["diffusers"]
        ],
        "diffpeft": [f"diffpeft.load_lora(pipe, {ours})"],
    }
    blocks = [
        f"With {program}:\n\n{_code(*['import diffpeft'] * (program == 'diffpeft'), *imports, '', opening, *lines, drawing)}"
        for program, lines in loading.items()
        if lines
    ]
    nodes = [f"`{path.name}`{_BEFORE[half_of(run.name, path)]}" for path in of["ComfyUI"]]
    comfy = f"With ComfyUI: put {' and '.join(nodes)} into `models/loras`, and load it with the node Load LoRA."
    return [*blocks, comfy] if nodes else blocks


_PROGRAMS = ("diffusers", "ComfyUI")
_BEFORE = {None: "", FIRST: " (for the model of much noise)", SECOND: " (for the model of little noise)"}
# {task: how a pipeline is used, and diffusers' functions for that}
_DRAWING = {
    "text-to-image": ("pipe({prompt}).images[0].save('picture.png')",),
    "image-to-image": (
        "pipe({image}=load_image('control.png'), prompt={prompt}).images[0].save('picture.png')",
        "load_image",
    ),
    "text-to-video": ("export_to_video(pipe({prompt}).frames[0], 'clip.mp4')", "export_to_video"),
    "image-to-video": (
        "export_to_video(pipe(image=load_image('first.png'), prompt={prompt}).frames[0], 'clip.mp4')",
        "export_to_video",
        "load_image",
    ),
}


def task_of(family: Family) -> str:
    """What a model does, in the Hub's words."""
    if family.temporal is not None:
        return "image-to-video" if family.first_frame else "text-to-video"
    return "image-to-image" if family.controls[0] else "text-to-image"


def _code(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _training(run: TrainRun) -> dict[str, object]:
    """What the adapter follows from, without places on a machine."""
    config = run.config
    facts: dict[str, object] = {
        "data": data_of(run.account),
        "method": f"{_METHODS.get(config.method, config.method)}, rank {config.rank}, alpha {config.alpha:g}"
        if config.alpha
        else None,
        "targets": config.targets if isinstance(config.targets, str) else ", ".join(config.targets),
        "text encoder": "trained too" if config.train_text_encoder else None,
        "steps": run.step,
        "batch": config.examples(),
        "learning rate": f"{config.lr:g}, {config.lr_scheduler}" if config.lr else None,
        "optimiser": config.optimizer,
        "resolution": run.account.resolution,
        "loss": config.loss,
        "prior": config.prior,
        "seed": config.seed,
    }
    if run.heldout:
        facts["held-out loss"] = str(run.heldout[-1])
    return facts


def data_of(account: Account) -> str:
    """How many images of what sizes a run was trained on, and where their captions are from; or which prompts."""
    if isinstance(account, PromptAccount):
        return "; ".join([account.summary(), *account.plan()])
    captions = ", ".join(f"{n} from {source}" for source, n in account.captions.items())
    sizes = ", ".join(f"{n} of {w}x{h}" for (w, h), n in account.buckets.items())
    parts = [
        footage_of(account.examples),
        sizes and f"pictures: {sizes}",
        captions and f"captions: {captions}",
    ]
    return "; ".join(filter(None, parts))


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    """A table in Markdown."""
    cells = [head, ("---", "---"), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in cells
    )
