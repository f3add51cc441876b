"""Fixtures that several test files share. The environment is set before any library reads it."""

import functools
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import fork_server
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test workers share the cores: more threads each are slower

# The CPU, also on a machine with a GPU, where several tests at a time would share it and numbers are others; who wants
# a test to use one names it: CUDA_VISIBLE_DEVICES=0.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


# What costs seconds: it trains, draws, starts processes or commands.
COSTLY = ("browsing", "commands", "drawing", "hub_server", "many_points", "mlflow_server", "phase_peaks", "sweeping",
          "subprocess", "kandinsky_exp.cli")  # fmt: skip
# And of the rest, what takes a second or more by itself.
LONG = (
    "test_hundreds_of_long_runs_make_a_file_that_opens",
    "test_images_stay_below_their_size",
    "test_a_plan_for_a_gpu_elsewhere_may_have_what_needs_one",
    "test_a_plan_counts_the_pictures_that_are_decoded_at_once",
    "test_too_little_memory_is_told_with_the_cheapest_setting_that_fits",
    "test_activations_follow_batch_checkpointing_and_resolution",
    "test_files_that_are_cast_lie_beside_what_is_read_from_them",
    "test_a_large_image_below_the_limit_brings_no_warning",
    "test_memory_does_not_grow_with_the_members",
    "test_a_run_goes_on_as_if_nothing_had_changed",
    "test_validation_halves_its_batch",
    "test_the_measurement_compares_what_was_trained_with_and_without_the_class",
    "test_lengths_of_a_compiled_prior_are_few",
    "test_a_part_that_is_missing_or_damaged_is_made_again_alone",
    "test_processes_that_would_not_make_the_same_parts_are_refused",
    "test_ten_thousand_parts_open_at_once_and_few_stay_open",
    "test_without_a_cache_they_are_named_too",
    "test_a_step_has_captions_of_similar_length_and_a_stopped_run_ends_the_same",
)
ONE_RUN_OF_EACH_STAGE = ("golden_ones[prior-True-False]", "golden_ones[decoder-True-False]")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of all unit tests, and one run of each stage")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        kept = one_case_of_each([item for item in items if is_quick(item)])
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept


def one_case_of_each(items: list[Any]) -> list[Any]:
    """The first case of each test; all of the contract's, where a case is a file, or a stage's run."""
    first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
    chosen = set(first.values())
    return [item for item in items if item in chosen or item.path.parent.name == "contract"]


def is_quick(item: Any) -> bool:
    """Whether neither a test nor its fixtures use anything that costs seconds."""
    if item.nodeid.endswith(ONE_RUN_OF_EACH_STAGE):
        return True
    if item.originalname in LONG:
        return False
    is_contract = item.path.parent.name == "contract" and item.path.name != "test_architecture.py"
    fixtures = [one.func for found in item._fixtureinfo.name2fixturedefs.values() for one in found]
    return not (is_contract or item.get_closest_marker("slow") or any(map(costs, [item.function, *fixtures])))


@functools.cache
def costs(function: Any) -> bool:
    """Whether a function uses what is costly, by itself or by the functions beside it."""
    todo, seen = [function], set()
    while todo:
        if not isinstance(one := todo.pop(), FunctionType) or one in seen:
            continue
        seen.add(one)
        codes = [one.__code__, *(part for part in one.__code__.co_consts if isinstance(part, CodeType))]
        for used in (one.__globals__.get(name) for code in codes for name in code.co_names):
            home = getattr(used, "__module__", None) or getattr(used, "__name__", None)
            if home in COSTLY or (home == "running" and getattr(used, "__name__", "") in ("train", "encoded_cache")):
                return True
            if home == function.__module__:
                todo.append(used)
    return False


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what all workers use and one of them makes: they inherit the variable."""
    if "TESTS_SHARE" not in os.environ:
        os.environ["TESTS_SHARE"] = tempfile.mkdtemp(prefix="tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("TESTS_SHARE"), ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop(fork_server.ADDRESS, None))
        if getattr(config.option, "numprocesses", 0) and not (config.option.collectonly or config.option.quick):
            fork_server.start()  # while the workers import what they need


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server of `commands.py` first: Python has one at a time, and a sweep in a test would start its own."""
    options = session.config.option
    if (commands := sys.modules.get("commands")) is not None and not (options.collectonly or options.quick):
        commands.start_server()


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Each run collects garbage at its end: libraries are passed over, or that takes longer than its steps."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny ones; what a test loads stays loaded for those of its file."""
    from running import prepare

    from kandinsky_exp.models.weights import Weights

    place = tmp_path_factory.mktemp("weights")
    prepare(place, [])
    return Weights("tiny", "tiny", place / "cache")


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The tiny Kandinsky 2.2 as a combined diffusers folder, built once for all workers. Do not write into it."""
    from running import first_run

    from kandinsky_exp.tiny.pipelines import build

    return build(first_run() / "cache")


@pytest.fixture(scope="module")
def prior():
    """The prior's encoders, always with the same weights."""
    import torch
    from encoders import PriorEncoders

    torch.manual_seed(0)
    return PriorEncoders()


@pytest.fixture(scope="module")
def decoder():
    """The decoder's encoders, always with the same weights."""
    import torch
    from encoders import DecoderEncoders

    torch.manual_seed(0)
    return DecoderEncoders()
