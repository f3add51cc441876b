"""What a setting has to be beyond its type, as annotations of the schema."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Rule:
    """What a value has to be beyond its type; `wants` goes on from "has to be"."""

    holds: Callable[[Any], bool]
    wants: str


def at_least(low: int) -> Rule:
    return Rule(lambda value: math.isfinite(value) and value >= low, f"at least {low}")


def _is_folder_name(text: str) -> bool:
    return text.strip() == text and text not in ("", ".", "..") and not set(text) & set('/\\:*?"<>|\n')


ABOVE_ZERO = Rule(lambda value: math.isfinite(value) and value > 0, "above 0")
FINITE = Rule(math.isfinite, "finite")
FRACTION = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
BETAS = Rule(
    lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas), "two of them, each at least 0 and below 1"
)
SIDE = Rule(lambda value: value > 0 and value % 8 == 0, "a multiple of 8, such as 512 or 768")
SEED = Rule(lambda value: 0 <= value < 2**32, "between 0 and 2^32 - 1")
PORT = Rule(lambda value: 0 < value < 2**16, "between 1 and 65535")
FILLED = Rule(lambda text: text.strip() != "", "something other than nothing")
MODULE = Rule(
    lambda text: all(part.isidentifier() for part in text.split(".")), "the name of a module, as it is imported"
)
MODEL_NAME = Rule(lambda text: text.strip() != "" and not set(text) & set("/:"), "a name without / and :")
FOLDER_NAME = Rule(_is_folder_name, 'without any of / \\ : * ? " < > |')

Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
Steps = Annotated[int, at_least(2)]  # the prior's noise schedule divides by one less
Positive = Annotated[float, ABOVE_ZERO]
PositiveOrZero = Annotated[float, at_least(0)]
Number = Annotated[float, FINITE]
Text = Annotated[str, FILLED]
Seed = Annotated[int, SEED]
Port = Annotated[int, PORT]
Side = Annotated[int, SIDE]
Name = Annotated[str, FOLDER_NAME]
Prompts = list[Text] | Text
Names = list[Text] | Text
Modules = list[Annotated[str, MODULE]]
