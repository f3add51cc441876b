"""Make the Accelerator: as the config says, with all processes that were started, or not at all."""

import logging
import os
from concurrent import futures
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed.rendezvous import rendezvous

from kandinsky_exp.errors import ConfigError, first_line
from kandinsky_exp.system import launch_environment, threads
from kandinsky_exp.system.launch_environment import Launch

COLLECTIVE_TIMEOUT = timedelta(hours=6)  # other processes wait while the first looks at the data or draws images
MEETING_TIMEOUT = timedelta(minutes=30)  # machines of one run may start minutes apart
PATIENCE = 20.0  # seconds until a process says that it waits for others
TYPES = ("NO", "MULTI_CPU", "MULTI_GPU")  # of what Accelerate makes: the network stays whole

logger = logging.getLogger(__name__)


def allow_tf32(allowed: bool) -> None:
    """Whether matrix products and convolutions of float32 may be rounded to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def make(mixed_precision: str, grad_accumulation: int, tf32: bool) -> Accelerator:
    """Precision, accumulation and compilation are the config's, whatever the environment says.

    Raises:
        ConfigError: the environment decides against the config, the precision cannot work here, or the processes that
            were started cannot be one run.
    """
    os.environ.update(launch_environment.adopted(os.environ))
    launch = launch_environment.launched(os.environ, tf32)
    on_cuda = torch.cuda.is_available() and not launch.on_cpu
    if on_cuda and (problem := launch_environment.unlike(launch, launch.processes, torch.cuda.device_count())):
        raise ConfigError(problem)
    # What processes agree on in Python goes over the CPUs, so that it waits for no GPU.
    backend: Any = {"backend": "cpu:gloo,cuda:nccl"} if on_cuda and launch.is_told else {}
    store = _met(launch) if launch.processes > 1 else None
    try:
        made = Accelerator(
            cpu=launch.processes > 1 and not torch.accelerator.is_available(),  # else each would be a run of its own
            mixed_precision=mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=grad_accumulation),
            dynamo_backend="no",  # trainer.compile leaves the keys of checkpoints as they are
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT, **backend),
                # Gradients lie in the buckets that are reduced, once. Buffers are constants of the architectures.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
            ],
        )
    except ValueError as error:
        raise ConfigError(f"precision: {first_line(error)}; set precision=fp32 or bf16") from error
    del store  # the first process keeps it open until all have used it
    if made.distributed_type.value not in TYPES:
        raise ConfigError(f"accelerate launch: {made.distributed_type.value} {launch_environment.UNSHARDED}")
    if (problem := launch_environment.unlike(launch, made.num_processes, None)) is not None:
        raise ConfigError(problem)
    return made


def _met(launch: Launch) -> Any:
    """Wait until all processes are there; the store where they met.

    In a thread, for torch waits without hearing signals: the thread of a process that is ended is left behind.

    Raises:
        ConfigError: they did not meet.
    """
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    meeting = threads.started(lambda: next(rendezvous("env://", timeout=MEETING_TIMEOUT)), "meeting")
    if not futures.wait([meeting], PATIENCE).done:
        logger.warning("waiting at %s for the other processes of %d", address, launch.processes)
    try:
        return meeting.result()
    except Exception as error:
        raise ConfigError(
            f"MASTER_ADDR, MASTER_PORT: the {launch.processes} processes did not meet at {address} "
            f"({first_line(error)}); start all of them, with a port that is free"
        ) from error
