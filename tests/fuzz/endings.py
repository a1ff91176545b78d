"""How a case of the fuzz tests may end."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator

from minidvae import cli

SLOWEST = 20  # seconds of the processor that a case may take


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    begin = time.process_time()
    yield
    assert time.process_time() - begin < SLOWEST


def end_of(call: Callable):
    """What `call` returns; None where it ended in an error that a command-line script prints as one line, with exit
    code 2. Any other ending, a warning of numbers that are not finite among them, is the error of the case."""
    result, errors, arguments = None, io.StringIO(), sys.argv

    def main() -> None:
        nonlocal result
        result = call()

    sys.argv = ["script.py"]
    try:
        output = io.TextIOWrapper(io.BytesIO(), "utf-8")
        with in_time(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            cli.run(main)
    except SystemExit as stop:
        lines = errors.getvalue().splitlines()
        assert stop.code == 2 and lines and lines[-1].startswith("script.py: error: "), (
            stop.code,
            lines,
        )
        assert len(lines[-1]) < 1000, "the line has all that was wrong"
        assert not any("Traceback" in line or "Exception ignored" in line for line in lines), lines
        return None
    finally:
        sys.argv = arguments
    return result
