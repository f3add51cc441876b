"""What a run imports, imported by the process that `commands.py` forks the command from, and what it makes once."""

import gc

import diffusers.pipelines.kandinsky2_2  # noqa: F401
import hydra_plugins.hydra_joblib_launcher.joblib_launcher  # noqa: F401
import mlflow.store.artifact.local_artifact_repo
import mlflow.store.tracking.sqlalchemy_store
import mlflow.tracking.multimedia  # noqa: F401
import running
import sqlalchemy.orm
import transformers.models.clip.image_processing_pil_clip
import transformers.models.clip.modeling_clip  # noqa: F401
from hydra.types import RunMode

from kandinsky_exp.config import command_line
from kandinsky_exp.stages import decoder, inpaint, prior  # noqa: F401
from kandinsky_exp.system import garbage
from kandinsky_exp.tracking import store_schema
from kandinsky_exp.verbs import generate, plan  # noqa: F401

sqlalchemy.orm.configure_mappers()
store_schema.problem("unknown", "")  # reads all of MLflow's migrations
for more in ([], ["model=prior"]):  # Hydra looks for its plugins, and which files most of the runs choose
    line = command_line.parse("train", [*running.SMALL, *more], ["train"])
    with line.composing() as loader:
        loader.load_configuration("train", line.overrides, RunMode.RUN)
gc.collect()
with garbage.uncollected():  # pages that no collection touches stay shared
    pass
