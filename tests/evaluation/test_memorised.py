"""A run that was made to memorise is flagged, and a healthy one is not."""

import json
import random
import shutil
from pathlib import Path

import pytest
from running import composed

from kandinsky_exp.run import run
from kandinsky_exp.verbs.evaluate import evaluate

SHARED = Path(__file__).parents[3] / "shared" / "data" / "emoji"
STEPS = 2000
HELD_OUT = 44  # pictures beside those that the data set itself holds out


def put(folder: Path, pictures: list[tuple[str, dict[str, str]]]) -> None:
    folder.mkdir(parents=True)
    lines = []
    for split, row in pictures:
        name = Path(row["file_name"]).name
        shutil.copy(SHARED / split / row["file_name"], folder / name)
        lines.append(json.dumps({"file_name": name, "text": row["text"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def rows(split: str) -> list[tuple[str, dict[str, str]]]:
    lines = (SHARED / split / "metadata.jsonl").read_text("utf-8").splitlines()
    return [(split, json.loads(line)) for line in lines]


@pytest.mark.soak
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"SKIPPED LOUDLY: the emoji set is not at {SHARED}")
@pytest.mark.parametrize(("count", "copies"), [(16, True), (None, False)])
def test_a_run_that_memorised_is_told_from_a_healthy_one(count: int | None, copies: bool, tmp_path: Path) -> None:
    pictures = rows("train")
    random.Random(0).shuffle(pictures)
    put(tmp_path / "data" / "train", pictures[HELD_OUT:][:count])
    put(tmp_path / "data" / "validation", [*rows("validation"), *pictures[:HELD_OUT]])
    how = ["weights=tiny", "tracker=none", f"data.path={tmp_path / 'data'}", "data.resolution=64"]
    how += ["trainer.batch_size=16", "optimizer.lr=1e-3", f"trainer.max_steps={STEPS}", f"checkpoint.every={STEPS}"]
    how += [f"validation.every={STEPS}", "validation.reconstructions=0"]
    for stage in ("prior", "decoder"):
        run(composed(tmp_path, f"model={stage}", f"name={stage}", *how, small=[]))
    words = ["weights=tiny", "tracker=none", f"run={tmp_path / 'decoder'}", f"prior={tmp_path / 'prior'}", "name=e"]
    evaluate(composed(tmp_path, *words, verb="evaluate", small=[]))
    (model,) = json.loads((tmp_path / "evaluate" / "e" / "metrics.json").read_text())["models"]
    (encoder,) = model["encoders"].values()
    assert encoder["copies"] is copies
