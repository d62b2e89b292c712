"""HRA against the product of its reflections, and against PEFT."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import diffpeft
from diffpeft.methods import Geometry, Spec
from diffpeft.methods.hra import Hra, HRAConfig, orthonormal
from diffpeft.model.state import slots_of

variants = pytest.mark.parametrize("gram_schmidt", [False, True])


def chain(u, gram_schmidt):
    """H reflection by reflection."""
    H = torch.eye(len(u), dtype=u.dtype)
    before = []
    for v in u.unbind(1):
        for w in before:
            v = v - (w @ v) * w
        v = v / v.norm()
        before += [v] if gram_schmidt else []
        H = H - 2 * torch.outer(H @ v, v)
    return H


@variants
@pytest.mark.parametrize(
    "geometry",
    [Geometry(5, 7), Geometry(6, 4, (3, 2)), Geometry(6, 4, (1, 3), groups=2), Geometry(7, 9, lookup=True)],
    ids=str,
)
@pytest.mark.parametrize("r", [1, 2, 5])
def test_the_weight_is_the_product_of_reflections(geometry, r, gram_schmidt):
    features = geometry.out if geometry.lookup else geometry.columns
    u, W = torch.randn(features, r).double(), torch.randn(geometry.shape).double()
    spec = Spec(geometry, None, {"apply_GS": gram_schmidt})
    assert Hra.check({"hra_u": u}, spec) == "" and Hra.rank({"hra_u": u}) == r
    found = Hra.weight(W, Hra.prepare({"hra_u": u}, spec, False), spec)
    H = chain(u, gram_schmidt)
    torch.testing.assert_close(H @ H.T, torch.eye(features).double(), rtol=0, atol=1e-12)
    want = H @ W if geometry.lookup else (W.flatten(1) @ H).reshape(W.shape)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 8), nn.Linear(8, 12, bias=False)
        self.wide = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x, image):
        return self.two(torch.tanh(self.one(x))).square().mean() + self.wide(image).square().mean()


def both(fields, **options):
    """The same model with PEFT's adapter and ours, from one seed."""
    base = Net().requires_grad_(False)
    models = []
    for library in (peft, diffpeft):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = library.HRAConfig(target_modules=["one", "two", "wide"], **fields)
            models.append(library.get_peft_model(copy.deepcopy(base), config, **options))
    return models


INPUT = torch.randn(3, 12), torch.randn(2, 3, 5, 5)


@pytest.mark.parametrize("fields", [{"r": 4}, {"r": 3}, {"r": 4, "init_weights": False}], ids=str)
def test_a_fresh_one_has_pefts_tensors(fields):
    theirs, ours = both(fields)
    theirs = {k.removesuffix(".default"): p for k, p in theirs.named_parameters() if "hra_u" in k}
    mine = {f"base_model.model.{n}.hra_u": slot.hra_u for n, slot in slots_of(ours.get_base_model(), "default").items()}
    assert theirs.keys() == mine.keys() and all(torch.equal(mine[key], p) for key, p in theirs.items())


@variants
def test_it_trains_as_in_peft_and_files_go_both_ways(gram_schmidt, tmp_path):
    theirs, ours = both({"r": 4, "apply_GS": gram_schmidt, "init_weights": False})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = diffpeft.PeftModel.from_pretrained(ours.unload(), tmp_path / "theirs", is_trainable=True)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(*INPUT).backward()
            optimizer.step(), optimizer.zero_grad()
    torch.testing.assert_close(ours(*INPUT), theirs(*INPUT), rtol=0, atol=1e-6)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Net().requires_grad_(False), tmp_path / "ours")
    assert again.peft_config["default"].apply_GS is gram_schmidt
    mine = diffpeft.get_peft_model_state_dict(ours)
    for key, tensor in peft.get_peft_model_state_dict(again).items():
        assert torch.equal(mine[key], tensor)


def test_what_has_no_start_that_changes_nothing_says_so():
    for fields, why in (({"r": 3}, "odd r"), ({"r": 4, "apply_GS": True}, "apply_GS")):
        with pytest.warns(UserWarning, match=why):
            diffpeft.attach(Net(), HRAConfig(**fields), "a", targets=["one"])


def test_a_column_that_others_span_is_left_out_and_gives_finite_gradients():
    u = torch.randn(6, 3, dtype=torch.float64)
    twice = torch.cat([u[:, :1], 2 * u[:, :1], u[:, 1:2]], 1).requires_grad_(True)
    Q = orthonormal(twice)
    torch.testing.assert_close(Q.T @ Q, torch.diag(torch.tensor([1.0, 0, 1]).double()), rtol=0, atol=1e-12)
    (Q @ torch.randn(3, 2, dtype=torch.float64)).square().sum().backward()
    assert twice.grad.isfinite().all()


def test_a_config_that_says_another_rank_is_refused(tmp_path):
    model, _ = both({"r": 4})
    model.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"r": 4', '"r": 2'))
    with pytest.raises(diffpeft.CheckpointError, match="the rank is 2, not 4"):
        diffpeft.PeftModel.from_pretrained(Net(), tmp_path)
