"""Sound files of every format that libsndfile writes, with bytes changed, cut out or put in; seeds are fixed."""

import numpy as np
import pytest
import soundfile
from endings import end_of
from hypothesis import settings

from minidvae.data import audio

RATES = (8_000, 16_000, 44_100)
FORMATS = [
    (form, subtype)
    for form in sorted(soundfile.available_formats())
    for subtype in sorted(soundfile.available_subtypes(form))
    if soundfile.check_format(form, subtype) and form != "RAW"
]


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(random.integers(1, 5)):
        end = (
            min(len(changed), 100) if random.random() < 0.6 else len(changed)
        )  # most of what is wrong is in headers
        place = int(random.integers(max(end, 1)))
        match random.integers(5):
            case 0:
                changed[place : place + 1] = random.bytes(1)
            case 1:
                changed[place : place + 4] = [
                    b"\xff" * 4,
                    b"\0" * 4,
                    b"\x7f\xff\xff\xff",
                    b"\xff\xff\xff\x7f",
                ][place % 4]
            case 2:
                del changed[place : place + int(random.integers(1, 50))]
            case 3:
                changed[place:place] = random.bytes(int(random.integers(1, 50)))
            case 4:
                del changed[place:]
    return bytes(changed)


@pytest.mark.parametrize(("form", "subtype"), FORMATS)
def test_sound_files(form, subtype, tmp_path, capfd):
    random = np.random.default_rng([*form.encode(), *subtype.encode()])
    rate, path = RATES[random.integers(len(RATES))], tmp_path / "a.wav"
    samples = random.normal(0, 0.1, (rate // 4, 1 + random.integers(2)))
    try:
        soundfile.write(path, samples, rate, subtype, format=form)
    except soundfile.SoundFileError:
        try:
            soundfile.write(path, samples[:, 0], 8_000, subtype, format=form)
        except soundfile.SoundFileError:
            pytest.skip("libsndfile does not write it")
    content = path.read_bytes()
    for _ in range(max(1, settings().max_examples // 5)):
        path.write_bytes(mutate(content, random))
        found = end_of(lambda: audio.read(path, audio.SAMPLE_RATE))
        assert found is None or (len(found[0]) and np.isfinite(found[0]).all())
    notes = capfd.readouterr().err.splitlines()  # the decoder of MP3 has some of its own
    assert not notes or (
        form == "MP3" and not any("Exception ignored" in note for note in notes)
    ), notes
