"""Randomness as a function of seed, step and sample: a run can be repeated, resumed or split without a state to carry along."""

from __future__ import annotations

import functools
import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone, such as (seed, step, "noise", sample)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform(*key: int | str) -> float:
    """One number in [0, 1)."""
    return torch.rand((), generator=generator(*key)).item()


def order(n: int, start: int, count: int, *key: int | str) -> list[int]:
    """Places start .. start + count - 1 of an endless list that is one shuffled pass through range(n) after another."""
    return [_pass(n, place // n, key)[place % n] for place in range(start, start + count)]


@functools.lru_cache(maxsize=64)
def _pass(n: int, number: int, key: tuple[int | str, ...]) -> list[int]:
    return torch.randperm(n, generator=generator(*key, "pass", number)).tolist()


def reseed(*key: int | str) -> None:
    """Let torch's default generators, from which layers drop features, depend on `key` alone."""
    torch.manual_seed(generator(*key).initial_seed())
