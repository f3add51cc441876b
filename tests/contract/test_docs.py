"""The documentation: its commands and snippets run, its links lead somewhere, its page of settings is true.

The commands of a block are run at tiny size, unless a comment above the block says why not:
`<!-- test: needs a GPU -->`, or `a hub account`, or `a cluster`; `<!-- test: in test_….py -->` names the test that runs
them; `<!-- test: exit code 1 -->` says how they end. A block whose first line is a comment with a file's name is that
file. Pages are read in order, in one folder: what a command needs, one before it has made.
"""

import gc
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import commands  # noqa: F401 - the server that forks the jobs of sweeps
import mlflow
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image
from running import hydra_compose, prepare
from test_architecture import ROOMS

import kandinsky_exp
from kandinsky_exp import cli
from kandinsky_exp.config.validation import problems

ROOT = Path(kandinsky_exp.__file__).parents[1]
README = ROOT / "README.md"
SETTINGS = ROOT / "docs" / "settings.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
TESTS = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
SESSIONS = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text("utf-8"), re.MULTILINE)
BLOCK = re.compile(r"(?:^<!-- test: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"needs (a GPU|a hub account|a cluster)|in (test_\w+\.py)|exit code ([12])|")
KINDS = {"bash", "console", "json", "python", "text", "yaml"}
INLINE = re.compile(r"`((?:kandinsky-exp \S*(?:=|-)|nox |pip |python |bash )[^`…]+)`")
LINK = re.compile(r"(!?)\[[^]]*\]\(([^)\s]+)\)")

# Tiny sizes, in place of what a command says of these settings.
OF_RUNS = {
    "precision": "fp32",
    "trainer.batch_size": "2",
    "validation.draws": "1",
    "validation.reconstructions": "0",
    "validation.inference_steps": "2",
}
TINY = {
    "train": {**OF_RUNS, "data.resolution": "64"},
    "encode": {"precision": "fp32", "data.resolution": "64"},
    "plan": {"precision": "fp32", "data.resolution": "64", "trainer.batch_size": "2"},
    "generate": {"inference_steps": "2", "prior_inference_steps": "2", "precision": "fp32"},
}
TINY_SNIPPETS = {
    r'pipeline\("(.+)"\)': (r'pipeline("\1", height=64, width=64, num_inference_steps=2, prior_num_inference_steps=2)'),
    r'pipeline\("(.+)", picture, hole\)': (
        r'pipeline("\1", picture, hole, height=64, width=64, num_inference_steps=2, prior_num_inference_steps=2)'
    ),
    r"\(\(512, 512\)\)": "((64, 64))",
    r"8 \* 512": "8 * 64",
    r'prior\("(.+)"\), hint=hint, height=512, width=512': (
        r'prior("\1", num_inference_steps=2), hint=hint, height=64, width=64, num_inference_steps=2'
    ),
    r"trainer\.max_steps=\d+": "trainer.max_steps=2",
}
STEPS = 5000  # of a real run are one here


@dataclass(frozen=True)
class Block:
    """What stands between two fences, and the mark above them."""

    page: str
    mark: str
    kind: str
    text: str

    @property
    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.kind == "console":
            return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [part.strip() for line in lines for part in line.split("&&")] if self.kind == "bash" else []

    @property
    def file(self) -> str | None:
        """The file that the block is."""
        named = re.match(r"# ([\w/]+\.(py|yaml))\n", self.text)
        return named and named[1]


def blocks(page: Path) -> list[Block]:
    return [Block(page.name, *found) for found in BLOCK.findall(page.read_text("utf-8"))]


BLOCKS = [block for page in PAGES for block in blocks(page)]


# --- what a command of each program is checked by


def without_place(command: str) -> list[str]:
    return [word for word in shlex.split(command) if word != "PYTHONPATH=."]  # the test's own path has the folder


def is_right(words: list[str]) -> None:
    """A command of ours that cannot run here: its settings."""
    verb, rest = (words[0], words[1:]) if words[0] in cli.VERBS else ("train", words)
    assert problems(hydra_compose(verb, rest), verb) == []


def run_ours(words: list[str], code: int = 0) -> None:
    found: object = 0
    gc.collect()  # what the command before left: frozen, it would stay for ever
    gc.freeze()  # a run collects garbage at its end, and goes through all the libraries for it
    try:
        cli.main(tiny(words))
    except SystemExit as end:
        found = end.code
    assert found == code, shlex.join(words)


def tiny(words: list[str]) -> list[str]:
    verb = words[0] if words[0] in cli.VERBS else "train"
    sizes = dict(TINY.get(verb, {}))
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if verb == "train":
        sizes["trainer.max_steps"] = str(max(2, int(given.get("trainer.max_steps", 3 * STEPS)) // STEPS))
    if "data.class_prompt" in given:
        sizes["data.num_class_images"] = "2"
    if "num_images" in given:
        sizes["num_images"] = "1"
    if "hydra.sweeper.n_trials" in given:
        sizes["hydra.sweeper.n_trials"] = "2"
    left = [that_is_there(word) for word in words if word.partition("=")[0] not in sizes]
    return left if "--cfg" in words else [*left, *(f"{key}={value}" for key, value in sizes.items())]


def that_is_there(word: str) -> str:
    """The word with a step and a table that this folder has, in place of those that the docs name."""
    if place := re.search(r"(outputs/\w+/checkpoints/)step-\d+", word):
        return word.replace(place[0], f"{max(Path(place[1]).iterdir())}")
    return word.replace("t1f3a55e", min(file.name for file in Path("outputs/cache").glob("t*") if file.is_dir()))


def check_pip(words: list[str]) -> None:
    for word in words[1:]:
        assert Requirement(re.sub(r"^\.", "kandinsky-exp", word) or word).extras <= EXTRAS.keys(), word


def check_nox(words: list[str]) -> None:
    named = words[: words.index("--")] if "--" in words else words
    assert set(named) - {"-s", "--list"} <= set(SESSIONS)


def check_files(words: list[str]) -> None:
    """A script or a test file, or what nox makes: that it is there, and no more; others run it."""
    files = [word for word in words if "/" in word and not word.startswith((".nox/", "<"))]
    assert all((ROOT / word).exists() for word in files), words


def check_hf(words: list[str]) -> None:
    code = f"from huggingface_hub.cli.hf import main; import sys; sys.argv = {['hf', *words, '--help']!r}; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_launched(words: list[str]) -> None:
    """What stands before `-m kandinsky_exp` is the launcher's, which takes it; the rest is ours."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    ours = len(words) - words[::-1].index("-m")
    parser, options = {
        "launch": (launch_command_parser(), words[1 : ours - 1]),
        "-m": (get_args_parser(), words[2 : ours - 1]),
    }[words[0]]
    parser.parse_args([*options, "script.py"])
    assert words[ours] == "kandinsky_exp"
    is_right(words[ours + 1 :])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": check_launched,
    "bash": check_files,
    "hf": check_hf,
    "kandinsky-exp": run_ours,
    "nox": check_nox,
    "pip": check_pip,
    "pytest": check_files,
    "python": lambda words: check_launched(words) if "torch.distributed.run" in words else check_files(words),
    ".": lambda words: check_files(words) if words != [".venv/bin/activate"] else None,  # of the reader's own making
}


def check(command: Sequence[str], mark: str = "") -> None:
    program, *words = command
    if program == "kandinsky-exp" and (mark.startswith(("needs", "in ")) or words[0] == "ui"):  # see test_ui.py
        is_right(words)
    elif program == "kandinsky-exp":
        run_ours(words, int(mark.removeprefix("exit code ") or 0))
    else:
        CHECKS[program](words)


# --- the folder that the docs speak of


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data of all forms, and the tiny weights under the names of the real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    colours = ["red", "green", "blue", "white", "black", "yellow"]
    pictures(tmp_path / "my_pictures", colours, captions=True)
    pictures(tmp_path / "lambdalabs" / "naruto-blip-captions" / "train", colours, captions=True)
    pictures(tmp_path / "my_dog", colours[:2])
    rows = [f"my_pictures/{colour}.png,{colour}" for colour in colours]
    (tmp_path / "pictures.csv").write_text("\n".join(["image,text", *rows]))
    (tmp_path / "prompts.txt").write_text("a red heart\na dog, small\n")
    Image.new("RGB", (80, 64), "green").save(tmp_path / "photo.jpg")
    mask = Image.new("L", (80, 64))
    mask.paste(255, (20, 20, 60, 60))
    mask.save(tmp_path / "mask.png")
    for place in ("my_holes", "my_hints", "my_pictures/holes"):
        (tmp_path / place).mkdir()
        for colour in colours:
            mask.resize((64, 64)).save(tmp_path / place / f"{colour}.png")
    mask.save(tmp_path / "edges.png")
    (tmp_path / "shards").mkdir()
    for number in range(8):
        with tarfile.open(tmp_path / "shards" / f"{number:03}.tar", "w") as shard:
            shard.add(f"my_pictures/{colours[number % 6]}.png", f"{number}.png")
            shard.add("prompts.txt", f"{number}.txt")
    (tmp_path / "kandinsky-community").mkdir()
    for half in ("prior", "decoder"):
        (tmp_path / "kandinsky-community" / f"kandinsky-2-2-{half}").symlink_to(tiny_folder)
    (tmp_path / "outputs").mkdir()
    prepare(tmp_path / "outputs", [])
    return tmp_path


def pictures(folder: Path, colours: list[str], captions: bool = False) -> None:
    folder.mkdir(parents=True)
    for colour in colours:
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
    rows = [
        json.dumps({"file_name": f"{colour}.png", "text": colour, "hole": f"holes/{colour}.png"}) for colour in colours
    ]
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(rows))


# --- the tests


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`callback:FutureWarning")  # of diffusers' own pipelines
def test_all_that_is_shown_runs(folder: Path, subtests: pytest.Subtests) -> None:
    seen: set[object] = set()
    for block in BLOCKS:
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)
        elif block.kind == "python" and block.text not in seen:
            with subtests.test(block.text, page=block.page):
                execute(block.text)
            seen.add(block.text)
        for command in block.commands:
            words = tuple(without_place(command))
            if words not in seen:
                with subtests.test(command, page=block.page):
                    check(words, block.mark)
            seen.add(words)


def test_a_mistake_is_told_as_it_is_shown(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shown = [block for block in BLOCKS if block.kind == "console" and block.mark == "exit code 2"]
    assert shown
    for block in shown:
        capfd.readouterr()
        check(without_place(block.commands[0]), block.mark)
        assert capfd.readouterr().err == block.text.partition("\n")[2]


def execute(snippet: str) -> None:
    for real, small in TINY_SNIPPETS.items():
        snippet = re.sub(real, small, snippet)
    try:
        exec(compile(snippet.replace("/home/me", str(Path.cwd())), "docs", "exec"), {})
    finally:
        mlflow.set_tracking_uri(None)  # a snippet may have set it, for the whole process


def test_commands_within_a_text_run(folder: Path) -> None:
    found = {command for page in PAGES for command in INLINE.findall(page.read_text("utf-8"))}
    assert found
    for command in sorted(found):
        check(without_place(command))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}-{block.text[:30]!r}")
def test_a_block_says_what_it_is(block: Block) -> None:
    """No command can be left out: each block has a kind, each mark is one of those above, each program is known."""
    assert block.kind in KINDS
    mark = MARK.fullmatch(block.mark)
    assert mark, block.mark
    assert mark[2] is None or mark[2] in TESTS
    assert {without_place(command)[0] for command in block.commands} <= CHECKS.keys()
    if block.kind == "json":
        assert [json.loads(line) for line in block.text.splitlines()]
    if block.kind == "yaml":
        assert yaml.safe_load(block.text)


def slugs(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """MkDocs looks only at those between pages of docs/."""
    for _, target in LINK.findall(page.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        if "://" not in target:
            place = page.parent / file if file else page
            assert place.exists(), target
            assert not anchor or anchor in slugs(place), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"\b(?:kandinsky_exp|conf|tests|tools)/[\w/.]*\w", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name
    assert set(re.findall(r"\btest_\w+\.py", page.read_text("utf-8"))) <= TESTS


def test_the_table_of_rooms_is_the_rule_of_imports() -> None:
    rows = re.findall(
        r"^\| `(\w+)/`.* \| (.+) \|$", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.MULTILINE
    )
    table = {room: set(re.findall(r"`([\w.]+)`", allowed)) for room, allowed in rows}
    del table["verbs"]  # it may import all, which the table says in words
    assert table == {room: ROOMS[room] for room in table}
    assert {room for room in ROOMS if (ROOT / "kandinsky_exp" / room).is_dir()} == table.keys()


def test_the_readme_is_short_and_shows_two_pictures() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    assert [mark for mark, _ in LINK.findall(text)].count("!") == 2


def test_every_page_and_picture_is_shown() -> None:
    linked = {target.partition("#")[0] for page in PAGES for _, target in LINK.findall(page.read_text("utf-8"))}
    names = {Path(target).name for target in linked} | {"index.md"}
    assert {file.name for file in (ROOT / "docs").iterdir()} <= names
    listed = re.findall(r"([\w]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in (ROOT / "docs").glob("*.md"))


def test_the_page_of_settings_is_what_its_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "tools" / "settings_page.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["settings_page"] = module
    spec.loader.exec_module(module)
    text = SETTINGS.read_text("utf-8")
    assert text == module.whole(text), "python tools/settings_page.py writes it anew"
