"""Modules that wait until they are used: what they are then is what they would have been."""

import subprocess
import sys
from pathlib import Path

from kandinsky_exp.system import late_imports

LIBRARIES = """
import sys
from kandinsky_exp.system import late_imports
late_imports.install()
late_imports.install()
assert len([one for one in sys.meta_path if isinstance(one, late_imports._Finder)]) == 1
import torch
from diffusers.loaders import lora_base
from diffusers.models.transformers.prior_transformer import PriorTransformer
import scipy.stats
linear = torch.nn.Sequential(torch.nn.Linear(2, 2))
assert not isinstance(linear[0], lora_base.BaseTunerLayer)
assert not {"peft.config", "scipy.stats.distributions", "transformers.modeling_utils"} & sys.modules.keys()

import diffusers.models.transformers as package
assert package.PriorTransformer is PriorTransformer
from diffusers.hooks import apply_layerwise_casting
assert "peft.config" in sys.modules
assert "diffusers.models.transformers.transformer_flux" in sys.modules
assert type(package).__name__ == "module"
assert scipy.stats.norm.cdf(0) == 0.5
import peft
adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), linear)[0]
assert isinstance(adapted, lora_base.BaseTunerLayer)
assert isinstance(adapted, peft.tuners.tuners_utils.BaseTunerLayer)
assert lora_base.BaseTunerLayer.active_adapters is peft.tuners.tuners_utils.BaseTunerLayer.active_adapters
from transformers import CLIPTextModel, PreTrainedModel
assert issubclass(CLIPTextModel, lora_base.PreTrainedModel) and not issubclass(torch.nn.Linear, PreTrainedModel)
assert lora_base.PreTrainedModel is not PreTrainedModel
"""
OWN = """
import importlib.util, sys, threading
from kandinsky_exp.system import late_imports
late_imports.WAITING |= {"slow", "broken", "whole"}
late_imports.STAND_INS["asks"] = ("json", {"known": "Known", "slow.part": "Part"})
late_imports.install()
import broken, slow, whole
assert "VALUE" not in vars(slow)
found = []
threads = [threading.Thread(target=lambda: found.append(slow.VALUE)) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert found == [1, 1, 1], found
for _ in range(2):
    try:
        broken.anything
    except ZeroDivisionError:
        continue
    raise AssertionError
try:
    slow.nothing
except AttributeError as error:
    assert "nothing" in str(error)
import whole.part
assert whole.COUNT == [1] and whole.first is whole.part and sys.modules["whole.part"] is whole.part
import asks, known
assert asks.other == "other" == known.other, "what it asks for besides is the real one"
assert asks.Known is not known.Known and isinstance(known.Known(), asks.Known) and asks.Known().number == 7
assert sys.modules["slow.part"] is slow.part
"""


def test_libraries_are_what_they_are_when_they_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_module_that_waits_is_executed_once_and_may_fail(tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/__init__.py").write_text("import time, slow.part\ntime.sleep(0.3)\nVALUE = slow.part.ONE\n")
    (tmp_path / "slow/part.py").write_text("ONE = 1\nclass Part: ...\n")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/__init__.py").write_text("COUNT = []\nfrom whole import part as first\n")
    (tmp_path / "whole/part.py").write_text("from whole import COUNT\nCOUNT.append(1)\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "known.py").write_text("other = 'other'\nclass Known:\n    number = 7\n")
    (tmp_path / "asks.py").write_text("from known import Known, other\nfrom slow.part import Part\n")
    done = subprocess.run([sys.executable, "-c", OWN], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_garbage_is_collected_again_after_imports() -> None:
    code = "import gc\nfrom kandinsky_exp.system import late_imports as late"
    code += "\nwith late.uncollected(): print(gc.isenabled())"
    code += "\nfirst = gc.get_freeze_count()\nwith late.uncollected(): kept = [[] for _ in range(1000)]"
    code += "\nprint(gc.isenabled(), 0 < first == gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_what_waits_is_there() -> None:
    """A name that a new version of a library no longer has would be imported as ever, and nobody would see why."""
    for name in {*late_imports.WAITING - {"boto3"}, *late_imports.STAND_INS, *late_imports.COMPARED}:
        assert _is_there(name), name


def _is_there(name: str) -> bool:
    package, _, last = name.rpartition(".")
    folder = Path(__import__(package, fromlist=["x"]).__path__[0]) if package else Path()
    return not package or (folder / f"{last}.py").exists() or (folder / last / "__init__.py").exists()
