"""What the hub says of a data set, before anything of it is fetched."""

from kandinsky_exp.data.formats.hub_rows import not_there
from kandinsky_exp.data.source_facts import Announced, AnnouncedSplits


def announced(
    name: str,
    split: str,
    validation_split: str | None,
    revision: str | None,
    subset: str | None = None,
    limit: int | None = None,
) -> AnnouncedSplits:
    """The splits and how many images they have.

    Args:
        subset: the configuration, where there are several.
        limit: of the images of each split.

    Raises:
        DataError: if it cannot be asked.
    """
    import datasets

    try:
        found = datasets.load_dataset_builder(name, subset, revision=revision).info.splits or {}
    except Exception as error:  # connection, hub, builder: the library has no common base class
        raise not_there(name, revision, subset, error) from error
    title = name if subset is None else f"{name}/{subset}"
    sizes = {key: min(filter(None, (value.num_examples, limit)), default=None) for key, value in found.items()}
    train, validation = (Announced(f"{title}/{key}", sizes.get(key or "")) for key in (split, validation_split))
    return AnnouncedSplits(train, validation if validation_split in sizes else None)
