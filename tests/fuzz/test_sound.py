"""Sound files of every format that libsndfile writes, with bytes changed, removed or inserted. The
seeds are fixed."""

import numpy as np
import pytest
import soundfile
from endings import end_of
from hypothesis import settings

from minidvae.data import audio

RATES = (8_000, 16_000, 44_100)
LENGTHS_THAT_CANNOT_BE = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]


def writable_formats() -> list[tuple[str, str]]:
    """Return the formats with a header, and each of their subtypes."""
    formats = []
    for file_format in sorted(soundfile.available_formats()):
        for subtype in sorted(soundfile.available_subtypes(file_format)):
            if soundfile.check_format(file_format, subtype) and file_format != "RAW":
                formats.append((file_format, subtype))
    return formats


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Return the content of a file with one to four changes. Most are in the first 100 bytes, since
    most errors are in headers."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 5)):
        end = len(changed)
        if random.random() < 0.6:
            end = min(end, 100)
        position = int(random.integers(max(end, 1)))
        match random.integers(5):
            case 0:
                changed[position : position + 1] = random.bytes(1)
            case 1:
                changed[position : position + 4] = LENGTHS_THAT_CANNOT_BE[position % 4]
            case 2:
                del changed[position : position + int(random.integers(1, 50))]
            case 3:
                changed[position:position] = random.bytes(int(random.integers(1, 50)))
            case 4:
                del changed[position:]
    return bytes(changed)


@pytest.mark.parametrize(("file_format", "subtype"), writable_formats())
def test_sound_files(file_format, subtype, tmp_path, capfd):
    """Fails if a damaged file is neither read as finite samples nor refused in one line, or if
    anything else is printed."""
    random = np.random.default_rng([*file_format.encode(), *subtype.encode()])
    path = tmp_path / "a.wav"
    rate = RATES[random.integers(len(RATES))]
    samples = random.normal(0, 0.1, (rate // 4, 1 + random.integers(2)))
    try:
        soundfile.write(path, samples, rate, subtype, format=file_format)
    except soundfile.SoundFileError:
        try:
            soundfile.write(path, samples[:, 0], 8_000, subtype, format=file_format)
        except soundfile.SoundFileError:
            pytest.skip("libsndfile does not write it")
    content = path.read_bytes()
    for _ in range(max(1, settings().max_examples // 5)):
        path.write_bytes(mutate(content, random))
        result = end_of(lambda: audio.read(path, audio.SAMPLE_RATE))
        if result is not None:
            waveform, _, _ = result
            assert len(waveform) > 0
            assert np.isfinite(waveform).all()
    notes = capfd.readouterr().err.splitlines()
    if file_format == "MP3":  # The decoder of MP3 prints notes.
        assert not any("Exception ignored" in note for note in notes), notes
    else:
        assert notes == []
