"""Arbitrary input, from hypothesis: whoever reads it gives a result or says in its own error what is wrong.

The same examples in every run; what was found once stays as an explicit `@example`.
"""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from kandinsky_exp import cli
from kandinsky_exp.config import command_line, hydra_errors, saved_config, validation
from kandinsky_exp.config.saved_config import value as saved_value
from kandinsky_exp.data import sources
from kandinsky_exp.data.examples import Example
from kandinsky_exp.data.splits import Splits
from kandinsky_exp.errors import CheckpointError, ConfigError, DataError, UserError
from kandinsky_exp.runs import integrity, run_folder

SLOWEST = 3.0  # seconds of this process for one input


def fuzz(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,  # SLOWEST counts this process alone
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True, scope="module")
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


class Quick:
    """Fails where its block takes too long."""

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *error: object) -> None:
        assert time.process_time() - self.start < SLOWEST


def answered(action: Callable[[], Any], kind: type[UserError], part: str = "") -> Any:
    """The result; None where the user is told, in an error of this kind, what is wrong."""
    with Quick():
        try:
            return action()
        except kind as error:
            message = str(error)
    assert message.strip()
    assert part in message
    return None


# --- command lines

SIGNS = [*"[]{}()'\"\\,:=~+@$*?#%&|<>\n\t ./", "${", "${now:%Y}", "${seed}", "range(1,", "choice(", "sort(", "glob(*)"]
WORDS = ["null", "1e999", "nan", "0x1", "é", "\u202e", "\ud800", "\0", "../..", "data=", "emoji", "[[[[", "9" * 400]
KEYS = ["trainer.max_steps",
        "data.path", "validation.prompts", "model", "data", "name", "seed", "tracker.uri", "modle",
        "a.b.c", "trainer",
        "hydra.run.dir", "experiment", "hydra/launcher", "model@x", "", "optimizer.betas"]  # fmt: skip
values = st.lists(st.sampled_from(SIGNS + WORDS) | st.text(max_size=5), max_size=8).map("".join)
overrides = st.builds(
    lambda sign, key, equals, value: f"{sign}{key}{equals}{value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from(KEYS) | values,
    st.sampled_from(["=", "=", "=", ""]),
    values,
)
NASTY = ["name=" + "[" * 3000, "name=" + "a" * 100_000, "name='", 'name="\\', "seed=${seed}", "+a=${a", "~", "+", "@:=",
         "data.path=\ud800", "model@=x", "seed=range(1)", "seed=interval(1)", "x" * 5000 + "=1", "\0=\0", "a=b=c", "=",
         "hydra/sweeper=\ud800", "a..b=1", ".=1", "+.=1", "+a.=1", "+=1",
         "data.path=${oc.env:NO_SUCH_THING_IS_SET}"]  # fmt: skip


def parsed(typed: list[str]) -> command_line.CommandLine | None:
    line: command_line.CommandLine | None = answered(lambda: command_line.parse("train", typed, cli.VERBS), ConfigError)
    return line


@fuzz(60)
@given(st.lists(overrides, max_size=4))
@example(NASTY)
def test_any_words_are_settings_or_refused(typed: list[str]) -> None:
    typed = [text for text in typed if not text.startswith("-")]
    with Quick():
        line = parsed(typed)
        if line is not None:
            assert isinstance(command_line.job_naming(line.overrides), list)


@fuzz(8)
@given(overrides)
@pytest.mark.parametrize("sweeps", [False, True])
def test_any_setting_is_explained(sweeps: bool, text: str) -> None:
    explained(text, sweeps)


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_what_was_hard_to_explain(text: str) -> None:
    explained(text, sweeps=False)


def explained(text: str, sweeps: bool) -> None:
    line = None if text.startswith("-") else parsed(["data=emoji", "weights=tiny", text])
    if line is not None:
        line = replace(line, sweeps=sweeps)
        with Quick():
            error = hydra_errors.explain(ValueError("it does not compose"), line)
        assert isinstance(error, UserError)
        assert 0 < len(str(error)) < 2000


def test_none_of_it_needs_torch() -> None:
    code = (
        "import sys\nfrom kandinsky_exp import cli\nfrom kandinsky_exp.config import command_line, hydra_errors\n"
        f"for text in {NASTY[2:6]!r}:\n"
        "    try: line = command_line.parse('train', ['data=emoji', 'weights=tiny', text], cli.VERBS)\n"
        "    except command_line.ConfigError: continue\n"
        "    command_line.job_naming(line.overrides)\n"
        "    hydra_errors.explain(ValueError('no'), line)\n"
        "    assert 'torch' not in sys.modules, text\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- configs

scalars = st.none() | st.booleans() | st.integers() | st.floats() | values
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def composed() -> dict[str, DictConfig]:
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        return {
            verb: compose(verb, ["weights=tiny", *more])
            for verb, more in {"train": ["data=emoji"], "encode": ["data=emoji"], "generate": ["prompts=[a]"]}.items()
        }


@fuzz(80)
@given(st.data())
def test_any_value_anywhere_is_judged(composed: dict[str, DictConfig], data: st.DataObject) -> None:
    cfg = composed[data.draw(st.sampled_from(sorted(composed)))].copy()
    keys = [*saved_config.dotted_keys(cfg), *(str(key) for key in cfg), "modle", "trainer.stepz"]
    key = data.draw(st.sampled_from(keys))
    judged(cfg, key, data.draw(plain))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.path", "\0"), ("output_root", "\0"), ("output_root", "~\ud800"), ("output_root", "a" * 5000),
        ("name", "\ud800"), ("weights.prior", "\0"), ("weights.prior", "a/b\0"), ("trainer.max_steps", 10**400),
        ("optimizer.lr", 10**400), ("tracker.uri", "http://["), ("validation.prompts", "\0"), ("seed", float("inf")),
        ("trainer", None), ("data", {}), ("data", None), ("optimizer._target_", "a\0.b"), ("model._target_", "..."),
        ("data._target_", 3), ("optimizer.betas", {}), ("checkpoint.resume", "\0"), ("hub.repo_id", "\ud800"),
        ("optimizer", {"_target_": {}}), ("model._target_", None), ("data.resolution", float("nan")),
    ],
    ids=lambda value: f"{value!a:.20}",
)  # fmt: skip
def test_what_was_hard_to_judge(composed: dict[str, DictConfig], key: str, value: Any) -> None:
    assert judged(composed["train"].copy(), key, value)


def judged(cfg: DictConfig, key: str, value: Any) -> list[str]:
    try:
        OmegaConf.set_struct(cfg, False)
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    except OmegaConfBaseException:  # no yaml and no command line could have set it
        return ["refused"]
    with Quick():
        found = [str(problem) for problem in validation.problems(cfg, "train", quick=True)]
    assert all(": " in problem for problem in found)
    return found


# --- data


def looked_at(read: Callable[[], Splits], inside: Path | None) -> None:
    """Reads a data set to its end."""

    def walk() -> None:
        for source in read().both:
            for found in source.examples():
                judge(found, inside)

    answered(walk, DataError)


def judge(found: Example, inside: Path | None) -> None:
    assert all(text.strip() for text in found.captions)
    "".join(found.captions).encode()
    assert found.where
    path = getattr(found.read, "args", [b""])[0]
    if inside is not None and not found.problem and isinstance(path, str):
        assert Path(os.path.normpath(path)).is_relative_to(inside)
    image = answered(found.image, DataError, found.where)
    assert image is None or image.mode == "RGB"


def picture(kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((16, 12)).convert("RGB").save(stream, kind)
    return stream.getvalue()


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A valid file with some bytes replaced, removed or put in, or cut off."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(0, 8))
        content[place : place + length] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


names = st.sampled_from(["0.png", "1.png", "../secret.png", "/etc/passwd", "a/../../secret.png", "\0", "", ".",
                         "0.png/x", "a" * 300, "//0.png", "é.png", "\\0.png"])  # fmt: skip
cells = names | plain
row = st.dictionaries(st.sampled_from(["file_name", "image", "text", "", "other"]), cells, max_size=4)
lines = st.lists(row.map(lambda one: json.dumps(one)) | values, max_size=4).map("\n".join)
VALID_ROWS = [
    b'{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": ["b", "c"]}\n',
    b'file_name,text\n0.png,"a, b"\n1.png,c\n',
]
written = (
    lines.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | mutated(VALID_ROWS)
    | st.binary(max_size=40)
    | st.tuples(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\0"]), st.sampled_from(VALID_ROWS)).map(b"".join)
)
HARD = [
    b'{"file_name": "0.png", "text": "\\ud800"}',
    b"[" * 100_000,
    b'{"file_name": ' + b"9" * 5000 + b', "text": "a"}',
    b'{"file_name": "0.png\\u0000", "text": "a"}',
    b'{"file_name": "..", "text": "a"}',
    b'{"file_name": "0.png", "text": "a"}\n\n\n{"file_name": "..\\u002f..", "text": "a"}',
    b'file_name,text\n"' + b"a" * 200_000 + b'",b\n',
    b"file_name,text\n\0,\0\n",
    b"text,text\n0.png,a\n",
    b"\r\n\r\n",
    b'{"text": {"a": [' + b"1," * 5000 + b"1]}}",
]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@fuzz(100)
@given(written)
def test_any_metadata(home: Path, kind: str, content: bytes) -> None:
    read_metadata(home, kind, content)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("content", HARD, ids=range(len(HARD)))
def test_metadata_that_was_hard_to_read(home: Path, kind: str, content: bytes) -> None:
    read_metadata(home, kind, content)


def read_metadata(home: Path, kind: str, content: bytes) -> None:
    folder = emptied(home / "metadata")
    (home / "secret.png").write_bytes(picture())
    (folder / "0.png").write_bytes(picture())
    (folder / f"metadata.{kind}").write_bytes(content)
    looked_at(lambda: sources.folder(folder), folder)
    looked_at(lambda: sources.listing(folder / f"metadata.{kind}"), None)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"file_name": ["0.png", "1.png"], "text": ["a", "b"]}), sink)
    return bytes(sink.getvalue())


@fuzz(100)
@given(st.data())
def test_any_parquet(home: Path, table: bytes, data: st.DataObject) -> None:
    folder = emptied(home / "parquet")
    (folder / "metadata.parquet").write_bytes(data.draw(mutated([table])))
    looked_at(lambda: sources.folder(folder), folder)


@fuzz(100)
@given(
    st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=6).map(lambda name: name.replace(b"/", b"").replace(b"\0", b"") or b"x"),
            st.sampled_from([b".png", b".txt", b".PNG", b".txt.png", b"", b".jpg"]),
            st.sampled_from([picture(), b"a caption", b"", b"\xff"]),
        ),
        max_size=6,
    )
)
def test_any_file_names(home: Path, files: list[tuple[bytes, bytes, bytes]]) -> None:
    folder = emptied(home / "names")
    for name, ending, content in files:
        if name + ending not in (b".", b".."):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name + ending)).write_bytes(content)
    looked_at(lambda: sources.folder(folder), folder)


def archive(*members: tuple[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar file without the zeros that fill up its last record."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as made:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
        end = made.offset
    return stream.getvalue()[: end + 2 * tarfile.BLOCKSIZE]


SHARDS = [
    archive(("0.png", picture()), ("0.txt", b"a"), ("1.png", picture()), ("1.txt", b"b")),
    archive(("0.png", picture()), ("0.txt", b"a"), kind=tarfile.PAX_FORMAT),
    archive((f"{'long/' * 60}0.png", picture()), (f"{'long/' * 60}0.txt", b"a")),
    archive(("é.png", picture()), ("é.json", b'{"text": ["a"]}'), kind=tarfile.PAX_FORMAT),
]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A shard with fields of a header overwritten and its checksum mended, so that the reader believes it."""
    content = bytearray(draw(st.sampled_from(SHARDS)))
    place, length = draw(
        st.sampled_from([(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
    )
    field = draw(
        st.binary(max_size=length) | st.sampled_from([b"-1", b"7" * 11, b"\x80" + b"\xff" * 10, b"../../x.png"])
    )
    content[place : place + len(field[:length])] = field[:length]
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    return bytes(content)


@pytest.mark.parametrize("caption", ["txt", "json.text"])
@fuzz(100)
@given(mutated(SHARDS) | headers() | st.binary(max_size=1100))
@example(b"")
@example(b"\0" * 1024)
@example(b"\x1f\x8b\x08" + b"\0" * 40)
@example(b"BZh9" + b"\0" * 40)
@example(b"\xfd7zXZ\0" + b"\0" * 40)
@example(b"\x28\xb5\x2f\xfd" + b"\0" * 40)
def test_any_shard(home: Path, caption: str, content: bytes) -> None:
    file = home / "shard.tar"
    file.write_bytes(content)
    looked_at(lambda: sources.webdataset(str(file), caption_column=caption), None)


@fuzz(60)
@given(st.text(max_size=20) | st.lists(values, max_size=2))
@example("\0.tar")
@example("{0..9999999999}.tar")
@example("{a,b}{c,d}\0")
@example("[")
@example("~\ud800/x.tar")
@example("http://[::1")
@example("a" * 5000)
def test_any_path_of_shards(home: Path, path: Any) -> None:
    names = [path] if isinstance(path, str) else path
    if not any(text.lower().startswith("http") and "://h" in text for text in names):
        answered(lambda: sources.webdataset(path), DataError)


@fuzz(150)
@given(mutated([picture("PNG"), picture("JPEG"), picture("WEBP"), picture("GIF"), picture("TIFF")]))
@example(b"")
@example(picture()[:8] + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
def test_any_picture(content: bytes) -> None:
    found = Example("0.png", ("a",), lambda: content, "line 1")
    judge(found, None)


# --- the folder of a run


json_like = plain.map(lambda value: json.dumps(value).encode())
fields = st.dictionaries(
    st.sampled_from(["step", "run_id", "status", "stage", "rows", "validation_loss", "data", "x"]), plain, max_size=4
)
anything = st.binary(max_size=30) | json_like | fields.map(lambda value: json.dumps(value).encode())


@fuzz(100)
@given(anything)
@example(b'{"step": []}')
@example(b'{"step": true}')
@example(b"3")
def test_any_record(home: Path, content: bytes) -> None:
    folder = emptied(home / "run")
    (folder / run_folder.RECORD).write_bytes(content)
    record = run_folder.read_record(folder)
    assert record is None or isinstance(record.step, int)


@fuzz(150)
@given(anything)
@example(b'{"step": null}')
@example(b'{"step": "x"}')
@example(b"[]")
def test_any_state(home: Path, content: bytes) -> None:
    read_state(home, content)


def read_state(home: Path, content: bytes) -> None:
    folder = emptied(home / "step-00000001")
    (folder / "state.json").write_bytes(content)
    state = answered(lambda: integrity.read_state(folder), CheckpointError, "checkpoint.resume: ")
    assert state is None or isinstance(state["step"], int)


@pytest.mark.parametrize("content", [b'{"step": Infinity}', b"[" * 100_000], ids=["infinite", "deep"])
def test_a_state_beyond_all_measure(home: Path, content: bytes) -> None:
    read_state(home, content)


def test_a_record_beyond_all_measure(home: Path) -> None:
    folder = emptied(home / "run")
    (folder / run_folder.RECORD).write_bytes(b"[" * 100_000)
    assert run_folder.read_record(folder) is None


YAML = [b"weights:\n  prior: tiny\n  decoder: tiny\nmodel:\n  _target_: x.PriorStage\n"]


@fuzz(60)
@given(
    mutated(YAML) | st.binary(max_size=30) | json_like | values.map(lambda text: text.encode("utf-8", "surrogatepass"))
)
@example(b"")
@example(b"just a text")
@example(b"- a\n- b")
@example(b"3")
@example(b"weights: ${nothing}")
@example(b"weights: {prior: [1, 2]}")
@example(b"weights: &a {prior: *a}")
@example(b"? [a, b]\n: c")
@example(b"2020-01-01: x")
@example(b"!!python/object:os.system x")
@example(b"[" * 400)
def test_any_config_of_a_run(home: Path, content: bytes) -> None:
    folder = emptied(home / "configured")
    (folder / "config.yaml").write_bytes(content)
    for key in ("weights.prior", "model._target_", "weights.decoder_revision"):
        value = answered(lambda key=key: saved_value(folder, key), ConfigError, "config.yaml")  # type: ignore[misc]
        assert value is None or isinstance(value, str)
