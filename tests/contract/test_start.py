"""What a start imports, up to the end of the first step of a run with cached features, and what that run needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.tiny import architecture
from tests.support.running import SMALL, prepare

# The first step of such a run needs none of these, and most of them take 0.1 to 2 s.
UNNEEDED = {
    "datasets",
    "diffusers.training_utils",
    "fastapi",
    "matplotlib",
    "mlflow",
    "optuna",
    "plotly",
    "sklearn",
    "sqlalchemy",
    "transformers.models.clip.modeling_clip",
}
SCHEDULE = """
import pathlib, sys
from torch.optim.lr_scheduler import LambdaLR

class Noting(LambdaLR):
    def step(self, epoch=None):
        super().step()
        if self.last_epoch == 1:
            pathlib.Path("imported").write_text("\\n".join(sys.modules))
        if self.last_epoch == 2:
            from kandinsky_exp.data.preprocess import Preprocess
            from kandinsky_exp.tiny import architecture
            pathlib.Path("fingerprint").write_text(Preprocess(None, architecture.tokenizer(), None).fingerprint)

def noting(optimizer, total_steps, *, warmup_steps=0):
    return Noting(optimizer, lambda step: 1.0)
"""
BLOCKED = """
import pathlib
pathlib.Path("looked_for").open("a").write(__name__)
raise ModuleNotFoundError(f"no {__name__} here", name=__name__)
"""


@pytest.mark.parametrize(("stage", "draws"), [("prior", False), ("decoder", True)])
def test_a_start_imports_nothing_that_its_first_step_does_not_need(tmp_path: Path, stage: str, draws: bool) -> None:
    """Nor does the whole run from encoded features need MLflow or datasets, and the order of sets, which is another in
    each process, does not count in what names such features."""
    root = tmp_path / "root"
    prepare(root, [f"model={stage}", "tracker=none"], encoded=True)
    (tmp_path / "noting.py").write_text(SCHEDULE)
    for name in ("mlflow", "datasets"):
        (tmp_path / f"{name}.py").write_text(BLOCKED)
    hook = ["scheduler._target_=noting.noting", "trusted_modules=[noting]"]
    words = [*SMALL, f"model={stage}", "tracker=none", "validation.fraction=0.25", f"output_root={root}", "name=start"]
    command = [sys.executable, "-m", "kandinsky_exp", *words, *hook]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "looked_for").exists()
    imported = set((tmp_path / "imported").read_text().split())
    assert "torch" in imported
    assert not UNNEEDED & imported
    assert ("diffusers.pipelines.kandinsky2_2" in imported) == draws
    assert (tmp_path / "fingerprint").read_text() == Preprocess(None, architecture.tokenizer(), None).fingerprint
    assert not (root / "mlflow.db").exists()
    assert (root / "start" / "pipeline" / "model_index.json").is_file()
