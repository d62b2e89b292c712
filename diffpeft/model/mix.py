"""Mix: which adapters of one component are active, in which order, and how strong each is on each layer.

A component has one Mix, its adapted layers hold it, and it holds names and numbers only, so deepcopy and pickle of the model work.
`adapters(...)` puts another choice in force for one thread and one block, and a root (root.py) one for each call where strengths change from
step to step or from row to row.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffpeft.bundle import Entry, Handle, dotted
from diffpeft.errors import AdapterStateError, ConfigError, UnknownNameError, near, shown
from diffpeft.methods.config import is_fp32
from diffpeft.model.arena import Arena
from diffpeft.model.schedule import Clock, ScaledSchedule, Schedule
from diffpeft.model.scope import Block, Scope
from diffpeft.model.target import spellings

Level = float | Schedule
Strength = Level | Mapping[str, Level]
Given = Mapping[str, Strength]
Result = TypeVar("Result")
Chosen = Mapping[str, "Choice"]  # by mix key
Held = Mapping[str, "Choice | Moment"]
NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")

_scope: Scope[Held] = Scope("diffpeft_mix")  # {mix key: choice} of the `adapters(...)` blocks
_here = (
    threading.local()
)  # `choices`: all of these as one, or absent: for compiled code, which cannot read what a context holds
# the blocks of all threads that claim their adapters, by id
_running: weakref.WeakValueDictionary[int, Block[Chosen]] = weakref.WeakValueDictionary()
_keys = itertools.count()


@dataclass(frozen=True, eq=False)
class Moment:
    """What layers read of a choice: for one step and one batch, or always the same where nothing depends on the call."""

    of: Choice
    strengths: Mapping[str, Sequence[float]]  # by adapter, of each layer
    table: Tensor  # the same as [active adapter, layer], fp32: what compiled code reads
    rows: tuple[Moment, ...] = ()  # one a prompt; the fields above are of the first that has an adapter then
    batch: int = 0  # how many rows the batch has, 0 if that is not known

    @property
    def order(self) -> tuple[str, ...]:
        """The active adapters in activation order."""
        return self.of.order

    @property
    def images(self) -> int:
        """How many rows of a batch a prompt has."""
        return self.of.images


@dataclass(frozen=True)
class Single:
    """What was set on one layer by itself: its active adapters in order, how strong adapters are (1 where it is not said), and whether any acts."""

    active: tuple[str, ...]
    strengths: Mapping[str, Level] = field(default_factory=dict)
    enabled: bool = True

    def level(self, name: str) -> Level:
        """How strong an adapter acts on the layer."""
        return self.strengths.get(name, 1.0) if self.enabled and name in self.active else 0.0


@dataclass(frozen=True, eq=False)
class Choice:
    """What was set: active adapters in activation order, and the strength of each on each layer, a number or a schedule."""

    order: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)  # as the user said it
    levels: Mapping[str, Sequence[Level]] = field(default_factory=dict)  # by adapter, of each layer
    clock: Clock | None = None  # tells the step, where a level is a schedule
    rows: tuple[Choice, ...] = ()  # one a prompt; `levels` are of the first that has an adapter then, `asked` of each
    images: int = 1  # how many rows of a batch a prompt has
    live: bool = False  # whether layers read another moment from call to call
    enabled: bool = True  # whether it is what was set, or adapters are switched off for a while
    singles: Mapping[int, Single] = field(default_factory=dict)  # of layers by themselves, which `levels` have in them
    first: Moment = field(init=False)  # that of the first step
    kept: dict[Any, Any] = field(default_factory=dict, init=False)  # what was made of this choice before

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", self._moment(0.0, 0))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "kept": {}}

    @property
    def strengths(self) -> Mapping[str, Sequence[float]]:
        """The levels as numbers: always, or in the first step."""
        return self.first.strengths

    def single(self, index: int) -> Single:
        """What holds on one layer, as if it had been set there. Adapters that are not on it may be among the active ones, as in PEFT."""
        if index in self.singles:
            return self.singles[index]
        active = tuple(name for name in self.order if not self.singles or self.levels[name][index] != 0)
        return Single(active, {name: self.levels[name][index] for name in active}, self.enabled)

    def with_singles(
        self, singles: Mapping[int, Single], layers: Sequence[str], adapters: Mapping[str, Adapter]
    ) -> Choice:
        """This choice with other settings of some layers by themselves. An adapter that is active on none of its layers is so nowhere."""
        if not singles:
            return self
        of_adapter = _columns_of(layers, adapters)
        here = [[name for name in single.active if i in of_adapter[name]] for i, single in singles.items()]
        order = dict.fromkeys((*_merged(self.order, here), *(n for single in singles.values() for n in single.active)))
        together = {**self.singles, **singles}
        levels = {name: _with_levels(self.levels.get(name, [0.0] * len(layers)), name, together) for name in order}

        def acts(name: str, index: int) -> bool:
            return name in together[index].active if index in together else levels[name][index] != 0

        active = tuple(name for name in order if any(acts(name, index) for index in of_adapter[name]))
        return replace(
            self,
            order=active,
            given={name: _said(layers, levels[name], of_adapter[name]) for name in active},
            levels={name: levels[name] for name in active},
            singles=together,
        )

    def scaled(self, by: float) -> Choice:
        """This choice with all strengths times a number."""
        return self if by == 1 else self._remembered(("scaled", by), lambda: self._scaled(by))

    def _scaled(self, by: float) -> Choice:
        levels = {name: [scaled_level(level, by) for level in column] for name, column in self.levels.items()}
        return replace(self, levels=levels, rows=tuple(row.scaled(by) for row in self.rows))

    def moment(self, fraction: float | None, batch: int = 0) -> Moment:
        """This choice at a step and for a batch."""
        return self._remembered((fraction, batch), lambda: self._moment(fraction, batch))

    def _remembered(self, key: object, make: Callable[[], Result]) -> Result:
        """What was made of this choice before under a key, else what `make` makes now."""
        if key not in self.kept:
            if len(self.kept) >= _KEPT:
                self.kept.clear()
            self.kept[key] = make()
        result: Result = self.kept[key]
        return result

    def _moment(self, fraction: float | None, batch: int) -> Moment:
        strengths, table = _numbers(self.order, self.levels, fraction or 0.0)
        return Moment(self, strengths, table, tuple(row.moment(fraction) for row in self.rows), batch)


def _columns_of(layers: Sequence[str], adapters: Mapping[str, Adapter]) -> dict[str, list[int]]:
    """{adapter: the columns of the layers that it is on}."""
    places = {layer: index for index, layer in enumerate(layers)}
    return {name: sorted({places[layer] for layer in (*a.layers, *a.modules)}) for name, a in adapters.items()}


def _with_levels(column: Sequence[Level], name: str, singles: Mapping[int, Single]) -> list[Level]:
    """An adapter's strengths by layer, with those of single layers."""
    return [singles[index].level(name) if index in singles else level for index, level in enumerate(column)]


def _merged(order: Sequence[str], others: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """An order with further names behind it; where one of the other orders contradicts it, that one comes first."""
    for other in others:
        together = dict.fromkeys((*order, *other))
        agrees = [name for name in together if name in other] == list(other)
        order = tuple(together if agrees else dict.fromkeys((*other, *order)))
    return tuple(order)


def _said(layers: Sequence[str], column: Sequence[Level], indices: Sequence[int]) -> Strength:
    """An adapter's strength as a user would say it: one number, or one for each of its layers."""
    if len({column[index] for index in indices}) == 1:
        return column[indices[0]]
    return {layers[index]: column[index] for index in indices}


_KEPT = 256  # moments: those of a few numbers of steps


@dataclass(frozen=True)
class Adapter:
    """One adapter of one component: its layers, and what its file held beside them."""

    name: str
    layers: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, Handle] = field(default_factory=dict)
    absent: tuple[Entry, ...] = ()  # entries for components that the pipeline lacks
    modules: tuple[str, ...] = ()  # those that it has a copy of (modules_to_save)


@dataclass
class Mix:
    """The strengths of one component."""

    component: str
    layers: tuple[str, ...] = ()  # the layer of each column; a column is never given to another layer
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)
    fused: Mapping[str, Strength] = field(
        default_factory=dict
    )  # adapters that are in the weights, in order, and how strong
    arena: Arena | None = field(default=None, compare=False, repr=False)  # where fused weights lie, or lay
    key: str = ""
    apart: bool = False  # of adapters that are no layers' (prompts): not the one that a component's layers share

    def __post_init__(self) -> None:
        self.key = f"mix{next(_keys)}"  # a copy is another mix: a thread's choice for the one is not for the other

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def divided(self) -> tuple[str, ...]:
        """The modules that adapters have copies of, or change the parameters of, while rows of a batch have a mix each."""
        if not any(adapter.modules for adapter in self.adapters.values()) or not self.standing().rows:
            return ()
        return tuple(dict.fromkeys(name for adapter in self.adapters.values() for name in adapter.modules))

    def blocks(self) -> list[Block[Chosen]]:
        """The `adapters(...)` blocks that are running, in all threads and tasks."""
        running = (
            reference() for reference in _running.valuerefs()
        )  # a list made at once: other threads enter blocks meanwhile
        return [block for block in running if block is not None and block.open and self.key in block.value]

    def running(self) -> list[Choice]:
        """The choices of these blocks."""
        return [block.value[self.key] for block in self.blocks()]

    def _held(self) -> Choice | Moment:
        """What holds here and now: that of this thread's or task's last block or call, or the one that was set."""
        if torch.compiler.is_compiling():
            return _here.choices.get(self.key, self.choice) if hasattr(_here, "choices") else self.choice
        for block in reversed(_scope.blocks):
            if self.key in block.value:
                return block.value[self.key]
        return self.choice

    def standing(self) -> Choice:
        """The choice that holds here and now."""
        held = self._held()
        return held.of if isinstance(held, Moment) else held

    def is_called(self) -> bool:
        """Whether a call of the model has told its layers their moment."""
        return isinstance(self._held(), Moment)

    def current(self) -> Moment:
        """The moment of it that layers apply. Outside of its model's call a layer is told the step by `schedule.step`."""
        held = self._held()
        if isinstance(held, Moment):
            return held
        if not held.live or torch.compiler.is_compiling():
            return held.first
        return held.moment(None if held.clock is None else held.clock.fraction())

    def chosen(self, asked: Given | Sequence[Given], clock: Clock | None = None, images: int = 1) -> Choice:
        """The choice in which the adapters in `asked` that this component has are active at these strengths."""
        return choose(self.component, self.layers, self.adapters, asked, clock, images)

    def changed(self, layers: Sequence[str], adapters: Mapping[str, Adapter], edit: Callable[[Given], Given]) -> Choice:
        """The choice that was set, with what was given edited (that of every prompt) and for these layers and adapters."""
        choice = self.choice
        asked = [edit(row.given) for row in choice.rows] if choice.rows else edit(choice.given)
        new = choose(self.component, layers, adapters, asked, choice.clock, choice.images)
        added = tuple(name for name in new.order if name not in choice.order)
        singles = {
            index: replace(single, active=(*(name for name in single.active if name in adapters), *added))
            for index, single in choice.singles.items()
        }
        return new.with_singles(singles, layers, adapters)

    def used(self, asked: Mapping[str, Strength]) -> set[str]:
        """The patterns in `asked` that match a layer of their adapter here."""
        return {
            pattern
            for name, strength in asked.items()
            if name in self.adapters and isinstance(strength, Mapping)
            for pattern in strength
            if any(leads_to(pattern, self.component, layer) for layer in self.adapters[name].layers)
        }


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` may name an adapter."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(
            f"adapter name {shown(name)}",
            remedy="A name is 1 to 128 letters, digits, dots, underscores and hyphens, and not . or .. alone.",
        )


def choose(
    component: str,
    layers: Sequence[str],
    adapters: Mapping[str, Adapter],
    asked: Given | Sequence[Given],
    clock: Clock | None = None,
    images: int = 1,
) -> Choice:
    """`asked`, for the adapters that this component has, worked out layer by layer; a list of them, one a prompt, for rows of a batch.

    A text encoder runs before the first step, and once a prompt.
    """
    if isinstance(asked, Mapping):
        return _of_one(component, layers, {name: s for name, s in asked.items() if name in adapters}, clock)
    rows = [choose(component, layers, adapters, mix, clock) for mix in asked]
    return _of_rows(rows, 1 if _is_early(component) else images)


def _is_early(component: str) -> bool:
    return component.startswith("text_encoder")


def _of_one(component: str, layers: Sequence[str], mix: Given, clock: Clock | None) -> Choice:
    """The choice of one mix, whose adapters this component has."""
    order = tuple(mix)
    levels = {name: _levels(strength, component, layers) for name, strength in mix.items()}
    scheduled = any(isinstance(level, Schedule) for of_adapter in levels.values() for level in set(of_adapter))
    if scheduled and _is_early(component):
        levels = {name: [*numbers] for name, numbers in _numbers(order, levels, 0.0)[0].items()}
        scheduled = False
    said = {name: dict(s) if isinstance(s, Mapping) else s for name, s in mix.items()}
    return Choice(order, said, levels, clock=(clock or Clock()) if scheduled else None, live=scheduled)


def _of_rows(rows: Sequence[Choice], images: int) -> Choice:
    """The choice of a list of mixes, one a prompt: with all adapters that any of them has."""
    of_adapter = {name: row for row in reversed(rows) for name in row.order}  # the first that has it
    order = tuple(dict.fromkeys(name for row in rows for name in row.order))
    return Choice(
        order,
        {name: tuple(row.given.get(name, 0.0) for row in rows) for name in order},
        {name: of_adapter[name].levels[name] for name in order},
        clock=next((row.clock for row in rows if row.clock is not None), None),
        rows=tuple(rows) if order else (),
        images=images,
        live=bool(order),
    )


def _numbers(
    order: Sequence[str], levels: Mapping[str, Sequence[Level]], fraction: float
) -> tuple[dict[str, Sequence[float]], Tensor]:
    """Strengths at a fraction of the steps, and as a table [adapter, layer]."""
    strengths: dict[str, Sequence[float]] = {}
    different = {name: set(levels[name]) for name in order}
    for name in order:
        now = {level: level.at(fraction) if isinstance(level, Schedule) else level for level in different[name]}
        values = [*now.values()]
        strengths[name] = values * len(levels[name]) if len(values) == 1 else [now[level] for level in levels[name]]
    layers = max((len(levels[name]) for name in order), default=0)
    if all(len(values) == 1 for values in different.values()):  # one number an adapter: a table is quickly made of them
        column = torch.tensor([strengths[name][0] for name in order], dtype=torch.float32, device="cpu")
        return strengths, column[:, None].repeat(1, layers)
    rows = [list(strengths[name]) for name in order]
    return strengths, torch.tensor(rows, dtype=torch.float32, device="cpu").reshape(len(order), layers)


def _levels(strength: Strength, component: str, layers: Sequence[str]) -> list[Level]:
    if not isinstance(strength, Mapping):
        return [_level(strength)] * len(layers)
    return [strength_on(strength, component, layer) for layer in layers]


def _level(strength: Level) -> Level:
    return strength if isinstance(strength, Schedule) else float(strength)


def scaled_level(level: Level, by: float) -> Level:
    """A strength times a number."""
    return ScaledSchedule(level, by) if isinstance(level, Schedule) else level * by


def strength_on(patterns: Mapping[str, Level], component: str, layer: str) -> Level:
    """The value of the pattern with most literal segments that matches, then the longer, then the later; 1 if none does."""
    if layer in patterns and not (component and dotted(component, layer) in patterns):  # the whole name
        return _level(patterns[layer])
    best, value = (-1, -1), _level(1.0)
    for pattern, strength in patterns.items():
        segments = [
            s for s in pattern.split(".") if s != "text_model"
        ]  # a level that may be there or not counts for nothing
        rank = (sum("*" not in s and "?" not in s for s in segments), len(segments))
        if rank >= best and leads_to(pattern, component, layer):
            best, value = rank, _level(strength)
    return value


def leads_to(pattern: str, component: str, layer: str) -> bool:
    """Whether `pattern` matches a leading run of whole segments of the layer's dotted name. CLIP's `text_model.` may be there or not."""
    spelt = spellings(layer) if component.startswith("text_encoder") else (layer,)
    names = {name for spelling in spelt for name in (spelling, dotted(component, spelling))}
    return any(_leads(pattern.split("."), name.split(".")) for name in names)


def _leads(pattern: list[str], name: list[str]) -> bool:
    return len(pattern) <= len(name) and all(_glob(p).fullmatch(s) for p, s in zip(pattern, name, strict=False))


def _glob(segment: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in segment))


def check_mix(asked: object, mixes: Iterable[Mix], components: Mapping[str, nn.Module] | None = None) -> None:
    """Raise unless `asked` is {known adapter: strength or {pattern that matches: strength}}.

    `components` are those of the pipeline: a pattern may name one of them that an adapter has no layers in, or a block of it.
    """
    mixes = list(mixes)
    if not isinstance(asked, Mapping):
        raise ConfigError(
            f"a mix is a dict of strengths by adapter name, not {shown(asked)}", remedy='For example {"style": 0.8}.'
        )
    known = {name for mix in mixes for name in mix.adapters}
    for name, strength in asked.items():
        if name not in known:
            raise UnknownNameError.of("adapter", name, known)
        check_strength(name, strength, schedules=True)
        if isinstance(strength, Mapping):
            used = set().union(*(mix.used({name: strength}) for mix in mixes))
            for pattern in strength:
                if pattern not in used and not _is_absent(pattern, name, mixes, components or {}):
                    raise _no_layer(name, pattern, mixes)


def _is_absent(pattern: str, name: str, mixes: Iterable[Mix], components: Mapping[str, nn.Module]) -> bool:
    """Whether a pattern is for a component of the pipeline, or a block of one, in which the adapter has no layers."""
    absent = components.keys() - {mix.component for mix in mixes if name in mix.adapters}
    return any(
        leads_to(pattern, component, module)
        for component in absent
        for module, _ in components[component].named_modules()
        if module
    )


def check_rows(
    asked: object, images: object, mixes: Iterable[Mix], components: Mapping[str, nn.Module] | None = None
) -> None:
    """Raise unless `asked` is a mix, or a list of mixes for so many images a prompt."""
    mixes = list(mixes)
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ConfigError(f"images_per_prompt is {shown(images)}", remedy="It is a number of images, at least 1.")
    if not isinstance(asked, (list, tuple)):
        return check_mix(asked, mixes, components)
    if not asked:
        raise ConfigError("the list of mixes is empty", remedy="Give one dict of strengths for each prompt.")
    for mix in asked:
        check_mix(mix, mixes, components)


def check_strength(name: str, strength: object, schedules: bool = False) -> None:
    """Raise ConfigError unless `strength` is a finite number (or a schedule) or {pattern: such a number}."""
    for where, value in strength.items() if isinstance(strength, Mapping) else [("", strength)]:
        if isinstance(where, str) and schedules and isinstance(value, Schedule):
            continue
        if not isinstance(where, str) or not is_fp32(value):
            raise ConfigError(
                f"the strength of {shown(name)}{f' at {shown(where)}' if where else ''} is {shown(value)}",
                remedy="A strength is a finite number that fp32 can hold, or a dict of such numbers by component or block."
                + (" In set_adapters it may be a diffpeft.schedule." if isinstance(value, Schedule) else ""),
            )


def _no_layer(name: str, pattern: str, mixes: list[Mix]) -> UnknownNameError:
    names = [
        dotted(mix.component, layer) for mix in mixes if name in mix.adapters for layer in mix.adapters[name].layers
    ]
    prefixes = {".".join(n.split(".")[:k]) for n in names for k in range(1, n.count(".") + 2)}
    return UnknownNameError(
        f"pattern {shown(pattern)} matches no layer of adapter {shown(name)}",
        remedy=f"{near(pattern, prefixes)} A pattern is a component or a block, such as 'unet.up_blocks.*'.".strip(),
    )


def claim(choices: Mapping[str, Choice]) -> Block[Chosen]:
    """A block with these choices, by mix key: while it is open, its adapters cannot be unloaded. It is not in force yet."""
    block = Block(choices)
    _running[id(block)] = block
    return block


@contextlib.contextmanager
def forced(block: Block[Chosen]) -> Iterator[None]:
    """The choices of `block` hold in this thread or task inside this one, after which they never hold again."""
    try:
        _scope.enter(block)
        show_compiled()
        yield
    finally:
        block.open = False  # it is out of force from here on, whatever happens to the rest
        try:
            _settle_ended(block)
        except BaseException:  # an interrupt
            _settle_ended(block)
            raise


def _settle_ended(block: Block[Chosen]) -> None:
    _running.pop(id(block), None)
    _scope.forget_ended()
    show_compiled()


def show_compiled() -> None:
    """Let compiled code see, in this thread, what holds here: it reads no context."""
    within = {key: choice for block in _scope.blocks for key, choice in block.value.items()}
    if within:
        _here.choices = within
    elif hasattr(_here, "choices"):
        del _here.choices  # absent, not None: a third state would be a third compiled graph


class in_force:
    """The choices that `made` gives hold in this thread inside this block, without a claim on their adapters.

    A class, whose methods compiled code passes by: a step is to cost nothing.
    """

    def __init__(self, made: Callable[[], Held]) -> None:
        self.made = made

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __enter__(self) -> None:
        choices = self.made()
        self.block: Block[Held] | None = Block(choices) if choices else None
        if self.block is None:
            return
        try:
            _scope.enter(self.block)
            show_compiled()
        except BaseException:  # an interrupt
            self.__exit__()
            raise

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __exit__(self, *error: object) -> None:
        if self.block is not None:
            self.block.open = False
            _scope.forget_ended()
            show_compiled()


def check_idle(mix: Mix, names: Iterable[str]) -> None:
    """Raise AdapterStateError if an `adapters(...)` block that is running uses one of `names`."""
    used = {name for choice in mix.running() for name in choice.order}
    busy = sorted(used & set(names))
    if busy:
        raise AdapterStateError(
            f"adapter {shown(busy[0])} is busy: a running adapters(...) block uses it",
            remedy="Unload it after the block.",
        )
