"""`as_peft()`: what is imported from peft comes from here, whether peft is installed or not. Its names and their places are PEFT's."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import diffpeft
from diffpeft.alias import PLACES, PUBLIC
from tests.llm.served import MODES, process, served

peft = pytest.importorskip("peft")


def test_the_public_names_are_pefts():
    assert set(peft.__all__) == PUBLIC
    missing = PUBLIC - set(diffpeft.__all__)
    types = {config.__name__ for config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    built = {config.__name__ for config in diffpeft.PeftConfig.types.values()}
    assert built <= types and not built & missing
    # of what is missing nothing is of a method that is built
    assert not [name for name in missing if f"{name.removesuffix('Model')}Config" in built]


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_module_has_the_names_of_pefts_that_are_here(name):
    """Everything that PEFT exports from a module and that is here under the same name at all is found at the same place."""
    theirs, ours = importlib.import_module(name), importlib.import_module(PLACES[name])
    public = getattr(theirs, "__all__", None) or [n for n, value in vars(theirs).items() if _defined(n, value, name)]
    here = [n for n in public if hasattr(diffpeft, n)]
    assert not [n for n in here if not hasattr(ours, n)]


def _defined(name: str, value: object, module: str) -> bool:
    return (
        not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module
    )


def test_the_tables_of_target_modules_are_pefts():
    from peft.utils import constants as theirs

    from diffpeft.utils import constants as ours

    names = [name for name in dir(ours) if name.isupper() and hasattr(theirs, name)]
    assert len(names) > 15
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


def test_the_page_names_the_modules():
    page = (Path(diffpeft.__file__).parent.parent / "docs" / "llm.md").read_text()
    named = [name for name in PLACES if not name.startswith("peft.tuners.")]  # of these there is a line for all methods
    assert len(named) > 20
    assert not [name for name in named if f"`{name}`" not in page and f"`.{name.rpartition('.')[2]}`" not in page]


def test_every_name_has_one_value_wherever_it_is():
    values: dict[str, set[int]] = {}
    for module in {*PLACES.values()}:
        home = importlib.import_module(module)
        for name in getattr(home, "__all__", ()):
            values.setdefault(name, set()).add(id(getattr(home, name)))
    apart = {name for name, ids in values.items() if len(ids) > 1}
    assert apart <= {"Linear", "Conv2d", "Embedding"}


IMPORTS = """
import importlib, importlib.metadata, importlib.util, sys
import peft
assert peft is diffpeft.as_peft() and peft.__version__ == "0.21.2"
assert importlib.util.find_spec("peft").name == "peft" and importlib.metadata.version("peft") == "0.21.2"
assert "peft" in importlib.metadata.packages_distributions()
assert "torch" not in sys.modules
from diffpeft.alias import PLACES, PUBLIC
for name in PLACES:
    module = importlib.import_module(name)
    assert module.__name__ == module.__spec__.name == name
    assert all(getattr(module, public) is not None for public in module.__all__), name
    assert {*module.__all__} <= {*dir(module)}
from peft import *
assert LoraConfig is diffpeft.LoraConfig and "load_lora" not in globals() and {*peft.__all__} <= PUBLIC
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora import LoraLayer as same
assert LoraLayer is same is peft.tuners.lora.LoraLayer
assert not hasattr(peft, "XLoraConfig") and not hasattr(peft.utils, "nope") and not hasattr(peft, "load_lora")
for line in ("from peft import XLoraConfig", "from peft.utils import nope", "import peft.tuners.xlora", "from peft import nope", "peft.XLoraConfig"):
    try:
        exec(line)
    except (ImportError, AttributeError) as error:
        print(type(error).__name__, error)
config = peft.LoraConfig(r=3)
import copy, pickle
assert isinstance(config, peft.PeftConfig) and pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
assert type(config) is config.__class__ is peft.LoraConfig
import transformers.utils, accelerate.utils, diffusers.utils
assert transformers.utils.is_peft_available() and accelerate.utils.is_peft_available() and diffusers.utils.is_peft_available()
assert transformers.utils.import_utils.is_peft_greater_or_equal("0.21.2") and diffusers.utils.USE_PEFT_BACKEND
import transformers.trainer
assert transformers.trainer.PeftModel is diffpeft.PeftModel
"""


@pytest.mark.parametrize("mode", [MODES[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])])
def test_imports_are_served(mode):
    printed = served(IMPORTS, mode).splitlines()
    messages = [
        "'XLoraConfig' from 'peft'",
        "'nope' from 'peft.utils'",
        "peft.tuners.xlora",
        "'nope' from 'peft'",
        "no attribute 'XLoraConfig'",
    ]
    assert [kind.split()[0] for kind in printed] == [
        "ImportError",
        "ImportError",
        "ModuleNotFoundError",
        "ImportError",
        "AttributeError",
    ]
    assert all(message in line for message, line in zip(messages, printed, strict=True))


@pytest.mark.slow
def test_the_real_peft_is_refused_and_stays():
    program = """
    import sys
    import {}
    real = sys.modules["peft"]
    import diffpeft
    try:
        diffpeft.as_peft()
    except diffpeft.AdapterStateError as error:
        print(error)
    assert sys.modules["peft"] is real and not any("alias" in type(f).__module__ for f in sys.meta_path)
    """
    printed = process(program.format("peft.utils"))
    assert "peft" in printed and "diffpeft.as_peft()" in printed


def test_libraries_that_were_told_there_is_none_are_named():
    program = """
    import warnings
    import transformers.utils
    assert not transformers.utils.is_peft_available()
    import diffpeft
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        diffpeft.as_peft()
    print([str(w.message) for w in told])
    """
    (message,) = ast.literal_eval(process(program, MODES[1]))
    assert "'transformers'" in message and "as_peft()" in message


@pytest.mark.slow
def test_a_module_that_was_hidden_is_served():
    served("import peft; from peft import LoraConfig")
    process("import sys; sys.modules['peft'] = None; import diffpeft; diffpeft.as_peft(); from peft import LoraConfig")
