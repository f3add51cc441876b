"""What a start imports, up to the end of the first step of a run whose features are cached."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
import os, pathlib, sys
from torch.optim.lr_scheduler import LambdaLR

class Ending(LambdaLR):
    def step(self, epoch=None):
        super().step()
        if self.last_epoch:
            pathlib.Path("imported").write_text("\\n".join(sys.modules))
            os._exit(0)

def ending(optimizer, total_steps, *, warmup_steps=0):
    return Ending(optimizer, lambda step: 1.0)
"""


@pytest.mark.parametrize(("stage", "draws"), [("prior", False), ("decoder", True)])
def test_a_start_imports_nothing_that_its_first_step_does_not_need(tmp_path: Path, stage: str, draws: bool) -> None:
    """A process that starts from nothing: five CPU seconds, for others have all of it imported."""
    root = tmp_path / "root"
    prepare(root, [f"model={stage}"], encoded=True)
    (tmp_path / "ending.py").write_text(SCHEDULE)
    hook = ["scheduler._target_=ending.ending", "trusted_modules=[ending]"]
    words = [*SMALL, f"model={stage}", "tracker=none", "validation.fraction=0.25", f"output_root={root}", "name=start"]
    command = [sys.executable, "-m", "kandinsky_exp", *words, *hook]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported = set((tmp_path / "imported").read_text().split())
    assert "torch" in imported
    assert not UNNEEDED & imported
    assert ("diffusers.pipelines.kandinsky2_2" in imported) == draws
