"""Files that are written completely or not at all, and checkpoints that are read safely."""

import errno
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

SECONDS_UNTIL_ABANDONED = 24 * 3600  # age at which a temporary file is one of a killed process


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not one that is expected. The message is one line: the file,
    what is wrong, what was expected."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, which takes the name `path` once everything is written.

    Where `path` is a link, the file that it points to is replaced. What is no regular file (a pipe,
    a device) is written into. Raises OSError naming `path`.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    try:
        is_special = target.exists() and not target.is_file()
        folder = Path(tempfile.gettempdir()) if is_special else target.parent
        prefix = f".{target.name}."
        remove_abandoned(folder, f"{prefix}*")
        temporary = folder / f"{prefix}{uuid.uuid4().hex[:8]}{path.suffix}"
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            if is_special:
                with open(temporary, "rb") as source, open(path, "wb") as destination:
                    shutil.copyfileobj(source, destination)
            else:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, target)
        finally:
            with suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove temporary files and folders that a killed process left behind a day ago or earlier."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > SECONDS_UNTIL_ABANDONED:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    """Write `content` as JSON, in which numbers that are not finite are null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_text(path, json.dumps(finite, indent=1, allow_nan=False))


def append_line(file: BinaryIO, text: str) -> None:
    """Append a line to an unbuffered file in one write, and flush it to disk. Raises OSError naming
    the file."""
    line = f"{text}\n".encode()
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu"):
    """Read a file that torch.save wrote, without running code from it. Raises CheckpointError where
    it is none."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # The unpickler raises anything for a file that is not its own.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason})") from None
