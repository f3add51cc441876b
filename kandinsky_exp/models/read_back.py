"""What was written is read back: the header of a file tells in a moment whose tensors it holds."""

from collections.abc import Iterable
from pathlib import Path

from kandinsky_exp.errors import RunFailure
from kandinsky_exp.models import weight_files


def written(folder: Path) -> set[str]:
    """Names of the tensors in a folder's safetensors files."""
    return {name for file in folder.glob("*.safetensors") for name in weight_files.header(file)}


def check(found: Iterable[str], bare: Iterable[str], what: Path | str) -> None:
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
