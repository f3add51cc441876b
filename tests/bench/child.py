"""Runs one function of a module beside this file and writes what it returns: see `machine.child`."""

import json
import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    target, settings, answer = sys.argv[1:]
    sys.argv = sys.argv[:1]
    module, _, name = target.rpartition(".")
    result = getattr(import_module(module), name)(**json.loads(settings))
    Path(answer).write_text(json.dumps(result), "utf-8")
