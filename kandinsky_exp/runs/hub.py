"""Publish the result of a run on the hub: who may, what goes there, and all of it in one commit."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from kandinsky_exp.config import saved_config
from kandinsky_exp.errors import ConfigError, RunFailure, first_line
from kandinsky_exp.models import adapter_files
from kandinsky_exp.models.components import PARTS, PRIOR_FOLDER, is_combined, read_object, side_parts
from kandinsky_exp.models.decoder_kinds import HINT, INPAINTING, PLAIN, by_result
from kandinsky_exp.models.weight_files import PART_FILES
from kandinsky_exp.runs import lookup
from kandinsky_exp.runs.model_card import Result, model_card
from kandinsky_exp.runs.run_folder import read_record
from kandinsky_exp.system.files import setting
from kandinsky_exp.system.threads import within

logger = logging.getLogger(__name__)
PATIENCE = 30.0  # seconds; the hub's own client waits for ever


def check_access(repo: str, private: bool) -> str | None:
    """Ask the hub whether a result may go to `repo`: better before the training than after it.

    Returns:
        Why the hub could not be asked; None where all is well.

    Raises:
        ConfigError: nobody is logged in, or not somebody who may write there, or it would be public against `private`.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if get_token() is None:
        raise ConfigError("hub.push: nobody is logged in on the hub; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        user = within(PATIENCE, api.whoami, "hub")
        name = _full_name(repo, user)
        within(PATIENCE, lambda: _check_repository(api, name, private), "hub")
    except HfHubHTTPError as error:
        refusals = {
            401: "hub.push: the hub does not take this token; run `hf auth login`, or renew HF_TOKEN",
            403: f"hub.repo_id: you may not write to '{repo}'; choose another, or a token that may",
        }
        if (refusal := refusals.get(error.response.status_code)) is not None:
            raise ConfigError(refusal) from error
        return first_line(error)
    except HFValidationError as error:
        raise ConfigError(f"hub.repo_id: {first_line(error)}; choose another") from error
    except ConfigError:
        raise
    except Exception as error:  # the client's ways of not reaching it are many
        return first_line(error)
    return None


def _full_name(repo: str, user: dict[str, Any]) -> str:
    """<user>/<name>, of somebody for whom this user may write."""
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ConfigError("hub.push: the token may only read; make one that may write, and run `hf auth login`")
    if "/" not in repo:
        return f"{user['name']}/{repo}"
    mine = [user["name"], *(org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read")]
    owner, _, name = repo.partition("/")
    if owner.lower() not in (text.lower() for text in mine):
        raise ConfigError(
            f"hub.repo_id: '{repo}' is {owner}'s, and you may write for {', '.join(mine)}; take {mine[0]}/{name}"
        )
    return repo


def _check_repository(api: Any, name: str, private: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_public = not api.model_info(name).private
    except RepositoryNotFoundError:
        return  # it will be made
    if private and is_public:
        raise ConfigError(f"hub.private: '{name}' exists and is public; choose another, or set hub.private=false")
    api.auth_check(name, write=True)


def push(run_folder: Path, repo: str, private: bool) -> None:
    """Upload the result of a finished run with its card, all in one commit: a repository never shows a part of it.

    What an earlier try has sent is not sent again.

    Raises:
        RunFailure: with the command that tries again; nothing local has changed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api, result = HfApi(), read_result(run_folder)
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        _check_repository(api, name, private)
        pictures = _pictures(run_folder, private)
        files: dict[str, Path | bytes] = _files(run_folder, result)
        files |= {path: file for path, (file, _) in pictures.items()}
        card = model_card(name, result, [(path, prompt) for path, (_, prompt) in pictures.items()])
        files["README.md"] = card.encode("utf-8", "replace")
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        logger.info("uploading %d files to %s", len(files), name)
        api.create_commit(name, operations, commit_message="Result of kandinsky-exp")
    except BaseException as error:
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        message = (
            f"hub.push: {run_folder} was not uploaded to {repo}: {first_line(error)}{cause}. Nothing is lost; "
            f"what has arrived is not sent again by: {command(run_folder, repo, private)}"
        )
        if isinstance(error, Exception):  # whatever it is, the local result stands
            raise RunFailure(message) from error
        logger.error("%s", message)
        raise
    logger.info("uploaded to %s", name)


def command(run_folder: Path, repo: str, private: bool) -> str:
    """What to type to upload a result, for a shell."""
    further = shlex.join([f"hub.repo_id={repo}", *([] if private else ["hub.private=false"])])
    return f"kandinsky-exp push {setting('run', run_folder)} {further}"


def read_result(run_folder: Path) -> Result:
    """What a finished run left.

    Raises:
        ConfigError: it is no run, or it is not finished.
    """
    record = read_record(run_folder)
    if record is None:
        raise ConfigError(f"run: {run_folder} is not the folder of a run; give one, with a run.json in it")
    if record.stage == "sweep":
        raise ConfigError(f"run: {run_folder} is a sweep; give the folder of one of its jobs")
    is_adapter = (run_folder / "adapter").is_dir()
    if record.status != "FINISHED" or not (is_adapter or (run_folder / "pipeline").is_dir()):
        raise ConfigError(f"run: {lookup.no_result(run_folder, None, '')}")
    index = {} if is_adapter else read_object(run_folder / "pipeline" / "model_index.json")
    kind = by_result(index.get("_class_name"))
    if is_adapter:
        whole = adapter_files.whole_files(run_folder / "adapter")
        kind = HINT if adapter_files.HINT_BLOCK in whole else INPAINTING if whole else None
    return Result(saved_config.flatten_saved(run_folder), record, is_adapter, kind or PLAIN)


def _files(run_folder: Path, result: Result) -> dict[str, Path | bytes]:
    """By their paths in the repository. Where the hub has the prior, a combined pipeline's own half is enough."""
    root = run_folder / ("adapter" if result.is_adapter else "pipeline")
    found = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    files: dict[str, Path | bytes] = {
        path.relative_to(root).as_posix(): path for path in found if path.suffix in PART_FILES
    }
    index = {} if result.is_adapter else read_object(root / "model_index.json")
    if result.linked_prior is None or not is_combined(index.get("_class_name")):
        linked = result.linked_prior is not None
        return {path: file for path, file in files.items() if not (linked and path.startswith(f"{PRIOR_FOLDER}/"))}
    decoder = [PARTS[part][1] for part in side_parts("decoder")]
    own = {key: value for key, value in index.items() if key in ("_diffusers_version", *decoder)}
    files = {path: file for path, file in files.items() if path.partition("/")[0] in decoder}
    name = index["_class_name"].replace("Combined", "")
    files["model_index.json"] = (json.dumps({"_class_name": name, **own}, indent=2) + "\n").encode()
    return files


def _pictures(run_folder: Path, private: bool) -> dict[str, tuple[Path, str]]:
    """(file, prompt) of the last validation, by path. Not to everybody: the grid, with held-out data."""
    folders = sorted((run_folder / "samples").glob("step-*"))
    if not folders:
        return {}
    listed = folders[-1] / "prompts.txt"
    prompts = listed.read_text("utf-8").splitlines() if listed.is_file() else []
    pictures = {"images/grid.png": (folders[-1] / "grid.png", "")} if private else {}
    pictures |= {
        f"images/{index:02d}.png": (folders[-1] / f"{index:02d}.png", prompt) for index, prompt in enumerate(prompts)
    }
    return {path: item for path, item in pictures.items() if item[0].is_file() and not item[0].is_symlink()}
