"""MLflow's model registry: register a result where it lies, without a copy."""

import logging
from pathlib import Path

from kandinsky_exp.tracking import store
from kandinsky_exp.tracking.mlflow_names import reason

logger = logging.getLogger(__name__)


def register(uri: str, name: str, result: Path, run_id: str) -> None:
    """Make a version of the model `name`, new or not, unless there is one of this result; a failure is a warning."""
    try:
        with store.impatient():
            _register(uri, name, result, run_id)
    except Exception as error:  # whatever a store throws, the result stands
        logger.warning(
            "tracker.register: %s is no version of '%s' (%s); a server takes only what lies in its own artifacts",
            result,
            name,
            reason(error),
        )


def _register(uri: str, name: str, result: Path, run_id: str) -> None:
    from mlflow.exceptions import MlflowException

    client, _ = store.connect(uri)
    source = result.absolute().as_uri()
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if any((version.name, version.source) == (name, source) for version in versions):
        return
    is_new = True
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        is_new = False
    tags = {"stage": client.get_run(run_id).data.tags.get("stage", "")}
    try:
        version = client.create_model_version(name, source, run_id, tags=tags)
    except MlflowException:
        if is_new:  # refused: a model without versions is of no use
            client.delete_registered_model(name)
        raise
    logger.info("registered: models:/%s/%s", name, version.version)
