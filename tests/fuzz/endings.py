"""How a case of the fuzz tests may end."""

import contextlib
import io
import sys
from collections.abc import Callable

from minidvae import command_line


def end_of(call: Callable):
    """What `call` returns; None where it ended in an error that a command-line script prints as one line, with exit
    code 2. Any other ending, a warning of numbers that are not finite among them, is the error of the case."""
    result, errors, arguments = None, io.StringIO(), sys.argv

    def main() -> None:
        nonlocal result
        result = call()

    sys.argv = ["script.py"]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
            command_line.run(main)
    except SystemExit as stop:
        lines = errors.getvalue().splitlines()
        assert stop.code == 2 and lines and lines[-1].startswith("script.py: error: "), (stop.code, lines)
        assert len(lines[-1]) < 1000, "the line has all that was wrong"
        assert not any("Traceback" in line or "Exception ignored" in line for line in lines), lines
        return None
    finally:
        sys.argv = arguments
    return result
