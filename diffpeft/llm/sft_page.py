"""The page of a fine-tuning run: its losses, answers and losses on what it is not trained on, before and by now."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from diffpeft.llm.sft_config import SftConfig
from diffpeft.train.heldout import HeldoutLoss, ratio_error
from diffpeft.train.outputs import PAGE
from diffpeft.train.report import FINISHED, Page, Use
from diffpeft.train.report.live import Live
from diffpeft.train.showing import losses_until, page_of

if TYPE_CHECKING:
    from diffpeft.train.checkpoints import SavedState
    from diffpeft.train.journal import Logbook
    from diffpeft.train.loop import Events


class Measured(NamedTuple):
    """The losses of held-out examples, each the sum over so many tokens, and the answers to some questions."""

    losses: list[float]
    tokens: list[int]
    answers: list[str]

    @property
    def loss(self) -> float:
        """The mean loss of a token; 0 if there are no examples."""
        return sum(self.losses) / max(sum(self.tokens), 1)

    def compared(self, before: Measured, step: int) -> HeldoutLoss:
        """It beside what was measured before, with the standard error of the difference over the examples."""
        gap = np.subtract(before.losses, self.losses)
        error = ratio_error(gap, np.array(self.tokens)) if sum(self.tokens) else 0.0
        return HeldoutLoss(step, before.loss, self.loss, error, (), len(self.losses))


class SftPage:
    """Who shows a run. It is measured before the first step, where states are saved, and at the end.

    Args:
        measure: measures the model as it is, and leaves it as it was.
        rows: questions with what was expected, from the answers before and now.
        heldout: whether there are held-out examples.
    """

    def __init__(
        self,
        config: SftConfig,
        origins: Mapping[str, str],
        measure: Callable[[], Measured],
        rows: Callable[[Sequence[str], Sequence[str]], list[dict[str, str]]],
        heldout: bool,
    ):
        self.config, self.measure, self.rows, self.heldout = config, measure, rows, heldout
        self.before = self.now = measure()
        self.losses: list[HeldoutLoss] = []
        self.log: Logbook | None = None
        page = page_of(config, f"diffpeft: {config.output().name}", origins=origins)
        self.live = Live(config.output() / PAGE, page, changes=self._changes)
        self._keep(0)

    def _keep(self, step: int) -> None:
        if self.heldout:
            self.losses.append(self.now.compared(self.before, step))
            if self.log is not None:
                self.log.measured(self.losses[-1])

    def _changes(self) -> dict[str, object]:
        rows = self.rows(self.before.answers, self.now.answers)
        losses = self.losses[-1].table() if self.losses else {}
        return {
            "answers": rows,
            "heldout": tuple(self.losses) if len(self.losses) > 1 else (),
            "measures": {"heldout_loss": losses} if self.heldout else {},
        }

    def begin(self, rate: Callable[[int], float], resumed: SavedState | None, command: str, log: Logbook) -> None:
        """Write the page of a run that begins, or goes on from a state. `log` is told of what is measured."""
        self.log = log
        if self.losses and resumed is None:
            log.measured(self.losses[0])
        self.live.rate, self.live.command, self.live.losses = rate, command, losses_until(resumed)
        self.live.renew()

    def events(self, events: Events) -> Events:
        """The events of the run, of each of which the page is told."""

        def step(done: int, loss: float) -> None:
            events.step(done, loss)
            self.live.step(done, loss)

        return replace(events, step=step, at=[*events.at, (self.config.save_every or self.config.steps, self.at)])

    def at(self, step: int) -> None:
        """Measure after so many steps, and renew the page."""
        if 0 < step < self.config.steps:
            self.now = self.measure()
            self._keep(step)
            self.live.renew()

    def end(self) -> Measured:
        """Measure after the last step."""
        self.now = self.measure()
        self._keep(self.config.steps)
        self.live.renew()
        return self.now

    def finished(self, files: Sequence[Path], out: Path) -> Page:
        """The page of a run that has ended well, whose files are in `out`."""
        out = out.resolve()
        load = f'model = AutoModelForCausalLM.from_pretrained("{self.config.model}")\nmodel = PeftModel.from_pretrained(model, "{out}")'
        serve = f"vllm serve {shlex.quote(str(self.config.model))} --enable-lora --lora-modules {out.name}={shlex.quote(str(out))}"
        uses = [Use("Python (diffpeft or peft)", load), Use("vLLM", serve)]
        readers = {"adapter_model.safetensors": "read by diffpeft, PEFT, transformers, vLLM"}
        return self.live.current({"status": FINISHED, "files": files, "readers": readers, "uses": uses})
