"""Encoding that is interrupted, skips, mirrors or has sizes of its own; the verb; and the folder of all tables."""

import json
import os
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Forked
from encoders import DecoderEncoders, PriorEncoders, captions, encode
from PIL import Image
from running import SMALL, composed, prepare, train
from torch.utils.data import Dataset

from kandinsky_exp import cli
from kandinsky_exp.data import sources
from kandinsky_exp.data.buckets import bucket_sizes, nearest_bucket
from kandinsky_exp.data.encoded import catalog, parts
from kandinsky_exp.data.encoded.chunk import BatchFiller
from kandinsky_exp.data.encoded.layout import CAPTIONS, IMAGES, META, PROGRESS, part_folder, removal
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.encoded.workers import Loader, from_workers
from kandinsky_exp.data.examples import Example, Indexed
from kandinsky_exp.data.features import CachedFeatures, OnlineExamples
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.sampler import StreamBatchSampler, choose_mirror
from kandinsky_exp.errors import ConfigError, DataError
from kandinsky_exp.verbs.encode import encode as encode_verb


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """A folder of captioned pictures of noise."""
    folder.mkdir()
    lines = []
    for index, (width, height) in enumerate(sizes):
        noise = np.random.default_rng(index).integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": [f"noise {index}", f"more noise {index}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


CHUNK = 32  # images between commits, in place of 256


@pytest.fixture(autouse=True)
def short_chunks():
    whole, parts.CHUNK = parts.CHUNK, CHUNK
    yield
    parts.CHUNK = whole


def content(folder: Path) -> dict[str, bytes]:
    """All that its parts hold."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("*/*.arrow")}


# ---- going on


class Stopping(PriorEncoders):
    """Fails after so many images, as a process that is killed would."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def encode(self, examples):
        if self.images >= self.after and "clip_pixels" in examples:
            raise KeyboardInterrupt
        return super().encode(examples)


def test_an_interrupted_encoding_goes_on_where_it_stopped(prior, tmp_path):
    rows = CHUNK + 12
    source = sources.folder(write_pictures(tmp_path / "many", [(16, 16)] * rows)).train
    whole = encode(source, prior, tmp_path / "whole", batch_size=8)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        encode(source, Stopping(CHUNK), tmp_path / "parts", batch_size=8)
    torch.manual_seed(0)
    second, said = PriorEncoders(), []
    parts = encode(source, second, tmp_path / "parts", batch_size=8, log=said.append)
    assert second.images == 12
    assert f"encoding 12 images, after {CHUNK} that are there already" in said[0]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert parts.meta == {**whole.meta}


def test_another_batch_size_begins_anew(prior, tmp_path):
    rows = CHUNK + 4
    source = sources.folder(write_pictures(tmp_path / "many", [(16, 16)] * rows)).train
    with pytest.raises(KeyboardInterrupt):
        encode(source, Stopping(CHUNK), tmp_path / "parts", batch_size=8)
    stage, said = PriorEncoders(), []
    encode(source, stage, tmp_path / "parts", batch_size=4, log=said.append)
    assert stage.images == rows
    assert "was begun with batches of 8: encoding again" in said[0]


def test_a_batch_size_that_nobody_chose_is_that_of_the_first_process(prior, tmp_path):
    rows = CHUNK + 4
    source = sources.folder(write_pictures(tmp_path / "many", [(16, 16)] * rows)).train
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        encode(source, Stopping(CHUNK), tmp_path / "parts", batch_size=8)
    torch.manual_seed(0)
    stage = PriorEncoders()
    table = encode(source, stage, tmp_path / "parts", batch_size=64, fixed_batch=False)
    assert (stage.images, table.meta["batch_size"]) == (4, 8)
    encode(source, prior, tmp_path / "whole", batch_size=8)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def encode_in_a_group(source: Path, target: Path) -> None:
    """In a process of its own, which takes its workers with it."""
    os.setsid()
    parts.CHUNK = CHUNK
    torch.manual_seed(0)
    encode(sources.folder(source).train, PriorEncoders(), target, batch_size=8, workers=1)


def test_a_process_killed_at_any_moment_loses_nothing_that_was_committed(prior, tmp_path):
    source = write_pictures(tmp_path / "many", [(16, 16)] * (8 * CHUNK + 20))
    target, partial = tmp_path / "cache" / "key", tmp_path / "cache" / "key.partial"
    process = Forked(encode_in_a_group, source, target)
    process.wait_until((part_folder(partial, 0)).is_dir)
    os.killpg(process.pid, signal.SIGKILL)
    process.finish()
    assert not target.exists()
    second = PriorEncoders()
    encode(sources.folder(source).train, second, target, batch_size=8)
    assert second.images <= 7 * CHUNK + 20
    encode(sources.folder(source).train, prior, tmp_path / "whole", batch_size=8)
    assert content(target) == content(tmp_path / "whole")


# ---- what is damaged, full or read-only


@pytest.mark.parametrize("file", [IMAGES, CAPTIONS])
def test_a_flipped_bit_is_an_error_never_a_wrong_batch(prior, tmp_path, file):
    source = sources.folder(write_pictures(tmp_path / "set", [(16, 16)] * 40)).train
    folder = encode(source, prior, tmp_path / "0123abcd").folder
    file = part_folder(folder, 0) / file
    good, whole, damaged = everything(folder), file.read_bytes(), 0
    for offset in range(3, len(whole), len(whole) // 60):
        file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 4]) + whole[offset + 1 :])
        try:
            assert everything(folder) == good  # padding and other bytes without meaning
        except (DataError, OSError, ValueError, KeyError) as error:  # all but the first: the table is made again
            damaged += f"is damaged; remove {file.parent} and give the command again" in str(error)
    assert damaged >= 5


def everything(folder: Path) -> list[dict[str, list[float]]]:
    table = FeatureTable(folder)
    rows = [
        table.row(index, lambda _, number=number: number)
        for index in range(len(table))
        for number in range(captions(table, index))
    ]
    return [{name: value.tolist() for name, value in row.items()} for row in rows]


def test_what_the_machine_cannot_read_now_is_not_removed(prior, tmp_path):
    source = sources.folder(write_pictures(tmp_path / "set", [(16, 16)])).train
    encode(source, prior, tmp_path / "key")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]  # no hole is left below the limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, hard))
    try:
        with pytest.raises(DataError, match=r"cannot be read \(Too many open files\); they were left as they are"):
            encode(source, prior, tmp_path / "key")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in spare:
            os.close(descriptor)
    assert len(encode(source, Stopping(0), tmp_path / "key")) == 1


def test_a_damaged_table_is_removed_only_by_who_may_make_it_again(prior, tmp_path):
    encode(sources.folder(write_pictures(tmp_path / "set", [(16, 16)])).train, prior, tmp_path / "key")
    (tmp_path / "key" / META).write_text("{")
    assert catalog.open_table(tmp_path / "key", print) is None
    assert (tmp_path / "key" / META).exists()
    assert catalog.open_table(tmp_path / "key", print, mend=True) is None
    assert not (tmp_path / "key").exists()
    assert part_folder(tmp_path / "key.partial", 0).exists()


def test_a_disk_without_room_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match=r"need 1,000,000,000\.00 GB and the disk .* GB left; set output_root"):
        catalog.refuse_if_no_room(tmp_path, 10**18)
    catalog.refuse_if_no_room(tmp_path, 1000)


def test_a_cache_that_cannot_be_written_is_named(prior, tmp_path):
    source = sources.folder(write_pictures(tmp_path / "set", [(16, 16)])).train
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"output_root: encoded features cannot be written to .*cache"):
        encode(source, prior, tmp_path / "cache" / "key")


@contextmanager
def read_only(folder: Path):
    """A folder whose disk takes no writes, not even root's."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a disk")
    if subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_table_on_a_read_only_disk_serves(prior, tmp_path):
    source = sources.folder(write_pictures(tmp_path / "set", [(16, 16)] * 2)).train
    encode(source, prior, tmp_path / "cache" / "key")
    encode(source, prior, tmp_path / "cache" / "damaged")
    (tmp_path / "cache" / "damaged" / META).write_text("{")
    with read_only(tmp_path / "cache"):
        assert len(encode(source, prior, tmp_path / "cache" / "key")) == 2
        said = []
        for name in ("other", "damaged"):
            with pytest.raises(DataError, match=r"cannot be written to .* \(Read-only file system\); set output_root"):
                encode(source, prior, tmp_path / "cache" / name, log=said.append)
        assert len(said) == 1
        assert "are damaged" in said[0]
        with pytest.raises(ConfigError, match=r"remove: .* cannot be removed \(Read-only file system\)"):
            catalog.remove(tmp_path / "cache", ["key"])


def test_the_verb_needs_no_writable_disk_for_what_is_encoded(tmp_path, capfd):
    verb(tmp_path, "model=prior")
    with read_only(tmp_path / "cache"):
        verb(tmp_path, "model=prior")
    assert "found in" in capfd.readouterr().err


# ---- other things that go wrong


class Few(Indexed):
    """Examples of which the third is read by `read`."""

    name = "few"

    def __init__(self, folder, read, breaks=False):
        self.parent, self.read, self.breaks = sources.folder(folder).train, read, breaks

    def __len__(self):
        return 4

    def __getitem__(self, row):
        if row == 2 and self.breaks:
            raise OSError(5, "Input/output error")
        found = self.parent[row]
        return Example(found.id, found.captions, self.read, found.where) if row == 2 else found

    def fingerprint(self, digests):
        return "few"


def dies() -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


# torch reports a worker's death wherever the main process happens to be, at times where nobody can catch it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_is_an_error_with_a_cure(prior, tmp_path):
    source = Few(write_pictures(tmp_path / "set", [(16, 16)] * 4), dies)
    with pytest.raises(
        DataError, match=r"data\.encode_workers: the processes that read images failed .*; set data\.encode_workers=0"
    ):
        encode(source, prior, tmp_path / "key", workers=1, batch_size=1)


class Broken(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError("no more")], ids=repr
)
def test_half_a_message_of_a_worker_that_died(error):
    """What the queue raises then, depending on how far the message came."""
    with pytest.raises(DataError, match=r"^data\.num_workers: the processes that read images failed \(.*num_workers=0"):
        list(from_workers(Broken(error), [[0]], list, 1, "data.num_workers"))
    with pytest.raises(type(error)):  # nobody's death
        list(from_workers(Broken(error), [[0]], list, 0, "data.num_workers"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_breaks_off_is_not_the_output_disk(prior, tmp_path, workers):
    source = Few(write_pictures(tmp_path / "set", [(16, 16)] * 4), dies, breaks=True)
    with pytest.raises(DataError, match=r"cannot be read any further \(.*Input/output error") as caught:
        encode(source, prior, tmp_path / "key", workers=workers, batch_size=1)
    assert "output_root" not in str(caught.value)


class Choosy:
    """An image processor that stumbles over one image."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, images, return_tensors):
        if images.width == 17:
            raise IndexError("list index out of range")
        return self.processor(images=images, return_tensors=return_tensors)


def test_a_file_is_read_once(tmp_path):
    (source,) = sources.folder(write_pictures(tmp_path / "set", [(16, 16)])).train.examples()
    reads = []

    def read():
        reads.append(1)
        return source.read()

    loaded = Loader(PriorEncoders().preprocess, mirrored=True)[replace(source, read=read)]
    assert not loaded.problem
    assert loaded.picture is not None
    assert len(reads) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_an_example_does_to_a_processor_is_said_of_that_example(prior, tmp_path, workers):
    source = sources.folder(write_pictures(tmp_path / "set", [(16, 16), (17, 16), (16, 16)])).train
    stage = PriorEncoders()
    stage.preprocess = Preprocess(Choosy(stage.preprocess.image_processor), stage.preprocess.tokenizer, None)
    with pytest.raises(DataError, match=r"line 2: image 1\.png: IndexError: list index out of range"):
        encode(source, stage, tmp_path / "key", workers=workers)
    table = encode(source, stage, tmp_path / "skipped", workers=workers, skip_bad=True)
    assert [table.id(index) for index in range(len(table))] == ["0.png", "2.png"]


def test_a_strip_is_refused_before_it_is_blown_up(prior, tmp_path):
    source = sources.folder(write_pictures(tmp_path / "set", [(400, 8), (8, 401)])).train
    with pytest.raises(DataError, match=r"line 2: image 1\.png: 8 x 401 pixels, longer than 50 times") as caught:
        encode(source, prior, tmp_path / "key")
    assert "0.png" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "cure"), [(4, r"data\.encode_batch=2 \(it is 4\) or precision"), (1, "precision=bf16")]
)
def test_encoders_without_memory_ask_for_smaller_batches(tmp_path, size, cure):
    class Large(PriorEncoders):
        def encode(self, examples):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0")

    source = sources.folder(write_pictures(tmp_path / "set", [(16, 16)] * 2)).train
    with pytest.raises(DataError, match=rf"memory \(CUDA out of memory.* 9 GiB\.\); set {cure}"):
        encode(source, Large(), tmp_path / "key", batch_size=size)


# ---- what it says of itself


def test_it_is_announced_once_also_with_batches_as_large_as_a_chunk(prior, tmp_path):
    source = sources.folder(write_pictures(tmp_path / "set", [(16, 16)] * (CHUNK * 2 + 1))).train
    said = []
    encode(source, prior, tmp_path / "key", batch_size=CHUNK, log=said.append)
    assert [text.split()[0] for text in said] == ["encoding", "encoded"]


def encode_on_a_terminal(terminal: str, source: Path, target: Path) -> None:
    """In a process of its own, whose messages go there."""
    os.dup2(os.open(terminal, os.O_WRONLY | os.O_NOCTTY), sys.stderr.fileno())
    encode(sources.folder(source).train, PriorEncoders(), target, batch_size=4)


def test_the_bar_reaches_its_end(tmp_path):
    folder = write_pictures(tmp_path / "set", [(16, 16)] * 10)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = Forked(encode_on_a_terminal, os.ttyname(theirs), folder, tmp_path / "key")
    printed = process.finish()
    assert process.code == 0, printed
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "100%" in shown
    assert "10/10" in shown
    assert " 4/10" in shown  # the first batch was done when the bar began


def test_batches_fill_by_shape_across_what_is_read():
    """Rows of one shape keep their order; what is left at the end of a chunk is encoded in smaller batches."""
    seen = []
    filler = BatchFiller(2, lambda rows, views: seen.append((rows, [tuple(view["x"].shape) for view in views])))
    for number, side in enumerate([1, 2, 1, 1, 2, 3]):
        filler.add(number, [{"x": torch.full((side,), number)}] * 2)
    assert seen == [([0, 2], [(2, 1), (2, 1)]), ([1, 4], [(2, 2), (2, 2)])]
    filler.finish()
    assert seen[2:] == [([3], [(1, 1), (1, 1)]), ([5], [(1, 3), (1, 3)])]
    filler.finish()
    assert len(seen) == 4


# ---- skipping


def spoiled(folder: Path) -> Path:
    """Five pictures of which the second is text, the fourth has a number for a caption, and the fifth is missing."""
    write_pictures(folder, [(16, 16)] * 5)
    (folder / "1.png").write_text("no picture")
    (folder / "4.png").unlink()
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[3] = '{"file_name": "3.png", "text": 7}'
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_bad_examples_are_left_out_and_listed(prior, tmp_path):
    source = sources.folder(spoiled(tmp_path / "set")).train
    table = encode(source, prior, tmp_path / "key", skip_bad=True, batch_size=2)
    assert [table.id(index) for index in range(len(table))] == ["0.png", "2.png"]
    assert [table.source_row(index) for index in range(2)] == [0, 2]
    assert len(table.skipped) == 3
    assert "line 2: image 1.png: not an image" in table.skipped[0]
    good = sources.folder(write_pictures(tmp_path / "good", [(16, 16)] * 3)).train
    alone = encode(good, prior, tmp_path / "good-key")
    assert torch.allclose(table.row(1, lambda _: 1)["text_states"], alone.row(2, lambda _: 1)["text_states"], atol=1e-5)
    assert torch.allclose(table.row(1)["image_embeds"], alone.row(2)["image_embeds"], atol=1e-5)


def test_a_table_with_gaps_is_refused_where_gaps_are_errors(prior, tmp_path):
    source = sources.folder(spoiled(tmp_path / "set")).train
    encode(source, prior, tmp_path / "key", skip_bad=True)
    with pytest.raises(DataError, match=r"1\.png") as caught:
        encode(source, prior, tmp_path / "key")
    assert "if they were mended meanwhile: kandinsky-exp encode 'remove=[key]'" in str(caught.value)


def test_a_part_with_gaps_is_refused_at_once_where_gaps_are_errors(tmp_path):
    folder = write_pictures(tmp_path / "set", [(16, 16)] * (CHUNK + 4))
    (folder / "1.png").write_text("no picture")
    source = sources.folder(folder).train
    with pytest.raises(KeyboardInterrupt):
        encode(source, Stopping(CHUNK - 1), tmp_path / "key", batch_size=8, skip_bad=True)
    stage = PriorEncoders()
    with pytest.raises(DataError, match=r"image 1\.png(.|\n)*remove=\[key\]"):
        encode(source, stage, tmp_path / "key", batch_size=8)
    assert stage.images == 0


def test_all_that_was_left_out_is_logged(prior, tmp_path):
    folder = write_pictures(tmp_path / "set", [(16, 16)] * 9)
    for index in range(1, 8):
        (folder / f"{index}.png").write_text("no picture")
    source = sources.folder(folder).train
    for _ in range(2):  # also when the table is there already
        said = []
        encode(source, prior, tmp_path / "key", skip_bad=True, log=said.append)
        assert said[-1].count(".png: not an image") == 7


def test_several_bad_examples_are_named_at_once(prior, tmp_path):
    source = sources.folder(spoiled(tmp_path / "set")).train
    with pytest.raises(DataError) as caught:
        encode(source, prior, tmp_path / "key", batch_size=1)
    for name in ("1.png", "a caption is a string", "4.png", "data.on_error=skip"):
        assert name in str(caught.value)


def test_nothing_usable_is_an_error(prior, tmp_path):
    folder = write_pictures(tmp_path / "set", [(16, 16)] * 2)
    for file in folder.glob("*.png"):
        file.write_text("no picture")
    with pytest.raises(DataError, match="none of its examples can be used"):
        encode(sources.folder(folder).train, prior, tmp_path / "key", skip_bad=True)


def test_a_run_lists_what_it_left_out(tmp_path):
    folder = write_pictures(tmp_path / "set", [(16, 16)] * 9)
    (folder / "4.png").write_text("no picture")
    settings = ["data=folder", f"data.path={folder}", "data.resolution=64", "data.on_error=skip", "name=gaps"]
    train(tmp_path, "model=prior", "trainer.max_steps=1", *settings)
    assert "1 examples were left out" in (tmp_path / "gaps" / "train.log").read_text()
    (listed,) = tmp_path.glob("mlartifacts/**/skipped.txt")
    assert "4.png" in listed.read_text()
    assert json.loads((tmp_path / "gaps" / "run.json").read_text())["rows"] == 7


# ---- mirrors


def test_mirrors_are_encoded_beside_the_images(decoder, tmp_path):
    source = sources.folder(write_pictures(tmp_path / "set", [(64, 64)] * 5)).train
    table = encode(source, decoder, tmp_path / "key", mirrored=True)
    assert (len(table), table.views) == (5, 2)
    for index in range(4):
        mirrored = decoder.preprocess(source[index].image().transpose(Image.Transpose.FLIP_LEFT_RIGHT), None)
        expected = decoder.encode({name: value[None] for name, value in mirrored.items()})
        for name in ("latents", "image_embeds"):
            assert torch.allclose(table.row(index, view=1)[name], expected[name][0], atol=1e-4)
            assert not torch.allclose(table.row(index)[name], expected[name][0], atol=1e-2)


def test_visits_see_the_mirror_half_of_the_time_the_same_from_table_and_images(decoder, tmp_path):
    source = sources.folder(write_pictures(tmp_path / "set", [(64, 64)] * 4)).train
    cached = CachedFeatures(encode(source, decoder, tmp_path / "key", mirrored=True), 3)
    online = OnlineExamples(source, decoder.preprocess, 3, mirrored=True)
    for visit in [(0, 0), (1, 0), (2, 5), (3, 9)]:
        batch = {name: value[None] for name, value in online[visit].items() if name != "index"}
        assert torch.allclose(cached[visit]["latents"], decoder.encode(batch)["latents"][0], atol=1e-4)
    shown = [choose_mirror(3, epoch, index) for epoch in range(50) for index in range(20)]
    assert 430 < sum(shown) < 570


def test_validation_sees_no_mirror(decoder, tmp_path):
    source = sources.folder(write_pictures(tmp_path / "set", [(64, 64)] * 4)).train
    cached = CachedFeatures(encode(source, decoder, tmp_path / "key", mirrored=True), 3)
    online = OnlineExamples(source, decoder.preprocess, 3, mirrored=True)
    for index in range(4):
        assert torch.equal(cached.plain(index)["latents"], cached.table.row(index)["latents"])
        assert torch.equal(online.plain(index)["pixels"], decoder.preprocess(source[index].image(), None)["pixels"])


# ---- buckets


@pytest.mark.parametrize("resolution", [64, 128, 512, 768])
def test_bucket_sizes(resolution):
    sizes = bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert abs(width * height / resolution**2 - 1) <= 0.1
        assert (height, width) in sizes


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((640, 640), (512, 512)), ((3000, 2000), (640, 448)), ((2000, 3000), (448, 640)), ((5000, 100), (1024, 256))],
)
def test_the_nearest_bucket(size, bucket):
    assert nearest_bucket(*size, bucket_sizes(512)) == bucket


def test_a_bucket_batch_has_one_size_and_nothing_is_stretched(tmp_path):
    torch.manual_seed(0)
    stage = DecoderEncoders()
    stage.preprocess = type(stage.preprocess)(stage.preprocess.image_processor, None, 128, bucket_sizes(128))
    sizes = [(100, 100), (400, 100), (90, 90), (50, 200), (300, 80), (120, 110), (64, 256)]
    source = sources.folder(write_pictures(tmp_path / "set", sizes)).train
    table = encode(source, stage, tmp_path / "key", batch_size=2)
    shapes = [tuple(table.row(index)["latents"].shape) for index in range(7)]
    square, wide, upright = (4, 32, 32), (4, 16, 64), (4, 64, 16)
    assert shapes == [square, wide, square, upright, wide, square, upright]
    assert [tuple(shape) for shape in table.shapes()] == shapes
    cached = CachedFeatures(table, 0)
    sampler = StreamBatchSampler(7, 0, batch_size=3, total_steps=14, groups=cached.groups())
    seen = [index for visits in sampler for index, _ in visits]
    for visits in sampler:
        assert len({shapes[index] for index, _ in visits}) == 1
    assert set(seen) == set(range(7))
    assert torch.allclose(
        table.row(1)["latents"],
        stage.encode({name: value[None] for name, value in stage.preprocess(source[1].image(), None).items()})[
            "latents"
        ][0],
        atol=1e-4,
    )


def test_a_decoder_trains_on_buckets_and_resumes_exactly(tmp_path):
    folder = write_pictures(tmp_path / "set", [(100, 100), (400, 100), (50, 200)] * 4)
    settings = ["data=folder", f"data.path={folder}", "data.resolution=128", "data.buckets=true", "data.flip=true"]
    settings += ["validation.fraction=0.2", "trainer.batch_size=2", "tracker=none", "trainer.max_steps=4"]
    settings += ["validation.every=100", "validation.reconstructions=0"]
    whole = train(tmp_path, *settings, "name=whole")
    train(tmp_path, *settings, "name=parts", "trainer.max_steps=2")
    assert train(tmp_path, *settings, "name=parts") == whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.buckets=true", "data.cache=false"], "data.buckets: the sizes of all images"),
        (["data.buckets=true", "data.resolution=72"], "multiple of 64 with it, not 72"),
        (["data.on_error=ignore"], "data.on_error"),
        (["data.encode_workers=-1"], "data.encode_workers"),
    ],
)
def test_settings_that_cannot_be(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, *overrides)


# ---- the verb and the folder


def verb(root: Path, *overrides: str) -> None:
    small = [text for text in SMALL if text.startswith(("weights", "data"))]
    encode_verb(composed(root, *overrides, verb="encode", small=small))


def test_what_the_verb_encodes_a_run_finds(tmp_path, capfd):
    verb(tmp_path, "model=prior")
    out = capfd.readouterr()
    assert "encoding 12 images" in out.err
    assert "prior" in out.out
    train(tmp_path, "model=prior", "trainer.max_steps=1", "tracker=none")
    assert "encoding" not in capfd.readouterr().err


def test_tables_are_listed_and_removed(tmp_path, capsys):
    verb(tmp_path, "model=prior", "data.max_samples=4")
    verb(tmp_path, "data.max_samples=4")
    capsys.readouterr()
    verb(tmp_path, "list=true", "data=folder")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 + 1
    assert sum("prior" in line for line in lines) == sum("decoder" in line for line in lines) == 2
    name = next(line.split()[0] for line in lines if "prior" in line)
    verb(tmp_path, f"remove=[{name[:8]}]")
    assert "0.0 MB removed" in (out := capsys.readouterr().out) or "MB removed" in out
    assert len(catalog.entries(tmp_path / "cache")) == 3
    with pytest.raises(ConfigError, match="no encoded features are named zzz"):
        verb(tmp_path, "remove=[zzz]")
    verb(tmp_path, "remove=[all]")
    assert catalog.entries(tmp_path / "cache") == []
    assert "holds no encoded features" in capsys.readouterr().out


def test_a_beginning_that_several_tables_have_removes_none(tmp_path, capsys):
    for name in ("t1aa", "t1ab", "t1ab.partial", "t1abc", "t2"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        file = PROGRESS if name.endswith(".partial") else META  # those in the making are of an earlier version
        (tmp_path / "cache" / name / file).write_text(json.dumps({"images": 3, "stage": "prior", "source": "cats"}))
    before = {entry.name for entry in catalog.entries(tmp_path / "cache")}
    for name, several in (("t", 4), ("t1", 3)):
        listed = rf"{name} fits {several} of the tables(.|\n)*t1aa \(3 images.*prior cats"
        with pytest.raises(ConfigError, match=listed):
            verb(tmp_path, f"remove=[t2,{name}]")
        assert {entry.name for entry in catalog.entries(tmp_path / "cache")} == before
    capsys.readouterr()
    verb(tmp_path, "remove=[t1ab]")  # the whole name counts, though another begins with it
    said = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1] for line in said if line.startswith("removed")) == ["t1ab", "t1ab.partial"]
    verb(tmp_path, "remove=t1aa")
    verb(tmp_path, "remove=t1")
    assert [entry.name for entry in catalog.entries(tmp_path / "cache")] == ["t2"]


def test_the_command_that_a_message_gives_works_as_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for root in ("outputs", "plain", "a b, (c)", "it's=[1]"):
        folder = Path(root) / "cache" / "t0e12345678"
        folder.mkdir(parents=True)
        (folder / META).write_text('{"images": 1}')
        cli.main(shlex.split(removal(folder))[1:])
        assert not folder.exists()
    assert removal(Path("outputs/cache/t0e12345678")) == "kandinsky-exp encode 'remove=[t0e12345]'"


def test_one_name_needs_no_brackets(tmp_path):
    verb(tmp_path, "model=prior", "data.max_samples=4")
    first, second = catalog.entries(tmp_path / "cache")
    verb(tmp_path, f"remove={first.name[:8]}")
    assert [entry.name for entry in catalog.entries(tmp_path / "cache")] == [second.name]


def test_removing_all_leaves_nothing_behind(tmp_path):
    verb(tmp_path, "model=prior", "data.max_samples=4")
    folder = tmp_path / "cache"
    (folder / "t01.partial").mkdir()
    (folder / "t01.partial" / IMAGES).write_bytes(b"no progress was written yet")
    (folder / "null-x.part").write_bytes(b"half")
    (folder / ".files-abc").write_bytes(b"half")
    (folder / "mine.txt").write_text("not ours")
    with catalog.locked(folder / "null-y", print):  # another run is at it
        verb(tmp_path, "remove=[all]")
        left = {path.name for path in folder.iterdir() if not path.name.startswith("tiny-")}
        assert left == {"mine.txt", "null-y.lock"}
    verb(tmp_path, "remove=[all]")
    assert [path.name for path in folder.iterdir() if not path.name.startswith("tiny-")] == ["mine.txt"]


def test_a_table_in_the_making_is_not_removed(tmp_path):
    (tmp_path / "t01.partial").mkdir()
    (tmp_path / "t01.partial" / IMAGES).touch()
    with catalog.locked(tmp_path / "t01", print):
        for names in (["t01"], ["all"]):
            with pytest.raises(ConfigError, match="another process is encoding into t01; wait for it"):
                catalog.remove(tmp_path, names)
    assert [entry.about for entry in catalog.entries(tmp_path)] == ["not complete"]


def test_what_vanishes_meanwhile_is_not_listed(tmp_path):
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            for name in ("t01", "t02.partial"):
                (tmp_path / name).mkdir()
                for file in (IMAGES, META):
                    (tmp_path / name / file).touch()
                shutil.rmtree(tmp_path / name)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            catalog.listing(tmp_path)
    finally:
        stop.set()
        other.join()


def test_listing_needs_no_torch(tmp_path):
    command = "import sys; from kandinsky_exp import cli; cli.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command, "encode", "list=true"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-c", command, "encode", "remove=all"], cwd=tmp_path, check=True)


def test_the_last_use_is_that_of_the_last_run(tmp_path):
    verb(tmp_path, "model=prior", "data.max_samples=4")
    for entry in catalog.entries(tmp_path / "cache"):
        os.utime(tmp_path / "cache" / entry.name / META, (0, 0))
    train(tmp_path, "model=prior", "data.max_samples=4", "trainer.max_steps=1", "tracker=none")
    assert all(time.time() - entry.used < 600 for entry in catalog.entries(tmp_path / "cache"))


def test_the_verb_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["encode", "list=true"])
    assert "holds no encoded features" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["encode"])
    assert caught.value.code == 2
    assert "data.path: is not set" in capsys.readouterr().err


@pytest.fixture
def nothing_encoded(tmp_path):
    prepare(tmp_path, [])


@pytest.mark.usefixtures("nothing_encoded")
def test_two_sets_of_one_name_are_two_tables(tmp_path):
    for place, size in (("a", 16), ("b", 17)):
        (tmp_path / place).mkdir()
        folder = write_pictures(tmp_path / place / "pictures", [(size, size)] * 4)
        settings = ["data=folder", f"data.path={folder}", "data.resolution=64", "trainer.max_steps=1", "tracker=none"]
        train(tmp_path, *settings)
    assert len(catalog.entries(tmp_path / "cache")) == 2


@pytest.mark.usefixtures("nothing_encoded")
def test_a_warm_start_reads_no_image_and_a_changed_one_encodes_anew(tmp_path, capfd):
    folder = write_pictures(tmp_path / "set", [(16, 16)] * 6)
    run = ["model=prior", "data=folder", f"data.path={folder}", "data.resolution=64", "trainer.max_steps=1"]
    train(tmp_path, *run, "tracker=none")
    os.utime(folder / "3.png")  # touched, not changed
    train(tmp_path, *run, "tracker=none")
    assert len(catalog.entries(tmp_path / "cache")) == 1
    Image.new("RGB", (16, 16), "red").save(folder / "3.png")
    train(tmp_path, *run, "tracker=none")
    assert len(catalog.entries(tmp_path / "cache")) == 2


@pytest.mark.usefixtures("nothing_encoded")
def test_the_held_out_part_may_change_without_encoding_anew(tmp_path):
    folder = write_pictures(tmp_path / "set", [(16, 16)] * 8)
    run = ["model=prior", "data=folder", f"data.path={folder}", "data.resolution=64", "trainer.max_steps=1"]
    for fraction in (0, 0.25, 0.5):
        train(tmp_path, *run, "tracker=none", f"validation.fraction={fraction}")
    assert len(catalog.entries(tmp_path / "cache")) == 1
