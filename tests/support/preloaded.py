"""What a run imports, imported by the process that `commands.py` forks the command from."""

import gc

import running  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401

gc.freeze()  # pages that no collection touches stay shared
