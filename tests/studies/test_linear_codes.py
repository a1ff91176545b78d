"""Linear codes of speech."""

import linear_codes
import pytest
import torch
from run_scripts import call, surroundings  # noqa: F401


@pytest.mark.parametrize("together", [1, 2, 4])
def test_a_code_of_all_numbers_loses_nothing(together):
    x = torch.randn(41, 6)
    torch.testing.assert_close(
        linear_codes.Block(torch.randn(300, 6), together, 6)(x), x, rtol=1e-3, atol=1e-3
    )


def test_one_code_for_every_frame_is_causal_where_it_decodes(monkeypatch):
    monkeypatch.setattr(linear_codes, "STEPS", 2)
    model, x = linear_codes.Filter(torch.randn(900, 130), 3), torch.randn(60, 130)
    before = model(x)
    x[40] += 1
    moved = (model(x) - before).abs().amax(-1) > 1e-6
    assert (
        moved[40 - linear_codes.TAPS : 40 + 2 * linear_codes.TAPS - 1].all()
        and not moved[:31].any()
    )


def test_the_study(speech, monkeypatch, capsys):
    monkeypatch.setattr(linear_codes, "STEPS", 2)
    assert call(linear_codes, "--data", speech) == 0
    rows = capsys.readouterr().out.splitlines()[-5:]
    first, *_, last = (float(row.split(" ± ")[0].split()[-1]) for row in rows[:4])
    assert last > first + 1 and "one code" in rows[-1]
