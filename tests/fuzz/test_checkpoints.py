"""Checkpoints and published models with changed fields."""

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
from endings import end_of
from hypothesis import given
from hypothesis import strategies as st
from run_scripts import call, surroundings, train_script  # noqa: F401
from test_text import NUMBERS

from minidvae.models import build_model
from minidvae.models.published import load_dvae_speech, their_key
from minidvae.training import checkpoint

INI = {
    "STFT": {"fs": "16000", "wlen_sec": "64e-3", "hop_percent": "0.25"},
    "Network": {
        "name": "VAE",
        "x_dim": "513",
        "z_dim": "16",
        "activation": "tanh",
        "dense_x_z": "8",
    },
}
INI_KEYS = [("STFT", key) for key in INI["STFT"]] + [("Network", key) for key in INI["Network"]]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Return a folder with the parameters of a small VAE in the published format, without its
    config.ini."""
    folder = tmp_path_factory.mktemp("published")
    model = build_model("vae", hidden=(8,))
    parameters = {}
    for key, parameter in model.named_parameters():
        parameters[their_key("vae", key, {})] = parameter
    torch.save(parameters, folder / "model.pt")
    return folder


VALUES = NUMBERS | st.lists(NUMBERS, max_size=3).map(",".join) | st.text(max_size=8)


@given(st.dictionaries(st.sampled_from(INI_KEYS), VALUES, max_size=2), st.text(max_size=12))
def test_config_ini(published, changes, last_line):
    """Fails if a changed config.ini ends in a traceback, or in a model whose samples are not
    finite."""
    ini = copy.deepcopy(INI)
    for (section, key), value in changes.items():
        ini[section][key] = value
    lines = []
    for section, values in ini.items():
        lines.append(f"[{section}]")
        lines += map(" = ".join, values.items())
    lines.append(last_line)
    (published / "config.ini").write_bytes("\n".join(lines).encode(errors="surrogatepass"))
    loaded = end_of(lambda: load_dvae_speech(published))
    if loaded is not None:
        model, _ = loaded
        assert model.sample(1, 2).isfinite().all()


MODEL_SETTINGS = {
    "vae": ["hidden=8"],
    "fhvae": ["width=8", "z1_latent=2", "z2_latent=2", "shift=5"],
}


@pytest.fixture(scope="module")
def trained(speech, tmp_path_factory) -> dict[str, Path]:
    """Return the run folders of a VAE and of an FHVAE."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {}
    for name, settings in MODEL_SETTINGS.items():
        runs[name] = folder / name
        arguments = ["--model", name, "--recipe", "quick", "--data", speech]
        arguments += ["--run", runs[name], "--steps", 1]
        assert call(train_script, *arguments, "--set", "frames=10", "batch=2", *settings) == 0
    return runs


READ_BY_RESUME_ONLY = ("plan", "progress", "optimiser")


def paths_of(content, path=()):
    """Yield the keys that lead to each value of nested dicts, the outer dict included."""
    yield path
    if isinstance(content, dict):
        for key, value in content.items():
            yield from paths_of(value, (*path, key))


NUMBERS_AND_TEXTS = [None, True, -1, 0, 1, 2, 7, 2**31, 2**70, -0.5, 0.5, math.nan, math.inf]
NUMBERS_AND_TEXTS += ["", "x", "\0", (), (1,)]
CONTAINERS_AND_NAMES = [{}, {"x": 1}, [], [1], ("x", 2.0), (0.0, 1.0)]
CONTAINERS_AND_NAMES += ["fp32", "vae", "muon", "fbank", "power"]
TENSORS = [torch.zeros(()), torch.zeros(3), torch.full((8,), torch.nan)]
TENSORS.append(torch.zeros(2, dtype=torch.int64))
JUNK = st.sampled_from(NUMBERS_AND_TEXTS) | st.sampled_from(CONTAINERS_AND_NAMES)
JUNK |= st.sampled_from(TENSORS)
REMOVED = object()


@given(st.data())
def test_checkpoints(trained, data):
    """Fails if a checkpoint with one or two changed values is neither read nor refused in one
    line."""
    name = data.draw(st.sampled_from(sorted(trained)))
    content = torch.load(trained[name] / "last.pt")
    for _ in range(data.draw(st.integers(1, 2))):
        paths = [path for path in paths_of(content) if path and path[0] not in READ_BY_RESUME_ONLY]
        *outer_keys, key = data.draw(st.sampled_from(paths))
        parent = content
        for outer_key in outer_keys:
            parent = parent[outer_key]
        change = data.draw(JUNK | st.just(REMOVED))
        if change is REMOVED:
            del parent[key]
        else:
            parent[key] = change
    Path("changed").mkdir(exist_ok=True)
    torch.save(content, "changed/best.pt")
    end_of(lambda: checkpoint.load_run("changed"))


@pytest.mark.parametrize("part", ["plan", "progress", "optimiser"])
@pytest.mark.parametrize("change", ["removed", None, {}, 7])
def test_a_run_that_cannot_be_resumed(trained, part, change, capsys):
    """Fails if a part of the training's state that is missing or of another type does not end in
    one line."""
    content = torch.load(trained["vae"] / "last.pt")
    if change == "removed":
        del content[part]
    else:
        content[part] = change
    shutil.copytree(trained["vae"], "changed")
    torch.save(content, "changed/last.pt")
    capsys.readouterr()
    code = call(train_script, "--resume", "--run", "changed", "--steps", 2)
    error = capsys.readouterr().err
    if part == "progress" and change == {}:
        assert code == 0  # Every field of it has a default: the training starts again.
    else:
        assert code == 2
        assert error.count("\n") == 1
        assert "changed" in error
