"""`kandinsky-exp push`: the result of a finished run to the hub, now or once more."""

from omegaconf import DictConfig

from kandinsky_exp.config import consistency, validation
from kandinsky_exp.errors import ConfigError, cut
from kandinsky_exp.runs import hub
from kandinsky_exp.system import files, logs


def push(cfg: DictConfig) -> float:
    """Upload what `cfg.run` left, to where its own config says unless another repository is given.

    Returns:
        1.0, the number of results (Hydra jobs return numbers).

    Raises:
        ConfigError: it is no finished run, or the hub does not answer, or does not let this user write there.
        RunFailure: the upload broke off.
    """
    validation.validate(cfg, "push")
    folder = files.expanded(cfg.run).absolute()
    params = hub.read_result(folder).params
    repo = str(cfg.hub.repo_id or params.get("hub.repo_id") or "")
    if not repo:
        raise ConfigError("hub.repo_id: the run was given none; give hub.repo_id=<user>/<name>")
    if not consistency.REPO_ID.fullmatch(repo):
        raise ConfigError(f"hub.repo_id: the run's own, '{cut(repo)}', is no <user>/<name>; give another")
    private = params.get("hub.private") is not False if cfg.hub.private is None else bool(cfg.hub.private)
    with files.occupied(folder), logs.logging_to(folder / files.LOG, is_main=True):
        if (why := hub.check_access(repo, private)) is not None:
            raise ConfigError(f"hub: it could not be asked ({why}); try again when it answers")
        hub.push(folder, repo, private)
    return 1.0
