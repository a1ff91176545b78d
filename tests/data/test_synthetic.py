"""The built-in corpus sounds as its tables and its labels say."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import solve_toeplitz
from scipy.signal import resample_poly
from scipy.stats import kurtosis

from minidvae.data import synthetic
from minidvae.data.synthetic import SAMPLE_RATE

FEMALE, MALE = synthetic.make_speakers(seed=0, train=2, dev=0, test=0)
# Peterson and Barney 1952, men: F1 and F2 in Hz, and a word of the lexicon with the vowel.
PETERSON_BARNEY = {
    "iy": (270, 2290, "cheese"),
    "eh": (530, 1840, "bread"),
    "ae": (660, 1720, "hat"),
    "aa": (730, 1090, "clock"),
    "uw": (300, 870, "goose"),
    "uh": (440, 1020, "book"),
}


@pytest.fixture(scope="module")
def corpus():
    return list(synthetic.generate(seed=0, speakers=(6, 2, 2), utterances=6))


def say(speaker, words, seed=0):
    """Return the control tracks and the waveform of a sentence."""
    rng = np.random.default_rng(seed)
    tracks = synthetic.articulate(speaker, words.split(), rng)
    return tracks, synthetic.render(speaker, tracks, rng)


def first_segment(tracks, label):
    """Return the first segment of a phone."""
    return next(segment for segment in tracks.segments if segment.label == label)


def middle_of(segment) -> int:
    """Return the time in ms."""
    return (segment.start + segment.stop) // 2


def cut(waveform, start, stop):
    """Return the part of a waveform between two times in ms."""
    return waveform[start * SAMPLE_RATE // 1000 : stop * SAMPLE_RATE // 1000]


def f0_by_autocorrelation(x):
    """Return the fundamental frequency in Hz, between 60 and 400."""
    window = np.hanning(len(x))
    power = np.abs(np.fft.rfft((x - x.mean()) * window, 2 * len(x))) ** 2
    window_power = np.abs(np.fft.rfft(window, 2 * len(x))) ** 2
    correlation = (np.fft.irfft(power) / np.fft.irfft(window_power))[: SAMPLE_RATE // 60]
    lags = np.arange(SAMPLE_RATE // 400, len(correlation) - 1)
    rises = correlation[lags] >= correlation[lags - 1]
    falls = correlation[lags] > correlation[lags + 1]
    peaks = lags[rises & falls]
    return SAMPLE_RATE / peaks[correlation[peaks] > 0.9 * correlation[peaks].max()][0]


def formants_by_lpc(x):
    """Return the formants in Hz up to 5 kHz, by linear prediction of order 12 at 10 kHz."""
    x = resample_poly(x, 5, 8)
    x = np.append(x[0], x[1:] - 0.97 * x[:-1]) * np.hamming(len(x))
    correlation = np.correlate(x, x, "full")[len(x) - 1 :][:13]
    roots = np.roots(np.append(1, -solve_toeplitz(correlation[:-1], correlation[1:])))
    frequency = np.angle(roots) * 5000 / np.pi
    bandwidth = -np.log(np.abs(roots)) * 10000 / np.pi
    return np.sort(frequency[(frequency > 150) & (bandwidth < 500)])


def spectrum(x):
    """Return the frequencies in Hz and the power at each."""
    return np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE), np.abs(np.fft.rfft(x)) ** 2


def decibels(ratio):
    return 10 * np.log10(ratio)


def median_by_phone(corpus, measure) -> dict[str, float]:
    """Return the median of measure(samples) over all tokens of each phone."""
    values = {}
    for utterance in corpus:
        waveform = utterance.waveform / 32768
        for start, stop, label in utterance.phones:
            values.setdefault(label, []).append(measure(waveform[start:stop]))
    return {label: np.median(tokens) for label, tokens in values.items()}


# ----------------------------------------------------------------------------------- the waveform


def test_f0_follows_the_contour():
    """Fails if the pitch of stressed vowels is not that of the control track."""
    errors = []
    for speaker in synthetic.make_speakers(seed=1, train=6, dev=0, test=0):
        tracks, waveform = say(speaker, "now , the judge found my yellow window")
        for segment in tracks.segments:
            if segment.stress == "1" and segment.stop - segment.start > 60:
                middle = middle_of(segment)
                measured = f0_by_autocorrelation(cut(waveform, middle - 25, middle + 25))
                errors.append(measured / tracks.f0[middle] - 1)
    assert np.median(np.abs(errors)) < 0.01
    assert np.mean(np.abs(errors) < 0.05) > 0.9


def test_mean_f0_is_that_of_the_speaker():
    """Fails if the contours of a speaker are higher or lower than the speaker's mean by 6 %."""
    for speaker in (FEMALE, MALE):
        means = []
        for seed in range(5):
            tracks, _ = say(speaker, "the boy saw a green tree", seed)
            vowels = [segment for segment in tracks.segments if segment.stress]
            means.append(np.mean([tracks.f0[s.start : s.stop].mean() for s in vowels]))
        assert np.mean(means) == pytest.approx(speaker.f0, rel=0.06)


@pytest.mark.parametrize("length", [17.5, 15.0])
@pytest.mark.parametrize("vowel", PETERSON_BARNEY)
def test_formants_are_those_of_the_table_scaled_by_the_tract(vowel, length):
    """Fails if the first two formants, measured on the waveform, are not those of Peterson and
    Barney, or do not scale with the length of the vocal tract (in cm)."""
    f1, f2, word = PETERSON_BARNEY[vowel]
    speaker = replace(
        MALE, f0=100.0, vocal_tract_length=length, formant_factors=(1.0,) * 8, rate=0.7
    )
    measured = []
    for seed in range(5):
        tracks, waveform = say(speaker, word, seed)
        middle = middle_of(first_segment(tracks, vowel))
        measured.append(formants_by_lpc(cut(waveform, middle - 30, middle + 30))[:2])
    expected = np.array([f1, f2]) * 17.5 / length
    np.testing.assert_allclose(np.median(measured, axis=0), expected, rtol=0.09)


def test_second_formant_moves_through_diphthongs_and_glides():
    """Fails if the second formant does not rise from 960 to 1820 Hz in "oy" and from 610 Hz after
    "w" (Klatt 1980), measured on the waveform."""
    speaker = replace(MALE, f0=90.0, vocal_tract_length=17.5, formant_factors=(1.0,) * 8, rate=0.7)
    tracks, waveform = say(speaker, "boy , we")
    oy = first_segment(tracks, "oy")
    w = first_segment(tracks, "w")
    iy = first_segment(tracks, "iy")

    def second_formant(time):
        return formants_by_lpc(cut(waveform, time - 20, time + 20))[1]

    assert second_formant(oy.stop - 45) > 1.5 * second_formant(oy.start + 75)
    assert second_formant(middle_of(iy)) > 2 * second_formant(middle_of(w))


def spectral_centroid(x):
    frequency, power = spectrum(x)
    return (frequency * power).sum() / power.sum()


def test_fricatives_have_the_spectrum_of_their_place_of_articulation(corpus):
    """Fails if the energy of vowels is not low and that of fricatives high, or if that of "s" is
    not above that of "sh" (Jongman et al. 2000: 6133 against 4229 Hz)."""
    centroid = median_by_phone(corpus, spectral_centroid)
    assert max(centroid[label] for label in PETERSON_BARNEY if label in centroid) < 1500
    assert min(centroid[label] for label in ("f", "s", "sh", "ch", "t")) > 2500
    assert centroid["s"] > 1.2 * centroid["sh"]


def high_to_low_ratio(x):
    """Return the energy above 4 kHz over that below 1 kHz, in dB."""
    frequency, power = spectrum(x)
    return decibels(power[frequency > 4000].sum() / power[frequency < 1000].sum())


def test_high_frequencies_of_s_and_low_frequencies_of_voicing(corpus):
    """Fails if "s" is not made of noise alone, "z" of noise and voicing, or "iy" and "n" of voicing
    alone."""
    ratio = median_by_phone(corpus, high_to_low_ratio)
    assert ratio["s"] > 10
    assert -10 < ratio["z"] < ratio["s"] - 5
    assert ratio["iy"] < -10
    assert ratio["n"] < -10


def level(x):
    """Return the mean power in dB."""
    return decibels(np.mean(x**2))


@pytest.mark.parametrize("word, stop", [("water", "t"), ("happy", "p"), ("noticed", "t")])
def test_stops_have_a_closure_and_a_burst(word, stop):
    """Fails if a stop is not silent before its burst, or if there is no burst."""
    for speaker in (FEMALE, MALE):
        tracks, waveform = say(speaker, f"the {word}")
        index = [segment.label for segment in tracks.segments].index(stop)
        segment = tracks.segments[index]
        before = tracks.segments[index - 1]
        burst = segment.stop - segment.release
        closure_level = level(cut(waveform, segment.start + 15, burst - 5))
        assert level(cut(waveform, before.start, before.stop)) - closure_level > 25
        assert level(cut(waveform, burst, burst + 8)) - closure_level > 10


def test_voiced_stops_have_a_voice_bar():
    """Fails if "d" between vowels does not keep voicing in its closure, at low frequencies only, or
    if "t" does."""
    low_level = {}
    high_level = {}
    for stop, words in (("d", "every doctor"), ("t", "every toy")):
        tracks, waveform = say(replace(MALE, f0=110.0), words)
        segment = first_segment(tracks, stop)
        closure = cut(waveform, segment.start + 15, segment.stop - segment.release - 5)
        frequency, power = spectrum(closure)
        low_level[stop] = decibels(power[frequency < 500].sum())
        high_level[stop] = decibels(power[frequency > 1500].sum())
    assert low_level["d"] - low_level["t"] > 15
    assert low_level["d"] - high_level["d"] > 20


def test_breathiness_is_noise_between_the_harmonics():
    """Fails if the level between harmonics does not rise with the aspiration noise, by about the
    20 dB that separate the two values of breathiness."""
    without_variation = replace(MALE, f0=120.0, f0_range=0.0, jitter=0.0, shimmer=0.0)
    levels = []  # dB, relative to the mean
    for breathiness in (-36.0, -16.0):
        speaker = replace(without_variation, breathiness=breathiness)
        tracks, waveform = say(speaker, "saw")
        segment = first_segment(tracks, "ao")
        x = cut(waveform, segment.start + 60, segment.stop - 60)
        frequency, power = spectrum(x * np.blackman(len(x)))
        cycle = frequency / tracks.f0[middle_of(segment)] % 1
        is_between = (np.abs(cycle - 0.5) < 0.1) & (frequency > 400) & (frequency < 2500)
        levels.append(decibels(power[is_between].mean() / power.mean()))
    assert 14 < levels[1] - levels[0] < 24


def test_no_aliasing_of_the_glottal_pulses():
    """Fails if the energy between the harmonics of a steady vowel without noise is not 60 dB below
    that of the harmonics."""
    speaker = replace(
        FEMALE, f0=250.0, f0_range=0.0, jitter=0.0, shimmer=0.0, tilt=0.5, breathiness=-200.0
    )
    rng = np.random.default_rng(0)
    tracks = synthetic.articulate(speaker, ["saw"], rng)
    num_milliseconds = len(tracks.f0)
    middle = np.full(num_milliseconds, middle_of(first_segment(tracks, "ao")))
    constant_f0 = np.full(num_milliseconds, 250.0)
    steady = tracks._replace(
        f0=constant_f0,
        voicing=np.ones(num_milliseconds),
        formants=tracks.formants[middle],
        bandwidths=tracks.bandwidths[middle],
        tilt=tracks.tilt[middle],
    )
    phase = np.cumsum(np.repeat(constant_f0, 16)) / SAMPLE_RATE
    waveform = synthetic._voiced(speaker, steady, phase, rng)
    x = waveform[3200 : 3200 + 6400]  # 100 periods of 64 samples
    power = np.abs(np.fft.rfft(x)) ** 2
    is_between = np.arange(len(power)) % 100 > 0
    assert power[is_between].sum() / power.sum() < 1e-6


def test_female_and_male_voices_differ():
    """Fails if the ranges of F0 overlap, if vocal tracts are not longer in men, if two speakers
    have one voice or one name, or if a split does not have as many women as men."""
    speakers = synthetic.make_speakers(seed=0)
    women = [s for s in speakers if s.sex == "F"]
    men = [s for s in speakers if s.sex == "M"]
    assert min(s.f0 for s in women) > max(s.f0 for s in men)
    length_of_women = np.mean([s.vocal_tract_length for s in women])
    length_of_men = np.mean([s.vocal_tract_length for s in men])
    assert length_of_women < length_of_men - 1.5
    assert len({s.f0 for s in speakers}) == len(speakers)
    for split, count in (("train", 32), ("dev", 8), ("test", 8)):
        sexes = [s.sex for s in speakers if s.split == split]
        assert len(sexes) == count
        assert sexes.count("F") == count // 2
    assert len({s.name for s in speakers}) == 48


def test_waveforms_have_full_scale_and_a_noise_floor(corpus):
    """Fails if a waveform is clipped, quiet or shifted from zero, has digital silence, or lasts
    less than 1.5 s or more than 6 s."""
    for utterance in corpus:
        waveform = utterance.waveform
        assert waveform.dtype == np.int16
        assert abs(np.abs(waveform.astype(int)).max() - 0.99 * 32767) <= 1
        assert 1.5 < len(waveform) / SAMPLE_RATE < 6
        assert abs(waveform.mean()) < 0.01 * waveform.std()
        frames = waveform[: len(waveform) // 160 * 160].reshape(-1, 160).astype(float)
        lowest_level = 20 * np.log10(frames.std(axis=1).min() / 32767)
        assert -70 < lowest_level < -45


# --------------------------------------------------------------------- labels, text, repeatability


def phones_of(word) -> list[str]:
    """Return the phones of a word of the lexicon, without stress."""
    return [symbol.rstrip("01") for symbol in synthetic.LEXICON[word]]


def phones_of_all(words) -> set[str]:
    phones = set()
    for word in words:
        phones.update(phones_of(word))
    return phones


def test_labels_cover_the_waveform_and_spell_the_text(corpus):
    """Fails if labels leave a gap or overlap, or are not the phones of the words."""
    for utterance in corpus:
        starts, stops, labels = zip(*utterance.phones, strict=True)
        assert starts[0] == 0
        assert stops[-1] == len(utterance.waveform)
        assert starts[1:] == stops[:-1]
        assert all(stop > start for start, stop, _ in utterance.phones)
        assert labels[0] == labels[-1] == "sil"
        expected = []
        for word in utterance.text.split():
            expected += phones_of(word)
        assert [label for label in labels if label != "sil"] == expected


def test_lexicon_uses_every_phone():
    """Fails if a phone of the table is in no word, or a word has a phone that is not in the table,
    which is the ARPAbet as CMUdict uses it."""
    assert set(synthetic.TABLE) == phones_of_all(synthetic.LEXICON)
    assert len(synthetic.TABLE) == 39
    assert 100 <= len(synthetic.LEXICON) <= 150


def test_sentences_of_every_split_use_every_phone():
    """Fails if 80 sentences of a split leave out a phone, or if many are the same."""
    rng = np.random.default_rng(0)
    for split in synthetic.SPLITS:
        sentences = [synthetic.make_sentence(split, rng) for _ in range(80)]
        words = set(itertools.chain(*sentences)) - {","}
        assert phones_of_all(words) == set(synthetic.TABLE)
        assert len(set(map(tuple, sentences))) > 70


def test_no_sentence_occurs_in_two_splits(monkeypatch):
    """Fails if two splits share a sentence: of a grammar of 108 sentences, drawn 200 times for each
    split, chance alone would repeat many."""
    monkeypatch.setattr(synthetic, "SENTENCES", ("pronoun verb",))
    rng = np.random.default_rng(0)
    sentences = {}
    for split in synthetic.SPLITS:
        drawn = [synthetic.make_sentence(split, rng) for _ in range(200)]
        sentences[split] = {" ".join(words) for words in drawn}
    assert sentences["dev"]
    assert sentences["test"]
    assert not sentences["train"] & sentences["dev"]
    assert not sentences["train"] & sentences["test"]
    assert not sentences["dev"] & sentences["test"]


def test_same_seed_same_samples(corpus):
    """Fails if a seed does not give the same corpus twice, or if another seed does."""
    second = itertools.islice(synthetic.generate(seed=0, speakers=(6, 2, 2), utterances=6), 8)
    for utterance, repeated in zip(corpus[:8], second, strict=True):
        assert np.array_equal(utterance.waveform, repeated.waveform)
        assert utterance.phones == repeated.phones
        assert utterance.text == repeated.text
    other = next(synthetic.generate(seed=1, speakers=(1, 0, 0), utterances=1))
    assert other.text != corpus[0].text


def test_an_utterance_does_not_depend_on_the_size_of_the_corpus(corpus):
    """Fails if an utterance differs in a smaller corpus."""
    by_name = {utterance.name: utterance for utterance in corpus}
    for utterance in synthetic.generate(seed=0, speakers=(3, 0, 2), utterances=2):
        assert np.array_equal(utterance.waveform, by_name[utterance.name].waveform)


def test_generation_is_fast():
    """Fails if an utterance takes half a second: the 480 utterances of the default corpus would
    take four minutes."""
    start = time.perf_counter()
    assert len(list(synthetic.generate(seed=3, speakers=(2, 0, 0), utterances=5))) == 10
    assert time.perf_counter() - start < 5


# ------------------------------------------------------------------------------------- conditions


@pytest.fixture
def clean():
    _, waveform = say(MALE, "the old king saw a green bird")
    return waveform


def test_noise_is_added_between_5_and_15_db(clean):
    """Fails if the signal-to-noise ratio is not between 5 and 15 dB, or if the peak is not 1."""
    for seed in range(10):
        noisy = synthetic.apply_condition(clean, "noise", np.random.default_rng(seed))
        gain, *_ = np.linalg.lstsq(clean[:, None], noisy, rcond=None)
        ratio = 20 * np.log10(np.std(gain * clean) / np.std(noisy - gain * clean))
        assert 4.5 < ratio < 15.5
        assert np.abs(noisy).max() == pytest.approx(1)


def through_channel(x, seed):
    """Return x through a random channel, with norm 1."""
    y = synthetic.apply_condition(x, "channel", np.random.default_rng(seed))
    return y / np.linalg.norm(y)


def test_channel_is_a_linear_filter_that_differs_by_draw(clean):
    """Fails if the spectrum of the speech is not multiplied by the response to an impulse, or if
    all draws have about one response."""
    impulse = np.zeros(len(clean))
    impulse[len(clean) // 2] = 1.0
    responses = []  # dB
    for seed in range(5):
        spectrum_of_response = np.fft.rfft(through_channel(impulse, seed))[200:-200]
        responses.append(20 * np.log10(np.abs(spectrum_of_response)))
    for seed, response in enumerate(responses):
        assert np.ptp(response) > 6
        expected = np.abs(np.fft.rfft(clean))[200:-200] * 10 ** (response / 20)
        measured = np.abs(np.fft.rfft(through_channel(clean, seed)))[200:-200]
        assert np.corrcoef(expected, measured)[0, 1] > 0.99
    assert max(np.std(responses[0] - response) for response in responses[1:]) > 3


@pytest.mark.parametrize("condition", synthetic.CONDITIONS)
def test_conditions_keep_type_and_peak_and_repeat(condition, clean):
    """Fails if a condition changes the type or the peak, if a seed gives two waveforms, or if
    "clean" changes a sample or another condition none."""
    integers = np.rint(32000 * clean).astype(np.int16)
    first = synthetic.apply_condition(integers, condition, np.random.default_rng(7))
    second = synthetic.apply_condition(integers, condition, np.random.default_rng(7))
    assert first.dtype == np.int16
    assert np.abs(first.astype(int)).max() == 32000
    assert np.array_equal(first, second)
    assert np.array_equal(first, integers) == (condition == "clean")


def test_conditions_lie_over_the_same_speech(corpus):
    """Fails if noise replaces or delays the speech."""
    noisy = synthetic.apply_condition(corpus[0].waveform, "noise", np.random.default_rng(0))
    assert np.corrcoef(noisy, corpus[0].waveform)[0, 1] > 0.8


def test_unknown_condition_names_the_right_ones(clean):
    """Fails if the error for an unknown condition does not name those that exist."""
    with pytest.raises(ValueError, match="clean, noise, channel, both"):
        synthetic.apply_condition(clean, "reverb", np.random.default_rng(0))


def white_babble(num_samples, rng):
    return rng.standard_normal(num_samples)


def noise_alone(monkeypatch, noise_type, babble=white_babble):
    """Return 10 s of one type of noise. It is added to an impulse, whose sample is left out."""
    monkeypatch.setattr(synthetic, "NOISES", (noise_type,))
    impulse = np.full(10 * SAMPLE_RATE, 1e-9)
    impulse[0] = 1e-3
    noisy = synthetic.apply_condition(impulse, "noise", np.random.default_rng(0), babble)
    return noisy[1:]


def share_below_500_hz(x):
    power = np.abs(np.fft.rfft(x)) ** 2
    return power[: len(power) // 16].sum() / power.sum()


def test_noises_sound_like_their_names(monkeypatch):
    """Fails if white noise has no flat spectrum, a car no more energy below 500 Hz than above, or a
    restaurant no impacts; or if babble is not made of the voices that are passed."""
    white = noise_alone(monkeypatch, "white")
    car = noise_alone(monkeypatch, "car")
    restaurant = noise_alone(monkeypatch, "restaurant")
    assert share_below_500_hz(white) == pytest.approx(1 / 16, rel=0.1)
    assert share_below_500_hz(car) > 0.5
    tone = np.sin(0.3 * np.arange(10 * SAMPLE_RATE))
    babble = noise_alone(monkeypatch, "babble", lambda num_samples, rng: tone[:num_samples])
    assert abs(np.corrcoef(babble, tone[1:])[0, 1]) > 0.999
    assert kurtosis(restaurant) > 5
    assert abs(kurtosis(white)) < 0.1
