"""No garbage is sought while modules are imported."""

import gc
import subprocess
import sys

from kandinsky_exp.system import garbage


def test_the_search_waits_and_goes_on() -> None:
    assert gc.isenabled()
    with garbage.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage.uncollected():
            pass
        assert not gc.isenabled()  # as it was found
    finally:
        gc.enable()


def test_what_is_imported_first_is_never_sought_through_and_what_comes_later_is() -> None:
    program = """
import gc
from kandinsky_exp.system import garbage
with garbage.uncollected():
    import json
first = gc.get_freeze_count()
kept = [[] for _ in range(1000)]
with garbage.uncollected():
    pass
print(first > 0, gc.get_freeze_count() == first)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
