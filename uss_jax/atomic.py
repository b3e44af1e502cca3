"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from uss_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`; it takes `path`'s place when the block succeeds.

    When the block fails, the temporary file goes and what was at `path` stays as it was. An
    operating system's refusal (no space, no permission, no such folder) becomes a UserError.
    """
    path = pathlib.Path(path)
    # Writers choose their format by the suffix; the process id keeps two runs apart.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror or error}); choose a folder that "
            "exists, may be written to and has space left"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
