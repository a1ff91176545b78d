"""What the benches share."""

import pytest
from run_scripts import ROOT


@pytest.mark.parametrize(
    "arguments",
    [
        ("--repeats", "0"),
        ("--repeats", "many"),
        ("--device", "tpu0"),
        ("--device", "meta"),
        ("--csv", ""),
        ("--csv", "nowhere/table.csv"),
        ("--rep", "3"),
    ],
)
def test_wrong_flags_are_one_line(arguments, monkeypatch, capsys):
    """They end in a traceback, some of them after all has been timed."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from timing import parser

    with pytest.raises(SystemExit) as stop:
        parser("a bench").parse_args(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and arguments[0] in lines[0]


def test_right_flags(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "bench")
    from timing import parser

    found = parser("a bench").parse_args(
        ["--repeats", "2", "--device", "cpu", "--csv", str(tmp_path / "a.csv")]
    )
    assert (found.repeats, found.device.type, found.csv) == (2, "cpu", tmp_path / "a.csv")
