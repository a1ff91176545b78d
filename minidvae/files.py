"""Files that are written whole: to a temporary file beside, then renamed. And a log, to which lines are appended."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import torch

TEMPORARY = (
    ".[0-9]*-" + 8 * "[0-9a-f]" + "-*"
)  # names of temporary files: process id, random number, name


@contextmanager
def in_use(path: str | Path, must: bool = False) -> Iterator[None]:
    """Lock a temporary file or folder while it is made, so that `remove_leftovers` sees that its process lives. `must`:
    OSError where another process has locked it, or the file system has no locks."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with suppress(*(() if must else (OSError,))):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@lru_cache
def remove_leftovers(folder: Path, pattern: str = TEMPORARY) -> None:
    """Remove the temporary files and folders of killed processes from a folder, once in a process."""
    for path in folder.glob(pattern):
        with suppress(OSError), in_use(path, must=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """The path to write to instead of `path`, which takes that name once all is written without an error and on disk.
    Where `path` is a link, what it points to is replaced. What is no regular file (a pipe, a device, /dev/stdout) is
    written into, all at once. OSError names `path`."""
    path = Path(path)
    target = Path(os.path.realpath(path))
    try:
        stream = _stream(path)
        folder = target.parent if stream is None else Path(tempfile.gettempdir())
        remove_leftovers(folder)
        beside = Path(
            folder, f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}"
        )  # writers go by the suffix
        beside.touch(exist_ok=False)
        try:
            with in_use(beside), open(beside, "rb") as written:
                yield beside
                if stream is None:
                    os.fsync(written.fileno())
                    os.replace(beside, target)
                else:
                    sys.stdout.flush()
                    with open(stream, "wb", closefd=stream is path) as into:
                        shutil.copyfileobj(written, into)
        finally:
            with suppress(OSError):
                beside.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _stream(path: Path) -> Path | int | None:
    """What to open to write into `path` where it cannot be replaced: itself, or, where it is what standard output goes
    to, the number of that, to go on where printing stopped. None for regular files and where there is nothing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    with suppress(OSError):  # there is no standard output
        if os.path.samestat(status, os.fstat(1)):
            return 1
    return None if stat.S_ISREG(status.st_mode) else path


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    """`content` as JSON, in which what is not a finite number is null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_text(path, json.dumps(plain, indent=1, allow_nan=False))


def lock(file: BinaryIO) -> bool:
    """Whether no other process has locked an open file, which then is locked until it is closed or this process ends.
    A file system without locks gives it to every process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def append_line(file: BinaryIO, text: str) -> None:
    """Append a line to an unbuffered file, in one write, and flush it to disk. OSError names the file."""
    line = f"{text}\n".encode()
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


class CheckpointError(ValueError):
    """One line: the file, what is wrong, what would be right."""


def unpickle(path: Path, device: str | torch.device = "cpu"):
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises anything for a file that is not its own
        reason = (
            str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        )
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({reason})") from None


def check_parameters(
    expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor], source: str = ""
) -> None:
    """Raises CheckpointError naming the first key, shape or kind of number of `given` that is not as expected. Or where
    `given` has fewer numbers than its shapes say: in a file, one number can stand for a tensor of any size."""
    for key, value in expected.items():
        if key not in given:
            raise CheckpointError(
                f"{source}parameter {key!r} is missing; is it another model's checkpoint?"
            )
        if given[key].shape != value.shape:
            shapes = f"{tuple(given[key].shape)}, expected {tuple(value.shape)}"
            raise CheckpointError(f"{source}parameter {key!r} has shape {shapes}")
        if (
            given[key].layout != value.layout
            or given[key].is_floating_point() != value.is_floating_point()
        ):
            raise CheckpointError(
                f"{source}parameter {key!r} is {given[key].dtype}, expected {value.dtype}"
            )
    if extra := sorted(set(given) - set(expected), key=str):
        raise CheckpointError(f"{source}parameter {extra[0]!r} belongs to no part of this model")
    stored = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in given.values()
    }
    if sum(value.nbytes for value in given.values()) > sum(stored.values()):
        raise CheckpointError(f"{source}holds fewer numbers than its parameters have")


load_checkpoint = unpickle
