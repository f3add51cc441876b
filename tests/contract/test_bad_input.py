"""Whatever a user gets wrong: one short answer that names the key or file and what to do, at once, and no harm done.

One table. A row is what was typed, a part of the answer, and what makes the files that it speaks of. Every row runs the
command in this process against an output folder with a finished run and an MLflow store.
"""

import gc
import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from running import train

from kandinsky_exp import cli
from kandinsky_exp import run as _run  # noqa: F401
from kandinsky_exp.verbs import evaluate as _evaluate  # noqa: F401
from kandinsky_exp.verbs import generate as _generate  # noqa: F401 - what a verb imports takes seconds, once

LONGEST = 700  # characters of a message about one mistake
SLOWEST = 5.0  # seconds
ADVICE = re.compile(
    r"; |has to be|did you mean|the choices are|is one of|choose|it takes|: give "
    r"|exists already|invalid choice|not found|cannot be read|comes first|Correct tracker"
)
EMOJI = ["data=emoji", "weights=tiny"]
PRIOR = ["model=prior", *EMOJI]
DRAW = ["generate", "weights=tiny", "prompts=[a fox]"]
ON_FOLDER = ["model=prior", "weights=tiny", "data.path={tmp}/data"]
LISTED = ["model=prior", "weights=tiny", "data=list"]
SHARDS = ["model=prior", "weights=tiny", "data=webdataset"]
SUBJECT = [
    "model=prior",
    "weights=tiny",
    "data=dreambooth",
    "data.instance_path={tmp}/data",
    "data.instance_prompt=sks",
]
HUB = ["model=prior", "weights=tiny", "data=hub"]
STRICT = "validation.fraction=0.05"


@dataclass(frozen=True)
class Bad:
    """One mistake.

    Args:
        typed: the command line; {tmp} is the row's own folder, {root} the output folder, {tiny} the tiny pipeline.
        answer: a part of what is printed.
        make: makes the files in {tmp}.
        late: found only where images are read, which a run does under its own name: that run fails, and says so.
    """

    typed: list[str]
    answer: str
    make: Callable[[Path], object] | None = None
    late: bool = False


# --- the files of the rows


def write(file: Path, content: str | bytes) -> Path:
    """Also where a hard link stood: the file that it shared stays as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def file(name: str, content: str | bytes = "") -> Callable[[Path], object]:
    return lambda tmp: write(tmp / name, content)


def picture(kind: str = "PNG", size: tuple[int, int] = (32, 24)) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(stream, kind)
    return stream.getvalue()


def rows(*captions: Any) -> str:
    return "".join(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n" for i, text in enumerate(captions))


def data(metadata: str | bytes | None, images: int = 3, name: str = "metadata.jsonl", **others: bytes) -> Any:
    """A folder `data` with pictures 0.png, 1.png, …, what lists them, and other files."""

    def make(tmp: Path) -> None:
        (tmp / "data").mkdir()
        for number in range(images):
            write(tmp / "data" / f"{number}.png", picture())
        if metadata is not None:
            write(tmp / "data" / name, metadata)
        for other, content in others.items():
            write(tmp / "data" / other.replace("_", "."), content)

    return make


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


def tar(*members: tuple[str, bytes], cut: int | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()[:cut]


def saved_dataset(tmp: Path) -> None:
    import datasets

    columns = {"image": [{"bytes": picture(), "path": None}] * 3, "text": ["a", "b", "c"], "number": [1, 2, 3]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), number=datasets.Value("int64"))
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=features)).save_to_disk(tmp / "saved")


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Path:
    return tiny_folder


TINY: dict[str, Path] = {}  # filled by the fixture `site`: the functions below make their files from it


def linked(source: Path, target: Path) -> None:
    """A copy whose large files are hard links."""

    def link(one: str, other: str) -> object:
        return os.link(one, other) if one.endswith(".safetensors") else shutil.copyfile(one, other)

    shutil.copytree(source, target, copy_function=link)


def whole(*harm: Callable[[Path], object], name: str = "weights") -> Callable[[Path], None]:
    """The tiny combined pipeline in {tmp}/weights, with something done to it."""

    def make(tmp: Path) -> None:
        linked(TINY["combined"], tmp / name)
        for action in harm:
            action(tmp / name)

    return make


def half(side: str, *harm: Callable[[Path], object]) -> Callable[[Path], None]:
    """The prior or the decoder alone, as a folder of its own, {tmp}/weights."""

    def make(tmp: Path) -> None:
        index = {"_class_name": "KandinskyV22PriorPipeline" if side == "prior" else "KandinskyV22Pipeline"}
        for folder in TINY["combined"].iterdir():
            if folder.is_dir() and folder.name.startswith("prior_") == (side == "prior"):
                linked(folder, tmp / "weights" / folder.name.removeprefix("prior_"))
                index[folder.name.removeprefix("prior_")] = ["diffusers", "x"]
        write(tmp / "weights" / "model_index.json", json.dumps(index))
        for action in harm:
            action(tmp / "weights")

    return make


def without(name: str) -> Callable[[Path], object]:
    def remove(folder: Path) -> None:
        target = folder / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return remove


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: write(folder / name, content)


def cut(name: str, size: int = 1000) -> Callable[[Path], object]:
    return lambda folder: write(folder / name, (folder / name).read_bytes()[:size])


def setting(name: str, **values: Any) -> Callable[[Path], object]:
    """Other values in a part's config."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        write(folder / name, json.dumps(content | values))

    return change


def other_part(folder: str, part: str, **settings: Any) -> Callable[[Path], object]:
    """A part of another architecture: its own config and its own weights."""

    def replace(root: Path) -> None:
        import diffusers
        import transformers
        from torch import nn

        shutil.rmtree(root / folder)
        made: nn.Module
        config = json.loads((TINY["combined"] / folder / "config.json").read_text())
        if part.startswith("CLIP"):
            cls = getattr(transformers, part)
            made = cls(cls.config_class(**config | settings))
        else:
            cls = getattr(diffusers, part)
            made = cls.from_config(config | settings)
        made.save_pretrained(root / folder)  # type: ignore[operator]

    return replace


def checkpoint(*harm: Callable[[Path], object]) -> Callable[[Path], None]:
    """A checkpoint of the finished run, {tmp}/run/checkpoints/step-00000002."""

    def make(tmp: Path) -> None:
        linked(TINY["run"], tmp / "run")
        for action in harm:
            action(tmp / "run" / "checkpoints" / "step-00000002")

    return make


def both(white: int, size: tuple[int, int] = (32, 24)) -> Callable[[Path], object]:
    """A picture of 32 x 24 pixels, {tmp}/a.png, and a mask of one colour, {tmp}/m.png."""

    def make(tmp: Path) -> None:
        write(tmp / "a.png", picture())
        Image.new("L", size, white).save(tmp / "m.png")

    return make


SQUARE = file("a.png", picture())
IMAGE = [*DRAW, "task=image", "image={tmp}/a.png"]
FILL = [*DRAW, "task=inpaint", "image={tmp}/a.png", "mask={tmp}/m.png"]
MIX = ["generate", "weights=tiny", "task=mix"]
SAFE = "diffusion_pytorch_model.safetensors"
UNET = "UNet2DConditionModel"
PRIOR_WEIGHTS = [*PRIOR, "weights.prior={tmp}/weights"]
ANOTHER = "unet has weights of another architecture than its config.json: "
DECODER_WEIGHTS = [*EMOJI, "weights.decoder={tmp}/weights"]

TABLE: dict[str, list[Bad]] = {}

TABLE["command lines"] = [
    Bad([], "data.path: is not set; give the folder of your images"),
    Bad(["trian"], "trian: no such verb"),
    Bad(["trian"], "did you mean train?"),
    Bad(["seed", "3"], "a setting is written key=value"),
    Bad([*EMOJI, "generate"], "the verb comes first: kandinsky-exp generate"),
    Bad([*EMOJI, "seed"], "seed: not a setting; settings are written key=value"),
    Bad(["--learning_rate=1e-5"], "without dashes; see kandinsky-exp --help; did you mean optimizer.lr?"),
    Bad(["--cfg", "jobb"], "invalid choice: 'jobb'"),
    Bad(["--config-dir", "nowhere"], "--config-dir: folder 'nowhere' not found; give the one of your yaml files"),
    Bad(["--config-dir"], "expected one argument"),
    Bad(["--config-name", "nowhere", *EMOJI], "Cannot find primary config 'nowhere'"),
    Bad(["=3", *EMOJI], "=3: cannot be read"),
    Bad(["data.path=my pics (old)"], "quote it twice: 'data.path=\"my pics (old)\"'"),
    Bad(["validation.prompts=[a=b]", *EMOJI], "quote each text: 'validation.prompts="),
    Bad(["validation.prompts=a fox, snow", *EMOJI], "several values need --multirun; if this is one text, quote each"),
    Bad(["optimizer.lr=1e-4,1e-5", *EMOJI], "several values need --multirun"),
    Bad(["optimizer.betas=(0.9,0.99)", *EMOJI], "optimizer.betas=(0.9,0.99): cannot be read"),
    Bad(["trainer.max_steps=${nothing", *EMOJI], "cannot be read"),
    Bad(["tracker.uri=${foo}", *EMOJI], "tracker.uri: Interpolation key 'foo' not found"),
    Bad(["name=${no_such_resolver:1}", *EMOJI], "name: "),
    Bad(["~trainer.max_steps", *EMOJI], "trainer.max_steps: is missing"),
    Bad(["~trainer.max_stepz", *EMOJI], "trainer.max_stepz: no such setting"),
    Bad(["~trainer", *EMOJI], "trainer: is missing"),
    Bad(["hydra.foo=1", *EMOJI], "Could not override 'hydra.foo'"),
    Bad(["-m", "modle=prior", "optimizer.lr=1,2", *EMOJI], "modle: no such setting; did you mean model?"),
    Bad(["-m", "optimiser.lr=1,2", *EMOJI], "optimiser.lr: no such setting; did you mean optimizer.lr?"),
    Bad(["-m", "model=prior,decodr", *EMOJI], "there is no model=decodr"),
    Bad(["generate", "weights=tiny"], "prompts: is empty"),
    Bad(["generate", "trainer.max_steps=3", "prompts=[a]"], "trainer.max_steps: no such setting"),
    Bad(["generate", "model=prior", "prompts=[a]"], "model: generate has no such group; remove it"),
    Bad(["encode", "trainer.max_steps=3", *EMOJI], "trainer.max_steps: no such setting"),
    Bad(["encode", "remove=[t0000]"], "remove: "),
    Bad(["encode", "list=3"], "list: has to be true or false"),
]
TABLE["keys and groups"] = [
    Bad(
        ["model=decodr", *EMOJI],
        "there is no model=decodr; the choices are control, decoder, inpaint, prior; did",
    ),
    Bad(["experiment=demo_prio"], "did you mean demo_prior?"),
    Bad(["sweep=lrs", *EMOJI], "sweep: there is no sweep=lrs; the choices are lora_rank, lr, precision, snr"),
    Bad(["trainer=3", *EMOJI], "trainer: needs a name; choose one of default"),
    Bad(["data=null"], "data: needs a name; choose one of dreambooth, emoji, folder, hub"),
    Bad(["precision=fp8", *EMOJI], "there is no precision=fp8; the choices are bf16, fp16, fp32"),
    Bad(["modle=decoder", *EMOJI], "modle: no such setting; did you mean model?"),
    Bad(["+modle=decoder", *EMOJI], "modle: nothing reads this key; remove it; did you mean model?"),
    Bad(["trainer.stepz=3", *EMOJI], "trainer.stepz: no such setting; did you mean trainer.max_steps?"),
    Bad(["+trainer.stepz=3", *EMOJI], "trainer.stepz: nothing reads this key; remove it; did you mean"),
    Bad(["+trainer.max_steps=3", *EMOJI], "exists already; write trainer.max_steps=3, without the +"),
    Bad(
        ["+data.pth=x", "data.path={tmp}", "weights=tiny"], "data.pth: kandinsky_exp.data.sources.folder takes no such"
    ),
    Bad(["lr=1e-4", *EMOJI], "lr: no such setting; did you mean optimizer.lr?"),
    Bad(["max_train_steps=3", *EMOJI], "did you mean trainer.max_steps?"),
    Bad(["data=hub", "data.path=x"], "data.path: not a setting of the data that is chosen; it is one of data=folder"),
    Bad(["model=prior", "model.vlb_weight=0", *EMOJI], "it is one of model=control, decoder, inpaint"),
    Bad(["optimizer._target_=torch.optim.AdamX", *EMOJI], "there is no 'AdamX' in torch.optim; did you mean Adam"),
    Bad(["optimizer._target_=torch.nn.Linear", *EMOJI], "optimizer"),
    Bad(["optimizer._partial_=false", *EMOJI], "optimizer._partial_: has to be true"),
    Bad(["model._partial_=false", *EMOJI], "model._partial_: has to be true"),
    Bad(["+data._partial_=true", *EMOJI], "data._partial_: has to be false"),
    Bad(["+optimizer.foo=1", *EMOJI], "torch.optim.AdamW takes no such argument"),
]
TABLE["values"] = [
    Bad(["trainer.max_steps=abc", *EMOJI], "trainer.max_steps: has to be a whole number, at least 1, not 'abc'"),
    Bad(["trainer.max_steps=0", *EMOJI], "trainer.max_steps: has to be a whole number, at least 1, not 0"),
    Bad(["trainer.batch_size=-4", *EMOJI], "trainer.batch_size: has to be a whole number, at least 1, not -4"),
    Bad(["trainer.grad_accumulation=0", *EMOJI], "trainer.grad_accumulation: has to be a whole number, at least 1"),
    Bad(["trainer.ema_decay=1", *EMOJI], "trainer.ema_decay: has to be a number, at least 0 and below 1"),
    Bad(["trainer.attention=flash", *EMOJI], "trainer.attention: has to be one of sdpa, xformers, eager, not 'flash'"),
    Bad(["optimizer.lr=abc", *EMOJI], "optimizer.lr: has to be a number, above 0, not 'abc'"),
    Bad(["optimizer.lr=-1", *EMOJI], "optimizer.lr: has to be a number, above 0, not -1"),
    Bad(["scheduler.warmup_steps=0.1", *EMOJI], "scheduler.warmup_steps: has to be a whole number, at least 0"),
    Bad(["model.condition_dropout=10", *EMOJI], "has to be a number, between 0 and 1, not 10"),
    Bad(["model.snr_gamma=0", *EMOJI], "model.snr_gamma: has to be a number, above 0, or null, not 0"),
    Bad(["validation.fraction=1", *EMOJI], "has to be a number, at least 0 and below 1, not 1"),
    Bad(["validation.prompts=nowhere.txt", *EMOJI], "there is no text file 'nowhere.txt'"),
    Bad(["validation.prompts=" + "a" * 5000, *EMOJI], "validation.prompts: there is no text file"),
    Bad(["data.resolution=100", *EMOJI], "a multiple of 8"),
    Bad(["data.resolution=72", *EMOJI], "data.resolution: has to be a multiple of 16 for these weights, not 72"),
    Bad(["seed=99999999999", *EMOJI], "seed: has to be a whole number, between 0 and 2^32 - 1"),
    Bad(["name=a/b", *EMOJI], "name: has to be text, without any of /"),
    Bad(["name=2024", *EMOJI], "as text it needs quotes inside the shell's"),
    Bad(["name=" + "n" * 300, *EMOJI], "name: is too long for a folder; give a shorter one"),
    Bad(['name="a\0b"', *EMOJI], "name: "),
    Bad(["name=cache", *EMOJI], "name: 'cache' is what all runs share"),
    Bad(["output_root=", *EMOJI], "output_root: has to be text"),
    Bad(["output_root={tmp}/file", *EMOJI], "is a file; give a folder", file("file")),
    Bad(
        ["output_root={tmp}/file/out", *EMOJI],
        "file/out cannot be written (Not a directory); choose another",
        file("file"),
    ),
    Bad(["output_root=" + "o" * 300, *EMOJI], "output_root: "),
    Bad(['output_root="~nobody-is-called-so/x"', *EMOJI], "output_root: "),
    Bad(["encode", "output_root={tmp}/file/out", *EMOJI], "output_root: ", file("file")),
    Bad([*DRAW, "height=72"], "height: has to be a multiple of 16 for this decoder, not 72"),
    Bad([*DRAW, "task=images"], "task: has to be one of text, image, inpaint, mix, control, not 'images'"),
    Bad(
        [*DRAW, "task=image", "image={tmp}/a.png", "strength=0"], "strength: has to be a number, above 0 and at most 1"
    ),
    Bad([*DRAW, "task=image", "image={tmp}/a.png", "strength=1.2"], "at most 1, or null, not 1.2"),
    Bad([*DRAW, "prompts={tmp}/p.txt"], "is not a text file in UTF-8", file("p.txt", b"\xff\xfe\x00")),
    Bad([*DRAW, "prompts={tmp}/p.txt"], "is empty; write one prompt per line", file("p.txt", "\n \n")),
]
TABLE["contradictions"] = [
    Bad(["hub.push=true", *EMOJI], "hub.repo_id: hub.push is on but there is no repository"),
    Bad(["hub.repo_id=me/mine", *EMOJI], "hub.repo_id: is set, but hub.push is off; add hub.push=true, or remove it"),
    Bad(["hub.push=true", "hub.repo_id=me/mine/x", *EMOJI], "hub.repo_id: 'me/mine/x' is no <user>/<name>"),
    Bad(["hub.push=true", "hub.repo_id=me/mine", *EMOJI], "hub.push: nobody is logged in on the hub; run `hf auth"),
    Bad(
        ["tracker=none", "tracker.register=mine", *EMOJI], "tracker.register: is set, but tracker=none has no registry"
    ),
    Bad(["tracker.register=mine/x", *EMOJI], "tracker.register: has to be text, a name without / and :"),
    Bad(["adapter.rank=4", *EMOJI], "adapter.rank: is set, but adapter=none"),
    Bad(["adapter.dropout=0.1", *EMOJI], "adapter.dropout: is set, but adapter=none"),
    Bad(["adapter=lora", "adapter.rank=null", *EMOJI], "adapter.rank: has to be a whole number, at least 1, not null"),
    Bad(["adapter=lora", "adapter.target_modules=to_q", *EMOJI], "a list is written [to_q]"),
    Bad(["adapter=lora", "adapter.target_modules=[]", *EMOJI], "adapter.target_modules: is empty"),
    Bad(
        ["adapter=lora", "adapter.target_modules=[to_x]", *EMOJI],
        "adapter.target_modules: to_x match no module of UNet2D",
    ),
    Bad(
        ["adapter=lora", "adapter.rank=0", *EMOJI], "adapter.rank: has to be a whole number, at least 1, or null, not 0"
    ),
    Bad(["adapter=dora", "adapter.rank=1000", *EMOJI], "adapter.rank: 1000 is more than the 64 of "),
    Bad(["adapter.init=pissa", *EMOJI], "adapter.init: is set, but adapter=none"),
    Bad(
        ["adapter=lora", "adapter.base_precision=nf4", *EMOJI], "adapter.base_precision: nf4 computes in half precision"
    ),
    Bad(["adapter=lora", "adapter.base_precision=int8", "precision=bf16", *EMOJI], "adapter.base_precision: "),
    Bad(
        ["adapter=lora", "adapter.base_precision=nf4", "adapter.init=pissa", *EMOJI], "adapter.init: pissa changes the"
    ),
    Bad(["scheduler=polynomial", "optimizer.lr=1e-9", *EMOJI], "scheduler.lr_end: 1e-07 is not below optimizer.lr"),
    Bad(["scheduler.warmup_steps=20", "trainer.max_steps=10", *EMOJI], "scheduler.warmup_steps: 20 is more than"),
    Bad(["precision=fp16", *EMOJI], "precision: fp16 trains on a GPU, for its loss scaling, and this is a CPU; set"),
    Bad(["precision=fp16", "adapter=lora", *EMOJI], "precision: fp16 trains on a GPU"),
    Bad(
        ["experiment=dreambooth_prior", "name=new", *SUBJECT, "data.class_prompt=a dog"],
        "precision: fp16 trains on a GPU",
        data(None),
    ),
    Bad(["plan", "precision=fp16", *EMOJI], "or fp32; device_memory=24 plans for a GPU of 24 GB elsewhere"),
    Bad([*PRIOR, "trainer.attention=xformers"], "trainer.attention: the prior has causal attention, for which"),
    Bad(["precision.frozen_dtype=float16", *EMOJI], "half precision needs mixed precision; take precision=bf16"),
    Bad(["data.cache=false", "data.buckets=true", *EMOJI], "data.buckets: the sizes of all images are known once"),
    Bad(["data.buckets=true", "data.resolution=72", *EMOJI], "has to be a multiple of 64 with it, not 72"),
    Bad([*SHARDS, "data.path={tmp}/a.tar", "data.cache=false"], "data.cache: ", file("a.tar", tar(("0.png", b"x")))),
    Bad([*PRIOR, "weights.prior_revision=main"], "weights.prior_revision: is set, but weights.prior is no hub id"),
    Bad([*PRIOR, "weights.prior={tiny}", "weights.variant=fp61"], "weights.variant: "),
    Bad([*DRAW, "log_to_run=true"], "log_to_run: neither the prior nor the decoder comes from an MLflow run"),
    Bad([*DRAW, "log_to_run=true", "tracker=none"], "log_to_run: is on, but tracker=none"),
    Bad(["tracker.uri=runs", *EMOJI], "tracker.uri: 'runs' is no address"),
    Bad(["tracker.uri=file:///tmp/x", *EMOJI], "tracker.uri: "),
    Bad(["tracker.uri=http://localhost:1", *EMOJI], "tracker.uri: "),
    Bad(["tracker.uri=http://[::1", *EMOJI], "tracker.uri"),
]
TABLE["pictures to draw from"] = [
    Bad([*DRAW, "image=a.png"], "image: task=text does not draw from it; remove it, or set task=image"),
    Bad([*DRAW, "task=image"], "image: is not set; give the file of a picture"),
    Bad([*DRAW, "task=image", "image=nowhere.png"], "image: there is no file 'nowhere.png' here; check the path"),
    Bad(
        [*IMAGE, "strength=0.03"],
        "strength: 0.03, leaves none of 25 inference_steps to draw; give at least 0.04",
        SQUARE,
    ),
    Bad([*IMAGE, "mask={tmp}/a.png"], "mask: task=image does not draw from it", SQUARE),
    Bad([*IMAGE], "a.png': not an image that Pillow can read as PNG", file("a.png", "text")),
    Bad([*IMAGE], "a.png': ", file("a.png", picture()[:-200])),
    Bad([*IMAGE, "width=72"], "width: has to be a multiple of 16 for this decoder, not 72", SQUARE),
    Bad([*FILL], "decoder: tiny is not a decoder for inpainting, which task=inpaint needs; give one", both(255)),
    Bad([*FILL], "is 16 x 16 pixels and the picture 32 x 24; give one of the same size", both(255, (16, 16))),
    Bad([*FILL], "is white, so nothing would be drawn; paint white what shall", both(0)),
    Bad([*FILL[:-1]], "mask: is not set; give a picture of the size of image, white where", SQUARE),
    Bad([*MIX], "mix: is empty; give pictures and texts, such as 'mix=[photo.jpg, \"a watercolour\"]'"),
    Bad([*MIX, "mix=a.png"], "mix: has to be a list of texts, not 'a.png'; a list is written [a.png]"),
    Bad([*MIX, "mix=[a.png]"], "mix: there is no file 'a.png' here; check the path"),
    Bad([*MIX, "mix=[{tmp}/a.png]"], "mix: '", file("a.png", "text")),
    Bad([*MIX, "mix=[a,b]", "mix_weights=[1]"], "mix_weights: 1 for 2 entries of mix; give one for each"),
    Bad([*MIX, "mix=[a,b]", "mix_weights=[1,-1]"], "mix_weights: they add up to 0; give numbers whose sum is above 0"),
    Bad([*MIX, "mix=[a,b]", "mix_weights=[1,.inf]"], "mix_weights: has to be a list of a number, finite"),
    Bad([*MIX, "mix=[a]", "prompts=[a]"], "prompts: task=mix does not draw from it; remove it, or set task=text"),
]
TABLE["prompts with settings of their own"] = [
    Bad(
        ["validation.prompts=[{prompt: a, sed: 1}]", *EMOJI], "validation.prompts: entry 1: nothing reads sed; it takes"
    ),
    Bad(["validation.prompts=[a, {seed: 1}]", *EMOJI], "entry 2: has no prompt; write {prompt: a fox"),
    Bad(["validation.prompts=[{prompt: a, seed: x}]", *EMOJI], "entry 1: seed has to be a whole number"),
    Bad(["validation.prompts=[{prompt: a, mask: m.png}]", *EMOJI], "mask is nothing that model=decoder draws a prompt"),
    Bad([*PRIOR, "validation.prompts=[{prompt: a, hint: m.png}]"], "entry 1: hint is nothing that model=prior draws a"),
    Bad(
        ["validation.prompts=[{prompt: a, height: 72}]", *EMOJI], "entry 1: height has to be a multiple of 16 for these"
    ),
    Bad(
        ["model=inpaint", "validation.prompts=[{{prompt: a, image: {tmp}/a.png, mask: {tmp}/m.png}}]", *EMOJI],
        "validation.prompts: entry 1: mask: nothing of '",
        both(0),
    ),
]
MINE = ["--config-dir", "{tmp}/mine"]
TABLE["config files"] = [
    Bad([*MINE, "experiment=e", *EMOJI], 'e.yaml", line 1', file("mine/experiment/e.yaml", "a: [1\nb: }")),
    Bad([*MINE, "experiment=e", *EMOJI], "e.yaml", file("mine/experiment/e.yaml", "a: b: c")),
    Bad([*MINE, "experiment=e", *EMOJI], "e.yaml", file("mine/experiment/e.yaml", b"\xff\xfe\x00x")),
    Bad(
        [*MINE, "experiment=e", *EMOJI],
        "did you mean trainer.max_steps?",
        file("mine/experiment/e.yaml", "# @package _global_\ntrainer:\n  max_stepz: 3\n"),
    ),
    Bad(
        [*MINE, "experiment=e", *EMOJI],
        "experiment: nothing reads this key",
        file("mine/experiment/e.yaml", "trainer:\n  max_steps: 3\n"),
    ),
    Bad(
        [*MINE, "experiment=e", *EMOJI],
        "model/nothing",
        file("mine/experiment/e.yaml", "# @package _global_\ndefaults:\n  - override /model: nothing\n"),
    ),
    Bad(
        [*MINE, "experiment=e", *EMOJI],
        "e",
        file("mine/experiment/e.yaml", "# @package _global_\ndefaults:\n  - model: prior\n"),
    ),
    Bad(
        [*MINE, "experiment=e", *EMOJI],
        "trainer: has to be a group of settings",
        file("mine/experiment/e.yaml", "# @package _global_\ntrainer: 3\n"),
    ),
    Bad(
        [*MINE, "experiment=e", *EMOJI],
        "optimizer.lr: has to be a number",
        file("mine/experiment/e.yaml", "# @package _global_\noptimizer:\n  lr: 1e-4x\n"),
    ),
    Bad(
        [*MINE, "experiment=e", *EMOJI],
        "trainer.max_steps: ",
        file("mine/experiment/e.yaml", "# @package _global_\ntrainer:\n  max_steps: ${oc.env:NO_SUCH_VARIABLE}\n"),
    ),
    Bad(
        [*MINE, "optimizer=mine", *EMOJI],
        "optimizer._target_: is missing",
        file("mine/optimizer/mine.yaml", "lr: 1e-4"),
    ),
    Bad(
        [*MINE, "data=mine", "weights=tiny"],
        "data.resolution: is missing",
        file("mine/data/mine.yaml", "_target_: kandinsky_exp.data.sources.emoji\n"),
    ),
    Bad(
        [*MINE, "experiment=e", "modle=1", *EMOJI],
        "trainer.max_stepz: nothing reads",
        file("mine/experiment/e.yaml", "# @package _global_\ntrainer:\n  max_stepz: 3\n"),
    ),
    Bad(["--config-dir", "{tmp}/mine", *EMOJI], "mine", file("mine", "")),
    Bad(["--config-dir", "{tmp}", "--config-name", "broken", *EMOJI], "broken", file("broken.yaml", "a: [")),
]
TABLE["data folders"] = [
    Bad(["data.path={tmp}/nowhere", "weights=tiny"], "data.path: there is no folder"),
    Bad(["data.path=~/no/such/folder"], f"there is no folder '{Path('~/no/such/folder').expanduser()}' here"),
    Bad(['data.path="~nobody-is-called-so/x"', "weights=tiny"], "data.path: there is no folder"),
    Bad(["data.path={tmp}/file", "weights=tiny"], "data.path: there is no folder", file("file")),
    Bad(ON_FOLDER, "holds neither metadata.jsonl nor .csv nor .parquet", data(None, 0)),
    Bad(ON_FOLDER, "0.png has no .txt of its name beside it", data(None, 2, **{"1_txt": b"a"})),
    Bad(ON_FOLDER, "1.txt: not UTF-8 text; save it as UTF-8", data(None, 2, **{"0_txt": b"a", "1_txt": b"\xff"})),
    Bad(
        ON_FOLDER,
        "holds both metadata.jsonl and metadata.csv; keep one",
        data(rows("a", "b"), 2, metadata_csv=b"file_name,text\n0.png,a\n"),
    ),
    Bad(ON_FOLDER, "it has no rows; write one per image", data("")),
    Bad(ON_FOLDER, "metadata.jsonl, line 1: not JSON", data("{\n}")),
    Bad(ON_FOLDER, "not JSON", data("[" * 100_000)),
    Bad(ON_FOLDER, "not a JSON object; write", data("[1]\n")),
    Bad(ON_FOLDER, "line 1: not UTF-8 text; save the file as UTF-8", data(b"\xff{\x00")),
    Bad(
        ON_FOLDER,
        "no column 'text' among file_name, caption; set data.caption_column",
        data('{"file_name": "0.png", "caption": "a"}\n{"file_name": "1.png", "caption": "b"}\n'),
    ),
    Bad([*ON_FOLDER, "data.image_column=nothing"], "no image file in column 'nothing'", data(rows("a", "b"))),
    Bad(ON_FOLDER, "and every other row: an empty caption in 'text'", data(rows("", " ", ""))),
    Bad(ON_FOLDER, "'text' holds 3; a caption is a string or a list of strings", data(rows("a", 3))),
    Bad(ON_FOLDER, "leads out of the folder", data('{"file_name": "../secret.png", "text": "a"}\n')),
    Bad(
        ON_FOLDER,
        "fields do not match the header (file_name, text)",
        data("file_name,text\n0.png,a,b\n", name="metadata.csv"),
    ),
    Bad(ON_FOLDER, "line 2: not CSV", data('file_name,text\n0.png,"a"b\n', name="metadata.csv")),
    Bad(
        ON_FOLDER,
        "no image file in column 'file_name' (columns: 0.png, a)",
        data("0.png,a\n1.png,b\n", name="metadata.csv"),
    ),
    Bad(ON_FOLDER, "not a Parquet file that can be read", data(b"PAR1 no", name="metadata.parquet")),
    Bad(
        ON_FOLDER,
        "pictures inside are read by data=list data.path={tmp}/data/metadata.parquet",
        data(parquet(image=[b"1", b"2"], text=["a", "b"]), name="metadata.parquet"),
    ),
    Bad([*ON_FOLDER, STRICT], "validation.fraction: one image cannot be divided; add images", data(rows("a"), 1)),
    Bad(
        [*PRIOR, "data=folder", "data.path={tmp}/data", "data.max_samples=1"],
        "one image cannot be divided",
        data(rows("a", "b")),
    ),
    Bad(
        [*ON_FOLDER, "validation.fraction=0.5", "data.on_error=skip"],
        "one image cannot be divided",
        data("{\n{\n" + rows("a"), 1),
        late=True,
    ),
    Bad(ON_FOLDER, "1.png: No such file or directory; mend it or take the row out", data(rows("a", "b"), 1), late=True),
    Bad(ON_FOLDER, "0.png: ", data(rows("a", "b"), 2, **{"0_png": picture()[:200]}), late=True),
    Bad(
        ON_FOLDER, "0.png: not an image that Pillow can read", data(rows("a", "b"), 2, **{"0_png": b"hello"}), late=True
    ),
    Bad(ON_FOLDER, "4 x 4 pixels, too small", data(rows("a", "b"), 2, **{"0_png": picture(size=(4, 4))}), late=True),
    Bad(
        [*ON_FOLDER, "data.cache=false"],
        "0.png: not an image",
        data(rows("a", "b"), 2, **{"0_png": b"hello"}),
        late=True,
    ),
    Bad(["encode", *ON_FOLDER], "0.png: not an image", data(rows("a", "b"), 2, **{"0_png": b"hello"})),
]
TABLE["dreambooth"] = [
    Bad([*SUBJECT, "data.instance_path=nowhere"], "data.instance_path: there is no folder 'nowhere' here"),
    Bad(SUBJECT, "data.instance_path: there is no picture in {tmp}/data; put some", data(None, 0)),
    Bad(SUBJECT, "data.instance_path: there is no picture in {tmp}/data; put some", data(None, 0, **{"1_txt": b"a"})),
    Bad(SUBJECT, "image 1.heic: not an image that Pillow", data(None, 1, **{"1_heic": b"a"}), late=True),
    Bad(
        [*SUBJECT, "data.class_prompt=a dog", "data.class_path={tmp}/dogs"],
        "data.class_path: {tmp}/dogs: nothing says what the 1 drawn pictures there were drawn for; give another folder",
        lambda tmp: (data(None, 1)(tmp), write(tmp / "dogs" / "drawn-00000.png", picture())),
    ),
    Bad(
        [*SUBJECT, "data.class_prompt=a dog", "data.class_path={tmp}/dogs", "weights.decoder=nowhere"],
        "data.num_class_images: 1 of 100 class images are in {tmp}/dogs, and the other 99 cannot be drawn; give more, ",
        lambda tmp: (data(None, 1)(tmp), write(tmp / "dogs" / "0.png", picture())),
    ),
    Bad(
        [*SUBJECT, "data.class_prompt=a dog", "weights.decoder=nowhere"],
        "data.class_path, or weights that draw: weights.decoder: there is no folder 'nowhere'",
        data(None, 1),
    ),
]
TABLE["lists, shards and the hub"] = [
    Bad([*LISTED, "data.path={tmp}/no.csv"], "data.path: there is no file"),
    Bad(
        [*LISTED, "data.path={tmp}/l.xlsx"],
        "has none of these endings; give a list of images as .csv",
        file("l.xlsx", "x"),
    ),
    Bad([*LISTED, "data.path={tmp}/l.csv"], "l.csv: it has no rows", file("l.csv")),
    Bad(
        [*LISTED, "data.path={tmp}/l.csv"], "no image file in column 'file_name'", file("l.csv", "path,text\na.png,a\n")
    ),
    Bad([*LISTED, "data.path={tmp}/l.jsonl"], "not JSON", file("l.jsonl", "file_name,text\n")),
    Bad(
        [*LISTED, "data.path={tmp}/l.csv", "data.validation_path={tmp}/no.csv"],
        "data.validation_path: there is no file",
        file("l.csv", "file_name,text\na.png,a\n"),
    ),
    Bad([*SHARDS, "data.path={tmp}/no.tar"], "data.path: there is no file"),
    Bad([*SHARDS, 'data.path="{tmp}/{{003..001}}.tar"'], "counts 0 shards; write {first..last}"),
    Bad([*SHARDS, "data.path={tmp}/{{0..1}}.tar"], "cannot be read"),
    Bad([*SHARDS, 'data.path="http://"'], "no address of a server"),
    Bad([*SHARDS, "data.path={tmp}/a.tar"], "no tar file that can be read to its end", file("a.tar", "hello" * 200)),
    Bad(
        [*SHARDS, "data.path={tmp}/a.tar"],
        "no image (jpg, png, webp, jpeg) has this name; set data.image_column",
        file("a.tar", tar(("0.txt", b"a"))),
    ),
    Bad(
        [*SHARDS, "data.path={tmp}/a.tar"],
        "no .txt has this name; set data.caption_column",
        file("a.tar", tar(("0.png", picture()))),
    ),
    Bad(
        [*SHARDS, "data.path={tmp}/a.tar", 'data.image_column=";"'],
        "data.image_column: give the extensions",
        file("a.tar", tar(("0.png", picture()))),
    ),
    Bad(
        [*SHARDS, "data.path={tmp}/a.tar"],
        "no tar file that can be read to its end",
        file("a.tar", tar(("0.png", picture()), ("0.txt", b"a"), cut=700)),
    ),
    Bad(["data=hub", "weights=tiny"], "data.name: is not set; give the data set's id on the hub"),
    Bad([*HUB, "data.name=nobody/nothing"], "data.name: nobody/nothing cannot be loaded"),
    Bad([*HUB, "data.name={tmp}/saved", "data.split=test"], "data.split: ", saved_dataset),
    Bad([*HUB, "data.name={tmp}/saved", "data.image_column=number"], "'number' is no column of images", saved_dataset),
    Bad([*HUB, "data.name={tmp}/saved", "data.caption_column=number"], "'number' holds 1; a caption", saved_dataset),
    Bad([*HUB, "data.name={tmp}/saved", "data.validation_split=dev"], "data.validation_split: ", saved_dataset),
]
TABLE["weights"] = [
    Bad([*PRIOR, "weights.prior=./nowhere"], "weights.prior: there is no folder './nowhere'"),
    Bad([*PRIOR, "weights.prior={tmp}"], "has no model_index.json; give the top folder of a diffusers pipeline"),
    Bad([*PRIOR, "weights.prior=" + "w" * 5000], "weights.prior: there is no folder"),
    Bad(
        [*PRIOR, "weights.prior=nobody/nothing"],
        "weights.prior: 'nobody/nothing' is no folder here, and could not be fetched from the hub",
    ),
    Bad(
        [*EMOJI, "weights.decoder=nobody/gated"],
        "weights.decoder: 'nobody/gated' is no folder here, and could not be fetched from the hub",
    ),
    Bad(["data=emoji"], "could not be fetched from the hub"),
    Bad([*DRAW, "decoder=nobody/nothing"], "could not be fetched from the hub"),
    Bad(DECODER_WEIGHTS, "weights.decoder: '{tmp}/weights': subfolder 'unet' is missing", half("prior")),
    Bad(PRIOR_WEIGHTS, "weights.prior: '{tmp}/weights': subfolder 'prior' is missing", half("decoder")),
    Bad([*DRAW, "decoder={tmp}/weights"], "decoder: '{tmp}/weights': subfolder 'unet' is missing", half("prior")),
    Bad(PRIOR_WEIGHTS, "subfolder 'text_encoder' is missing", half("prior", without("text_encoder"))),
    Bad(DECODER_WEIGHTS, "subfolder 'movq' is missing", half("decoder", without("movq"))),
    Bad(PRIOR_WEIGHTS, "'prior_prior' has no .safetensors file", whole(without(f"prior_prior/{SAFE}"))),
    Bad(PRIOR_WEIGHTS, "'prior_prior/config.json' cannot be read", whole(put("prior_prior/config.json", "{"))),
    Bad(PRIOR_WEIGHTS, "model_index.json cannot be read", whole(put("model_index.json", "{"))),
    Bad(
        PRIOR_WEIGHTS,
        "'prior_prior' holds a UNet2DConditionModel, not a PriorTransformer",
        whole(setting("prior_prior/config.json", _class_name=UNET)),
    ),
    Bad(
        PRIOR_WEIGHTS, "scheduler_config.json' cannot be read", whole(without("prior_scheduler/scheduler_config.json"))
    ),
    Bad(
        PRIOR_WEIGHTS,
        "unknown noise scheduler 'NoScheduler'",
        whole(setting("prior_scheduler/scheduler_config.json", _class_name="NoScheduler")),
    ),
    Bad(
        PRIOR_WEIGHTS,
        "preprocessor_config.json' cannot be read",
        whole(without("prior_image_processor/preprocessor_config.json")),
    ),
    Bad(PRIOR_WEIGHTS, "'prior_tokenizer' has no vocabulary", whole(without("prior_tokenizer/vocab.json"))),
    Bad(PRIOR_WEIGHTS, f"'prior_prior/{SAFE}' is damaged or cut off", whole(cut(f"prior_prior/{SAFE}"))),
    Bad(PRIOR_WEIGHTS, f"'prior_prior/{SAFE}' is damaged or cut off", whole(put(f"prior_prior/{SAFE}", "garbage"))),
    Bad(DECODER_WEIGHTS, f"'unet/{SAFE}' is damaged or cut off", whole(cut(f"unet/{SAFE}"))),
    Bad(
        [*DRAW, "decoder={tmp}/weights"],
        f"decoder: '{{tmp}}/weights': 'unet/{SAFE}' is damaged",
        whole(cut(f"unet/{SAFE}")),
    ),
    Bad(DECODER_WEIGHTS, ANOTHER, whole(setting("unet/config.json", block_out_channels=[64, 64, 96]))),
    Bad(DECODER_WEIGHTS, ANOTHER, whole(setting("unet/config.json", cross_attention_dim=32))),
    Bad(PRIOR_WEIGHTS, "lacks 32 tensors that its", whole(setting("prior_prior/config.json", num_layers=5))),
    Bad(PRIOR_WEIGHTS, "has 16 tensors beyond what", whole(setting("prior_prior/config.json", num_layers=2))),
    Bad(PRIOR_WEIGHTS, "has embedding_dim=x, but", whole(setting("prior_prior/config.json", embedding_dim="x"))),
    Bad(
        PRIOR_WEIGHTS,
        "lacks 32 tensors that its",
        whole(setting("prior_image_encoder/config.json", num_hidden_layers=4)),
    ),
    Bad(
        PRIOR_WEIGHTS,
        "weights.prior: ",
        whole(other_part("prior_image_encoder", "CLIPVisionModelWithProjection", projection_dim=48)),
    ),
    Bad(PRIOR_WEIGHTS, "weights.prior: ", whole(other_part("prior_prior", "PriorTransformer", embedding_dim=48))),
    Bad(
        DECODER_WEIGHTS,
        "its unet has encoder_hid_dim=48, but image_encoder of weights.prior",
        whole(other_part("unet", UNET, encoder_hid_dim=48)),
    ),
    Bad(
        DECODER_WEIGHTS,
        "in_channels=9: it is a decoder for inpainting; set model=",
        whole(other_part("unet", UNET, in_channels=9)),
    ),
    Bad(
        DECODER_WEIGHTS,
        "has addition_embed_type=null, not image",
        whole(other_part("unet", UNET, addition_embed_type=None)),
    ),
    Bad(
        [*DRAW, "decoder={tmp}/weights"],
        "decoder: its unet has encoder_hid_dim=48",
        whole(other_part("unet", UNET, encoder_hid_dim=48)),
    ),
    Bad(PRIOR_WEIGHTS, "is a run without a pipeline/ to start from", file("weights/config.yaml", "a: 1")),
    Bad(
        [*PRIOR, "weights.prior={root}/lora"],
        "has an adapter, no whole network; make one: kandinsky-exp export adapter=",
    ),
    Bad([*EMOJI, "weights.decoder={root}/done"], "subfolder 'unet' is missing"),
]
RESUME = [*PRIOR, "name=new"]
TABLE["what a sweep ranks by"] = [
    Bad(
        [*PRIOR, "sweep.objective=validation/los"],
        "sweep.objective: this run does not record validation/los; it record",
    ),
    Bad([*PRIOR, "sweep.objective=validation/cmmd"], "does not record validation/cmmd; set validation.metrics=[cmmd]"),
    Bad([*PRIOR, "sweep.objective=validation/loss_hole"], "sweep.objective: this run does not record"),
    Bad([*PRIOR, "sweep.direction=up"], "sweep.direction: has to be one of minimize, maximize"),
    Bad([*PRIOR, "checkpoint.result=first"], "checkpoint.result: has to be one of last, best"),
    Bad([*PRIOR, "validation.patience=0"], "validation.patience: has to be a whole number, at least 1"),
]
MEASURE = ["evaluate", "weights=tiny"]
TABLE["what is measured"] = [
    Bad(MEASURE, "data.path: is not set"),
    Bad(
        [*MEASURE, "run={tmp}/nowhere"], "is no run, checkpoint or sweep; give one, or prior=, decoder= and data.path="
    ),
    Bad([*MEASURE, "run={root}/done"], "pictures are held out, and it takes 16 to measure; give more pictures"),
    Bad([*MEASURE, "run={root}/done", "data.path={tmp}"], "data.path: a run is evaluated with its own data; leave it"),
    Bad([*MEASURE, "run={root}/done", "prior=tiny"], "done is the prior; leave one of them out"),
    Bad([*MEASURE, "run={root}/done", "encoder={tmp}"], "has no config.json of a vision model of transformers"),
    Bad(
        [*MEASURE, "data=emoji", "num_images=99"], "num_images: 99 is more than the 16 held-out captions; give at most"
    ),
    Bad([*MEASURE, "data=emoji", "decoder=tiny_control"], "decoder: it draws hints, and captions alone say nothing"),
    Bad([*MEASURE, "data.path={tmp}/data", "validation.fraction=0"], "nothing is held out", data(rows("a", "b", "c"))),
    Bad([*MEASURE, "run={root}/done/checkpoints/step-00000099"], "holds no trained prior"),
    Bad([*MEASURE, "data=emoji", "num_images=0"], "num_images: has to be"),
]
GO_ON = [*PRIOR, "name=done", "data.max_samples=6", "trainer.max_steps=3"]
STEP = "{tmp}/run/checkpoints/step-00000002"
TABLE["runs and checkpoints"] = [
    Bad([*EMOJI, "name=done"], "holds a prior, with which model=decoder cannot go on; choose another name"),
    Bad([*PRIOR, "name=done", "checkpoint.resume=never"], "exists and checkpoint.resume=never; choose another name"),
    Bad([*PRIOR, "name=swept"], "holds a sweep, with which model=prior cannot go on"),
    Bad([*PRIOR, "name=theirs"], "exists and is not a run; choose another name or move it away"),
    Bad([*PRIOR, "name=damaged"], "its run.json cannot be read; choose another name or move it away"),
    Bad([*PRIOR, "name=a_file"], "name: "),
    Bad([*GO_ON, "optimizer=sgd"], "optimizer._target_: was torch.optim.AdamW, is torch.optim.SGD"),
    Bad([*GO_ON, "adapter=lora"], "adapter.name: was none, is lora"),
    Bad([*GO_ON, "seed=7"], "seed: was 0, is 7"),
    Bad([*GO_ON, "trainer.batch_size=3"], "trainer.batch_size × trainer.grad_accumulation × processes: was"),
    Bad(["checkpoint.resume=nowhere", *EMOJI], "checkpoint.resume: 'nowhere' is no folder"),
    Bad(["checkpoint.resume=" + "r" * 5000, *EMOJI], "checkpoint.resume: "),
    Bad([*RESUME, "checkpoint.resume={tmp}"], "checkpoint.resume: "),
    Bad(
        [*RESUME, "checkpoint.resume={tmp}/run"],
        "there is no complete checkpoint in",
        lambda tmp: (tmp / "run/checkpoints").mkdir(parents=True),
    ),
    Bad(
        [*RESUME, f"checkpoint.resume={STEP}"], "there is no complete checkpoint in", checkpoint(put("state.json", "{"))
    ),
    Bad(
        [*RESUME, f"checkpoint.resume={STEP}"], "there is no complete checkpoint in", checkpoint(without("state.json"))
    ),
    Bad(
        [*EMOJI, "name=new", f"checkpoint.resume={STEP}"],
        "belongs to another stage; set model=",
        checkpoint(),
    ),
    Bad(
        [*RESUME, f"checkpoint.resume={STEP}", "data.max_samples=6"],
        "optimizer.safetensors has 7 bytes instead of",
        checkpoint(put("optimizer.safetensors", "garbage")),
    ),
    Bad(
        [*RESUME, f"checkpoint.resume={STEP}", "data.max_samples=6"],
        "optimizer.pt is none of its files",
        checkpoint(put("optimizer.pt", "a pickle")),
    ),
    Bad([*DRAW, "decoder={root}/done"], "decoder: "),
    Bad([*DRAW, "decoder={root}/done/checkpoints/step-00000002"], "holds no trained decoder; give a run, or one"),
    Bad(
        [*DRAW, "prior=0123456789abcdef0123456789abcdef"],
        "has no run 0123456789abcdef0123456789abcdef; set tracker.uri",
    ),
    Bad([*DRAW, f"prior={STEP}"], "prior: ", checkpoint(put(f"prior/{SAFE}", "garbage"))),
    Bad(
        [*DRAW, f"prior={STEP}"],
        "config.yaml cannot be read",
        checkpoint(lambda step: write(step.parents[1] / "config.yaml", "a: [")),
    ),
]


def row(bad: Bad, name: str) -> Any:
    return pytest.param(bad, id=name)


ROWS = [
    row(bad, f"{group} {number}: {' '.join(bad.typed)[:90]!a}")
    for group, table in TABLE.items()
    for number, bad in enumerate(table)
]


# --- the check of a row


@dataclass(frozen=True)
class Site:
    """An output folder in use: a finished prior, an adapter, a sweep's folder, what is not a run, and a store."""

    root: Path
    tiny: Path
    before: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)  # the state after the row before

    def state(self, whole: bool = False) -> dict[str, Any]:
        """Of everything but the cache and the store's database: size, time and content.

        Args:
            whole: also the content of large files, which takes time.
        """
        found: dict[str, Any] = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if name.startswith(("cache", "mlflow.db", ".mlflow.db")):
                continue
            facts, is_file = path.stat(), path.is_file()
            read = is_file and (whole or facts.st_size < 1 << 16)
            digest = hashlib.blake2b(path.read_bytes()).hexdigest() if read else ""
            found[name] = (facts.st_size if is_file else 0, facts.st_mtime_ns if "/" in name else 0, digest)
        return found

    def statuses(self) -> list[str]:
        with sqlite3.connect(f"file:{self.root}/mlflow.db?mode=ro", uri=True) as store:
            return sorted(status for (status,) in store.execute("select status from runs"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site") / "out"
    train(root, "model=prior", "name=done", "data.max_samples=6", "trainer.max_steps=2", "validation.every=9")
    write(root / "lora" / "config.yaml", "weights: {prior: tiny}")
    write(root / "lora" / "adapter" / "pytorch_lora_weights.safetensors", "")
    write(root / "swept" / "run.json", '{"stage": "sweep", "status": "FINISHED"}')
    write(root / "theirs" / "notes.txt", "mine")
    write(root / "damaged" / "run.json", "{")
    write(root / "a_file", "")
    TINY.update(combined=tiny_folder, run=root / "done")
    made = Site(root, tiny_folder)
    made.before.update(made.state(whole=True))
    gc.collect()
    gc.freeze()  # Accelerate collects garbage at the end of every run: most of a row's time, with all libraries in it
    yield made
    gc.unfreeze()


def exit_code(arguments: list[str]) -> int:
    try:
        cli.main(arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else -1
    return 0


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("HYDRA_FULL_ERROR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("bad", ROWS)
def test_a_mistake_is_answered_in_short(
    bad: Bad, site: Site, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def filled(text: str) -> str:
        known = re.search(r"\{(tmp|root|tiny)\}", text)
        return text.format(tmp=tmp_path, root=site.root, tiny=site.tiny) if known else text

    typed = [filled(text) for text in bad.typed]
    says_where = any(text.startswith("output_root=") for text in typed) or (typed and typed[-1].startswith("-"))
    if bad.make is not None:
        bad.make(tmp_path)
    before, runs = dict(site.last) or site.state(), site.statuses()
    capfd.readouterr()

    start = time.process_time()  # of this process, whatever else the machine does
    code = exit_code(typed if says_where else [*typed, f"output_root={site.root}"])
    seconds = time.process_time() - start

    out, err = capfd.readouterr()
    after = site.state()
    site.last.clear()
    assert code == 2, err
    assert "Traceback" not in err
    message = err[err.index("error: ") :] if bad.late else err
    assert message.startswith("error: ")
    assert filled(bad.answer) in message
    problems = message.count("\n  ") or 1
    assert len(message) <= LONGEST * problems
    assert ": " in message.removeprefix("error: ")
    assert ADVICE.search(message)
    assert out == ""
    assert seconds < SLOWEST
    assert list((tmp_path / "work").iterdir()) == []
    assert "RUNNING" not in site.statuses()
    if bad.late:  # its own run says how it ended; whatever was there before is as it was
        assert before.items() <= after.items()
        fresh = {name.split("/")[0] for name in after.keys() - before.keys()} - {"mlartifacts"}
        for name in fresh:
            assert json.loads((site.root / name / "run.json").read_text())["status"] == "FAILED"
            shutil.rmtree(site.root / name)
    else:
        assert before == after
        assert site.statuses() == runs
        site.last.update(after)


def test_no_row_touched_what_the_run_left(site: Site) -> None:
    """To the last byte, after all rows."""
    assert site.before.items() <= site.state(whole=True).items()


CHEAP = [
    [],
    ["trian"],
    ["modle=decoder", *EMOJI],
    ["+trainer.stepz=3", *EMOJI],
    ["model=decodr", *EMOJI],
    ["trainer.max_steps=abc", *EMOJI],
    ["hub.repo_id=me/mine", *EMOJI],
    ["scheduler.warmup_steps=20", "trainer.max_steps=10", *EMOJI],
    ["checkpoint.resume=nowhere", *EMOJI],
    [*PRIOR, "weights.prior=nowhere"],
    ["data.path=nowhere", "weights=tiny"],
    [*DRAW, "height=100"],
    ["encode", "list=3"],
    ["push"],
    ["push", "run=nowhere"],
    ["-m", "optimiser.lr=1,2", *EMOJI],
]


def test_what_needs_no_torch_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom kandinsky_exp import cli\n"
        f"for typed in {CHEAP!r}:\n"
        "    try: cli.main(typed)\n"
        "    except SystemExit as error: assert error.code == 2, typed\n"
        "    else: raise AssertionError(typed)\n"
        "    assert 'torch' not in sys.modules, typed\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(CHEAP)
