"""Both benches at small shapes, end to end."""

import csv
import sys

import pytest
import torch
from run_scripts import ROOT, call, surroundings  # noqa: F401

from minidvae.models import build_model


@pytest.fixture
def bench(monkeypatch):
    """A function that imports a bench by its name, with its own `timing`."""

    def load(name: str):
        monkeypatch.syspath_prepend(ROOT / "bench")
        for module in ("timing", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return __import__(name)

    return load


def read(file: str) -> list[dict]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def markdown_rows(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_training_steps(bench, monkeypatch, capsys):
    """A model has no row, decoding is timed of a model that has no past, or a row that is in the
    file is measured again."""
    training = bench("training")
    flags = ["--batch", 2, "--frames", 3, "--repeats", 1, "--device", "cpu", "--csv", "table.csv"]
    models = ["vae", "srnn", "fhvae", "beta_vae", "acoustic"]
    assert call(training, "--models", *models, *flags) == 0
    rows = read("table.csv")
    titles = [(row["model"], row["pass"]) for row in rows]
    assert titles == [
        ("vae", "step"),
        ("srnn", "step"),
        ("srnn", "decode"),
        ("fhvae", "step"),
        ("beta_vae", "step"),
        ("acoustic", "step"),
    ]
    assert all(float(row["shipped ms"]) > 0 for row in rows)
    assert float(rows[1]["reference ms"]) > 0 and rows[0]["reference ms"] == ""
    heading, _, *shown = markdown_rows(capsys.readouterr().out)
    assert heading == list(training.COLUMNS) and len(shown) == len(rows)

    with monkeypatch.context() as patch:
        patch.setattr(training, "measure", lambda *_: pytest.fail("a row was measured again"))
        assert call(training, "--models", *models, *flags) == 0
    assert read("table.csv") == rows
    assert call(training, "--models", "vae", *flags, "--fresh") == 0
    assert len(read("table.csv")) == 1


def test_the_reference_is_timed_by_its_equations(bench, monkeypatch):
    """The column `reference` shows the time of the fused path."""
    training = bench("training")
    model = build_model("srnn", bins=9)
    reference = training.with_reference_forward(model)
    x = torch.rand(2, 4, 9)
    noise = model.draw_noise(2, 4)
    expected, _ = model.loss(x, noise)
    loss, _ = reference.loss(x, noise)
    torch.testing.assert_close(loss, expected)
    monkeypatch.setattr(type(model), "forward_reference", None)
    with pytest.raises(TypeError):
        reference.loss(x, noise)


def test_kernels(bench, monkeypatch, capsys):
    """An operation or path has no row, the summary is not written, or a row that is in the file is
    measured again."""
    kernels = bench("kernels")
    flags = ["--batch", 2, "--frames", 3, "--hidden", 4, "--repeats", 1, "--device", "cpu"]
    flags += ["--operations", "lstm_scan", "latent_scan vrnn", "--csv", "table.csv"]
    flags += ["--markdown", "table.md", "--plot", "table.png"]
    assert call(kernels, *flags) == 0
    rows = read("table.csv")
    paths = {"lstm_scan": ["reference", "shipped", "kernel", "nn.LSTM"]}
    paths["latent_scan vrnn"] = ["reference", "shipped", "kernel"]
    for operation, expected in paths.items():
        for name in kernels.PASSES:
            found = [row for row in rows if row["operation"] == operation and row["pass"] == name]
            assert [row["path"] for row in found] == expected
            assert found[2]["ms"] == "not measured" and float(found[0]["speed-up"]) == 1
    with open("table.md") as file:
        assert len(file.read().splitlines()) == 2 + 4
    capsys.readouterr()

    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("a row was measured again"))
    assert call(kernels, *flags) == 0
    assert read("table.csv") == rows


def test_rows_of_another_table(bench, capsys):
    """Rows of two benches are mixed in one file, or it ends in a traceback."""
    with open("table.csv", "w") as file:
        file.write("model,batch\nvae,32\n")
    assert call(bench("training"), "--csv", "table.csv", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "table.csv: has other columns" in error
