"""Two checkouts against each other, end to end."""

import csv
import sys

from run_scripts import ROOT, call, surroundings  # noqa: F401


def test_a_checkout_against_itself(speech, monkeypatch, tmp_path):
    """Three trainings of the same losses; fails where one of them has other flags or its log is not read."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.delitem(sys.modules, "timing", raising=False)
    import versus

    settings = ["--set", "frames=10", "batch=4", "--set-this", "warmup=2", "--set-base", "warmup=2"]
    flags = ["--models", "vae", "--data", speech, "--steps", 6, "--repeats", 1, "--device", "cpu"]
    call(versus, ROOT, *flags, "--csv", "table.csv", *settings)
    with open("table.csv") as file:
        (row,) = csv.DictReader(file)
    assert (
        float(row["losses differ by"]) == 0
        and float(row["this"]) > 0
        and float(row["processes / base"]) > 0
    )
