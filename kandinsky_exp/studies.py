"""Where Optuna keeps a study: in a journal in the sweep's folder, or in a data base."""

from typing import TYPE_CHECKING

from kandinsky_exp.errors import ConfigError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

MISSING = 'hydra/sweeper: optuna is not installed; pip install "kandinsky-exp[sweep]"'


def storage(place: str) -> "BaseStorage":
    """The storage at a data base's URL, or in a journal file, which parallel jobs may share over a network's disk too.

    Raises:
        ConfigError: Optuna is not installed, or the data base cannot be used.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError(MISSING) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" not in place:
        return optuna.storages.JournalStorage(JournalFileBackend(place))
    try:
        return optuna.storages.RDBStorage(place)
    except Exception as error:  # a driver, a server or a schema: whatever it is
        raise ConfigError(f"hydra.sweeper.storage: cannot be used ({error}); correct it, or leave it out") from error
