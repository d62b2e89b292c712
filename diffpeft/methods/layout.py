"""What is known of each method beside its mathematics: one row a method, from which files, checks, configs and choices are derived.

Nothing here needs torch, so that a file's header can be judged without it. How axes are written is said in `axes`.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffpeft.methods.axes import Form, alternatives, form

BIAS = "diff_b"  # a change of the layer's bias, beside any method
MAGNITUDES = {"lora_magnitude_vector": "o *1 / 1 o *1", "dora_scale": "o 1? *1 | 1 i *1"}  # PEFT's, LyCORIS's


@dataclass(frozen=True)
class Field:
    """A field of PEFT's config that other methods do not have.

    Args:
        name: the field's.
        option: of the adapter's options; empty for a field that only a fresh adapter looks at.
        kind: what it holds: `flag`, `count`, `number`, `numbers` by pattern or `word`.
        default: of the field, where a file leaves it out.
    """

    name: str
    option: str
    kind: str
    default: Any


@dataclass(frozen=True)
class Training:
    """How a run's options become a config.

    Args:
        fields: {option of the run: field of the config}. An alpha that is not said is the rank.
        config: fields that are always so.
        keywords: of `attach`.
        images: whether images can be trained with it.
        matrix: whether the rank is that of a matrix, so that one above both its sides adds parameters and nothing else.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    keywords: Mapping[str, object] = field(default_factory=dict)
    images: bool = True
    matrix: bool = False


@dataclass(frozen=True)
class Layout:
    """A method's facts.

    Args:
        home: its file in diffpeft/methods and the class there.
        forms: the sets of tensors that are complete.
        shared: {role: axes} of the tensors of the whole adapter, at least as large as each layer needs.
        config: the name of PEFT's config, in the same file; empty for a method that only files hold.
        peft: PEFT's type; empty if PEFT has no such method.
        status: what begins the names of its layers in PEFT's status, where that is not `method.`.
        alpha: what an alpha is: the `scale` times the rank, the `bound` of a rotation, or nothing (empty).
        alpha_field: the config's field for it; empty if it has none.
        rank_field: the config's field for the rank.
        rank_default: what it is where a config leaves it out.
        patterns: the config's field for ranks of some layers; empty if all have one. An alpha, where there is one, differs with it.
        fields: fields of the config that are options of the adapter, or its own otherwise.
        dropouts: {field of the config: option} of what is dropped while training.
        ranks: the letters that are ranks, the first that is there counts.
        block: the letter that stands for a rank where there is none: the size of a rotation's blocks.
        inner: whether a DoRA can be over it.
        over: whether it is a DoRA: magnitudes over another method.
        twins: {role: what it is called on an embedding}.
        off: roles whose zeros switch the adapter off.
        linear: roles that the change of the weight is proportional to, those of them that are there together; empty if there are none.
        mark: the role that tells the method from others with the same roles.
        pruned: whether a rank may be 0.
        stage: methods of a lower one act first on a layer, those of one stage in the order of the table.
        training: how it is trained from a run's options; None if it is not.
    """

    home: str
    forms: tuple[Form, ...]
    shared: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    config: str = ""
    peft: str = ""
    status: str | None = None
    alpha: str = ""
    alpha_field: str = ""
    rank_field: str = "r"
    rank_default: int = 8
    patterns: str = ""
    fields: tuple[Field, ...] = ()
    dropouts: Mapping[str, str] = field(default_factory=dict)
    ranks: tuple[str, ...] = ("r",)
    block: str = ""
    inner: bool = False
    over: bool = False
    twins: Mapping[str, str] = field(default_factory=dict)
    off: frozenset[str] = frozenset()
    linear: frozenset[str] = frozenset()
    mark: str = ""
    pruned: bool = False
    stage: int = 2
    training: Training | None = None

    @property
    def options(self) -> tuple[Field, ...]:
        """The fields of the config that are options of the adapter."""
        return tuple(row for row in self.fields if row.option)

    @property
    def stem(self) -> str:
        """What PEFT's names of its classes begin with: `HRA` of HRAConfig, HRAModel and HRALayer."""
        return self.config.removesuffix("Config")

    @property
    def prefix(self) -> str:
        """What PEFT's names of its tensors begin with: `hra_`."""
        words = zip(*(role.split("_")[:-1] for one in self.forms if one.peft for role in one.axes), strict=False)
        alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, words)
        return "".join(f"{parts[0]}_" for parts in alike)

    @functools.cached_property
    def axes(self) -> dict[str, str]:
        """{role: its axes} in the first form that has it."""
        return {role: text for one in reversed(self.forms) for role, text in one.axes.items()}

    @functools.cached_property
    def ranked(self) -> tuple[tuple[str, int], ...]:
        """(role, axis) of each tensor with an axis that is the rank, those first in which it stands at one place in every form."""
        places = [
            (role, _place(one.axes[role], name)) for name in self.ranks for one in self.forms for role in one.axes
        ]
        known = [(role, place) for role, place in dict.fromkeys(places) if place is not None]
        steady = Counter(role for role, _ in known)
        return tuple(sorted(known, key=lambda row: steady[row[0]] > 1))

    @functools.cached_property
    def roles(self) -> tuple[str, ...]:
        """Every role that can occur, in the order of the forms."""
        return tuple(dict.fromkeys(role for one in self.forms for role in one.axes))

    def key(self, name: str) -> str:
        """By what `patterns` means one layer alone. PEFT looks for it at a name's beginning in a `rank_pattern`, in others for the name as it is."""
        return "^" + name.replace(".", "\\.") if self.patterns == "rank_pattern" else name

    def claims(self, roles: Collection[str], role: str = "") -> bool:
        """Whether a layer's tensors, or one of them, may be of this method where others have the same roles."""
        if self.over:
            under = inner(roles)
            under_roles = LAYOUTS[under].roles if under else ()
            return not {*MAGNITUDES}.isdisjoint(roles) and (not role or role in MAGNITUDES or role in under_roles)
        return not self.mark or self.mark in roles

    def share(self, axes: Mapping[str, int], role: str = "") -> tuple[int, int]:
        """How many of a layer's tensors {role: number of axes} may be of this method, and how many of these have a number of axes that it knows."""
        roles = [other for other in axes if other in self.axes] if self.claims(axes, role) else []
        return len(roles) * (2 if self.mark else 1), sum(self.takes(other, axes[other]) for other in roles)

    def takes(self, role: str, n: int) -> bool:
        """Whether there is a tensor of this role with so many axes."""
        ways = [axes for one in self.forms if role in one.axes for axes in alternatives(one.axes[role])]
        return any(len(axes) == n or (axes[-1][0] == "*" and len(axes) <= n + 1) for axes in ways)

    def form(self, roles: Collection[str], lookup: bool | None = None) -> Form:
        """The form that tensors of these roles are, or are a part of; one that mixes the axes of several if they are of none."""
        present = {role for role in roles if role in self.axes}
        fitting = [one for one in self.forms if present <= one.axes.keys()]
        fitting = [one for one in fitting if lookup is None or one.lookup in (None, lookup)] or fitting
        whole = [one for one in fitting if one.needed <= present]
        return next(iter(whole or fitting), Form(self.axes))


def _place(text: str, name: str) -> int | None:
    """At which axis a letter stands."""
    words = alternatives(text)[0]
    return words.index(name) if name in words else None


def _words(*names: str) -> frozenset[str]:
    return frozenset(name for text in names for name in text.split())


def _same(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


_LORA = (
    form("lora_A: r i *k; lora_B: o r *1; lora_B_bias?: o"),
    form("lora_A: r i *1; lora_mid: p r *k; lora_B: o p *1; lora_B_bias?: o", peft=False),
    form("lora_embedding_A: r i; lora_embedding_B: o r"),
    form("lora_A: r I *k; lora_B: o q *1; lora_B_bias?: o", products={"r": ("q", "g")}, across=True),
)
_EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_LOHA = (
    form("hada_w1_a: o r; hada_w1_b: r i.k; hada_w2_a: o r; hada_w2_b: r i.k"),
    form("hada_w1_a: r o; hada_w1_b: r i; hada_w2_a: r o; hada_w2_b: r i; hada_t1: r r *k1; hada_t2: r r *k1"),
)
_LOKR = tuple(
    form(f"{left}; {right}", products={"o": ("o1", "o2"), "i": ("i1", "i2")})
    for left in ("lokr_w1: o1 i1", "lokr_w1_a: o1 q; lokr_w1_b: q i1")
    for right in (
        "lokr_w2: o2 i2 *k",
        "lokr_w2_a: o2 r; lokr_w2_b: r i2.k",
        "lokr_w2_a: r o2; lokr_w2_b: r i2; lokr_t2: r r *k1",
    )
)
_PRODUCT = {"rank": "r", "alpha": "alpha", "dropout": "rank_dropout"}
_LOW_RANK = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_BLOCKS = "oft_blocks: n b b; rescale?: o 1? *1"

LAYOUTS: dict[str, Layout] = {
    "lora": Layout(
        "lora.Lora",
        _LORA,
        config="LoraConfig",
        peft="LORA",
        dropouts={"lora_dropout": "dropout"},
        alpha_field="lora_alpha",
        patterns="rank_pattern",
        alpha="scale",
        inner=True,
        twins=_EMBEDDING,
        off=_words("lora_B lora_embedding_B lora_B_bias"),
        linear=_words("lora_B lora_embedding_B lora_B_bias"),
        training=Training(_LOW_RANK, matrix=True),
    ),
    "dora": Layout(
        "dora.Dora",
        tuple(one | {role: text} for one in (*_LORA, *_LOHA, *_LOKR) for role, text in MAGNITUDES.items()),
        config="LoraConfig",
        peft="LORA",
        status="lora.",
        dropouts={"lora_dropout": "dropout"},
        alpha_field="lora_alpha",
        patterns="rank_pattern",
        ranks=("q", "r"),
        alpha="scale",
        over=True,
        twins=_EMBEDDING,
        stage=1,
        training=Training(_LOW_RANK, {"use_dora": True}, matrix=True),
    ),
    "adalora": Layout(
        "adalora.AdaLora",
        (form("lora_A: r i.k; lora_B: o r; lora_E: r 1"),),
        config="AdaLoraConfig",
        peft="ADALORA",
        status="adalora.SVD",
        dropouts={"lora_dropout": "dropout"},
        alpha_field="lora_alpha",
        alpha="scale",
        rank_field="init_r",
        mark="lora_E",
        pruned=True,
        off=_words("lora_B"),
        linear=_words("lora_B"),
    ),
    "loha": Layout(
        "loha.LoHa",
        _LOHA,
        config="LoHaConfig",
        peft="LOHA",
        dropouts=_same("rank_dropout module_dropout"),
        alpha_field="alpha",
        patterns="rank_pattern",
        alpha="scale",
        inner=True,
        off=_words("hada_w1_a hada_w2_a"),
        linear=_words("hada_w1_a"),
        training=Training(_PRODUCT, matrix=True),
    ),
    "lokr": Layout(
        "lokr.LoKr",
        _LOKR,
        config="LoKrConfig",
        peft="LOKR",
        dropouts=_same("rank_dropout module_dropout rank_dropout_scale"),
        alpha_field="alpha",
        patterns="rank_pattern",
        ranks=("q", "r"),
        alpha="scale",
        inner=True,
        off=_words("lokr_w1 lokr_w1_a"),
        linear=_words("lokr_w1 lokr_w1_a"),
        training=Training(_PRODUCT),
    ),
    "glora": Layout(
        "glora.GLoRA",
        (
            form("glora_a1: i r *1; glora_a2: r i *1; glora_b1: o r *1; glora_b2: r i *k"),
            form("glora_a1: i r *1; glora_a2: r i *1; glora_b1: o r *1; glora_b2: r i *1; glora_bm: r r *k"),
            # old files of LyCORIS have the two of each pair in each other's place
            form("glora_a2: i r *1; glora_a1: r i *1; glora_b2: o r *1; glora_b1: r i *k"),
            form("glora_a2: i r *1; glora_a1: r i *1; glora_b2: o r *1; glora_b1: r i *1; glora_bm: r r *k"),
        ),
        alpha="scale",
        linear=_words("glora_a1 glora_b1"),
    ),
    "ia3": Layout(
        "ia3.IA3",
        (form("ia3_l: o 1 *1 | 1 i *1"), form("ia3_w: o *1 | 1 o *1; on_input: *1", peft=False)),
        config="IA3Config",
        peft="IA3",
        status="",
        ranks=(),
        off=_words("ia3_w"),
        linear=_words("ia3_w"),
        training=Training(images=False),
    ),
    "oft": Layout(
        "oft.Oft",
        (
            form(_BLOCKS, turns="o", shared=True, side="output", peft=False),
            form("oft_R: n b^", turns="i.k", shared=True, side="input", lookup=False),
            form("oft_embedding_R: n b^", turns="o", shared=True, side="input", lookup=True),
        ),
        config="OFTConfig",
        peft="OFT",
        dropouts=_same("module_dropout"),
        ranks=(),
        block="b",
        alpha="bound",
        off=_words("oft_blocks"),
        training=Training({"rank": "oft_block_size", "dropout": "module_dropout"}, keywords={"side": "output"}),
    ),
    "boft": Layout(
        "boft.Boft",
        (
            form(f"oft_blocks: m n b b; {_BLOCKS.partition('; ')[2]}", turns="o", side="output", peft=False),
            form("boft_R: m n b b; boft_s: o 1 / 1 o", turns="i.k", side="input", lookup=False),
            form("boft_R: m n b b; boft_s: o 1 / 1 o", turns="o", side="input", lookup=True),
        ),
        config="BOFTConfig",
        peft="BOFT",
        dropouts=_same("boft_dropout"),
        ranks=(),
        block="b",
        alpha="bound",
        off=_words("oft_blocks"),
        training=Training({"rank": "boft_block_size", "dropout": "boft_dropout"}, keywords={"side": "output"}),
    ),
    "hra": Layout(
        "hra.Hra",
        (form("hra_u: i.k r", lookup=False), form("hra_u: o r", lookup=True)),
        config="HRAConfig",
        peft="HRA",
        status="hra.HRA",
        fields=(Field("apply_GS", "apply_GS", "flag", False),),
        training=Training({"rank": "r"}, images=False),
    ),
    "vera": Layout(
        "vera.Vera",
        (form("vera_lambda_b: o; vera_lambda_d: r"),),
        config="VeraConfig",
        peft="VERA",
        dropouts={"vera_dropout": "dropout"},
        shared={"vera_A": ("r", "i.k"), "vera_B": ("o", "r")},
        rank_default=256,
        fields=(
            Field("projection_prng_key", "projection_prng_key", "count", 0),
            Field("save_projection", "save_projection", "flag", True),
            Field("d_initial", "", "number", 0.1),
        ),
        off=_words("vera_lambda_b"),
        linear=_words("vera_lambda_b"),
        training=Training({"rank": "r", "dropout": "vera_dropout"}, images=False),
    ),
    "hira": Layout(
        "hira.Hira",
        (form("hira_A: r i *k; hira_B: o r *1"), form("hira_embedding_A: r i; hira_embedding_B: o r")),
        config="HiraConfig",
        peft="HIRA",
        dropouts={"hira_dropout": "dropout"},
        rank_default=32,
        patterns="rank_pattern",
        twins={"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"},
        off=_words("hira_B hira_embedding_A"),
        linear=_words("hira_B hira_embedding_B"),
        training=Training({"rank": "r", "dropout": "hira_dropout"}, images=False),
    ),
    "c3a": Layout(
        "c3a.C3A",
        (form("c3a_kernel: m n b", products={"o": ("m", "b"), "i.k": ("n", "b")}),),
        config="C3AConfig",
        peft="C3A",
        status="c3a.C3A",
        rank_field="block_size",
        rank_default=256,
        patterns="block_size_pattern",
        ranks=("b",),
        off=_words("c3a_kernel"),
        linear=_words("c3a_kernel"),
        training=Training({"rank": "block_size"}, {"init_weights": True}, images=False),
    ),
    "miss": Layout(
        "miss.Miss",
        (form("miss_block: r m | n r r", products={"o": ("m", "p")}),),
        config="MissConfig",
        peft="MISS",
        status="miss.Miss",
        dropouts={"miss_dropout": "dropout"},
        fields=(Field("mini_r", "", "count", 1),),
        rank_default=64,
        off=_words("miss_block"),
        linear=_words("miss_block"),
        training=Training({"rank": "r", "dropout": "miss_dropout"}, images=False),
    ),
    "road": Layout(
        "road.Road",
        (form("road_theta: t; road_alpha: t"),),
        config="RoadConfig",
        peft="ROAD",
        status="road.",
        fields=(Field("variant", "variant", "word", "road_1"), Field("group_size", "group_size", "count", 64)),
        ranks=(),
        training=Training({"rank": "group_size"}, images=False),
    ),
    "delora": Layout(
        "delora.Delora",
        (form("delora_A: r i *k; delora_B: o r *1; delora_lambda: 1; delora_w_norm: i *k"),),
        config="DeloraConfig",
        peft="DELORA",
        status="delora.Delora",
        dropouts={"module_dropout": "dropout"},
        patterns="rank_pattern",
        fields=(Field("delora_lambda", "", "number", 15), Field("lambda_pattern", "", "numbers", None)),
        off=_words("delora_B"),
        linear=_words("delora_lambda"),
        training=Training({"rank": "r", "dropout": "module_dropout"}, images=False, matrix=True),
    ),
    "full": Layout(
        "full.Full",
        (
            form("diff: o i? *k", lookup=False),
            form("set_weight: o i? *k", lookup=False),
            form("diff: i o", lookup=True),
            form("set_weight: i o", lookup=True),
            Form({}),
        ),
        ranks=(),
        off=_words("diff"),
        linear=_words("diff"),
        stage=0,
    ),
    "norm": Layout(
        "norm.Norm",
        (form("w_norm: o *1"), form("b_norm: o *1"), form("w_norm: o *1; b_norm: o *1")),
        ranks=(),
        off=_words("w_norm b_norm"),
        linear=_words("w_norm b_norm"),
        stage=0,
    ),
}


DROPOUTS = frozenset(option for layout in LAYOUTS.values() for option in layout.dropouts.values())
RANKS = ("r", "q", "p")  # the letters of ranks
ROLES = {method: layout.roles for method, layout in LAYOUTS.items() if method != "dora"}
KNOWN = frozenset(role for layout in LAYOUTS.values() for role in layout.roles) | {BIAS}
# {what the names of PEFT's classes begin with: row}
TUNED = {layout.stem: layout for layout in LAYOUTS.values() if layout.config and not layout.over}
CONFIGS = {layout.config: layout.home.split(".")[0] for layout in LAYOUTS.values() if layout.config and not layout.over}
OFF = frozenset(role for layout in LAYOUTS.values() for role in layout.off) | {BIAS}
PATTERNS = tuple(sorted({layout.patterns for layout in LAYOUTS.values()} - {""}))  # the fields of configs for ranks
INNER = tuple(method for method, layout in LAYOUTS.items() if layout.inner)
PRODUCTS = tuple(method for method, layout in LAYOUTS.items() if layout.inner or layout.over)


def inner(roles: Collection[str]) -> str | None:
    """The method that a DoRA of these tensors is over; None if there is none."""
    return next((method for method in INNER if not {*LAYOUTS[method].roles}.isdisjoint(roles)), None)


def named(method: str, roles: Collection[str]) -> frozenset[str]:
    """A method's name, and the name of what a DoRA is over unless that is LoRA."""
    under = inner(roles) if method == "dora" else None
    return frozenset({method}) if under in (None, "lora") else frozenset({method, str(under)})


def is_scaled(method: str, shapes: Collection[str]) -> bool:
    """Whether an alpha scales the update: not that of a LoKr of two whole halves, which has no rank."""
    return LAYOUTS[method].alpha == "scale" and not {"lokr_w1", "lokr_w2"} <= {*shapes}
