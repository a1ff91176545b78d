"""config.ini of the published format: its numbers are checked before a model of their sizes is made."""

import re

import pytest
import torch

from minidvae.files import CheckpointError
from minidvae.models import build_model
from minidvae.models.published import load_dvae_speech, their_key

INI = "[STFT]\nfs = 16000\nwlen_sec = 64e-3\nhop_percent = 0.25\n[Network]\nname = VAE\nx_dim = 513\nz_dim = 16\n"
INI += "activation = tanh\ndense_x_z = 8\n"


@pytest.mark.parametrize(
    ("whole", "wrong"),
    [
        *(
            ("64e-3", number)
            for number in ("-64e-3", "inf", "nan", "1e300", "0", "32e-3", "1e-9", "9" * 5000)
        ),
        *(("0.25", number) for number in ("-0.25", "inf", "nan", "0", "1e300")),
        *(("16000", number) for number in ("-16000", "inf", "0", "1" + "0" * 400, "9" * 5000)),
        *(
            ("513", number)
            for number in ("-513", "0", "inf", "1" + "0" * 30, str(2**31), "9" * 5000, "512")
        ),
        *(("z_dim = 16", f"z_dim = {number}") for number in ("-1", "nan", str(2**40))),
        *(
            ("= 8", f"= {number}")
            for number in ("-8", "0", "8,-1", "1" + "0" * 30, ",".join(["1"] * 100_000), str(2**30))
        ),
    ],
)
def test_numbers_of_a_published_model_that_cannot_be(whole, wrong, tmp_path):
    """They end in a traceback, or in gigabytes."""
    theirs = {
        their_key("vae", key, {}): p
        for key, p in build_model("vae", hidden=(8,)).named_parameters()
    }
    torch.save(theirs, tmp_path / "model.pt")
    (tmp_path / "config.ini").write_text(INI)
    load_dvae_speech(tmp_path)
    (tmp_path / "config.ini").write_text(INI.replace(whole, wrong))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))) as error:
        load_dvae_speech(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1_000
