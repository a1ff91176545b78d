"""From the output of a recogniser to what was said, and how many errors are in that. Knows no model and no corpus.

Symbols (phones, characters) and words are numbers; scores are natural logarithms. What is searched for is the sequence
that maximises

    Σ_t log-likelihood of frame t  +  weight · log P(sequence)  +  penalty · its number of symbols (or words)

with P from a `Bigram`: a positive `penalty` makes sequences longer.
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

# ---------------------------------------------------------------------------------------------------------- errors


@dataclass(frozen=True)
class Errors:
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    length: int = 0  # symbols of the reference

    @property
    def count(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per symbol of the reference; nan where it has none."""
        return self.count / self.length if self.length else float("nan")

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            *(
                ours + theirs
                for ours, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )


def align(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> Errors:
    """The fewest edits that make the hypothesis of the reference (Levenshtein 1966); among those, the ones with the
    fewest insertions and deletions. An insertion or deletion costs `edit` + 1, a substitution `edit`, and `edit` is
    more than all these 1 together: the cost tells how many there are of each, and no path needs to be traced."""
    numbers = {}
    there, here = (
        np.array([numbers.setdefault(x, len(numbers)) for x in s], int)
        for s in (reference, hypothesis)
    )
    edit = len(there) + len(here) + 1
    insertions = np.arange(len(here) + 1) * (edit + 1)
    costs = insertions
    for symbol in there:
        costs = np.append(
            costs[0] + edit + 1,
            np.minimum(costs[1:] + edit + 1, costs[:-1] + edit * (here != symbol)),
        )
        costs = np.minimum.accumulate(costs - insertions) + insertions
    edits, indels = divmod(int(costs[-1]), edit)
    deletions = (indels + len(there) - len(here)) // 2
    return Errors(edits - indels, deletions, indels - deletions, len(there))


# ------------------------------------------------------------------------------------------------------------ bigram


@dataclass(frozen=True)
class Bigram:
    """P(next | previous) over symbols 0 … size − 1. As a previous symbol, `size` is the start; as a next one, the end.

    Witten and Bell's smoothing (1991, method C), interpolated as in Chen and Goodman, "An empirical study of smoothing
    techniques for language modeling", 1998, section 2.5:

        P(w | v) = (c(v, w) + T(v)·P(w)) / (c(v) + T(v)),    P(w) = (c(w) + T / (size + 1)) / (c + T)

    with T(v) the number of different symbols seen after v, and T of those seen at all.
    """

    size: int
    unigram: np.ndarray  # P(w), (size + 1,)
    backoff: np.ndarray  # T(v) / (c(v) + T(v)), 1 where v was not seen, (size + 1,)
    keys: np.ndarray  # v·(size + 1) + w of the pairs that were seen, sorted
    seen: np.ndarray  # c(v, w) / (c(v) + T(v)) of each

    @classmethod
    def fit(cls, sequences: Iterable[Sequence[int]], size: int) -> "Bigram":
        """From sequences of numbers below `size`."""
        pairs = [
            v * (size + 1) + w
            for sequence in sequences
            for v, w in itertools.pairwise([size, *sequence, size])
        ]
        keys, counts = np.unique(np.array(pairs, np.int64), return_counts=True)
        previous, following = np.divmod(keys, size + 1)
        unigram = np.bincount(following, counts, minlength=size + 1)
        kinds = max(1, np.count_nonzero(unigram))
        unigram = (unigram + kinds / (size + 1)) / (unigram.sum() + kinds)
        different = np.bincount(previous, minlength=size + 1)
        totals = np.bincount(previous, counts, minlength=size + 1) + different
        backoff = np.divide(different, totals, out=np.ones(size + 1), where=totals > 0)
        return cls(size, unigram, backoff, keys, counts / totals[previous])

    def log_probability(self, previous, following) -> np.ndarray:
        """ln P(following | previous) of arrays of one shape, or of shapes that broadcast."""
        previous, following = np.broadcast_arrays(previous, following)
        probability = self.backoff[previous] * self.unigram[following]
        if len(self.keys):
            keys = previous * (self.size + 1) + following
            places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
            probability = probability + np.where(self.keys[places] == keys, self.seen[places], 0.0)
        return np.log(probability)

    def matrix(self) -> np.ndarray:
        """All of them, (previous, next), (size + 1, size + 1)."""
        numbers = np.arange(self.size + 1)
        return self.log_probability(numbers[:, None], numbers)


# ----------------------------------------------------------------------------------------- phones, a state a few frames


def viterbi(
    log_likelihoods: np.ndarray, bigram: Bigram, weight=1.0, penalty=0.0, minimum=3
) -> list[int]:
    """The best sequence of phones, each of `minimum` frames at least.

    log_likelihoods: (frames, phones); of a network log p(phone | x) − log p(phone), log p(x | phone) but for a constant
    per frame (Bourlard and Morgan, "Connectionist speech recognition", 1994). A phone is a left-to-right HMM of
    `minimum` states, of which the last repeats. The same phone may come twice in a row. Fewer frames than `minimum` are
    one phone."""
    frames, phones = log_likelihoods.shape
    minimum = max(1, min(minimum, frames))
    transitions = weight * bigram.matrix() + penalty
    between, end = (
        transitions[:-1, :-1].T.copy(),
        transitions[:-1, -1] - penalty,
    )  # (next, previous)
    before = np.zeros(
        (frames + 1, phones), int
    )  # the phone before one that is entered at this frame
    stays = np.zeros((frames, phones), bool)  # whether the last state was reached from itself
    states, entering = np.full((minimum, phones), -np.inf), transitions[-1, :-1]
    for t, likelihoods in enumerate(log_likelihoods):
        reached = np.concatenate([entering[None], states[:-1]])
        stays[t] = states[-1] > reached[-1]
        np.maximum(reached[-1], states[-1], out=reached[-1])
        states = reached + likelihoods
        candidates = between + states[-1]
        before[t + 1], entering = candidates.argmax(1), candidates.max(1)
    phone, stop, found = int((states[-1] + end).argmax()), frames, []
    while stop:
        t = stop - 1
        while stays[t, phone]:
            t -= 1
        stop = t - minimum + 1
        found.append(phone)
        phone = int(before[stop, phone])
    return found[::-1]


# --------------------------------------------------------------------------------------------------------------- CTC


def ctc_greedy(log_probabilities: np.ndarray) -> list[int]:
    """The symbols of the best path: repetitions merged, blanks (output 0) left out, numbers from 0. log_probabilities:
    (frames, 1 + symbols)."""
    best = log_probabilities.argmax(1)
    return (best[(best != 0) & (best != np.append(0, best[:-1]))] - 1).tolist()


def ctc_beam(
    log_probabilities: np.ndarray,
    beam: int = 16,
    bigram: Bigram | None = None,
    weight=1.0,
    penalty=0.0,
) -> list[int]:
    """The most probable sequence of symbols, summed over its alignments, among those that stay in the beam. Prefix beam
    search (Hannun et al., "First-pass large vocabulary continuous speech recognition using bi-directional recurrent
    DNNs", 2014). log_probabilities: (frames, 1 + symbols), of which 0 is the blank."""
    symbols = log_probabilities.shape[1] - 1
    language = np.zeros((symbols + 1, symbols + 1)) if bigram is None else weight * bigram.matrix()
    prefixes = [()]
    in_blank, in_label = (
        np.zeros(1),
        np.full(1, -np.inf),
    )  # log probability that a prefix ended in a blank, or did not
    for frame in log_probabilities:
        last = np.array([prefix[-1] if prefix else symbols for prefix in prefixes])
        total = np.logaddexp(in_blank, in_label)
        from_all = np.repeat(total[:, None], symbols, 1)
        repeated = np.flatnonzero(last < symbols)
        from_all[repeated, last[repeated]] = in_blank[
            repeated
        ]  # without a blank between, they would be one
        extended = from_all + language[last, :-1] + penalty + frame[1:]
        in_label = in_label + np.append(frame[1:], 0.0)[last]
        rows = {prefix: row for row, prefix in enumerate(prefixes)}
        for row, prefix in enumerate(
            prefixes
        ):  # a prefix that is in the beam and an extension of another
            if prefix and (parent := rows.get(prefix[:-1])) is not None:
                in_label[row] = np.logaddexp(in_label[row], extended[parent, last[row]])
                extended[parent, last[row]] = -np.inf
        in_blank = np.append(total + frame[0], np.full(extended.size, -np.inf))
        in_label = np.append(in_label, extended)
        scores = np.logaddexp(in_blank, in_label)
        kept = np.argsort(-scores, kind="stable")[:beam]
        kept = kept[scores[kept] > -np.inf]
        in_blank, in_label = in_blank[kept], in_label[kept]
        n = len(prefixes)
        prefixes = [
            prefixes[k] if k < n else (*prefixes[(k - n) // symbols], (k - n) % symbols)
            for k in kept.tolist()
        ]
    scores = (
        np.logaddexp(in_blank, in_label)
        + language[[prefix[-1] if prefix else symbols for prefix in prefixes], -1]
    )
    return list(prefixes[scores.argmax()])


# -------------------------------------------------------------------------------------------------------------- words


def follow(links: csr_array, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All entries in some rows (n,) of a sparse matrix: the place in `rows` of the row of each, and its column."""
    starts = links.indptr[rows]
    counts = links.indptr[rows + 1] - starts
    places = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, links.indices[starts[places] + within]


@dataclass(frozen=True)
class Lexicon:
    """The pronunciations of words as one network of states: a tree in which words share their beginnings. Every state
    stands for one output of the recogniser, and takes one frame or more. Of a frame-wise recogniser a phone is
    `minimum` states in a row, of which only the last repeats. Of CTC it is the label and a blank after it that may be
    left out, but not between two that are the same."""

    bigram: Bigram  # of words
    outputs: np.ndarray  # of each state
    repeats: np.ndarray  # whether it may follow itself
    ahead: np.ndarray  # ln P of the most frequent of the words that can still come of it
    arcs: csr_array  # (states, states), an entry where one may follow the other
    ends: (
        csr_array  # (states, words + 1), an entry where a word may end; the last column: a silence
    )
    entries: np.ndarray  # states that a word, or a silence, begins with
    apart: bool  # whether two of the same output need another state between them, as of CTC

    @classmethod
    def build(
        cls,
        pronunciations: Iterable[tuple[int, Sequence[int]]],
        bigram: Bigram,
        silence=None,
        minimum=3,
        blank=None,
    ) -> "Lexicon":
        """pronunciations: (word, its outputs), a word as often as it has pronunciations. silence: an output that may
        come before and after any word. blank: the output that is CTC's; without it, the frame-wise network."""
        states, ahead, arcs, ends, entries = (
            [],
            [],
            [],
            [],
            [],
        )  # states: (output, whether it may repeat)
        exits = 1 if blank is None else 2  # an output is left from the last `exits` of its states

        def add(output: int, least: int, before: Sequence[int]) -> range:
            """The states of an output that takes `least` frames or more, and follows any of the states `before`."""
            if blank is None:
                states.extend([(output, False)] * (least - 1) + [(output, True)])
            else:
                states.extend([(output, True)] + [(blank, True)] * (output != blank))
            new = range(len(ahead), len(states))
            ahead.extend([-np.inf] * len(new))
            arcs.extend([*itertools.pairwise(new), *((state, new[0]) for state in before)])
            if not before:
                entries.append(new[0])
            return new

        children, unigram = (
            {},
            np.log(bigram.unigram).tolist(),
        )  # (states of the output before, output) → its states
        for word, pronunciation in pronunciations:
            here, previous = range(0), None
            for output in pronunciation:
                if (here, output) not in children:
                    before = (
                        here[-1:] if output == previous else here[-exits:]
                    )  # a repetition needs a blank between
                    children[here, output] = add(output, minimum, before)
                here, previous = children[here, output], output
                for state in here:
                    ahead[state] = max(ahead[state], unigram[word])
            ends.extend((state, word) for state in here[-exits:])
        most = max(ahead)  # after a silence, any word
        for output in (silence, blank):
            if output is not None:
                here = add(output, 1, ())
                ends.extend((state, bigram.size) for state in here)
                ahead[here[0] :] = [most] * len(here)
        outputs, repeats = map(np.array, zip(*states, strict=True))
        links = []
        for pairs, targets in ((arcs, len(states)), (ends, bigram.size + 1)):
            rows, columns = np.array(sorted(set(pairs)), np.int64).reshape(-1, 2).T
            links.append(csr_array((np.ones(len(rows)), (rows, columns)), (len(states), targets)))
        return cls(
            bigram, outputs, repeats, np.array(ahead), *links, np.array(entries), blank is not None
        )


def best_of_each(score: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where the highest score with each key is."""
    order = np.argsort(-score, kind="stable")
    return order[np.unique(key[order], return_index=True)[1]]


def decode_words(
    log_likelihoods: np.ndarray, lexicon: Lexicon, weight=1.0, penalty=0.0, tokens=500, word_ends=50
) -> list[int]:
    """The best sequence of words, by a search through the lexicon frame by frame.

    log_likelihoods: (frames, outputs), scaled likelihoods as for `viterbi` or CTC's log probabilities, of which the
    best path counts, not their sum. At every frame the best `tokens` pairs of a state and the word before it are kept
    (Ney and Ortmanns, "Progress in dynamic programming search for LVCSR", 2000), ranked with the best unigram among the
    words that they can still become, and the best `word_ends` of those in which a word ends. Where no word ends with
    the last frame, the words before it are the answer."""
    bigram, outputs, entries, nothing = (
        lexicon.bigram,
        lexicon.outputs,
        lexicon.entries,
        lexicon.bigram.size,
    )
    size, labels = len(outputs), int(outputs.max()) + 2
    # Of each token: its score, its state, the last word before it (`nothing` at the start), and the row of that word in
    # `traces`, which holds (row of the word before, word).
    score, state, history, trace = np.zeros(0), *np.zeros((3, 0), int)
    traces, found = [(0, nothing)], []
    begun = (
        np.zeros(len(entries)),
        entries,
        np.full(len(entries), nothing),
        np.zeros(len(entries), int),
    )
    for likelihoods in log_likelihoods:
        stay, (origin, following) = lexicon.repeats[state], follow(lexicon.arcs, state)
        stayed = score[stay], state[stay], history[stay], trace[stay]
        moved = score[origin], following, history[origin], trace[origin]
        score, state, history, trace = map(np.concatenate, zip(stayed, moved, begun, strict=True))
        score = score + likelihoods[outputs[state]]
        best = best_of_each(score, history * size + state)
        if len(best) > tokens:
            ranked = score[best] + weight * lexicon.ahead[state[best]]
            best = best[np.argpartition(-ranked, tokens)[:tokens]]
        score, state, history, trace = score[best], state[best], history[best], trace[best]
        origin, word = follow(lexicon.ends, state)
        ended, before, spoken = score[origin], history[origin], word < nothing
        ended[spoken] += weight * bigram.log_probability(before[spoken], word[spoken]) + penalty
        last = np.where(spoken, word, before)
        label = np.where(lexicon.apart, outputs[state[origin]], -1)
        best = best_of_each(ended, last * labels + label)
        best = best[np.argsort(-ended[best])[:word_ends]]
        row, entry = np.nonzero(label[best, None] != outputs[entries])
        begun = ended[best][row], entries[entry], last[best][row], len(traces) + row
        traces.extend(zip(trace[origin[best]].tolist(), word[best].tolist(), strict=True))
    if not len(score):
        return []
    token = score.argmax()
    if len(ended):
        best = (ended + weight * bigram.log_probability(last, nothing)).argmax()
        token, found = origin[best], [int(word[best])]
    row = trace[token]
    while row:
        row, number = traces[row]
        found.append(number)
    return [number for number in reversed(found) if number < nothing]


# -------------------------------------------------------------------------------------------------------- TIMIT phones

# Lee and Hon, "Speaker-independent phone recognition using hidden Markov models", 1989, Table II: 61 labels → 39. The
# glottal stop q is left out.
FOLDED = {
    **dict.fromkeys("pcl tcl kcl bcl dcl gcl h# #h pau epi".split(), "sil"),
    **{
        "ao": "aa",
        "ax": "ah",
        "ax-h": "ah",
        "axr": "er",
        "ix": "ih",
        "ux": "uw",
        "hv": "hh",
        "zh": "sh",
    },
    **{"el": "l", "em": "m", "en": "n", "nx": "n", "eng": "ng"},
}


def fold(phones: Iterable[str]) -> list[str]:
    """TIMIT's 61 phones as the 39 in which errors are counted."""
    return [FOLDED.get(phone, phone) for phone in phones if phone != "q"]
