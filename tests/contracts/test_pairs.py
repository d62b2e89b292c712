"""What pairs.py promises of the cells it chooses."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch
from torch import nn

from diffpeft.layers.sites import SITES
from diffpeft.methods import METHODS
from tests.contracts import pairs
from tests.contracts.kinds import CLASSES, FORMS, KINDS, METHOD_FORMS, ON_NORMS, example, fits, give, layer
from tests.contracts.pairs import ALIKE, CHOSEN, RISKY, covering


def test_every_method_has_a_form():
    assert set(METHOD_FORMS) | set(ON_NORMS) == set(METHODS)


def test_every_site_has_a_kind():
    kinds = {cls for site in SITES if site.targets for cls in site.kinds if isinstance(cls, type)}
    assert kinds <= {cls for kind in KINDS for cls in type(example(kind)).__mro__}


def test_every_kind_is_of_one_class():
    assert sorted(kind for kinds in CLASSES.values() for kind in kinds) == sorted(KINDS)


def test_each_form_meets_each_class_of_kinds():
    for form in FORMS:
        for name, kinds in CLASSES.items():
            able = [kind for kind in kinds if fits(form, kind)]
            assert not able or {(form, kind) for kind in able} & {*CHOSEN}, (form, name)


def test_each_kind_meets_each_way():
    for kind in KINDS:
        for group in pairs._groups(list(FORMS)):
            able = [form for form in group if fits(form, kind)]
            assert not able or {(form, kind) for form in able} & {*CHOSEN}, (kind, group[0])


def test_each_form_meets_five_kinds_and_each_kind_five_forms():
    """But for forms that have something to do on fewer: a core needs a kernel."""
    forms, kinds = (Counter(cell[at] for cell in CHOSEN) for at in (0, 1))
    assert all(
        forms[form] >= min(5, len({c for c, k in CLASSES.items() if any(fits(form, kind) for kind in k)}))
        for form in FORMS
    )
    assert all(kinds[kind] >= 5 for kind in KINDS)


def test_what_is_risky_is_chosen_and_exists():
    assert {*RISKY} <= {*CHOSEN} and all(fits(form, kind) and reason for (form, kind), reason in RISKY.items())


def test_a_new_form_takes_no_cell_from_another_method(monkeypatch):
    monkeypatch.setitem(FORMS, "a new one", FORMS["ia3"])
    others = [form for form in FORMS if FORMS[form].method != "ia3"]
    assert [cell for cell in covering(FORMS) if cell[0] in others] == [cell for cell in CHOSEN if cell[0] in others]


def asked(form: str, kind: str) -> set[str]:
    """The members of a layer's site that one forward, one backward and one weight use."""
    names: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        for cls in {cls for site in SITES for cls in site.__mro__ if cls.__module__.startswith("diffpeft.")}:
            for name, member in vars(cls).items():
                if inspect.isfunction(member) and not name.startswith("_"):
                    patch.setattr(cls, name, _noting(names, name, member))
        torch.manual_seed(0)
        model, x = layer(kind)
        give(model, form)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        names.clear()
        model(x).sum().backward()
    return names


def _noting(names, name, member):
    def noted(*args, **kwargs):
        names.add(name)
        return member(*args, **kwargs)

    return noted


@pytest.mark.parametrize("kind", ["linear", "conv2d strided", "gpt-2's Conv1D", "embedding"])
def test_methods_that_are_alike_ask_the_same_of_a_layer(kind):
    for method, other in ALIKE.items():
        assert asked(METHOD_FORMS[method], kind) <= asked(METHOD_FORMS[other], kind), (method, other)
