"""Copy-paste is a promise: `models/base.py`, one model's file and `kernels/` are a working model in another project."""

import shutil
import subprocess
import sys
from pathlib import Path

import minidvae
from minidvae.models import MODELS

PACKAGE = Path(minidvae.__file__).parent

TRAIN_A_STEP = """
import dataclasses, importlib, sys, types
import torch

for line in sys.argv[1:]:
    package, module, model, config = line.split(",")
    found = importlib.import_module(f"{package}.models.{module}")
    settings = getattr(found, config)
    sizes = {"width": 8, "feedforward": 8, "w_hidden": 8, "frames": 5, "sequences": 2, "projection": 4, "lanes": 2}
    sizes |= {"symbols": ("a", "b")}
    small = {f.name: sizes[f.name] for f in dataclasses.fields(settings) if f.name in sizes}
    torch.manual_seed(0)
    model = getattr(found, model)(settings(bins=6, **small))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = torch.rand(2, 5, 6)
    if model.batches == "segments":  # with N, and the rows of the table
        batch = types.SimpleNamespace(x=batch, count=torch.ones(2), row=torch.arange(2))
    elif model.batches == "utterances":  # with a label for each frame, or two symbols for each utterance
        counts = {"lengths": torch.tensor([5, 4]), "counts": torch.tensor([2, 1])}
        labels = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, -1]] if module == "acoustic" else [[1, 2], [2, 0]])
        batch = types.SimpleNamespace(x=batch, labels=labels, first=torch.ones(2, dtype=torch.bool), **counts)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)  # the same noise
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (model, losses)
    used = {name for name in sys.modules if name.startswith(package + ".models.")}
    assert used == {f"{package}.models.base", f"{package}.models.{module}"}, used
assert not any(name.split(".")[0] == "minidvae" for name in sys.modules), "the copy leans on the original"
print("trained", len(sys.argv) - 1)
"""


def test_a_model_its_base_and_the_kernels_are_enough(tmp_path):
    """For every model in a folder of its own: imported from the copy alone, and its loss falls in three steps."""
    lines = []
    for name, (model, config) in MODELS.items():
        module = model.__module__.rsplit(".", 1)[1]
        package = f"copy_{name}"
        models = tmp_path / package / "models"
        models.mkdir(parents=True)
        for file in ("base.py", f"{module}.py"):
            shutil.copy(PACKAGE / "models" / file, models)
        shutil.copytree(PACKAGE / "kernels", tmp_path / package / "kernels")
        lines.append(f"{package},{module},{model.__name__},{config.__name__}")
    ran = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{TRAIN_A_STEP}", *lines],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["trained", str(len(MODELS))]
