"""Manifests, files of phone labels and settings with content that they should not have."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from endings import end_of
from hypothesis import given
from hypothesis import strategies as st

from minidvae.data.corpus import load_corpus
from minidvae.models import MODELS, build_model
from minidvae.training.config import RECIPES, SettingError, overrides
from minidvae.training.run import resolve

SAMPLES = 3_200  # length of each sound file
UNUSUAL_NUMBERS = ["0", "-1", "1", "2", "3.5", "nan", "inf", "-inf", "1e300", "1e-300", "1_000"]
UNUSUAL_NUMBERS += ["٣", "", "9" * 400, "9" * 5000]
NUMBERS = st.sampled_from(UNUSUAL_NUMBERS) | st.integers(-(2**65), 2**65).map(str)


@pytest.fixture(scope="module")
def folder() -> Path:
    """Return a folder with the sound files a.wav and b.wav."""
    path = Path(tempfile.mkdtemp())
    for seed, name in enumerate("ab"):
        noise = np.random.default_rng(seed).normal(0, 0.1, SAMPLES)
        soundfile.write(path / f"{name}.wav", noise, 16_000)
    yield path
    shutil.rmtree(path)


def load_and_check(source: Path) -> None:
    """Load a corpus; check, if it is not refused in one line, that its fields fit its samples."""
    with tempfile.TemporaryDirectory() as cache:
        corpus = end_of(lambda: load_corpus(source, cache, progress=False, note=str))
        if corpus is not None:
            for number, utterance in enumerate(corpus.utterances):
                check_utterance(utterance, corpus.waveform(number))


def check_utterance(utterance, waveform) -> None:
    assert len(waveform) > 0
    assert np.isfinite(waveform).all()
    assert np.abs(waveform).max() <= 1
    assert utterance.split in ("train", "dev", "test")
    assert 0 <= utterance.trim[0] < utterance.trim[1] <= utterance.length
    for start, stop, _ in utterance.phones:
        assert 0 <= start <= stop <= utterance.length


SOUNDS = ["a.wav", "b.wav"]
SPLITS = ["train", "dev", "test"]
COLUMNS = ["path", "speaker", "split", "text", "phones", "sex", "condition"]
CELLS = st.sampled_from([*SOUNDS, "c.wav", ".", "/", "a.wav/", "anna", *SPLITS, "TRAIN", ""])
CELLS |= st.sampled_from(COLUMNS) | st.text(max_size=8)
ROWS = st.tuples(st.sampled_from(SOUNDS), CELLS, st.sampled_from(SPLITS)) | st.lists(CELLS)
HEADERS = st.permutations(COLUMNS[:5]) | st.just(COLUMNS[:3]) | st.lists(CELLS)
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n"])


@given(HEADERS, st.lists(ROWS, max_size=4), LINE_ENDS)
def test_manifests(folder, header, rows, line_end):
    """Fails if a manifest with unusual cells is neither read nor refused in one line."""
    lines = ["\t".join(row) for row in (header, *rows)]
    manifest = folder / "manifest.tsv"
    manifest.write_bytes(line_end.join(lines).encode(errors="surrogatepass"))
    load_and_check(manifest)


@given(st.binary(max_size=200))
def test_files_that_are_no_manifests(folder, content):
    """Fails if any bytes as a manifest end in a traceback."""
    (folder / "manifest.tsv").write_bytes(content)
    load_and_check(folder / "manifest.tsv")


TIMES = st.integers(0, SAMPLES).map(str) | NUMBERS
LABELS = st.sampled_from(["sil", "aa", "", "a b"]) | st.text(max_size=3)


@given(st.lists(st.tuples(TIMES, TIMES, LABELS), max_size=5))
def test_phone_labels(folder, lines):
    """Fails if phone labels with unusual times are neither read nor refused in one line."""
    content = "\n".join(map(" ".join, lines))
    (folder / "a.phn").write_bytes(content.encode(errors="surrogatepass"))
    manifest = folder / "manifest.tsv"
    manifest.write_text("path\tspeaker\tsplit\tphones\na.wav\tanna\ttrain\ta.phn\n")
    load_and_check(manifest)


def names_of_settings() -> list[str]:
    names = set(vars(RECIPES["quick"]))
    for _, config_class in MODELS.values():
        names.update(vars(config_class()))
    return sorted(names)


SETTING_NAMES = st.sampled_from(names_of_settings()) | st.text(max_size=5)
SETTING_VALUES = NUMBERS | st.lists(NUMBERS, max_size=3).map(",".join) | st.text(max_size=5)
SETTINGS = st.tuples(SETTING_NAMES, st.sampled_from(["=", "", "=="]), SETTING_VALUES)


def build_on_meta(name: str, config: dict) -> None:
    """Build a model without memory, as reading a checkpoint does. A model with more than 100 layers
    is not built, which would take long.

    Raises:
        SettingError: the model cannot be built, as in a new run.
    """
    num_layers = [value for key, value in config.items() if key == "layers"]
    num_layers += [len(value) for value in config.values() if isinstance(value, tuple)]
    if max(num_layers, default=0) > 100:
        return
    try:
        with torch.device("meta"):
            build_model(name, **config)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise SettingError(str(error)[:200]) from None


def numbers_in(settings: dict) -> list[int | float]:
    """Return the values that are numbers, those in tuples included."""
    numbers = []
    for value in settings.values():
        items = value if isinstance(value, tuple) else (value,)
        numbers += [item for item in items if isinstance(item, int | float)]
    return numbers


@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(RECIPES)),
    st.lists(SETTINGS.map("".join), max_size=3),
)
def test_settings(name, recipe_name, pairs):
    """Fails if a setting that is not finite is taken, or if settings end neither in a model nor in
    an error of one line."""
    resolved = end_of(lambda: resolve(name, recipe_name, overrides(pairs)))
    if resolved is not None:
        recipe, config = resolved
        for number in numbers_in(vars(recipe)) + numbers_in(config):
            assert np.isfinite(number)
        end_of(lambda: build_on_meta(name, config))
