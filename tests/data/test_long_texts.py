"""Captions and prompts of more than 77 tokens: which were cut, and where, is said and recorded."""

import json
import re
from pathlib import Path

from PIL import Image
from running import client, composed, prepare, runs, train

from kandinsky_exp import build
from kandinsky_exp.training.feature_loader import open_readers

LONG = "a cat and a dog " * 30
CUT = r"is longer than 77 tokens: it is read up to '…"
READ = r"read up to '….*a(nd a)? (cat|dog)?.*'"


def pictures(root: Path, count: int, cut: int) -> list[str]:
    """A folder in which the first captions are too long."""
    (root / "set").mkdir()
    rows = []
    for number in range(count):
        Image.new("RGB", (64, 64), (20 * number, 90, 120)).save(root / "set" / f"{number}.png")
        texts = ["short", LONG] if number < cut else ["short"]
        rows.append(json.dumps({"file_name": f"{number}.png", "text": texts}))
    (root / "set" / "metadata.jsonl").write_text("\n".join(rows))
    return ["data=folder", f"data.path={root / 'set'}", "data.resolution=64", "data.max_samples=null"]


def test_a_run_names_captions_and_prompts_that_were_cut(tmp_path, capfd):
    settings = [*pictures(tmp_path, 9, 7), "model=prior", "name=a", "trainer.max_steps=1", "validation.every=100"]
    prompts = f'validation.prompts=["a dog", "{LONG}"]'
    train(tmp_path, *settings, prompts)
    for said in (capfd.readouterr().err, (tmp_path / "a" / "train.log").read_text()):
        assert re.search(rf"7 captions are longer than 77 tokens and were cut:\n0\.png: {READ}\n1\.png: ", said)
        assert "4.png: read up to" in said
        assert "… and 2 more" in said
        assert "5.png" not in said
        assert len(re.findall(rf"validation\.prompts: 'a cat.*' {CUT}", said)) == 1
    (recorded,) = runs(tmp_path)
    file = client(tmp_path).download_artifacts(recorded.info.run_id, "cut_captions.txt", str(tmp_path))
    assert [line.split(":")[0] for line in Path(file).read_text().splitlines()] == [f"{n}.png" for n in range(7)]
    train(tmp_path, *settings, prompts, "trainer.max_steps=2")  # what was encoded before remembers it
    assert "4.png: read up to" in capfd.readouterr().err


def test_without_a_cache_they_are_named_too(tmp_path):
    settings = [*pictures(tmp_path, 4, 2), "model=prior", "data.cache=false"]
    prepare(tmp_path, settings)
    cfg = composed(tmp_path, *settings)
    accelerator = build.accelerator(cfg)
    stage = build.bare_stage(cfg, build.weights(cfg))
    read = build.read_settings(cfg, stage, accelerator.device)
    data = open_readers(build.data(cfg), stage, read, accelerator, lambda line: None)
    assert [line.split(":")[0] for line in data.cut] == ["0.png", "1.png"]
    assert data.notes[0].startswith("2 captions are longer than 77 tokens and were cut:\n0.png: read up to")


def test_the_prompts_of_dreambooth(tmp_path, capfd):
    (tmp_path / "dog").mkdir()
    Image.new("RGB", (64, 64), "brown").save(tmp_path / "dog" / "1.png")
    settings = ["data=dreambooth", f"data.instance_path={tmp_path / 'dog'}", "data.resolution=64", "model=prior"]
    prompts = [f"data.instance_prompt={LONG}sks", f"data.class_prompt={LONG}"]
    train(
        tmp_path,
        *settings,
        *prompts,
        "data.num_class_images=1",
        "trainer.max_steps=1",
        "trainer.batch_size=1",
        "tracker=none",
    )
    said = capfd.readouterr().err
    for key in ("instance", "class"):
        assert re.search(rf"data\.{key}_prompt: 'a cat.*' {CUT}", said)
