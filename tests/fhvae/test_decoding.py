"""Error counts and searches against brute force: every alignment, every segmentation, every path of
a small case."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest

from minidvae.fhvae.decoding import (
    Bigram,
    Errors,
    Lexicon,
    align,
    ctc_beam,
    ctc_greedy,
    decode_words,
    fold,
    viterbi,
)

# ------------------------------------------------------------------------------------------ errors


def alignments(reference, hypothesis):
    """Yield (substitutions, deletions, insertions) of every alignment."""
    if not reference or not hypothesis:
        yield 0, len(reference), len(hypothesis)
        return
    for s, d, i in alignments(reference[1:], hypothesis[1:]):
        yield s + (reference[0] != hypothesis[0]), d, i
    for s, d, i in alignments(reference[1:], hypothesis):
        yield s, d + 1, i
    for s, d, i in alignments(reference, hypothesis[1:]):
        yield s, d, i + 1


def test_errors_against_every_alignment():
    """Fails where an edit is missed, or a deletion is called an insertion."""
    random = np.random.default_rng(0)
    for _ in range(150):
        reference = random.choice(list("abc"), random.integers(6)).tolist()
        hypothesis = random.choice(list("abc"), random.integers(6)).tolist()
        # Among alignments with equally few edits, the one with most substitutions counts.
        best = min(
            alignments(reference, hypothesis),
            key=lambda counts: (sum(counts), counts[1] + counts[2]),
        )
        expected = Errors(*best, len(reference))
        assert align(reference, hypothesis) == expected, (reference, hypothesis)


def test_error_rates_add_up():
    """Fails where rates of utterances are averaged rather than their counts, or an empty reference
    is a crash."""
    total = align("abcd", "abd") + align("ab", "axb") + align("a", "z")
    assert total == Errors(1, 1, 1, 7) and total.rate == 3 / 7
    assert math.isnan(align("", "x").rate) and align("", "x").insertions == 1
    words = align("the old dog saw us".split(), "the cold dog saw".split())
    assert words == Errors(substitutions=1, deletions=1, insertions=0, length=5)


# ------------------------------------------------------------------------------------------ bigram


def test_bigram_by_hand():
    """The probabilities must be those of Witten-Bell smoothing, with the counts written out. Fails
    where start and end are not treated as symbols."""
    bigram = Bigram.fit([[0, 1, 0], [0]], size=3)
    # Symbols 0, 1, 2 and the end follow something 3, 1, 0 and 2 times: three different ones of four
    # in six cases.
    unigram = np.array([3 + 3 / 4, 1 + 3 / 4, 3 / 4, 2 + 3 / 4]) / 9
    after_0 = (np.array([0, 1, 0, 2]) + 2 * unigram) / 5
    after_1 = (np.array([1, 0, 0, 0]) + unigram) / 2
    after_start = (np.array([2, 0, 0, 0]) + unigram) / 3
    expected = [after_0, after_1, unigram, after_start]  # Nothing follows 2.
    np.testing.assert_allclose(np.exp(bigram.matrix()), expected, rtol=1e-12)


def test_bigram_sums_to_one_also_for_what_was_not_seen():
    """Fails where smoothing gives away more or less than there is, or log 0 comes back."""
    random = np.random.default_rng(0)
    sequences = [random.integers(7, size=random.integers(5)).tolist() for _ in range(20)]
    fitted = Bigram.fit(sequences, size=9)
    for bigram in (fitted, Bigram.fit([], size=9)):
        probabilities = np.exp(bigram.matrix())
        np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
        assert probabilities.min() > 0
    log_probabilities = fitted.log_probability(np.array([9, 2]), 9)
    assert log_probabilities.tolist() == fitted.matrix()[[9, 2], 9].tolist()


# ----------------------------------------------------------------------------------------- Viterbi


def some_bigram(size, seed=0):
    random = np.random.default_rng(seed)
    return Bigram.fit([random.integers(size, size=4).tolist() for _ in range(3)], size)


def language_score(sequence, bigram, weight, penalty):
    previous = np.array([bigram.size, *sequence])
    following = np.array([*sequence, bigram.size])
    log_probability = bigram.log_probability(previous, following).sum()
    return penalty * len(sequence) + weight * log_probability


def acoustic_score(scores, sequence, parts):
    """Return the sum of the scores of a sequence of phones with these (start, stop)."""
    pairs = zip(sequence, parts, strict=True)
    return sum(scores[start:stop, phone].sum() for phone, (start, stop) in pairs)


def segmentations(frames, minimum):
    """Yield every way to cut frames into parts of at least `minimum`, as lists of (start, stop)."""
    for cuts in range(frames // minimum):
        for bounds in itertools.combinations(range(1, frames), cuts):
            parts = list(itertools.pairwise((0, *bounds, frames)))
            if all(stop - start >= minimum for start, stop in parts):
                yield parts


@pytest.mark.parametrize("minimum", [1, 2, 3])
@pytest.mark.parametrize(("weight", "penalty"), [(1.0, 0.0), (0.5, -1.5), (2.0, 3.0), (0.0, -40.0)])
def test_viterbi_against_every_segmentation(minimum, weight, penalty):
    """Fails where a duration, the start, the end, a weight or a penalty is left out or counted
    twice."""
    frames = 4 + minimum
    phones = 3
    bigram = some_bigram(phones)
    for seed in range(4):
        scores = 2 * np.random.default_rng(seed).standard_normal((frames, phones))
        best_of = {}  # sequence → score of its best segmentation
        for parts in segmentations(frames, minimum):
            for sequence in itertools.product(range(phones), repeat=len(parts)):
                score = acoustic_score(scores, sequence, parts)
                score += language_score(sequence, bigram, weight, penalty)
                best_of[sequence] = max(score, best_of.get(sequence, -np.inf))
        decoded = viterbi(scores, bigram, weight, penalty, minimum)
        best = max(best_of.values())
        assert best_of[tuple(decoded)] == pytest.approx(best, abs=1e-9), seed


def test_viterbi_of_almost_nothing():
    """Fails where an utterance shorter than a phone has no path."""
    scores = np.log([[0.1, 0.9], [0.1, 0.9]])
    assert viterbi(scores, some_bigram(2), 0.0, minimum=3) == [1]
    assert viterbi(scores[:0], some_bigram(2)) == []


# --------------------------------------------------------------------------------------------- CTC


def collapse(path):
    return tuple(k - 1 for k, _ in itertools.groupby(path) if k)


def test_greedy_ctc():
    """Fails where repetitions are not merged, or merged across a blank."""
    for path in ([0, 1, 1, 0, 1, 2, 2, 0], [2, 2, 1, 0], [0, 0], []):
        assert ctc_greedy(np.eye(3)[path].reshape(-1, 3)) == list(collapse(path))


@pytest.mark.parametrize(
    ("weight", "penalty"), [(None, 0.0), (None, 1.0), (1.0, 0.0), (0.6, 1.2), (3.0, -1.0)]
)
def test_ctc_beam_against_every_path(weight, penalty):
    """A beam that holds every prefix must find the best string of all. Fails where alignments of
    one string are not summed, the two ways to a repetition are mixed up, or the language model does
    not count once per symbol."""
    bigram = None if weight is None else some_bigram(2)
    for seed in range(8):
        scores = 1.5 * np.random.default_rng(seed).standard_normal((6, 3))
        scores -= np.logaddexp.reduce(scores, axis=1, keepdims=True)
        strings = {}
        for path in itertools.product(range(3), repeat=6):
            score = scores[range(6), path].sum()
            string = collapse(path)
            strings[string] = np.logaddexp(strings.get(string, -np.inf), score)
        for string in strings:
            if bigram is None:
                strings[string] += penalty * len(string)
            else:
                strings[string] += language_score(string, bigram, weight, penalty)
        expected = max(strings, key=strings.get)
        assert ctc_beam(scores, 1000, bigram, weight or 0.0, penalty) == list(expected), seed


def test_a_narrow_beam_is_not_worse_than_the_best_path():
    """The sum over alignments must count: with two frames in which a blank has probability 0.6, two
    blanks are the best path (0.36), but one symbol is more probable (0.64)."""
    scores = np.log([[0.6, 0.4], [0.6, 0.4]])
    assert ctc_greedy(scores) == []
    assert ctc_beam(scores, 2) == [0]
    assert ctc_beam(scores[:0]) == []


def plain_beam(scores, beam):
    """Return the best string of a prefix beam search with prefixes as tuples. Two dicts hold the
    log-probabilities of each prefix: that it ends in a blank, and that it ends in its last
    symbol."""
    in_blank = defaultdict(lambda: -np.inf, {(): 0.0})
    in_symbol = defaultdict(lambda: -np.inf)
    prefixes = [()]
    for frame in scores:
        next_in_blank = defaultdict(lambda: -np.inf)
        next_in_symbol = defaultdict(lambda: -np.inf)
        for prefix in prefixes:
            total = np.logaddexp(in_blank[prefix], in_symbol[prefix])
            next_in_blank[prefix] = np.logaddexp(next_in_blank[prefix], total + frame[0])
            for symbol, score in enumerate(frame[1:]):
                longer = (*prefix, symbol)
                if prefix[-1:] == (symbol,):
                    repeated = in_symbol[prefix] + score
                    next_in_symbol[prefix] = np.logaddexp(next_in_symbol[prefix], repeated)
                    extended = in_blank[prefix] + score
                else:
                    extended = total + score
                next_in_symbol[longer] = np.logaddexp(next_in_symbol[longer], extended)
        in_blank = next_in_blank
        in_symbol = next_in_symbol
        totals = {}
        for prefix in [*in_blank, *in_symbol]:
            totals[prefix] = np.logaddexp(in_blank.get(prefix, -np.inf), in_symbol[prefix])
        prefixes = sorted(totals, key=totals.get, reverse=True)[:beam]
    return prefixes[0]


def test_narrow_beams_against_plain_python():
    """Fails where a prefix that left the beam and comes back is another one to its extensions. The
    same string would then be in the beam twice, each with a part of its probability."""
    random = np.random.default_rng(3)
    for beam in (2, 5, 12, 12, 12, 12):
        scores = np.log(random.dirichlet(np.full(4, 0.4), 20) + 1e-9)
        assert ctc_beam(scores, beam) == list(plain_beam(scores, beam))


# ------------------------------------------------------------------------------------------- words

# (word, phones): words consist of phones 0 to 2; phone 3 is silence. Words 0 and 1 sound the same,
# word 2 is the beginning of other words, word 4 has two pronunciations.
PRONUNCIATIONS = [(0, (0, 1)), (1, (0, 1)), (2, (0,)), (3, (2, 2)), (4, (1,)), (4, (2, 0))]
WORDS, SILENCE = 5, 3


def word_sequences(longest, silence):
    """Yield (words, phones) of every sequence of pronunciations, and of silences if `silence`."""
    units = [((word,), phones) for word, phones in PRONUNCIATIONS]
    if silence:
        units.append(((), (SILENCE,)))
    for count in range(1, longest + 1):
        for sequence in itertools.product(units, repeat=count):
            words = itertools.chain.from_iterable(words for words, _ in sequence)
            phones = itertools.chain.from_iterable(phones for _, phones in sequence)
            yield tuple(words), tuple(phones)


@pytest.mark.parametrize(
    ("weight", "penalty", "minimum"), [(1.0, 0.0, 1), (2.0, 1.0, 2), (0.3, 4.0, 1)]
)
def test_words_against_every_segmentation(weight, penalty, minimum):
    """Fails where a word is lost that shares its beginning or its sound with another one, a silence
    counts as a word, or the language model forgets the word before a silence."""
    frames = 5 if minimum == 1 else 7
    bigram = some_bigram(WORDS)
    longest = frames // minimum  # largest number of phones that fit into the frames
    candidates = {}
    for words, phones in word_sequences(longest, True):
        if len(phones) <= longest:
            candidates.setdefault(phones, set()).add(words)
    lexicon = Lexicon.build(PRONUNCIATIONS, bigram, SILENCE, minimum)
    for seed in range(2):
        scores = 2 * np.random.default_rng(seed).standard_normal((frames, 4))
        results = {}
        for phones, sequences in candidates.items():
            acoustic = -np.inf
            for parts in segmentations(frames, minimum):
                if len(parts) == len(phones):
                    acoustic = max(acoustic, acoustic_score(scores, phones, parts))
            for words in sequences:
                score = acoustic + language_score(words, bigram, weight, penalty)
                results[words] = max(score, results.get(words, -np.inf))
        expected = max(results, key=results.get)
        assert decode_words(scores, lexicon, weight, penalty, 10**6, 10**6) == list(expected), seed


@pytest.mark.parametrize("silence", [None, SILENCE])
def test_words_of_ctc_against_every_path(silence):
    """Fails where a blank is required between different labels, or not required between two equal
    ones, inside words or between them."""
    frames = 5
    bigram = some_bigram(WORDS, 1)
    weight = 0.7
    penalty = 1.0
    outputs = []  # pronunciations as CTC labels: 0 is the blank, phones begin at 1
    for word, phones in PRONUNCIATIONS:
        outputs.append((word, tuple(phone + 1 for phone in phones)))
    lexicon = Lexicon.build(outputs, bigram, None if silence is None else silence + 1, blank=0)
    readings = {}
    for words, phones in word_sequences(frames, silence is not None):
        if len(phones) <= frames:
            readings.setdefault(phones, set()).add(words)
    readings[()] = {()}
    for seed in range(3):
        scores = 2 * np.random.default_rng(seed).standard_normal((frames, 5 if silence else 4))
        results = {}
        for path in itertools.product(range(scores.shape[1]), repeat=frames):
            for words in readings.get(collapse(path), ()):
                score = scores[range(frames), path].sum()
                score += language_score(words, bigram, weight, penalty)
                results[words] = max(score, results.get(words, -np.inf))
        expected = max(results, key=results.get)
        assert decode_words(scores, lexicon, weight, penalty, 10**6, 10**6) == list(expected), seed


def test_a_narrow_word_beam_still_finds_clear_speech():
    """Fails where pruning drops the best token, or an utterance that stops within a word has no
    result."""
    phones = [0, 1, 3, 2, 2, 1, 0]
    scores = np.full((28, 4), -6.0)
    scores[np.arange(28), np.repeat(phones, 4)] = -0.1
    lexicon = Lexicon.build(PRONUNCIATIONS, Bigram.fit([[0, 3, 4, 2]], WORDS), SILENCE, 3)
    assert decode_words(scores, lexicon, tokens=8, word_ends=4) == [0, 3, 4, 2]
    one_word = Lexicon.build([(0, (0, 1))], Bigram.fit([[0]], 1), minimum=3)
    assert decode_words(scores[:12], one_word, tokens=1, word_ends=1) in ([0], [0, 0])
    assert decode_words(scores[:2], one_word) == []


# ------------------------------------------------------------------------------------------- TIMIT


def test_timit_folding():
    """Fails where the 61 labels do not become the 39 of Lee and Hon."""
    labels = """
        iy ih eh ey ae aa aw ay ah ao oy ow uh uw ux er ax ix axr ax-h jh ch b d g p t k dx q
        s sh z zh f th v dh m n ng em en eng nx hh hv l r w y el bcl dcl gcl pcl tcl kcl epi pau h#
    """.split()
    assert len(labels) == 61 and len(set(fold(labels))) == 39 and len(fold(labels)) == 60
    folded = fold("h# sh ix hv eh dcl jh q ih kcl zh h#".split())
    assert folded == "sil sh ih hh eh sil jh ih sil sh sil".split()
