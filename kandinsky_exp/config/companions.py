"""Check the settings of pictures that belong to pictures: holes and hints."""

from collections.abc import Iterator
from typing import Any

from kandinsky_exp.errors import cut
from kandinsky_exp.system.files import is_folder

HINT_COLUMN = "hint"  # where none is named
WITH = {"hole": "inpaint", "hint": "control"}  # which stage reads them


def problems(good: dict[str, Any], stage: Any) -> Iterator[tuple[str, str]]:
    """(key, what is wrong; what to do).

    Args:
        good: dotted keys whose values are well-formed.
        stage: gives the stage's class, None where the config names none that is good.
    """
    for name, model in WITH.items():
        folder, column = good.get(f"data.{name}s"), good.get(f"data.{name}_column")
        is_chosen = good.get("data.hint") == "column" if name == "hint" else column is not None
        given = [key for key in (f"{name}s", f"{name}_column") if good.get(f"data.{key}") and key != "hint_column"]
        given += ["hint"] if name == "hint" and is_chosen else []
        given += ["hint_column"] if name == "hint" and column not in (None, HINT_COLUMN) else []
        if not given or (made := stage()) is None:
            continue
        settings = {key.removeprefix("data."): value for key, value in good.items() if key.startswith("data.")}
        reads = made.companions({**settings, "hint": "column"})
        if name not in reads:
            yield f"data.{given[0]}", f"model={made.name} reads no {name}s; take model={model}, or leave it out"
        elif name == "hint" and not is_chosen:
            yield f"data.{given[0]}", "is set, but data.hint=canny draws hints from the pictures; set data.hint=column"
        elif {"hints", "hint_column"} <= set(given):
            yield "data.hints", "and data.hint_column are both set; give one of them"
        elif name == "hole" and folder is not None and is_chosen:
            yield "data.holes", "and data.hole_column are both set; give one of them"
        elif folder is None and column is None:
            yield f"data.{name}s", f"is not set; give the folder with a {name} for each picture"
        elif folder is not None and not is_folder(folder):
            yield f"data.{name}s", f"'{cut(folder)}' is no folder; give the one with a {name} for each picture"
