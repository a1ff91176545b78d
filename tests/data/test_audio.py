"""Signals against their definitions: explicit sums in double precision, closed forms, known files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from minidvae.data import audio
from minidvae.data.audio import FEATURE_STFT, STFT, AudioError

LIGHT, BENCHMARK = STFT(1024, 256), STFT(512, 256)


def speechlike(samples, rate=16_000, seed=0):
    """A pulse train at 120 Hz through three resonances, with syllables and a little breath, peak 1."""
    rng, n = np.random.default_rng(seed), np.arange(samples)
    source = np.diff(n * 120 // rate, prepend=-1) + 0.01 * rng.standard_normal(samples)
    spectrum, hertz = np.fft.rfft(source), np.fft.rfftfreq(samples, 1 / rate)
    spectrum *= sum(1 / (1 + ((hertz - f) / 100) ** 2) for f in (600, 1200, 2500))
    waveform = np.fft.irfft(spectrum, samples) * (1 - 0.9 * np.cos(2 * np.pi * 3 * n / rate))
    return waveform / np.abs(waveform).max()


def fourier(frame, points=None):
    """The discrete Fourier transform of a frame as the sum that defines it, from 0 to half the rate."""
    points = points or len(frame)
    n, k = np.arange(len(frame)), np.arange(points // 2 + 1)
    return np.exp(-2j * np.pi * k[:, None] * n / points) @ frame


def sine_window(length):
    return np.array([np.sin(np.pi * (n + 0.5) / length) for n in range(length)])


def hamming_window(length):
    return np.array([0.54 - 0.46 * np.cos(2 * np.pi * n / length) for n in range(length)])


def centred_frames(waveform, window, hop):
    """Frame t is centred on sample t·hop, zeros outside, up to the first centre past the last sample."""
    half, frames = len(window) // 2, 1 + int(np.ceil(len(waveform) / hop))
    padded = np.concatenate([np.zeros(half), waveform, np.zeros(half + hop)])
    return [padded[t * hop : t * hop + len(window)] * window for t in range(frames)]


# ---------------------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("stft", [LIGHT, BENCHMARK, FEATURE_STFT], ids=str)
@pytest.mark.parametrize("samples", [1, 255, 256, 257, 16_000, 31_999])
def test_whole_utterances_are_reconstructed(stft, samples):
    """Fails where analysis and synthesis do not undo each other, first or last samples included."""
    waveform = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, samples))).float()
    spectrum = stft.analyse(waveform)
    assert spectrum.shape == (2, 3, stft.frames(samples), stft.bins)
    assert (stft.synthesise(spectrum, samples) - waveform).abs().max() < 1e-5


def test_a_wrong_frame_is_not_amplified_at_the_ends():
    """Fails where the last samples rest on the edge of one window: errors would be divided by almost 0."""
    for stft in (LIGHT, BENCHMARK):
        for samples in (4 * stft.hop - 1, 4 * stft.hop, 4 * stft.hop + 1):
            error = torch.randn(
                stft.frames(samples), stft.window_length, generator=torch.manual_seed(0)
            )
            assert (
                stft.synthesise(torch.fft.rfft(error), samples).abs().max() < 2 * error.abs().max()
            )


def test_analysis_is_the_centred_windowed_transform():
    """Fails where window, centring, padding or transform differ from the definition."""
    waveform = speechlike(3001)
    windows = {
        LIGHT: sine_window(1024),
        BENCHMARK: sine_window(512),
        FEATURE_STFT: hamming_window(400),
    }
    for stft, window in windows.items():
        expected = np.array(
            [fourier(frame) for frame in centred_frames(waveform, window, stft.hop)]
        )
        assert np.abs(stft.analyse(torch.from_numpy(waveform)).numpy() - expected).max() < 1e-9
        assert (
            np.abs(stft.analyse(torch.from_numpy(waveform).float()).numpy() - expected).max() < 1e-3
        )


def test_power_of_a_crop_is_not_padded():
    """Fails where a crop is padded, or the number of frames is not the one that was asked for."""
    crop = speechlike(LIGHT.samples(5))
    expected = [
        np.abs(fourier(crop[256 * t : 256 * t + 1024] * sine_window(1024))) ** 2 for t in range(5)
    ]
    power = LIGHT.power(torch.from_numpy(crop).float().expand(2, -1))
    assert power.dtype == torch.float32 and power.shape == (2, 5, 513)
    assert np.abs(power.numpy() - expected).max() < 1e-5 * np.max(expected)
    assert LIGHT.power(torch.zeros(LIGHT.samples(5) - 1)).shape == (4, 513)


def test_synthesis_is_the_least_squares_inverse():
    """Fails where an inconsistent spectrum is not taken to the waveform whose STFT is nearest to it."""
    generator, stft, samples = torch.Generator().manual_seed(0), STFT(16, 8), 40
    target = torch.randn(
        stft.frames(samples), stft.bins, generator=generator, dtype=torch.complex128
    )
    target[:, [0, -1]] = target[:, [0, -1]].real + 0j

    analysis = (
        stft.analyse(torch.eye(samples, dtype=torch.float64)).flatten(1).mT
    )  # STFT of x: analysis @ x
    mirrored = torch.full(
        (stft.bins,), 2.0, dtype=torch.float64
    )  # most frequencies stand for two in the sum
    mirrored[[0, -1]] = 1
    weight = mirrored.sqrt().repeat(target.shape[0])[:, None]
    rows, right = weight * analysis, weight * target.reshape(-1, 1)
    nearest = torch.linalg.lstsq(
        torch.cat([rows.real, rows.imag]), torch.cat([right.real, right.imag])
    )
    assert (stft.synthesise(target, samples) - nearest.solution[:, 0]).abs().max() < 1e-9


def test_log_variance_scales_and_phase_stays():
    """Fails where √(e^l) is e^l or |X| instead, or the input's phase is lost."""
    waveform = torch.from_numpy(speechlike(5000))
    spectrum = LIGHT.analyse(waveform)
    log_variance = spectrum.abs().square().log() + 2 * np.log(3)
    assert (
        audio.resynthesise(log_variance, spectrum, LIGHT, 5000) - 3 * waveform
    ).abs().max() < 1e-9


def test_lengths_and_windows_that_cannot_work_are_refused():
    """Fails where a wrong length is cut or padded without a word, or a hop leaves gaps."""
    with pytest.raises(ValueError, match="have 10 frames, the spectrum has 9"):
        LIGHT.synthesise(torch.zeros(9, 513, dtype=torch.complex64), 9 * 256)
    for wrong in ((1024, 513), (1024, 0), (1023, 256)):
        with pytest.raises(ValueError, match="cannot be inverted"):
            STFT(*wrong)
    with pytest.raises(ValueError, match="'hann' is unknown"):
        STFT(64, 16, "hann").power(torch.zeros(64))


def test_a_window_first_used_in_inference_serves_training():
    """Fails where a window cached under inference_mode breaks a later backward pass."""
    stft = STFT(384, 96)
    with torch.inference_mode():
        stft.power(torch.zeros(384))
        audio.fbank(torch.zeros(400), bins=23)
    waveform = torch.ones(1000, requires_grad=True)
    (stft.power(waveform).sum() + audio.fbank(waveform, bins=23).sum()).backward()
    assert waveform.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    """Fails where a GPU computes other spectra, features or waveforms, or Griffin-Lim other first phases."""
    waveform = torch.from_numpy(speechlike(16_000)).float().expand(2, -1)
    power = LIGHT.analyse(waveform).abs().square()
    for function in (
        LIGHT.power,
        audio.fbank,
        audio.log_magnitude,
        lambda w: LIGHT.synthesise(LIGHT.analyse(w), 16_000),
        lambda w: audio.griffin_lim(
            power.to(w.device), LIGHT, 1, generator=torch.Generator().manual_seed(0)
        ),
    ):
        on_cpu, on_gpu = function(waveform), function(waveform.cuda()).cpu()
        assert (on_gpu - on_cpu).abs().max() < 1e-3 * on_cpu.abs().max()


# ------------------------------------------------------------------------------------------------ Griffin-Lim


def spectral_convergence(waveform, magnitude, stft):
    """‖|STFT(x)| − M‖ / ‖M‖"""
    return ((stft.analyse(waveform).abs() - magnitude).norm() / magnitude.norm()).item()


def test_griffin_lim_converges_and_momentum_helps():
    """Fails where iterations do not bring the spectrogram nearer, or momentum does not speed them up."""
    magnitude = LIGHT.analyse(torch.from_numpy(speechlike(16_000)).float()).abs()

    def error(iterations, momentum):
        generator = torch.Generator().manual_seed(0)
        waveform = audio.griffin_lim(
            magnitude.square(), LIGHT, iterations, momentum, 16_000, generator
        )
        return spectral_convergence(waveform, magnitude, LIGHT)

    original = [error(iterations, 0.0) for iterations in (0, 1, 5, 20, 60)]
    assert original == sorted(
        original, reverse=True
    )  # Griffin & Lim 1984 prove that it never rises
    assert original[-1] < 0.5 * original[0]
    assert error(60, 0.99) < 0.5 * original[-1]


def test_griffin_lim_is_batched_and_repeatable():
    """Fails where a seed gives two waveforms, clips of a batch touch each other, or lengths are not kept."""
    waveforms = torch.from_numpy(np.stack([speechlike(7001, seed=seed) for seed in (1, 2)]))
    power = LIGHT.analyse(waveforms).abs().square()

    def rebuilt(seed):
        return audio.griffin_lim(
            power, LIGHT, 3, length=7001, generator=torch.Generator().manual_seed(seed)
        )

    assert rebuilt(5).shape == (2, 7001)
    assert torch.equal(rebuilt(5), rebuilt(5)) and not torch.allclose(rebuilt(5), rebuilt(6))
    power[1] = 0
    sounding, silent = audio.griffin_lim(power, LIGHT, 3)
    assert sounding.shape == (28 * 256,) and sounding.abs().max() > 0.1 and not silent.any()


# --------------------------------------------------------------------------------------------------- features


def mel(hertz):
    return 1127 * np.log(1 + hertz / 700)


def test_fbank_is_its_definition():
    """Fails where frames, window, mel scale, triangles, floor or logarithm differ from the docstring's."""
    waveform = speechlike(1601)
    waveform[:700] = 0
    expected = []
    for frame in centred_frames(waveform, hamming_window(400), 160):
        power = np.abs(fourier(frame, 1024)) ** 2
        edges = [mel(20) + (mel(8000) - mel(20)) * i / 81 for i in range(82)]
        row = []
        for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
            energy = 0.0
            for k in range(513):
                position = mel(k * 16_000 / 1024)
                if left < position <= centre:
                    energy += power[k] * (position - left) / (centre - left)
                elif centre < position < right:
                    energy += power[k] * (right - position) / (right - centre)
            row.append(np.log(max(energy, 1e-8)))
        expected.append(row)
    features = audio.fbank(torch.from_numpy(waveform))
    assert features.shape == (12, 80) and np.log(1e-8) in features  # digital silence is finite
    assert np.abs(features.numpy() - expected).max() < 1e-9
    assert np.abs(audio.fbank(torch.from_numpy(waveform).float()).numpy() - expected).max() < 0.01


def test_log_magnitude_is_its_definition_and_comes_back():
    """Fails where the bins are others than 40 to 8000 Hz, or the way back to sound is not the inverse."""
    waveform = speechlike(4000)
    waveform -= waveform.mean()
    frames = centred_frames(waveform, hamming_window(400), 160)
    expected = np.array([np.log(np.maximum(np.abs(fourier(frame)[1:]), 1e-4)) for frame in frames])
    features = audio.log_magnitude(torch.from_numpy(waveform))
    assert features.shape == (26, 200) and np.abs(features.numpy() - expected).max() < 1e-9
    power = audio.log_magnitude_to_power(features)
    assert (power[:, 0] == 0).all()
    back = audio.resynthesise(
        power.log(), FEATURE_STFT.analyse(torch.from_numpy(waveform)), FEATURE_STFT, 4000
    )
    assert (
        (back - torch.from_numpy(waveform)).norm() / np.linalg.norm(waveform)
    ) < 0.03  # but for 0 Hz


def test_features_of_a_crop_are_those_of_the_utterance():
    """Fails where a crop of an utterance gives other frames than the utterance has there."""
    waveform = torch.from_numpy(speechlike(8000))
    start = 10 * 160 - 200  # the sample where centred frame 10 begins
    crop = waveform[start : start + FEATURE_STFT.samples(20)]
    for feature in (audio.fbank, audio.log_magnitude):
        assert (feature(crop, centred=False) - feature(waveform)[10:30]).abs().max() < 1e-9


# ------------------------------------------------------------------------------------------------------- trim


def test_trim_keeps_the_loud_part_of_a_known_signal():
    """Fails where the bounds are not those that the frames' levels give by hand.

    Samples 10,240 to 20,480 are loud. Of the frames of 2048 around 512·t, the first to touch them is t = 19
    (8,704 to 10,752, a quarter loud, −6.0 dB), the last t = 41; of t = 20 and 40 a half is loud, −3.0 dB.
    """
    waveform = np.zeros(30_000, np.float32)
    waveform[10_240:20_480] = 0.5
    assert audio.trim_bounds(waveform) == (19 * 512, 42 * 512)
    assert audio.trim_bounds(waveform, threshold_db=5.9) == (20 * 512, 41 * 512)

    def over_a_floor(level):
        return np.where(waveform, waveform, 0.5 * 10 ** (level / 20))

    assert audio.trim_bounds(over_a_floor(-31)) == (19 * 512, 42 * 512)
    # At −29 dB, frames that reach past the ends fall below again: t = 0 and 1 (a half and three quarters,
    # −32.0 and −30.2 dB) and t = 58 (1,328 samples, −30.9 dB), not t = 57 (1,840 samples, −29.5 dB).
    assert audio.trim_bounds(over_a_floor(-29)) == (2 * 512, 58 * 512)
    assert audio.trim_bounds(waveform[10_240:20_480]) == (0, 10_240)
    assert audio.trim_bounds(np.zeros(5000)) == audio.trim_bounds(np.zeros(0)) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_trim_is_its_definition(seed):
    """Fails where the running sum gives other levels than the frames themselves."""
    rng = np.random.default_rng(seed)
    waveform = speechlike(rng.integers(9000, 30_000), seed=seed)
    waveform = np.concatenate(
        [np.zeros(rng.integers(9000)), waveform, np.zeros(rng.integers(9000))]
    )
    waveform = (waveform + 10 ** rng.uniform(-4, -1) * rng.standard_normal(len(waveform))).astype(
        np.float32
    )
    padded = np.pad(waveform.astype(np.float64), 1024)
    frames = [padded[t * 512 : t * 512 + 2048] for t in range(1 + len(waveform) // 512)]
    levels = [10 * np.log10(np.mean(frame**2)) for frame in frames]
    loud = [t for t, level in enumerate(levels) if level > max(levels) - 30]
    assert audio.trim_bounds(waveform) == (loud[0] * 512, min(len(waveform), (loud[-1] + 1) * 512))


# ------------------------------------------------------------------------------------------------------ files


def sinusoid(hertz, rate, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_a_resampled_tone_is_the_tone_at_the_new_rate(rate):
    """Fails where a tone is shifted, scaled or bent, or one that the new rate cannot hold gets through."""
    resampled = audio.resample(sinusoid(1000, rate).astype(np.float32), rate, 16_000)
    assert resampled.dtype == np.float32 and len(resampled) == int(
        np.ceil(round(rate / 2) * 16_000 / rate)
    )
    assert np.abs(resampled - sinusoid(1000, 16_000)[: len(resampled)])[200:-200].max() < 2e-3
    if rate > 40_000:
        assert np.abs(audio.resample(sinusoid(10_000, rate), rate, 16_000))[200:-200].max() < 2e-3


@pytest.mark.parametrize(
    ("name", "format", "subtype", "error"),
    [
        ("a.wav", "WAV", "PCM_16", 2**-15),
        ("a.wav", "WAV", "FLOAT", 1e-7),
        ("a.flac", "FLAC", "PCM_16", 2**-15),
        ("a.sph", "NIST", "PCM_16", 2**-15),
        ("a.WV1", "NIST", "ULAW", 0.02),
        ("a.ogg", "OGG", "VORBIS", 0.1),
    ],
)
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
def test_every_format_is_read(tmp_path, name, format, subtype, error, rate):
    """Fails where a format does not decode, channels are not averaged, or rate or channels are wrong."""
    left, right = sinusoid(400, rate), sinusoid(700, rate)
    soundfile.write(
        tmp_path / name, np.stack([left, right], axis=1), rate, format=format, subtype=subtype
    )
    waveform, file_rate, channels = audio.read(tmp_path / name)
    assert waveform.dtype == np.float32 and (file_rate, channels) == (rate, 2)
    assert np.abs(waveform - (left + right) / 2).max() < error
    expected = (sinusoid(400, 16_000) + sinusoid(700, 16_000)) / 2
    assert np.abs(audio.load(tmp_path / name) - expected)[200:-200].max() < error + 2e-3


def test_a_flac_without_its_length_is_read(tmp_path):
    """Fails where the length is taken from a header that lacks it, as a piped encoder's does, or blocks are lost."""
    waveform = np.random.default_rng(0).integers(-(2**15), 2**15, (2**20 + 99, 2)).astype(np.int16)
    soundfile.write(tmp_path / "a.flac", waveform, 16_000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] &= 0xF0  # the number of samples: the last 36 bits before the checksum of STREAMINFO
    content[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(content)
    assert np.array_equal(
        audio.read(tmp_path / "a.flac")[0], (waveform / np.float32(2**15)).mean(axis=1)
    )


def test_written_files_come_back(tmp_path):
    """Fails where 16 bits are not used well, loud waveforms wrap around, or quiet ones are made louder."""
    waveform = np.random.default_rng(0).uniform(-1, 1, 4000).astype(np.float32)
    waveform[:2] = 1, -1
    audio.write(tmp_path / "a.wav", waveform)
    info = soundfile.info(tmp_path / "a.wav")
    assert (info.format, info.subtype, info.samplerate, info.channels) == (
        "WAV",
        "PCM_16",
        16_000,
        1,
    )
    back, _ = soundfile.read(tmp_path / "a.wav")
    assert np.abs(back - waveform)[1:].max() <= 2**-16  # half a step
    assert back[0] == 1 - 2**-15  # the largest number of 16 bits
    audio.write(tmp_path / "a.wav", 4 * waveform, rate=8000)  # over an old file
    loud, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == 8000 and np.array_equal(loud, back)
    audio.write(tmp_path / "a.wav", np.zeros(0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Fails where an interrupt or a bad sample leaves half a file, or harms the one that was there."""
    audio.write(tmp_path / "a.wav", np.full(10, 0.5))
    with pytest.raises(AudioError, match=r"a\.wav: not written.*expected"):
        audio.write(tmp_path / "a.wav", np.array([0.0, np.nan]))

    def half_written(file, *_, **__):
        file.write_bytes(b"RIFF")
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", half_written)
    with pytest.raises(KeyboardInterrupt):
        audio.write(tmp_path / "a.wav", np.zeros(5))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert np.array_equal(audio.read(tmp_path / "a.wav")[0], np.full(10, np.float32(0.5)))


SHORTENED = b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n".ljust(
    1024
)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("nothing.wav", None, "no such file"),
        ("zero.wav", b"", "does not decode"),
        ("text.wav", b"hello, I am not a wav file\n" * 99, "does not decode"),
        ("headerless.raw", b"\x01\x02" * 99, "does not decode"),
        ("cut.flac", b"fLaC\x00\x00", "does not decode"),
        ("packed.wv1", SHORTENED + b"ajkg\x02" + bytes(999), "shorten"),
        ("silent.wav", np.zeros(0), "no samples"),
        ("infinite.wav", np.array([0, np.inf, 0]), "infinite, too large or not numbers"),
        ("undefined.wav", np.array([np.nan, 0, 0]), "infinite, too large or not numbers"),
        ("opposed.wav", np.array([[np.inf, -np.inf]]), "infinite, too large or not numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_files_get_one_line(tmp_path, name, content, reason):
    """Fails where a bad file goes on silently, or the error does not say which file and what is wrong."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError) as error:
        audio.read(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ") and reason in line and "\n" not in line


@pytest.mark.parametrize(
    ("rate", "taken"), [(1, 0), (3999, 0), (4000, 1), (768_000, 1), (768_001, 0)]
)
def test_rates_that_are_no_rates_of_speech_are_refused(tmp_path, rate, taken):
    """Fails where a header that claims 1 Hz makes 16,000 samples of every one, or a rate that occurs is refused."""
    soundfile.write(tmp_path / "a.wav", np.full(1000, 0.5), rate)
    if taken:
        assert len(audio.load(tmp_path / "a.wav")) == np.ceil(1000 * 16_000 / rate)
    else:
        with pytest.raises(
            AudioError,
            match=rf"a\.wav: claims a sampling rate of {rate} Hz; expected 4000 to 768000$",
        ):
            audio.load(tmp_path / "a.wav")


def test_a_folder_is_not_a_sound_file(tmp_path):
    """Fails where a folder given for a file ends in a traceback of the decoder."""
    with pytest.raises(AudioError, match="no such file"):
        audio.read(tmp_path)


def test_a_data_chunk_that_claims_more_than_the_file_has(tmp_path):
    """A file of 600 bytes decodes to gigabytes of zeros, since its codec goes on after the end."""
    soundfile.write(
        tmp_path / "a.w64",
        np.random.default_rng(0).normal(0, 0.1, 2000),
        8000,
        "GSM610",
        format="W64",
    )
    content = bytearray((tmp_path / "a.w64").read_bytes())
    place = content.index(b"data") + 16  # of its size, 8 bytes
    content[place + 6 : place + 8] = b"\x7f\xff"
    (tmp_path / "a.w64").write_bytes(content)
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from minidvae.data import audio
try:
    assert len(audio.load({str(tmp_path / "a.w64")!r})) < 1e7
except audio.AudioError:
    pass
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
