"""Encoding once into a table: exact, atomic, mapped from disk, and equal to encoding on the fly."""

import json
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from encoders import PriorEncoders, captions, encode
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from kandinsky_exp.data import sources
from kandinsky_exp.data.buckets import bucket_sizes
from kandinsky_exp.data.encoded.cache import cache_key
from kandinsky_exp.data.encoded.encode_loop import EncodeSettings
from kandinsky_exp.data.encoded.layout import CAPTIONS, IMAGES, META, PLAN, part_folder
from kandinsky_exp.data.encoded.making import Making, Plan
from kandinsky_exp.data.encoded.parts import PartFacts, PartWriter
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.encoded.workers import collate
from kandinsky_exp.data.features import CachedFeatures, OnlineExamples, without_padding
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.sampler import StreamBatchSampler
from kandinsky_exp.errors import DataError
from kandinsky_exp.tiny import architecture


@pytest.fixture(scope="module")
def emoji():
    return sources.subset(sources.emoji(), 10, 0).train


@pytest.fixture
def captioned(tmp_path):
    """Five emoji with one, two or three captions."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    source, lines = sources.emoji().train, []
    for index in range(5):
        source[index].image().save(folder / f"{index}.png")
        texts = [f"picture {index}" + ", seen again" * number for number in range(index % 3 + 1)]
        lines.append(json.dumps({"file_name": f"{index}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return sources.folder(folder).train


def on_the_fly(source, stage, visits, seed=0):
    online = OnlineExamples(source, stage.preprocess, seed)
    batch = collate([online[visit] for visit in visits])
    return stage.encode(batch) | {"index": batch["index"]}


# ---- what comes back


def test_fp32_features_are_those_of_the_encoders_to_the_last_bit(prior, emoji, tmp_path):
    cached = CachedFeatures(encode(emoji, prior, tmp_path / "table", batch_size=5), seed=0)
    visits = [(index, 0) for index in range(5, 10)]
    stored, fresh = collate([cached[visit] for visit in visits]), on_the_fly(emoji, prior, visits)
    fresh["text_states"] = fresh["text_states"] * fresh["text_mask"].unsqueeze(-1)
    fresh = without_padding(fresh, fresh["text_mask"], prior.ragged_features)
    assert stored["text_states"].shape[1] < 77
    assert set(stored) == set(fresh) == {"image_embeds", "text_embeds", "text_states", "text_mask", "index"}
    for name in fresh:
        assert torch.equal(stored[name], fresh[name]), name
        assert stored[name].dtype == fresh[name].dtype


def test_latents_keep_their_shape(decoder, emoji, tmp_path):
    table = encode(emoji, decoder, tmp_path / "table", batch_size=5)
    fresh = on_the_fly(emoji, decoder, [(index, 0) for index in range(5)])
    assert table.row(0)["latents"].shape == (4, 16, 16)
    assert torch.equal(torch.stack([table.row(index)["latents"] for index in range(5)]), fresh["latents"])
    assert set(table.row(0)) == {"image_embeds", "latents"}
    assert captions(table, 0) == 0
    assert not (part_folder(table.folder, 0) / CAPTIONS).exists()


def test_fp16_features_are_rounded_once(prior, emoji, tmp_path):
    exact, half = (encode(emoji, prior, tmp_path / dtype, dtype) for dtype in ("fp32", "fp16"))
    for name in ("image_embeds", "text_embeds", "text_states"):
        assert half.row(3)[name].dtype == torch.float16
        assert torch.equal(half.row(3)[name], exact.row(3)[name].half())
    small, large = (part_folder(tmp_path / dtype, 0) / CAPTIONS for dtype in ("fp16", "fp32"))
    assert small.stat().st_size < 0.6 * large.stat().st_size


def test_every_image_and_every_caption_is_encoded_once(captioned, tmp_path):
    stage = PriorEncoders()
    table = encode(captioned, stage, tmp_path / "table")
    assert (stage.images, stage.captions) == (5, 1 + 2 + 3 + 1 + 2)
    assert [captions(table, index) for index in range(5)] == [1, 2, 3, 1, 2]
    for index in range(5):
        for number, text in enumerate(captioned[index].captions):
            expected = stage.encode(collate([stage.preprocess(None, text)]))["text_embeds"][0]
            assert torch.allclose(table.row(index, lambda _, number=number: number)["text_embeds"], expected, atol=1e-5)


def test_states_are_stored_and_read_up_to_the_mask(prior, captioned, tmp_path):
    table = encode(captioned, prior, tmp_path / "table")
    row = table.row(0)
    tokens = int(prior.preprocess(None, "picture 0")["text_mask"].sum())
    assert row["text_mask"].tolist() == [True] * tokens
    assert row["text_states"].shape == (tokens, 64)
    assert row["text_states"].abs().sum(dim=1).all()
    assert (part_folder(table.folder, 0) / CAPTIONS).stat().st_size < 9 * 77 * 64 * 4 / 2


def test_a_caption_of_full_length(prior, tmp_path):
    sources.emoji().train[0].image().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "cat " * 300}))
    row = encode(sources.folder(tmp_path).train, prior, tmp_path / "table").row(0)
    assert row["text_mask"].all()
    assert row["text_states"].shape == (77, 64)


def test_a_batch_is_as_long_as_its_longest_caption(prior, captioned, tmp_path):
    cached = CachedFeatures(encode(captioned, prior, tmp_path / "table"), 0)
    rows = [cached.plain(index) for index in range(5)]
    batch, lengths = collate(rows), [len(row["text_mask"]) for row in rows]
    assert batch["text_mask"].sum(1).tolist() == lengths
    assert batch["text_mask"].shape == batch["text_states"].shape[:2] == (5, max(lengths))
    assert torch.equal(batch["text_mask"], torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
    for row, states in zip(rows, batch["text_states"], strict=True):
        assert torch.equal(states[: len(row["text_mask"])], row["text_states"])
        assert not states[len(row["text_mask"]) :].any()


def test_ids_and_bounds(prior, captioned, tmp_path):
    table = encode(captioned, prior, tmp_path / "table")
    assert len(table) == 5
    assert [table.id(index) for index in range(len(table))] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert CachedFeatures(table, 0).id(3) == OnlineExamples(captioned, prior.preprocess, 0).id(3) == "3.png"
    for index, caption in ((5, 0), (-1, 0), (0, 1), (1, -1)):
        with pytest.raises(IndexError):
            table.row(index, lambda _, caption=caption: caption)


# ---- visits


def test_one_caption_is_drawn_per_visit_the_same_from_table_and_images(prior, captioned, tmp_path):
    table = encode(captioned, prior, tmp_path / "table")
    cached, online = CachedFeatures(table, 7), OnlineExamples(captioned, prior.preprocess, 7)
    seen = set()
    for epoch in range(12):
        for index in range(5):
            tokens = int(cached[index, epoch]["text_mask"].sum())
            assert tokens == int(online[index, epoch]["text_mask"].sum()) == cached.tokens((index, epoch))
            seen.add((index, tokens))
    assert len(seen) == 1 + 2 + 3 + 1 + 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_walks_the_stream_whatever_its_workers(prior, captioned, tmp_path, workers):
    cached = CachedFeatures(encode(captioned, prior, tmp_path / "table"), 0)
    sampler = StreamBatchSampler(len(cached), 0, batch_size=3, total_steps=4)
    batches = list(DataLoader(cached, batch_sampler=sampler, collate_fn=collate, num_workers=workers))
    assert [batch["index"].tolist() for batch in batches] == [[index for index, _ in visits] for visits in sampler]
    for visits, batch in zip(sampler, batches, strict=True):
        assert torch.equal(batch["text_states"], collate([cached[visit] for visit in visits])["text_states"])


def test_online_examples_read_only_what_the_encoders_need(decoder, emoji):
    example = OnlineExamples(emoji, decoder.preprocess, 0)[4, 0]
    assert {name: tuple(value.shape) for name, value in example.items()} == {
        "clip_pixels": (3, 64, 64),
        "pixels": (3, 64, 64),
        "index": (),
    }


def test_a_table_travels_to_workers_by_its_path(prior, captioned, tmp_path):
    table = encode(captioned, prior, tmp_path / "table")
    packed = pickle.dumps(CachedFeatures(table, 0))
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[2, 0]["text_states"], CachedFeatures(table, 0)[2, 0]["text_states"])


# ---- the folder


def test_a_table_is_made_once(captioned, tmp_path):
    stage, said = PriorEncoders(), []
    encode(captioned, stage, tmp_path / "cache" / "key", log=said.append)
    encode(captioned, stage, tmp_path / "cache" / "key", log=said.append)
    assert stage.images == 5
    assert said[0].startswith("encoding 5 images: 0.02 MB to write, about 0")
    assert said[1].startswith("encoded 5 images and 9 captions in 0")
    assert said[2].startswith("encoded features of 5 images found in ")
    assert len(said) == 3
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["key", "key.lock"]
    assert sorted(path.name for path in (tmp_path / "cache" / "key").iterdir()) == ["00000", PLAN, META]


def test_two_that_want_the_same_table_encode_it_once(captioned, tmp_path):
    class Slow(PriorEncoders):
        def encode(self, examples):
            time.sleep(0.5)
            return super().encode(examples)

    stage, said, tables = Slow(), [], []
    both = [
        threading.Thread(target=lambda: tables.append(encode(captioned, stage, tmp_path / "key", log=said.append)))
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(timeout=30)
    assert stage.images == 5
    assert torch.equal(tables[0].row(1)["image_embeds"], tables[1].row(1)["image_embeds"])
    assert any("other processes are encoding what is left" in text for text in said)


def test_a_failure_leaves_no_table_and_the_next_try_is_whole(captioned, tmp_path):
    class Failing(PriorEncoders):
        def encode(self, examples):
            if self.captions >= 4:
                raise RuntimeError("broken off")
            return super().encode(examples)

    with pytest.raises(RuntimeError, match="broken off"):
        encode(captioned, Failing(), tmp_path / "cache" / "key")
    assert not (tmp_path / "cache" / "key").exists()
    assert len(encode(captioned, PriorEncoders(), tmp_path / "cache" / "key")) == 5
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["key", "key.lock"]


def test_what_a_killed_process_left_is_not_a_table(captioned, tmp_path):
    (tmp_path / "key.partial").mkdir()
    (tmp_path / "key.partial" / IMAGES).write_bytes(b"ARROW1")
    assert len(encode(captioned, PriorEncoders(), tmp_path / "key")) == 5
    assert not (tmp_path / "key.partial").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [lambda t: cut(t / "00000" / IMAGES), lambda t: cut(t / META), lambda t: (t / "00000" / CAPTIONS).unlink()],
)
def test_a_damaged_table_is_made_again(captioned, tmp_path, damage):
    said = []
    encode(captioned, PriorEncoders(), tmp_path / "key")
    damage(tmp_path / "key")
    table = encode(captioned, PriorEncoders(), tmp_path / "key", log=said.append)
    assert "are damaged" in said[0]
    assert table.row(4, lambda _: 1)["text_states"].any()


def test_the_key_follows_all_that_the_table_depends_on():
    prior = Preprocess(architecture.image_processor(), architecture.tokenizer(), None)
    decoder = Preprocess(architecture.image_processor(), None, 64)
    half = EncodeSettings("fp16")
    keys = [
        cache_key("data", "encoder", prior, half),
        cache_key("other", "encoder", prior, half),
        cache_key("data", "other", prior, half),
        cache_key("data", "encoder", decoder, half),
        cache_key("data", "encoder", replace(decoder, buckets=bucket_sizes(64)), half),
        cache_key("data", "encoder", prior, EncodeSettings("fp32")),
        cache_key("data", "encoder", prior, EncodeSettings("fp16", mirrored=True)),
    ]
    assert len(set(keys)) == len(keys)
    # How fast it is encoded, and whether bad examples are forgiven, changes nothing in a table.
    assert cache_key("data", "encoder", prior, EncodeSettings("fp16", 64, workers=4, skip_bad=True)) == keys[0]
    assert all(key.isalnum() and len(key) == 32 and key[0] == "t" for key in keys)  # no beginning is a number


def prior_fingerprint(tokenizer):
    return Preprocess(None, tokenizer, None).fingerprint


def test_the_fingerprint_follows_the_tokenizers_rules_and_not_its_use():
    """That it is the same in another process: see test_start.py."""
    tokenizer = architecture.tokenizer()
    before = prior_fingerprint(tokenizer)
    Preprocess(None, tokenizer, None).tokenize(["a cat"])  # leaves truncation and padding in the tokenizer
    assert prior_fingerprint(tokenizer) == before
    prints = [before]
    for change in (lambda rules: rules["model"]["merges"].pop(), lambda rules: rules.update(normalizer=None)):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        change(rules)
        other = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(rules)),
            model_max_length=tokenizer.model_max_length,
            pad_token=tokenizer.pad_token,
        )
        assert other.get_vocab() == tokenizer.get_vocab()
        prints.append(prior_fingerprint(other))
    assert len(set(prints)) == 3


# ---- what cannot be encoded


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_without_a_workers_traceback(captioned, prior, tmp_path, workers):
    (tmp_path / "captioned" / "3.png").write_text("no picture")
    with pytest.raises(DataError) as caught:
        encode(captioned, prior, tmp_path / "key", workers=workers)
    assert "metadata.jsonl, line 4: image 3.png: not an image that Pillow can read" in str(caught.value)
    assert str(caught.value).count("\n") == 1
    assert "data.on_error=skip" in str(caught.value)
    assert not (tmp_path / "key").exists()


def test_workers_give_the_same_table(captioned, prior, tmp_path):
    alone, helped = (encode(captioned, prior, tmp_path / f"{count}", workers=count) for count in (0, 2))
    for index in range(5):
        assert torch.equal(alone.row(index)["image_embeds"], helped.row(index)["image_embeds"])


def test_a_missing_caption_is_named(prior, tmp_path):
    sources.emoji().train[0].image().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ""}')
    source = sources.folder(tmp_path).train
    with pytest.raises(DataError, match="line 1: an empty caption in 'text'"):
        encode(source, prior, tmp_path / "key")
    with pytest.raises(DataError, match="line 1: an empty caption in 'text'"):
        OnlineExamples(source, prior.preprocess, 0)[0, 0]


@pytest.mark.parametrize(("value", "cure"), [(1e6, "data.cache_dtype=fp32"), (float("nan"), "frozen_dtype=float32")])
def test_features_that_do_not_fit_the_dtype_are_refused(captioned, tmp_path, value, cure):
    class Wild(PriorEncoders):
        def encode(self, examples):
            features = super().encode(examples)
            if len(features.get("image_embeds", ())) == 4:
                features["image_embeds"][1, 7] = value
            return features

    with pytest.raises(DataError, match=f"1.png: image_embeds is not finite as fp16; .*{cure}"):
        encode(captioned, Wild(), tmp_path / "key", dtype="fp16")
    if np.isfinite(value):
        assert encode(captioned, Wild(), tmp_path / "key", dtype="fp32").row(1)["image_embeds"][7] == value


def test_padding_on_the_left_is_refused(captioned, tmp_path):
    stage = PriorEncoders()
    stage.preprocess.tokenizer.padding_side = "left"
    with pytest.raises(DataError, match="pads on the left"):
        encode(captioned, stage, tmp_path / "key")


# ---- cost


def anonymous_megabytes():
    """Mapped pages that were touched count as resident too, but are the page cache's (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def large_table(folder, rows):
    """A table of 100 KB a row, written without an encoder."""
    latents = np.random.default_rng(0).random((16, 4, 80, 80), np.float32)
    making = Making(folder, Plan(folder.name, "", rows, 16, rows), print)
    part = PartWriter(making.folder, PartFacts(folder.name, 0, 16, source_rows=rows, images=rows), "made")
    for start in range(0, rows, 16):
        columns = {
            "id": [f"{start + row}.png" for row in range(16)],
            "source_row": np.arange(start, start + 16),
            "latents": latents + np.float32(start),
        }
        part.append(IMAGES, columns)
    part.finish()
    making.join("latents", {"views": 1, "text_length": 0, "dtype": "fp32", "buckets": False})
    return latents


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    latents = large_table(tmp_path / "table", 1600)
    before = anonymous_megabytes()
    table = FeatureTable(tmp_path / "table")
    for index in (0, 15, 16, 799, 1599):
        expected = latents[index % 16] + np.float32(index // 16 * 16)
        assert np.array_equal(table.row(index)["latents"].numpy(), expected)
        assert table.id(index) == f"{index}.png"
    for index in range(len(table)):
        table.row(index)
    assert anonymous_megabytes() - before < 20


def test_rows_can_be_changed_without_changing_the_table(tmp_path):
    large_table(tmp_path / "table", 16)
    table = FeatureTable(tmp_path / "table")
    expected = table.row(3)["latents"].clone()
    table.row(3)["latents"].zero_()
    assert torch.equal(table.row(3)["latents"], expected)
