"""LoftQ: its quantisers against bitsandbytes, its factors against PEFT, and that more turns lose less."""

from __future__ import annotations

import inspect

import peft.utils.loftq_utils as theirs
import pytest
import torch

from diffpeft.errors import ConfigError
from diffpeft.methods.loftq import (
    NATURAL,
    NORMAL,
    LoftQConfig,
    blockwise,
    factors,
    half_turn,
    int8,
    loftq,
    normal_float,
)

bnb = pytest.importorskip("bitsandbytes")

every_bits = pytest.mark.parametrize("bits", NATURAL)
every_method = pytest.mark.parametrize("method", [None, "uniform"])


@pytest.fixture
def W():
    """A matrix of low rank and noise whose rows and columns make no whole number of blocks."""
    return torch.randn(50, 5) @ torch.randn(5, 70) + torch.randn(50, 70)


@pytest.fixture(scope="module")
def oracle():
    """PEFT's loftq_init, with the CPU in place of the device that its source names."""
    space = dict(vars(theirs))
    exec(inspect.getsource(theirs.loftq_init).replace('"cuda"', '"cpu"'), space)
    return space["loftq_init"]


def lost(W, found):
    Q, A, B = found
    return float((W - Q - B @ A).norm())


def test_the_levels_are_those_of_nf4():
    _, state = bnb.functional.quantize_4bit(torch.randn(64), quant_type="nf4")
    torch.testing.assert_close(
        NORMAL[4], state.code, rtol=0, atol=1e-4
    )  # bitsandbytes has them as a table of four digits


def test_two_bits_are_four_levels_of_the_same_kind():
    levels = normal_float(2)
    assert (
        levels.shape == (4,)
        and levels[1] == 0
        and levels[0] == -1
        and levels[3] == 1
        and levels.equal(levels.sort()[0])
    )


def test_nf4_rounds_as_bitsandbytes_does(W):
    want = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(W, quant_type="nf4", compress_statistics=False))
    # its table has four digits
    torch.testing.assert_close(blockwise(W, NORMAL[4]), want, rtol=0, atol=1e-4 * float(W.abs().max()))


def test_int8_rounds_as_bitsandbytes_does(W):
    W = W.half().float()  # which it takes
    data, scales, _ = bnb.functional.int8_vectorwise_quant(W.half())
    torch.testing.assert_close(int8(W), bnb.functional.int8_vectorwise_dequant(data, scales), rtol=1e-6, atol=1e-6)


def test_what_is_on_a_level_stays(W):
    for quantised in (int8, lambda t: blockwise(t, NORMAL[4]), lambda t: blockwise(t, NORMAL[2])):
        once = quantised(W)
        torch.testing.assert_close(quantised(once), once, rtol=1e-6, atol=1e-6)
    assert not blockwise(torch.zeros(3, 5), NORMAL[4]).any() and not int8(torch.zeros(3, 5)).any()


def test_a_half_turn_is_the_best_product_of_its_rank(W):
    A, B = half_turn(W, 4)
    S = torch.linalg.svdvals(W)
    assert A.shape == (4, 70) and B.shape == (50, 4)
    assert float((W - B @ A).norm()) == pytest.approx(float(S[4:].norm()), rel=1e-5)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-4)  # both halves carry the root


def test_a_rank_above_the_matrix_is_padded(W):
    A, B = half_turn(W[:3], 5)
    assert A.shape == (5, 70) and B.shape == (3, 5)
    torch.testing.assert_close(B @ A, W[:3], rtol=1e-4, atol=1e-4)


@every_bits
@every_method
def test_more_turns_lose_less(W, bits, method):
    found = [lost(W, loftq(W, 8, bits=bits, iterations=n, method=method)) for n in (1, 2, 5, 10)]
    assert found == sorted(found, reverse=True) and found[-1] < found[0]
    Q, A, B = loftq(W, 8, bits=bits, method=method)
    assert lost(W, (Q, A, B)) < float((W - Q).norm())  # the factors help from the first turn


@every_method
def test_more_bits_lose_less(W, method):
    found = [lost(W, loftq(W, 4, bits=bits, iterations=2, method=method)) for bits in (2, 4, 8)]
    assert found[0] > 2 * found[1] > 4 * found[2]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("turns", [1, 3])
def test_it_is_pefts(W, oracle, bits, turns):
    Q, A, B = loftq(W, 4, bits=bits, iterations=turns)
    theirs, L, R = oracle(W, num_bits=bits, reduced_rank=4, num_iter=turns)
    # theirs: (Q, A, B). Numbers that lie between two levels may go either way: bitsandbytes has NF4 to four digits, and rounds W to fp16 for 8 bits
    assert float((Q - theirs).norm() / theirs.norm()) < 0.01
    assert lost(W, (Q, A, B)) == pytest.approx(lost(W, (theirs, L, R)), rel=0.02)
    if turns == 1 and bits == 4:
        torch.testing.assert_close(B @ A, R @ L, rtol=0, atol=2e-3)


def test_the_factors_of_a_lora_carry_its_scale(W):
    _, A, B = loftq(W, 4, iterations=2)
    for scale in (1.0, 0.25, 2.0):
        a, b = factors(W, 4, scale, LoftQConfig(loftq_iter=2))
        torch.testing.assert_close(scale * b @ a, B @ A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_quantised_already_has_nothing_to_make_good(W, bits):
    with pytest.raises(ConfigError, match="replace_lora_weights_loftq"):
        factors(loftq(W, 4, bits=bits)[0], 4, 1.0, LoftQConfig(bits))


def test_half_precision_is_computed_in_fp32(W):
    Q, A, B = loftq(W.bfloat16(), 4)
    assert {t.dtype for t in (Q, A, B)} == {torch.float32} and {t.dtype for t in loftq(W.double(), 4)} == {
        torch.float64
    }


def test_the_config_is_pefts():
    from peft import LoftQConfig as Theirs

    assert vars(LoftQConfig()) == vars(Theirs())


@pytest.mark.parametrize(
    "call",
    [
        lambda W: loftq(W, 4, bits=3),
        lambda W: loftq(W, 4, iterations=0),
        lambda W: loftq(W, 4, method="nf2"),
        lambda W: loftq(W[None], 4),
        lambda W: factors(W, 4, 1.0, LoftQConfig(loftq_bits=5)),
        lambda W: factors(W, 4, 0.0, LoftQConfig()),
    ],
)
def test_what_is_not_allowed_is_said(W, call):
    with pytest.raises(ConfigError):
        call(W)
