"""Names and values as MLflow accepts them, without secrets."""

import getpass
import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from kandinsky_exp.errors import first_line
from kandinsky_exp.system.redaction import masked

MAX_PARAM = 100  # characters: tables have them in columns; MLflow would take 6,000
MAX_TAG = 8000  # MLflow's limits
MAX_KEY = 250
MAX_DATASET_NAME = 500
JOB = "sweep.job"  # tag of a job: its place in the sweep
COMMON = {"snr_gamma": "snr"}  # what everybody calls a setting
MAX_DIGEST = 36
IMAGE = re.compile(  # an image's path in the artifacts, as MLflow's UI reads it; `/` of the key is `~`
    r"images/(?P<name>(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+(?P<time>\d+)\+[0-9a-f-]+)(?P<kind>\.png|\+compressed\.webp)"
)


def reason(error: BaseException) -> str:
    """The first line of what went wrong, without credentials."""
    return masked(first_line(error, 1 << 16).strip().rstrip("."))[:300]  # cut last: half a secret is not known as one


def legal_name(key: str) -> str:
    """`key` as MLflow accepts it for metrics, parameters, tags and images: other characters become `_`."""
    cleaned = posixpath.normpath(re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)).lstrip("./ ")
    return cleaned[:MAX_KEY].rstrip("/ ") or "_"


def param_text(value: Any) -> str:
    """A parameter as text: that of `value_text`, or its beginning and its end, and what tells it from others."""
    text = value_text(value)
    if len(text) <= MAX_PARAM:
        return text
    count = f"{len(value)} in all, " if isinstance(value, (list, tuple, dict)) else ""
    return f"{text[:40]}…{text[-30:]} ({count}{hashlib.sha256(text.encode()).hexdigest()[:6]})"


def value_text(value: Any) -> str:
    """A setting as text: as in YAML (null, true, 1e-05, ["a", 1]), strings as they are, without credentials."""
    plain = value is None or isinstance(value, (bool, int, float, list, tuple, dict))
    return masked(json.dumps(_one_form(value), ensure_ascii=False, default=str) if plain else str(value))


def same_param(stored: str, text: str) -> bool:
    """Whether a stored parameter has the value that `param_text` writes as `text` today: it was longer once, or 1.0."""
    if stored == text:
        return True
    try:
        value = json.loads(stored)
    except ValueError:
        value = stored
    return param_text(value) == text


def _one_form(value: Any) -> Any:
    """A number that is whole as a whole number, wherever it stands: 1.0 and 1 are the same setting."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_one_form(item) for item in value]
    return {key: _one_form(item) for key, item in value.items()} if isinstance(value, dict) else value


def tag_texts(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags with names and values that MLflow accepts, without credentials."""
    texts = {legal_name(key): shortened(masked(str(value)), MAX_TAG) for key, value in tags.items()}
    if "git_commit" in texts:
        texts.setdefault("mlflow.source.git.commit", texts["git_commit"])  # the UI's column "Version"
    return texts


def run_tags(tags: Mapping[str, str], parent_run_id: str | None) -> dict[str, str]:
    """The tags of a new run: `tags`, and those that MLflow's UI shows in columns of its own."""
    system = {"mlflow.source.name": "kandinsky-exp", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    if parent_run_id:
        system["mlflow.parentRunId"] = parent_run_id
    return {**system, **tag_texts(tags)}


def dataset_source(source: str) -> tuple[str, str]:
    """Type and JSON of a data set's source, as MLflow's own classes write them: a path, a URL or a hub id."""
    if source.lower().startswith(("http://", "https://")):
        return "http", json.dumps({"url": bare_address(source)})
    path = Path(source).expanduser()
    if path.is_absolute() or path.exists():
        return "local", json.dumps({"uri": path.resolve().as_uri()})
    return "hugging_face", json.dumps({"path": source})


def bare_address(url: str) -> str:
    """An address of the web without user and password, and without its query, which may hold keys."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each dotted key, or as many of them as tell it from the others.

    What is called `name` or `_target_` is a choice of its group, and has the group's name.
    """
    parts = {key: re.sub(r"\.(_target_|name)$", "", key.replace("/", ".")).split(".") for key in keys}
    names = {key: split[-1] for key, split in parts.items()}
    for length in range(2, max(map(len, parts.values()), default=0) + 1):
        taken = Counter(names.values())
        names = {
            key: ".".join(parts[key][-length:]) if taken[name] > 1 else name for key, name in names.items()
        }  # those that are told apart already stay short
    taken = Counter(names.values())
    return {key: key if taken[name] > 1 else COMMON.get(name, name) for key, name in names.items()}


def shortened(text: str, limit: int) -> str:
    """`text` in at most `limit` characters, with an ellipsis where it was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may have no name for its user
        return "unknown"
