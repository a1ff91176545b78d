"""The writer of all files: what it replaces, what it writes into, what it leaves behind. No test names a device, since
a writer that is wrong would replace it where tests run as root."""

import os
import socket
import threading
import time

import pytest

from minidvae import files
from minidvae.files import atomic_write, write_text


def test_a_pipe_is_written_into(tmp_path):
    """A pipe is replaced by a file, so that who reads it waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    received = []
    reader = threading.Thread(
        target=lambda: received.append((tmp_path / "pipe").read_text()), daemon=True
    )
    reader.start()
    write_text(tmp_path / "pipe", "é" * 100_000)  # more than a pipe holds
    reader.join(10)
    assert received == ["é" * 100_000] and (tmp_path / "pipe").is_fifo()
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


@pytest.mark.parametrize("there", [True, False])
def test_the_target_of_a_link_is_replaced(there, tmp_path):
    """A link to a file elsewhere is replaced by a file, what it points to stays as it was, or its suffix is lost."""
    (tmp_path / "elsewhere").mkdir()
    if there:
        (tmp_path / "elsewhere/a").write_text("old")
    (tmp_path / "link.json").symlink_to("elsewhere/a")
    with atomic_write(tmp_path / "link.json") as beside:
        beside.write_text("new")
    assert beside.suffix == ".json" and (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "elsewhere/a").read_text() == "new" and len(list(tmp_path.rglob("*"))) == 3


def test_written_to_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """A crash of the machine leaves an empty file under the name, since it was renamed before it was on disk."""
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda number: done.append(os.fstat(number).st_size))
    monkeypatch.setattr(files.os, "replace", lambda *_: done.append("renamed"))
    write_text(tmp_path / "a.txt", "1234")
    assert done == [4, "renamed"]


def test_two_writers_with_one_process_id(tmp_path):
    """Two processes of two machines or containers, whose ids may be equal, write to one temporary file."""
    with atomic_write(tmp_path / "a.txt") as first, atomic_write(tmp_path / "a.txt") as second:
        assert first != second and first.parent == second.parent == tmp_path
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a.txt").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["folder", "missing/a.txt", "file/a.txt", "socket"])
def test_errors_name_the_file(name, tmp_path, monkeypatch):
    """The error names a temporary file instead of what the user named, or one is left behind."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    with pytest.raises(OSError) as error:
        write_text(tmp_path / name, "text")
    assert error.value.filename == str(tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file", "socket"}


def test_a_line_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    """A full disk takes half of a line, and training goes on as if it had the whole; or the error names no file."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)

    class Full:
        name = "log.jsonl"
        fileno = lambda _: 0  # noqa: E731

        def write(self, line: bytes) -> int:
            return len(line) // 2

    with pytest.raises(OSError, match="No space left") as error:
        files.append_line(Full(), "{}")
    assert error.value.filename == "log.jsonl"


def test_leftovers_of_killed_processes(tmp_path, monkeypatch):
    """What a killed process left stays for ever; or what a living one writes is removed, or files of the user."""
    day = files.SECONDS_UNTIL_ABANDONED
    for name, age in ((".a.txt.12345678", 2 * day), (".a.txt.87654321", 0), (".b.txt", 2 * day)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_text(tmp_path / "a.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".a.txt.87654321", ".b.txt"}
    (tmp_path / "packing-1" / "corpus").mkdir(parents=True)
    (tmp_path / "packing-2").mkdir()
    os.utime(tmp_path / "packing-1", (time.time() - 2 * day,) * 2)
    files.remove_abandoned(tmp_path, "packing-*")
    assert not (tmp_path / "packing-1").exists() and (tmp_path / "packing-2").exists()
