"""What the `.npz` files of this project have in common: draft traces, and the weights of a controller."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from wisp_plugin.errors import ConfigError

SUFFIX = ".npz"
# What numpy, zipfile and a look at the arrays raise for a file that is damaged, cut off or of another kind. A file that
# is not there is a FileNotFoundError, which has to be caught in front of these.
DAMAGED = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError, ArithmeticError, LookupError,
    ValueError, TypeError, AttributeError, AssertionError,
)  # fmt: skip


def check_out_file(path: Path) -> None:
    """Refuse a file to write to that cannot become one, before the work for it begins.

    The suffix must be there: numpy would add it, and write another file than the one that was named.

    Raises:
        ConfigError: the name does not end with `.npz`, it is a folder, or its folder does not exist.
    """
    if path.suffix != SUFFIX:
        raise ConfigError(f"the output file is {str(path)!r}; allowed: a file name that ends with {SUFFIX}")
    if path.is_dir():
        raise ConfigError(f"the output file {path} is a folder; allowed: a file name that ends with {SUFFIX}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {path} does not exist")


def cannot_write(path: Path, error: OSError) -> ConfigError:
    """The one line for a file that could not be written."""
    return ConfigError(f"cannot write {path}: {error.strerror or error}")
