"""What lies where in the folder of encoded features; nothing here needs torch, and listing them is quick."""

import re
import shlex
from pathlib import Path

IMAGES, CAPTIONS = "images.arrow", "captions.arrow"
META = "table.json"  # of a complete table
PROGRESS = "progress.json"  # of one in the making
# How files become pixels, and names examples; 1 knew no colour profiles. Tables of other rules are not used any more.
PICTURE_RULES = 2
DEFAULT_ROOT = Path("outputs")


def removal(folder: Path) -> str:
    """The command that removes a table, as a shell takes it."""
    words = ["kandinsky-exp", "encode", f"remove=[{folder.name[:8]}]"]
    root = folder.parent.parent
    if root != DEFAULT_ROOT:
        plain = re.fullmatch(r"[\w./~-]+", str(root))
        value = str(root) if plain else "'{}'".format(str(root).replace("\\", "\\\\").replace("'", "\\'"))
        words.append(f"output_root={value}")
    return " ".join(map(shlex.quote, words))
