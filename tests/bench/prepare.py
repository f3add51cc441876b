"""What has to be there before anything is measured, made in a process of its own: it imports torch."""

from pathlib import Path
from typing import Any


def pipelines(folder: str) -> dict[str, Any]:
    """The bench-size pipelines."""
    from networks import write_pipelines

    write_pipelines(Path(folder))
    return {}
