"""Copying a model: its file and those that the README names work in another project."""

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

# One argument for each model: package,module,model class,config module,config class,base class.
TRAIN_A_STEP = """
import dataclasses, importlib, sys, types
import torch

SIZES = {"width": 8, "feedforward": 8, "w_hidden": 8, "frames": 5, "sequences": 2}
SIZES |= {"projection": 4, "lanes": 2, "symbols": ("a", "b")}

for line in sys.argv[1:]:
    package, module, model_name, config_module, config_name, base_name = line.split(",")
    models = importlib.import_module(f"{package}.models.{module}")
    configs = importlib.import_module(f"{package}.models.{config_module}")
    config = getattr(configs, config_name)
    fields = {field.name for field in dataclasses.fields(config)}
    small = {name: size for name, size in SIZES.items() if name in fields}
    torch.manual_seed(0)
    model = getattr(models, model_name)(config(bins=6, **small))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batch = torch.rand(2, 5, 6)
    if base_name in ("FHVAE", "BetaVAE"):
        # Segments come with their sequence's number of segments and row in the table.
        batch = types.SimpleNamespace(x=batch, count=torch.ones(2), row=torch.arange(2))
    elif base_name == "Recogniser":
        if module == "acoustic":
            labels = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, -1]])  # a label for each frame
        else:
            labels = torch.tensor([[1, 2], [2, 0]])  # up to two symbols for each utterance
        batch = types.SimpleNamespace(x=batch, labels=labels)
        batch.first = torch.ones(2, dtype=torch.bool)
        batch.lengths = torch.tensor([5, 4])
        batch.counts = torch.tensor([2, 1])
    losses = []
    for _ in range(3):
        torch.manual_seed(0)  # the same noise
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (model, losses)
packages = {name.split(".")[0] for name in sys.modules}
assert "minidvae" not in packages, "the copy imports the original"
print("trained", len(sys.argv) - 1)
"""


def copy_set(module: str) -> set[str]:
    """Return a file of the package and all that it imports, as paths from the package."""
    files = set()
    waiting = [module]
    while waiting:
        file = waiting.pop()
        files.add(file)
        for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = Path(file).parents[node.level - 1]
                if node.module:
                    names = [node.module.replace(".", "/")]
                else:
                    names = [alias.name for alias in node.names]
                waiting += {str(folder / f"{name}.py") for name in names} - files
    return files


def module_of(class_: type) -> str:
    return class_.__module__.rsplit(".", 1)[1]


def base_name(model: type) -> str:
    """Return the name of the base class that says which batches the model trains on."""
    for base in model.__mro__:
        if base.__name__ in ("DVAE", "FHVAE", "BetaVAE", "Recogniser"):
            return base.__name__
    raise ValueError(f"{model.__name__} has none of the known base classes")


def test_the_files_that_a_model_imports_are_enough(tmp_path):
    """Each model, copied alone, must be importable without minidvae, and its loss must fall in
    three steps. Fails if a model depends on a file that its imports do not lead to."""
    lines = []
    for name, (model, config) in MODELS.items():
        package = f"copy_{name}"
        for file in copy_set(f"models/{module_of(model)}.py"):
            (tmp_path / package / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACKAGE / file, tmp_path / package / file)
        fields = [package, module_of(model), model.__name__]
        fields += [module_of(config), config.__name__, base_name(model)]
        lines.append(",".join(fields))
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{TRAIN_A_STEP}"
    command = [sys.executable, "-I", "-c", program, *lines]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.split() == ["trained", str(len(MODELS))]


def test_the_readme_names_the_files_to_copy():
    """The last column of the README's table of models, and the line above it with the files that
    all models need, must name the files that the imports lead to."""
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", README.read_text(), re.MULTILINE)
    all_need = re.search(r"all need:\s`(.*)`", README.read_text())[1].split()
    files_in_readme = {}
    for name, cell in rows:
        if name in MODELS:
            files_in_readme[name] = set()
            for pattern in [*cell.strip(" `").split(), *all_need]:
                for file in PACKAGE.glob(pattern):
                    files_in_readme[name].add(str(file.relative_to(PACKAGE)))
    assert files_in_readme == {
        name: copy_set(f"models/{module_of(model)}.py") for name, (model, _) in MODELS.items()
    }
