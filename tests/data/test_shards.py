"""WebDataset shards: local and by URL, whole and damaged."""

import base64
import contextlib
import io
import json
import os
import pickle
import re
import tarfile
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from kandinsky_exp.data import checks, sources
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.formats import shards
from kandinsky_exp.errors import DataError


def png(number, size=(16, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, (number, 100, 200)).save(file, "PNG")
    return file.getvalue()


def pairs(*numbers):
    return [
        member
        for number in numbers
        for member in ((f"{number:03}.png", png(number)), (f"{number:03}.txt", f"picture {number}\n".encode()))
    ]


def write_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    """Two shards of three and two pictures."""
    write_tar(tmp_path / "set" / "00.tar", pairs(0, 1, 2))
    write_tar(tmp_path / "set" / "01.tar", pairs(3, 4))
    return tmp_path / "set"


def fingerprint(source, digests=None):
    return source.fingerprint(digests or FileDigests(None))


def captions(source, start=0):
    return [example.captions[0] for example in source.examples(start)]


ALL = [f"picture {number}" for number in range(5)]


# ---- local shards


def test_members_of_one_name_make_an_example(folder):
    train = sources.webdataset(str(folder)).train
    assert (isinstance(train, sources.Indexed), train.count) == (False, 5)
    examples = list(train.examples())
    assert [example.id for example in examples[2:4]] == ["00.tar/002.png", "01.tar/003.png"]
    assert [example.captions for example in examples] == [(text,) for text in ALL]
    assert [example.image().getpixel((0, 0))[0] for example in examples] == list(range(5))
    assert examples[4].where == f"{folder / '01.tar'}, 004"


@pytest.mark.parametrize("start", range(6))
def test_the_walk_begins_at_any_row(folder, start):
    train = sources.webdataset(folder).train
    assert captions(train, start) == ALL[start:]
    assert captions(pickle.loads(pickle.dumps(train)), start) == ALL[start:]


def test_a_row_by_its_number_travels_with_its_bytes(folder):
    train = sources.webdataset(folder).train
    example = pickle.loads(pickle.dumps(train[3]))
    assert (example.captions, example.image().getpixel((0, 0))) == (("picture 3",), (3, 100, 200))
    with pytest.raises(IndexError, match="row 5"):
        train[5]


def test_ways_to_name_shards(folder, tmp_path):
    write_tar(folder / "more" / "10.tar", pairs(3))
    ways = {
        f"{folder}/{{00..01}}.tar": 5,
        f"{folder}/0{{1,0}}.tar": 5,
        f"{folder}/*.tar": 5,
        f"{folder}/**/1?.tar": 1,
        f"{folder}/{{*,more/10}}.tar": 6,
        str(folder / "00.tar"): 3,
        (str(folder / "01.tar"), str(folder / "more")): 3,
    }
    assert {way: sources.webdataset(way).train.count for way in ways} == ways
    write_tar(tmp_path / "{0..1}.tar", pairs(3))
    assert sources.webdataset(tmp_path / "{0..1}.tar").train.count == 1
    splits = sources.webdataset(folder, validation_path=str(folder / "more"))
    assert (splits.train.count, splits.validation.count) == (5, 1)
    assert captions(sources.webdataset(f"{folder}/{{01,00}}.tar").train)[0] == ALL[3]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.tar", r"data\.path: there is no file .*nowhere\.tar; give tar files"),
        ("*.tgz", r"data\.path: no file fits .*\*\.tgz; give"),
        ("empty", r"data\.path: .*empty holds no \.tar"),
        ("0{0..2}.tar", r"data\.path: there is no file .*02\.tar"),
        ("{7..3}.tar", r"\{7\.\.3\} in .* counts 0 shards"),
        ("{0..99999999}.tar", "counts 100,000,000 shards"),
    ],
)
def test_shards_that_are_not_there(folder, path, message):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        sources.webdataset(str(folder / path))
    with pytest.raises(DataError, match=re.sub(r"data\\\.path", r"data\\.validation_path", message)):
        sources.webdataset(str(folder), validation_path=str(folder / path))


def test_no_shards_at_all_and_no_keys(folder):
    with pytest.raises(DataError, match=r"data\.path: no shards"):
        sources.webdataset([])
    with pytest.raises(DataError, match=r"data\.image_column"):
        sources.webdataset(folder, image_column=" ; ")


def test_names_as_webdataset_reads_them(tmp_path):
    members = [
        ("./a/x.y/001.seg.png", b"a mask, of no interest"),
        ("./a/x.y/001.PNG", png(1)),
        ("./a/x.y/001.txt", b"one"),
        ("__MACOSX/._001.png", b"no picture"),
        (".hidden.png", b"no picture"),
        ("README", b"read me"),
        ("a/002.txt", b"two"),
        ("a/002.webp", b"not wanted while there is a png"),
        ("a/002.png", png(2)),
        ("b/002.png", png(3)),
        ("b/002.txt", b"three"),
        ("b/002.png", png(4)),
        ("b/002.txt", b"four"),
    ]
    train = sources.webdataset(write_tar(tmp_path / "a.tar", members), "png; .webp").train
    assert captions(train) == ["one", "two", "three", "four"]
    assert [example.image().getpixel((0, 0))[0] for example in train.examples()] == [1, 2, 3, 4]
    assert train.count == 4


def test_names_that_are_not_unicode(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("caf\udce9.png", png(1)), ("caf\udce9.txt", b"one")])
    (example,) = sources.webdataset(path).train.examples()
    assert (example.id, example.captions) == ("a.tar/caf\ufffd.png", ("one",))


def test_captions_in_json(tmp_path):
    members = [
        ("1.json", json.dumps({"caption": "one", "width": 3}).encode()),
        ("1.png", png(1)),
        ("2.png", png(2)),
        ("2.json", json.dumps({"caption": ["two", "deux"]}).encode()),
    ]
    train = sources.webdataset(write_tar(tmp_path / "a.tar", members), caption_column="json.caption").train
    assert [example.captions for example in train.examples()] == [("one",), ("two", "deux")]
    assert train.count == 2


def link(name, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


BAD_MEMBERS = {
    "no picture": ([("1.txt", b"x")], {}, "no image (jpg, png, webp, jpeg) has this name; set data.image_column"),
    "symbolic link": ([(link("1.png", tarfile.SYMTYPE), b""), ("1.txt", b"x")], {}, "1.png is a link or no file"),
    "hard link": ([(link("1.png", tarfile.LNKTYPE), b""), ("1.txt", b"x")], {}, "1.png is a link or no file"),
    "device": ([(link("1.png", tarfile.CHRTYPE), b"")], {}, "1.png is a link or no file"),
    "folder": ([(link("1.png", tarfile.DIRTYPE), b"")], {}, "1.png is a link or no file"),
    "leads out": ([("../1.png", png(1)), ("../1.txt", b"x")], {}, "../1.png leads out of the archive"),
    "from the root": ([("/1.png", png(1)), ("/1.txt", b"x")], {}, "/1.png leads out of the archive"),
    "no caption": ([("1.png", png(1))], {}, "no .txt has this name; set data.caption_column"),
    "empty caption": ([("1.png", png(1)), ("1.txt", b" \n")], {}, "an empty caption in 'txt'"),
    "not UTF-8": ([("1.png", png(1)), ("1.txt", b"caf\xe9")], {}, "its .txt cannot be read: 'utf-8' codec"),
    "not JSON": ([("1.png", png(1)), ("1.json", b"{")], {"caption_column": "json.x"}, "its .json cannot be read"),
    "a list": ([("1.png", png(1)), ("1.json", b"[]")], {"caption_column": "json.x"}, "its .json is not a JSON object"),
    "no key": ([("1.png", png(1)), ("1.json", b'{"y": 1}')], {"caption_column": "json.x"}, "no column 'x' among y"),
    "half a letter": (
        [("1.png", png(1)), ("1.json", b'{"x": "\\ud83d"}')],
        {"caption_column": "json.x"},
        "its .json cannot be read: 'utf-8' codec",
    ),
    "a number": (
        [("1.png", png(1)), ("1.json", b'{"x": 1}')],
        {"caption_column": "json.x"},
        "'x' holds 1; a caption is",
    ),
}


def test_members_that_lie_apart_are_told_how_to_be_packed(tmp_path):
    """`tar cf a.tar -C folder .` packs as the file system lists; WebDataset reads what lies side by side."""
    members = [("a.png", png(1)), ("b.txt", b"b"), ("b.png", png(2)), ("a.txt", b"a")]
    splits = sources.webdataset(write_tar(tmp_path / "a.tar", members))
    apart, whole, rest = splits.train.examples()
    assert checks.problem_of(whole, requires_captions=True) is None
    for example in (apart, rest):
        assert "or pack them side by side (tar --sort=name)" in checks.problem_of(example, requires_captions=True)


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_members_are_rows_with_a_problem(tmp_path, case):
    members, options, message = BAD_MEMBERS[case]
    caption = ("2.json", b'{"x": "two"}') if options else ("2.txt", b"two")
    splits = sources.webdataset(write_tar(tmp_path / "a.tar", [*members, ("2.png", png(2)), caption]), **options)
    bad, good = splits.train.examples()
    assert splits.train.count == 2
    problem = checks.problem_of(bad, requires_captions=True)
    assert problem.startswith(f"{tmp_path / 'a.tar'}, ")
    assert message in problem
    assert checks.problem_of(good, requires_captions=True) is None
    with pytest.raises(DataError, match=re.escape(message)):
        checks.check(splits, True)
    assert str(checks.check(splits, True, skip=True)) == "images in shards, read as a stream"
    if members[0][0] != "1.png":
        with pytest.raises(DataError, match=re.escape(message)):
            bad.image()


def test_a_member_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "a.tar"
    with path.open("wb") as file:  # sparse: only the headers take space
        for name, size in (("1.png", shards.MAX_BYTES + 1), ("1.bin", 1 << 33)):
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.seek((size + 511) // 512 * 512, os.SEEK_CUR)
        file.write(bytes(1024))
    tracemalloc.start()
    (example,) = sources.webdataset(path).train.examples()
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert "1.png has 256 MB; the limit is 256 MB" in checks.problem_of(example, False)


def test_memory_does_not_grow_with_the_members(tmp_path):
    path = write_tar(tmp_path / "a.tar", ((f"{number}.png", b"x" * 500) for number in range(4000)))
    train = sources.webdataset(path).train
    tracemalloc.start()
    assert train.count == 4000
    assert sum(1 for _ in train.examples()) == 4000
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# ---- damaged shards


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def without_end(path):
    """As a writer leaves it that was killed between two members."""
    path.write_bytes(path.read_bytes()[: 4 * 1024])


def overwrite(path):
    content = bytearray(path.read_bytes())
    content[2048:2560] = b"x" * 512  # the header of the second picture
    path.write_bytes(content)


def boast(path):
    """A header that announces 16 GB of further header."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 1 << 34
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(2048))


BROKEN = {
    "endless header": (boast, "no tar file that can be read to its end: a header of 17,179,869,184 bytes"),
    "empty file": (lambda path: path.write_bytes(b""), "no tar file that can be read"),
    "empty tar": (lambda path: write_tar(path, []), r"holds no images \(jpg, png, webp, jpeg\)"),
    "no images": (lambda path: write_tar(path, [("a.bin", b"x"), ("b.csv", b"x")]), "holds no images"),
    "text": (lambda path: path.write_text("hello " * 1000), "no tar file that can be read"),
    "cut in a header": (cut(1024 + 100), "no tar file that can be read to its end: damaged or cut off"),
    "cut in a member": (cut(512 + 10), "no tar file that can be read to its end: unexpected end of data"),
    "no end": (without_end, "no tar file that can be read to its end: damaged or cut off"),
    "damaged header": (overwrite, "no tar file that can be read to its end: damaged or cut off"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_shard_is_named(folder, case):
    break_it, message = BROKEN[case]
    splits = sources.webdataset(folder)
    break_it(folder / "01.tar")
    with pytest.raises(DataError, match=f"01.tar.*{message}"):
        list(splits.train.examples())
    with pytest.raises(DataError, match="01"):
        _ = splits.train.count
    assert captions(sources.subset(splits, 3, 0).train) == ALL[:3]


@pytest.mark.parametrize(("mode", "ending"), [("w:gz", "tar.gz"), ("w:xz", "tar.xz"), ("w:bz2", "tar.bz2")])
def test_compressed_shards(tmp_path, mode, ending):
    path = write_tar(tmp_path / "set" / f"a.{ending}", pairs(*range(5)), mode)
    train = sources.webdataset(tmp_path / "set").train
    assert train.count is None
    assert captions(train, 1) == ALL[1:]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=f"a.{ending}: no tar file that can be read to its end"):
        list(train.examples())


# ---- part of a stream, and fingerprints


def test_a_part_of_a_stream_is_its_beginning(folder):
    few = sources.subset(sources.webdataset(folder, validation_path=folder), 4, seed=0)
    assert captions(few.train) == captions(few.validation) == ALL[:4]
    assert (few.train.count, captions(few.train, 2), captions(few.train, 4)) == (4, ALL[2:4], [])
    assert sources.subset(sources.webdataset(folder), 99, 0).train.count == 5
    assert captions(sources.subset(sources.webdataset(folder), 99, 0).train) == ALL


def test_the_fingerprint_follows_the_content(folder, tmp_path):
    digests = FileDigests(tmp_path / "cache")
    train = sources.webdataset(folder).train
    first = fingerprint(train, digests)
    found = {
        first,
        fingerprint(sources.subset(sources.Splits(train, None), 3, 0).train),
        fingerprint(sources.webdataset(folder, "png").train),
        fingerprint(sources.webdataset(folder, caption_column="json.x").train),
        fingerprint(sources.webdataset(f"{folder}/0{{1,0}}.tar").train),
    }
    assert len(found) == 5
    os.utime(folder / "00.tar")
    assert fingerprint(train, digests) == fingerprint(train) == first
    folder.rename(tmp_path / "moved")
    assert fingerprint(sources.webdataset(tmp_path / "moved").train) == first
    write_tar(tmp_path / "moved" / "00.tar", pairs(0, 1, 9))
    assert fingerprint(sources.webdataset(tmp_path / "moved").train) not in found
    (tmp_path / "moved" / "00.tar").unlink()
    with pytest.raises(DataError, match=r"00\.tar cannot be read"):
        fingerprint(train)


# ---- by URL


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.faults` says how often to fail, and how."""

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def answer(self, with_body):
        name, _, query = self.path.partition("?")
        server = self.server
        server.seen.append((self.command, name, query, self.headers.get("Authorization"), self.headers.get("Range")))
        fault = server.faults.pop(0) if server.faults and (with_body or not server.faults_for_body) else None
        if name not in server.files or isinstance(fault, int):
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content, headers = server.files[name]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        for header in [*headers.items(), ("Content-Length", str(len(content) - start))]:
            self.send_header(*header)
        self.end_headers()
        if with_body:
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[start : start + 3000] if fault == "break" else content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {f"/set/{file.name}": (file.read_bytes(), {"ETag": f'"{file.name}"'}) for file in folder.iterdir()}
    server.faults, server.faults_for_body, server.seen = [], False, []
    server.address = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def by_url(server, name="{00..01}.tar", secret="", query=""):
    return sources.webdataset(f"http://{secret}{server.address}/set/{name}{query}").train


def test_shards_by_url_are_streamed(server):
    train = by_url(server)
    assert train.count is None
    assert captions(train) == ALL
    assert captions(train, 4) == ALL[4:]
    assert train[1].image().getpixel((0, 0)) == (1, 100, 200)
    assert train[1].where == f"http://{server.address}/set/00.tar, 001"
    assert str(checks.check(sources.Splits(train, None), True)) == "images in shards, read as a stream"
    assert captions(sources.subset(sources.Splits(train, None), 2, 0).train) == ALL[:2]


def test_compressed_shards_by_url(server, tmp_path):
    path = write_tar(tmp_path / "c.tar.gz", pairs(*range(5)), "w:gz")
    server.files["/set/c.tar.gz"] = (path.read_bytes(), {})
    assert captions(by_url(server, "c.tar.gz"), 2) == ALL[2:]


def test_an_address_with_user_password_and_token(server):
    train = by_url(server, secret="anna:s%40fe@", query="?token=hidden&x=1")
    assert captions(train, 3) == ALL[3:]
    fingerprint(train)
    assert {(query, access) for _, _, query, access, _ in server.seen} == {
        ("token=hidden&x=1", f"Basic {base64.b64encode(b'anna:s@fe').decode()}")
    }
    server.files.clear()
    for action in (lambda: list(train.examples()), lambda: fingerprint(train), lambda: train[0]):
        with pytest.raises(DataError) as caught:
            action()
        assert f"http://{server.address}/set/00.tar cannot be read: the server answers 404" in str(caught.value)
        assert not re.search("anna|s%40fe|s@fe|hidden", str(caught.value) + train.name)


def test_a_server_that_fails_for_a_moment_is_asked_again(server):
    server.faults = [503]
    assert captions(by_url(server)) == ALL


def test_a_server_that_keeps_failing(server):
    server.faults = [503] * 9
    with pytest.raises(DataError, match=r"00\.tar cannot be read: the server answers 503"):
        list(by_url(server).examples())
    server.faults = [404] * 9
    with pytest.raises(DataError, match="404"):
        list(by_url(server).examples())
    assert len(server.faults) == 8, "what is not there is not asked for again"


def test_a_broken_connection_is_taken_up_again(server):
    server.faults, server.faults_for_body = ["break"], True
    assert captions(by_url(server)) == ALL
    assert [wanted for *_, wanted in server.seen] == [None, "bytes=3000-", None]


def test_a_broken_connection_to_a_file_that_may_have_changed(server):
    server.files["/set/00.tar"] = (server.files["/set/00.tar"][0], {})
    server.faults, server.faults_for_body = ["break"], True
    with pytest.raises(DataError, match=r"00\.tar: the connection broke and the server cannot go on"):
        list(by_url(server).examples())


def test_a_shard_that_is_cut_off_on_the_server(server):
    content, headers = server.files["/set/01.tar"]
    server.files["/set/01.tar"] = (content[:3000], headers)
    with pytest.raises(DataError, match=r"01\.tar: no tar file that can be read to its end"):
        list(by_url(server).examples())


def test_nobody_answers():
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/a\.tar cannot be read: .*refused"):
        list(sources.webdataset("http://127.0.0.1:9/a.tar?token=hidden").train.examples())


@pytest.mark.parametrize("url", ["http://", "https:///a.tar", "http://[::1/a.tar", "http://host:port/a.tar"])
def test_addresses_that_are_none(url):
    with pytest.raises(DataError, match=r"data\.path: this is no address"):
        sources.webdataset(url)


def test_the_fingerprint_by_url_asks_the_server(server):
    first = fingerprint(by_url(server))
    assert {method for method, *_ in server.seen} == {"HEAD"}
    assert fingerprint(by_url(server, query="?signature=2")) == first
    content, _ = server.files["/set/01.tar"]
    found = {first}
    for headers in ({"ETag": '"other"'}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, {}):
        server.files["/set/01.tar"] = (content, headers)
        found.add(fingerprint(by_url(server)))
    server.files["/set/01.tar"] = (content[:-512] + b"x" * 512, {})
    found.add(fingerprint(by_url(server)))
    assert len(found) == 5
    server.faults = [403]  # as for a signed address
    assert fingerprint(by_url(server, "00.tar")) == fingerprint(by_url(server, "00.tar"))
