"""Recognition of phones, characters and words, by domain (FHVAE paper, section 4.3, Tables 2 and 3).

Phones of a frame-wise model by Viterbi, symbols of a CTC model by prefix beam search, both with a bigram; words through
a lexicon with a bigram of words. The bigrams know the transcripts that the recogniser was trained on, and the weights
of the searches are those with the fewest errors on the development utterances of its domain and corpus.

What counts: phones without silences. TIMIT's are folded to the usual 39 first, in which silences and closures are one
phone that counts, and q is none. Characters as they are written, in lower case, spaces too. Words in lower case,
without punctuation.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .. import synthetic
from ..batches import DOMAINS, in_domain, members, transcript
from ..checkpoint import CheckpointError, load_run
from ..command_line import as_json, write
from ..corpus import CONDITIONS_OF, Corpus, CorpusError, Utterance, load_corpus
from ..decoding import Bigram, Errors, Lexicon, align, ctc_beam, decode_words, fold, viterbi
from ..features import utterance_features
from ..recipes import Recipe, SettingError
from . import Options, Run, clear
from .segments import recipe_of

MODELS = ["acoustic", "deepspeech2"]

BATCH = 16  # utterances at once
MINIMUM = 3  # frames of a phone
SILENCES = ("sil", "sp", "pau", "h#", "#h", "epi")
COLUMNS = ("male", "female", "clean", "noisy", "channel", "both", "all")
# Weights and penalties that are tried, and on how many development utterances at most
FRAMES_GRID = tuple(itertools.product((0.5, 1.0, 2.0, 4.0), (-4.0, 0.0, 4.0)))
CTC_GRID = tuple(itertools.product((0.0, 0.4, 0.8, 1.2), (0.0, 1.0, 2.0)))
WORDS_GRID = tuple(itertools.product((1.0, 3.0, 6.0), (-8.0, 0.0, 8.0)))
CTC_WORDS_GRID = tuple(itertools.product((0.5, 1.0, 2.0), (0.0, 2.0, 4.0)))
TUNED, TUNED_WORDS = 80, 24

# FHVAE paper, Tables 2 and 3: (recogniser trained on, extractor trained on, features) → errors in percent by domain.
# Of Aurora-4's extractors "all" is its development set.
PUBLISHED = {
    "TIMIT": {
        ("all", "", "FBank"): {"male": 20.1, "female": 16.7, "all": 19.1},
        ("male", "", "FBank"): {"male": 21.0, "female": 32.8, "all": 25.2},
        ("male", "all", "z1"): {"male": 22.0, "female": 26.2, "all": 23.5},
    },
    "Aurora-4": {
        key: dict(zip(("clean", "noisy", "channel", "both", "all"), rates, strict=True))
        for key, rates in {
            ("all", "", "FBank"): (3.60, 7.06, 8.24, 18.49, 11.80),
            ("clean", "", "FBank"): (3.47, 50.97, 36.99, 71.80, 55.51),
            ("clean", "all", "β-VAE z, β=1"): (4.95, 23.54, 31.12, 46.21, 32.47),
            ("clean", "all", "β-VAE z, β=2"): (3.57, 27.24, 30.56, 48.17, 34.75),
            ("clean", "all", "β-VAE z, β=4"): (3.89, 24.40, 29.80, 47.87, 33.38),
            ("clean", "all", "β-VAE z, β=8"): (5.32, 34.84, 36.13, 58.02, 42.76),
            ("clean", "all", "z1"): (5.01, 16.42, 20.29, 36.33, 24.41),
            ("clean", "all", "z2"): (41.08, 68.73, 61.89, 86.36, 72.53),
            ("clean", "clean,noisy,channel", "z1"): (5.25, 16.52, 19.30, 40.59, 26.23),
        }.items()
    },
}
PUBLISHED_MEASURE = {"TIMIT": "PER", "Aurora-4": "WER"}


# ------------------------------------------------------------------------------------------------- what was said


def scored(symbols: Sequence[str], recipe: Recipe, vocabulary: Sequence[str]) -> list[str]:
    """What counts of symbols, those of a model with this vocabulary, or of a transcript in them. TIMIT's phones are
    known by the closures."""
    if recipe.targets == "characters":
        return list(symbols)
    if {"h#", "pcl", "tcl", "kcl"}.issubset(vocabulary):
        return fold(symbols)
    return [symbol for symbol in symbols if symbol not in SILENCES]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation: letters, digits, and apostrophes within a word."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*'?", text.lower().replace("’", "'"))


def read_lexicon(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(word, phones) of a file of lines `word phone phone …`, a line for each pronunciation, as the CMU dictionary
    has them: WORD(2) is another one of WORD, lines that begin with ;;; or # are comments.

    Raises SettingError where it cannot be read or a line has no phones.
    """
    form = "expected lines of a word and its phones: word ph ph …"
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise SettingError(f"--lexicon {path}: cannot be read ({error.strerror}); {form}") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith((";;;", "#")):
            word, *phones = line.split()
            if not phones:
                raise SettingError(f"--lexicon {path}: line {number}: {word!r} has no phones; {form}")
            entries.append((re.sub(r"\(\d+\)$", "", word).lower(), tuple(phones)))
    if not entries:
        raise SettingError(f"--lexicon {path}: holds no words; {form}")
    return entries


def pronunciations(run: Run, training: Corpus, lexicon: Path | None) -> list[tuple[str, tuple[str, ...]]]:
    """(word, its symbols) that the model of a run can recognise; empty where no words are known.

    Those of the lexicon, a file or the built-in corpus's own, whose phones the model has, as they stand there or in
    lower case and without stress. Of a model of characters the same words as they are spelled, and those of the
    training transcripts. Raises SettingError where it has the symbols of no word.
    """
    symbols, entries, known = set(run.model.config.symbols), [], set()
    if lexicon:
        entries = read_lexicon(lexicon)
    elif run.corpus.layout.removeprefix(CONDITIONS_OF) == "built-in":
        entries = list(synthetic.LEXICON.items())
    if recipe_of(run).targets == "characters":
        words = {word for word, _ in entries}.union(*(words_of(u.text) for u in training.utterances))
        entries = [(word, tuple(word)) for word in words]
    for word, spelled in entries:
        plain = tuple(symbol if symbol in symbols else re.sub(r"\d", "", symbol.lower()) for symbol in spelled)
        if symbols.issuperset(plain):
            known.add((word, plain))
    if lexicon and not known:
        some = " ".join(sorted(symbols)[:8])
        raise SettingError(f"--lexicon {lexicon}: {run.folder} has the symbols of none of its words; it has {some} …")
    return sorted(known)


# ----------------------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def outputs(run: Run, corpus: Corpus, recipe: Recipe, chosen: Sequence[int] | None = None) -> list[np.ndarray]:
    """For each of some utterances (default: all) what the searches take, (frames, outputs) float32: log p(symbol | x),
    of a frame-wise model less log p(symbol). CheckpointError where one is not finite, or where the extractor is not
    the one that the model was trained with."""
    model, chosen = run.model, range(len(corpus)) if chosen is None else chosen
    features = utterance_features(corpus, recipe, model.standardise.mean.device)
    if features.extractor != run.content["plan"].get("extractor", features.extractor):
        raise CheckpointError(f"{recipe.extractor}: not the model that {run.folder} was trained with")
    every = np.array(chosen)
    order, found = every[np.argsort([corpus.utterances[i].length for i in every], kind="stable")], {}
    for first in tqdm(range(0, len(order), BATCH), str(run.folder), leave=False, disable=None):
        some = order[first : first + BATCH].tolist()
        rows = [features[i] for i in some]
        frames = torch.tensor([len(row) for row in rows], device=rows[0].device)
        logits, frames = model.logits(pad_sequence(rows, batch_first=True), frames)
        log_probabilities = logits.double().log_softmax(-1)
        if recipe.targets == "frames":
            log_probabilities = log_probabilities - model.log_priors
        for i, row, n in zip(some, log_probabilities.float().cpu().numpy(), frames.tolist(), strict=True):
            if not np.isfinite(row[:n]).all():
                raise CheckpointError(f"{run.folder}: the model's output is not finite; it cannot be evaluated")
            found[i] = row[:n].copy()
    return [found[i] for i in every.tolist()]


@dataclass
class Task:
    """What is recognised, symbols or words, and how."""

    measure: str  # PER, CER or WER
    references: Callable[[Utterance], list[str]]
    decode: Callable[[np.ndarray, float, float], list[str]]  # outputs, weight, penalty → what was said
    grid: tuple[tuple[float, float], ...]  # of (weight, penalty)
    tuned: int  # development utterances at most
    vocabulary: frozenset[str]  # what can be recognised


def symbols_task(run: Run, recipe: Recipe, training: Corpus) -> Task:
    symbols = run.model.config.symbols
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    sequences = (transcript(u, recipe.targets) for u in training.utterances)
    bigram = Bigram.fit(([numbers[s] for s in spoken if s in numbers] for spoken in sequences if spoken), len(symbols))

    def decode(scores: np.ndarray, weight: float, penalty: float) -> list[str]:
        if recipe.targets == "frames":
            found = [phone for phone, *_ in viterbi(scores, bigram, weight, penalty, MINIMUM)]
        else:
            found = ctc_beam(scores, bigram=bigram, weight=weight, penalty=penalty)
        return scored([symbols[number] for number in found], recipe, symbols)

    def references(utterance: Utterance) -> list[str]:
        return scored(transcript(utterance, recipe.targets), recipe, symbols)

    measure = "CER" if recipe.targets == "characters" else "PER"
    grid = FRAMES_GRID if recipe.targets == "frames" else CTC_GRID
    return Task(measure, references, decode, grid, TUNED, frozenset(scored(symbols, recipe, symbols)))


def words_task(run: Run, recipe: Recipe, training: Corpus, lexicon: Path | None) -> Task | None:
    """None where there are no words to be found, or no texts to compare them with."""
    texts = [words_of(utterance.text) for utterance in training.utterances]
    entries = pronunciations(run, training, lexicon) if any(texts) else []
    if not entries:
        return None
    ctc = recipe.targets != "frames"
    symbols = {symbol: number for number, symbol in enumerate(run.model.config.symbols, int(ctc))}
    words = sorted({word for word, _ in entries})
    numbers = {word: number for number, word in enumerate(words)}
    spelled = [(numbers[word], [symbols[symbol] for symbol in phones]) for word, phones in entries]
    pauses = (" ",) if recipe.targets == "characters" else SILENCES
    pause = next((symbols[symbol] for symbol in pauses if symbol in symbols), None)
    network = Lexicon.build(spelled, pause, MINIMUM, blank=0 if ctc else None)
    bigram = Bigram.fit(([numbers[w] for w in text if w in numbers] for text in texts if text), len(words))

    def decode(scores: np.ndarray, weight: float, penalty: float) -> list[str]:
        return [words[number] for number in decode_words(scores, network, bigram, weight, penalty)]

    grid = CTC_WORDS_GRID if ctc else WORDS_GRID
    return Task("WER", lambda utterance: words_of(utterance.text), decode, grid, TUNED_WORDS, frozenset(words))


def tuning_set(task: Task, development: Corpus, inside: list[int]) -> list[int]:
    """The development utterances, out of those that may be heard, that the weights are chosen with: CorpusError where
    nothing is known of them."""
    spoken = [i for i in inside if task.references(development.utterances[i])]
    if not spoken:
        raise CorpusError(f"{development.name}: its dev split has nothing to choose the weights of the search with")
    count = min(task.tuned, len(spoken))
    return [spoken[k * len(spoken) // count] for k in range(count)]


def tune(task: Task, pairs: list[tuple[Utterance, np.ndarray]]) -> dict[str, float]:
    """The weight and penalty with the fewest errors on utterances, given with the outputs for them, and their rate
    there."""
    pairs, best = [(task.references(utterance), scores) for utterance, scores in pairs], None
    for weight, penalty in tqdm(task.grid, f"weights for {task.measure}", leave=False, disable=None):
        errors = [align(reference, task.decode(scores, weight, penalty)) for reference, scores in pairs]
        rate = sum(errors, Errors()).rate
        if best is None or rate < best["development"]:
            best = {"weight": weight, "penalty": penalty, "development": rate, "utterances": len(pairs)}
    return best


# -------------------------------------------------------------------------------------------------- evaluation


def columns_of(test: Corpus) -> list[str]:
    """The domains that some of the utterances are in and others are not, and all."""
    counts = {name: sum(in_domain(u, name) for u in test.utterances) for name in DOMAINS}
    return [name for name in COLUMNS if name == "all" or 0 < counts[name] < len(test)]


def by_domain(utterances: Sequence[Utterance], errors: Sequence[Errors], columns: list[str]) -> dict[str, dict]:
    """Errors of each domain: {substitutions, deletions, insertions, length, rate, standard_error} by column."""
    result = {}
    for name in columns:
        domain = "" if name == "all" else name
        inside = [e for u, e in zip(utterances, errors, strict=True) if in_domain(u, domain)]
        total = sum(inside, Errors())
        result[name] = vars(total) | {"rate": total.rate, "standard_error": standard_error(inside)}
    return result


def standard_error(errors: Sequence[Errors]) -> float | None:
    """Of the error rate of utterances together, a ratio of two sums (Cochran, Sampling techniques, 1977, chapter 6);
    None for fewer than two."""
    total, n = sum(errors, Errors()), len(errors)
    if n < 2 or not total.length:
        return None
    squares = sum((e.count - total.rate * e.length) ** 2 for e in errors)
    return float(np.sqrt(squares * n / (n - 1)) / total.length)


def about(run: Run, recipe: Recipe) -> dict[str, str]:
    """What the model of a run was trained on, as in the paper's tables."""
    before_conditions = run.data == CONDITIONS_OF + run.content["plan"]["data"]
    names = {"recogniser": recipe.domain or ("clean" if before_conditions else "all"), "extractor": ""}
    names["features"] = {"fbank": "FBank", "log_magnitude": "log magnitude"}[recipe.features]
    if recipe.extractor:
        model, _, content = load_run(recipe.extractor, torch.device("cpu"))
        names["extractor"] = content["plan"]["recipe"].get("domain") or "all"
        names["features"] = recipe.latent
        if content["model"] == "beta_vae":
            names["features"] = f"β-VAE z, β={model.config.beta:g}"
    return names


def evaluate(run: Run, lexicon: Path | None) -> dict:
    """The errors of one run. Writes what it heard beside what was said into its folder, hypotheses.tsv."""
    recipe, plan = recipe_of(run), run.content["plan"]
    own = run.corpus if plan["data"] == run.data else load_corpus(plan["data"])
    training, development = own.split("train"), own.split("dev")
    training = replace(training, utterances=tuple(training.utterances[i] for i in members(training, recipe.domain)))
    tasks = [symbols_task(run, recipe, training), words_task(run, recipe, training, lexicon)]
    tasks = [task for task in tasks if task and any(map(task.references, run.test.utterances))]
    if not tasks:
        needed = "text" if recipe.targets == "characters" else "phone labels, or text and a lexicon (--lexicon FILE)"
        raise CorpusError(f"{run.data}: its {run.test.utterances[0].split} split has nothing to compare with; expected "
                          f"{needed}")  # fmt: skip
    columns = columns_of(run.test)
    result = about(run, recipe) | {"targets": recipe.targets, "trained": run.trained, "utterances": len(run.test)}
    result |= {"training_utterances": len(training), "measures": {}}
    inside = members(development, recipe.domain)
    tuning = [tuning_set(task, development, inside) for task in tasks]
    needed = sorted(set().union(*tuning))
    known = dict(zip(needed, outputs(run, development, recipe, needed), strict=True))
    heard = outputs(run, run.test, recipe)
    fields = {"utterance": [u.name for u in run.test.utterances]}
    fields |= {name: [getattr(u, name) for u in run.test.utterances] for name in ("sex", "condition")}
    for task, numbers in zip(tasks, tuning, strict=True):
        chosen = tune(task, [(development.utterances[i], known[i]) for i in numbers])
        bar = tqdm(heard, task.measure, leave=False, disable=None)
        hypotheses = [task.decode(scores, chosen["weight"], chosen["penalty"]) for scores in bar]
        references = [task.references(utterance) for utterance in run.test.utterances]
        spoken = [i for i, reference in enumerate(references) if reference]
        errors = [align(references[i], hypotheses[i]) for i in spoken]
        unknown = sum(symbol not in task.vocabulary for reference in references for symbol in reference)
        if unknown:
            said = sum(map(len, references))
            print(f"{run.folder}: {task.measure}: {unknown} of {said} are not among the {len(task.vocabulary)} known")
        result["measures"][task.measure] = {
            "search": chosen,
            "utterances": len(spoken),
            "vocabulary": len(task.vocabulary),
            "unknown": unknown,
            "errors": by_domain([run.test.utterances[i] for i in spoken], errors, columns),
        }
        between = "" if task.measure == "CER" else " "
        fields[f"{task.measure} reference"] = map(between.join, references)
        fields[f"{task.measure} hypothesis"] = map(between.join, hypotheses)
    rows = ["\t".join(row) for row in zip(*fields.values(), strict=True)]
    write(run.target / "hypotheses.tsv", "\n".join(["\t".join(fields), *rows]) + "\n")
    return result


def table(results: list[dict], measure: str, layout: str | None = None) -> str:
    """Errors in percent, a row for each run and a column for each domain.

    `layout` names the corpus where published rows may stand below ours: its whole test split.
    """
    there = [r for r in results if measure in r["measures"]]
    columns = [name for name in COLUMNS if any(name in r["measures"][measure]["errors"] for r in there)]
    lines = [["", "recogniser", "extractor", "features", *columns]]
    for r in there:
        errors = r["measures"][measure]["errors"]
        rates = [f"{100 * errors[name]['rate']:.2f}" if name in errors else "–" for name in columns]
        lines.append([r["run"], r["recogniser"], r["extractor"] or "–", r["features"], *rates])
    errors = there[0]["measures"][measure]["errors"]
    lengths = [str(errors[name]["length"]) if name in errors else "–" for name in columns]
    lines.append([f"({'words' if measure == 'WER' else 'symbols'})", "", "", "", *lengths])
    ours = {(r["recogniser"], r["extractor"], r["features"]) for r in there}
    if PUBLISHED_MEASURE.get(layout) == measure:
        for key, rates in PUBLISHED[layout].items():
            if key in ours:
                names = ["(paper)", key[0], key[1] or "–", key[2]]
                lines.append([*names, *(f"{rates[name]:.2f}" if name in rates else "–" for name in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        places = zip(line, "<<<<" + ">" * len(columns), widths, strict=True)
        texts.append("  ".join(f"{text:{side}{width}}" for text, side, width in places))
    return "\n".join(texts)


def run(runs: list[Run], options: Options) -> list[dict]:
    """A table for each corpus and measure; results.json and hypotheses.tsv in the folder of every run."""
    results = []
    for data in dict.fromkeys(run.data for run in runs):
        group = [run for run in runs if run.data == data]
        for one in group:
            clear(one.target)
            settings = {"run": str(one.folder), "model": one.name, "data": data, "split": options.split}
            results.append(settings | evaluate(one, options.lexicon))
            write(one.target / "results.json", as_json(results[-1]))
            print(f"{one.folder}: results.json, hypotheses.tsv: {one.target}/")
        own = [r for r in results if r["data"] == data]
        comparable = replace(options, lexicon=None, seed=0) == Options()  # the whole test split
        for measure in ("PER", "CER", "WER"):
            if any(measure in r["measures"] for r in own):
                layout = group[0].corpus.layout if comparable else None
                print(f"\n{data}: {measure} in %\n\n{table(own, measure, layout)}")
        if options.split != "test":
            print(f"\n{data}: on {options.split}, which had a part in the training: strangers make for more errors.")
        print("\nrecogniser, extractor: the domain that each was trained on. Bigrams: of the recogniser's training "
              "transcripts;\nweights of the searches: chosen on development utterances of that domain.")  # fmt: skip
    return results
