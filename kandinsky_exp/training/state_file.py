"""Nested state of optimizers and schedules as one safetensors file, without pickle: reading it runs no code.

Tensors are the file's tensors; what holds them is JSON in its header.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

NAME = "optimizer.safetensors"
STRUCTURE = "structure"
PLAIN = (str, int, float, bool, type(None))


def write(state: Any, file: Path) -> None:
    """Write dicts, lists and tuples of tensors, numbers, strings and None.

    Raises:
        TypeError: there is something else in it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    structure = _packed(state, tensors, {})
    save_file(tensors, file, metadata={STRUCTURE: json.dumps(structure)})


def read(file: Path) -> Any:
    """What `write` wrote, on the CPU.

    Raises:
        SafetensorError, OSError, ValueError, KeyError, TypeError: the file is damaged or no such state.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        structure = json.loads((opened.metadata() or {})[STRUCTURE])
        return _unpacked(structure, opened.get_tensor)


def _packed(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """JSON that `_unpacked` understands. Keys may be numbers, and a tuple comes back as one."""
    if isinstance(value, Tensor):
        return {"tensor": _named(value, tensors, names)}
    if isinstance(value, dict):
        return {"dict": [[_packed(key, tensors, names), _packed(item, tensors, names)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(item, tensors, names) for item in value]}
    if type(value) in PLAIN:
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__module__}.{type(value).__qualname__}")


def _named(value: Tensor, tensors: dict[str, Tensor], names: dict[int, str]) -> str:
    """The name of a tensor in the file; one that stands in several places (an 8-bit optimizer's table) is kept once."""
    if id(value) not in names:
        names[id(value)] = f"{len(names)}"
        whole = value.detach().to("cpu").contiguous()  # in this order: the device may have no room for a copy
        shares = whole.untyped_storage().nbytes() != whole.nbytes
        tensors[names[id(value)]] = whole.clone() if shares else whole  # the file takes no views of one memory
    return names[id(value)]


def _unpacked(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {_unpacked(key, tensor): _unpacked(item, tensor) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_unpacked(item, tensor) for item in content)
