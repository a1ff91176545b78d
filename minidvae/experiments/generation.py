"""Generation from the prior, and how far it is from real speech (LigHT-DVAE paper, Table 3 and Figure 3).

Clips of 1.6 s: power spectrograms e^l drawn from a model, their phases found by Griffin-Lim. The distance is the
Fréchet distance between Gaussians fitted to features of generated and of real clips; the features are a speech
recogniser's, the mean over time of the last recurrent layer of a DeepSpeech2 (FDSD; Bińkowski et al., High fidelity
speech synthesis with adversarial networks, 2020). It depends on that network, and falls as the number of clips grows:
only numbers of one network and one number of clips compare. Real clips are cut at random places, the reference out of
the training split, those of the rows of real speech out of the split that is evaluated, which has other utterances.

The w of HiT-DVAE, LigHT-DVAE and DSAE is drawn from its prior, or from a Gaussian fitted to its posteriors.

Every clip, real or generated, is scaled to max |s| = 1, as the utterances that recognisers are trained on are: how loud
a clip is counts neither for nor against it.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import audio, decoding, figures
from ..audio import STFT
from ..batches import transcript
from ..checkpoint import CheckpointError, load_run
from ..command_line import as_json, write
from ..corpus import Corpus, CorpusError, Segments, load_corpus
from ..features import FEATURES
from ..models.base import LOG_VARIANCE_RANGE
from ..recipes import SettingError
from . import Options, Run, clear, resynthesis
from .recognition import outputs, scored
from .segments import recipe_of

MODELS = resynthesis.MODELS

SECONDS = 1.6
SAMPLES = round(SECONDS * audio.SAMPLE_RATE)
EXAMPLES = 4  # clips of which sound and picture are kept
DEFAULTS = {"cpu": (512, 3), "cuda": (10_240, 5)}  # clips on each side, and how often both are drawn anew
BATCH = {"cpu": 32, "cuda": 512}  # clips at once
W_CLIPS = 512  # of the training split, to whose posteriors of w a Gaussian is fitted
W = ("prior", "posterior")
UTTERANCES = 200  # at most, from which a recogniser's error rate is taken

SHEET = "contact_sheet.png"

EXACT, GRIFFIN_LIM = "exact phase", "Griffin-Lim"
PARTS = ("sampling", GRIFFIN_LIM, "features")  # of the time that a clip takes

# On VoiceBank, as printed: LigHT-DVAE paper, Table 3, 10,240 clips. Its features are another network's.
PUBLISHED = {
    "vae": {"VAE": (70.92, 0.44)},
    "dkf": {"DKF": (32.78, 0.28)},
    "rvae": {"RVAE": (45.75, 0.11)},
    "srnn": {"SRNN (SS)": (25.28, 0.19), "SRNN (TF)": (25.53, 0.13)},
    "hit_dvae": {"HiT-DVAE": (22.50, 0.26)},
    "light_dvae": {"LigHT-DVAE": (29.22, 0.26)},
}
PUBLISHED_TEST = {f"test ({EXACT})": (4.11, 0.14), f"test ({GRIFFIN_LIM})": (4.11, 0.15)}


# ---- Fréchet distance ----------------------------------------------------------------------------------------


class Moments:
    """Mean and covariance of features that come in batches, in float64 and without holding the features (Chan, Golub
    & LeVeque, Algorithms for computing the sample variance, 1983)."""

    def __init__(self, features: np.ndarray | None = None):
        self.count = 0
        if features is not None:
            self.add(features)

    def add(self, features: np.ndarray) -> None:
        """features: (n, width)"""
        features = np.asarray(features, dtype=np.float64)
        mean = features.mean(0)
        centred = features - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self.mean, self.scatter = len(features), mean, scatter
            return
        total, shift = self.count + len(features), mean - self.mean
        self.scatter += scatter + np.outer(shift, shift) * (self.count * len(features) / total)
        self.mean = self.mean + shift * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """(width, width), unbiased"""
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μa − μb|² + tr(A + B − 2 (AB)^½), the squared Fréchet distance of two Gaussians (Dowson & Landau 1982).

    AB has the eigenvalues of A^½ B A^½ = (A^½ B^½)(A^½ B^½)ᵀ, so the trace of its square root is the sum of the
    singular values of A^½ B^½: covariances without full rank are no special case.
    """
    roots = []
    for covariance in (a.covariance, b.covariance):
        values, vectors = np.linalg.eigh(covariance)
        roots.append((vectors * np.sqrt(values.clip(min=0))) @ vectors.T)
    common = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * common)


# ---- The recogniser whose features are compared --------------------------------------------------------------


class Recogniser:
    """A trained DeepSpeech2, as the measure of the distance; `about` says what it is.

    Raises SettingError where the run is another model's, or takes features that are no function of the waveform alone.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.model, stft, content = load_run(folder, device)
        name = content["model"]
        if name != "deepspeech2":
            raise SettingError(f"--recogniser {folder}: is a {name}; expected a run of deepspeech2")
        data = content.get("plan", {}).get("data", "built-in")
        self.run = Run(folder, name, self.model.eval(), stft, content, data, None, None, folder / "eval")
        recipe = recipe_of(self.run)
        if recipe.extractor:
            raise SettingError(f"--recogniser {folder}: hears the {recipe.latent} of {recipe.extractor}; "
                               f"expected one with features {' or '.join(FEATURES)} and no extractor")  # fmt: skip
        self.frames = FEATURES[recipe.features][1]
        self.about = {"run": str(folder), "trained_on": data, "step": content["progress"]["step"]}
        self.about |= {"features": self.model.config.width, "symbols": recipe.targets}

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> np.ndarray:
        """(n, samples) → features (n, width). CheckpointError where one is not finite."""
        features = self.model.features(self.frames(clips)).cpu().numpy()
        if not np.isfinite(features).all():
            raise CheckpointError(f"{self.run.folder}: the recogniser's features are not finite; take another")
        return features

    def describe(self) -> str:
        """What it is and how well it recognises, in sentences; `about` then has its errors too."""
        self.about |= recognition_errors(self.run)
        about = self.about
        if about["error_rate"] is None:
            rate = f"unknown ({about['unknown']})"
        else:
            rate = f"{100 * about['error_rate']:.1f} %, on {about['utterances']} test utterances of that corpus, greedy"
        return (
            f"Features: {about['features']} of {about['run']}, a deepspeech2 trained on {about['trained_on']} for "
            f"{about['step']:,} steps.\nIts error rate in {about['symbols']}: {rate}."
        )


def recognition_errors(run: Run) -> dict:
    """{"error_rate", "errors", "utterances"} of a recogniser: of its greedy decoding of at most UTTERANCES test
    utterances of the corpus that it was trained on. Kept in its folder for the step that it is of. Where that corpus is
    not to be had, or without transcripts, {"error_rate": None, "unknown": why}.
    """
    file, step = run.target / "generation-recogniser.json", run.content["progress"]["step"]
    if file.exists() and (kept := json.loads(file.read_text()))["step"] == step:
        return kept
    try:
        corpus = load_corpus(run.data)
        test = corpus.split("test")
    except CorpusError as error:
        return {"error_rate": None, "unknown": str(error)}
    said = tuple(u for u in test.utterances if transcript(u, recipe_of(run).targets))
    if not said:
        return {"error_rate": None, "unknown": f"{run.data}: its test split has no transcripts"}
    test = replace(test, utterances=said).spread(UTTERANCES)
    errors = greedy_errors(replace(run, corpus=corpus, test=test))
    found = {"step": step, "error_rate": errors.rate, "errors": asdict(errors), "utterances": len(test)}
    with suppress(OSError):  # a folder that can only be read
        run.target.mkdir(exist_ok=True)
        write(file, as_json(found))
    return found


def greedy_errors(run: Run) -> decoding.Errors:
    """Of a recogniser without search or language model, all test utterances together."""
    recipe, symbols, errors = recipe_of(run), run.model.config.symbols, decoding.Errors()
    for utterance, output in zip(run.test.utterances, outputs(run, run.test, recipe), strict=True):
        heard = [symbols[number] for number in decoding.ctc_greedy(output)]
        said = transcript(utterance, recipe.targets)
        errors += decoding.align(*(scored(s, recipe, symbols) for s in (said, heard)))
    return errors


# ---- Clips ---------------------------------------------------------------------------------------------------

Source = Callable[[range], Tensor]  # the numbers of some clips → their waveforms (n, SAMPLES)


class Stopwatch:
    """Seconds spent on each of PARTS."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, Counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[part] += self.now() - started

    def now(self) -> float:
        """After all that the device has been given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def device_of(run: Run) -> torch.device:
    return next(run.model.parameters()).device


def generators(
    what: str, seed: int, draw: int, numbers: range, device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """Of "latents" or "phases", one for each clip: its draws are the same whatever other clips are drawn with it."""
    seeds = (resynthesis.seed_of(seed, f"{what}, draw {draw}, clip {number}") for number in numbers)
    return [torch.Generator(device).manual_seed(one) for one in seeds]


@torch.no_grad()
def sample(run: Run, draws: list[torch.Generator]) -> Tensor:
    """A clip from the model for each generator: power (n, frames, bins). Raises CheckpointError where the
    output is not finite."""
    log_variance = run.model.sample(len(draws), run.stft.frames(SAMPLES), draws)
    if not log_variance.isfinite().all():
        raise CheckpointError(f"{run.folder}: what the model generates is not finite; it cannot be evaluated")
    return log_variance.clamp(*LOG_VARIANCE_RANGE).exp()


def scaled(waveforms: Tensor) -> Tensor:
    """(n, samples) with max |s| = 1 each; silence stays silence."""
    return waveforms / waveforms.abs().amax(-1, keepdim=True).clamp_min(1e-6)


def with_phases(power: Tensor, stft: STFT, seed: int, draw: int, numbers: range, watch: Stopwatch) -> Tensor:
    """Clips (n, SAMPLES) of this power (n, frames, bins), by Griffin-Lim. The phases it starts from are drawn on the
    device: they are others on a GPU than on a CPU."""
    with watch(GRIFFIN_LIM):
        draws = generators("phases", seed, draw, numbers, power.device)
        return audio.griffin_lim(power, stft, length=SAMPLES, generator=draws)


def generate(run: Run, seed: int, draw: int, numbers: range, watch: Stopwatch) -> tuple[Tensor, Tensor]:
    """Clips of a model: their power (n, frames, bins) and their waveforms (n, SAMPLES)."""
    with watch("sampling"):
        power = sample(run, generators("latents", seed, draw, numbers))
    return power, with_phases(power, run.stft, seed, draw, numbers, watch)


def generated(run: Run, seed: int, draw: int, watch: Stopwatch) -> Source:
    """The waveforms of `generate`."""
    return lambda numbers: generate(run, seed, draw, numbers, watch)[1]


def recorded(corpus: Corpus, count: int, *seed: int, device: torch.device) -> Source:
    """Real clips, `count` of them, every place in the trimmed utterances equally likely."""
    segments = Segments(corpus, SAMPLES)
    drawn = np.random.default_rng(seed).integers(len(segments), size=count)
    return lambda numbers: segments[drawn[numbers.start : numbers.stop]].to(device)


def without_phase(source: Source, stft: STFT, seed: int, draw: int, watch: Stopwatch) -> Source:
    """The same clips, their phases forgotten and found again by Griffin-Lim."""

    def clips(numbers: range) -> Tensor:
        return with_phases(stft.analyse(source(numbers)).abs().square(), stft, seed, draw, numbers, watch)

    return clips


@torch.no_grad()
def moments(
    source: Source, count: int, features: Callable[[Tensor], np.ndarray], batch: int, watch: Stopwatch, progress=int
) -> Moments:
    """Of the features (n, width) of clips 0 … count − 1 of a source, of which `batch` are held at once."""
    result = Moments()
    for first in range(0, count, batch):
        numbers = range(first, min(first + batch, count))
        clips = scaled(source(numbers))
        with watch("features"):
            result.add(features(clips))
        progress(len(numbers))
    return result


def fit_w(runs: list[Run], seed: int) -> None:
    """`DVAE.fit_w` on training clips, for every run with a sequence latent. Raises SettingError where there is none,
    CheckpointError where posteriors are not finite."""
    with_w = [run for run in runs if hasattr(run.model.config, "w_latent")]
    if not with_w:
        raise SettingError(f"--w posterior: is for models with a sequence latent, not {runs[0].name}")
    for run in with_w:
        clips = recorded(run.corpus.split("train"), W_CLIPS, seed, device=device_of(run))
        try:
            run.model.fit_w(run.stft.power(clips(range(W_CLIPS))))
        except torch.linalg.LinAlgError:
            raise CheckpointError(f"{run.folder}: its posteriors are not finite; it cannot be evaluated") from None
    print(f"w is drawn from a Gaussian fitted to its posteriors: {', '.join(str(run.folder) for run in with_w)}")


# ---- The experiment ------------------------------------------------------------------------------------------


def measure(runs: list[Run], features: Callable[[Tensor], np.ndarray], clips: int, repeats: int, seed: int) -> dict:
    """Fréchet distances from training clips, of runs on one corpus and of clips of the evaluated split with exact phase
    and with Griffin-Lim's (under the STFT of each run), all drawn anew `repeats` times.

    Returns {title: {"fdsd": {"mean", "standard_deviation", "values"}, "clips_per_second": {part: …}}}.
    """
    device, test = device_of(runs[0]), runs[0].test
    split = test.utterances[0].split
    train, batch = runs[0].corpus.split("train"), BATCH[device.type]
    stfts = list(dict.fromkeys(run.stft for run in runs))
    several = len(stfts) > 1
    titles = {stft: f"{split} ({GRIFFIN_LIM}{f', window {stft.window_length}' if several else ''})" for stft in stfts}
    rows = [*(str(run.folder) for run in runs), f"{split} ({EXACT})", *titles.values()]
    distances, watches = {title: [] for title in rows}, {title: Stopwatch(device) for title in rows}
    total = repeats * clips * (1 + len(rows))
    with tqdm(total=total, desc="generation", unit="clip", disable=None) as bar:
        for draw in range(repeats):
            reference = recorded(train, clips, seed, draw, 0, device=device)
            reference = moments(reference, clips, features, batch, Stopwatch(device), bar.update)
            spoken = recorded(test, clips, seed, draw, 1, device=device)
            sources = {str(run.folder): generated(run, seed, draw, watches[str(run.folder)]) for run in runs}
            sources[f"{split} ({EXACT})"] = spoken
            for stft, title in titles.items():
                sources[title] = without_phase(spoken, stft, seed, draw, watches[title])
            for title, source in sources.items():
                found = moments(source, clips, features, batch, watches[title], bar.update)
                distances[title].append(frechet_distance(found, reference))
    return {
        title: {
            "fdsd": {
                "mean": float(np.mean(values)),
                "standard_deviation": float(np.std(values, ddof=1)) if repeats > 1 else float("nan"),
                "values": values,
            },
            "clips_per_second": {part: repeats * clips / s for part, s in watches[title].seconds.items()},
        }
        for title, values in distances.items()
    }


def keep_examples(runs: list[Run], seed: int) -> None:
    """Into the folder of each run: a few of its clips and of real ones as wav files, a contact sheet of all runs."""
    numbers, watch, split = range(EXAMPLES), Stopwatch(device_of(runs[0])), runs[0].test.utterances[0].split
    spoken = recorded(runs[0].test, EXAMPLES, seed, 0, 1, device=watch.device)
    stfts = dict.fromkeys(run.stft for run in runs)
    phaseless = {stft: without_phase(spoken, stft, seed, 0, watch)(numbers) for stft in stfts}
    rows = [(split, runs[0].stft.analyse(spoken(numbers)).abs().square().cpu().numpy(), runs[0].stft)]
    for run in runs:
        clear(run.target)
        power, made = generate(run, seed, 0, numbers, watch)
        rows.append((run.folder.resolve().name, power.cpu().numpy(), run.stft))
        waveforms = {"sample": made, split: spoken(numbers), f"{split}-griffin-lim": phaseless[run.stft]}
        for name, clips in waveforms.items():
            for number, clip in enumerate(scaled(clips).cpu().numpy()):
                audio.write(run.target / f"{name}-{number}.wav", clip)
    figures.contact_sheet(rows, runs[0].target / SHEET)
    for run in runs[1:]:
        if run.target != runs[0].target:
            shutil.copyfile(runs[0].target / SHEET, run.target / SHEET)


def table(rows: dict[str, dict], published: dict[str, tuple[float, float]] | None = None) -> str:
    """Distance and clips per second by title, then published distances."""
    published = {f"{title} (paper)": pair for title, pair in (published or {}).items()}
    width = max(map(len, [*rows, *published]))

    def line(title: str, mean: float, deviation: float, rates: list[float]) -> str:
        distance = f"{mean:.2f} ± {deviation:.2f}".removesuffix(" ± nan")
        cells = ["" if np.isnan(rate) else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}" for rate in rates]
        return f"{title:<{width}}{distance:>18}" + "".join(f"{cell:>13}" for cell in cells)

    lines = [f"{'':<{width}}{'':>18}{'clips per second:':>{13 * len(PARTS)}}"]
    lines.append(f"{'':<{width}}{'FDSD':>18}" + "".join(f"{part:>13}" for part in PARTS))
    for title, row in rows.items():
        rates = [row["clips_per_second"].get(part, float("nan")) for part in PARTS]
        lines.append(line(title, row["fdsd"]["mean"], row["fdsd"]["standard_deviation"], rates))
    return "\n".join([*lines, *(line(title, *pair, []) for title, pair in published.items())])


def recogniser_of(options: Options, device: torch.device) -> Recogniser | None:
    """What the distance is measured with, if it is to be. Raises SettingError for flags that do not go together."""
    for flag, value, least in (("clips", options.clips, 2), ("repeats", options.repeats, 1)):
        if value is not None and options.recogniser is None:
            raise SettingError(f"--{flag} {value}: is for the distance, which needs --recogniser RUN")
        if value is not None and value < least:
            raise SettingError(f"--{flag} {value}: expected at least {least}")
    if options.recogniser is None:
        return None
    if options.split == "train":
        raise SettingError("--split train: the clips of the reference are of that split; expected dev or test")
    return Recogniser(options.recogniser, device)


def run(runs: list[Run], options: Options) -> list[dict]:
    """Examples of every run; with a recogniser a table for each corpus. Returns the results by run."""
    device = device_of(runs[0])
    recogniser = recogniser_of(options, device)
    if options.w == "posterior":
        fit_w(runs, options.seed)
    clips, repeats = options.clips or DEFAULTS[device.type][0], options.repeats or DEFAULTS[device.type][1]
    if recogniser is not None:
        print(recogniser.describe())
        if clips <= (width := recogniser.about["features"]):
            print(f"{clips:,} clips have no covariance of full rank in {width:,} features, and distances come out much "
                  f"too large: take more than --clips {width}.")  # fmt: skip
    results = {}
    for data in dict.fromkeys(run.data for run in runs):
        group = [run for run in runs if run.data == data]
        keep_examples(group, options.seed)
        settings = {"data": data, "split": options.split, "seed": options.seed}
        rows = {}
        if recogniser is not None:
            print(counts(data, group[0].corpus.split("train"), group[0].test, options.split, clips, repeats))
            rows = measure(group, recogniser, clips, repeats, options.seed)
            published = {}
            if group[0].corpus.layout == "VoiceBank" and options.limit is None and options.split == "test":
                published = {title: pair for one in group for title, pair in PUBLISHED.get(one.name, {}).items()}
                published |= PUBLISHED_TEST
            print(f"\n{table(rows, published)}\n")
            if published:
                print("(paper): the features of another network; compare the order, not the values.")
            settings |= {"clips": clips, "repeats": repeats, "recogniser": recogniser.about}
        real = {title: row for title, row in rows.items() if title not in {str(one.folder) for one in group}}
        for one in group:
            about = {"run": str(one.folder), "model": one.name} | settings
            if hasattr(one.model.config, "w_latent"):
                about["w"] = options.w or W[0]
            if rows:
                about |= rows[str(one.folder)] | {"real": real}
            results[id(one)] = about
            write(one.target / "results.json", as_json(about))
            print(f"{one.folder}: {one.name}, {one.trained}; wav files, {SHEET}, results.json: {one.target}/")
    if recogniser is None:
        print("For the distance to real speech: --recogniser RUN, a run of train.py --model deepspeech2")
    return [results[id(one)] for one in runs]


def counts(data: str, train: Corpus, test: Corpus, split: str, clips: int, repeats: int) -> str:
    """What is compared with what, in a sentence."""
    parts = []
    for name, corpus in (("train", train), (split, test)):
        segments = Segments(corpus, SAMPLES, stride=SAMPLES)
        parts.append(f"{name} holds {len(segments):,} side by side")
        parts[-1] += ", so clips overlap" if clips > len(segments) else ""
        parts[-1] += f" ({segments.skipped:,} of {len(corpus):,} utterances are too short)" if segments.skipped else ""
    drawn = f"drawn {repeats} times: mean ± standard deviation" if repeats > 1 else "drawn once"
    return (
        f"{data}: {clips:,} clips of {SECONDS} s on each side (10,240 in the paper), {drawn}.\n"
        f"Real clips are cut at random places: {'; '.join(parts)}."
    )
