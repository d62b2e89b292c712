"""What all configs have in common with PEFT's: who they are for, and the way to `adapter_config.json` and back."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

from diffpeft import files
from diffpeft.errors import (
    CheckpointError,
    ConfigError,
    ConfigWarning,
    NotBuiltError,
    WrongKindError,
    inside,
    listed,
    near,
    shown,
)

FILE = "adapter_config.json"
DIALECT = "0.21.2"  # the version of PEFT whose dialect is spoken
_SETS = ("target_modules", "exclude_modules", "feedforward_modules")  # fields whose lists become sets, as in PEFT
Config = TypeVar("Config", bound="PeftConfig")
Instance = TypeVar("Instance")


class PeftType(StrEnum):
    """PEFT's names for methods, also for those that are not here: `PeftConfig.types` are."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(StrEnum):
    """What a language model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class Passing:
    """Instances pass for those of peft's class of the same name where peft is loaded: libraries ask `isinstance(x, peft.PeftModel)`.

    What this needs: a class that can be assigned (FSDP2 does that) and a pickle that names the real one.
    """

    @property
    def __class__(self) -> type:
        return getattr(sys.modules.get("peft"), type(self).__name__, type(self))

    @__class__.setter
    def __class__(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        return _rebuild, (type(self),), self.__getstate__()


def is_served() -> bool:
    """Whether `peft` is ours here (`diffpeft.as_peft`)."""
    return getattr(sys.modules.get("peft"), "PeftConfig", None) is PeftConfig


def _rebuild(cls: type[Instance]) -> Instance:
    return cls.__new__(cls)


@dataclass
class PeftConfig(Passing):
    """The fields of every adapter_config.json. Names, meanings and defaults are PEFT's.

    Args:
        task_type: a TaskType: which PeftModelFor... wraps the model.
        peft_type: the method; a method's own config sets it.
        auto_mapping: the base model's class and library, where there is no task type.
        peft_version: of the file's dialect.
        base_model_name_or_path, revision: the base model.
        inference_mode: the adapter is not to be trained.
    """

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # What fields that only some methods have are for the others. No annotations, so that these are no fields of a file.
    target_modules = cast("str | Collection[str] | None", None)
    exclude_modules = cast("str | Collection[str] | None", None)
    modules_to_save = cast("list[str] | None", None)
    layers_to_transform = cast("int | list[int] | None", None)
    layers_pattern = cast("str | list[str] | None", None)
    layer_replication = cast("list[tuple[int, int]] | None", None)
    trainable_token_indices = cast("list[int] | dict[str, list[int]] | None", None)
    target_parameters = cast("list[str] | None", None)
    ensure_weight_tying = False
    bias = "none"

    TYPE: ClassVar[PeftType | None] = None
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()  # fields of PEFT's that have to stay at their defaults here
    types: ClassVar[dict[str, type[PeftConfig]]] = {}  # {peft_type: its config's class}
    fetch: ClassVar[Callable[..., str] | None] = (
        None  # (repository, file name, ...) -> path; where there is no network, none
    )
    upload: ClassVar[Callable[..., object] | None] = None  # (what writes into a folder, repository, ...)
    check: ClassVar[Callable[[Mapping[str, object], object], None] | None] = (
        None  # of a file's fields, and of which file
    )

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.TYPE is not None and "TYPE" in vars(cls):
            PeftConfig.types[cls.TYPE.value] = cls

    def __post_init__(self) -> None:
        kinds = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in kinds:
            raise ConfigError(
                f"Invalid task type: {shown(self.task_type)}",
                where=f"Must be one of the following task types: {', '.join(kinds)}",
                remedy=near(str(self.task_type), kinds),
            )
        self._check_layers()
        self.task_type = None if self.task_type is None else TaskType(self.task_type)
        self.peft_version = self.peft_version or DIALECT
        if self.TYPE is not None:
            self.peft_type = self.TYPE
        for name in _SETS:
            if isinstance(names := getattr(self, name, None), list):
                setattr(self, name, set(names))

    def _check_layers(self) -> None:
        """Raise ConfigError for numbers of layers where they mean nothing, or that are missing."""
        layers, blocks = self.layers_to_transform, self.layers_pattern
        for name, value in {"layers_to_transform": layers, "layers_pattern": blocks or None}.items():
            if isinstance(self.target_modules, str) and value is not None:
                raise ConfigError(
                    f"`{name}` cannot be used when `target_modules` is a str.",
                    remedy="Say the layers in the expression, or give target_modules as a list.",
                )
        if blocks and layers is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
                remedy="Give layers_to_transform=, the numbers of the layers.",
            )

    def validate(self) -> None:
        """Raise ConfigError for a field whose value is not allowed, or that means nothing here."""
        for field in fields(self):
            name, factory = field.name, field.default_factory
            if name in self.UNSUPPORTED and getattr(self, name) != (field.default if factory is MISSING else factory()):
                raise NotBuiltError(
                    f"{name} is {shown(getattr(self, name))}",
                    remedy="PEFT has this field; here it must stay at its default.",
                )

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds tokens, and not to layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether it is LLaMA-Adapter."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """A copy of the fields, as PEFT's: sets stay sets, configs in them become tables. What is of the run alone is left out."""
        return {f.name: _copied(getattr(self, f.name)) for f in fields(self) if f.name != "runtime_config"}

    def to_json(self) -> str:
        """The text of adapter_config.json. Fields and names are sorted, so that it does not depend on the hash seed; patterns stay in their order."""
        table = self.to_dict()
        return json.dumps({name: _plain(table[name]) for name in sorted(table)}, indent=2)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json into a folder, which is made. `auto_mapping_dict` replaces auto_mapping in the file."""
        folder = Path(save_directory)
        if folder.is_file():
            raise AssertionError(f"Provided path ({folder}) should be a directory, not a file")
        config = copy.copy(self)
        config.auto_mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping
        with files.replacing(folder / FILE) as f:
            f.write(config.to_json().encode())

    def push_to_hub(self, repo_id: str, *, max_shard_size: object = None, **options: object) -> object:
        """Write adapter_config.json into a repository on the Hub, which is made.

        Args:
            options: the Hub's: `commit_message`, `commit_description`, `private`, `token`, `revision`, `create_pr`; and `tags`, for a model card.
            max_shard_size: changes nothing: a config is one file.

        Raises ConfigError where there is no way to the Hub.
        """
        if PeftConfig.upload is None:
            raise ConfigError("there is no way to the Hub", remedy="Import diffpeft.")
        return PeftConfig.upload(self.save_pretrained, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Self:
        """The config in a folder or a repository on the Hub, as its method's class. Hub options go to hf_hub_download."""
        where = os.fspath(pretrained_model_name_or_path)
        path = Path(where, subfolder or "", FILE)
        if not files.present(path):
            try:
                if PeftConfig.fetch is None or Path(where).exists():
                    raise FileNotFoundError(path)
                path = Path(PeftConfig.fetch(where, FILE, subfolder=subfolder, **kwargs))
            except Exception as error:
                raise CheckpointError(
                    f"Can't find {FILE!r} at {where!r}", remedy="Check the path, or the id and the network."
                ) from error
        table = cls.from_json_file(path)
        if PeftConfig.check is not None:
            PeftConfig.check(table, path)
        with inside(path, config=True):
            return cls.from_fields(table, **kwargs)

    @classmethod
    def from_fields(cls, table: Mapping[str, object], **kwargs: object) -> Self:
        """A config from the fields of a file, as its method's class. Null is a field's default.

        `kwargs` are fields that the file does not have at all; a `revision` among them is of the adapter's repository, and not the base model's.
        """
        names = {f.name for f in fields(cls)} - {"revision"}
        absent = {key: value for key, value in kwargs.items() if key in names}
        told = {**absent, **_without_run(table)}
        return cls.from_peft_type(**{key: value for key, value in told.items() if value is not None})

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: object) -> dict[str, object]:
        """The fields in a file."""
        return _without_run(files.config_in(files.config_text(files.Snapshot.of(path_json_file)), FILE, path_json_file))

    @classmethod
    def from_peft_type(cls, /, **kwargs: Any) -> Any:
        """A config from fields, of the class that `peft_type` names. Unknown fields are dropped with a warning."""
        kind = kwargs.get("peft_type")
        kind = kind.value if isinstance(kind, Enum) else kind
        made = cls if kind is None else cast("type[Self] | None", PeftConfig.types.get(kind))
        if made is None:
            raise ConfigError(
                f"peft_type is {shown(kind)}",
                remedy=near(str(kind), PeftConfig.types) or f"Supported: {', '.join(PeftConfig.types)}.",
            )
        known = {field.name for field in fields(made)}
        unknown = sorted(set(kwargs) - known)
        if unknown and kind is None:
            raise WrongKindError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}",
                where=f"It has {listed(unknown, 5)}",
                remedy=f"peft_type is one of {', '.join(PeftConfig.types)}.",
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {made.__name__}, these are ignored. The file may be of a newer version.",
                ConfigWarning,
                stacklevel=2,
            )
        return made(**{key: value for key, value in kwargs.items() if key in known})

    @classmethod
    def of(cls, config: object) -> PeftConfig:
        """A config of these, from one of peft's or the fields of one. Raises ConfigError for anything else."""
        if isinstance(config, PeftConfig):
            return config
        table = config.to_dict() if hasattr(config, "to_dict") else config
        if not isinstance(table, Mapping) or not table.get("peft_type"):
            raise ConfigError(f"a {type(config).__name__} is no config", remedy="Pass for example a LoraConfig.")
        return cls.from_peft_type(**table)

    @classmethod
    def check_kwargs(cls, **kwargs: object) -> dict[str, object]:
        """The fields as they are."""
        return kwargs


def _without_run(table: Mapping[str, object]) -> dict[str, object]:
    """The fields of a file without those of a run, which is warned of."""
    if "runtime_config" in table:
        warnings.warn(
            f"{FILE} has a runtime_config, which is ignored: it is for the run and not for the file",
            ConfigWarning,
            stacklevel=3,
        )
    return {name: value for name, value in table.items() if name != "runtime_config"}


def _copied(value: object) -> object:
    """A field's value, apart from the config."""
    if isinstance(value, Enum):
        return value.value
    return value.to_dict() if hasattr(value, "to_dict") else copy.deepcopy(value)


def _plain(value: object) -> object:
    """A field as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        plain = [_plain(v) for v in value]
        return sorted(plain, key=str) if all(isinstance(v, str) for v in plain) else plain
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return value
