"""Recognition by models whose answer is known beforehand."""

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_scripts import call, evaluate_script, surroundings, train_script  # noqa: F401
from speech_folder import write_speech
from torch import nn

from minidvae.data import audio, synthetic
from minidvae.data.corpus import CONDITIONS_OF, Corpus, CorpusError, load_corpus
from minidvae.evaluation.report import render_table, render_text
from minidvae.evaluation.results import RunResult
from minidvae.evaluation.runs import Options, Run
from minidvae.fhvae import recognition
from minidvae.fhvae.decoding import Errors
from minidvae.models import build_model
from minidvae.models.base import Standardise
from minidvae.training.config import SettingError
from minidvae.training.features import stft_of, utterance_features
from minidvae.training.run import resolve
from minidvae.training.segment_batches import FeatureSegments
from minidvae.training.utterance_batches import frame_labels, transcript

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with eight training, two development and two test speakers, with phones,
    sexes and texts."""
    folder = tmp_path_factory.mktemp("speech")
    return write_speech(folder, (8, 2, 2), utterances=1, phones=True, texts=True)


@pytest.fixture(scope="module")
def lexicon(tmp_path_factory) -> Path:
    """Return the words of the corpus in the format of the CMU dictionary, two of them with a second
    pronunciation."""
    lines = [";;; a comment"]
    for word, phones in synthetic.LEXICON.items():
        lines.append(f"{word.upper()}  {' '.join(phones).upper()}")
    lines += ["THE(2) DH IY0", "A(2) EY1", ""]
    file = tmp_path_factory.mktemp("lexicon") / "words.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def corpus(folder) -> Corpus:
    return load_corpus(folder, progress=False, note=lambda _: None)


@pytest.fixture(autouse=True)
def few_weights(monkeypatch):
    for name in ("FRAMES_GRID", "CTC_GRID", "WORDS_GRID", "CTC_WORDS_GRID"):
        monkeypatch.setattr(recognition, name, ((1.0, 0.0), (2.0, 1.0)))


class Oracle(nn.Module):
    """A recogniser that knows the labels of every utterance of a corpus, by the sum of its
    features. The labels of utterances for which `is_spoilt` is true are shuffled."""

    def __init__(self, corpus: Corpus, recipe, symbols: list[str], is_spoilt):
        super().__init__()
        num_blanks = 0 if recipe.targets == "frames" else 1
        num_labels = num_blanks + len(symbols)
        label_of = {symbol: label for label, symbol in enumerate(symbols, num_blanks)}
        self.standardise = Standardise(80)
        self.log_priors = nn.Parameter(torch.zeros(num_labels))
        self.config = SimpleNamespace(symbols=tuple(symbols))
        features = utterance_features(corpus, recipe, CPU)
        self.answers = []  # (sum of features, logits) of each utterance
        for i, utterance in enumerate(corpus.utterances):
            if recipe.targets == "frames":
                labels = np.array([label_of[symbol] for symbol in frame_labels(utterance)])
            else:
                spoken = [label_of[symbol] for symbol in transcript(utterance, recipe.targets)]
                labels = labels_of_ctc(spoken, len(features[i]))
            if is_spoilt(utterance):
                labels = np.random.default_rng(i).permutation(labels)
            logits = 12.0 * torch.eye(num_labels)[labels]
            self.answers.append((float(features[i].double().sum()), logits))

    def logits(self, x: torch.Tensor, lengths: torch.Tensor):
        num_labels = len(self.log_priors)
        outputs = torch.zeros(*x.shape[:2], num_labels)
        for output, features, length in zip(outputs, x, lengths, strict=True):
            total = float(features[:length].double().sum())
            known_total, logits = min(self.answers, key=lambda answer: abs(answer[0] - total))
            assert abs(known_total - total) < 1e-3 and len(logits) == length
            output[:length] = logits
        return outputs, lengths


def labels_of_ctc(spoken: list[int], num_frames: int) -> np.ndarray:
    """Return labels of frames: each spoken label at one frame, blanks (0) elsewhere."""
    assert 2 * len(spoken) < num_frames
    labels = np.zeros(num_frames, int)
    labels[np.linspace(1, num_frames - 2, len(spoken)).astype(int)] = spoken
    return labels


def run_of(corpus: Corpus, target: Path, is_spoilt=lambda utterance: False, **settings) -> Run:
    """Return a run whose model is an oracle."""
    recipe, _ = resolve("acoustic", "quick", settings)
    symbols = set()
    for utterance in corpus.utterances:
        symbols |= set(transcript(utterance, recipe.targets))
    model = Oracle(corpus, recipe, sorted(symbols), is_spoilt)
    plan = {"recipe": asdict(recipe), "data": corpus.name}
    content = {"model": "acoustic", "plan": plan, "progress": {"step": 7}}
    test = corpus.split("test")
    stft = stft_of(recipe)
    return Run(target, "acoustic", model, stft, content, corpus.name, corpus, test)


def errors_of(result: RunResult, measure: str) -> dict[str, dict]:
    return result.values["measures"][measure]["errors"]


@pytest.mark.parametrize(
    ("targets", "measures"),
    [("frames", ["PER", "WER"]), ("phones", ["PER", "WER"]), ("characters", ["CER", "WER"])],
)
def test_who_knows_everything_makes_no_error(corpus, lexicon, tmp_path, targets, measures):
    """Fails where labels and frames are out of step, a silence is an error, or the words are not
    decoded."""
    run = run_of(corpus, tmp_path, targets=targets)
    evaluation = recognition.evaluate([run], Options(lexicon=lexicon))
    (result,) = evaluation.results
    assert list(result.values["measures"]) == measures
    test = corpus.split("test").utterances
    lengths = {
        "WER": sum(len(u.text.split()) for u in test),
        "CER": sum(len(u.text) for u in test),
        "PER": 0,
    }
    for u in test:
        lengths["PER"] += sum(label != "sil" for _, _, label in u.phones)
    rows = list(csv.DictReader(io.StringIO(result.texts["hypotheses.tsv"]), delimiter="\t"))
    assert [row["WER hypothesis"] for row in rows] == [u.text.lower().strip(".") for u in test]
    for measure in measures:
        errors = errors_of(result, measure)
        assert list(errors) == ["male", "female", "all"]
        assert [column["rate"] for column in errors.values()] == [0.0] * 3
        assert errors["all"]["length"] == lengths[measure]
        assert result.values["measures"][measure]["unknown"] == 0
        for row in rows:
            assert row[f"{measure} reference"] == row[f"{measure} hypothesis"]
    text = render_text(evaluation)
    assert "0.00" in text and "(paper)" not in text


def test_errors_are_counted_where_they_are_made(corpus, lexicon, tmp_path):
    """Fails where a domain has utterances of another one, domains do not add up, or shuffled labels
    make no errors."""
    women = run_of(corpus, tmp_path, lambda u: u.sex == "F" and u.split == "test")
    (result,) = recognition.evaluate([women], Options(lexicon=lexicon)).results
    for measure in ("PER", "WER"):
        errors = errors_of(result, measure)
        assert errors["male"]["rate"] == 0 and errors["female"]["rate"] > 0.5
        for kind in ("substitutions", "deletions", "insertions", "length"):
            assert errors["male"][kind] + errors["female"][kind] == errors["all"][kind]
        total = sum(errors["all"][kind] for kind in ("substitutions", "deletions", "insertions"))
        assert errors["all"]["rate"] == total / errors["all"]["length"]


def test_weights_come_from_development_utterances_of_the_domain(corpus, tmp_path):
    """Fails where the choice of weights depends on the test split or on another domain, or does not
    depend on some of the development utterances."""

    def search(is_spoilt, **settings):
        run = run_of(corpus, tmp_path, is_spoilt, **settings)
        result = recognition.evaluate_run(run, Options())
        return result.values["measures"]["PER"]["search"]

    expected = search(lambda u: False, domain="male")
    assert expected["development"] == 0 and expected["utterances"] == 1
    assert search(lambda u: u.split == "test" or u.sex == "F", domain="male") == expected
    assert search(lambda u: u.split == "dev" and u.sex == "M", domain="male")["development"] > 0.5
    assert search(lambda u: u.split == "dev" and u.sex == "F")["development"] > 0.25


def test_columns_for_conditions(folder, tmp_path):
    """Fails where a condition of the corpus has no column, or one that all utterances share has."""
    corpus = load_corpus(f"{CONDITIONS_OF}{folder}", progress=False, note=lambda _: None)
    columns = set(recognition.columns_of(corpus))
    assert {"male", "female", "all"} < columns
    conditions = {u.condition for u in corpus.utterances}
    assert columns - {"male", "female", "all"} == conditions and len(conditions) > 2
    noisy_men = [u for u in corpus.utterances if u.sex == "M" and u.condition == "noisy"]
    one_condition = replace(corpus, utterances=tuple(noisy_men))
    assert recognition.columns_of(one_condition) == ["all"]


def test_timit_is_scored_in_39_phones():
    """Fails if phones of TIMIT are not folded, or those of other corpora are."""
    recipe, _ = resolve("acoustic", "quick", {})
    phones = "h# sh ix hv q dcl d h#".split()
    scored = recognition.scored(phones, recipe, [*phones, "pcl", "tcl", "kcl"])
    assert scored == "sil sh ih hh sil d sil".split()
    assert recognition.scored("sil s ix sil".split(), recipe, ["ix", "s", "sil"]) == ["s", "ix"]


def test_standard_error_of_utterances_of_one_length_is_that_of_their_mean():
    errors = [Errors(1, 0, 0, 10), Errors(2, 1, 0, 10), Errors(0, 0, 2, 10)]
    expected = np.std([0.1, 0.3, 0.2], ddof=1) / 3**0.5
    assert recognition.summarise(errors)["standard_error"] == pytest.approx(expected)


def made_up(
    run: str, recogniser: str, extractor: str, features: str, measure: str, columns: list[str]
) -> RunResult:
    """Return a result with an error rate of 1/8 in every column."""
    errors = {name: {"rate": 0.125, "length": 8} for name in columns}
    about = {"recogniser": recogniser, "extractor": extractor, "features": features}
    values = about | {"measures": {measure: {"errors": errors}}}
    return RunResult(run, "acoustic", "speech", values)


def test_published_rows_stand_below_ours_on_the_papers_corpora_only():
    """Fails where a number of the paper is shown with another corpus, another measure or another
    row."""
    sexes = ["male", "female", "all"]
    conditions = ["clean", "noisy", "channel", "both", "all"]
    ours = [
        made_up("A", "male", "all", "z1", "PER", sexes),
        made_up("B", "all", "", "FBank", "PER", sexes),
    ]
    for layout in (None, "built-in", "conditions:TIMIT", "Aurora-4"):
        assert "(paper)" not in render_table(recognition.table(ours, "PER", layout))
    lines = render_table(recognition.table(ours, "PER", "TIMIT")).splitlines()
    assert [line.split() for line in lines] == [
        ["recogniser", "extractor", "features", *sexes],
        ["A", "male", "all", "z1", "12.50", "12.50", "12.50"],
        ["B", "all", "–", "FBank", "12.50", "12.50", "12.50"],
        ["(symbols)", "8", "8", "8"],
        ["(paper)", "all", "–", "FBank", "20.10", "16.70", "19.10"],
        ["(paper)", "male", "all", "z1", "22.00", "26.20", "23.50"],
    ]
    beta = [made_up("C", "clean", "all", "β-VAE z, β=4", "WER", conditions)]
    beta.append(made_up("D", "clean", "clean,noisy,channel", "z1", "WER", conditions))
    lines = render_table(recognition.table(beta, "WER", "Aurora-4")).splitlines()
    assert [line.split()[-5:] for line in lines[-2:]] == [
        ["3.89", "24.40", "29.80", "47.87", "33.38"],
        ["5.25", "16.52", "19.30", "40.59", "26.23"],
    ]


# -------------------------------------------------------------------------------------- bad input


def test_lexicons_that_cannot_be_used(corpus, tmp_path):
    """Fails where the error is not one line with the file and what is wrong with it."""
    file = tmp_path / "words.txt"
    run = run_of(corpus, tmp_path)
    training = corpus.split("train")
    for text, message in (
        (None, "cannot be read"),
        ("", "holds no words"),
        ("cat k ae t\ndog\n", "line 2: 'dog' has no"),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises((SettingError, CorpusError), match=message) as error:
            recognition.pronunciations(run, training, file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    file.write_text("chat ʃ a\n")
    with pytest.raises(SettingError, match="has the symbols of none of its words; it has"):
        recognition.pronunciations(run, training, file)


def test_speech_that_says_nothing_of_errors(corpus, tmp_path):
    """Fails where a corpus without labels has 0 errors, or ends in a traceback."""
    run = run_of(corpus, tmp_path)
    unlabelled = [u._replace(phones=(), text="") for u in run.test.utterances]
    test = replace(corpus, utterances=tuple(unlabelled))
    message = "test split has nothing to compare with; expected phone labels"
    with pytest.raises(CorpusError, match=message):
        recognition.evaluate_run(replace(run, test=test), Options())
    run = run_of(corpus, tmp_path, domain="male")
    utterances = tuple(u for u in corpus.utterances if u.sex == "F" or u.split != "dev")
    run = replace(run, corpus=replace(corpus, utterances=utterances))
    message = "no utterance of dev is in domain=male; there is: female, clean"
    with pytest.raises(CorpusError, match=message):
        recognition.evaluate_run(run, Options())


def test_words_of_texts():
    words = recognition.words_of("“Don't — the DOGS' 3 bones,” she said.")
    assert words == "don't the dogs' 3 bones she said".split()


# ------------------------------------------------------------------------------------- the scripts


def test_through_the_scripts(folder, lexicon, capsys):
    """Trains an extractor and recognisers for a few steps. Fails where a run cannot be loaded, or a
    flag has the wrong effect."""
    arguments = ["--data", folder, "--recipe", "quick", "--set", "batch=4", "width=8"]
    extractor = ["z1_latent=3", "domain=female", "--steps", 2, "--run", "extractor"]
    assert call(train_script, *arguments, *extractor, "--model", "fhvae") == 0
    on_latents = ["layers=1", "projection=4", "extractor=extractor", "domain=male"]
    on_latents += ["--steps", 2, "--run", "A"]
    assert call(train_script, *arguments, *on_latents, "--model", "acoustic") == 0
    on_spectra = ["layers=1", "targets=phones", "channels=2,2", "features=log_magnitude"]
    on_spectra += ["--steps", 1, "--run", "B"]
    assert call(train_script, *arguments, *on_spectra, "--model", "deepspeech2") == 0
    capsys.readouterr()
    assert call(evaluate_script, "A", "B", "--limit", 2, "--json", "all.json") == 0
    printed = capsys.readouterr().out
    assert "PER in %" in printed and "WER" not in printed
    first, second = json.loads(Path("all.json").read_text())
    assert (first["recogniser"], first["extractor"], first["features"]) == ("male", "female", "z1")
    assert (second["recogniser"], second["features"]) == ("all", "log magnitude")
    assert second["utterances"] == 2
    assert call(evaluate_script, "extractor", "--lexicon", lexicon) == 2
    assert "--lexicon: is for --task recognition" in capsys.readouterr().err


def test_an_extractor_of_some_domains(corpus):
    """Fails where segments of another domain are drawn, or count in the development loss."""
    settings, _ = resolve("fhvae", "quick", {"domain": "male"})
    source = FeatureSegments(corpus.split("train"), settings, 0, CPU)
    assert {u.sex for u in source.index.corpus.utterances} == {"M"}
    development = FeatureSegments(corpus.split("dev"), settings, 0, CPU)
    num_segments = sum(size for _, size in development.development(build_model("beta_vae")))
    expected = 0
    for u in corpus.split("dev").utterances:
        if u.sex == "M":
            num_frames = audio.FEATURE_STFT.frames(u.length) - 2
            expected += (num_frames - settings.frames) // settings.shift + 1
    assert num_segments == expected
    with pytest.raises(CorpusError, match="domain=noisy; there is: female, male, clean"):
        FeatureSegments(corpus.split("train"), replace(settings, domain="noisy"), 0, CPU)
