"""What the environment and launchers may not decide, and how several processes start, wait and end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import Forked, command, launched, start, start_two
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from running import SMALL, same
from safetensors.torch import load_file

from kandinsky_exp import cli
from kandinsky_exp.errors import ConfigError, DataError, Interrupted, TrackingError
from kandinsky_exp.system import accelerators, distributed, launch_environment, redaction, signals
from kandinsky_exp.system.distributed import Agreement
from kandinsky_exp.tracking import store


@contextmanager
def changing_environment() -> Iterator[None]:
    """A thread that sets and removes a variable, as MLflow's telemetry does."""
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            os.environ["_SOME_SESSION_ID"] = "x" * 32
            os.environ.pop("_SOME_SESSION_ID", None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_texts_are_masked_while_a_thread_changes_the_environment() -> None:
    with changing_environment():
        assert {redaction.masked("a word") for _ in range(4000)} == {"a word"}


def test_a_mistake_of_our_own_is_not_blamed_on_the_store() -> None:
    def mistaken() -> None:
        redaction.masked(None)  # type: ignore[arg-type]

    with pytest.raises(TypeError), store.explained("sqlite:///x.db"):
        mistaken()
    with pytest.raises(TrackingError), store.explained("sqlite:///x.db"):
        SqlAlchemyStore.get_run(None, None)  # a library's


TELEMETRY = {"MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.mark.parametrize("chosen", [{}, {"MLFLOW_DISABLE_TELEMETRY": "false", "RAY_USAGE_STATS_ENABLED": "1"}])
def test_libraries_report_their_use_only_if_the_user_says_so(chosen: dict[str, str]) -> None:
    code = f"""import os, kandinsky_exp.cli, huggingface_hub.constants as hub
print(hub.HF_HUB_DISABLE_TELEMETRY, *map(os.getenv, {list(TELEMETRY)}))"""
    environment = {name: value for name, value in os.environ.items() if name not in TELEMETRY} | chosen
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["True", *(TELEMETRY | chosen).values()]


# --- the environment against the config

REFUSED = [
    {"ACCELERATE_USE_FSDP": "true"},
    {"ACCELERATE_USE_DEEPSPEED": "True"},
    {"ACCELERATE_USE_MEGATRON_LM": "1"},
    {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
    {"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL"},
    {"ACCELERATE_FP8_BACKEND": "TE"},
    {"ACCELERATE_TORCH_DEVICE": "cuda:1"},
    {"ACCELERATE_INIT_INCLUDE_BUFFERS": "true"},
    {"ACCELERATE_USE_CPU": "perhaps"},
    {"ACCELERATE_DYNAMO_USE_FULLGRAPH": ""},
    {"NVIDIA_TF32_OVERRIDE": "1"},
    {"WORLD_SIZE": "2"},
    {"LOCAL_RANK": "0"},
    {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    {"WORLD_SIZE": "two"},
    {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},  # accelerate launch --cpu --num_processes=2
]
LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize("environment", REFUSED, ids=lambda environment: next(iter(environment)))
def test_what_decides_against_the_config_is_refused_by_name(environment: dict[str, str]) -> None:
    name = "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environment else next(iter(environment))
    with pytest.raises(ConfigError, match=f"^{name}"):
        launch_environment.launched(environment, tf32=False)


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_FP8_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}, 1),
        ({"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO"}, 1),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_USE_CPU": "False"}, 1),
        ({"NVIDIA_TF32_OVERRIDE": "0", "LOCAL_RANK": "-1"}, 1),
        (LAUNCHED, 2),
    ],
)
def test_what_decides_nothing_is_left_alone(environment: dict[str, str], processes: int) -> None:
    assert launch_environment.launched(environment, tf32=False).processes == processes


def test_what_the_config_overrules_is_told() -> None:
    environment = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    }
    told = list(launch_environment.passed_over(environment, "no", 2))
    assert [text.partition("=")[0] for text in told] == list(environment)
    launchers = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}  # what these always set
    assert not list(launch_environment.passed_over(launchers, "bf16", 2))
    assert not list(launch_environment.passed_over({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16", 2))


@pytest.mark.parametrize("kind", ["OMPI_COMM_WORLD", "MV2_COMM_WORLD"])
def test_what_mpi_says_counts_as_what_torch_says(kind: str) -> None:
    told = {f"{kind}_RANK": "1", f"{kind}_SIZE": "2", f"{kind}_LOCAL_RANK": "1", f"{kind}_LOCAL_SIZE": "2"}
    adopted = launch_environment.adopted(told)
    assert adopted == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    assert launch_environment.launched(adopted, tf32=False).processes == 2
    assert launch_environment.adopted(told | LAUNCHED) == {}
    several_machines = launch_environment.adopted(told | {f"{kind}_LOCAL_SIZE": "1"})
    with pytest.raises(ConfigError, match="MASTER_ADDR not set"):
        launch_environment.launched(several_machines, tf32=False)
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR not set"):  # not known which GPU would be its own
        launch_environment.launched(launch_environment.adopted({"PMI_RANK": "0", "PMI_SIZE": "2"}), tf32=False)


@pytest.mark.parametrize(
    ("made", "cards", "problem"),
    [(2, None, None), (2, 2, None), (1, None, "Accelerate joins 1"), (2, 1, "each sees 1 GPU")],
)
def test_processes_that_cannot_be_one_run(made: int, cards: int | None, problem: str | None) -> None:
    launch = launch_environment.launched(LAUNCHED | {"LOCAL_WORLD_SIZE": "2"}, tf32=False)
    found = launch_environment.unlike(launch, made, cards)
    assert found is None if problem is None else found is not None and problem in found


SET = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "eager",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DOWNCAST_BF16": "1",
    "ACCELERATE_CONFIG_FILE": "nowhere.yaml",
    "ACCELERATE_DEBUG_MODE": "true",
    "ACCELERATE_BYPASS_DEVICE_MAP": "true",
}


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_config_wins_over_what_accelerate_reads(adapter: str, tmp_path: Path) -> None:
    """Steps, numbers and names of the weights are those of a run in an empty environment."""
    settings = ["model=prior", "name=p", "trainer.grad_accumulation=2", f"adapter={adapter}", "trainer.max_steps=2"]
    both = [start(tmp_path / name, *settings, **chosen) for name, chosen in (("a", {}), ("b", SET))]
    output = [process.finish() for process in both]
    assert [process.code for process in both] == [0, 0], output
    part = "prior/pytorch_lora_weights" if adapter == "lora" else "prior/diffusion_pytorch_model"
    plain, told = (load_file(tmp_path / name / f"p/checkpoints/step-00000002/{part}.safetensors") for name in "ab")
    assert plain
    assert same(plain, told)
    log = (tmp_path / "b" / "p" / "train.log").read_text()
    assert all(f"{name}=" in log for name in list(SET)[:3])


def test_a_refused_environment_ends_each_verb_before_anything_loads(tmp_path: Path) -> None:
    refused = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_MEGATRON_LM": "true"}
    verbs = [["train", *SMALL], ["plan", *SMALL], ["encode", "weights=tiny", "data=emoji"]]
    started = [Forked(command, [*words, f"output_root={tmp_path}"], environment=refused) for words in verbs]
    for process in started:
        output = process.finish()
        assert process.code == 2, output
        assert "Traceback" not in output
        assert all(f"{name}=true: " in output for name in refused)
    assert not list(tmp_path.iterdir())


def test_what_one_process_does_is_refused_to_several(tmp_path: Path) -> None:
    verbs = [verb for verb in cli.VERBS if verb not in launch_environment.TOGETHER]
    first, second = ({**LAUNCHED, "RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    by_mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    started = [
        (verb, environment, Forked(command, [verb, f"output_root={tmp_path}"], environment=environment))
        for verb in verbs
        for environment in ([first, second, by_mpi] if verb == "generate" else [first])
    ]
    for verb, environment, process in started:
        output = process.finish()
        assert process.code == 2, output
        assert output.startswith(f"error: WORLD_SIZE=2: {verb} is ") or (environment is second and not output), output
    assert not list(tmp_path.iterdir())


# --- several processes


def in_concert(folder: Path) -> None:
    """What two processes say to each other, beside any run."""
    stop = signals.Stop(handled=False)
    with distributed.accelerated(lambda: accelerators.make("no", 1, tf32=False)) as accelerator:
        rank, found = accelerator.process_index, []
        assert (accelerator.num_processes, accelerator.device.type) == (2, "cpu")
        agreement = Agreement(stop, 2)
        for step in range(1, 9):
            if step == 4 and rank == 1:
                stop.signal_number = signal.SIGTERM
            answer = agreement.now() if step == 7 else agreement.ahead()
            found.append(answer)
            if answer is not None:
                break
        for fail in (lambda: 1 / 0, lambda: raises(DataError("no picture")), lambda: raises(Interrupted(15))):
            try:
                distributed.on_main_process(fail)
            except BaseException as error:
                found.append(f"{type(error).__name__} {error}")
        with contextlib.suppress(DataError):
            distributed.on_all_processes(lambda: raises(DataError("my own")) if rank == 1 else None)
            found.append("not reached")
    (folder / str(rank)).write_text(json.dumps(found))


def raises(error: BaseException) -> None:
    raise error


OPEN_MPI = {"RANK": "RANK", "WORLD_SIZE": "SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}


@pytest.mark.parametrize("mpi", [False, True])
def test_processes_agree_and_hear_of_each_others_errors(mpi: bool, tmp_path: Path) -> None:
    names = {name: f"OMPI_COMM_WORLD_{other}" if mpi else name for name, other in OPEN_MPI.items()}
    told = [{names.get(name, name): value for name, value in one.items()} for one in launched(2)]
    both = [Forked(in_concert, tmp_path, environment=one) for one in told]
    output = [process.finish() for process in both]
    first, second = (
        json.loads((tmp_path / rank).read_text()) if (tmp_path / rank).is_file() else output for rank in "01"
    )
    stopped = [None, None, None, None, 15]  # wished for at step 4, known to all at step 5
    assert first == [
        *stopped,
        "ZeroDivisionError division by zero",
        "DataError no picture",
        "Interrupted stopped by signal 15",
    ]
    told = "PeerFailure process 0 failed: ZeroDivisionError: division by zero"
    assert second == [*stopped, told, *first[-2:]]


def is_open(port: int) -> bool:
    """Whether a process waits for others there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def test_a_process_that_waits_for_others_hears_a_signal(tmp_path: Path) -> None:
    alone, _ = launched(2)
    process = start(tmp_path, "model=prior", "name=p", **alone)
    process.wait_until(lambda: is_open(int(alone["MASTER_PORT"])))
    process.signal(signal.SIGTERM)
    output = process.finish(20)
    assert process.code == 143, output
    assert "Traceback" not in output


def test_what_only_another_process_knows_is_told_by_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = [[], ["data=folder", f"data.path={tmp_path}/empty"]]
    both = [
        start(tmp_path, "model=prior", "name=p", *more, **told)
        for more, told in zip(settings, launched(2), strict=True)
    ]
    first, second = (process.finish() for process in both)
    assert [process.code for process in both] == [2, 2], (first, second)
    assert second.startswith("process 1: error: ")
    assert "empty" in second
    assert "error" not in first


@pytest.mark.slow
def test_a_process_that_dies_alone_ends_the_others(tmp_path: Path) -> None:
    first, second = start_two(tmp_path, "model=prior", "name=p", "trainer.log_every=1", "trainer.max_steps=1000000")
    first.wait_for("step 2 of", tmp_path / "p" / "train.log")
    second.kill()
    output = first.finish(60)
    assert first.code == 1, output
    assert "error: another process of this run is gone" in output
    assert "Traceback" not in output
    assert json.loads((tmp_path / "p" / "run.json").read_text())["status"] == "FAILED"
