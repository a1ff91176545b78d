"""From the output of a recogniser to what was said, and how many errors are in that. Knows no model and no corpus.

Symbols (phones, characters) and words are numbers; scores are natural logarithms. What is searched for is the sequence
that maximises

    Σ_t log-likelihood of frame t  +  weight · log P(sequence)  +  penalty · its number of symbols (or words)

with P from a `Bigram`: a positive `penalty` makes sequences longer.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Errors(*(ours + theirs for ours, theirs in pairs))


def align(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> Errors:
    """The fewest edits that make the hypothesis of the reference (Levenshtein 1966); among those, the ones with the
    fewest insertions and deletions.

    An insertion or deletion costs `edit` + 1, a substitution `edit`, and `edit` is more than all these 1 together: the
    cost tells how many there are of each, and no path needs to be traced.
    """
    numbers = {}
    there, here = (np.array([numbers.setdefault(x, len(numbers)) for x in s], int) for s in (reference, hypothesis))
    edit = len(there) + len(here) + 1
    insertions = np.arange(len(here) + 1) * (edit + 1)
    costs = insertions
    for symbol in there:
        costs = np.append(costs[0] + edit + 1, np.minimum(costs[1:] + edit + 1, costs[:-1] + edit * (here != symbol)))
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
        pairs = Counter()
        for sequence in sequences:
            pairs.update(zip([size, *sequence], [*sequence, size], strict=True))
        ordered = sorted(pairs)
        previous, following = np.array(ordered, np.int64).reshape(-1, 2).T
        counts = np.array([pairs[pair] for pair in ordered], float)
        unigram = np.bincount(following, counts, minlength=size + 1)
        kinds = max(1, np.count_nonzero(unigram))
        unigram = (unigram + kinds / (size + 1)) / (unigram.sum() + kinds)
        different = np.bincount(previous, minlength=size + 1)
        totals = np.bincount(previous, counts, minlength=size + 1) + different
        backoff = np.divide(different, totals, out=np.ones(size + 1), where=totals > 0)
        return cls(size, unigram, backoff, previous * (size + 1) + following, counts / totals[previous])

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
    log_likelihoods: np.ndarray, bigram: Bigram, weight: float = 1.0, penalty: float = 0.0, minimum: int = 3
) -> list[tuple[int, int, int]]:
    """The best sequence of phones, each of `minimum` frames at least: (phone, first frame, the one after its last).

    log_likelihoods: (frames, phones); of a network log p(phone | x) − log p(phone), log p(x | phone) but for a constant
    per frame (Bourlard and Morgan, "Connectionist speech recognition", 1994). A phone is a left-to-right HMM of
    `minimum` states, of which the last repeats. The same phone may come twice in a row. Fewer frames than `minimum` are
    one phone.
    """
    frames, phones = log_likelihoods.shape
    if not frames:
        return []
    minimum = min(minimum, frames)
    transitions = weight * bigram.matrix() + penalty
    between, end = transitions[:-1, :-1].T.copy(), transitions[:-1, -1] - penalty  # (next, previous)
    everyone = np.arange(phones)
    before = np.zeros((frames, phones), int)  # the phone before one that is entered at this frame
    stays = np.zeros((frames, phones), bool)  # whether the last state was reached from itself
    states = np.full((minimum, phones), -np.inf)
    for t, likelihoods in enumerate(log_likelihoods):
        if t:
            candidates = between + states[-1]
            before[t] = candidates.argmax(1)
            entering = candidates[everyone, before[t]]
        else:
            entering = transitions[-1, :-1]
        reached = np.concatenate([entering[None], states[:-1]])
        stays[t] = states[-1] > reached[-1]
        np.maximum(reached[-1], states[-1], out=reached[-1])
        states = reached + likelihoods
    phone, stop, found = int((states[-1] + end).argmax()), frames, []
    while stop:
        t = stop - 1
        while stays[t, phone]:
            t -= 1
        start = t - minimum + 1
        found.append((phone, start, stop))
        phone, stop = int(before[start, phone]), start
    return found[::-1]


# --------------------------------------------------------------------------------------------------------------- CTC


def ctc_greedy(log_probabilities: np.ndarray) -> list[int]:
    """The symbols of the best path: repetitions merged, blanks (output 0) left out, numbers from 0.

    log_probabilities: (frames, 1 + symbols).
    """
    best = log_probabilities.argmax(1)
    return (best[(best != 0) & (best != np.append(0, best[:-1]))] - 1).tolist()


def ctc_beam(
    log_probabilities: np.ndarray,
    beam: int = 16,
    bigram: Bigram | None = None,
    weight: float = 1.0,
    penalty: float = 0.0,
) -> list[int]:
    """The most probable sequence of symbols, summed over its alignments, among those that stay in the beam.

    Prefix beam search (Hannun et al., "First-pass large vocabulary continuous speech recognition using bi-directional
    recurrent DNNs", 2014). log_probabilities: (frames, 1 + symbols), of which 0 is the blank.
    """
    symbols = log_probabilities.shape[1] - 1
    language = np.zeros((symbols + 1, symbols + 1)) if bigram is None else weight * bigram.matrix()
    nodes, parents, labels = {}, [-1], [symbols]  # prefixes as a tree: (parent, symbol) → node; node 0 is empty
    prefixes = np.zeros(1, int)
    in_blank, in_label = np.zeros(1), np.full(1, -np.inf)  # log probability that a prefix ended in a blank, or did not
    for frame in log_probabilities:
        last = np.array([labels[node] for node in prefixes])
        total = np.logaddexp(in_blank, in_label)
        from_all = np.repeat(total[:, None], symbols, 1)
        repeated = np.flatnonzero(last < symbols)
        from_all[repeated, last[repeated]] = in_blank[repeated]  # without a blank between, they would be one
        extended = from_all + language[last, :-1] + penalty + frame[1:]
        in_blank = total + frame[0]
        in_label = in_label + np.append(frame[1:], 0.0)[last]
        rows = {node: row for row, node in enumerate(prefixes.tolist())}
        for row, node in enumerate(prefixes.tolist()):  # a prefix that is in the beam and an extension of another
            if (parent := rows.get(parents[node])) is not None:
                in_label[row] = np.logaddexp(in_label[row], extended[parent, last[row]])
                extended[parent, last[row]] = -np.inf
        scores = np.concatenate([np.logaddexp(in_blank, in_label), extended.ravel()])
        kept = np.argsort(-scores, kind="stable")[:beam]
        kept = kept[scores[kept] > -np.inf]
        old, new = kept[kept < len(prefixes)], kept[kept >= len(prefixes)] - len(prefixes)
        grown = []
        for parent, symbol in zip(prefixes[new // symbols].tolist(), (new % symbols).tolist(), strict=True):
            node = nodes.setdefault((parent, symbol), len(parents))
            if node == len(parents):
                parents.append(parent)
                labels.append(symbol)
            grown.append(node)
        in_label = np.concatenate([in_label[old], extended.ravel()[new]])
        in_blank = np.concatenate([in_blank[old], np.full(len(new), -np.inf)])
        prefixes = np.concatenate([prefixes[old], np.array(grown, int)])
    scores = np.logaddexp(in_blank, in_label) + language[[labels[node] for node in prefixes], -1]
    node, found = int(prefixes[scores.argmax()]), []
    while node:
        found.append(labels[node])
        node = parents[node]
    return found[::-1]


# -------------------------------------------------------------------------------------------------------------- words


class Links(NamedTuple):
    """Lists of numbers, one for each of many items: those of item i are targets[first[i] : first[i + 1]]."""

    first: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]], items: int) -> "Links":
        """From pairs (item, target)."""
        origins, targets = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
        return cls(np.searchsorted(origins, np.arange(items + 1)), targets)

    def follow(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For items (n,): the place in `items` that each link starts from, and its target."""
        counts = self.first[items + 1] - self.first[items]
        origins = np.repeat(np.arange(len(items)), counts)
        within = np.arange(len(origins)) - np.repeat(np.cumsum(counts) - counts, counts)
        return origins, self.targets[self.first[items][origins] + within]


@dataclass(frozen=True)
class Lexicon:
    """The pronunciations of words as one network of states: a tree in which words share their beginnings.

    Every state stands for one output of the recogniser, and takes one frame or more. Of a frame-wise recogniser a phone
    is `minimum` states in a row, of which only the last repeats. Of CTC it is the label and a blank after it that may
    be left out, but not between two that are the same.
    """

    words: int
    outputs: np.ndarray  # of each state
    repeats: np.ndarray  # whether it may follow itself
    arcs: Links  # from state to state
    ends: Links  # from state to the words that may end there; −1: a silence
    entries: np.ndarray  # states that a word, or a silence, begins with
    apart: bool  # whether two of the same output need another state between them, as of CTC
    ahead: np.ndarray  # of each state: the words that can still come of it, as a row of `reach`
    reach: Links  # row → words

    @classmethod
    def build(
        cls,
        pronunciations: Iterable[tuple[int, Sequence[int]]],
        silence: int | None = None,
        minimum: int = 3,
        blank: int | None = None,
    ) -> "Lexicon":
        """pronunciations: (word, its outputs), a word as often as it has pronunciations. silence: an output that may
        come before and after any word. blank: the output that is CTC's; without it, the frame-wise network."""
        outputs, repeats, arcs, ends, reach = [], [], [], [], []
        children, entries, ahead = {}, set(), []

        def add(output: int, may_repeat: bool, row: int) -> int:
            outputs.append(output)
            repeats.append(may_repeat)
            ahead.append(row)
            return len(outputs) - 1

        def grow(parent: tuple, output: int) -> tuple:
            """The node below `parent`: (its output, the states that it is entered by, those that it is left from)."""
            row = len(children)
            if blank is None:
                states = [add(output, k == minimum - 1, row) for k in range(minimum)]
                arcs.extend(zip(states[:-1], states[1:], strict=True))
                node = (output, states[0], states[-1:])
            else:
                states = [add(output, True, row), add(blank, True, row)]
                arcs.append(tuple(states))
                node = (output, states[0], states)
            if not parent:
                entries.add(node[1])
            else:
                leaves = parent[2] if parent[0] != output or blank is None else parent[2][-1:]
                arcs.extend((leaf, node[1]) for leaf in leaves)
            return node

        words = 0
        for word, pronunciation in pronunciations:
            words, path, node = max(words, word + 1), (), ()
            for output in pronunciation:
                path = (*path, output)
                if path not in children:
                    children[path] = (grow(node, output), len(children))
                node, row = children[path]
                reach.append((row, word))
            ends.extend((leaf, word) for leaf in node[2])
        nothing = len(children)  # a row without words
        for output in [silence] if blank is None else [silence, blank]:
            if output is not None:
                states = [add(output, True, nothing)]
                if blank is not None and output != blank:
                    states.append(add(blank, True, nothing))
                    arcs.append(tuple(states))
                entries.add(states[0])
                ends.extend((state, -1) for state in states)
        size = len(outputs)
        return cls(
            words,
            np.array(outputs),
            np.array(repeats),
            Links.of(set(arcs), size),
            Links.of(set(ends), size),
            np.array(sorted(entries)),
            blank is not None,
            np.array(ahead),
            Links.of(set(reach), nothing + 1),
        )


class Tokens(NamedTuple):
    """Hypotheses at one frame, each the best of those with its state and the last word before it."""

    score: np.ndarray
    state: np.ndarray
    history: np.ndarray  # the last word that ended; `words` at the start
    trace: np.ndarray  # where the words so far stand


def best_of_each(score: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where the highest score with each key is."""
    order = np.argsort(-score, kind="stable")
    return order[np.unique(key[order], return_index=True)[1]]


def decode_words(
    log_likelihoods: np.ndarray,
    lexicon: Lexicon,
    bigram: Bigram,
    weight: float = 1.0,
    penalty: float = 0.0,
    tokens: int = 500,
    word_ends: int = 50,
) -> list[int]:
    """The best sequence of words, by a search through the lexicon frame by frame.

    log_likelihoods: (frames, outputs), scaled likelihoods as for `viterbi` or CTC's log probabilities, of which the
    best path counts, not their sum. bigram: of words. At every frame the best `tokens` pairs of a state and the word
    before it are kept (Ney and Ortmanns, "Progress in dynamic programming search for LVCSR", 2000), ranked with the
    best unigram among the words that they can still become, and the best `word_ends` of those in which a word ends.
    Where no word ends with the last frame, the words before it are the answer.
    """
    unigram = weight * np.log(bigram.unigram[: lexicon.words])
    rows, words = lexicon.reach.follow(np.arange(len(lexicon.reach.first) - 1))
    ahead = np.full(len(lexicon.reach.first) - 1, -np.inf)
    np.maximum.at(ahead, rows, unigram[words])
    ahead[-1] = unigram.max()  # after a silence, any word
    ahead = ahead[lexicon.ahead]
    start, size, labels = lexicon.words, len(lexicon.outputs), int(lexicon.outputs.max()) + 2
    traces, spoken = [np.full(1, -1)], [np.full(1, -1)]  # of each trace, the one before it and its word
    count = 1
    active = Tokens(np.zeros(0), *np.zeros((3, 0), int))

    def leave(active: Tokens) -> tuple:
        """What ends at the active tokens: scores, the token, the word (−1: a silence), and the histories after it."""
        origin, word = lexicon.ends.follow(active.state)
        score, history = active.score[origin], active.history[origin]
        spoken = word >= 0
        score[spoken] += weight * bigram.log_probability(history[spoken], word[spoken]) + penalty
        return score, origin, word, np.where(spoken, word, history)

    for t, likelihoods in enumerate(log_likelihoods):
        if t:
            score, origin, word, history = leave(active)
            label = np.where(lexicon.apart, lexicon.outputs[active.state[origin]], -1)
            best = best_of_each(score, history * labels + label)
            best = best[np.argsort(-score[best])[:word_ends]]
            traces.append(active.trace[origin[best]])
            spoken.append(word[best])
            trace = count + np.arange(len(best))
            count += len(best)
            ended, entry = np.nonzero(label[best, None] != lexicon.outputs[lexicon.entries])
            begun = Tokens(score[best][ended], lexicon.entries[entry], history[best][ended], trace[ended])
        else:
            n = len(lexicon.entries)
            begun = Tokens(np.zeros(n), lexicon.entries, np.full(n, start), np.zeros(n, int))
        stay = lexicon.repeats[active.state]
        origin, state = lexicon.arcs.follow(active.state)
        moved = active._replace(state=state, **{f: getattr(active, f)[origin] for f in ("score", "history", "trace")})
        parts = [Tokens(*(field[stay] for field in active)), moved, begun]
        active = Tokens(*map(np.concatenate, zip(*parts, strict=True)))
        active = active._replace(score=active.score + likelihoods[lexicon.outputs[active.state]])
        best = best_of_each(active.score, active.history * size + active.state)
        active = Tokens(*(field[best] for field in active))
        if len(active.score) > tokens:
            best = np.argpartition(-(active.score + ahead[active.state]), tokens)[:tokens]
            active = Tokens(*(field[best] for field in active))
    if not len(active.score):
        return []
    score, origin, word, history = leave(active)
    if len(score):
        best = int((score + weight * bigram.log_probability(history, start)).argmax())
        trace, found = int(active.trace[origin[best]]), [int(word[best])]
    else:
        trace, found = int(active.trace[active.score.argmax()]), []
    traces, spoken = np.concatenate(traces), np.concatenate(spoken)
    while trace > 0:
        found.append(int(spoken[trace]))
        trace = int(traces[trace])
    return [word for word in reversed(found) if word >= 0]


# -------------------------------------------------------------------------------------------------------- TIMIT phones

# Lee and Hon, "Speaker-independent phone recognition using hidden Markov models", 1989, Table II: 61 labels → 39. The
# glottal stop q is left out.
FOLDED = {
    **dict.fromkeys("pcl tcl kcl bcl dcl gcl h# #h pau epi".split(), "sil"),
    **{"ao": "aa", "ax": "ah", "ax-h": "ah", "axr": "er", "ix": "ih", "ux": "uw", "hv": "hh", "zh": "sh"},
    **{"el": "l", "em": "m", "en": "n", "nx": "n", "eng": "ng"},
}


def fold(phones: Iterable[str]) -> list[str]:
    """TIMIT's 61 phones as the 39 in which errors are counted."""
    return [FOLDED.get(phone, phone) for phone in phones if phone != "q"]
