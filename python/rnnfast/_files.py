"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat

__all__ = ["replace_file"]


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` into the file at `path` so that at every moment it has all of the old or all of the new content.

    Of a link, the target is replaced. OSError where that cannot be done; what is there and no regular file is left alone.
    """
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"path: expected an existing directory, got {directory!r}")
    temporary = os.path.join(directory, f".rnnfast-{secrets.token_hex(8)}.tmp")
    if os.path.exists(path) and not (os.path.isfile(path) and os.access(path, os.W_OK)):
        raise PermissionError(f"path: expected a regular file that may be written, got {path!r}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)  # less the umask, as for any new file
    try:
        with os.fdopen(descriptor, "wb") as file:
            if os.path.exists(path):
                os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_directory(directory)


def _sync_directory(directory: str) -> None:
    """Make the new name last over a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse; the file itself is safe
        pass
    finally:
        os.close(descriptor)
