"""Imports of libraries that wait until what is in them is used: half of what a start would import, it never needs.

diffusers imports the modules of all its networks where it is asked for one, and PEFT, SciPy and the model code of
transformers beside them, for functions that no run calls before it draws or attaches an adapter. A module named in
`WAITING` is executed when an attribute is first asked of it; one named in `STAND_INS` gets, in place of a class that it
imports to compare with, one that imports the real class when it is used. What a library's other version has not, or
asks for besides, is imported as ever.
"""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

WAITING = {
    "boto3",
    "peft",
    "peft.tuners",
    "peft.tuners.tuners_utils",
    "diffusers.hooks",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "scipy.integrate",
    "scipy.stats",
}
# {module: a class of it that others compare with}: as long as its whole package waits, they get one that stands for it.
COMPARED = {"peft": "PeftModel", "peft.tuners.tuners_utils": "BaseTunerLayer"}
# {module: (what it imports and is imported before it, {module that it takes a class from: the class})}
STAND_INS = {
    "diffusers.loaders.lora_base": (
        "diffusers.models.modeling_utils",
        {"transformers": "PreTrainedModel"},
    ),
    "diffusers.pipelines.pipeline_loading_utils": ("transformers", {"transformers": "PreTrainedModel"}),
    "diffusers.loaders.single_file_utils": ("transformers", {"transformers": "AutoImageProcessor"}),
    "transformers.processing_utils": ("transformers", {"transformers.modeling_utils": "PreTrainedAudioTokenizerBase"}),
}
_lock = threading.RLock()


def install() -> None:
    """Have imports of this process wait from now on; once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage while modules are imported: a fifth of the time; nor ever in what the first leaves."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:
            gc.freeze()
        if was_on:
            gc.enable()


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        kinds = {_Waits: fullname in WAITING, _TakesStandIns: fullname in STAND_INS, _ComesAfter: _waits(fullname)}
        kind = next((kind for kind, fits in kinds.items() if fits), None)
        spec = None if kind is None else PathFinder.find_spec(fullname, path, target)
        if kind is not None and spec is not None and spec.loader is not None:
            spec.loader = kind(spec.loader)
        return spec


class _Wrapped(Loader):
    """In place of a module's loader, up to the time when it executes it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # nosec B101 # narrows the type
        module.__spec__.loader = module.__loader__ = self.loader


class _Waits(_Wrapped):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.__class__ = _Waiting


class _Waiting(ModuleType):
    """A module that is executed when something is asked of it that is not there yet; its submodules need it not."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # asked whenever a name is imported from what is no package
            raise AttributeError(name)
        if name == COMPARED.get(self.__name__) and _waits(self.__name__):
            return _stand_in(self.__name__, name)
        _execute(self)
        return getattr(self, name)


def _execute(module: ModuleType) -> None:
    with _lock:
        if type(module) is not _Waiting:
            return
        loader = module.__loader__
        assert isinstance(loader, Loader)  # nosec B101 # narrows the type
        _become(module, _Executing)
        try:
            loader.exec_module(module)
        except BaseException:
            _become(module, _Waiting)
            raise
        _become(module, ModuleType)


def _become(module: ModuleType, kind: type[ModuleType]) -> None:
    module.__class__ = kind


def _waits(name: str) -> bool:
    """Whether nothing of a module's package was executed."""
    return type(sys.modules.get(name.partition(".")[0])) is _Waiting


class _Executing(ModuleType):
    """One that is being executed: to the thread that does it an ordinary module, and others wait for it."""

    def __getattr__(self, name: str) -> Any:
        with _lock:
            if type(self) is not _Executing:
                return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)


class _ComesAfter(_Wrapped):
    """For a module of a package that waits as a whole: the package is executed before, and may import the module."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        _execute(sys.modules[spec.name.partition(".")[0]])
        self.found = sys.modules.get(spec.name)
        return self.found or super().create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if self.found is None:
            self.loader.exec_module(module)


class _TakesStandIns(_Wrapped):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        before, names = STAND_INS[module.__name__]
        import_module(before)
        real = {name: sys.modules.get(name) for name in names}
        sys.modules.update({name: _StandIn(name, of, real[name]) for name, of in names.items()})
        try:
            self.loader.exec_module(module)
        finally:
            for name, known in real.items():
                if known is not None:
                    sys.modules[name] = known
                elif isinstance(sys.modules.get(name), _StandIn):
                    del sys.modules[name]


class _StandIn(ModuleType):
    """Has one class that stands for the real one, and imports the module for all else."""

    def __init__(self, name: str, of: str, real: ModuleType | None) -> None:
        super().__init__(name)
        self._real = real
        setattr(self, of, _stand_in(name, of))

    def __getattr__(self, name: str) -> Any:
        if name == "__path__" or (self._real is None and name.startswith("__")):  # as `inspect` asks of all modules
            raise AttributeError(name)
        if self._real is None:
            del sys.modules[self.__name__]
            self._real = import_module(self.__name__)
        return getattr(self._real, name)


class _Class(type):
    """A class that imports the one it stands for when it is used. Of one that was not imported there are no objects."""

    def __instancecheck__(cls, instance: object) -> bool:
        return not _waits(cls.__module__) and isinstance(instance, _real(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return not _waits(cls.__module__) and issubclass(subclass, _real(cls))

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        return _real(cls)(*arguments, **named)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(cls), name)


def _stand_in(module: str, name: str) -> type:
    return type.__new__(_Class, name, (), {"__module__": module})


def _real(stand_in: type) -> type:
    _execute(import_module(stand_in.__module__.partition(".")[0]))
    found: type = getattr(import_module(stand_in.__module__), stand_in.__name__)
    return found
