"""What the stages encode, with the real encoders at tiny size and nothing else of a stage."""

import json
import shutil

import numpy as np
import torch

from kandinsky_exp.data.encoded.cache import encode_table
from kandinsky_exp.data.encoded.columns import ColumnWriter, MappedColumns, head_checksum
from kandinsky_exp.data.encoded.encode_loop import EncodeSettings
from kandinsky_exp.data.encoded.layout import CAPTION_ROWS, CAPTIONS, IMAGES, META, part_folder
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.tiny import architecture


class PriorEncoders:
    """What the prior stage encodes, with the real encoders at tiny size. Counts the rows it saw."""

    def __init__(self):
        self.preprocess = Preprocess(architecture.image_processor(), architecture.tokenizer(), None)
        self.ragged_features = ("text_states",)
        self.image_encoder = architecture.image_encoder().eval()
        self.text_encoder = architecture.text_encoder().eval()
        self.images = self.captions = 0

    @torch.no_grad()
    def encode(self, examples):
        features = {}
        if "clip_pixels" in examples:
            features["image_embeds"] = self.image_encoder(examples["clip_pixels"]).image_embeds
            self.images += len(features["image_embeds"])
        if "input_ids" in examples:
            output = self.text_encoder(examples["input_ids"])
            features |= {"text_embeds": output.text_embeds, "text_states": output.last_hidden_state}
            features["text_mask"] = examples["text_mask"]
            self.captions += len(output.text_embeds)
        return features


class DecoderEncoders:
    """What the decoder stage encodes."""

    def __init__(self):
        self.preprocess = Preprocess(architecture.image_processor(), None, 64)
        self.ragged_features = ("latents",)
        self.image_encoder = architecture.image_encoder().eval()
        self.movq = architecture.movq().eval()

    @torch.no_grad()
    def encode(self, examples):
        return {
            "image_embeds": self.image_encoder(examples["clip_pixels"]).image_embeds,
            "latents": self.movq.encode(examples["pixels"]).latents,
        }


def encode(source, stage, folder, dtype="fp32", batch_size=4, log=lambda text: None, **how):
    return encode_table(source, stage, folder, EncodeSettings(dtype, batch_size, **how), log)


def captions(table, index):
    """How many encoded captions an image has."""
    counts = [0]  # a table without text is not asked to choose
    table.row(index, lambda count: counts.append(count) or 0)
    return counts[-1]


def as_earlier(folder, target, without=()):
    """Make a table of one part what a version without parts would have written, in `target`.

    Args:
        without: columns of images, from before these were stored.
    """
    part, meta = part_folder(folder, 0), json.loads((folder / META).read_text())
    target.mkdir()
    if meta["captions"]:
        shutil.copy(part / CAPTIONS, target / CAPTIONS)
    mapped = MappedColumns(part / IMAGES)
    rows = [mapped.row(row) for row in range(len(mapped))]
    for row in rows:
        owned = row.pop(CAPTION_ROWS, np.zeros(1, np.int64)[:0])
        assert (np.diff(owned) == 1).all(), "captions that occur twice were stored twice"
        row |= {"caption_start": np.int64(owned[0] if len(owned) else 0), "caption_count": np.int64(len(owned))}
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in without}
    writer = ColumnWriter(target / IMAGES)
    writer.append({name: column if name == "id" else np.stack(column) for name, column in columns.items()})
    writer.close()
    files = [file for file in (IMAGES, CAPTIONS) if (target / file).exists()]
    facts = {name: meta[name] for name in meta if name not in ("parts", "part_rows")} | {"format": 2, "columns": 5}
    facts["bytes"] = {name: (target / name).stat().st_size for name in files}
    facts["heads"] = {name: head_checksum(target / name) for name in files}
    (target / META).write_text(json.dumps(facts, indent=1))
    shutil.rmtree(folder)
