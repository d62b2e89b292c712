"""Ways to damage a file: bits, lengths, the header's rows, keys, metadata, and the config of a PEFT folder."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

from diffpeft.converters.formats.schema import FIELDS
from diffpeft.io import SIZES
from tests.robustness.seeds import Seed

VALUES: list[Any] = [
    0,
    1,
    -1,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e39,
    math.inf,
    math.nan,
    True,
    None,
    "",
    "a",
    "../../x",
]
VALUES += [
    "(.|.)*!",
    "(",
    "\ud800",
    "é" * 50,
    [],
    [5, None],
    ["all-linear"],
    {},
    {"a": "b"},
    {"^x": -1},
    [[0, 2]] * 300,
]
SIZES_OF_AXES = [0, 1, 2, 3, 4, 7, 8, 16, 32, 33, 128, 2**31, 2**62, 10**18, -1]
TAILS = [
    "",
    ".weight",
    ".alpha",
    ".lora_A.weight",
    ".lora_B.default.weight",
    ".hada_w1_a",
    ".oft_R.weight",
    ".lokr_w2",
    ".diff",
    ".x",
]


def damaged(seed: Seed, rng: random.Random) -> tuple[Seed, bytes, str]:
    """A copy with one to four faults: itself (for its config), its bytes, and what was done."""
    seed, done = seed.copy(), []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        way = rng.choice(CONFIGURED if seed.config is not None and rng.random() < 0.5 else STRUCTURED)
        if seed.rows:
            way(seed, rng)
            done.append(way.__name__)
    data = seed.bytes()
    if rng.random() < 0.3:
        way_ = rng.choice(RAW)
        data = way_(data, rng)
        done.append(way_.__name__)
    return seed, data, "+".join(done)


# Of the bytes


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_header(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    end = min(8 + int.from_bytes(data[:8], "little"), len(data))
    for _ in range(rng.choice((1, 2, 5))):
        out[rng.randrange(end)] = rng.choice(b'0123456789"{}[]:,x \xff')
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 1000)))


def swap(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:a] + data[b : b + 16] + data[a + 16 : b] + data[a : a + 16] + data[b + 16 :]


RAW: list[Callable[[bytes, random.Random], bytes]] = [flip_bits, flip_header, truncate, extend, swap]

# Of the header: the file stays whole unless that is the point


def _key(seed: Seed, rng: random.Random) -> str:
    return rng.choice(list(seed.rows))


def _zeros(dtype: Any, shape: list[Any]) -> bytes:
    small = all(isinstance(n, int) and 0 <= n <= 4096 for n in shape) and math.prod(shape) <= 1 << 18
    return bytes(math.prod(shape) * SIZES.get(dtype, 4)) if small else b""


def drop_key(seed: Seed, rng: random.Random) -> None:
    del seed.rows[_key(seed, rng)]


def rename_key(seed: Seed, rng: random.Random) -> None:
    key = _key(seed, rng)
    body, _, tail = key.partition(".")
    new = rng.choice(
        [key + rng.choice(TAILS), body + rng.choice(TAILS), tail, "module." + key, key[::-1], key.replace("_", ".")]
    )
    new = rng.choice(
        [new, new.replace("blocks", "block"), new.replace("0", "9999"), new.replace("down", "up"), new + "\ud800"]
    )
    seed.rows[new] = seed.rows.pop(key)


def add_key(seed: Seed, rng: random.Random) -> None:
    key = _key(seed, rng)
    dtype, shape, data = seed.rows[_key(seed, rng)]
    seed.rows[key.rpartition(".")[0] + rng.choice(TAILS)] = (dtype, shape, data)


def swap_tensors(seed: Seed, rng: random.Random) -> None:
    a, b = _key(seed, rng), _key(seed, rng)
    seed.rows[a], seed.rows[b] = seed.rows[b], seed.rows[a]


def reshape(seed: Seed, rng: random.Random) -> None:
    key = _key(seed, rng)
    dtype, shape, data = seed.rows[key]
    n = math.prod(shape)
    ways = [
        [n],
        [1, n],
        [n, 1],
        [*shape, 1],
        [1, *shape],
        shape[::-1],
        [],
        [n, 1, 1, 1],
        [*shape, 1, 1, 1],
        [1] * 20 + shape,
    ]
    new = rng.choice(ways)
    seed.rows[key] = (dtype, list(new), data if new else data[: SIZES.get(dtype, 4)])


def resize(seed: Seed, rng: random.Random) -> None:
    key = _key(seed, rng)
    dtype, shape, _ = seed.rows[key]
    shape = list(shape)
    if shape and rng.random() < 0.8:
        shape[rng.randrange(len(shape))] = rng.choice(SIZES_OF_AXES)
    else:
        shape = [rng.choice(SIZES_OF_AXES) for _ in range(rng.randrange(6))]
    seed.rows[key] = (dtype, shape, _zeros(dtype, shape))


def retype(seed: Seed, rng: random.Random) -> None:
    key = _key(seed, rng)
    dtype = rng.choice([*SIZES, "F4", 7, None])
    _, shape, _ = seed.rows[key]
    seed.rows[key] = (dtype, shape, _zeros(dtype, shape))  # type: ignore[arg-type]


def renumber(seed: Seed, rng: random.Random) -> None:
    """Other numbers in a tensor, NaN and huge ones among them."""
    key = _key(seed, rng)
    dtype, shape, data = seed.rows[key]
    fill = rng.choice([b"\xff", b"\x7f", b"\x00", b"\x7b", None])
    seed.rows[key] = (dtype, shape, rng.randbytes(len(data)) if fill is None else fill * len(data))


def edit_metadata(seed: Seed, rng: random.Random) -> None:
    keys = [
        *seed.metadata,
        "format",
        "ss_network_module",
        "lora_adapter_metadata",
        "diffpeft.provenance",
        "diffpeft.family",
    ]
    keys += ["diffpeft.component", "modelspec.architecture", "ot_config", "unet", "diffpeft.adapter_config"]
    key = rng.choice(keys)
    old = seed.metadata.get(key)
    table = _table(old if isinstance(old, str) else None)
    if table and rng.random() < 0.7:
        _edit(table, rng)
        seed.metadata[key] = json.dumps(table)
    else:
        seed.metadata[key] = rng.choice([json.dumps(rng.choice(VALUES)), rng.choice(VALUES), "flux", "sdxl", "{"])


STRUCTURED: list[Callable[[Seed, random.Random], None]] = [
    drop_key,
    rename_key,
    add_key,
    swap_tensors,
    reshape,
    resize,
    resize,
    retype,
    renumber,
    edit_metadata,
]

# Of a config


def _edit(table: dict[str, Any], rng: random.Random, depth: int = 0) -> None:
    """Change a value anywhere in a table."""
    key = rng.choice(list(table))
    inner = table[key]
    if isinstance(inner, dict) and inner and depth < 4 and rng.random() < 0.7:
        _edit(inner, rng, depth + 1)
    elif isinstance(inner, list) and inner and rng.random() < 0.6:
        inner[rng.randrange(len(inner))] = rng.choice(VALUES)
    else:
        table[key] = rng.choice(VALUES)


def _table(text: str | None) -> dict[str, Any]:
    """The fields of a config, as far as it is one."""
    try:
        table = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def edit_config(seed: Seed, rng: random.Random) -> None:
    if table := _table(seed.config):
        _edit(table, rng)
        seed.config = json.dumps(table)


def drop_field(seed: Seed, rng: random.Random) -> None:
    if table := _table(seed.config):
        del table[rng.choice(list(table))]
        seed.config = json.dumps(table)


def add_field(seed: Seed, rng: random.Random) -> None:
    if table := _table(seed.config):
        table[rng.choice([*FIELDS, "cls", "self", "x"])] = rng.choice(VALUES)
        seed.config = json.dumps(table)


def scramble_config(seed: Seed, rng: random.Random) -> None:
    text = seed.config or ""
    at = rng.randrange(len(text) + 1)
    seed.config = (
        text[:at] + rng.choice(["", "[" * 5000, "\x00", '"', "{", "9" * 5000, "\ud800"]) + text[at + rng.randrange(3) :]
    )


CONFIGURED: list[Callable[[Seed, random.Random], None]] = [
    edit_config,
    edit_config,
    drop_field,
    add_field,
    scramble_config,
]
