"""Fine-tune Kandinsky 2.2: `run.py` is a run, `cli.py` the command, each folder one purpose (docs/architecture.md)."""

import os

# What libraries tell their makers of their use is off, unless the user has said otherwise; they read it when they are
# imported. MLflow's thread for it also changes the environment while a run reads it.
for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),  # diffusers and transformers, too
    ("RAY_USAGE_STATS_ENABLED", "0"),
):
    os.environ.setdefault(_name, _value)
