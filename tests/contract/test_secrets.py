"""Passwords, tokens and signed addresses: used, and never shown, written or passed on."""

import base64
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from commands import Forked, command
from hydra import compose, initialize_config_module
from running import prepare

from kandinsky_exp import cli
from kandinsky_exp.config import saved_config
from kandinsky_exp.system import redaction
from kandinsky_exp.system.redaction import masked, redacted
from kandinsky_exp.tracking import mlflow_names

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567"
BASIC = base64.b64encode(b"anna:s@fe-enough").decode()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if redaction.ENVIRONMENT.search(name):
            monkeypatch.delenv(name)


SECRET = [  # (text, what may be shown of it)
    ("postgresql://me:pa55@host:5432/db", "postgresql://***@host:5432/db"),
    ("postgresql+psycopg2://me:p@ss@host/db", "postgresql+psycopg2://***@host/db"),
    ("postgresql://me:pa/ss@host/db", "postgresql://***@host/db"),
    ("mysql://host/db?ssl_key=abc&a=1", "mysql://host/db?ssl_key=***&a=1"),
    ("postgresql://host/db?user=me&password=abc", "postgresql://host/db?user=me&password=***"),
    ("https://token@host/path@2", "https://***@host/path@2"),
    ("s3://AKIAABC:wJalr@bucket/a", "s3://***@bucket/a"),
    ("see http://me:pa55@host/a and http://you:pa66@host/b", "see http://***@host/a and http://***@host/b"),
    ("https://host/a.tar?X-Amz-Signature=abc&x=1", "https://host/a.tar?***"),
    ("https://host/a.tar?sv=1&sig=a%2Fb", "https://host/a.tar?***"),
    ("https://host/a.tar?x=1&TOKEN=abc gone", "https://host/a.tar?*** gone"),
    ("https://host/a.tar?t=Zm9vYmFyYmF6cXV4MTIzNDU2", "https://host/a.tar?***"),
    ('{"url": "https://host/a?apikey=abc"}', '{"url": "https://host/a?***"}'),
    ("https://host/cb#access_token=abc&x=1", "https://host/cb#access_token=***&x=1"),
    (f"token {TOKEN} is invalid", "token *** is invalid"),
    (f"Authorization: Basic {BASIC}", "Authorization: ***"),
    ("{'Authorization': 'Bearer abc'}", "{'Authorization': '***'}"),
    (f"sent Basic {BASIC} to it", "sent Basic *** to it"),
    ("with bearer eyJhbGciOi.J1c2VyIjoi.YWJj", "with bearer ***"),
]
HARMLESS = [
    "a photo @ night, by @me: 3 cats",
    "sqlite:////tmp/a@b/mlflow.db",
    "http://localhost:5000/#/experiments/1/runs?compareRunsMode=CHART&workflowType=machine_learning",
    "https://host/search?keyword=monkey&page=2",
    "basic training of the tokenizer; Basic understanding of tokens is the key",
    "a bearer of good news, bearer of torches",
    "hf_hub_download(repo_id), hf_transfer",
    "data.path: there is no folder 'secret_pictures' here; check the path",
    "kandinsky_exp.data.sources.webdataset path=password.txt token=3",
    "weights.prior: kandinsky-community/kandinsky-2-2-prior@main",
    "step 10 of 20: loss 0.1, lr 1.00e-05",
    "pip install git+ssh is no address; a://b and c@d",
]


@pytest.mark.parametrize(("text", "shown"), SECRET, ids=range(len(SECRET)))
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown, "once more changes nothing"
    assert masked(text) == mlflow_names.param_text(text) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_texts_stay(text: str) -> None:
    assert masked(text) == text
    assert redacted(f"see {text}") == f"see {text}"  # of an address alone, no query is written


@pytest.mark.parametrize(
    ("name", "value", "text", "shown"),
    [
        ("MLFLOW_TRACKING_PASSWORD", "gr8-pass", "login failed with 'gr8-pass'", "login failed with '***'"),
        ("HF_TOKEN", "unusual.Token", "unusual.Token", "***"),
        ("AWS_SECRET_ACCESS_KEY", "ab/cd+ef", f"key={quote('ab/cd+ef', safe='')}", "key=***"),
        ("WANDB_API_KEY", "0123456789", "x0123456789x", "x***x"),
        ("DB_PASSWORD", "outputs", "outputs of outputs2 and myoutputs", "*** of outputs2 and myoutputs"),
        ("SSL_PRIVATE_KEY", "-----BEGIN\nMIIabcdef\n-----", "MIIabcdef", "***"),
        ("MYTOKEN", 'quo"ted1', r'{"a": "quo\"ted1"}', '{"a": "***"}'),
        ("STORE", "postgresql://me:pa55word@host/db", "refused 'pa55word'", "refused '***'"),
        # no secrets: too short, a switch, a path, or another name
        ("API_KEY", "abc", "abc", "abc"),
        ("TOKENIZERS_PARALLELISM", "disabled", "disabled", "disabled"),
        ("HF_TOKEN_PATH", "/some/where", "/some/where", "/some/where"),
        ("PWD", "/home/anna/dir", "/home/anna/dir", "/home/anna/dir"),
        ("SSH_AUTH_SOCK", "/run/agent", "/run/agent", "/run/agent"),
        ("MONKEY", "banana", "banana", "banana"),
        ("GOOGLE_APPLICATION_CREDENTIALS", __file__, __file__, __file__),
    ],
)
def test_the_environments_secrets(
    name: str, value: str, text: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert masked(text) == shown


def test_nested_settings() -> None:
    values = {
        "data": {"path": ["https://host/{0..7}.tar?page=1", "b.tar"], "token": "abc", "api_key": None},
        "tokenizer": "clip", "key": "value", "max_tokens": 7, "optimizer": {"password": "x", "lr": 0.1},
    }  # fmt: skip
    assert redacted(values) == {
        "data": {"path": ["https://host/{0..7}.tar?***", "b.tar"], "token": "***", "api_key": None},
        "tokenizer": "clip", "key": "***", "max_tokens": 7, "optimizer": {"password": "***", "lr": 0.1},
    }  # fmt: skip


def test_log_records_are_masked_with_their_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "unusual.Token")
    try:
        raise ValueError("https://me:pa55@host/x")
    except ValueError:
        record = logging.LogRecord("a", logging.INFO, "f", 1, "got %s", ("unusual.Token",), sys.exc_info())
    text = redaction.Formatter("%(levelname)s %(message)s").format(record)
    assert text.startswith("INFO got ***\nTraceback")
    assert text.endswith("ValueError: https://***@host/x")


def test_masking_a_long_text_takes_no_time() -> None:
    text = "Basic " * 20_000 + "x://" * 20_000 + "a@" * 20_000 + "?key" * 20_000
    start = time.perf_counter()
    masked(text)
    assert time.perf_counter() - start < 5


# --- the command


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("verbose", ["0", "1"])
def test_errors_and_tracebacks_of_the_command(
    verbose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    module = "def known(cfg):\n    from kandinsky_exp.errors import DataError\n    raise DataError(f'x: {cfg.name}')\n"
    module += "def crash(cfg):\n    raise RuntimeError(f'x: {cfg.tracker.uri}')\n"
    (tmp_path / "leaky_verbs.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", verbose)
    monkeypatch.setenv("HF_TOKEN", "unusual.Token")
    monkeypatch.setenv("MY_URI", "postgresql://me:pa55@host/db")
    for function, code in (("known", 2), ("crash", 1)):
        monkeypatch.setitem(cli.VERBS, "generate", cli.Verb(f"leaky_verbs:{function}", ""))
        typed = ["weights=tiny", "prompts=[a]", "name=${oc.env:HF_TOKEN}", "tracker.uri=${oc.env:MY_URI}"]
        assert exit_code("generate", *typed) == code
        err = capfd.readouterr().err
        assert ("Traceback" in err) is (verbose == "1" or function == "crash")
        assert "x: ***" in err or "x: postgresql://***@host/db" in err
        assert "unusual.Token" not in err
        assert "pa55" not in err


def test_a_message_about_a_value_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "unusual.Token")
    assert exit_code("trainer.max_steps=${oc.env:HF_TOKEN}", "data=emoji", "weights=tiny") == 2
    err = capfd.readouterr().err
    assert "trainer.max_steps: has to be a whole number, at least 1, not '***'" in err


# --- given by the environment


class Server(ThreadingHTTPServer):
    """Serves the files of a folder by GET and HEAD, or answers every request with `status`; remembers who asked."""

    daemon_threads = True

    def __init__(self, folder: Path | None = None, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.status = folder, status
        self.seen: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        name = self.path.partition("?")[0].rpartition("/")[2]
        content = (self.server.folder / name).read_bytes() if self.server.folder else b"no"
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{name}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def serve() -> Iterator[object]:
    started: list[tuple[Server, threading.Thread]] = []

    def start(**how: object) -> Server:
        server = Server(**how)  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_the_stores_credentials(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    server = serve(status=401)
    typed = ["data=emoji", "weights=tiny", "tracker.uri=${oc.env:MY_URI}", f"output_root={tmp_path}"]
    monkeypatch.setenv("MY_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s@fe-enough")
    assert exit_code(*typed) == 2
    assert {access for _, access in server.seen} == {f"Basic {BASIC}"}
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tr4cking-token")
    assert exit_code(*typed) == 2
    assert server.seen[-1][1] == "Bearer tr4cking-token"
    err = capfd.readouterr().err
    assert err.count("the server refused the request (401") == 2
    assert not any(secret in err for secret in ("s@fe-enough", BASIC, "tr4cking-token"))


def test_an_address_by_the_environment_is_used_whole_and_written_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_URI", "postgresql+psycopg2://me:pa55@host/db")
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        cfg = compose("train", ["data=emoji", "weights=tiny", "tracker.uri=${oc.env:MY_URI}"])
    assert cfg.tracker.uri == "postgresql+psycopg2://me:pa55@host/db"
    assert saved_config.flatten(cfg)["tracker.uri"] == "postgresql+psycopg2://***@host/db"
    assert "uri: postgresql+psycopg2://***@host/db" in saved_config.to_yaml(cfg)


def descendants(pid: int) -> Iterator[int]:
    yield pid
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            yield from descendants(int(file.parent.name))


def command_lines(pid: int) -> Iterator[str]:
    for process in descendants(pid):
        try:
            yield Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


def shards(folder: Path) -> None:
    import tarfile

    from kandinsky_exp.data import sources

    folder.mkdir()
    splits = sources.emoji()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as archive:
            for row in range(6 * shard, 6 * shard + 6):
                item = splits.train[row]
                for ending, content in (("png", item.read()), ("txt", item.captions[0].encode())):
                    file = folder / f"{row:03d}.{ending}"
                    file.write_bytes(content)
                    archive.add(file, file.name)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads the process table")
def test_a_run_with_secrets_leaves_none_behind(serve, tmp_path: Path) -> None:
    shards(tmp_path / "set")
    server, root = serve(folder=tmp_path / "set"), tmp_path / "out"
    secrets = {
        "HF_TOKEN": TOKEN,
        "MLFLOW_TRACKING_PASSWORD": "s@fe-enough",
        "MLFLOW_TRACKING_TOKEN": "tr4cking-token",
        "SIGNATURE": "s1gn4ture-of-the-shards",
        "LOGIN": "l0gin-of-the-shards",
    }
    address = f"http://anna:{secrets['LOGIN']}@127.0.0.1:{server.server_port}/set/{{00..01}}.tar"
    given = {
        "MY_SHARDS": f"{address}?X-Amz-Signature={secrets['SIGNATURE']}",
        "MY_URI": f"sqlite:///{root}/mlflow.db",
        "MLFLOW_TRACKING_USERNAME": "anna",
    }
    secrets_of_environment = {name: secrets[name] for name in list(secrets)[:3]}
    typed = [
        "model=prior", "weights=tiny", "data=webdataset", "data.path=${oc.env:MY_SHARDS}", "data.resolution=64",
        "tracker.uri=${oc.env:MY_URI}", f"output_root={root}", "name=r", "trainer.max_steps=2", "trainer.batch_size=4",
        "trainer.log_every=1", "checkpoint.every=1", "validation.every=2", "data.encode_workers=1",
    ]  # fmt: skip
    prepare(root, [])
    run = Forked(command, typed, environment={**given, **secrets_of_environment})
    lines: set[str] = set()
    while run.code is None:
        lines |= set(command_lines(run.pid))
        time.sleep(0.1)
    output = run.finish()
    assert run.code == 0, output

    assert {path for path, _ in server.seen} >= {f"/set/00.tar?X-Amz-Signature={secrets['SIGNATURE']}"}
    assert all(access and access.startswith("Basic ") for _, access in server.seen)
    places = {str(file): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    places |= {"output": output.encode(), "processes": "\n".join(lines).encode()}
    for name in ("config.yaml", "train.log", "mlflow.db"):
        assert any(place.endswith(name) for place in places), name
    for secret in (*secrets.values(), quote(secrets["MLFLOW_TRACKING_PASSWORD"], safe="")):
        assert [place for place, content in places.items() if secret.encode() in content] == []
    assert "/set/{00..01}.tar?***" in (root / "r" / "config.yaml").read_text()
