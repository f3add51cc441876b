"""Environment variables of Accelerate and of launchers: adopt, check or refuse what could override the config.

Accelerate reads the environment when it is made, and parts of it whenever it likes. What can be given to it as an
argument is (`accelerators`), and the config wins; all else is refused here, by the name of its variable. Of Accelerate
1.15 these are left alone, for no result depends on them: ACCELERATE_USE_CPU (where a run computes, not what),
_DEBUG_MODE, _CPU_AFFINITY, _LOG_LEVEL, _ENABLE_RICH, _BYPASS_DEVICE_MAP, _CONFIG_FILE (the launcher's own). So are all
further ones of DeepSpeed, FSDP, Megatron-LM and parallelism configs: they are read only where these are asked for.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kandinsky_exp.errors import ConfigError

Environment = Mapping[str, str]
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")  # as Accelerate reads them
FLAGS = (
    *("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED"),
    *("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_DYNAMIC"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
)
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}
UNSHARDED = (
    "shards the weights or wraps the network, which checkpoints of this runner do not handle; unset it, or launch with "
    "`accelerate launch --multi_gpu`, or with one process"
)
# What torch's launchers set → what those of MPI call it.
NAMES = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
TOGETHER = ("train", "encode", "plan", "evaluate")  # verbs that know of several processes
PLACE = ("MASTER_ADDR", "MASTER_PORT")
NUMBERS = (*NAMES, "MASTER_PORT")
BY_HAND = "start it with `python -m torch.distributed.run` or `accelerate launch`, which set all of these, or unset it"


@dataclass(frozen=True)
class Launch:
    """The processes that a launcher speaks of; one where there is no launcher.

    Args:
        is_told: whether any launcher was there: one may start a single process, too.
        on_this_machine: None where it does not say.
        on_cpu: whether the user wants the CPU, whatever else is there.
    """

    processes: int
    is_told: bool
    on_this_machine: int | None
    on_cpu: bool


def launched(environment: Environment, tf32: bool) -> Launch:
    """What the launcher says, once nothing in the environment decides against the config.

    Args:
        tf32: `precision.tf32`.

    Raises:
        ConfigError: naming each variable.
    """
    environment = {name: value for name, value in environment.items() if (name, value) != ("LOCAL_RANK", "-1")}  # none
    found = [*_problems(environment, tf32), *_launcher_problems(environment)]
    if found:
        raise ConfigError(found)
    local = environment.get("LOCAL_WORLD_SIZE")
    return Launch(
        processes=int(environment.get("WORLD_SIZE", "1")),
        is_told="LOCAL_RANK" in environment,
        on_this_machine=None if local is None else int(local),
        on_cpu=_is_true(environment, "ACCELERATE_USE_CPU"),
    )


def adopted(environment: Environment) -> dict[str, str]:
    """What `mpirun` and the like say of several processes, under the names of torch's launchers, as far as these lack.

    Accelerate understands them on the CPU alone: on GPUs each process would be a run of its own.
    """
    if "WORLD_SIZE" in environment:
        return {}
    found = {
        name: environment[given]
        for name, others in NAMES.items()
        for given in (*reversed(others), name)  # the last one counts
        if given in environment
    }
    if found.get("WORLD_SIZE", "1") == "1":
        return {}
    if found.get("LOCAL_WORLD_SIZE") == found["WORLD_SIZE"]:
        found["MASTER_ADDR"] = environment.get("MASTER_ADDR", "127.0.0.1")
    found["MASTER_PORT"] = environment.get("MASTER_PORT", "29500")
    return found


def check_verb(environment: Environment, verb: str) -> None:
    """Refuse several processes for what each of them would do in full.

    Raises:
        ConfigError: naming the variable.
    """
    count = environment.get("WORLD_SIZE", "1")
    if verb not in TOGETHER and count != "1":
        raise ConfigError(
            f"WORLD_SIZE={count}: {verb} is the work of one process, and each of these would do all of it; start it "
            "without a launcher, or unset the variable"
        )


def passed_over(environment: Environment, mixed_precision: str, grad_accumulation: int) -> Iterator[str]:
    """What is set there for another than the config says, and not used."""
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")  # launchers always set it, to `no` by default
    if precision not in ("no", mixed_precision):
        yield f"ACCELERATE_MIXED_PRECISION={precision} is not used: `precision` of the config counts"
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(grad_accumulation)):
        yield (
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} is not used: trainer.grad_accumulation="
            f"{grad_accumulation} of the config counts"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        yield f"ACCELERATE_DYNAMO_BACKEND={backend} is not used: trainer.compile=true compiles"


def unlike(launch: Launch, made: int, cards: int | None) -> str | None:
    """What keeps the processes that were started from being one run; None where nothing does.

    Args:
        made: processes of the run.
        cards: GPUs that a process sees; None where the run computes on something else.
    """
    if cards is not None and (launch.on_this_machine or 1) > cards:
        return (
            f"LOCAL_WORLD_SIZE: {launch.on_this_machine} processes on this machine, and each sees {cards} GPU(s); each "
            "needs one of its own and has to see all, so start fewer, or mend CUDA_VISIBLE_DEVICES"
        )
    if made != launch.processes:
        return (
            f"WORLD_SIZE: {launch.processes} processes were started, and Accelerate joins {made} of them on this "
            "device; start one, or set ACCELERATE_USE_CPU=true for several on the CPU"
        )
    return None


def _problems(environment: Environment, tf32: bool) -> Iterator[str]:
    """What would decide against the config, and cannot be told otherwise."""
    for name in FLAGS:
        if environment.get(name, "false").lower() not in (*TRUE, *FALSE):
            yield f"{name}: {environment[name]!r} is neither true nor false; correct it, or unset it"
    for name, what in SHARDING.items():
        is_plain = "SAGEMAKER" in name and environment.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") == "NO"
        if _is_true(environment, name) and not is_plain:
            yield f"{name}={environment[name]}: {what} {UNSHARDED}"
    if environment.get("ACCELERATE_FP8_BACKEND", "NO") != "NO":
        yield (
            f"ACCELERATE_FP8_BACKEND={environment['ACCELERATE_FP8_BACKEND']}: fp8 replaces layers of the network, "
            "which this runner does not handle; unset it (`accelerate config`: no fp8), and choose precision=bf16"
        )
    if "ACCELERATE_TORCH_DEVICE" in environment:
        yield (
            f"ACCELERATE_TORCH_DEVICE={environment['ACCELERATE_TORCH_DEVICE']}: unset it; CUDA_VISIBLE_DEVICES chooses "
            "GPUs, ACCELERATE_USE_CPU=true the CPU"
        )
    if _is_true(environment, "ACCELERATE_INIT_INCLUDE_BUFFERS"):
        yield "ACCELERATE_INIT_INCLUDE_BUFFERS: weights are loaded without their buffers; unset it"
    override = environment.get("NVIDIA_TF32_OVERRIDE")
    if override and (override != "0") != tf32:
        yield (
            f"NVIDIA_TF32_OVERRIDE={override}: it wins over precision.tf32={str(tf32).lower()}; unset it, or set "
            f"precision.tf32={str(not tf32).lower()}"
        )


def _launcher_problems(environment: Environment) -> Iterator[str]:
    """Why what is there of a launcher is not enough to tell a process its place."""
    wrong = [name for name in NUMBERS if name in environment and not environment[name].isdecimal()]
    yield from (f"{name}: {environment[name]!r} is not a whole number; correct it, or unset it" for name in wrong)
    if wrong:
        return
    several = int(environment.get("WORLD_SIZE", "1")) > 1
    if several or "LOCAL_RANK" in environment:
        missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *PLACE) if name not in environment]
        told = "WORLD_SIZE" if several else "LOCAL_RANK"
        if missing:
            yield f"{told}={environment[told]}, and {', '.join(missing)} not set: {BY_HAND}"
        elif int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
            yield f"RANK={environment['RANK']}: of WORLD_SIZE={environment['WORLD_SIZE']} processes; {BY_HAND}"
    elif "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
        yield (  # `accelerate launch` has set both
            "accelerate launch: asked for several processes, it has started one, as it does on the CPU whatever its "
            "--num_processes; for two: python -m torch.distributed.run --nproc_per_node=2 -m kandinsky_exp …"
        )


def _is_true(environment: Environment, name: str) -> bool:
    return environment.get(name, "false").lower() not in FALSE
