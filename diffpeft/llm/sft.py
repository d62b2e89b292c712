"""Supervised fine-tuning of a language model: load, attach, train, measure, save."""

from __future__ import annotations

import contextlib
import inspect
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpeft.errors import CheckpointError, NothingLearntError, inside, listed
from diffpeft.io import replacing
from diffpeft.layers.backends import BACKENDS
from diffpeft.llm import texts
from diffpeft.llm.kbit import prepare_model_for_kbit_training
from diffpeft.llm.peft_model import PeftModel, get_peft_model, get_peft_model_state_dict
from diffpeft.llm.sft_check import GGUF, CheckedTexts, check
from diffpeft.llm.sft_config import SftConfig
from diffpeft.llm.sft_page import Measured, SftPage
from diffpeft.llm.texts import IGNORED, TokenExample
from diffpeft.methods.peft_config import TaskType
from diffpeft.model.placing import Placing
from diffpeft.model.state import trained_parameters
from diffpeft.model.target import targets_of
from diffpeft.pipeline.complete import complete_model, not_loaded
from diffpeft.pipeline.open import default_device, default_dtype, dtype_of
from diffpeft.train import draw, machines
from diffpeft.train.config import target_names
from diffpeft.train.groups import set_ranks
from diffpeft.train.job import checked_dtype, job_of, keeper_of
from diffpeft.train.journal import HELDOUT
from diffpeft.train.lock import occupied
from diffpeft.train.loop import Events, fit
from diffpeft.train.method import CONFIGS
from diffpeft.train.optimizers import rate_of
from diffpeft.train.origins import origins_of
from diffpeft.train.outcome import check_rank, check_room, refuse_idle, rescued
from diffpeft.train.outputs import METRICS, PAGE, README
from diffpeft.train.publish import open_repository, upload
from diffpeft.train.shards import shard
from diffpeft.train.state import fingerprint, read
from diffpeft.train.team import meet, team
from diffpeft.train.watch import Logged, Quiet, Watch
from diffpeft.train.watching import logbook_of, tabulated

ANSWER = 48  # tokens of an answer that is shown in the report
Sequences = Sequence[Sequence[TokenExample]]


@dataclass
class SftRun:
    """A finished run: the options as they were used, the PeftModel, the losses by step, held-out losses and answers before and after."""

    config: SftConfig
    model: PeftModel
    tokenizer: texts.Tokenizer
    losses: list[float]
    heldout_loss: dict[str, float]
    answers: list[dict[str, str]]
    learnt_tokens: int
    seconds: float
    shown: SftPage

    @property
    def report(self) -> Path:
        """The page that shows the run."""
        return self.shown.live.path


def train(config: SftConfig, watch: Watch | None = None, checked: CheckedTexts | None = None) -> SftRun:
    """Train an adapter. Writes states of the run; `save` writes the adapter. `checked` is what `check` said, where that has been asked already.

    Raises ConfigError, DataError, CheckpointError, UnknownNameError, AdapterStateError (another run writes there), DivergedError or
    NothingLearntError; Interrupted after a signal.
    """
    checked = checked or check(config)
    with occupied(config.output()), meet().together():
        return _trained(config, checked, (watch or Logged()) if team().main else Quiet())


def _trained(typed: SftConfig, checked: CheckedTexts, watch: Watch) -> SftRun:
    if team().main:
        open_repository(typed)
    start, device = time.perf_counter(), default_device()
    config = resolved(typed, device)
    watch.phase("loading the model")
    tokenizer, model = open_model(config, device)
    examples, heldout = (
        texts.examples(part, tokenizer, where=where, max_length=config.max_length, loss=config.loss)
        for part, where in zip((checked.rows, checked.heldout), (config.data, config.heldout), strict=True)
    )
    sequences = texts.packed(examples, config.max_length) if config.packing else [[e] for e in examples]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = adapt(config, model)
        loss = Loss(model, tokenizer.pad_token_id)
        measure = Measure(loss, tokenizer, *_measured(config, examples, heldout), config.batch_size, watch)
        said = origins_of(typed, config, checked.origins)
        watch.phase("measuring")
        shown = SftPage(config, said, measure, measure.rows, bool(heldout))
        with shown.live.told():
            losses = _fitted(typed, config, loss, sequences, checked, shown, watch)
        after = shown.now
        model.eval()
    return SftRun(
        config,
        model,
        tokenizer,
        losses,
        after.compared(shown.before, config.steps).table() if heldout else {},
        measure.rows(shown.before.answers, after.answers),
        sum(texts.tokens(drawn(config, sequences, step)) for step in range(config.steps)),
        time.perf_counter() - start,
        shown,
    )


def resolved(typed: SftConfig, device: str) -> SftConfig:
    """The options with what their defaults come to."""
    return replace(
        typed,
        num_processes=machines.several() or typed.num_processes,
        dtype=checked_dtype(typed.dtype or machines.precision() or default_dtype(device), device),
        alpha=typed.rank if typed.alpha is None else typed.alpha,
        lr=rate_of(typed),
    )


def _measured(
    config: SftConfig, examples: Sequence[TokenExample], heldout: Sequence[TokenExample]
) -> tuple[Sequence[TokenExample], Sequence[TokenExample]]:
    """The examples that the loss is measured on, and those whose questions are answered; of several processes the main one's."""
    if not (team().main or machines.sharding(config)):  # a sharded model computes in all processes or in none
        return [], []
    questions = [e for e in heldout or examples if 0 < len(e.prompt) < len(e.ids)]
    return heldout, questions[: config.samples]


def _fitted(
    typed: SftConfig,
    config: SftConfig,
    loss: Loss,
    sequences: Sequences,
    checked: CheckedTexts,
    shown: SftPage,
    watch: Watch,
) -> list[float]:
    """Train the adapter; the losses by step. Raises OSError without room for its files, DivergedError or NothingLearntError."""
    watch.phase("training")
    model = loss.model
    model.train()
    trained = trained_parameters(model.get_base_model(), model.active_adapters[0])
    if machines.sharding(config):
        shard(model.get_base_model(), set(trained.values()))
    check_room(config.output(), list(trained.values()), 1, config)
    reads = {"data": fingerprint([[example.ids for example in sequence] for sequence in sequences])}
    keeper = keeper_of(
        typed,
        config,
        config.name_by_output(),
        reads,
        lambda folder, step: model.save_pretrained(folder / "adapter"),
        checked.state,
        "sft",
    )
    job = job_of(config, trained, StepLoss(config, loss, sequences))
    clock, done = shown.live.clock, checked.state.step if checked.state else 0
    log = logbook_of(config, config.name_by_output(), done, clock, watch)
    with contextlib.closing(tabulated(log, config, job.optimizer, HELDOUT if shown.heldout else ())):
        shown.begin(job.schedule.at, checked.state, keeper.command, log)
        losses = fit(job, keeper, shown.events(replace(Events.of(watch, config.steps), log=log)), clock)
        watch.phase("measuring")
        shown.end()
    refuse_idle(model.get_base_model(), model.active_adapters[0], config.allow_unchanged)
    return losses


class StepLoss:
    """The loss by step and part: a step is a draw of batch_size x parts sequences, a part of it is as many as are computed at once.

    The loss of a part is its sum over the tokens that are learnt, divided by how many the whole step has: accumulating changes nothing.
    """

    def __init__(self, config: SftConfig, loss: Loss, sequences: Sequences):
        self.config, self.loss, self.sequences = config, loss, sequences

    def __call__(self, step: int, part: int) -> Tensor:
        """The share [] of a part in the loss of a step."""
        rows, size = drawn(self.config, self.sequences, step), self.config.batch_size
        return self.loss.total(rows[part * size : (part + 1) * size]) / texts.tokens(rows)


def open_model(config: SftConfig, device: str) -> tuple[texts.Tokenizer, nn.Module]:
    """The tokenizer and the model. Raises CheckpointError if they cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(str(config.model))
    gguf = {"gguf_file": source.name} if source.suffix == GGUF else {}
    where = str(source.parent if gguf else source) if source.exists() else str(config.model)
    dtype = dtype_of(str(config.dtype))
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **gguf)
        model = complete_model(
            AutoModelForCausalLM, where, "the model", dtype=dtype, **gguf, **_quantised(config, dtype, device)
        )
    except (MemoryError, NotImplementedError, CheckpointError):
        raise
    except Exception as error:  # transformers and its libraries raise all kinds for a model that cannot be read
        raise not_loaded(error, config.model) from error
    if config.quantize in _BY_TRANSFORMERS:
        return tokenizer, model
    return tokenizer, Placing(device, config.quantize)(model)


def _quantised(config: SftConfig, dtype: torch.dtype, device: str) -> dict[str, object]:
    """The keywords with which transformers loads a base in few bits; none where it does not do that."""
    made = _BY_TRANSFORMERS.get(config.quantize or "")
    return {} if made is None else {"quantization_config": made(dtype), "device_map": {"": device}}


_BY_TRANSFORMERS = {option: made for backend in BACKENDS for option, made in backend.loaded.items()}


def adapt(config: SftConfig, model: Any) -> PeftModel:
    """The model with a fresh adapter on it, as a PeftModel; its base is frozen."""
    checkpointing = {"use_reentrant": False}
    if config.quantize in _BY_TRANSFORMERS:
        prepare_model_for_kbit_training(model, config.gradient_checkpointing, checkpointing)
    elif config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    layers = targets_of(model)
    check_rank(config, [layer for layer, _ in layers.values()])
    if config.init_from:
        return adopted(config.init_from, model)
    settings = CONFIGS[config.method](config)
    set_ranks(settings, config, list(layers))
    settings.task_type, settings.target_modules = TaskType.CAUSAL_LM, targets(config.targets)
    return get_peft_model(model, settings)


def adopted(folder: str, model: nn.Module) -> PeftModel:
    """The model with the adapter of a PEFT folder, to go on with. Raises CheckpointError and its kin."""
    with inside("--init-from", config=True):
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def targets(names: str | Sequence[str]) -> str | Sequence[str] | None:
    """What PEFT's target_modules says: `default` is None, names with commas are a list, all else is as it is."""
    chosen = target_names(names, ("all-linear", "default"))
    return None if chosen == "default" else chosen


class Loss:
    """Cross-entropy of the tokens that are learnt, in fp32.

    Logits are computed only where in some sequence the next token is learnt, if the model can do that (`logits_to_keep`): they need most memory.
    """

    def __init__(self, model: PeftModel, pad: int | None):
        self.model, self.pad = model, pad or 0  # padding is never read, so any token will do
        self.can_keep = "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters

    def total(self, sequences: Sequences) -> Tensor:
        """The sum over the tokens of a batch of sequences: a number []."""
        return self._crossed(sequences, "sum")

    def each(self, sequences: Sequences) -> Tensor:
        """The sum over the tokens of each of a batch of sequences [b]."""
        return self._crossed(sequences, "none").view(len(sequences), -1).sum(1)

    def _crossed(self, sequences: Sequences, reduction: str) -> Tensor:
        batch = {name: t.to(self.model.device) for name, t in texts.collated(sequences, self.pad).items()}
        following = batch.pop("labels")[:, 1:]
        keep = (following != IGNORED).any(0).nonzero().squeeze(1)
        wanted = {"logits_to_keep": keep} if self.can_keep else {}
        logits = self.model(**batch, use_cache=False, **wanted).logits
        logits = logits if self.can_keep else logits[:, keep]
        return F.cross_entropy(
            logits.float().flatten(0, 1), following[:, keep].flatten(), ignore_index=IGNORED, reduction=reduction
        )


def drawn(config: SftConfig, sequences: Sequences, step: int) -> list[Sequence[TokenExample]]:
    """The sequences of a step: passes through all of them, shuffled by the seed."""
    count = config.examples()
    return [sequences[i] for i in draw.order(len(sequences), step * count, count, config.seed, "rows")]


@dataclass
class Measure:
    """What is measured before and after: the loss of held-out examples, and answers to some questions."""

    loss: Loss
    tokenizer: texts.Tokenizer
    heldout: Sequence[TokenExample]
    questions: Sequence[TokenExample]
    batch_size: int
    watch: Watch

    @torch.no_grad()
    def __call__(self) -> Measured:
        """The mean loss of a learnt token, and the answers. The model goes on in the mode that it was in."""
        training, losses = self.loss.model.training, list[float]()
        self.loss.model.eval()
        for start in range(0, len(self.heldout), self.batch_size):
            losses += self.loss.each([[e] for e in self.heldout[start : start + self.batch_size]]).tolist()
            self.watch.tick()
        answers = [self._answer(e) for e in self.questions]
        self.loss.model.train(training)
        return Measured(losses, [e.tokens for e in self.heldout], answers)

    def _answer(self, example: TokenExample) -> str:
        """What the model says to an example's prompt."""
        prompt = torch.tensor([example.prompt], device=self.loss.model.device)
        got = self.loss.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=ANSWER,
            do_sample=False,
            pad_token_id=self.loss.pad,
        )
        self.watch.tick()
        return self.tokenizer.decode(got[0, prompt.shape[1] :], skip_special_tokens=True)

    def rows(self, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
        """The questions, what was expected, and the answers before and after."""
        return [
            {"prompt": self._text(e.prompt), "expected": self._text(e.ids[len(e.prompt) :]), "before": b, "after": a}
            for e, b, a in zip(self.questions, before, after, strict=True)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def save(run: SftRun) -> list[Path]:
    """Write the adapter as a PEFT folder, metrics.json and report.html into the output folder; the paths.

    If that cannot be written, the files go into a temporary folder, which the OSError names. Of several processes only the main one writes.
    """
    if not machines.world().main:
        return []
    out = Path(run.config.out or "")
    with occupied(out):
        files = rescued(lambda folder: _written(run, folder), out, out.resolve().name)
    _refuse_other(run.model, files[0])
    return files


def push(run: SftRun) -> str:
    """Upload the adapter and its card to the repository of the run; the address. Raises HubError, which says how they are uploaded by hand."""
    files = ["adapter_*", README]
    return upload(run.model.save_pretrained, run.config, files, f"{len(run.losses)} steps")


def _refuse_other(model: PeftModel, file: Path) -> None:
    """Raise NothingLearntError if a file, read again, does not hold the tensors of the adapter."""
    learnt, written = get_peft_model_state_dict(model), read(file)
    other = [n for n in learnt.keys() | written.keys() if n not in written or n not in learnt]
    other += [n for n in learnt.keys() & written.keys() if not torch.equal(learnt[n].cpu(), written[n])]
    if other:
        raise NothingLearntError(f"the file does not hold what was learnt: {listed(sorted(other))}", where=file)


def _written(run: SftRun, out: Path) -> list[Path]:
    """Write the adapter, the measurements and the report into a folder; the paths."""
    run.model.save_pretrained(out)
    files = [out / name for name in ("adapter_model.safetensors", "adapter_config.json", METRICS, PAGE)]
    table = {
        "heldout_loss": run.heldout_loss or None,
        "losses": run.losses,
        "answers": run.answers,
        "seconds": round(run.seconds, 1),
        "steps": len(run.losses),
        "method": run.config.method,
        "learnt_tokens": run.learnt_tokens,
    }
    table = {**run.shown.live.clock.usage().table(run.config.examples()), **table}
    with replacing(out / METRICS) as f:
        f.write(json.dumps(table, indent=1).encode())
    run.shown.finished(files, out).write(out / PAGE)
    return files
