"""Which files a part of Kandinsky 2.2 is read from, and what they hold."""

import contextlib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kandinsky_exp.errors import ConfigError, DataError, RunFailure, first_line
from kandinsky_exp.system.files import json_object

PICKLES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".msgpack", ".h5", ".hdf5", ".npy", ".npz"}
)
ZIP, HDF = b"PK\x03\x04", b"\x89HDF"  # torch.save writes a zip of pickles
PICKLED = "is a pickle or an archive, which can run code when it is loaded; remove it, or convert it to .safetensors"
PART_FILES = (".json", ".safetensors", ".txt", ".model")
STEMS = ("diffusion_pytorch_model", "model")  # of diffusers' weights and of transformers'
# A variant as a whole, its shards as libraries write them and as they did, and the index of these.
VARIANT = re.compile(
    r"(?P<stem>(diffusion_pytorch_)?model(-\d+-of-\d+)?)\.(?P<variant>[^.]+?)(?P<shard>-\d+-of-\d+)?\.safetensors"
)
INDEX = re.compile(r"(?P<stem>(diffusion_pytorch_)?model)\.safetensors\.index\.(?P<variant>[^.]+)\.json")
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of the format, in torch's names
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

SET_VARIANT = "set weights.variant="  # the way out where all is there, under other names
OBJECTS = {  # files with one JSON object, of the parts that are no networks
    "tokenizer": "tokenizer.json",
    "scheduler": "scheduler_config.json",
    "image_processor": "preprocessor_config.json",
}


def has_variant(folder: Path, variant: str | None) -> bool:
    return variant in variants(folder)


def variants(folder: Path) -> set[str]:
    """The variants that the weights of a part are there in, whole or in shards; the plain files are none."""
    found = (pattern.fullmatch(file.name) for file in folder.glob("*") for pattern in (VARIANT, INDEX))
    return {one["variant"] for one in found if one}


def without_variant(name: str) -> str:
    """The name that a file of a variant would have if it was of none."""
    if found := VARIANT.fullmatch(name):
        return f"{found['stem']}{found['shard'] or ''}.safetensors"
    found = INDEX.fullmatch(name)
    return f"{found['stem']}.safetensors.index.json" if found else name


def lacking(folder: Path, variant: str | None) -> str | None:
    """Why there is nothing to read a network from, or None."""
    if any(file.suffix == ".safetensors" for file in opened(folder, True, variant)):
        return None
    if others := sorted(variants(folder)):
        return f"has weights of the variant {' or '.join(others)} alone; {SET_VARIANT}{others[0]}"
    return alone(folder) or "has no .safetensors file"


def alone(folder: Path) -> str | None:
    """What is wrong with a folder that has pickles, and nothing that can be read in their place; or None."""
    if any(folder.glob("*.safetensors")) or not (found := _pickles(folder)):
        return None
    return f"has no .safetensors file, but '{found[0].name}': it {PICKLED}"


def untrusted(folder: Path) -> str | None:
    """What is wrong with a part's folder that came from anywhere, or None: pickles run code, shards may lead out.

    A pickle under a name of its own kind is never read, and no matter: see `passed_over`.
    """
    for file in _pickles(folder):
        if file.suffix in PART_FILES:
            return f"'{file.relative_to(folder.parent)}' {PICKLED}"
    if kernel := _kernel(folder / "config.json"):
        return f"'{folder.name}/config.json' asks for the code of '{kernel:.100}'; take that key out"
    for index in folder.glob("*.index*.json"):
        for name in _shard_names(index):
            if not _is_plain(name):
                return (
                    f"'{folder.name}/{index.name}' names '{name:.100}', which leads out of its folder; fetch it again"
                )
    return None


def passed_over(folders: Iterable[Path]) -> list[str]:
    """A line about the pickles in folders of parts, which are never read; none where there are none."""
    found = [str(file) for folder in sorted(set(folders)) for file in _pickles(folder)]
    if not found:
        return []
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return [f"passed over, and never read: '{found[0]}'{more}, which may run code where a pickle is loaded"]


def _pickles(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and is_pickle(file)]


def is_pickle(file: Path) -> bool:
    """By its name or, whatever that is, by how it begins."""
    if file.suffix.lower() in PICKLES:
        return True
    with file.open("rb") as content:
        start = content.read(9)
    if file.suffix == ".safetensors" and start[8:] == b"{":  # the length in front of it can look like anything
        return False
    return start.startswith((ZIP, HDF)) or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def _kernel(config: Path) -> str | None:
    """A repository whose code transformers would fetch and run, as the implementation of a model's attention."""
    values = json_object(config) or {}  # there is none, or loading will complain of it
    named = (str(value) for key, value in values.items() if key.endswith("attn_implementation"))
    return next((name for name in named if "/" in name), None)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and "\\" not in name


def opened(folder: Path, is_model: bool, variant: str | None) -> list[Path]:
    """The files that loading a part opens: a hub snapshot may hold other variants beside them, and pictures.

    Args:
        is_model: a network; else a tokenizer, an image processor or a scheduler.
        variant: such as `fp16`; the plain files count where the part has none of that name.
    """
    if not is_model:
        return sorted(path for ending in ("json", "txt", "model") for path in folder.glob(f"*.{ending}"))
    infix = f".{variant}" if has_variant(folder, variant) else ""
    singles = [folder / f"{stem}{infix}.safetensors" for stem in STEMS]
    indices = [folder / f"{stem}.safetensors.index{infix}.json" for stem in STEMS]
    files = [folder / "config.json", *singles, *indices, *(shard for index in indices for shard in _shards(index))]
    return [file for file in files if file.is_file()]


def _shards(index: Path) -> list[Path]:
    return [index.parent / name for name in _shard_names(index) if _is_plain(name)]


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or loading will complain of it
        return []


def fingerprint(files: Mapping[str, Sequence[Path]], memory: Path) -> str:
    """A hash of what the files of some parts hold, wherever they lie.

    Args:
        memory: folder where the hashes of large files are remembered, by size and time.

    Raises:
        ConfigError: one cannot be read.
    """
    from kandinsky_exp.data.file_hashes import FileDigests  # brings pyarrow, which a look at the config does not need

    paths = [str(file.absolute()) for some in files.values() for file in some]
    try:
        digests = iter(FileDigests(memory).required(f"weights {paths}", paths).to_pylist())
    except DataError as error:
        raise ConfigError(f"weights: {str(error).partition(';')[0]}; fetch or copy them again") from error
    total = hashlib.sha256()
    for part, some in files.items():
        for file in some:
            total.update(f"{part} {file.name} ".encode() + next(digests))
    return total.hexdigest()


# --- what is wrong with files, told without loading them


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name.

    Raises:
        ValueError: it is damaged, cut off or no such file.
        OSError: it cannot be read.
    """
    return {name: shape for name, (shape, _) in _entries(file).items()}


def bytes_to_cast(files: Iterable[Path], dtype: str) -> int:
    """Bytes of the tensors in safetensors files that are of another type than the one of torch's name.

    Raises:
        ValueError, OSError: as `header`.
    """
    found = (entry for file in files for entry in _entries(file).values())
    return sum(math.prod(shape) * BYTES.get(name, 1) for shape, name in found if TYPES.get(name) != dtype)


def _entries(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, the format's name of the type) by the tensor's name."""
    with _opened(file) as content:
        tensors = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 - it is no mapping
        return {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in tensors.items()}


def metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors; raises as `header` does."""
    with _opened(file) as content:
        return content.metadata() or {}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "np") as content:  # NumPy: the tensors are not read, and torch takes a second to import
            yield content
    except SafetensorError as error:
        raise ValueError(first_line(error)) from error


def damaged(folder: Path, variant: str | None) -> str | None:
    """What is wrong with the files that a network is read from, or None."""
    files = opened(folder, True, variant)
    for index in (file for file in files if ".index" in file.name):
        missing = [shard.name for shard in _shards(index) if not shard.is_file()]
        if missing:
            return f"'{folder.name}' lacks {missing[0]}, which {index.name} names"
    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            header(file)
        except (OSError, ValueError, RecursionError):
            return f"'{folder.name}/{file.name}' is damaged or cut off"
    return None


def unreadable(folder: Path) -> str | None:
    """What is wrong with a tokenizer, an image processor or a noise schedule, or None."""
    name = OBJECTS[folder.name.removeprefix("prior_")]
    if name == "tokenizer.json" and not (folder / name).is_file():
        if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
            return f"'{folder.name}' has no vocabulary ({name}, or vocab.json and merges.txt)"
        name = "vocab.json"
    return None if _is_object(folder / name) else f"'{folder.name}/{name}' cannot be read"


def _is_object(file: Path) -> bool:
    """Whether a file holds one JSON object. A vocabulary takes long to read, and every check of a run looks at it."""
    try:
        facts = file.stat()
    except OSError:
        return False
    return _holds_object(file, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _holds_object(file: Path, *_changes: int) -> bool:
    return json_object(file) is not None


# --- what was written


def written(folder: Path) -> set[str]:
    """Names of the tensors in a folder's safetensors files, read back from their headers."""
    return {name for file in folder.glob("*.safetensors") for name in header(file)}


def refuse_other_names(found: Iterable[str], bare: Iterable[str], what: Path | str) -> None:
    """Refuse names of tensors that are not those of the bare network.

    Raises:
        RunFailure: something wrapped the network, `torch.compile` for example, and its names with it.
    """
    found, bare = set(found), set(bare)
    if found == bare:
        return
    strange, missing = sorted(found - bare), sorted(bare - found)
    example = f"such as {strange[0]}" if strange else f"of which {missing[0]} is missing"
    raise RunFailure(
        f"{what} does not hold the network as it is: {len(strange or missing)} of its tensors have other names, "
        f"{example}. Nothing could load it or go on from it. Something has wrapped the network: look for ACCELERATE_… "
        "variables and for a file of `accelerate config` that this runner does not know"
    )
