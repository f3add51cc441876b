"""`nox -s demo`, `nox -s tests`, …: every chore of the project. Sessions are listed by `nox --list`."""

import os
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_venv = "yes"

PYPROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = ("-c", "constraints.txt")
# Of the cores of a small machine two are enough for any of this; more threads than cores make torch much slower.
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def group(*names: str) -> list[str]:
    return nox.project.dependency_groups(PYPROJECT, *names)


def project_environment(session: nox.Session) -> str:
    """The Python of an environment that `types`, `tests` and `demo` share: torch is large, one copy is enough."""
    if sys.version_info < (3, 11):  # noqa: UP036 - nox itself runs on older ones
        session.error(f"kandinsky-exp needs Python 3.11 or newer; this nox runs on {sys.version.split()[0]}")
    home = Path(".nox", f"project-{sys.version_info.major}.{sys.version_info.minor}").absolute()
    python = str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if not Path(python).exists():
        session.run_install(sys.executable, "-m", "virtualenv", "--quiet", str(home))
    install = [python, "-m", "pip", "install", "--quiet", *CONSTRAINTS]
    session.run_install(*install, "-e", ".", *group("types", "tests"), silent=True)
    return python


@nox.session
def lint(session: nox.Session) -> None:
    """Format and lint of all code."""
    session.install(*CONSTRAINTS, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Strict types of the package."""
    session.run(project_environment(session), "-m", "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """All tests, on two cores; arguments after `--` go to pytest."""
    python = project_environment(session)
    # One thread each: two workers on two cores leave none for more.
    env = QUIET | {"OMP_NUM_THREADS": "1"}
    session.run(
        python, "-m", "pytest", "-n", "2", "--dist", "worksteal", "--durations", "15", *session.posargs, env=env
    )


@nox.session(venv_backend="none", default=False)
def demo(session: nox.Session) -> None:
    """Train the tiny prior and decoder on the shipped emoji and generate; arguments after `--` are overrides."""
    python = project_environment(session)
    session.run(python, "-m", "kandinsky_exp.demo", *session.posargs, env=QUIET | {"OMP_NUM_THREADS": "2"})
