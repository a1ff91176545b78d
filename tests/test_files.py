"""The writer of all files: what it replaces, what it writes into, what it leaves behind. No test names a device, since
a writer that is wrong would replace it where tests run as root."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

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


@pytest.mark.parametrize("into", ["a file", "a pipe"])
def test_standard_output_is_written_into(into, tmp_path):
    """A link to standard output, as /dev/stdout is, or the file that it goes to, is replaced, or printed lines are lost
    or in another order."""
    link = tmp_path / "link"
    link.symlink_to("/proc/self/fd/1")
    script = f"from minidvae.files import write_text; print('before'); write_text('{link}', '{{}}\\n'); print('after')"
    with open(tmp_path / "out", "w") as file:
        output = file if into == "a file" else subprocess.PIPE
        run = subprocess.run(
            [sys.executable, "-c", script], stdout=output, check=True, cwd=Path(__file__).parents[1]
        )
    text = (tmp_path / "out").read_text() if into == "a file" else run.stdout.decode()
    assert text == "before\n{}\nafter\n" and link.is_symlink()


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


@pytest.mark.parametrize("name", ["folder", "missing/a.txt", "file/a.txt", "socket", "loop"])
def test_errors_name_the_file(name, tmp_path, monkeypatch):
    """The error names a temporary file instead of what the user named, or one is left behind."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
    with pytest.raises(OSError) as error:
        write_text(tmp_path / name, "text")
    assert error.value.filename == str(tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "file", "socket", "loop"}


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


WRITER = """
import os, sys, time
from pathlib import Path
from minidvae.data import packing
from minidvae.files import atomic_write

def clips():
    print("ready", flush=True)
    time.sleep(600)
    yield

with atomic_write("last.pt") as beside:
    beside.write_text("half")
    packing.write(Path("cache/corpus"), "corpus", "folder", clips(), [])
"""


def test_leftovers_of_killed_processes(tmp_path, monkeypatch):
    """What a killed process left stays for ever; or what a living one writes is removed, or files of the user."""
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[1]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    try:
        assert writer.stdout.readline() == b"ready\n"
        (tmp_path / ".12-mine").touch()
        there = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}

        def start() -> set[Path]:
            files.remove_leftovers.cache_clear()  # as in a new process
            write_text("a.txt", "text")
            files.remove_leftovers(Path("cache"), "packing-*")
            return {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}

        assert start() == there | {Path("a.txt")} and len(there) == 6
    finally:
        writer.kill()
        writer.wait()
    assert start() == {Path(name) for name in ("a.txt", ".12-mine", "cache")}
