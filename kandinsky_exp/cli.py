"""The command `kandinsky-exp`: its verbs, what is printed of an error, and exit codes.

0 done · 2 the configuration or the data is wrong and nothing was trained · 1 failed while running ·
128 + n stopped by signal n (130 SIGINT, 143 SIGTERM) after a checkpoint was written.
"""

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.kandinsky_optuna.sweeper import OptunaSweeper
from kandinsky_exp import hydra_adapter
from kandinsky_exp.config import command_line, hydra_errors, suggestions, validation
from kandinsky_exp.errors import (
    ConfigError,
    Interrupted,
    OutOfMemory,
    Pruned,
    RunFailure,
    UserError,
    cut,
    first_cause,
    first_line,
    is_of_host,
    is_out_of_memory,
    reason_of,
)
from kandinsky_exp.sweeps import job_process, launch, supervise
from kandinsky_exp.system import garbage, launch_environment, redaction, terminal

MAX_FOLDER_NAME = 200  # bytes; file systems take 255

# For conf/hydra: the first value that is not null. Here, for a process-based launcher imports this module with `Job`.
OmegaConf.register_new_resolver("first", lambda *values: next((v for v in values if v is not None), None), replace=True)
OmegaConf.register_new_resolver("last_part", lambda path: Path(path).name, replace=True)
OmegaConf.register_new_resolver("folder_name", lambda text: folder_name(text), replace=True)
OmegaConf.register_new_resolver(
    "verbs", lambda: "\n".join(f"{name:<10} {verb.purpose}" for name, verb in VERBS.items()), replace=True
)


def folder_name(text: str) -> str:
    """What a job varies as the name of one folder: a path stays one name, and a long name keeps its beginning."""
    name = text.replace("/", "_").replace("\\", "_")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return name if len(name.encode()) <= MAX_FOLDER_NAME else f"{name[: MAX_FOLDER_NAME // 4]}-{digest}"


@dataclass(frozen=True)
class Verb:
    """One row of the table: a root config of the verb's name in conf/, and what runs on it."""

    function: str  # "module:function" taking the config; imported when it is called, for it imports torch
    purpose: str
    # What is typed → the key it means: Hydra takes the name of a group for a choice of its files.
    plain: Mapping[str, str] = field(default_factory=dict)
    trains: bool = False  # its sweeps are recorded, and each of their jobs has a process of its own
    lists: tuple[str, ...] = ()  # keys that take a,b for a list of texts: to Hydra it would be a sweep


VERBS: dict[str, Verb] = {
    "train": Verb("kandinsky_exp.run:run", "fine-tune the prior or the decoder (the default)", trains=True),
    "plan": Verb(
        "kandinsky_exp.verbs.plan:plan", "will it fit? memory, disk and steps of a run, before anything loads"
    ),
    "encode": Verb("kandinsky_exp.verbs.encode:encode", "encode a data set once, for all runs; list and remove"),
    "generate": Verb("kandinsky_exp.verbs.generate:generate", "make images from prompts, pictures, masks and mixtures"),
    "evaluate": Verb(
        "kandinsky_exp.verbs.evaluate:evaluate", "is it better? draw held-out captions and measure the pictures"
    ),
    "export": Verb(
        "kandinsky_exp.verbs.export:export",
        "merge an adapter with its base into a pipeline",
        {"adapter": "adapter.source"},
    ),
    "push": Verb("kandinsky_exp.verbs.push:push", "upload the result of a finished run to the hub"),
    "ui": Verb("kandinsky_exp.verbs.ui:ui", "open the runs in MLflow's own pages"),
    "compare": Verb(
        "kandinsky_exp.verbs.compare:compare",
        "one HTML report over runs or a sweep: table, curves, images",
        {"sweep": "sweep.source"},
        lists=("runs",),
    ),
}


@dataclass
class Job:
    """What Hydra calls, once per job. A class and not a closure, so that process-based launchers can pickle it."""

    call: job_process.Call
    called: bool = field(default=False, init=False)
    failure: Exception | None = field(default=None, init=False)

    def __call__(self, cfg: DictConfig) -> Any:
        self.called = True
        sweeping = supervise.forget_multirun()
        try:
            return call(self.call, cfg)
        except Exception as error:
            self.failure = error
            if sweeping:  # the sweeper decides what becomes of the other jobs
                raise
            return None  # kept for `main`: raised from here, Hydra would print a line of its own


def call(job: job_process.Call, cfg: DictConfig) -> Any:
    """Run a verb on a config."""
    with garbage.uncollected():
        # Also the first thing the function does; here, before its module imports torch.
        validation.validate(cfg, job.verb, job.trusted)
        module, _, name = job.function.partition(":")
        function = getattr(import_module(module), name)
    return function(cfg)


@terminal.lasting()
def answered(job: job_process.Call, cfg: DictConfig) -> job_process.Answer:
    """The same for a job in its own process: however it ends, that is told, and printed where it went wrong."""
    try:
        value = call(job, cfg)
        return job_process.Answer("FINISHED", float(value) if isinstance(value, (int, float)) else None)
    except Pruned as verdict:
        return job_process.Answer("PRUNED", verdict.loss, str(verdict))
    except (Interrupted, KeyboardInterrupt) as stop:
        return job_process.Answer("KILLED", message=str(stop) or "stopped by signal 2")
    except SystemExit as leaving:
        return job_process.Answer("FAILED", message=f"the job called sys.exit({leaving.code!r})")
    except BaseException as error:
        _report(error, job.verbose)
        message = redaction.masked(reason_of(error))
        return job_process.Answer("FAILED", message=message, is_user_error=isinstance(error, UserError))


@terminal.lasting()
def main(argv: list[str] | None = None) -> None:
    """Run `kandinsky-exp [VERB] [overrides]`; return when done, else raise SystemExit with the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    os.environ.update(launch_environment.adopted(os.environ))
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    before = HydraConfig.instance().cfg
    try:
        if arguments == ["--version"]:
            print(f"kandinsky-exp {version('kandinsky-exp')}")
        else:
            verb, rest = _split_verb(arguments)
            _run(command_line.parse(verb, [_plain(text, VERBS[verb]) for text in rest], VERBS), verbose)
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        sys.exit(_report(error, verbose))
    finally:
        HydraConfig.instance().cfg = before  # who calls `run` next in this process is no job of this command


def _split_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """Take the verb off the arguments, or off the line that a shell asks to complete."""
    if "-sc" in arguments and "COMP_LINE" in os.environ:
        program, _, line = os.environ["COMP_LINE"].partition(" ")
        first, space, rest = line.partition(" ")
        if space and first in VERBS:
            os.environ["COMP_LINE"] = f"{program} {rest}"
            return first, arguments
        print(" ".join(verb for verb in VERBS if verb.startswith(line)))
    elif arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "~")):
        if arguments[0] not in VERBS:
            raise ConfigError(
                f"{cut(arguments[0])}: no such verb, the verbs are {', '.join(VERBS)}; a setting is written key=value, "
                f"without spaces around the = sign{suggestions.did_you_mean(arguments[0], VERBS, 0.5)}"
            )
        return arguments[0], arguments[1:]
    return "train", arguments


def _plain(text: str, verb: Verb) -> str:
    key, equals, value = text.partition("=")
    if key in verb.lists and value not in ("", "null") and value[0] not in "[\"'":
        value = f"[{','.join(json.dumps(part, ensure_ascii=False) for part in value.split(','))}]"
    return f"{verb.plain.get(key, key)}={value}" if equals else text


def _run(line: command_line.CommandLine, verbose: bool) -> None:
    hydra_adapter.register(OptunaSweeper)
    verb = VERBS[line.verb]
    if not line.shows_something:
        line = _settled(line, verb.trains)
    work = job_process.Call(answered, line.verb, verb.function, line.trusted, verbose)
    if line.sweeps and verb.trains and not line.shows_something:
        if code := launch.launch(line, work):
            sys.exit(code)
        return
    job = Job(work)
    try:
        line.start(job)
    except Exception as error:
        composing = isinstance(error, (HydraException, OmegaConfBaseException, OSError)) or not line.sweeps
        if isinstance(error, UserError) or job.called or not composing:
            raise
        raise hydra_errors.explain(error, line) from error
    if job.failure is not None:
        raise job.failure


def _settled(line: command_line.CommandLine, trains: bool) -> command_line.CommandLine:
    """The line, knowing whether it sweeps. What is wrong with a sweep is told before the sweeper makes its folder."""
    launch_environment.check_verb(os.environ, line.verb)
    line, found = command_line.settled(line, trains)
    if line.sweeps or found:
        try:
            found += hydra_errors.find_problems(line)
        except Exception as error:
            raise hydra_errors.explain(error, line) from error
    if found:
        raise ConfigError(found)
    for note in line.notes if os.environ.get("RANK", "0") == "0" else ():
        print(note, file=sys.stderr)
    return line


def _report(error: BaseException, verbose: bool) -> int:
    """Print what went wrong, with a traceback where it helps; return the exit code."""
    error = _no_memory(error) or error
    known = isinstance(error, (UserError, RunFailure, Interrupted, KeyboardInterrupt))
    if verbose or not known:
        print(redaction.masked("".join(traceback.format_exception(error))), file=sys.stderr, end="")
    if isinstance(error, Interrupted):
        return 128 + error.signal_number
    if isinstance(error, KeyboardInterrupt):
        return 130
    if known and _tells(error):
        message, rank = f"error: {error}", os.environ.get("RANK", "0")
        if isinstance(error, ConfigError) and len(error.problems) > 1:
            message = "\n  ".join([f"error: {len(error.problems)} settings are wrong", *error.problems])
        print(f"process {rank}: " * (rank != "0") + redaction.masked(message), file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1


def _no_memory(error: BaseException) -> OutOfMemory | None:
    """What to tell where memory ended outside of training, which has an advice of its own."""
    cause = first_cause(error)
    if isinstance(error, (UserError, RunFailure)) or not is_out_of_memory(cause):
        return None
    where = "the machine" if is_of_host(cause) else "the device"
    return OutOfMemory(f"{where} has no memory left ({first_line(cause)}): leave it more, or ask for less at once")


def _tells(error: BaseException) -> bool:
    """Whether this process prints an error: it is its `teller`; or there is none yet, and it is a machine's first."""
    teller, rank = getattr(error, "teller", None), os.environ.get("RANK", "0")
    return os.environ.get("LOCAL_RANK", rank) in ("0", "-1") if teller is None else str(teller) == rank
