"""How a case of the fuzz tests may end."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator

from minidvae import cli

MAX_SECONDS = 20  # processor time that a case may take


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    begin = time.process_time()
    yield
    assert time.process_time() - begin < MAX_SECONDS


def end_of(call: Callable):
    """Return what `call` returns; None where it ended in an error that a command-line script prints
    as one line, with exit code 2.

    Raises:
        AssertionError: it ended in any other way, printed more than the line, or took too long.
    """
    result = None

    def main() -> None:
        nonlocal result
        result = call()

    errors = io.StringIO()
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")
    arguments = sys.argv
    sys.argv = ["script.py"]
    try:
        with in_time(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            cli.run(main)
    except SystemExit as stop:
        check_error(stop.code, errors.getvalue().splitlines())
        return None
    finally:
        sys.argv = arguments
    return result


def check_error(exit_code, lines: list[str]) -> None:
    """Check what a script printed that ended in an error: the last line is the error, and has not
    all of the input in it."""
    assert exit_code == 2, (exit_code, lines)
    assert lines, exit_code
    assert lines[-1].startswith("script.py: error: "), lines
    assert len(lines[-1]) < 1000, "the line contains the complete input"
    for line in lines:
        assert "Traceback" not in line, lines
        assert "Exception ignored" not in line, lines
