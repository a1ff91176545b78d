"""Copying a model away is a promise: its file and those that the README names beside it work in another project."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import minidvae
from minidvae.models import MODELS

PACKAGE = Path(minidvae.__file__).parent
README = Path(__file__).parents[2] / "README.md"

TRAIN_A_STEP = """
import dataclasses, importlib, sys, types
import torch

for line in sys.argv[1:]:
    package, module, model, config, kind = line.split(",")
    found = importlib.import_module(f"{package}.models.{module}")
    settings = getattr(importlib.import_module(f"{package}.models.{config.split(':')[0]}"), config.split(":")[1])
    sizes = {"width": 8, "feedforward": 8, "w_hidden": 8, "frames": 5, "sequences": 2, "projection": 4, "lanes": 2}
    sizes |= {"symbols": ("a", "b")}
    small = {f.name: sizes[f.name] for f in dataclasses.fields(settings) if f.name in sizes}
    torch.manual_seed(0)
    model = getattr(found, model)(settings(bins=6, **small))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = torch.rand(2, 5, 6)
    if kind in ("FHVAE", "BetaVAE"):  # with N, and the rows of the table
        batch = types.SimpleNamespace(x=batch, count=torch.ones(2), row=torch.arange(2))
    elif kind == "Recogniser":  # with a label for each frame, or two symbols for each utterance
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
assert not any(name.split(".")[0] == "minidvae" for name in sys.modules), "the copy leans on the original"
print("trained", len(sys.argv) - 1)
"""


def copy_set(module: str) -> set[str]:
    """The files of the package that a file imports, itself among them, paths from the package."""
    found, waiting = set(), [module]
    while waiting:
        file = waiting.pop()
        found.add(file)
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = Path(file).parents[node.level - 1]
                names = (
                    [node.module.replace(".", "/")]
                    if node.module
                    else [alias.name for alias in node.names]
                )
                waiting += {str(folder / f"{name}.py") for name in names} - found
    return found


def module_of(kind: type) -> str:
    return kind.__module__.rsplit(".", 1)[1]


def test_the_files_that_a_model_imports_are_enough(tmp_path):
    """For every model in a folder of its own: imported from the copy alone, and its loss falls in three steps."""
    lines = []
    for name, (model, config) in MODELS.items():
        package = f"copy_{name}"
        for file in copy_set(f"models/{module_of(model)}.py"):
            (tmp_path / package / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACKAGE / file, tmp_path / package / file)
        kind = next(
            base.__name__
            for base in model.__mro__
            if base.__name__ in ("DVAE", "FHVAE", "BetaVAE", "Recogniser")
        )
        settings = f"{module_of(config)}:{config.__name__}"
        lines.append(f"{package},{module_of(model)},{model.__name__},{settings},{kind}")
    ran = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{TRAIN_A_STEP}",
            *lines,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["trained", str(len(MODELS))]


def test_the_readme_names_the_files_to_copy():
    """The last column of its table of models, and above it what all need."""
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", README.read_text(), re.MULTILINE)
    all_need = re.search(r"all need:\s`(.*)`", README.read_text())[1].split()
    patterns = {
        name: [*cell.strip(" `").split(), *all_need] for name, cell in rows if name in MODELS
    }
    files = {
        name: [file for pattern in some for file in PACKAGE.glob(pattern)]
        for name, some in patterns.items()
    }
    named = {
        name: {str(file.relative_to(PACKAGE)) for file in some} for name, some in files.items()
    }
    assert named == {
        name: copy_set(f"models/{module_of(model)}.py") for name, (model, _) in MODELS.items()
    }
