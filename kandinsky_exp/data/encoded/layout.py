"""Names of files in the folder of encoded features, and commands about them. Imports no torch."""

import shlex
from pathlib import Path

from kandinsky_exp.system import files

IMAGES, CAPTIONS = "images.arrow", "captions.arrow"
META = "table.json"  # the manifest of a complete table
PLAN = "plan.json"  # how a table is divided; there from its beginning
PART = "part.json"  # of a complete part
PROGRESS = "progress.json"  # of tables in the making of earlier versions
CAPTION_ROWS = "caption_rows"  # the column that says which captions of its part an image has
PARTIAL = ".partial"
# How files become pixels, and names examples; 1 knew no colour profiles. Tables of other rules are not used any more.
PICTURE_RULES = 2
MASK = "text_mask"  # which tokens of a caption count: what the encoders read, and training
DEFAULT_ROOT = Path("outputs")


def partial(folder: Path) -> Path:
    """Where a table is made."""
    return folder.with_name(f"{folder.name}{PARTIAL}")


def part_folder(table: Path, number: int) -> Path:
    """Of a part of a table, complete or in the making."""
    return table / f"{number:05d}"


def removal(folder: Path) -> str:
    """The command that removes a table, as a shell takes it."""
    names = shlex.quote(f"remove=[{folder.name[:8]}]")
    return command(folder, names) if folder.parent.parent != DEFAULT_ROOT else f"kandinsky-exp encode {names}"


def cure(folder: Path) -> str:
    """What to do about damaged files in a folder: of one part, or of a table that has none."""
    if (folder / PART).exists() or folder.name.isdecimal():
        return f"remove {shlex.quote(str(folder))} and give the command again: that part alone will be encoded again"
    return f"remove the table with `{removal(folder)}`, and it will be encoded again"


def command(folder: Path, what: str = "list=true") -> str:
    """What to type about a table, or about all that lie beside it."""
    return f"kandinsky-exp encode {what} {files.setting('output_root', folder.parent.parent)}"
