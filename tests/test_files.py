"""The function that writes all files: what it replaces, writes into and leaves behind.

No test names a device, since a faulty function would replace it where tests run as root.
"""

import os
import socket
import threading
import time

import pytest

from minidvae import files
from minidvae.files import atomic_write, write_text


def test_a_pipe_is_written_into(tmp_path):
    """Fails if a pipe is replaced by a file, so that its reader waits for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    write_text(pipe, "é" * 100_000)  # This is more than the buffer of a pipe holds.
    reader.join(10)
    assert received == ["é" * 100_000]
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("target_exists", [True, False])
def test_the_target_of_a_link_is_replaced(target_exists, tmp_path):
    """Fails if a link to a file in another folder is replaced by a file, if the file that it points
    to stays as it was, or if the temporary file has another suffix."""
    target = tmp_path / "elsewhere" / "a"
    link = tmp_path / "link.json"
    target.parent.mkdir()
    if target_exists:
        target.write_text("old")
    link.symlink_to("elsewhere/a")
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert temporary.suffix == ".json"
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert len(list(tmp_path.rglob("*"))) == 3


def test_written_to_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Fails if a file is renamed before its content is on disk: a crash of the machine could leave
    an empty file under the name."""
    operations = []

    def note_size(file_descriptor):
        operations.append(os.fstat(file_descriptor).st_size)

    monkeypatch.setattr(files.os, "fsync", note_size)
    monkeypatch.setattr(files.os, "replace", lambda *_: operations.append("renamed"))
    write_text(tmp_path / "a.txt", "1234")
    assert operations == [4, "renamed"]


def test_two_writers_with_one_process_id(tmp_path):
    """Fails if two processes of two machines or containers, whose ids may be equal, write to one
    temporary file."""
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        assert first.parent == second.parent == tmp_path
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["folder", "missing/a.txt", "file/a.txt", "socket"])
def test_errors_name_the_file(name, tmp_path, monkeypatch):
    """Fails if an error names the temporary file instead of the user's file, or if the temporary
    file is left behind."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)  # The path of a socket must be short.
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    with pytest.raises(OSError) as error:
        write_text(tmp_path / name, "text")
    assert error.value.filename == str(tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file", "socket"}


class FileOnFullDisk:
    """A file that takes half of each line."""

    name = "log.jsonl"

    def fileno(self) -> int:
        return 0

    def write(self, line: bytes) -> int:
        return len(line) // 2


def test_a_line_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    """Fails if training goes on after a full disk took half of a line, or if the error names no
    file."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)
    with pytest.raises(OSError, match="No space left") as error:
        files.append_line(FileOnFullDisk(), "{}")
    assert error.value.filename == "log.jsonl"


def set_age(path, seconds: float) -> None:
    modified = time.time() - seconds
    os.utime(path, (modified, modified))


def test_leftovers_of_killed_processes(tmp_path, monkeypatch):
    """Fails if the temporary files of a killed process stay for ever, or if those of a running
    process or other files of the user are removed."""
    abandoned = 2 * files.SECONDS_UNTIL_ABANDONED
    for name, age in (
        (".a.txt.12345678", abandoned),
        (".a.txt.87654321", 0),
        (".b.txt", abandoned),
    ):
        (tmp_path / name).write_text("half")
        set_age(tmp_path / name, age)
    write_text(tmp_path / "a.txt", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".a.txt.87654321", ".b.txt"}
    (tmp_path / "packing-1" / "corpus").mkdir(parents=True)
    (tmp_path / "packing-2").mkdir()
    set_age(tmp_path / "packing-1", abandoned)
    files.remove_abandoned(tmp_path, "packing-*")
    assert not (tmp_path / "packing-1").exists()
    assert (tmp_path / "packing-2").exists()
