"""Recognition by models whose answer is known beforehand."""

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
    """Eight speakers to train on, two each to develop and to test on, with phones, sexes and texts."""
    return write_speech(
        tmp_path_factory.mktemp("speech"), (8, 2, 2), utterances=1, phones=True, texts=True
    )


@pytest.fixture(scope="module")
def lexicon(tmp_path_factory) -> Path:
    """The words of the corpus as the CMU dictionary has them, two of them with a second pronunciation."""
    file = tmp_path_factory.mktemp("lexicon") / "words.txt"
    lines = [
        f"{word.upper()}  {' '.join(phones).upper()}" for word, phones in synthetic.LEXICON.items()
    ]
    file.write_text("\n".join([";;; a comment", *lines, "THE(2) DH IY0", "A(2) EY1", ""]))
    return file


@pytest.fixture
def corpus(folder) -> Corpus:
    return load_corpus(folder, progress=False, note=lambda _: None)


@pytest.fixture(autouse=True)
def few_weights(monkeypatch):
    for name in ("FRAMES_GRID", "CTC_GRID", "WORDS_GRID", "CTC_WORDS_GRID"):
        monkeypatch.setattr(recognition, name, ((1.0, 0.0), (2.0, 1.0)))


class Oracle(nn.Module):
    """Knows every utterance of a corpus by its features, and what is to be said of each frame of it."""

    def __init__(self, corpus: Corpus, recipe, symbols: list[str], spoil=lambda utterance: False):
        super().__init__()
        ctc = recipe.targets != "frames"
        self.standardise = Standardise(80)
        self.log_priors = nn.Parameter(torch.zeros(len(symbols) + ctc))
        self.config = SimpleNamespace(symbols=tuple(symbols))
        features, self.known = utterance_features(corpus, recipe, CPU), []
        numbers = {symbol: number for number, symbol in enumerate(symbols, int(ctc))}
        for i, utterance in enumerate(corpus.utterances):
            frames = len(features[i])
            if ctc:  # each symbol at one frame, blanks elsewhere
                labels, spoken = np.zeros(frames, int), transcript(utterance, recipe.targets)
                assert 2 * len(spoken) < frames
                labels[np.linspace(1, frames - 2, len(spoken)).astype(int)] = [
                    numbers[s] for s in spoken
                ]
            else:
                labels = np.array([numbers[symbol] for symbol in frame_labels(utterance)])
            if spoil(utterance):
                labels = np.random.default_rng(i).permutation(labels)
            self.known.append(
                (float(features[i].double().sum()), 12.0 * torch.eye(len(symbols) + ctc)[labels])
            )

    def logits(self, x: torch.Tensor, lengths: torch.Tensor):
        found = torch.zeros(*x.shape[:2], self.known[0][1].shape[1])
        for row, features, n in zip(found, x, lengths, strict=True):
            total = float(features[:n].double().sum())
            near, answer = min(self.known, key=lambda pair: abs(pair[0] - total))
            assert abs(near - total) < 1e-3 and len(answer) == n
            row[:n] = answer
        return found, lengths


def run_of(corpus: Corpus, target: Path, spoil=lambda utterance: False, **settings) -> Run:
    recipe, _ = resolve("acoustic", "quick", settings)
    said = {symbol for u in corpus.utterances for symbol in transcript(u, recipe.targets)}
    model = Oracle(corpus, recipe, sorted(said), spoil)
    content = {
        "model": "acoustic",
        "plan": {"recipe": asdict(recipe), "data": corpus.name},
        "progress": {"step": 7},
    }
    names = (target, "acoustic", model, stft_of(recipe), content, corpus.name)
    return Run(*names, corpus, corpus.split("test"))


def errors_of(result: RunResult, measure: str) -> dict[str, dict]:
    return result.values["measures"][measure]["errors"]


@pytest.mark.parametrize(
    ("targets", "measures"),
    [("frames", ["PER", "WER"]), ("phones", ["PER", "WER"]), ("characters", ["CER", "WER"])],
)
def test_who_knows_everything_makes_no_error(corpus, lexicon, tmp_path, targets, measures):
    """Fails where labels and frames are out of step, a silence is an error, or the words are not found again."""
    run = run_of(corpus, tmp_path, targets=targets)
    evaluation = recognition.evaluate([run], Options(lexicon=lexicon))
    (result,) = evaluation.results
    assert list(result.values["measures"]) == measures
    assert [rates["rate"] for m in measures for rates in errors_of(result, m).values()] == [0.0] * 6
    assert list(errors_of(result, "WER")) == ["male", "female", "all"]
    test = corpus.split("test").utterances
    lengths = {"WER": sum(len(u.text.split()) for u in test), "CER": sum(len(u.text) for u in test)}
    lengths["PER"] = sum(label != "sil" for u in test for *_, label in u.phones)
    assert [errors_of(result, m)["all"]["length"] for m in measures] == [
        lengths[m] for m in measures
    ]
    header, *rows = result.texts["hypotheses.tsv"].splitlines()
    rows = [dict(zip(header.split("\t"), row.split("\t"), strict=True)) for row in rows]
    assert [row["WER hypothesis"] for row in rows] == [u.text.lower().strip(".") for u in test]
    assert [result.values["measures"][m]["unknown"] for m in measures] == [0, 0]
    assert all(row[f"{m} reference"] == row[f"{m} hypothesis"] for row in rows for m in measures)
    text = render_text(evaluation)
    assert "0.00" in text and "(paper)" not in text


def test_errors_are_counted_where_they_are_made(corpus, lexicon, tmp_path):
    """Fails where a domain has another's utterances, domains do not add up, or noise is recognised without errors."""
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
    """Fails where what is in the test split, or was never to be heard, has a say in the choice of weights, or the rest
    of the development split has none."""

    def search(spoil, **settings):
        run = run_of(corpus, tmp_path, spoil, **settings)
        result = recognition.evaluate_run(run, Options())
        return result.values["measures"]["PER"]["search"]

    plain = search(lambda u: False, domain="male")
    assert plain["development"] == 0 and plain["utterances"] == 1
    assert plain == search(lambda u: u.split == "test" or u.sex == "F", domain="male")
    assert search(lambda u: u.split == "dev" and u.sex == "M", domain="male")["development"] > 0.5
    assert search(lambda u: u.split == "dev" and u.sex == "F")["development"] > 0.25


def test_columns_for_conditions(folder, tmp_path):
    """Fails where a condition that is there has no column, or one that all utterances share has."""
    corpus = load_corpus(f"{CONDITIONS_OF}{folder}", progress=False, note=lambda _: None)
    assert {"male", "female", "all"} < set(recognition.columns_of(corpus))
    there = {u.condition for u in corpus.utterances}
    assert (
        set(recognition.columns_of(corpus)) - {"male", "female", "all"} == there and len(there) > 2
    )
    men = replace(
        corpus,
        utterances=tuple(u for u in corpus.utterances if u.sex == "M" and u.condition == "noisy"),
    )
    assert recognition.columns_of(men) == ["all"]


def test_timit_is_scored_in_39_phones():
    recipe, _ = resolve("acoustic", "quick", {})
    said = "h# sh ix hv q dcl d h#".split()
    assert (
        recognition.scored(said, recipe, [*said, "pcl", "tcl", "kcl"])
        == "sil sh ih hh sil d sil".split()
    )
    assert recognition.scored("sil s ix sil".split(), recipe, ["ix", "s", "sil"]) == ["s", "ix"]


def test_standard_error_of_utterances_of_one_length_is_that_of_their_mean():
    errors = [Errors(1, 0, 0, 10), Errors(2, 1, 0, 10), Errors(0, 0, 2, 10)]
    assert recognition.summarise(errors)["standard_error"] == pytest.approx(
        np.std([0.1, 0.3, 0.2], ddof=1) / 3**0.5
    )


def made_up(
    run: str, recogniser: str, extractor: str, features: str, measure: str, columns: list[str]
) -> RunResult:
    errors = {name: {"rate": 0.125, "length": 8} for name in columns}
    about = {"recogniser": recogniser, "extractor": extractor, "features": features}
    values = about | {"measures": {measure: {"errors": errors}}}
    return RunResult(run, "acoustic", "speech", values)


def test_published_rows_stand_below_ours_on_the_papers_corpora_only():
    """Fails where a number of the paper stands beside another corpus, another measure or another row."""
    sexes, conditions = ["male", "female", "all"], ["clean", "noisy", "channel", "both", "all"]
    ours = [
        made_up("A", "male", "all", "z1", "PER", sexes),
        made_up("B", "all", "", "FBank", "PER", sexes),
    ]
    for layout in (None, "built-in", "conditions:TIMIT", "Aurora-4"):
        assert "(paper)" not in render_table(recognition.table(ours, "PER", layout))
    rows = [
        line.split() for line in render_table(recognition.table(ours, "PER", "TIMIT")).splitlines()
    ]
    assert rows == [
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


# ---------------------------------------------------------------------------------------------------- bad input


def test_lexicons_that_cannot_be_used(corpus, tmp_path):
    file, run = tmp_path / "words.txt", run_of(corpus, tmp_path)
    training = corpus.split("train")
    wrong = {
        None: "cannot be read",
        "": "holds no words",
        "cat k ae t\ndog\n": "line 2: 'dog' has no",
    }
    for text, named in wrong.items():
        if text is not None:
            file.write_text(text)
        with pytest.raises((SettingError, CorpusError), match=named) as error:
            recognition.pronunciations(run, training, file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    file.write_text("chat ʃ a\n")
    with pytest.raises(SettingError, match="has the symbols of none of its words; it has"):
        recognition.pronunciations(run, training, file)


def test_speech_that_says_nothing_of_errors(corpus, tmp_path):
    """Fails where a corpus without labels is 0 errors, or a traceback."""
    run = run_of(corpus, tmp_path)
    bare = replace(
        corpus, utterances=tuple(u._replace(phones=(), text="") for u in run.test.utterances)
    )
    with pytest.raises(
        CorpusError, match="test split has nothing to compare with; expected phone labels"
    ):
        recognition.evaluate_run(replace(run, test=bare), Options())
    women = tuple(u for u in corpus.utterances if u.sex == "F" or u.split != "dev")
    with pytest.raises(
        CorpusError, match="no utterance of dev is in domain=male; there is: female, clean"
    ):
        there = replace(corpus, utterances=women)
        run = run_of(corpus, tmp_path, domain="male")
        recognition.evaluate_run(replace(run, corpus=there), Options())


def test_words_of_texts():
    assert (
        recognition.words_of("“Don't — the DOGS' 3 bones,” she said.")
        == "don't the dogs' 3 bones she said".split()
    )


# ------------------------------------------------------------------------------------------------------ scripts


def test_through_the_scripts(folder, lexicon, capsys):
    """An extractor and recognisers of a few steps: fails where a run cannot be read back, or a flag is taken amiss."""
    data = ("--data", folder)
    assert (
        call(
            train_script,
            "--model",
            "fhvae",
            *data,
            "--recipe",
            "quick",
            "--steps",
            2,
            "--run",
            "extractor",
            "--set",
            "width=8",
            "z1_latent=3",
            "batch=4",
            "domain=female",
        )
        == 0
    )
    settings = ("batch=4", "width=8", "layers=1")
    assert (
        call(
            train_script,
            "--model",
            "acoustic",
            *data,
            "--recipe",
            "quick",
            "--steps",
            2,
            "--run",
            "A",
            "--set",
            *settings,
            "projection=4",
            "extractor=extractor",
            "domain=male",
        )
        == 0
    )
    assert (
        call(
            train_script,
            "--model",
            "deepspeech2",
            *data,
            "--recipe",
            "quick",
            "--steps",
            1,
            "--run",
            "B",
            "--set",
            *settings,
            "targets=phones",
            "channels=2,2",
            "features=log_magnitude",
        )
        == 0
    )
    capsys.readouterr()
    assert call(evaluate_script, "A", "B", "--limit", 2, "--json", "all.json") == 0
    printed = capsys.readouterr().out
    assert "PER in %" in printed and "WER" not in printed
    first, second = json.loads(Path("all.json").read_text())
    assert (first["recogniser"], first["extractor"], first["features"]) == ("male", "female", "z1")
    assert (second["recogniser"], second["features"], second["utterances"]) == (
        "all",
        "log magnitude",
        2,
    )
    assert call(evaluate_script, "extractor", "--lexicon", lexicon) == 2
    assert "--lexicon: is for --task recognition" in capsys.readouterr().err


def test_an_extractor_of_some_domains(corpus):
    """Fails where segments of another domain are drawn, or its development loss is of all."""
    settings = resolve("fhvae", "quick", {"domain": "male"})[0]
    source = FeatureSegments(corpus.split("train"), settings, 0, CPU)
    assert {u.sex for u in source.index.corpus.utterances} == {"M"}
    held_out = FeatureSegments(corpus.split("dev"), settings, 0, CPU)
    heard = sum(size for _, size in held_out.development(build_model("beta_vae")))
    frames = [
        audio.FEATURE_STFT.frames(u.length) - 2
        for u in corpus.split("dev").utterances
        if u.sex == "M"
    ]
    assert heard == sum((n - settings.frames) // settings.shift + 1 for n in frames)
    with pytest.raises(CorpusError, match="domain=noisy; there is: female, male, clean"):
        FeatureSegments(corpus.split("train"), replace(settings, domain="noisy"), 0, CPU)
