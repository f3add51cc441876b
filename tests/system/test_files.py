"""Files and folders that are there whole or not at all."""

from pathlib import Path

import pytest

from kandinsky_exp.errors import cause_of, first_line
from kandinsky_exp.system import files


def write_half(file: Path) -> None:
    file.write_text("half")
    raise FileNotFoundError


def test_a_file_is_replaced_once_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    (tmp_path / ".a.json.part").write_text("left by a killed process")
    with files.replacing(target) as aside:
        aside.write_text("first")
        assert not target.exists()
    with pytest.raises(FileNotFoundError), files.replacing(target, ".1") as aside:
        write_half(aside)
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target], "nothing is left beside it"


def test_a_folder_is_replaced_once_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "step-1"
    for text in ("first", "second"):
        with files.replacing_folder(target) as aside:
            (aside / text).write_text(text)
    with pytest.raises(FileNotFoundError), files.replacing_folder(target) as aside:
        write_half(aside / "third")
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(target.parent.iterdir()) == [target]


def test_an_error_is_told_in_a_line() -> None:
    assert first_line(ValueError("\n one \n two")) == "one "
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * 999))) == 300
    assert cause_of(OSError(28, "No space left on device", "a")) == "No space left on device"
    assert cause_of(ValueError("one\ntwo")) == "one"
