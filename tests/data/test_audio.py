"""Signals against their definitions: explicit sums in double precision, closed forms, known
files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from minidvae.data import audio
from minidvae.data.audio import FEATURE_STFT, STFT, AudioError

LIGHT = STFT(1024, 256)
BENCHMARK = STFT(512, 256)


def speechlike(samples, rate=16_000, seed=0):
    """Return a pulse train at 120 Hz through three resonances, with syllables and a little breath,
    peak 1."""
    rng = np.random.default_rng(seed)
    n = np.arange(samples)
    source = np.diff(n * 120 // rate, prepend=-1) + 0.01 * rng.standard_normal(samples)
    hertz = np.fft.rfftfreq(samples, 1 / rate)
    resonances = sum(1 / (1 + ((hertz - f) / 100) ** 2) for f in (600, 1200, 2500))
    syllables = 1 - 0.9 * np.cos(2 * np.pi * 3 * n / rate)
    waveform = np.fft.irfft(np.fft.rfft(source) * resonances, samples) * syllables
    return waveform / np.abs(waveform).max()


def fourier(frame, points=None):
    """Return the discrete Fourier transform of a frame, by the sum that defines it, from 0 Hz to
    half the sampling rate."""
    points = points or len(frame)
    n = np.arange(len(frame))
    k = np.arange(points // 2 + 1)
    return np.exp(-2j * np.pi * k[:, None] * n / points) @ frame


def sine_window(length):
    return np.array([np.sin(np.pi * (n + 0.5) / length) for n in range(length)])


def hamming_window(length):
    return np.array([0.54 - 0.46 * np.cos(2 * np.pi * n / length) for n in range(length)])


def centred_frames(waveform, window, hop):
    """Return the windowed frames: frame t is centred on sample t·hop, with zeros outside the
    waveform, up to the first centre past the last sample."""
    half = len(window) // 2
    num_frames = 1 + int(np.ceil(len(waveform) / hop))
    padded = np.concatenate([np.zeros(half), waveform, np.zeros(half + hop)])
    return [padded[t * hop : t * hop + len(window)] * window for t in range(num_frames)]


# ---------------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("stft", [LIGHT, BENCHMARK, FEATURE_STFT], ids=str)
@pytest.mark.parametrize("samples", [1, 255, 256, 257, 16_000, 31_999])
def test_complete_utterances_are_reconstructed(stft, samples):
    """Fails if analysis and synthesis do not undo each other, first and last samples included."""
    waveform = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, samples))).float()
    spectrum = stft.analyse(waveform)
    assert spectrum.shape == (2, 3, stft.frames(samples), stft.bins)
    assert (stft.synthesise(spectrum, samples) - waveform).abs().max() < 1e-5


def test_errors_of_a_frame_are_not_amplified_at_the_ends():
    """Fails if the last samples rest on the edge of one window: errors would be divided by almost
    0."""
    for stft in (LIGHT, BENCHMARK):
        for samples in (4 * stft.hop - 1, 4 * stft.hop, 4 * stft.hop + 1):
            shape = (stft.frames(samples), stft.window_length)
            error = torch.randn(shape, generator=torch.manual_seed(0))
            waveform = stft.synthesise(torch.fft.rfft(error), samples)
            assert waveform.abs().max() < 2 * error.abs().max()


def test_analysis_is_the_centred_windowed_transform():
    """Fails if window, centring, padding or transform differ from the definition."""
    waveform = speechlike(3001)
    windows = {
        LIGHT: sine_window(1024),
        BENCHMARK: sine_window(512),
        FEATURE_STFT: hamming_window(400),
    }
    for stft, window in windows.items():
        frames = centred_frames(waveform, window, stft.hop)
        expected = np.array([fourier(frame) for frame in frames])
        double = stft.analyse(torch.from_numpy(waveform)).numpy()
        assert np.abs(double - expected).max() < 1e-9
        single = stft.analyse(torch.from_numpy(waveform).float()).numpy()
        assert np.abs(single - expected).max() < 1e-3


def test_power_of_a_crop_is_not_padded():
    """Fails if a crop is padded, or if the number of frames is not the one that was asked for."""
    crop = speechlike(LIGHT.samples(5))
    expected = []
    for t in range(5):
        frame = crop[256 * t : 256 * t + 1024] * sine_window(1024)
        expected.append(np.abs(fourier(frame)) ** 2)
    power = LIGHT.power(torch.from_numpy(crop).float().expand(2, -1))
    assert power.dtype == torch.float32
    assert power.shape == (2, 5, 513)
    assert np.abs(power.numpy() - expected).max() < 1e-5 * np.max(expected)
    assert LIGHT.power(torch.zeros(LIGHT.samples(5) - 1)).shape == (4, 513)


def test_synthesis_is_the_least_squares_inverse():
    """Fails if synthesis does not return, for a spectrum that no waveform has, the waveform whose
    STFT is nearest to it."""
    stft = STFT(16, 8)
    samples = 40
    generator = torch.Generator().manual_seed(0)
    shape = (stft.frames(samples), stft.bins)
    target = torch.randn(shape, generator=generator, dtype=torch.complex128)
    target[:, [0, -1]] = target[:, [0, -1]].real + 0j

    # The STFT of x is analysis @ x.
    analysis = stft.analyse(torch.eye(samples, dtype=torch.float64)).flatten(1).mT
    # All bins but the first and the last stand for two frequencies in the sum of squares.
    multiplicity = torch.full((stft.bins,), 2.0, dtype=torch.float64)
    multiplicity[[0, -1]] = 1
    weight = multiplicity.sqrt().repeat(target.shape[0])[:, None]
    matrix = weight * analysis
    right_side = weight * target.reshape(-1, 1)
    nearest = torch.linalg.lstsq(
        torch.cat([matrix.real, matrix.imag]), torch.cat([right_side.real, right_side.imag])
    )
    assert (stft.synthesise(target, samples) - nearest.solution[:, 0]).abs().max() < 1e-9


def test_log_variance_scales_and_phase_stays():
    """Fails if the amplitude is not √(e^l), or if the phase of the input is lost."""
    waveform = torch.from_numpy(speechlike(5000))
    spectrum = LIGHT.analyse(waveform)
    log_variance = spectrum.abs().square().log() + 2 * np.log(3)
    louder = audio.resynthesise(log_variance, spectrum, LIGHT, 5000)
    assert (louder - 3 * waveform).abs().max() < 1e-9


def test_lengths_and_windows_that_cannot_work_are_refused():
    """Fails if a spectrum of another length is cut or padded silently, or if a hop leaves gaps."""
    with pytest.raises(ValueError, match="have 10 frames, the spectrum has 9"):
        LIGHT.synthesise(torch.zeros(9, 513, dtype=torch.complex64), 9 * 256)
    for window_length, hop in ((1024, 513), (1024, 0), (1023, 256)):
        with pytest.raises(ValueError, match="cannot be inverted"):
            STFT(window_length, hop)
    with pytest.raises(ValueError, match="'hann' is unknown"):
        STFT(64, 16, "hann").power(torch.zeros(64))


def test_a_window_first_used_in_inference_serves_training():
    """Fails if a window that was cached under inference_mode breaks a later backward pass."""
    stft = STFT(384, 96)
    with torch.inference_mode():
        stft.power(torch.zeros(384))
        audio.fbank(torch.zeros(400), bins=23)
    waveform = torch.ones(1000, requires_grad=True)
    (stft.power(waveform).sum() + audio.fbank(waveform, bins=23).sum()).backward()
    assert waveform.grad.isfinite().all()


def analyse_and_synthesise(waveform):
    return LIGHT.synthesise(LIGHT.analyse(waveform), waveform.shape[-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    """Fails if a GPU computes other spectra, features or waveforms, or if Griffin-Lim begins with
    other phases."""
    waveform = torch.from_numpy(speechlike(16_000)).float().expand(2, -1)
    power = LIGHT.analyse(waveform).abs().square()

    def griffin_lim(waveform):
        generator = torch.Generator().manual_seed(0)
        return audio.griffin_lim(power.to(waveform.device), LIGHT, 1, generator=generator)

    for function in (
        LIGHT.power,
        audio.fbank,
        audio.log_magnitude,
        analyse_and_synthesise,
        griffin_lim,
    ):
        on_cpu = function(waveform)
        on_gpu = function(waveform.cuda()).cpu()
        assert (on_gpu - on_cpu).abs().max() < 1e-3 * on_cpu.abs().max()


# ------------------------------------------------------------------------------------ Griffin-Lim


def spectral_convergence(waveform, magnitude, stft):
    """Return ‖|STFT(x)| − M‖ / ‖M‖."""
    return ((stft.analyse(waveform).abs() - magnitude).norm() / magnitude.norm()).item()


def griffin_lim_error(magnitude, iterations: int, momentum: float) -> float:
    generator = torch.Generator().manual_seed(0)
    waveform = audio.griffin_lim(magnitude.square(), LIGHT, iterations, momentum, 16_000, generator)
    return spectral_convergence(waveform, magnitude, LIGHT)


def test_griffin_lim_converges_and_momentum_helps():
    """Fails if iterations do not bring the spectrogram nearer, or if momentum does not speed them
    up."""
    magnitude = LIGHT.analyse(torch.from_numpy(speechlike(16_000)).float()).abs()
    errors = [griffin_lim_error(magnitude, count, momentum=0.0) for count in (0, 1, 5, 20, 60)]
    # Griffin & Lim 1984 prove that the error never rises without momentum.
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
    assert griffin_lim_error(magnitude, 60, momentum=0.99) < 0.5 * errors[-1]


def test_griffin_lim_is_batched_and_repeatable():
    """Fails if a seed gives two waveforms, if the clips of a batch influence each other, or if
    lengths are not kept."""
    waveforms = torch.from_numpy(np.stack([speechlike(7001, seed=seed) for seed in (1, 2)]))
    power = LIGHT.analyse(waveforms).abs().square()

    def rebuild(seed):
        generator = torch.Generator().manual_seed(seed)
        return audio.griffin_lim(power, LIGHT, 3, length=7001, generator=generator)

    assert rebuild(5).shape == (2, 7001)
    assert torch.equal(rebuild(5), rebuild(5))
    assert not torch.allclose(rebuild(5), rebuild(6))
    power[1] = 0
    sounding, silent = audio.griffin_lim(power, LIGHT, 3)
    assert sounding.shape == (28 * 256,)
    assert sounding.abs().max() > 0.1
    assert not silent.any()


# --------------------------------------------------------------------------------------- features


def mel(hertz):
    return 1127 * np.log(1 + hertz / 700)


def mel_energies(power) -> list[float]:
    """Return the energies in 80 triangles on the mel scale from 20 to 8000 Hz, of a power spectrum
    with 513 bins up to 8000 Hz."""
    edges = [mel(20) + (mel(8000) - mel(20)) * i / 81 for i in range(82)]
    energies = []
    for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
        energy = 0.0
        for k in range(513):
            position = mel(k * 16_000 / 1024)
            if left < position <= centre:
                energy += power[k] * (position - left) / (centre - left)
            elif centre < position < right:
                energy += power[k] * (right - position) / (right - centre)
        energies.append(energy)
    return energies


def test_fbank_is_its_definition():
    """Fails if frames, window, mel scale, triangles, floor or logarithm differ from the
    docstring's, or if digital silence is not finite."""
    waveform = speechlike(1601)
    waveform[:700] = 0
    expected = []
    for frame in centred_frames(waveform, hamming_window(400), 160):
        power = np.abs(fourier(frame, 1024)) ** 2
        expected.append([np.log(max(energy, 1e-8)) for energy in mel_energies(power)])
    features = audio.fbank(torch.from_numpy(waveform))
    assert features.shape == (12, 80)
    assert np.log(1e-8) in features
    assert np.abs(features.numpy() - expected).max() < 1e-9
    single = audio.fbank(torch.from_numpy(waveform).float()).numpy()
    assert np.abs(single - expected).max() < 0.01


def test_log_magnitude_is_its_definition_and_comes_back():
    """Fails if the bins are others than 40 to 8000 Hz, or if the way back to sound is not the
    inverse."""
    waveform = speechlike(4000)
    waveform -= waveform.mean()
    expected = []
    for frame in centred_frames(waveform, hamming_window(400), 160):
        magnitude = np.abs(fourier(frame)[1:])
        expected.append(np.log(np.maximum(magnitude, 1e-4)))
    features = audio.log_magnitude(torch.from_numpy(waveform))
    assert features.shape == (26, 200)
    assert np.abs(features.numpy() - np.array(expected)).max() < 1e-9
    power = audio.log_magnitude_to_power(features)
    assert (power[:, 0] == 0).all()
    spectrum = FEATURE_STFT.analyse(torch.from_numpy(waveform))
    back = audio.resynthesise(power.log(), spectrum, FEATURE_STFT, 4000)
    error = (back - torch.from_numpy(waveform)).norm()
    assert error / np.linalg.norm(waveform) < 0.03  # The bin of 0 Hz is lost.


def test_features_of_a_crop_are_those_of_the_utterance():
    """Fails if a crop of an utterance has other frames than the utterance at the same time."""
    waveform = torch.from_numpy(speechlike(8000))
    start = 10 * 160 - 200  # the sample with which centred frame 10 begins
    crop = waveform[start : start + FEATURE_STFT.samples(20)]
    for feature in (audio.fbank, audio.log_magnitude):
        assert (feature(crop, centred=False) - feature(waveform)[10:30]).abs().max() < 1e-9


# ------------------------------------------------------------------------------------------- trim


def test_trim_keeps_the_loud_part_of_a_known_signal():
    """Fails if the bounds are not those that the levels of the frames give by hand.

    Samples 10,240 to 20,480 are loud. Of the frames of 2048 around 512·t, the first to touch them
    is t = 19 (8,704 to 10,752, a quarter loud, −6.0 dB), the last t = 41; of t = 20 and 40 a half
    is loud, −3.0 dB.
    """
    waveform = np.zeros(30_000, np.float32)
    waveform[10_240:20_480] = 0.5
    assert audio.trim_bounds(waveform) == (19 * 512, 42 * 512)
    assert audio.trim_bounds(waveform, threshold_db=5.9) == (20 * 512, 41 * 512)

    def with_floor(level):
        return np.where(waveform, waveform, 0.5 * 10 ** (level / 20))

    assert audio.trim_bounds(with_floor(-31)) == (19 * 512, 42 * 512)
    # Frames that reach past the ends are below the threshold if the floor is at −29 dB: t = 0 and 1
    # (a half and three quarters, −32.0 and −30.2 dB) and t = 58 (1,328 samples, −30.9 dB), not
    # t = 57 (1,840 samples, −29.5 dB).
    assert audio.trim_bounds(with_floor(-29)) == (2 * 512, 58 * 512)
    assert audio.trim_bounds(waveform[10_240:20_480]) == (0, 10_240)
    assert audio.trim_bounds(np.zeros(5000)) == audio.trim_bounds(np.zeros(0)) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_trim_is_its_definition(seed):
    """Fails if the running sum gives other levels than the frames themselves."""
    rng = np.random.default_rng(seed)
    speech = speechlike(rng.integers(9000, 30_000), seed=seed)
    silence_before = np.zeros(rng.integers(9000))
    silence_after = np.zeros(rng.integers(9000))
    waveform = np.concatenate([silence_before, speech, silence_after])
    noise_level = 10 ** rng.uniform(-4, -1)
    waveform = waveform + noise_level * rng.standard_normal(len(waveform))
    waveform = waveform.astype(np.float32)
    padded = np.pad(waveform.astype(np.float64), 1024)
    frames = [padded[t * 512 : t * 512 + 2048] for t in range(1 + len(waveform) // 512)]
    levels = [10 * np.log10(np.mean(frame**2)) for frame in frames]
    loud = [t for t, level in enumerate(levels) if level > max(levels) - 30]
    assert audio.trim_bounds(waveform) == (loud[0] * 512, min(len(waveform), (loud[-1] + 1) * 512))


# ------------------------------------------------------------------------------------------ files


def sinusoid(hertz, rate, seconds=0.5):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_a_resampled_tone_is_the_tone_at_the_new_rate(rate):
    """Fails if a tone is shifted, scaled or distorted, or if a tone that the new rate cannot
    represent gets through."""
    resampled = audio.resample(sinusoid(1000, rate).astype(np.float32), rate, 16_000)
    assert resampled.dtype == np.float32
    assert len(resampled) == int(np.ceil(round(rate / 2) * 16_000 / rate))
    expected = sinusoid(1000, 16_000)[: len(resampled)]
    assert np.abs(resampled - expected)[200:-200].max() < 2e-3
    if rate > 40_000:
        too_high = audio.resample(sinusoid(10_000, rate), rate, 16_000)
        assert np.abs(too_high)[200:-200].max() < 2e-3


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
    """Fails if a format does not decode, if channels are not averaged, or if the rate or the number
    of channels is not that of the file."""
    left = sinusoid(400, rate)
    right = sinusoid(700, rate)
    stereo = np.stack([left, right], axis=1)
    soundfile.write(tmp_path / name, stereo, rate, format=format, subtype=subtype)
    waveform, file_rate, channels = audio.read(tmp_path / name)
    assert waveform.dtype == np.float32
    assert file_rate == rate
    assert channels == 2
    assert np.abs(waveform - (left + right) / 2).max() < error
    expected = (sinusoid(400, 16_000) + sinusoid(700, 16_000)) / 2
    assert np.abs(audio.load(tmp_path / name) - expected)[200:-200].max() < error + 2e-3


def test_a_flac_without_its_length_is_read(tmp_path):
    """Fails if the length is taken from a header that lacks it, as that of a piped encoder does, or
    if blocks are lost."""
    path = tmp_path / "a.flac"
    waveform = np.random.default_rng(0).integers(-(2**15), 2**15, (2**20 + 99, 2)).astype(np.int16)
    soundfile.write(path, waveform, 16_000)
    content = bytearray(path.read_bytes())
    # The number of samples is in the last 36 bits before the checksum of STREAMINFO.
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    decoded, _, _ = audio.read(path)
    assert np.array_equal(decoded, (waveform / np.float32(2**15)).mean(axis=1))


def test_written_files_come_back(tmp_path):
    """Fails if a file is not a 16-bit wav with errors of at most half a step, if loud waveforms
    wrap around, or if an old file is not replaced."""
    path = tmp_path / "a.wav"
    waveform = np.random.default_rng(0).uniform(-1, 1, 4000).astype(np.float32)
    waveform[:2] = [1, -1]
    audio.write(path, waveform)
    info = soundfile.info(path)
    assert info.format == "WAV"
    assert info.subtype == "PCM_16"
    assert info.samplerate == 16_000
    assert info.channels == 1
    back, _ = soundfile.read(path)
    assert np.abs(back - waveform)[1:].max() <= 2**-16  # half a step
    assert back[0] == 1 - 2**-15  # the largest number of 16 bits
    audio.write(path, 4 * waveform, rate=8000)
    loud, rate = soundfile.read(path)
    assert rate == 8000
    assert np.array_equal(loud, back)
    audio.write(path, np.zeros(0))
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    """Fails if an interrupt or a bad sample leaves half a file, or harms the file before."""
    path = tmp_path / "a.wav"
    audio.write(path, np.full(10, 0.5))
    with pytest.raises(AudioError, match=r"a\.wav: not written.*expected"):
        audio.write(path, np.array([0.0, np.nan]))

    def write_half(file, *_, **__):
        file.write_bytes(b"RIFF")
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", write_half)
    with pytest.raises(KeyboardInterrupt):
        audio.write(path, np.zeros(5))
    assert list(tmp_path.iterdir()) == [path]
    waveform, _, _ = audio.read(path)
    assert np.array_equal(waveform, np.full(10, np.float32(0.5)))


SHORTEN_HEADER = b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n"
SHORTEN_FILE = SHORTEN_HEADER.ljust(1024) + b"ajkg\x02" + bytes(999)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("nothing.wav", None, "no such file"),
        ("zero.wav", b"", "does not decode"),
        ("text.wav", b"hello, I am not a wav file\n" * 99, "does not decode"),
        ("headerless.raw", b"\x01\x02" * 99, "does not decode"),
        ("cut.flac", b"fLaC\x00\x00", "does not decode"),
        ("packed.wv1", SHORTEN_FILE, "shorten"),
        ("silent.wav", np.zeros(0), "no samples"),
        ("infinite.wav", np.array([0, np.inf, 0]), "infinite, too large or not numbers"),
        ("undefined.wav", np.array([np.nan, 0, 0]), "infinite, too large or not numbers"),
        ("opposed.wav", np.array([[np.inf, -np.inf]]), "infinite, too large or not numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_files_get_one_line(tmp_path, name, content, reason):
    """Fails if a bad file is read silently, or if the error does not say which file and what is
    wrong."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError) as error:
        audio.read(path)
    line = str(error.value)
    assert line.startswith(f"{path}: ")
    assert reason in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("rate", "is_accepted"),
    [(1, False), (3999, False), (4000, True), (768_000, True), (768_001, False)],
)
def test_rates_that_are_no_rates_of_speech_are_refused(tmp_path, rate, is_accepted):
    """Fails if a header that claims 1 Hz makes 16,000 samples of every one, or if a rate that
    occurs is refused."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.full(1000, 0.5), rate)
    if is_accepted:
        assert len(audio.load(path)) == np.ceil(1000 * 16_000 / rate)
    else:
        message = rf"a\.wav: claims a sampling rate of {rate} Hz; expected 4000 to 768000$"
        with pytest.raises(AudioError, match=message):
            audio.load(path)


def test_a_folder_is_not_a_sound_file(tmp_path):
    """Fails if a folder in place of a file ends in a traceback of the decoder."""
    with pytest.raises(AudioError, match="no such file"):
        audio.read(tmp_path)


LOAD_WITH_TIME_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from minidvae.data import audio
try:
    assert len(audio.load(sys.argv[1])) < 1e7
except audio.AudioError:
    pass
"""


def test_a_data_chunk_that_claims_more_than_the_file_has(tmp_path):
    """Fails if a file of 600 bytes decodes to gigabytes of zeros because its codec goes on after
    the end."""
    path = tmp_path / "a.w64"
    waveform = np.random.default_rng(0).normal(0, 0.1, 2000)
    soundfile.write(path, waveform, 8000, "GSM610", format="W64")
    content = bytearray(path.read_bytes())
    size_field = content.index(b"data") + 16  # position of the 8 bytes with the size of the chunk
    content[size_field + 6 : size_field + 8] = b"\x7f\xff"
    path.write_bytes(content)
    command = [sys.executable, "-c", LOAD_WITH_TIME_LIMIT, str(path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
