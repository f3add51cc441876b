"""A CUDA device without a GPU: tensors that say `cuda:0`, know shape and type, and have no data. Forward passes only.

It takes a process of its own, and leans on torch's inside: CUDA's entry in the registry of device guards gets that of
the meta device, which does nothing. Two things it does not see: `.cpu()`, for which there is `Watch`, and a generator
of another device than its numbers.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, META = 1, 14  # places in the registry, as c10/core/DeviceType.h counts
REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
SIZE = 22
DEVICE = torch.device("cuda:0")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


def missing() -> str | None:
    """Why it cannot work with this torch."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if torch.version.cuda is not None:
        return "this torch has CUDA itself"
    if not library.is_file() or not hasattr(ctypes.CDLL(str(library)), REGISTRY):
        return "this torch has no registry of device guards where it is looked for"
    return None


@contextlib.contextmanager
def device() -> Iterator[tuple[torch.device, "Watch"]]:
    """While it is open, tensors that are made are fakes; a network moves there once, and not on from there."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * SIZE).in_dll(library, REGISTRY)
    registry[CUDA] = registry[META]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Watch() as watch:
        yield DEVICE, watch


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast("cuda", dtype)`, which switches itself off where torch has no CUDA."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class Watch(TorchDispatchMode):
    """Refuses what waits for the device, and notes the types that matrix products and convolutions compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_device = any(value.device.type == "cuda" for value in given)
        name = func.overloadpacket.__name__
        assert not (on_device and name in WAITS), f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        assert not (on_device and any(value.device.type == "cpu" for value in made)), f"{func} waits for the device"
        if name in ("convolution", "addmm", "mm"):  # not those inside of attention
            self.products |= {value.dtype for value in given}
        return result
