"""Files of options: our TOML, sd-scripts' TOML of arguments and of data sets, and ai-toolkit's YAML job. What a file is is told by what stands in it.

The last two become pairs of names and values, which `translate` turns into our options by one table. Imports no torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffpeft.errors import ConfigError, UnknownNameError, listed, shown
from diffpeft.files import Json
from diffpeft.train.config import PATHS, AnyOptions, Options, TrainConfig
from diffpeft.train.origins import COMMAND
from diffpeft.train.other_names import TABLE, hint
from diffpeft.train.translate import is_alias, translated
from diffpeft.train.translation import key_of

Pairs = list[tuple[str, object]]
_YAML = (".yaml", ".yml", ".json")


@dataclass
class Said:
    """Options by their names, where each is from, those that only follow from what another trainer does, and what people should know."""

    values: Json = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    implied: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def from_toml(path: str | Path, overrides: Mapping[str, object], kind: type[AnyOptions] = TrainConfig) -> AnyOptions:  # type: ignore[assignment]
    """The options in a file, replaced by `overrides`. Raises ConfigError or UnknownNameError."""
    return kind(**said_in(path, kind).values | dict(overrides))


def said_in(path: str | Path, kind: type[Options]) -> Said:
    """The options that a file says. Raises ConfigError or UnknownNameError."""
    path = Path(path)
    known = set(kind.names())
    table = _read(path)
    if kind is TrainConfig:
        pairs = _pairs(table, path)
        if any(is_alias(name, known) for name, _ in pairs) or pairs != list(table.items()):
            return said_by(pairs, known, path)
    for name in table:
        if name.replace("-", "_") not in known:
            error = UnknownNameError.of("option", name, known, where=path)
            raise UnknownNameError(error.what, where=path, remedy=f"{hint(name, known)} {error.remedy}".strip())
    values = {name.replace("-", "_"): value for name, value in table.items()}
    for name in PATHS & values.keys():
        paths = values[name] if isinstance(values[name], list) else [values[name]]
        if any(re.search(r"[\a\b\f\n\r\t\v]", str(p)) for p in paths):  # "C:\temp" in double quotes: its \t is a tab
            raise ConfigError(f"{name} is {shown(values[name])}", where=path, remedy=_BACKSLASHES)
    return Said(values, dict.fromkeys(values, f"file {path.name}"))


def said_by(pairs: Iterable[tuple[str, object]], known: set[str], path: Path | None = None) -> Said:
    """Options of another trainer as ours. `path`: the file that they are from; None for the command line."""
    to = translated(pairs, known, path or "")
    source, place = (f"file {path.name}", f"file {path.name}: ") if path else (COMMAND, "alias --")
    names = {ours: name.lstrip("-") for ours, name in to.names.items()}
    origins = {ours: source if key_of(name) == ours else f"{place}{name}" for ours, name in names.items()}
    return Said(to.values, origins, to.implied, to.remarks())


def data_pairs(path: Path) -> Pairs:
    """What sd-scripts' TOML of data sets says. Raises ConfigError for a file that is none."""
    table = _read(path)
    if "datasets" not in table:
        raise ConfigError(
            "this file has no [[datasets]]", where=path, remedy="Pass options in a file as the CONFIG argument."
        )
    return _pairs(table, path)


def _pairs(table: Json, path: Path) -> Pairs:
    """Names and values, whatever tables they stand in. Raises ConfigError for a job that is no training of an adapter."""
    if isinstance(table.get("config"), Mapping) and "process" in table["config"]:
        return _job(table["config"], path)
    pairs: Pairs = []
    for name, value in table.items():
        if name == "dataset_config":
            beside = path.parent / str(value)
            pairs += data_pairs(Path(str(value)) if Path(str(value)).exists() or not beside.exists() else beside)
        elif isinstance(value, Mapping) and name != "general":
            pairs += value.items()  # sections of sd-scripts' files are for people
        elif name not in ("general", "datasets"):
            pairs.append((name, value))
    if "datasets" in table:
        pairs += _datasets(_subsets(table, path), path)
    return pairs


def _subsets(table: Json, path: Path) -> list[Json]:
    """The folders of sd-scripts' data sets, each with all that holds for it."""
    general, rows = table.get("general", {}), []
    for dataset in table["datasets"]:
        if not isinstance(dataset, Mapping) or not isinstance(general, Mapping):
            raise ConfigError("[general] and [[datasets]] are tables", where=path)
        upper = {name: value for name, value in {**general, **dataset}.items() if name != "subsets"}
        rows += [{**upper, **subset} for subset in dataset.get("subsets", [])]
    return [{"batch_size" if name == "train_batch_size" else name: v for name, v in row.items()} for row in rows]


def _datasets(rows: Sequence[Json], path: Path) -> Pairs:
    """Folders with what holds for each, as one set of data: what differs between them cannot be had, but for repeats and resolutions.

    Raises ConfigError, which names what differs.
    """
    rows = [dict(row) for row in rows]
    if not rows or any("image_dir" not in row for row in rows):
        raise ConfigError("a data set has no image_dir", where=path, remedy="Each [[datasets.subsets]] has one.")
    classes = [row for row in rows if row.pop("is_reg", False)]
    pairs, images = _with_sides([row for row in rows if row not in classes], path)
    pairs.append(("data", [_folder(row) for row in images]))
    return pairs + _alike(images, path) + (_class_folder(classes, path) if classes else [])


def _with_sides(rows: list[Json], path: Path) -> tuple[Pairs, list[Json]]:
    """The resolutions that all folders have, where there are several, and each folder once. Raises ConfigError where folders have others."""
    by_side: dict[str, list[Json]] = {}
    for row in rows:
        by_side.setdefault(str(row.get("resolution", "")), []).append(row)
    if len(by_side) <= 1:
        return [], rows
    folders = [{row["image_dir"] for row in group} for group in by_side.values()]
    if any(names != folders[0] for names in folders):
        raise ConfigError(
            "resolution differs between the data sets", where=path, remedy="It is one for all: --resolution."
        )
    sides = [_side(group[0].get("resolution")) for group in by_side.values()]
    once = next(iter(by_side.values()))
    return [("datasets.resolution", sides)], [{n: v for n, v in row.items() if n != "resolution"} for row in once]


def _side(value: object) -> object:
    """The side of a square: 512 for [512, 512]."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _folder(row: Json) -> str:
    """A folder with how often it counts."""
    repeats = row.pop("num_repeats", 1)
    return f"{row.pop('image_dir')}" + (f":{repeats}" if repeats != 1 else "")


def _alike(rows: Sequence[Json], path: Path) -> Pairs:
    """What holds for all. Raises ConfigError for what does not."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if different := [name for name in names if any(row.get(name) != rows[0].get(name) for row in rows)]:
        raise ConfigError(
            f"the folders differ in {listed(different)}",
            where=path,
            remedy="Here that is one for all: train with folders that are alike, or name them 10_sks dog for words of their own.",
        )
    return list(rows[0].items())


def _class_folder(rows: Sequence[Json], path: Path) -> Pairs:
    """The folder of class images, and what they show."""
    if len(rows) > 1 or "class_tokens" not in rows[0]:
        raise ConfigError(
            "is_reg: there is one folder of class images, and its class_tokens say what they show",
            where=path,
            remedy="Pass one with --class-data and --class-prompt.",
        )
    return [("class_prompt", rows[0]["class_tokens"]), ("reg_data_dir", rows[0]["image_dir"])]


def _job(config: Json, path: Path) -> Pairs:
    """ai-toolkit's job: one process that trains."""
    processes = config["process"] if isinstance(config["process"], list) else [config["process"]]
    if len(processes) != 1 or not isinstance(processes[0], Mapping):
        raise ConfigError(
            f"the job has {len(processes)} processes",
            where=path,
            remedy="Pass a file with one, that trains an adapter.",
        )
    process = dict(processes[0])
    if (kind := process.pop("type", "sd_trainer")) not in ("sd_trainer", "ui_trainer", "diffusion_trainer"):
        raise ConfigError(f"process.type is {shown(kind)}", where=path, remedy="An adapter's is sd_trainer.")
    name, folder = str(config.get("name") or path.stem), Path(str(process.pop("training_folder", "output")))
    pairs: Pairs = [("out", str(folder / name)), ("name", re.sub(r"[^A-Za-z0-9._-]", "_", name))]
    datasets = process.pop("datasets", [])
    for section, value in process.items():
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        pairs += [_named(section, key, entry, path) for key, entry in entries]
    return [pair for pair in pairs if pair[0]] + _job_data(datasets, path)


def _job_data(datasets: Sequence[Json], path: Path) -> Pairs:
    """The folders of a job, whose resolutions are sides of squares."""
    rows = [{_DATASET.get(key, key): value for key, value in row.items() if value is not None} for row in datasets]
    pairs = _datasets(rows, path) if rows else []
    return [("datasets.resolution" if name == "resolution" else name, value) for name, value in pairs]


_DATASET = {"folder_path": "image_dir", "dataset_path": "image_dir", "default_caption": "class_tokens"}


def _named(section: str, key: str, value: object, path: Path) -> tuple[str, object]:
    """A value of a job by the name that the table has; no name for one that nobody knows, and that is off. Raises UnknownNameError for others."""
    full = f"{section}.{key}" if key else f"process.{section}"
    for name in (full, key or section):
        if name in TABLE:
            return name, value
    if value in (None, False, "", 0, [], {}):
        return "", value
    raise UnknownNameError(
        f"nothing here is like {full} ({shown(value)})",
        where=path,
        remedy="Leave it out, if the result may be another.",
    )


def _read(path: Path) -> Json:
    """The table in a TOML or YAML file. Raises ConfigError, which says what to do about backslashes."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the config file: {error.strerror}", where=path) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the config file is no UTF-8 text ({error})", where=path, remedy="Save it as UTF-8."
        ) from error
    if path.suffix.lower() in _YAML:
        return _yaml(text, path)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the config file is no TOML ({error})", where=path, remedy=_toml_remedy(text)) from error


def _yaml(text: str, path: Path) -> Json:
    """The mapping in a YAML text, in which nothing is run. Raises ConfigError."""
    import yaml

    try:
        table = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = " ".join(str(error).split())
        raise ConfigError(
            f"the config file is no YAML ({where})", where=path, remedy="A line is name: value."
        ) from error
    if not isinstance(table, dict):
        raise ConfigError("the config file holds no options", where=path, remedy="A line is name: value.")
    return {str(name): value for name, value in table.items()}


_BACKSLASHES = "Between double quotes a backslash is doubled; or use single quotes: 'C:\\photos'."


def _toml_remedy(text: str) -> str:
    """What to do about a text with backslashes in double quotes, where TOML takes them for escapes: Windows paths."""
    lines = [n for n, line in enumerate(text.splitlines(), 1) if re.search(r'"[^"]*\\[^"]*"', line)]
    if not lines:
        return 'A line is: name = value, and texts stand in quotes: out = "folder".'
    return f"Line {lines[0]}: {_BACKSLASHES[0].lower()}{_BACKSLASHES[1:]}"
