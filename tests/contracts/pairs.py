"""Which forms meet which kinds of layer. All of them meet in `make test-all`; in `make test` those that this file chooses.

A cell can be wrong in three ways. A formula may misread the layer: its axes, kernel or groups, which is all that a method sees of one (`Geometry`).
A layer may misdo what it lends to methods: a product into its output, blocks turned, features scaled; that does not depend on the numbers a formula
lends it for. Or the two may disagree at one point that a person can name. So three sets of pairs suffice:

1. each form on each class of kinds (`kinds.CLASSES`): all kinds of a class look the same to a formula, but for sizes;
2. each kind with each group of methods that ask the same of a layer (ALIKE; a test compares what they ask for): in turn by the group's forms;
3. RISKY: pairs named by hand, with the reason.

What else a cell has (dtype, strength, layout in memory) goes round with its number. The choice is made by tables and counting alone: it is the same
in every run, and a new form adds its own cells and takes none from another method.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests.contracts.kinds import CLASSES, FORMS, KINDS, METHOD_FORMS, fits
from tests.pairwise import params

# {method: another that asks the same of a layer}; what is not here stands for itself and meets every kind
ALIKE = {"adalora": "lora", "vera": "lora", "delora": "lora"}
Cell = tuple[str, str]

RISKY = {
    ("lora", "embedding"): "A is looked up and starts at zero, B does not",
    ("lora", "conv2d grouped"): "A is shared by the groups, B is not",
    ("lora", "transposed conv2d grouped"): "the rows of a group are not in the order of the output's features",
    ("lora", "conv2d without a batch"): "the sum into the output knows batches only",
    (
        "lora, rank-stabilised, with biases",
        "transposed conv2d",
    ): "the bias has features on another axis than the weight",
    ("lora, rank-stabilised, with biases", "gpt-2's Conv1D"): "the bias has features on another axis than the weight",
    ("lora, tucker", "conv3d"): "the core has three axes of different lengths",
    ("lora, tucker", "conv2d non-square"): "the core has axes of different lengths",
    ("lora, pissa", "gpt-2's Conv1D"): "the factors are of the stored weight turned",
    ("dora", "gpt-2's Conv1D"): "the norm runs over the other stored axis",
    ("dora", "embedding"): "the norm is of features, not of rows",
    ("dora", "conv2d strided"): "the norm runs over the kernel too",
    ("dora", "transposed conv2d grouped"): "norms of rows that are stored by group and turned",
    ("dora, in", "conv2d grouped"): "a norm of an input channel is one for all groups",
    ("dora, in", "embedding"): "the inputs are the rows of the table",
    ("dora over lokr, in", "conv2d depthwise"): "one input channel a group: every norm is over all outputs",
    ("adalora", "gpt-2's Conv1D"): "its factors are flat whatever the layer is",
    ("loha", "embedding"): "its product is taken of looked-up rows",
    ("loha, tucker", "conv1d padded"): "the core has one axis",
    ("lokr", "embedding"): "a row is taken from two halves",
    ("lokr", "conv2d depthwise"): "one channel a group leaves nothing to split",
    ("lokr", "conv2d 1x1"): "the kernel belongs to the second half even where it is 1 x 1",
    ("lokr, both full", "transposed conv2d"): "the halves split the turned axes",
    ("oft", "embedding"): "it turns the output, for rows have no features",
    ("oft", "conv2d grouped"): "blocks may not reach over a group's border",
    ("oft", "conv2d strided"): "columns include the kernel: only the weight can be turned",
    ("oft, output", "conv2d grouped"): "three rows a group: a block of two reaches over the border",
    ("oft, output", "conv2d depthwise"): "blocks end where groups do: activations are turned after all",
    (
        "oft, output, rescaled",
        "transposed conv2d grouped",
    ): "rows of a group are not in the order of the output's features",
    ("boft", "conv2d 1x1 strided"): "input features turned before a stride and padding",
    ("boft", "conv2d grouped"): "activations of two groups cannot stand for their weights",
    ("boft, output", "conv2d grouped"): "stages reach over the groups' border",
    ("boft, output, rescaled", "conv2d without a batch"): "features are the first axis",
    ("hra", "embedding"): "it reflects the output, for rows have no features",
    ("hra", "conv2d grouped"): "the columns of a group are reflected, in the weight alone",
    ("hra", "conv2d 1x1 strided"): "input features reflected before a stride and padding",
    ("vera", "transposed conv2d grouped"): "it takes the columns and rows of a group from what all layers share",
    ("ia3", "linear without bias"): "what multiplies the bias has none",
    ("ia3", "conv2d grouped"): "it multiplies the bias, which groups do not split",
    ("ia3", "transposed conv1d"): "it multiplies the bias, and what output padding adds may be nothing else",
    ("ia3, feedforward", "conv2d grouped"): "an input channel lies in one group only",
    ("ia3, feedforward", "transposed conv2d grouped"): "an input channel lies in one group only, stored as a row",
    ("ia3, feedforward", "embedding"): "the rows of a table are no features of the input",
    ("ia3, lycoris, on input", "gpt-2's Conv1D"): "inputs are stored as rows",
    ("glora", "embedding"): "it multiplies the weight by a square of the table's length",
    ("full", "transposed conv2d grouped"): "the change is stored as the layer stores its weight",
    ("full, in place", "gpt-2's Conv1D"): "it puts a weight in place that the layer stores turned",
}


def covering(forms: Iterable[str], complete: bool = True) -> list[Cell]:
    """The cells of some forms: 1, and if `complete` 2 and 3 too. In the order of the tables."""
    forms = list(forms)
    chosen: set[Cell] = set()
    for number, group in enumerate(_groups(forms)):
        for kinds in CLASSES.values():
            for n, form in enumerate(group, number):
                if able := [kind for kind in kinds if fits(form, kind)]:
                    chosen.add((form, able[n % len(able)]))
        if complete:
            chosen |= _missing(group, chosen)
    if complete:
        chosen |= {(form, kind) for form, kind in RISKY if form in forms}
    return [cell for cell in _matrix(forms) if cell in chosen]


def _groups(forms: list[str]) -> list[list[str]]:
    """The forms whose methods ask the same of a layer."""
    groups: dict[str, list[str]] = {}
    for form in forms:
        method = FORMS[form].method
        groups.setdefault(ALIKE.get(method, method), []).append(form)
    return list(groups.values())


def _missing(group: list[str], chosen: set[Cell]) -> set[Cell]:
    """Cells for the kinds that no form of the group has met, in turn by those with the fewest."""
    missing: set[Cell] = set()
    for kind in KINDS:
        if any((form, kind) in chosen for form in group):
            continue
        count = {f: sum(f == form for form, _ in chosen | missing) for f in group if fits(f, kind)}
        if count:
            missing.add((min(count, key=count.__getitem__), kind))
    return missing


def _matrix(forms: Iterable[str]) -> list[Cell]:
    return [(form, kind) for form in forms for kind in KINDS if fits(form, kind)]


CHOSEN = covering(FORMS)


def every(cells: Iterable[Cell], chosen: Iterable[Cell] = CHOSEN):
    """Run over cells; those that are not among the chosen are slow."""
    return pytest.mark.parametrize(("form", "kind"), params(cells, chosen))


# a form of each group: of what is about a way through the layer, not about a formula
WAYS = [group[0] for group in _groups(list(METHOD_FORMS.values()))]
every_way = pytest.mark.parametrize("form", WAYS)
every_method = pytest.mark.parametrize("form", METHOD_FORMS.values())
every_form = pytest.mark.parametrize("form", FORMS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_cell = every(_matrix(FORMS))
every_method_cell = every(_matrix(METHOD_FORMS.values()), covering(METHOD_FORMS.values(), complete=False))


def turn(options, form: str, kind: str):
    """One of the options: the next one from kind to kind and from form to form."""
    return options[(list(FORMS).index(form) + list(KINDS).index(kind)) % len(options)]
