"""Tables of parts: made by any number of processes, joined by a manifest, opened a few at a time."""

import json
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Forked, command, launched
from encoders import PriorEncoders, as_earlier, captions, encode
from PIL import Image
from running import prepare

from kandinsky_exp import cli
from kandinsky_exp.data import sources
from kandinsky_exp.data.encoded import catalog, table
from kandinsky_exp.data.encoded.claims import CLAIM, GONE_SECONDS, Claims, disk_time, is_alive
from kandinsky_exp.data.encoded.columns import ColumnWriter, MappedColumns
from kandinsky_exp.data.encoded.layout import CAPTIONS, IMAGES, META, PART, PLAN, part_folder, partial
from kandinsky_exp.data.encoded.making import Making, Plan
from kandinsky_exp.data.encoded.part_queue import PartQueue
from kandinsky_exp.data.encoded.parts import CHUNK, LARGEST, PartFacts, PartWriter, rows_of_part
from kandinsky_exp.data.encoded.progress import ProgressBar
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.encoded.workers import collate
from kandinsky_exp.data.examples import Indexed
from kandinsky_exp.errors import ConfigError, DataError

ROWS = 2 * CHUNK + 12


def write_set(folder: Path, rows: int = ROWS) -> Path:
    """Few pictures many times, each row with a caption of its own but for every third."""
    folder.mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    texts = ["the same" if row % 3 == 0 else f"row {row}" for row in range(rows)]
    lines = [json.dumps({"image": f"{row % 4}.png", "text": text}) for row, text in enumerate(texts)]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def rows_of(file: Path) -> Indexed:
    found = sources.listing(str(file)).train
    assert isinstance(found, Indexed)
    return found


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def whole(listed, tmp_path_factory) -> Path:
    """The table that one process makes."""
    return encode_in_a_process(listed, tmp_path_factory.mktemp("whole") / "key")


def encode_in_a_process(source: Path, target: Path) -> Path:
    """Alike in every process."""
    torch.manual_seed(0)
    encode(rows_of(source), PriorEncoders(), target, batch_size=8, workers=0)
    return target


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def copied(table: Path, target: Path) -> Path:
    """A table in the making, of all parts of a whole one, of which some may then be taken away."""
    shutil.copytree(table, partial(target))
    (partial(target) / META).unlink()
    return target


# ---- how it is divided


@pytest.mark.parametrize("batch", [1, 8, 96, 300])
@pytest.mark.parametrize("rows", [None, 1, 255, 100_000, 5_000_000, 100_000_000])
def test_parts_are_whole_batches_neither_too_many_nor_too_large(rows, batch):
    size = rows_of_part(rows, batch)
    assert size % batch == 0
    assert CHUNK <= size <= LARGEST * (CHUNK + batch)
    assert (rows or 0) / size <= 10_000
    plan = Plan("t", "0", rows, batch, size)
    if rows is not None:
        assert plan.rows_of(0).start == 0
        assert plan.rows_of((plan.parts or 0) - 1).stop == rows


# ---- who makes it


def test_two_processes_share_the_parts_and_make_what_one_would(listed, whole, tmp_path):
    target = tmp_path / "key"
    both = [Forked(encode_in_a_process, listed, target) for _ in range(2)]
    printed = [process.finish() for process in both]
    assert [process.code for process in both] == [0, 0], printed
    assert content(target) == content(whole)


def test_a_killed_process_is_followed_at_once_and_what_it_finished_stays(listed, whole, tmp_path):
    target = tmp_path / "key"
    process = Forked(encode_in_a_process, listed, target)
    process.wait_until(part_folder(partial(target), 0).is_dir)
    os.kill(process.pid, signal.SIGKILL)
    started = time.monotonic()
    encode_in_a_process(listed, target)  # before anybody waits for the killed one: it is a zombie
    assert time.monotonic() - started < GONE_SECONDS / 2
    process.finish()
    assert content(target) == content(whole)


class Elsewhere(Claims):
    """Of a process of another machine, whose number says nothing here."""

    def take(self, name):
        taken = super().take(name)
        claim = self.folder / f"{name}{CLAIM}"
        claim.write_text(json.dumps(json.loads(claim.read_text()) | {"machine": "another"}))
        return taken


def test_a_process_of_another_machine_lives_as_long_as_it_touches_its_claim(tmp_path):
    claims, here = Elsewhere(tmp_path), Claims(tmp_path)
    assert claims.take("3")
    assert not here.take("3")
    long_ago = time.time() - GONE_SECONDS - 1
    os.utime(tmp_path / f"3{CLAIM}", (long_ago, long_ago))
    assert here.take("3")
    assert is_alive(tmp_path / f"3{CLAIM}", disk_time(tmp_path))
    here.close()
    claims.close()
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_this_machine_that_stands_still_keeps_its_claim(tmp_path):
    claims, other = Claims(tmp_path), Claims(tmp_path)
    assert claims.take("3")
    long_ago = time.time() - GONE_SECONDS - 1
    os.utime(tmp_path / f"3{CLAIM}", (long_ago, long_ago))
    assert not other.take("3")
    claims.close()
    assert other.take("3")
    other.close()


def take_all(source: Path, target: Path, taken: Path) -> None:
    """Every part that there is to take, each at a moment at which the other process takes one, too."""
    making = Making(target, Plan.of(target, rows_of(source), 1, "0"), print)
    with closing(Claims(making.folder)) as claims:
        queue, parts = PartQueue(rows_of(source), making, claims), []
        wait_for_both(taken.parent, "ready", taken.name)
        while (part := queue.take()) is not None:
            parts.append(part)
            time.sleep(0.02 - time.time() % 0.02)
        taken.write_text(json.dumps(parts))
        wait_for_both(taken.parent, "over", taken.name)  # what it holds is not free as long as the other one takes


def wait_for_both(folder: Path, what: str, name: str) -> None:
    (folder / f"{what}-{name}").touch()
    while len(list(folder.glob(f"{what}-*"))) < 2:
        time.sleep(0.002)


def test_no_two_processes_take_one_part(tmp_path):
    """Neither of those that are free nor of those that a killed process held."""
    listed, target = write_set(tmp_path / "set", 30 * CHUNK), tmp_path / "key"
    making = Making(target, Plan.of(target, rows_of(listed), 1, "0"), print)
    dead = Forked(os.getpid)
    dead.finish()
    for part in range(0, 30, 2):
        with closing(Claims(making.folder)) as claims:
            claims.take(str(part))
            claim = making.folder / f"{part}{CLAIM}"
            held = claim.read_text()
        claim.write_text(json.dumps(json.loads(held) | {"process": dead.pid}))
    files = [tmp_path / f"taken-{number}" for number in range(2)]
    both = [Forked(take_all, listed, target, file) for file in files]
    printed = [process.finish() for process in both]
    assert [process.code for process in both] == [0, 0], printed
    first, second = (json.loads(file.read_text()) for file in files)
    assert sorted(first + second) == list(range(30))
    assert len(first) > 2 < len(second)


def test_a_number_that_another_process_got_is_told_apart(tmp_path):
    claims = Claims(tmp_path)
    claims.take("0")
    claim = tmp_path / f"0{CLAIM}"
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"began": "1"}))
    assert not is_alive(claim, disk_time(tmp_path))
    claims.close()


def test_a_part_that_two_make_at_once_is_there_once(tmp_path):
    making = Making(tmp_path / "t", Plan("t", "0", 3, 1, CHUNK), print)
    facts = [PartFacts("t", 0, 1, source_rows=3, images=3) for _ in range(2)]
    for part in [PartWriter(making.folder, fact, mark) for fact, mark in zip(facts, "ab", strict=True)]:
        part.append(IMAGES, {"id": ["x", "y", "z"], "numbers": np.arange(3)})
        part.finish()
    making.join("numbers", {"views": 1})
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["00000", PLAN, META]
    assert len(FeatureTable(tmp_path / "t")) == 3


def test_who_waits_goes_on_when_the_others_are_done(listed, whole, tmp_path):
    target, said = copied(whole, tmp_path / "key"), []
    shutil.move(part_folder(partial(target), 1), tmp_path / "aside")
    other = Claims(partial(target))
    other.take("1")
    stage = PriorEncoders()
    waiting = threading.Thread(target=lambda: encode(rows_of(listed), stage, target, batch_size=8, log=said.append))
    waiting.start()
    while not said:
        time.sleep(0.01)
    assert "other processes are encoding what is left of" in said[0]
    shutil.move(tmp_path / "aside", part_folder(partial(target), 1))
    waiting.join(timeout=30)
    other.close()
    assert stage.images == 0
    assert content(target) == content(whole)


# ---- several processes of one launcher


def encode_verb(root: Path, data: Path, *more: str) -> list[str]:
    place = ["data=list", f"data.path={data}", "data.resolution=64", f"output_root={root}", "data.encode_batch=8"]
    return ["encode", "weights=tiny", "model=prior", *place, *more]


def test_the_processes_of_a_launcher_share_the_parts(tmp_path):
    listed = write_set(tmp_path / "set", CHUNK + 12)
    for name, launch in (("one", [{}]), ("two", launched(2))):
        prepare(tmp_path / name, [])
        processes = [Forked(command, encode_verb(tmp_path / name, listed), environment=told) for told in launch]
        printed = [process.finish() for process in processes]
        assert [process.code for process in processes] == [0] * len(processes), printed
    (one,), (two,) = (tmp_path.glob(f"{name}/cache/t*/{META}") for name in ("one", "two"))
    assert content(one.parent) == content(two.parent)
    assert f"encoding {CHUNK + 12} images" in printed[0]
    assert printed[1] == ""


def with_version(release: str, folder: Path, arguments: list[str]) -> None:
    """The command of another version of the package."""
    facts = folder / f"kandinsky_exp-{release}.dist-info" / "METADATA"
    facts.parent.mkdir()
    facts.write_text(f"Metadata-Version: 2.1\nName: kandinsky-exp\nVersion: {release}\n")
    sys.path.insert(0, str(folder))
    command(arguments)


def test_processes_that_see_different_data_weights_or_versions_are_refused(listed, tmp_path):
    prepare(tmp_path, [])
    few = write_set(tmp_path / "few", 5)
    calls = {
        r"error: data: process 1 finds other data in .* than process 0": (command, encode_verb(tmp_path, few)),
        r"error: weights: process 1 would encode with other weights, or in another precision, than process 0": (
            command,
            encode_verb(tmp_path, listed, "precision=bf16"),
        ),
        r"error: process 1 has version 9\.9 of kandinsky_exp, process 0 has 0\.": (
            with_version,
            "9.9",
            tmp_path,
            encode_verb(tmp_path, listed),
        ),
    }
    for message, call in calls.items():
        first, second = launched(2)
        both = [Forked(command, encode_verb(tmp_path, listed), environment=first), Forked(*call, environment=second)]
        printed = [process.finish() for process in both]
        assert [process.code for process in both] == [2, 2], printed
        assert re.search(message, printed[0]), printed
        assert "error" not in printed[1]
    assert not list(tmp_path.glob("cache/*.partial"))


# ---- a job for each part


def test_a_sweep_over_the_parts_makes_the_table(tmp_path, capfd):
    listed = write_set(tmp_path / "set", CHUNK + 12)
    prepare(tmp_path, [])
    call = encode_verb(tmp_path, listed)
    cli.main([*call, "data.part=1"])
    assert "1 of 2 parts of" in (said := capfd.readouterr()).err
    assert "not complete" in said.out
    assert not list(tmp_path.glob(f"cache/t*/{META}"))
    cli.main([*call, "--multirun", "data.part=range(2)"])
    (made,) = tmp_path.glob(f"cache/t*/{META}")
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "set", "mlflow.db"}  # no folders of jobs
    assert len(FeatureTable(made.parent)) == CHUNK + 12
    capfd.readouterr()
    cli.main(call)
    assert f"encoded features of {CHUNK + 12} images found" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "launch", "message"),
    [
        (["data.part=1"], {}, r"data\.part: 1 is beyond the 1 parts of this data \(1 of .*\), which begin with 0"),
        (["data.part=-1"], {}, r"data\.part: has to be .*at least 0"),
        (["data.part=0"], None, r"data\.part: is one job's; the processes of a launcher share the parts"),
        (["data=webdataset", "data.part=0"], {}, r"data\.part: .* is read in one sweep and not divided"),
    ],
)
def test_a_part_that_cannot_be(more, launch, message, tmp_path):
    prepare(tmp_path, [])
    listed = write_set(tmp_path / "set", 4)
    call = encode_verb(tmp_path, listed, *more)
    if "data=webdataset" in more:
        (tmp_path / "set" / "0.txt").write_text("noise")
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(tmp_path / "set" / "0.png", "0.png")
            archive.add(tmp_path / "set" / "0.txt", "0.txt")
        call = [text.replace(str(listed), str(tmp_path / "set.tar")) for text in call if text != "data=list"]
    processes = [Forked(command, call, environment=told) for told in (launched(2) if launch is None else [launch])]
    printed = "".join(process.finish() for process in processes)
    assert {process.code for process in processes} == {2}, printed
    assert re.search(message, printed), printed


def shard_with_more(folder: Path, rows: int) -> Path:
    """A tar of captioned pictures; beside every hundredth lies what is no part of an example."""
    listed = write_set(folder, 4)
    (folder / "row.txt").write_text("noise")
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        for row in range(rows):
            archive.add(folder / f"{row % 4}.png", f"{row:05}.png")
            archive.add(folder / "row.txt", f"{row:05}.txt")
            if row % 100 == 0:
                archive.add(listed, f"{row:05}.notes")
    return folder.with_suffix(".tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_stream_does_not_use_is_counted_once(workers, tmp_path):
    source = sources.webdataset(str(shard_with_more(tmp_path / "set", ROWS))).train
    made = encode(source, PriorEncoders(), tmp_path / "key", batch_size=8, workers=workers)
    assert len(made) == ROWS
    assert [part["images"] for part in json.loads((made.folder / META).read_text())["parts"]] == [CHUNK, CHUNK, 12]
    assert made.noted == source.passed_over()
    assert [number for number, *_ in made.noted.values()] == [6]


def test_progress_tells_own_images_from_those_of_others():
    said = []
    bar = ProgressBar(100, 0, said.append)
    bar(60, 20)
    bar.sum_up(100, 0)
    assert re.search(r"encoded 100 images in .* images/s by this process", said[-1])


# ---- captions


def test_captions_that_occur_many_times_are_encoded_once_in_each_part(listed, tmp_path):
    stage = PriorEncoders()
    made = encode(rows_of(listed), stage, tmp_path / "key", batch_size=8)
    different = sum(len({"the same" if row % 3 == 0 else row for row in part}) for part in (
        range(CHUNK), range(CHUNK, 2 * CHUNK), range(2 * CHUNK, ROWS)))  # fmt: skip
    assert stage.captions == made.meta["captions"] == different < ROWS
    for index in (0, 1, 3, CHUNK + 2, ROWS - 1):
        expected = stage.encode(collate([stage.preprocess(None, rows_of(listed)[index].captions[0])]))
        assert torch.allclose(made.row(index)["text_embeds"], expected["text_embeds"][0], atol=1e-5)
        assert captions(made, index) == 1


# ---- what is wrong with parts


def no_facts(part: Path) -> None:
    """Neither of the part nor, so that somebody looks at these, of the table."""
    (part / PART).unlink()
    (part.parent / META).write_text("{")


def test_a_part_that_is_missing_or_damaged_is_made_again_alone(listed, whole, tmp_path):
    for harm in (shutil.rmtree, lambda part: (part / CAPTIONS).write_bytes(b""), no_facts):
        target, said, stage = tmp_path / "key", [], PriorEncoders()
        shutil.copytree(whole, target)
        harm(part_folder(target, 1))
        encode(rows_of(listed), stage, target, batch_size=8, log=said.append)
        assert stage.images == CHUNK, harm
        assert f"the encoded features in {target} are damaged" in said[0]
        assert len(FeatureTable(target)) == ROWS
        shutil.rmtree(target)


def test_a_part_of_other_weights_is_refused(listed, whole, tmp_path):
    target = copied(whole, tmp_path / "key")
    file = part_folder(partial(target), 1) / PART
    file.write_text(json.dumps(json.loads(file.read_text()) | {"table": "t0ther"}))
    with pytest.raises(DataError, match=r"00001 is no part of this table: .* other weights .*; take it away"):
        encode(rows_of(listed), PriorEncoders(), target, batch_size=8)


def test_a_part_that_is_there_twice_is_refused(listed, whole, tmp_path):
    target = copied(whole, tmp_path / "key")
    shutil.copytree(part_folder(partial(target), 1), partial(target) / "00001 (copy)")
    with pytest.raises(DataError, match=r"part 1 is there twice: .*00001 and .*00001 \(copy\); take one away"):
        encode(rows_of(listed), PriorEncoders(), target, batch_size=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.0.7"}, r"encoding it with version 0\.0\.7 of kandinsky_exp, this one would with .*; install"),
        (
            {"batch_size": 16, "part_rows": 256},
            r"batches of 16, this one would with 8 \(data\.encode_batch\); set",
        ),
        ({"rows": 7}, r"with 7 rows for key, this one would with 524 rows for key; give the same"),
    ],
)
def test_processes_that_would_not_make_the_same_parts_are_refused(listed, tmp_path, change, message):
    source, target = rows_of(listed), tmp_path / "key"
    plan = Plan.of(target, source, 8, "0.1.0")
    making = Making(target, replace(plan, **change), print)
    other = Claims(making.folder)
    other.take("0")
    with pytest.raises(DataError, match=message):
        encode(source, PriorEncoders(), target, batch_size=8)
    with pytest.raises(ConfigError, match="another process is encoding into key; wait for it"):
        catalog.remove(tmp_path, ["key"])
    other.close()
    assert len(encode(source, PriorEncoders(), target, batch_size=8)) == ROWS  # once it has ended


# ---- reading


def test_a_table_without_parts_is_read(listed, tmp_path):
    alone = write_set(tmp_path / "few", 2)
    new = encode(rows_of(alone), PriorEncoders(), tmp_path / "new")
    rows = [new.row(index) for index in range(2)]
    as_earlier(tmp_path / "new", tmp_path / "old")
    old = encode(rows_of(alone), PriorEncoders(), tmp_path / "old")
    assert sorted(path.name for path in old.folder.iterdir()) == [CAPTIONS, IMAGES, META]
    for index, row in enumerate(rows):
        assert all(torch.equal(value, old.row(index)[name]) for name, value in row.items())
        assert old.tokens(index, lambda count: 0) == len(row["text_mask"])
    assert np.array_equal(old.pictures(), FeatureTable(old.folder).pictures())


def large(folder: Path, parts: int) -> Path:
    """A table of so many parts of one row, all of them links to one."""
    making = Making(folder, Plan(folder.name, "0", parts, 1, 1), print)
    part = PartWriter(making.folder, PartFacts(folder.name, 0, 1, source_rows=1, images=1), "a")
    part.append(IMAGES, {"id": ["x"], "source_row": np.arange(1), "picture": np.zeros((1, 2), np.int64)})
    part.finish()
    first, entry = part_folder(making.folder, 0), part.facts.entry
    for number in range(1, parts):
        part_folder(making.folder, number).symlink_to(first.name)
    facts = {"images": parts, "captions": 0, "views": 1, "parts": [entry] * parts}
    (making.folder / META).write_text(json.dumps(facts))
    making.folder.rename(folder)
    return folder


def test_ten_thousand_parts_open_at_once_and_few_stay_open(tmp_path):
    folder = large(tmp_path / "key", 10_000)
    started = time.process_time()
    made = FeatureTable(folder)
    assert len(made) == 10_000
    assert time.process_time() - started < 2
    mapped = Path("/proc/self/maps")
    for index in range(0, 10_000, 20):
        assert made.id(index) == "x"
    if mapped.exists():
        assert mapped.read_text().count(str(folder)) <= table.OPEN
    (part_folder(folder, 9_999)).unlink()
    with pytest.raises(DataError, match=r"09999 is damaged .*; remove .*09999 and give the command again"):
        made.id(9_999)
    (folder / META).unlink()
    with pytest.raises(DataError, match="was removed, or is mended, by another process"):
        made.id(9_999)


def test_what_an_open_file_keeps_in_memory_does_not_grow_with_its_rows(tmp_path):
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("LOUD: the system does not tell what of a process is its own memory")
    file = ColumnWriter(tmp_path / IMAGES)
    for _ in range(LARGEST):
        file.append({"id": ["x"] * 4, "embeds": np.ones((4, 8)), "picture": np.zeros((4, 2), np.int64)})
    file.close()

    def own() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1])

    known = {}
    assert len(MappedColumns(tmp_path / IMAGES, known)) == 4 * LARGEST
    before, opened = own(), [MappedColumns(tmp_path / IMAGES, known) for _ in range(200)]
    assert all(mapped.row(row)["id"] == "x" for mapped in opened for row in range(0, 4 * LARGEST, 8))
    assert own() - before < 200 * 60  # with all record batches decoded it is 10 times as much
