"""`as_peft()`: programs and libraries that import peft get what is here under its names.

`PLACES` is the one table of PEFT's modules: which of ours has the names of each.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

from diffpeft.errors import AdapterStateError, AdapterStateWarning, listed
from diffpeft.methods.layout import TUNED
from diffpeft.methods.peft_config import DIALECT

PEFT = "peft"


def _parts(home: str, modules: str, parts: str) -> dict[str, str]:
    """{peft.tuners.MODULE.PART: `home`}, with {} in it for the module, and of each module itself."""
    return {
        f"peft.tuners.{module}{dotted}": home.format(module)
        for module in modules.split()
        for dotted in ("", *(f".{part}" for part in parts.split()))
    }


PLACES = {  # {module of peft: ours with its names}
    "peft": "diffpeft",
    "peft.auto": "diffpeft.llm.auto",
    "peft.config": "diffpeft.llm.config",
    "peft.functional": "diffpeft.functional",
    "peft.helpers": "diffpeft.helpers",
    "peft.import_utils": "diffpeft.import_utils",
    "peft.mapping": "diffpeft.llm.mapping",
    "peft.mapping_func": "diffpeft.llm.mapping",
    "peft.mixed_model": "diffpeft.llm.mixed_model",
    "peft.optimizers": "diffpeft.optimizers",
    "peft.optimizers.lorafa": "diffpeft.optimizers.lorafa",
    "peft.optimizers.loraplus": "diffpeft.model.loraplus",
    "peft.optimizers.riemannian": "diffpeft.optimizers.riemannian",
    "peft.peft_model": "diffpeft.llm.peft_model",
    "peft.tuners": "diffpeft.tuners",
    **_parts("diffpeft.tuners", " ".join(row.peft.lower() for row in TUNED.values()), "config layer model"),
    **_parts("diffpeft.tuners.{}", "lora lokr", "config layer model"),
    "peft.tuners.lora.conversion": "diffpeft.llm.conversion",
    **_parts("diffpeft.tuners", "multitask_prompt_tuning p_tuning prefix_tuning prompt_tuning", "config model"),
    "peft.tuners.tuners_utils": "diffpeft.tuners.tuners_utils",
    "peft.utils": "diffpeft.utils",
    "peft.utils.constants": "diffpeft.utils.constants",
    "peft.utils.error": "diffpeft.errors",
    "peft.utils.hotswap": "diffpeft.llm.hotswap",
    "peft.utils.loftq_utils": "diffpeft.llm.kbit",
    "peft.utils.other": "diffpeft.utils.other",
    "peft.utils.peft_types": "diffpeft.methods.peft_config",
    "peft.utils.save_and_load": "diffpeft.utils.save_and_load",
    "peft.utils.transformers_weight_conversion": "diffpeft.utils.transformers_weight_conversion",
    "peft.utils.warning": "diffpeft.errors",
}

# the names of peft itself, those that are not built here among them
_NAMES = """
AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig AutoPeftModel AutoPeftModelForCausalLM
AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification
AutoPeftModelForTokenClassification BOFTConfig BOFTModel BdLoraConfig BeftConfig BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding CartridgeConfig
CartridgeEncoder DeftConfig DeftModel DeloraConfig DeloraModel EvaConfig FourierFTConfig FourierFTModel FrodConfig FrodModel GloraConfig GloraModel
GraloraConfig GraloraModel HRAConfig HRAModel HiraConfig HiraModel IA3Config IA3Model KasaConfig LNTuningConfig LNTuningModel LilyConfig LilyModel
LoHaConfig LoHaModel LoKrConfig LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel LoraRuntimeConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING MissConfig
MissModel MontecloraConfig MultitaskPromptTuningConfig MultitaskPromptTuningInit NoMatchingPeftModuleError OFTConfig OFTModel OSFConfig OSFModel
PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeanutConfig PeanutModel PeftConfig PeftError PeftMixedModel
PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification
PeftModelForTokenClassification PeftType PeftWarning PolyConfig PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder
PromptEncoderConfig PromptEncoderReparameterizationType PromptLearningConfig PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel PveraConfig
PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig ShiraModel SupertuningConfig SupertuningModel
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType TinyLoraConfig TinyLoraModel TrainableTokensConfig TrainableTokensModel
UniLoraConfig UniLoraModel VBLoRAConfig VBLoRAModel VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel
bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters convert_to_lora create_arrow_model
find_kappa_target_modules get_base_model_state_dict get_eva_state_dict get_layer_status get_model_status get_peft_config get_peft_model
get_peft_model_state_dict initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text initialize_lora_eva_weights inject_adapter_in_model
load_peft_weights prepare_model_for_kbit_training preprocess_loraga prompt_embeddings_from_past_key_values replace_lora_weights_loftq save_as_lora
set_base_model_state_dict set_peft_model_state_dict shift_tokens_right
"""
PUBLIC = frozenset(_NAMES.split())

# libraries that ask whether there is a peft, and keep the answer
_ASKING = ("transformers.utils.import_utils", "diffusers.utils.import_utils")


def as_peft() -> ModuleType:
    """Serve `peft` from here: `import peft`, `from peft.utils import ...` and the like get what is in diffpeft, here and in all libraries.

    Call it first: libraries that were told before that there is no peft keep to that, which is warned of. It does not matter whether peft is
    installed. A name that is not built here cannot be imported. Calling it again does nothing. -> the module.

    Raises AdapterStateError if peft itself has been imported.

    Example:
        >>> import diffpeft
        >>> diffpeft.as_peft()
        >>> from peft import LoraConfig, get_peft_model
    """
    loaded = [name for name in sys.modules if name.partition(".")[0] == PEFT and sys.modules[name] is not None]
    if real := [name for name in loaded if not isinstance(sys.modules[name], Served)]:
        raise AdapterStateError(
            "peft has been imported already",
            where=f"sys.modules has {listed(real, 3)}",
            remedy="Call diffpeft.as_peft() at the start, before other imports.",
        )
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
    if sys.modules.get(PEFT, FINDER) is None:  # it was hidden
        del sys.modules[PEFT]
    served = importlib.import_module(PEFT)
    unaware = [name.partition(".")[0] for name in _ASKING if not _is_aware(name)]
    if unaware:
        warnings.warn(
            f"{listed(unaware)} had been told before that there is no peft, and will not use it. "
            "Call diffpeft.as_peft() at the start, before other imports.",
            AdapterStateWarning,
            stacklevel=2,
        )
    return served


def _is_aware(asking: str) -> bool:
    """Whether a library, by the module of it that asks, knows of a peft, or has not asked yet."""
    module = sys.modules.get(asking)
    return module is None or bool(module.is_peft_available())


class Served(ModuleType):
    """A module of peft, with the names of one of ours."""

    @property
    def _home(self) -> ModuleType:
        return importlib.import_module(PLACES[self.__name__])

    def __getattr__(self, name: str) -> object:
        inner = f"{self.__name__}.{name}"
        if inner in PLACES:
            return importlib.import_module(inner)
        if name == "__all__":
            return _public(self.__name__, self._home)
        if not name.startswith("__") and (self.__name__ != PEFT or name in PUBLIC):
            home = self._home
            if name in dir(home):
                return getattr(home, name)
        raise AttributeError(f"module {self.__name__!r}, served by diffpeft, has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_public(self.__name__, self._home)})


def _public(name: str, home: ModuleType) -> list[str]:
    """The names that a module of peft has here."""
    names = getattr(home, "__all__", None) or [name for name in vars(home) if not name.startswith("_")]
    return [public for public in names if name != PEFT or public in PUBLIC]


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of peft, and what is known of it as a package that is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a module of peft comes from. Raises ImportError for a name of peft (`from peft import ...`) that is not built."""
        if fullname in PLACES:
            spec = ModuleSpec(fullname, self, origin=__file__, is_package=True)
            spec.has_location = True
            return spec
        package, _, name = fullname.rpartition(".")
        if package == PEFT and name in PUBLIC:
            raise ImportError(
                f"cannot import name {name!r} from 'peft': diffpeft, which serves it, has not built it", name=PEFT
            )
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module without anything in it."""
        return Served(spec.name, f"{spec.name}, served by {PLACES[spec.name]}.")

    def exec_module(self, module: ModuleType) -> None:
        """Give a module its version."""
        if module.__name__ == PEFT:
            module.__version__ = DIALECT  # type: ignore[attr-defined]

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        """The package that `importlib.metadata` is asked for."""
        if context is None or context.name is None or context.name.lower() == PEFT:
            yield _Package()


class _Package(Distribution):
    """What `importlib.metadata` says of peft."""

    def read_text(self, filename: str) -> str | None:
        """A file of the package's metadata."""
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {PEFT}\nVersion: {DIALECT}\n",
            "top_level.txt": f"{PEFT}\n",
        }.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        """Where a file of it would be."""
        return Path(__file__).parent / path


FINDER = _Finder()
