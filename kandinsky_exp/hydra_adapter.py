"""All that leans on Hydra's private parts, made for Hydra 1.3: `tests/contract/test_hydra_adapter.py` tells of another.

`hydra.main` takes its words from `sys.argv`, prints errors itself and lets nobody look at the config before it acts on
it. Here Hydra gets the parsed words, raises its errors, and has its own section of each config checked.
"""

import copy
import logging
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, NoReturn

from hydra import version
from hydra._internal import config_loader_impl
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, _dfs_walk, create_defaults_list
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.main import _get_rerun_conf
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp.errors import ConfigError, Problem

MADE_FOR = "1.3"
# Beginnings of those lines of Hydra's messages that help nobody here.
CHATTER = (
    *("Config search path", "provider=", "full_key", "object_type", "reference_type", "Set the env", "See https"),
    "To append to your config use",  # it would be ignored there
)
OF_PACKAGES = ("pkg://", "structured://")  # what does not change as long as a process lives, other than a user's files
LAST_COMPOSED = 16  # that many are kept
Check = Callable[[Any], None]


def parse(arguments: list[str], refuse: Callable[[str], NoReturn]) -> Namespace:
    """Flags and overrides as Hydra's own parser reads them.

    Args:
        refuse: raises what is wrong with them, where the parser would print its usage and exit.
    """
    parser = get_args_parser()
    vars(parser)["error"] = refuse
    return parser.parse_intermixed_args(arguments)


class Loader(ConfigLoaderImpl):
    """Composes configs. Callbacks, plugins and loggers are built from Hydra's section at once: it is checked first.

    Args:
        check: raises what is wrong with the section.
    """

    _composed: ClassVar[dict[tuple[Any, ...], DictConfig]] = {}

    def __init__(self, search_path: ConfigSearchPath, check: Check) -> None:
        super().__init__(search_path)
        self.repository, self.check = _Repository(search_path), check

    def load_configuration(self, *args: Any, **settings: Any) -> DictConfig:
        cfg = super().load_configuration(*args, **settings)
        self.check(OmegaConf.to_container(cfg.hydra, resolve=False))
        return cfg

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        """What a command composes twice or more differs in values, seldom in the files that are chosen."""
        places = _of_packages(repo)  # they say where each file lies, unless there are others
        origins = [OF_PACKAGES[0] if places else _origin(one, repo) for one in defaults]
        if not all(origin.startswith(OF_PACKAGES) for origin in origins):
            return super()._compose_config_from_defaults_list(defaults, repo)
        files = [(one.config_path, one.package, one.primary) for one in defaults]
        chosen = (places, *origins, *files)
        cfg = self._composed.pop(chosen, None) or super()._compose_config_from_defaults_list(defaults, repo)
        _keep(self._composed, chosen, cfg)
        return copy.deepcopy(cfg)


def _origin(default: ResultDefault, repo: IConfigRepository) -> str:
    """Where a file of the defaults list lies."""
    found = repo.load_config(default.config_path or "")
    return found.path if found else ""


class _Repository(ConfigRepository):
    """Yaml files and schemas. Hydra copies all schemas before each look at them, and reads all files for each job."""

    _of_packages: ClassVar[dict[tuple[str, str], ConfigResult | None]] = {}

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        self._read: dict[str, ConfigResult | None] = {}
        super().initialize_sources(config_search_path)

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._read:
            self._read[config_path] = self._load(config_path)
        return copy.deepcopy(self._read[config_path])

    def _load(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() != "pkg":
            return super().load_config(config_path)
        place = (source.path, config_path)
        if place not in self._of_packages:  # a command composes twice or more
            self._of_packages[place] = super().load_config(config_path)
        return self._of_packages[place]

    def __deepcopy__(self, memo: Any) -> "_Repository":
        return copy.copy(self)


def _keep(kept: dict[Any, Any], key: object, value: object) -> None:
    """Beside the few that were used last."""
    kept[key] = value
    if len(kept) > LAST_COMPOSED:
        del kept[next(iter(kept))]


def _of_packages(repo: IConfigRepository) -> tuple[tuple[str, str], ...] | None:
    """The places in which all files are looked for; None where one of them is no package, so that files may change."""
    places = tuple((source.scheme(), source.path) for source in repo.get_sources())
    return places if all(f"{scheme}://".startswith(OF_PACKAGES) for scheme, _ in places) else None


_defaults_lists: dict[tuple[Any, ...], DefaultsList] = {}


def _defaults_list(
    repo: IConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    """Which files a config consists of: most of the time of composing it, and the same for the same choices."""
    whole = (repo, config_name, overrides_list, prepend_hydra, skip_missing)
    ours = isinstance(repo, CachingConfigRepository) and isinstance(repo.delegate, _Repository)
    if not ours or (places := _of_packages(repo)) is None:
        return create_defaults_list(*whole)
    values = Overrides(repo, overrides_list).config_overrides
    choices = [one.input_line for one in overrides_list if not one.is_sweep_override() and one not in values]
    chosen = (places, config_name, prepend_hydra, *choices)
    found = _defaults_lists.pop(chosen, None) or create_defaults_list(*whole)
    left_out: list[bool] = []
    _dfs_walk(found.defaults_tree, lambda _, node: left_out.append(node.is_missing()))
    if not any(left_out):  # it is the same whether or not `skip_missing` allows that
        _keep(_defaults_lists, chosen, found)
    return replace(found, config_overrides=values)


# `load_configuration` looks for it here. Other repositories than ours get what they got before.
vars(config_loader_impl)["create_defaults_list"] = _defaults_list


@contextmanager
def composing(flags: Namespace, check: Check) -> Iterator[Hydra]:
    """Hydra ready to compose, also by `hydra.compose`, with the search path of a command line.

    Args:
        flags: from `parse`.
        check: see `Loader`.
    """
    version.setbase(MADE_FOR)
    path = create_automatic_config_search_path(None, __name__, flags.config_path or "pkg://kandinsky_exp.conf")
    if flags.config_dir is not None:
        folder = f"file://{os.path.abspath(flags.config_dir)}"  # noqa: PTH100 - as Hydra writes it
        path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    GlobalHydra.instance().initialize(hydra := Hydra("kandinsky-exp", Loader(path, check)))
    try:
        yield hydra
    finally:
        GlobalHydra.instance().clear()


def start(flags: Namespace, config_name: str, sweeps: bool, job: Callable[[DictConfig], Any], check: Check) -> None:
    """Do what the flags say: show something, or call a job once, or once for each of a sweep's."""
    what = {"config_name": config_name, "overrides": flags.overrides}
    with composing(flags, check) as hydra:
        if flags.experimental_rerun is not None:
            job(_get_rerun_conf(flags.experimental_rerun, flags.overrides))
        elif flags.help:
            hydra.app_help(config_name, get_args_parser(), flags)
        elif flags.hydra_help:
            hydra.hydra_help(config_name, get_args_parser(), flags)
        elif flags.cfg:
            hydra.show_cfg(**what, cfg_type=flags.cfg, package=flags.package, resolve=flags.resolve)
        elif flags.shell_completion:
            hydra.shell_completion(**what)
        elif flags.info:
            with _logging_kept():
                hydra.show_info(flags.info, **what)
        elif sweeps:
            hydra.multirun(**what, task_function=job)
        else:
            hydra.run(**what, task_function=job)


@contextmanager
def _logging_kept() -> Iterator[None]:
    """Hydra shows what it knows by logging all there is, and leaves it at that."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def register(plugin: type[Sweeper]) -> None:
    """Make a plugin known: Hydra walks through folders, and sees none of a package that is installed to be edited."""
    Plugins.instance().register(plugin)


def make_sweeper(loader: ConfigLoader, cfg: DictConfig) -> Sweeper:
    """The sweeper of a config, with its launcher.

    Raises:
        ConfigError: each judges its settings as it is built.
    """
    context = HydraContext(config_loader=loader, callbacks=Callbacks())
    try:
        return Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=float, config=cfg)
    except Exception as error:  # whatever a plugin takes for wrong
        key = re.search(r"full_key: (\S+)", str(error))
        problem = Problem(key[1] if key else "hydra", f"{condense(error)}; correct it, or leave it out")
        raise ConfigError(problem) from error


def condense(error: BaseException) -> str:
    """Hydra's message and the reason below it, without blank lines, search paths and links."""
    lines = [text.strip().rstrip(".") for text in str(error).splitlines()]
    texts = [text for text in lines if text and not text.startswith(CHATTER)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        texts += [text for text in [condense(error.__cause__)] if text and text not in "; ".join(texts)]
    return "; ".join(texts)
