"""PEFT as the oracle: the same tensors in both give the same output, gradients and weights after steps, where PEFT is right."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import diffpeft
from diffpeft import set_adapters
from diffpeft.model.state import parameters_of, slots_of

LAYERS = {
    "linear": (lambda: nn.Linear(12, 16), (3, 12)),
    "linear without bias": (lambda: nn.Linear(16, 8, bias=False), (2, 3, 16)),
    "gpt-2's Conv1D": (lambda: Conv1D(16, 12), (3, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 7, 6)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 7, 6)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (1, 2, 3, 4, 4)),
    "embedding": (lambda: nn.Embedding(10, 8), (2, 5)),
}
LINEAR, CONVS = ("linear", "linear without bias"), ("conv1d", "conv2d", "conv2d 1x1")
OFT = {"oft_block_size": 4, "use_cayley_neumann": False}
# config: (name, fields, layers on which PEFT 0.21.2 has it and has it right)
CONFIGS = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 3}, (*LINEAR, "gpt-2's Conv1D", *CONVS, "conv3d", "embedding")),
    "rslora": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_rslora": True}, (*LINEAR, *CONVS)),
    "lora with a bias": ("LoraConfig", {"r": 2, "lora_alpha": 3, "lora_bias": True}, ("linear", *CONVS)),
    "dora": (
        "LoraConfig",
        {"r": 2, "lora_alpha": 3, "use_dora": True},
        (*LINEAR, "gpt-2's Conv1D", *CONVS, "conv3d", "embedding"),
    ),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}, (*LINEAR, *CONVS, "conv2d dilated", "conv2d grouped")),
    "loha, tucker": ("LoHaConfig", {"r": 2, "alpha": 3, "use_effective_conv2d": True}, (*CONVS, "conv2d dilated")),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 3}, (*LINEAR, *CONVS, "conv2d dilated", "conv2d grouped")),
    "lokr, both factored": (
        "LoKrConfig",
        {"r": 1, "alpha": 3, "decompose_both": True},
        (*LINEAR, *CONVS, "conv2d dilated"),
    ),
    "lokr, tucker": ("LoKrConfig", {"r": 1, "alpha": 3, "use_effective_conv2d": True}, ("conv2d", "conv2d dilated")),
    "lokr, factor": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_factor": 2}, (*LINEAR, "conv2d")),
    "lokr, full": ("LoKrConfig", {"r": 16, "alpha": 16}, (*LINEAR, "conv2d")),
    "oft": ("OFTConfig", OFT, (*LINEAR, "embedding")),
    "oft, neumann": ("OFTConfig", {"oft_block_size": 4}, LINEAR),
    "oft, shared": ("OFTConfig", {**OFT, "block_share": True}, LINEAR),
    "oft, coft": ("OFTConfig", {**OFT, "coft": True, "eps": 0.5}, LINEAR),
    "oft, r": ("OFTConfig", {"r": 4, "oft_block_size": 0}, LINEAR),
    "boft": ("BOFTConfig", {"boft_block_size": 4}, (*LINEAR, "conv2d 1x1")),
    "ia3": (
        "IA3Config",
        {"feedforward_modules": []},
        (*LINEAR, "gpt-2's Conv1D", "conv2d", "conv2d dilated", "conv2d 1x1", "conv2d grouped", "conv3d"),
    ),
    "ia3, feedforward": (
        "IA3Config",
        {"feedforward_modules": ["0"]},
        (*LINEAR, "gpt-2's Conv1D", "conv2d", "conv2d dilated", "conv2d 1x1", "conv2d grouped", "conv3d"),
    ),
    "hira": ("HiraConfig", {"r": 2}, (*LINEAR, "gpt-2's Conv1D", *CONVS, "conv3d", "embedding")),
    "c3a": ("C3AConfig", {"block_size": 4}, LINEAR),
    "miss": ("MissConfig", {"r": 4}, LINEAR),
    "miss, a part": ("MissConfig", {"r": 5}, LINEAR),
    "miss, mini": ("MissConfig", {"r": 5, "init_weights": "mini", "mini_r": 4}, LINEAR),
    "miss, bat": ("MissConfig", {"r": 4, "init_weights": "bat"}, LINEAR),
    **{
        f"road, {n}": ("RoadConfig", {"variant": f"road_{n}", "group_size": size}, LINEAR)
        for n, size in ((1, 4), (2, 8), (4, 2))
    },
    "delora": ("DeloraConfig", {"r": 3, "delora_lambda": 2}, LINEAR),
    "boft, blocks": ("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 2}, LINEAR),
}
CELLS = [(name, kind) for name, (_, _, kinds) in CONFIGS.items() for kind in kinds]


WRONG_GRADIENTS = {("loha, tucker", "hada_w1_a"), ("loha, tucker", "hada_w2_a")}


def pair(name, kind):
    """The same layer with the same adapter in both libraries, and an input."""
    make, shape = LAYERS[kind]
    cls, fields, _ = CONFIGS[name]
    base = nn.Sequential(make()).double().requires_grad_(False)
    if isinstance(base[0], Conv1D):
        nn.init.normal_(base[0].weight)
    ours, x = copy.deepcopy(base), torch.randint(10, shape) if kind == "embedding" else torch.randn(shape).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out, CUDA extensions and ninja
        theirs = peft.inject_adapter_in_model(getattr(peft, cls)(**fields, target_modules=["0"]), base).double()
    diffpeft.attach(ours, getattr(diffpeft, cls)(**fields), targets=["0"])
    slot = slots_of(ours, "default")["0"].double()
    for role, t in slot.tensors.items():
        nn.init.normal_(t, std=0.3)
        _theirs(theirs, role).data.copy_(t)
    return ours, theirs, x


def _theirs(model, role):
    found = getattr(model[0], role.removesuffix("_bias"))["default"]
    return found if isinstance(found, torch.Tensor) else found.bias if role.endswith("_bias") else found.weight


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_a_layer_is_pefts(name, kind, subtests):
    ours, theirs, x = pair(name, kind)
    with subtests.test("fused"):
        fused_weights_are_pefts(name, *copy.deepcopy((ours, theirs)))
    with subtests.test("tensors"):
        the_tensors_have_pefts_names_and_shapes(ours, theirs)
    with subtests.test("steps"):
        output_gradients_and_steps_are_pefts(name, ours, theirs, x)


def the_tensors_have_pefts_names_and_shapes(ours, theirs):
    slot = slots_of(ours, "default")["0"]
    assert sum(p.numel() for p in slot.parameters()) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    for role, t in slot.tensors.items():
        assert t.shape == _theirs(theirs, role).shape, role


def output_gradients_and_steps_are_pefts(name, ours, theirs, x):
    slot, own = slots_of(ours, "default")["0"], parameters_of(ours, "default")
    optimizers = [torch.optim.SGD(p, lr=0.01) for p in (own, [p for p in theirs.parameters() if p.requires_grad])]
    for step in range(3):
        outputs = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            y = model(x)
            y.square().sum().backward()
            outputs.append(y.detach())
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)  # PEFT keeps identities and scales in fp32
        for role, t in slot.tensors.items():
            if (name, role) in WRONG_GRADIENTS:
                continue
            torch.testing.assert_close(
                t.grad, _theirs(theirs, role).grad, rtol=1e-5, atol=1e-5, msg=f"{role}, step {step}"
            )
        for optimizer in optimizers:
            optimizer.step()
        if (
            "coft" in name or name == "loha, tucker"
        ):  # PEFT projects its parameter in place in every forward, here it stays: one step is the same
            return


def fused_weights_are_pefts(name, ours, theirs):
    diffpeft.fuse(ours)
    theirs[0].merge()
    base = theirs[0].get_base_layer()
    torch.testing.assert_close(ours[0].weight, base.weight, rtol=1e-6, atol=1e-6)
    if getattr(base, "bias", None) is not None and name != "lora with a bias":
        torch.testing.assert_close(ours[0].bias, base.bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n, (cls, *_) in CONFIGS.items() if cls in ("LoraConfig", "LoHaConfig", "LoKrConfig")]
)
def test_strength_is_pefts_scale_for_additive_methods(name):
    ours, theirs, x = pair(name, "linear" if "linear" in CONFIGS[name][2] else "conv2d")
    if name == "dora" or name == "lora with a bias":
        pytest.skip("PEFT puts the scale inside DoRA's norm; see test_dora_differs_between_0_and_1")
    set_adapters(ours, {"default": 0.4})
    theirs[0].set_scale("default", 0.4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


# ---- where PEFT differs, and what is right here


def test_dora_differs_between_0_and_1():
    """PEFT's strength scales the update inside the norm: at 0 it is m W / |W|, not the base."""
    ours, theirs, x = pair("dora", "linear")
    theirs[0].set_scale("default", 0.0)
    set_adapters(ours, {"default": 0.0})
    base = nn.functional.linear(x, ours[0].weight, ours[0].bias)
    assert torch.equal(ours(x), base)
    assert (theirs(x) - base).abs().max() > 0.1


def test_oft_on_a_kernel_is_no_identity_in_peft():
    make, shape = LAYERS["conv2d"]
    x, base = torch.randn(shape), nn.Sequential(make())
    ours, plain = copy.deepcopy(base), base(x)
    theirs = peft.inject_adapter_in_model(peft.OFTConfig(oft_block_size=4, target_modules=["0"]), base)
    diffpeft.attach(ours, diffpeft.OFTConfig(oft_block_size=4), targets=["0"])
    assert torch.equal(ours(x), plain)
    assert (theirs(x) - plain).abs().max() > 0.1


def test_two_fused_ofts_have_the_order_of_their_forward_and_in_peft_the_reverse():
    base = nn.Sequential(nn.Linear(12, 8)).double().requires_grad_(False)
    x, ours = torch.randn(3, 12).double(), copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.OFTConfig(**OFT, target_modules=["0"]), "a")
    theirs.add_adapter("b", peft.OFTConfig(**OFT, target_modules=["0"]))
    for name in "ab":
        diffpeft.attach(ours, diffpeft.OFTConfig(**OFT), name, targets=["0"])
        slot = slots_of(ours, name)["0"].double()
        nn.init.normal_(slot.oft_R, std=0.3)
        theirs.base_model.model[0].oft_R[name].weight.data = slot.oft_R.detach().clone()
    theirs.base_model.set_adapter(["a", "b"])
    want, forward = ours(x), theirs(x)
    diffpeft.fuse(ours)
    torch.testing.assert_close(ours(x), want, rtol=1e-12, atol=1e-12)
    theirs.merge_adapter()
    merged = theirs(x)
    assert (merged - forward).abs().max() > 0.01
    set_adapters_reverse = {"b": 1.0, "a": 1.0}
    diffpeft.unfuse(ours)
    set_adapters(ours, set_adapters_reverse)
    torch.testing.assert_close(ours(x), forward, rtol=1e-5, atol=1e-5)  # PEFT turns x by `a` first: W R_b R_a
    torch.testing.assert_close(want, merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "role"), sorted(WRONG_GRADIENTS))
def test_pefts_gradient_of_tucker_lohas_is_no_derivative(name, role):
    models = dict(zip(("ours", "theirs"), pair(name, "conv2d")[:2], strict=True))
    x, found = torch.randn(LAYERS["conv2d"][1]).double(), {}
    for which, model in models.items():
        p = _theirs(model, role) if which == "theirs" else getattr(slots_of(model, "default")["0"], role)
        loss = lambda model=model: model(x).square().sum()  # noqa: E731
        (g,) = torch.autograd.grad(loss(), p)
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                p[0, 0] += step
                values.append(loss())
        found[which] = (g[0, 0] - (values[0] - values[1]) / 2e-6).abs().item() / g.abs().max().item()
    assert found["ours"] < 1e-6 < 0.01 < found["theirs"]


def test_lora_on_a_dilated_convolution_fails_in_peft():
    ours, theirs, x = pair("lora", "conv2d dilated")
    assert ours(x).shape == nn.functional.conv2d(x, ours[0].weight, dilation=2).shape
    with pytest.raises(RuntimeError):
        theirs(x)


def test_boft_with_two_factors_needs_pefts_cuda_extension():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.inject_adapter_in_model(
            peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0"]),
            nn.Sequential(nn.Linear(16, 8)),
        )
    ours = nn.Sequential(nn.Linear(16, 8))
    diffpeft.attach(ours, diffpeft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2), targets=["0"])
    assert theirs[0].boft_R["default"].shape[0] == 1
    assert slots_of(ours, "default")["0"].boft_R.shape[0] == 2
