"""`config.ini` of the published format: its numbers are checked before a model is built."""

import re

import pytest
import torch

from minidvae.files import CheckpointError
from minidvae.models import build_model
from minidvae.models.published import load_dvae_speech, their_key

INI = """[STFT]
fs = 16000
wlen_sec = 64e-3
hop_percent = 0.25
[Network]
name = VAE
x_dim = 513
z_dim = 16
activation = tanh
dense_x_z = 8
"""
MANY_DIGITS = "9" * 5000
IMPOSSIBLE_VALUES = {
    "wlen_sec = 64e-3": ["-64e-3", "inf", "nan", "1e300", "0", "32e-3", "1e-9", MANY_DIGITS],
    "hop_percent = 0.25": ["-0.25", "inf", "nan", "0", "1e300"],
    "fs = 16000": ["-16000", "inf", "0", "1" + "0" * 400, MANY_DIGITS],
    "x_dim = 513": ["-513", "0", "inf", "1" + "0" * 30, str(2**31), MANY_DIGITS, "512"],
    "z_dim = 16": ["-1", "nan", str(2**40)],
    "dense_x_z = 8": ["-8", "0", "8,-1", "1" + "0" * 30, ",".join(["1"] * 100_000), str(2**30)],
}
CASES = []
for line, values in IMPOSSIBLE_VALUES.items():
    key = line.split(" = ")[0]
    CASES += [(line, f"{key} = {value}") for value in values]


@pytest.mark.parametrize(("line", "impossible_line"), CASES)
def test_numbers_of_a_published_model_that_cannot_be(line, impossible_line, tmp_path):
    """Fails if such a number ends in a traceback or in gigabytes of memory."""
    state = {}
    for key, parameter in build_model("vae", hidden=(8,)).named_parameters():
        state[their_key("vae", key, {})] = parameter
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "config.ini").write_text(INI)
    load_dvae_speech(tmp_path)
    (tmp_path / "config.ini").write_text(INI.replace(line, impossible_line))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))) as error:
        load_dvae_speech(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1_000
