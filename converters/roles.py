"""Which tensors a method has. A role is PEFT's parameter name; how a format spells it is the format's affair."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from itertools import product

Shape = tuple[int, ...]

# Several methods on one layer act in this order.
ROLES = {
    "full": ("diff", "set_weight"),
    "norm": ("w_norm", "b_norm"),
    "adalora": ("lora_A", "lora_B", "lora_E"),
    "lora": ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_mid", "lora_B_bias"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "glora": ("glora_a1", "glora_a2", "glora_b1", "glora_b2", "glora_bm"),
    "ia3": ("ia3_l", "ia3_w", "on_input"),
    "oft": ("oft_R", "oft_embedding_R", "oft_blocks", "rescale"),
    "boft": ("boft_R", "boft_s", "oft_blocks", "rescale"),
}
ADDITIVE = ("lora", "loha", "lokr")
MAGNITUDES = ("lora_magnitude_vector", "dora_scale")  # either makes an additive method a DoRA
BIAS = "diff_b"  # a change of the layer's bias, beside any method
OLD_OFT = ("oft_r", "oft_s")  # PEFT's before 0.16, which are read as what they are today: see engine.today
KNOWN = frozenset(role for roles in ROLES.values() for role in roles) | {*MAGNITUDES, BIAS, *OLD_OFT}

# The roles whose first axis is the layer's out features (LoKr: as many as the second half leaves; rotations: blocks), so that a fused layer's
# parts are rows of them; all parts share the others. Zeros change nothing where a tensor of FILLED stands.
FILLED = frozenset(
    {"lora_B", "lora_B_bias", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a", "oft_blocks"}
    | {"diff", "diff_b", "w_norm", "b_norm", "ia3_w"}
)
ROWS = FILLED | {"rescale", "boft_s", "set_weight", "glora_b1"}

# The sets of roles that are a whole method, and the roles that may be there besides.
_HALVES = ("lokr_w1", "lokr_w1_a lokr_w1_b"), ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2")
WHOLE = {
    "adalora": ("lora_A lora_B lora_E",),
    "lora": ("lora_A lora_B", "lora_A lora_B lora_mid", "lora_embedding_A lora_embedding_B"),
    "loha": ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", " ".join(ROLES["loha"])),
    "lokr": tuple(" ".join(halves) for halves in product(*_HALVES)),
    "full": ("diff", "set_weight", ""),
    "norm": ("w_norm", "b_norm", "w_norm b_norm"),
    "glora": ("glora_a1 glora_a2 glora_b1 glora_b2",),
    "ia3": ("ia3_l", "ia3_w on_input"),
    "oft": ("oft_blocks", "oft_R", "oft_embedding_R"),
    "boft": ("oft_blocks", "boft_R boft_s"),
}
BESIDE = frozenset({"lora_B_bias", "rescale", "glora_bm", *MAGNITUDES, BIAS})

# Tensor names of methods that exist in files and that no method here reads: {how the last part of a key starts: method}.
FOREIGN = {
    "oft_diag": "early oft",
    "vera_lambda_": "vera",
    "lambda_layer": "tlora",
    "q_layer": "tlora",
    "p_layer": "tlora",
    "glora_A": "glora of PEFT",
    "glora_B": "glora of PEFT",
    "hra_u": "hra",
    "delora_": "delora",
}


# How many axes the tensors have whose number of axes says what they are.
AXES = {
    **dict.fromkeys((*ROLES["loha"][:4], "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"), range(2, 3)),
    **dict.fromkeys(("lora_embedding_A", "lora_embedding_B", "lora_E", "oft_R", "oft_embedding_R"), range(2, 3)),
    **dict.fromkeys(("hada_t1", "hada_t2", "lokr_t2", "lora_mid"), range(2, 6)),
    "boft_R": range(4, 5),
    "boft_s": range(1, 3),
    "oft_blocks": range(3, 5),
}
_ANY = range(17)


def rows_of(role: str, shape: Shape) -> bool:
    """Whether a tensor has rows that belong to a fused layer's parts; a magnitude has if it is for outputs, (IA)^3's if it is no row."""
    if role == "dora_scale":
        return not (shape[0] == 1 and len(shape) > 1 and shape[1] > 1)
    return role in ROWS or role == "lora_magnitude_vector" or (role == "ia3_l" and not (shape[0] == 1 and shape[1] > 1))


def split(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """{method: roles} of one layer, in the order in which they act. `oft_blocks` are OFT's with 3 axes, BOFT's with 4. A bias alone is `full`'s."""
    turned = "boft" if len(shapes.get("oft_blocks", ())) == 4 else "oft"
    return {method: list(roles) for method, roles in _split(tuple(shapes), turned).items()}


@functools.cache
def _split(roles: tuple[str, ...], turned: str) -> dict[str, list[str]]:
    owner = _OWNER | {role: turned for role in ("oft_blocks", "rescale")}
    found = {method: [role for role in roles if owner.get(role) == method] for method in ROLES}
    found = {method: own for method, own in found.items() if own}
    if "adalora" in found:
        found["adalora"] += found.pop("lora", [])
    magnitudes = [role for role in roles if role in MAGNITUDES]
    if magnitudes:
        inner = next((method for method in ADDITIVE if method in found), None)
        found = {"dora": [*found.pop(inner, ()), *magnitudes], **found} if inner else {"dora": magnitudes, **found}
        found = {**{m: found.pop(m) for m in ("full", "norm") if m in found}, **found}
    for role in roles:
        if role == BIAS and found:
            next(iter(found.values())).append(role)
        elif role not in KNOWN:
            found.setdefault(foreign(role), []).append(role)
    return found if found or BIAS not in roles else {"full": [BIAS]}


_OWNER = {role: method for method, roles in ROLES.items() for role in roles}


def foreign(role: str) -> str:
    """The method, of none that is known here, that a tensor is of."""
    return next((method for start, method in FOREIGN.items() if role.startswith(start)), role)


def missing(roles: Collection[str]) -> tuple[str, ...] | None:
    """What one method's roles lack to be whole; None if they are parts of more than one whole."""
    return _missing(tuple(roles))


@functools.cache
def _missing(roles: tuple[str, ...]) -> tuple[str, ...] | None:
    own = set(roles) - BESIDE
    methods = [m for m, known in ROLES.items() if set(roles) & set(known)] or ["lora"]
    if set(roles) == {BIAS}:
        return ()
    wholes = [set(whole.split()) for m in methods for whole in WHOLE[m]]
    fitting = [whole - own for whole in wholes if own <= whole]
    if not fitting or set(MAGNITUDES) <= set(roles):
        return None
    fewest: set[str] = min(fitting, key=len)
    return tuple(sorted(fewest))


def rank(shapes: Mapping[str, Shape]) -> int:
    """The rank that the shapes of an additive method show; 0 if they show none (a LoKr of two whole halves, a rotation)."""
    roles = ("lora_A", "lora_embedding_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "glora_a2")
    return next((shapes[role][0] for role in roles if shapes.get(role)), 0)


def contradiction(shapes: Mapping[str, Shape]) -> str:
    """Which axes that are the rank have several sizes, or none; empty if all is well."""
    return _contradiction(tuple(shapes.items()))


@functools.lru_cache(4096)  # a file has few shapes
def _contradiction(items: tuple[tuple[str, Shape], ...]) -> str:
    shapes = dict(items)
    wrong = [f"{role} {shape}" for role, shape in shapes.items() if len(shape) not in AXES.get(role, _ANY)]
    if wrong:
        return f"{', '.join(wrong)} has another number of axes than this tensor has"
    thin = [f"{role} {shape}" for role, shape in shapes.items() if role not in {*BESIDE, *_THIN} and len(shape) < 2]
    if thin or any(not shapes[role] for role in shapes if role not in ("alpha", "on_input")):
        return f"{', '.join(thin) or 'a number'} is no factor"
    for group in _rank_axes(shapes):
        sizes = {shapes[role][axis] for role, axis in group if role in shapes}
        if len(sizes) > 1 or (0 in sizes and "lora_E" not in shapes):  # AdaLoRA may have pruned all
            told = ", ".join(f"{role} {shapes[role]}" for role in dict.fromkeys(r for r, _ in group) if role in shapes)
            return f"{told} have different ranks" if len(sizes) > 1 else f"{told} have rank 0"
    glora = {role: shapes[role] for role in ROLES["glora"][:4] if role in shapes}
    if len(glora) == 4 and not _is_glora(*(glora[role] for role in ROLES["glora"][:4])):
        return f"{', '.join(f'{role} {shape}' for role, shape in glora.items())} are of different ranks or layers"
    for group in _same_axes(shapes):
        sizes = {shapes[role][axis] for role, axis in group if role in shapes}
        if len(sizes) > 1:
            told = ", ".join(f"{role} {shapes[role]}" for role in dict.fromkeys(r for r, _ in group) if role in shapes)
            return f"{told} are of different layers"
    if "oft_blocks" in shapes and "rescale" in shapes:
        blocks, rows = shapes["oft_blocks"], shapes["rescale"][0]
        if blocks[-3] * blocks[-1] != rows:
            return f"rescale {shapes['rescale']} is for {rows} features, oft_blocks {blocks} for others"
    if "lora_mid" in shapes and any(n != 1 for role in ("lora_A", "lora_B") for n in shapes.get(role, ())[2:]):
        return f"lora_mid {shapes['lora_mid']} has the kernel, and lora_A {shapes.get('lora_A')} or lora_B {shapes.get('lora_B')} too"
    kernels = {role: shapes[role][2:] for role in ("hada_t1", "hada_t2") if role in shapes}
    if len({*kernels.values()}) > 1:
        return f"{', '.join(f'{role} {shapes[role]}' for role in kernels)} have different kernels"
    empty = [f"{role} {shape}" for role, shape in shapes.items() if 0 in shape and "lora_E" not in shapes]
    return f"{', '.join(empty)} is empty" if empty else ""


_THIN = frozenset({"diff", "set_weight", "w_norm", "b_norm", "ia3_w", "on_input"})  # may have one axis


def _rank_axes(roles: Collection[str]) -> list[list[tuple[str, int]]]:
    """Groups of (role, axis) that have the same size. A Tucker core turns the first factors around."""
    a = {core: int(core not in roles) for core in ("hada_t1", "hada_t2", "lokr_t2")}
    hada = [("hada_w1_b", 0), ("hada_w1_a", a["hada_t1"]), ("hada_w2_b", 0), ("hada_w2_a", a["hada_t2"])]
    return [
        [("lora_A", 0), ("lora_mid", 1) if "lora_mid" in roles else ("lora_B", 1)],
        [("lora_B", 1), ("lora_mid", 0), ("lora_E", 0)],
        [("lora_embedding_A", 0), ("lora_embedding_B", 1)],
        hada + [(core, axis) for core in ("hada_t1", "hada_t2") for axis in (0, 1)],
        [("lokr_w1_b", 0), ("lokr_w1_a", 1)],
        [("lokr_w2_b", 0), ("lokr_w2_a", a["lokr_t2"]), ("lokr_t2", 0), ("lokr_t2", 1)],
    ]


def _is_glora(a1: Shape, a2: Shape, b1: Shape, b2: Shape) -> bool:
    """Whether the shapes are GLoRA's, (in, r), (r, in), (out, r), (r, in), or an old file's, where the first of each pair is the second."""
    new = a1[1] == a2[0] == b1[1] == b2[0] and a1[0] == a2[1] == b2[1]
    old = a1[0] == a2[1] == b1[0] == b2[1] and a1[1] == a2[0] == b1[1]
    return new or old


def _same_axes(shapes: Mapping[str, Shape]) -> list[list[tuple[str, int]]]:
    """Groups of (role, axis) that have the same size, the layer's features."""
    cores = [core in shapes for core in ("hada_t1", "hada_t2")]
    ups = [(f"hada_w{n}_a", int(core)) for n, core in zip((1, 2), cores, strict=True)]
    outs = [("lora_B", 0), *ups, ("diff_b", 0), ("lora_B_bias", 0), ("diff", 0), ("set_weight", 0), ("glora_b1", 0)]
    if magnitude := shapes.get("lora_magnitude_vector"):
        outs.append(("lora_magnitude_vector", int(magnitude[0] == 1 and len(magnitude) > 1)))
    if "dora_scale" in shapes and len(shapes["dora_scale"]) > 1:
        turned = shapes["dora_scale"][0] == 1
        if any(role in shapes for role, _ in outs):
            up = next(shapes[role][axis] for role, axis in outs if role in shapes)
            outs += [("dora_scale", 0)] if not turned or up == 1 else []
    inside = [("lora_A", 1), ("hada_w1_b", 1), ("hada_w2_b", 1)]
    if "dora_scale" in shapes and shapes["dora_scale"][0] == 1 and "lora_A" in shapes and "lora_mid" not in shapes:
        inside += [("dora_scale", 1)] if len(shapes["dora_scale"]) > 1 and shapes["dora_scale"][1] != 1 else []
    return [outs, [("w_norm", 0), ("b_norm", 0)], inside, [("oft_blocks", -1), ("oft_blocks", -2)]]
