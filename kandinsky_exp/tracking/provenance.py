"""Where the running code comes from: the commit and the installed packages."""

import email
import functools
import importlib.metadata
import json
import re
import subprocess  # nosec B404 # git alone, by fixed arguments
from pathlib import Path


def git_commit() -> str | None:
    """The commit (40 hex digits) of this package's checkout or of what pip installed from git; None if neither."""
    package = Path(__file__).resolve().parent
    # A virtual environment often lies inside somebody else's repository, whose commit would be a lie.
    if _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is not None:
        return _git(package, "rev-parse", "HEAD")
    try:
        origin = importlib.metadata.distribution("kandinsky_exp").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    commit = json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
    return str(commit) if commit else None


@functools.cache  # in one process it stays, and it takes as long as a few tiny steps
def pip_freeze() -> str:
    """The installed distributions, one `name==version` a line, sorted."""
    found = {_name_and_version(dist) for dist in importlib.metadata.distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found, key=str) if name)


def _name_and_version(dist: importlib.metadata.Distribution) -> tuple[str, str]:
    text = dist.read_text("METADATA") or dist.read_text("PKG-INFO") or dist.read_text("") or ""
    # Its first paragraph: what follows is the package's whole README, which takes long to parse.
    fields = email.message_from_string(re.split(r"\r?\n\r?\n", text, maxsplit=1)[0])
    return fields["Name"], fields["Version"]


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # nosec B603 # git
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
