"""One file per experiment of the papers. Each has `MODELS`, the models that it is for, and `run(runs, options)`, which
prints its tables, writes its files into each run's folder and returns its results, one dict per run."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..audio import STFT
from ..corpus import Corpus


@dataclass
class Run:
    """A trained model and the speech that it is evaluated on."""

    folder: Path  # as the user named it
    name: str  # of the model, a key of models.MODELS
    model: nn.Module
    stft: STFT
    content: dict  # of its checkpoint; {"model": name} for a published one
    data: str  # the corpus: built-in, a folder, a manifest
    corpus: Corpus  # all its splits
    test: Corpus  # the utterances to evaluate on
    target: Path  # folder for results and pictures

    @property
    def trained(self) -> str:
        return f"step {self.content['progress']['step']}" if "plan" in self.content else "published"


@dataclass
class Options:
    """What the command line says beside the runs."""

    split: str = "test"
    mode: str = "generation"
    limit: int | None = None
    seed: int = 0
    trials: Path | None = None
    recogniser: Path | None = None
    clips: int | None = None
    repeats: int | None = None
    w: str | None = None
    lexicon: Path | None = None


def clear(folder: Path) -> None:
    """Make the folder for an evaluation's files, and remove those of one before."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix in (".json", ".png", ".wav"):
            file.unlink()
