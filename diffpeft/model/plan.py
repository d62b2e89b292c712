"""Plan: the writes of an operation, prepared before any is made. Plans compose, and a commit makes all of their writes or none.

Everything that can fail happens while a plan is made. What is written is of few kinds, each with its way back; a commit that is interrupted goes
that way for all that it has written. An operation is `with planned(parts) as plan:` around one or several functions that add to the plan; what they
plan on is what the plan has already (`view`, `record_of`). Why: docs/decisions/014-operations-are-plans.md.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffpeft.layers.acting import state_with
from diffpeft.layers.carried import Parameters, Record, State, enter, record_of, state_of
from diffpeft.layers.hooks import reapply_offloading
from diffpeft.layers.readers import is_reader, settle_reader
from diffpeft.model.journal import ABSENT, Journal, put_back
from diffpeft.model.lock import exclusive
from diffpeft.model.mix import Mix
from diffpeft.model.root import settle
from diffpeft.model.target import COMPILED, modules_of

# a module's table of parameters or buffers, a name in it, and new numbers or another parameter
Put = tuple[dict[str, Any], str, Any]


class Write(Protocol):
    """One thing that gets another value."""

    def present(self) -> Any:
        """What is there now: `put` with it is the way back."""

    def put(self, value: Any) -> None:
        """Put a value there. Plain assignments: given a value that is prepared, or was there, it cannot fail."""

    @property
    def value(self) -> Any:
        """What is to be there."""


@dataclass(frozen=True)
class Layer:
    """What a module carries, and its weights."""

    module: nn.Module
    value: State

    def present(self) -> State:
        return state_of(self.module, self.value.weights is not None)

    def put(self, value: State) -> None:
        enter(self.module, value)


@dataclass(frozen=True)
class Filled:
    """Other numbers in the memory that a tensor has: compiled code may hold its address."""

    tensor: Tensor
    value: Tensor

    def present(self) -> Tensor:
        return self.tensor.detach().clone()

    def put(self, value: Tensor) -> None:
        with torch.no_grad():
            self.tensor.copy_(value)


@dataclass(frozen=True)
class Attribute:
    """An attribute of an object, ABSENT if there is to be none."""

    owner: Any
    name: str
    value: Any

    def present(self) -> Any:
        return getattr(self.owner, self.name, ABSENT)

    def put(self, value: Any) -> None:
        if value is not ABSENT:
            setattr(self.owner, self.name, value)
        elif hasattr(self.owner, self.name):
            delattr(self.owner, self.name)


@dataclass(frozen=True)
class TableEntry:
    """An entry of a table (a module's parameters or modules, the configs of a model), ABSENT if there is to be none."""

    table: dict[str, Any]
    name: str
    value: Any

    def present(self) -> _Items:
        return _Items(self.table)  # all of them: they come back in the order that they had

    def put(self, value: Any) -> None:
        if isinstance(value, _Items):
            put_back(self.table, value)
        elif value is ABSENT:
            self.table.pop(self.name, None)
        else:
            self.table[self.name] = value


class _Items(dict[str, Any]):
    """What a table held."""


class Onward(Protocol):
    """A change of numbers that has no way back. All that it needs is there; whenever it was stopped it can go on, and comes to the same end."""

    @property
    def begun(self) -> bool:
        """Whether something may be changed."""

    def go_on(self) -> None:
        """Do what is not done yet."""


@dataclass
class Plan:
    """Prepared writes in the order in which they are made."""

    writes: list[Write] = field(default_factory=list)
    onwards: list[tuple[Onward, Layer]] = field(
        default_factory=list
    )  # what has no way back, and what the layer carries when it is done
    roots: list[tuple[nn.Module, Mix]] = field(default_factory=list)  # models that may become roots, or cease to be
    _records: dict[int, Record | None] = field(default_factory=dict)  # what modules will carry, by id
    _replaced: dict[int, nn.Module] = field(
        default_factory=dict
    )  # the modules in the place of others, by the others' id
    _before: list[tuple[Write, Any]] | None = None  # while it is made and afterwards: the way back

    @property
    def changed(self) -> list[nn.Module]:
        """The modules that will carry something else."""
        layers = [write for write in self.writes if isinstance(write, Layer)]
        return [layer.module for layer in (*layers, *(layer for _, layer in self.onwards))]

    @property
    def entries(self) -> dict[tuple[int, str], Any]:
        """{(id of a table, name): what will be there}."""
        return {(id(write.table), write.name): write.value for write in self.writes if isinstance(write, TableEntry)}

    def standing(self, module: nn.Module) -> nn.Module:
        """The module that will be in a module's place."""
        return self._replaced.get(id(module), module)

    def record_of(self, module: nn.Module) -> Record | None:
        """What a module will carry: for planning on."""
        return self._records[id(module)] if id(module) in self._records else record_of(module)

    def carry(self, module: nn.Module, record: Record | None, weights: Mapping[str, Tensor] | None = None) -> None:
        """A module is to carry something else, or nothing, and have other parameters (a Parameter), or other numbers in those that it has."""
        others = {name: w for name, w in (weights or {}).items() if isinstance(w, nn.Parameter)}
        for name, parameter in others.items():
            self.entry(module._parameters, name, parameter)
        numbers: Parameters | None = None if weights is None else {n: w for n, w in weights.items() if n not in others}
        self.writes.append(Layer(module, state_with(module, record, numbers)))
        self._records[id(module)] = record

    def rewrite(self, module: nn.Module, record: Record, onward: Onward) -> None:
        """A module's numbers are to change with no way back, last of all; then it is to carry a record."""
        self.onwards.append((onward, Layer(module, state_with(module, record, {}))))
        self._records[id(module)] = record

    def numbers(self, tensor: Tensor, value: Tensor) -> None:
        """A parameter or buffer is to have other numbers, in memory of their own."""
        self.set(tensor, data=value)

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """A tensor is to have other numbers in the memory that it has."""
        self.writes.append(Filled(tensor, value))

    def set(self, owner: Any, **values: Any) -> None:
        """Attributes are to have other values."""
        self.writes += [Attribute(owner, name, value) for name, value in values.items()]

    def entry(self, table: dict[str, Any], name: str, value: Any = ABSENT) -> None:
        """An entry of a table is to be another, or to be gone."""
        if isinstance(value, nn.Module) and name in table:
            self._replaced[id(table[name])] = value
        self.writes.append(TableEntry(table, name, value))

    def put(self, puts: Iterable[Put]) -> None:
        """Modules' tables are to hold other parameters, or those that they hold to have other numbers."""
        for table, name, new in puts:
            if isinstance(new, nn.Parameter):
                self.entry(table, name, new)
            else:
                self.numbers(table[name], new)

    def require_grad(self, parameters: Iterable[nn.Parameter], flag: bool) -> None:
        """Parameters are to be trained, or not."""
        for parameter in parameters:
            if parameter.requires_grad != flag:
                self.set(parameter, requires_grad=flag)

    def evaluate(self, model: nn.Module) -> None:
        """A model is to be in evaluation, with all that it will carry."""
        for outer in (model, *self._fresh()):
            for module in outer.modules():
                if module.training:
                    self.set(module, training=False)

    def _fresh(self) -> Iterator[nn.Module]:
        """The modules that are planned to be somewhere in the model."""
        for write in list(self.writes):
            if isinstance(write, Layer):
                yield from filter(None, (write.value.adapters, write.value.copies))
            elif isinstance(write, TableEntry) and isinstance(write.value, nn.Module):
                yield write.value

    def root(self, model: nn.Module, mix: Mix) -> None:
        """A model whose layers change, or whose mix: it may need to be told of calls, and whoever offloads it of its tensors."""
        self.roots.append((model, mix))

    def view(self, mix: Mix) -> Mix:
        """A mix as it will be: for planning on."""
        values = {w.name: w.value for w in self.writes if isinstance(w, Attribute) and w.owner is mix}
        if not values:
            return mix
        planned = replace(mix, **values)
        planned.key = mix.key
        return planned

    def commit(self) -> None:
        """Make the writes, all or none: if one fails or is interrupted, those made are undone. Ctrl-C waits until they are made.

        What has no way back comes last: whatever stops that, it is finished nevertheless, and with it the plan.
        """
        try:
            with _uninterrupted():
                self._before = [(write, write.present()) for write in self.writes]
                for write in self.writes:
                    write.put(write.value)
                self._finish()
                self._go_on()
        except BaseException:
            if any(onward.begun for onward, _ in self.onwards):
                with _uninterrupted():
                    self._go_on()
            else:
                self.undo()
            raise

    def _go_on(self) -> None:
        """Make, or finish, the changes that have no way back. Done again it changes nothing."""
        for onward, layer in self.onwards:
            onward.go_on()
            layer.put(layer.value)

    def undo(self) -> None:
        """Put back what the commit has replaced; nothing if there was none."""
        with _uninterrupted():
            for write, value in reversed(self._before or ()):
                write.put(value)
            if self._before is not None:
                self._finish()
            self._before = None

    @contextlib.contextmanager
    def tentative(self) -> Iterator[None]:
        """For planning on: the writes so far are made in this block and undone at its end. The commit makes them again, with the rest."""
        assert not self.onwards
        try:
            self.commit()
            yield
        finally:
            try:
                self.undo()
            except BaseException:  # an interrupt
                self.undo()
                raise

    @contextlib.contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """What somebody else's code changes of a model in this block becomes part of the plan, and is undone at the end of the block."""
        journal = Journal(model)
        try:
            yield
            self.writes += [TableEntry(*change) for change in journal.entries()]
            self.writes += [Attribute(*change) for change in journal.attributes()]
        finally:
            try:
                journal.restore()
            except BaseException:  # an interrupt
                journal.restore()
                raise

    def _finish(self) -> None:
        """Let the models, and who offloads them, know what is on their layers now."""
        changed = self.changed
        for model in {id(model): model for model, _ in self.roots}.values() if changed else ():
            for reader, _ in modules_of(model, is_reader).values():
                settle_reader(reader)
        for model, mix in self.roots:
            settle(model, mix)
            if changed:
                reapply_offloading(getattr(model, COMPILED, model), changed)


@contextlib.contextmanager
def planned(parts: Mapping[str, nn.Module]) -> Iterator[Plan]:
    """An operation on these components: what this block plans is done at its end, under their locks, as one commit."""
    with exclusive(parts):
        plan = Plan()
        yield plan
        plan.commit()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C inside this block comes after it, if this is the thread that it comes to."""
    waiting: list[tuple[int, Any]] = []
    inside = True
    try:
        before = signal.getsignal(signal.SIGINT)
        if not callable(before):
            yield
            return

        def note(number: int, frame: Any) -> None:
            if inside:
                waiting.append((number, frame))
            else:
                before(number, frame)

        signal.signal(signal.SIGINT, note)
    except ValueError:  # another thread than the main one, which gets no signals
        yield
        return
    try:
        yield
    finally:
        inside = False
        signal.signal(signal.SIGINT, before)
    for number, frame in waiting:
        before(number, frame)
