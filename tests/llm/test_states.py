"""Adapters that are active, merged, switched off, deleted and asked for by row, in any order: PEFT's outputs, states and kinds of errors.

Where more than PEFT does is done on purpose (docs/llm.md) it stands in `PURPOSE`.
"""

from __future__ import annotations

import itertools
import random
import warnings
from functools import partial

import peft
import pytest
import torch
from torch import nn

import diffpeft

x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
BOTH = ["one", "two"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


def made(lib, mixed: bool):
    """A model with two random adapters, the first active: PEFT draws the same numbers."""
    torch.manual_seed(0)
    net = Net().eval().double()
    one = lib.LoraConfig(r=2, lora_alpha=3, target_modules=["lin0", "lin1"], init_lora_weights=False)
    two = one
    if mixed:
        two = lib.LoKrConfig(r=4, alpha=3, target_modules=["lin1"], init_weights=False)
    model = lib.get_peft_model(net, one, "one", mixed=mixed, autocast_adapter_dtype=False)
    model.add_adapter("two", two, autocast_adapter_dtype=False)
    return model.eval()


def quietly(job):
    """What a job gives, or the error that it raises."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return job(), None
        except Exception as error:
            return None, error


def disabled(model, *args, **kwargs):
    with model.disable_adapter():
        return model(*args, **kwargs)


STEPS = {
    "set one": lambda m: m.set_adapter("one"),
    "set two": lambda m: m.set_adapter("two"),
    "set both": lambda m: m.base_model.set_adapter(BOTH),
    "set none": lambda m: m.base_model.set_adapter([]),
    "merge": lambda m: m.base_model.merge_adapter(),
    "merge one": lambda m: m.base_model.merge_adapter(["one"]),
    "merge two": lambda m: m.base_model.merge_adapter(["two"]),
    "unmerge": lambda m: m.base_model.unmerge_adapter(),
    "off": lambda m: m.base_model.disable_adapter_layers(),
    "on": lambda m: m.base_model.enable_adapter_layers(),
    "delete one": lambda m: m.delete_adapter("one"),
    "disabled": lambda m: disabled(m, x),
    "rows": lambda m: m(x, adapter_names=["two", "__base__"]),
    "disabled rows": lambda m: disabled(m, x, adapter_names=["two", "__base__"]),
}
ROWS = {"rows", "disabled rows"}  # of PEFT's LoRA alone


def states(lib, model):
    status = lib.get_model_status(model.base_model)
    return status.enabled, status.active_adapters, status.merged_adapters, status.available_adapters


def walked(steps, mixed=False):
    """Take the steps with both libraries, and compare after each; until one raises, or they part on purpose."""
    ours, theirs = made(diffpeft, mixed), made(peft, mixed)
    for n, step in enumerate(steps):
        was_enabled, _, was_merged, _ = states(peft, theirs)
        here = f"{step} at {n} of {steps}"
        (mine, error), (want, their_error) = (quietly(partial(STEPS[step], m)) for m in (ours, theirs))
        assert (error is None) == (their_error is None), (here, error, their_error)
        if error is not None:
            assert isinstance(error, ValueError) and isinstance(their_error, ValueError), here
            return
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-9, msg=here)
        (mine, error), (want, their_error) = quietly(lambda: ours(x)), quietly(lambda: theirs(x))
        assert error is None, here
        if isinstance(their_error, KeyError):
            return  # PEFT's active adapter is the one that was deleted
        enabled, active, merged, available = states(peft, theirs)
        if mixed and step == "disabled" and not was_enabled:
            return  # the block of PEFT's class for mixed models switches on what was off
        if PURPOSE["put back"](step, was_merged) or PURPOSE["on top"](enabled, active, merged):
            return
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-9, msg=here)
        assert list(ours.active_adapters) == list(theirs.active_adapters), here
        if not mixed:  # PEFT's status is that of layers which have all adapters
            assert states(diffpeft, ours) == (enabled, active, merged, available), here


PURPOSE = {
    # a block without adapters puts those that were merged back into the weights; in PEFT they stay out
    "put back": lambda step, merged: bool(merged) and step.startswith("disabled"),
    # a merge of some leaves the other active ones acting; in PEFT they cease to, until nothing is merged
    "on top": lambda enabled, active, merged: enabled and bool(merged) and not {*active} <= {*merged},
}


def asks_for_what_is_gone(steps) -> bool:
    """Whether an adapter is named that was deleted: PEFT looks at that in some places only. Or the last is deleted, which PEFT cannot run without."""
    return any(a == "delete one" and ("one" in b or "both" in b) for a, b in itertools.combinations(steps, 2))


PAIRS = [pair for pair in itertools.product(STEPS, repeat=2) if not asks_for_what_is_gone(pair)]


def test_any_two_steps_end_as_in_peft():
    for pair in PAIRS:
        walked(pair)


@pytest.mark.parametrize("mixed", [False, True])
def test_long_walks_go_as_in_peft(mixed):
    names = [name for name in STEPS if not (mixed and name in ROWS)]
    for seed in range(40):
        steps = random.Random(seed).choices(names, k=7)
        walked([s for i, s in enumerate(steps) if not asks_for_what_is_gone([*steps[:i], s])], mixed)


def test_a_merged_adapter_that_was_not_active_is_not_so_when_it_is_out_again():
    ours = made(diffpeft, False)
    want, _ = quietly(lambda: ours(x))
    quietly(lambda: ours.base_model.merge_adapter(["two"]))
    assert ours.active_adapters == ["one"]
    acting, _ = quietly(lambda: ours(x))
    ours.base_model.unmerge_adapter()
    assert torch.equal(quietly(lambda: ours(x))[0], want) and ours.active_adapters == ["one"]
    ours.base_model.set_adapter(BOTH)
    torch.testing.assert_close(acting, quietly(lambda: ours(x))[0], rtol=1e-9, atol=1e-9)


def test_a_block_without_adapters_puts_back_what_was_merged():
    ours, base = made(diffpeft, False), Net().double()
    base.load_state_dict({k: t for k, t in ours.get_base_model().state_dict().items() if "adapters" not in k})
    ours.base_model.merge_adapter()
    want, _ = quietly(lambda: ours(x))
    assert torch.equal(quietly(lambda: disabled(ours, x))[0], quietly(lambda: base(x))[0])
    assert torch.equal(quietly(lambda: ours(x))[0], want)


def test_what_is_switched_off_is_merged_for_good_as_in_peft():
    ours, theirs = made(diffpeft, False), made(peft, False)
    for model in (ours, theirs):
        model.base_model.disable_adapter_layers()
    mine, want = (quietly(lambda m=m: m.merge_and_unload()(x))[0] for m in (ours, theirs))
    torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-9)


def test_to_set_adapters_while_merged_is_warned_of():
    ours = made(diffpeft, False)
    ours.base_model.merge_adapter()
    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging the model first."):
        ours.set_adapter("two")
    assert diffpeft.get_model_status(ours).merged_adapters == []
