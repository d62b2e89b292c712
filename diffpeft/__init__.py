"""diffpeft: adapters (LoRA and kin) for diffusion models, and for language models under PEFT's names.

The public names are imported on first use, so that `import diffpeft` costs no torch.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpeft.methods.layout import CONFIGS, TUNED

__version__ = "0.1.0"

_HOMES = {
    "diffpeft.errors": (
        "DiffpeftError CheckpointError UnreadableFileError UnsafeFileError UnknownKeysError MissingKeysError ShapeMismatchError "
        "NonFiniteError AmbiguousFormatError WrongBaseError CannotConvertError UnknownNameError AdapterStateError ConfigError DataError DivergedError "
        "HubError LostProcessError NothingLearntError PeftError NoMatchingPeftModuleError PeftWarning UnfitError NotBuiltError WrongKindError "
        "DiffpeftWarning CheckpointWarning ConfigWarning UnusedPatternWarning OutdatedWarning AdapterStateWarning DataWarning"
    ),
    "diffpeft.alias": "as_peft",
    "diffpeft.bundle": "Bundle Entry",
    "diffpeft.llm.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
        "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification"
    ),
    "diffpeft.llm.config": (
        "LoftQConfig LoraRuntimeConfig MultitaskPromptTuningConfig MultitaskPromptTuningInit PeftConfig PeftType PrefixTuningConfig "
        f"PromptEncoderConfig PromptEncoderReparameterizationType PromptLearningConfig PromptTuningConfig PromptTuningInit TaskType {' '.join(CONFIGS)}"
    ),
    "diffpeft.llm.peft_model": (
        "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
        "PeftModelForSequenceClassification PeftModelForTokenClassification get_peft_model get_peft_model_state_dict "
        "inject_adapter_in_model load_peft_weights set_peft_model_state_dict"
    ),
    "diffpeft.llm.base_state": "get_base_model_state_dict set_base_model_state_dict",
    "diffpeft.llm.conversion": "convert_to_lora save_as_lora",
    "diffpeft.llm.distributed": "fsdp_auto_wrap_policy",
    "diffpeft.llm.hotswap": "hotswap_adapter prepare_model_for_compiled_hotswap",
    "diffpeft.llm.kbit": "prepare_model_for_kbit_training replace_lora_weights_loftq",
    "diffpeft.llm.mapping": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config"
    ),
    "diffpeft.llm.mixed_model": "PeftMixedModel",
    "diffpeft.llm.p_tuning": "PromptEncoder",
    "diffpeft.llm.prefix_tuning": "PrefixEncoder",
    "diffpeft.llm.prompt_tuning": "PromptEmbedding",
    "diffpeft.llm.status": "get_layer_status get_model_status",
    "diffpeft.llm.tuners": " ".join(f"{stem}Model" for stem in TUNED),
    "diffpeft.drawing.draw": "generate",
    "diffpeft.methods": "METHODS",
    "diffpeft.model.attach": "attach detach AttachReport",
    "diffpeft.model.combine": "combine to_lora",
    "diffpeft.model.fuse": "fuse unfuse",
    "diffpeft.model.loraplus": "create_loraplus_optimizer",
    "diffpeft.pipeline.adapters": "set_adapters get_adapters adapters unload AdapterStatus",
    "diffpeft.pipeline.hotswap": "replace",
    "diffpeft.pipeline.load": "load_lora save_lora LoadReport",
    "diffpeft.takeover": "release take_over",
    "diffpeft.tools.baking": "bake",
    "diffpeft.tools.comparing": "diff",
    "diffpeft.tools.diagnosis": "doctor",
    "diffpeft.tools.editing": "edit",
    "diffpeft.tools.extracting": "extract",
    "diffpeft.tools.listing": "list_adapters",
    "diffpeft.tools.merging": "merge",
    "diffpeft.tools.pruning": "prune",
    "diffpeft.tools.resizing": "resize scale",
    "diffpeft.tools.verifying": "verify",
    "diffpeft.train.config": "TrainConfig",
    "diffpeft.utils.constants": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value",
    "diffpeft.utils.other": "cast_mixed_precision_params shift_tokens_right",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
_MODULES = {"converters": "diffpeft.converters", "schedule": "diffpeft.model.schedule", "train": "diffpeft.train"}
__all__ = sorted([*_HOME, *_MODULES])
logging.getLogger("diffpeft").addHandler(logging.NullHandler())  # nothing is printed unless the program asks for it
_HERE = Path(__file__).parent
if not (_HERE / "converters").is_dir():  # a checkout whose links were not kept
    __path__.append(str(_HERE.parent))
_PEFTS = ("functional", "helpers", "optimizers", "tuners", "utils")  # its modules, which are attributes of it

if TYPE_CHECKING:
    from diffpeft import converters as converters
    from diffpeft.alias import as_peft as as_peft
    from diffpeft.bundle import Bundle as Bundle
    from diffpeft.bundle import Entry as Entry
    from diffpeft.drawing.draw import generate as generate
    from diffpeft.errors import *  # noqa: F403
    from diffpeft.llm.auto import AutoPeftModel as AutoPeftModel
    from diffpeft.llm.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from diffpeft.llm.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from diffpeft.llm.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from diffpeft.llm.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from diffpeft.llm.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from diffpeft.llm.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from diffpeft.llm.base_state import get_base_model_state_dict as get_base_model_state_dict
    from diffpeft.llm.base_state import set_base_model_state_dict as set_base_model_state_dict
    from diffpeft.llm.config import LoftQConfig as LoftQConfig
    from diffpeft.llm.config import LoraRuntimeConfig as LoraRuntimeConfig
    from diffpeft.llm.config import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from diffpeft.llm.config import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from diffpeft.llm.config import PeftConfig as PeftConfig
    from diffpeft.llm.config import PeftType as PeftType
    from diffpeft.llm.config import PrefixTuningConfig as PrefixTuningConfig
    from diffpeft.llm.config import PromptEncoderConfig as PromptEncoderConfig
    from diffpeft.llm.config import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from diffpeft.llm.config import PromptLearningConfig as PromptLearningConfig
    from diffpeft.llm.config import PromptTuningConfig as PromptTuningConfig
    from diffpeft.llm.config import PromptTuningInit as PromptTuningInit
    from diffpeft.llm.config import TaskType as TaskType
    from diffpeft.llm.conversion import convert_to_lora as convert_to_lora
    from diffpeft.llm.conversion import save_as_lora as save_as_lora
    from diffpeft.llm.distributed import fsdp_auto_wrap_policy as fsdp_auto_wrap_policy
    from diffpeft.llm.hotswap import hotswap_adapter as hotswap_adapter
    from diffpeft.llm.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
    from diffpeft.llm.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from diffpeft.llm.kbit import replace_lora_weights_loftq as replace_lora_weights_loftq
    from diffpeft.llm.mapping import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from diffpeft.llm.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
    from diffpeft.llm.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    from diffpeft.llm.mapping import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
    from diffpeft.llm.mapping import get_peft_config as get_peft_config
    from diffpeft.llm.mixed_model import PeftMixedModel as PeftMixedModel
    from diffpeft.llm.p_tuning import PromptEncoder as PromptEncoder
    from diffpeft.llm.peft_model import PeftModel as PeftModel
    from diffpeft.llm.peft_model import PeftModelForCausalLM as PeftModelForCausalLM
    from diffpeft.llm.peft_model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from diffpeft.llm.peft_model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from diffpeft.llm.peft_model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from diffpeft.llm.peft_model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from diffpeft.llm.peft_model import PeftModelForTokenClassification as PeftModelForTokenClassification
    from diffpeft.llm.peft_model import get_peft_model as get_peft_model
    from diffpeft.llm.peft_model import get_peft_model_state_dict as get_peft_model_state_dict
    from diffpeft.llm.peft_model import inject_adapter_in_model as inject_adapter_in_model
    from diffpeft.llm.peft_model import load_peft_weights as load_peft_weights
    from diffpeft.llm.peft_model import set_peft_model_state_dict as set_peft_model_state_dict
    from diffpeft.llm.prefix_tuning import PrefixEncoder as PrefixEncoder
    from diffpeft.llm.prompt_tuning import PromptEmbedding as PromptEmbedding
    from diffpeft.llm.status import get_layer_status as get_layer_status
    from diffpeft.llm.status import get_model_status as get_model_status
    from diffpeft.llm.tuners import AdaLoraModel as AdaLoraModel
    from diffpeft.llm.tuners import BOFTModel as BOFTModel
    from diffpeft.llm.tuners import C3AModel as C3AModel
    from diffpeft.llm.tuners import DeloraModel as DeloraModel
    from diffpeft.llm.tuners import HiraModel as HiraModel
    from diffpeft.llm.tuners import HRAModel as HRAModel
    from diffpeft.llm.tuners import IA3Model as IA3Model
    from diffpeft.llm.tuners import LoHaModel as LoHaModel
    from diffpeft.llm.tuners import LoKrModel as LoKrModel
    from diffpeft.llm.tuners import LoraModel as LoraModel
    from diffpeft.llm.tuners import MissModel as MissModel
    from diffpeft.llm.tuners import OFTModel as OFTModel
    from diffpeft.llm.tuners import RoadModel as RoadModel
    from diffpeft.llm.tuners import VeraModel as VeraModel
    from diffpeft.methods import METHODS as METHODS
    from diffpeft.model import schedule as schedule
    from diffpeft.model.attach import AttachReport as AttachReport
    from diffpeft.model.attach import attach as attach
    from diffpeft.model.attach import detach as detach
    from diffpeft.model.combine import combine as combine
    from diffpeft.model.combine import to_lora as to_lora
    from diffpeft.model.fuse import fuse as fuse
    from diffpeft.model.fuse import unfuse as unfuse
    from diffpeft.model.loraplus import create_loraplus_optimizer as create_loraplus_optimizer
    from diffpeft.pipeline.adapters import AdapterStatus as AdapterStatus
    from diffpeft.pipeline.adapters import adapters as adapters
    from diffpeft.pipeline.adapters import get_adapters as get_adapters
    from diffpeft.pipeline.adapters import set_adapters as set_adapters
    from diffpeft.pipeline.adapters import unload as unload
    from diffpeft.pipeline.hotswap import replace as replace
    from diffpeft.pipeline.load import LoadReport as LoadReport
    from diffpeft.pipeline.load import load_lora as load_lora
    from diffpeft.pipeline.load import save_lora as save_lora
    from diffpeft.takeover import release as release
    from diffpeft.takeover import take_over as take_over
    from diffpeft.tools.baking import bake as bake
    from diffpeft.tools.comparing import diff as diff
    from diffpeft.tools.diagnosis import doctor as doctor
    from diffpeft.tools.editing import edit as edit
    from diffpeft.tools.extracting import extract as extract
    from diffpeft.tools.listing import list_adapters as list_adapters
    from diffpeft.tools.merging import merge as merge
    from diffpeft.tools.pruning import prune as prune
    from diffpeft.tools.resizing import resize as resize
    from diffpeft.tools.resizing import scale as scale
    from diffpeft.tools.verifying import verify as verify
    from diffpeft.train import TrainPackage
    from diffpeft.train.config import TrainConfig as TrainConfig
    from diffpeft.utils.constants import (
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING,
    )
    from diffpeft.utils.constants import (
        bloom_model_postprocess_past_key_value as bloom_model_postprocess_past_key_value,
    )
    from diffpeft.utils.other import cast_mixed_precision_params as cast_mixed_precision_params
    from diffpeft.utils.other import shift_tokens_right as shift_tokens_right

    train: TrainPackage


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _PEFTS:
        value = importlib.import_module(f"diffpeft.{name}")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'diffpeft' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
