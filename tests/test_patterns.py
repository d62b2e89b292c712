"""Patterns for names: Python's and PEFT's rules, in bounded time."""

import re
import time

import pytest
from peft.utils.other import get_pattern_key

from diffpeft import patterns
from diffpeft.errors import ConfigError, UnsafeFileError
from tests.pairwise import params

NAMES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.mlp.down_proj",
    "transformer_blocks.1.attn.to_out.0",
    "a-b.c",
    "layers",
    "",
]
EXPRESSIONS = [
    "q_proj",
    "layers.0.self_attn.q_proj",
    r".*\.q_proj",
    r"model\.layers\.\d+\.(self_attn|mlp)\..*",
    r"^model.*proj$",
    "q_proj|layers",
    r"(?i)MODEL.*",
    r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.attn)",
    r"(?!model).*",
    "a-b.c",
    r"(a|b)-\1.*|(.)-b\.c",
    "",
    ".",
]
SLOW = [
    "(.|.)" * 40 + "(?:!|x!)",
    "(.|.)" * 40 + "(?:!|x.)y",
    "(.|.)" * 40 + "[!]",
    ".?" * 100 + "[!?]",
    r"(([a-z0-9_.])+)+[!]",
    "(?=(.+)+[!])x",
    "(.*)*[!]",
    "(a|b|ab|.)*[!]",
]
LONG = "model.layers.10.mlp.experts.down_proj" * 8


@pytest.mark.parametrize("pattern", EXPRESSIONS)
def test_a_whole_match_is_pythons(pattern):
    for name in NAMES:
        assert patterns.fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None), name


@pytest.mark.parametrize("pattern", [e for e in EXPRESSIONS[:-2] if not e.startswith("(?i)")])
def test_the_first_pattern_that_fits_is_pefts(pattern):
    for other in ("down_proj", "^layers$", r"\.0$"):
        for table in ({pattern: 1, other: 2}, {other: 2, pattern: 1}):
            for name in NAMES[:-1]:
                assert patterns.first(table, (name,), 0) == table.get(get_pattern_key(table, name), 0), name


RULES = {
    "fullmatch": patterns.fullmatch,
    "ends": patterns.ends,
    "first": lambda pattern, name: patterns.first({pattern: 1}, (name,), 0),
}
TIMED = [(pattern, rule) for pattern in SLOW for rule in RULES]


# each takes its second: all patterns by one rule in turn, and all rules on two patterns
@pytest.mark.parametrize(
    "pattern, rule", params(TIMED, [t for n, t in enumerate(TIMED) if n // 3 % 3 == n % 3 or t[0] in SLOW[:6:5]])
)
def test_no_pattern_takes_longer_than_its_second(pattern, rule):
    start = time.process_time()
    with patterns.limited(UnsafeFileError, "a.json"):
        for number in range(100):
            try:
                assert not RULES[rule](pattern, f"{LONG}.{number}")
            except UnsafeFileError as error:
                assert "too long" in error.what and error.where == "a.json"
                break
    assert time.process_time() - start < 3 * patterns.SECONDS


def test_outside_of_an_operation_each_match_has_its_own_second():
    with pytest.raises(ConfigError, match="takes too long"):
        patterns.fullmatch(SLOW[0], LONG)
    assert patterns.fullmatch("mid.*", "mid_block")


def test_many_patterns_that_are_names_are_looked_up():
    table = {f"blocks.{i}.attn": i for i in range(20_000)}
    start = time.perf_counter()
    assert [patterns.first(table, (f"unet.blocks.{i}.attn",), -1) for i in range(0, 20_000, 10)] == [
        *range(0, 20_000, 10)
    ]
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("bad", ("(", "[a", "a" * 30_000, "(" * 3000, None, 5))
def test_what_is_no_pattern_is_refused(bad):
    with pytest.raises(ConfigError, match=r"pattern|regular expression"):
        patterns.check(bad)


def test_many_patterns_share_one_second_too():
    """Each is matched at once; what takes long is to understand them."""
    many = {f"x{n}.*y(a|b)": n for n in range(60_000)}
    start = time.thread_time()
    with pytest.raises(UnsafeFileError, match="too long"), patterns.limited(UnsafeFileError, "here"):
        patterns.first(many, ["some.layer"], None)
    assert time.thread_time() - start < 2.0
