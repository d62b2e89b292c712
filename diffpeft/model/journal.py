"""Journal: what a model holds now, so that what somebody else's code makes of it can be undone, and made again as part of a plan.

It sees what is assigned: attributes, parameters, modules inside, configs, and other memory behind a tensor; not numbers written into memory that is
there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

ABSENT: Any = object()  # what an attribute or an entry is that is not there
Table = dict[Any, Any]


class Journal:
    """The tables of a model's modules and configs, and the memory and flags of its tensors."""

    def __init__(self, model: nn.Module):
        tables = {id(table): table for owner in _owners(model) for table in _tables(owner)}
        self.tables = [(table, dict(table)) for table in tables.values()]
        tensors = {id(t): t for module in model.modules() for t in _tensors(module)}
        self.tensors = [(t, t.data, t.requires_grad) for t in tensors.values()]

    def entries(self) -> Iterator[tuple[Table, str, object]]:
        """(table, name, value or ABSENT) of what is another now."""
        for table, before in self.tables:
            for name in dict.fromkeys((*before, *table)):
                value = table.get(name, ABSENT)
                if value is not before.get(name, ABSENT):
                    yield table, name, value

    def attributes(self) -> Iterator[tuple[Tensor, str, object]]:
        """(tensor, attribute, value) of what is another now."""
        for tensor, data, flag in self.tensors:
            if not _is_same(tensor.data, data):
                yield tensor, "data", tensor.data
            if tensor.requires_grad != flag:
                yield tensor, "requires_grad", tensor.requires_grad

    def restore(self) -> None:
        """Make all what it was."""
        for table, before in self.tables:
            put_back(table, before)
        for tensor, data, flag in self.tensors:
            if not _is_same(tensor.data, data):
                tensor.data = data
            if tensor.requires_grad != flag:
                tensor.requires_grad = flag


def put_back(table: Table, items: Mapping[Any, Any]) -> None:
    """Let a table hold these items again, in their order. What is there already is not touched: another thread may read it."""
    for name in [name for name in table if name not in items]:
        table.pop(name, None)
    if list(table) == list(items):
        for name, value in items.items():
            if table[name] is not value:
                table[name] = value
    else:
        table.clear()
        table.update(items)


def _owners(model: nn.Module) -> Iterator[object]:
    """The modules, and the configs that they hold."""
    for module in model.modules():
        yield module
        todo = [module.__dict__.get(name) for name in ("config", "generation_config")]
        while todo:
            config = todo.pop()
            if hasattr(config, "to_dict"):
                yield config
                todo += [value for value in vars(config).values() if hasattr(value, "to_dict")]


def _tables(owner: object) -> Iterator[Table]:
    """An object's attributes, and the dicts among them."""
    yield owner.__dict__
    yield from (value for value in owner.__dict__.values() if isinstance(value, dict))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for table in (module._parameters, module._buffers):
        yield from (t for t in table.values() if t is not None)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return (one.data_ptr(), one.shape, one.stride(), one.dtype, one.device) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        other.dtype,
        other.device,
    )
