"""`nox -s demo`, `nox -s tests`, …: every chore of the project. Sessions are listed by `nox --list`."""

import json
import os
import sys
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_venv = "yes"

PYPROJECT = nox.project.load_toml("pyproject.toml")
CONSTRAINTS = ("-c", "constraints.txt")
# Nothing is downloaded; threads that share a core make torch many times slower; Python keeps what it compiles, for
# tests start many processes.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}


def group(*names: str) -> tuple[str, ...]:
    return tuple(nox.project.dependency_groups(PYPROJECT, *names))


def project_environment(session: nox.Session) -> str:
    """The Python of an environment that `types`, `tests` and `demo` share: torch is large, one copy is enough."""
    if sys.version_info < (3, 11):  # noqa: UP036 - nox itself runs on older ones
        session.error(f"kandinsky-exp needs Python 3.11 or newer; this nox runs on {sys.version.split()[0]}")
    home = Path(".nox", f"project-{sys.version_info.major}.{sys.version_info.minor}").absolute()
    python = str(home / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    if not Path(python).exists():
        session.log("The first installation takes a few minutes: torch is large.")
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
    """All tests, on two cores; arguments after `--` go to pytest: `--quick` leaves out what takes long."""
    python = project_environment(session)
    # Three workers: while one waits for a process, a server or a browser, the others have a core each.
    arguments = ["-n", "3", "--dist", "worksteal", "--durations", "15", *session.posargs]
    session.run(python, "-m", "pytest", *arguments, env=ENVIRONMENT)


@nox.session(venv_backend="none", default=False)
def soak(session: nox.Session) -> None:
    """One run is killed 50 times, all kinds of runs are stopped and resumed; arguments after `--` go to pytest."""
    python = project_environment(session)
    session.run(python, "-m", "pytest", "-m", "soak", "--durations", "3", *session.posargs, env=ENVIRONMENT)


@nox.session(venv_backend="none", default=False)
def sweep(session: nox.Session) -> None:
    """Sweeps whose jobs raise, exit and are killed, on all launchers; arguments after `--` go to pytest."""
    python = project_environment(session)
    arguments = ["-m", "", "-n", "2", "--dist", "worksteal", "--durations", "5", *session.posargs]
    session.run(python, "-m", "pytest", "tests/sweeps/test_sweep.py", *arguments, env=ENVIRONMENT)


@nox.session(venv_backend="none", default=False)
def demo(session: nox.Session) -> None:
    """Train the tiny prior and decoder on the shipped emoji and generate; arguments after `--` are overrides."""
    python = project_environment(session)
    session.run(python, "-m", "kandinsky_exp.verbs.demo", *session.posargs, env=ENVIRONMENT)


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """The ratios of docs/benchmarks.md; arguments after `--` go to tests/bench/run.py. Let nothing else run."""
    python = project_environment(session)
    session.run(python, "tests/bench/run.py", *session.posargs, env=ENVIRONMENT)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The documentation as HTML pages in build/docs; a link or an anchor that leads nowhere is an error."""
    session.install(*CONSTRAINTS, *group("docs"))
    # Not --quiet, with which no warning counts; and without a note of each build on the theme's successor.
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def security(session: nox.Session) -> None:
    """Bandit over the package; known vulnerabilities of all that constraints.txt pins, which needs the network."""
    session.install(*CONSTRAINTS, *group("security"))
    session.run("bandit", "--quiet", "--configfile", "pyproject.toml", "--recursive", "kandinsky_exp")
    report = Path(session.create_tmp(), "audit.json").absolute()
    report.unlink(missing_ok=True)
    # Exact pins need no resolver. It exits with 0 for packages that it learned nothing about: the report tells.
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--output", str(report)]
    session.run("pip-audit", "--requirement", "constraints.txt", *options, silent=True, success_codes=[0, 1])
    if problem := audit_problem(report):
        session.error(problem)


def audit_problem(report: Path) -> str | None:
    """What a report of pip-audit says against the pins, or that it does not know; None where all is well."""
    try:
        audited = json.loads(report.read_text("utf-8"))["dependencies"]
    except (OSError, ValueError, KeyError):
        return "The vulnerability service could not be asked: there is no report.."
    unasked = [f"{entry['name']} ({entry['skip_reason']})" for entry in audited if "skip_reason" in entry]
    if unasked or not audited:
        return (
            f"The vulnerability service could not be asked about {len(unasked)} of {len(audited)} packages, such as "
            f"{', '.join(unasked[:2])}.."
        )
    known = [f"{entry['name']} {entry['version']}: {vuln['id']}" for entry in audited for vuln in entry["vulns"]]
    return "\n".join(["Known vulnerabilities:", *known]) if known else None


@nox.session(default=False)
def min_versions(session: nox.Session) -> None:
    """All tests on the oldest versions that pyproject.toml promises. Their warnings are not errors."""
    requirements = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
    lowest = [
        f"{requirement.name}=={clause.version}"
        for requirement in requirements
        for clause in requirement.specifier
        if clause.operator == ">="
    ]
    session.install("-e", ".", *group("tests"), *lowest)
    current = "--deselect=tests/contract/test_packaging.py::test_constraints_cover_all_that_is_installed"
    arguments = ["-n", "2", "--dist", "worksteal", "-o", "filterwarnings=default", current, *session.posargs]
    session.run("pytest", *arguments, env=ENVIRONMENT)
