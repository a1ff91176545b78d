"""What z1 and z2 of an FHVAE hold: exchange, shift and traversal (FHVAE paper, section 4.1, appendices D, E and H).

Pictures and sound: the A/B/C grid (Figure 4), utterances whose z2 is shifted toward a reference's (Figures 1 and 5),
traversal of each latent (Figures 11 to 14), reconstructions of several models side by side (Figure 6). Numbers for
them: the segment bound, linear probes, and what a change of z2 moves and what it keeps.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .. import audio, figures, synthetic
from ..audio import FEATURES
from ..batches import FeatureSegments
from ..command_line import as_json, write
from ..corpus import CLEAN, Corpus, Utterance
from . import Options, Run, clear, probes
from .segments import cut, encode, features, recipe_of

MODELS = ["fhvae"]

ROWS, COLUMNS, SEEDS, EXAMPLES = 4, 10, 5, 3  # blocks A and B of the grid, traversal, reconstructions
TRAVERSED = np.linspace(-3, 3, 7)
SHOWN = 400  # frames of an utterance in a picture
PAIRS, NOISY = 32, 16  # utterances that are measured after a swap and a shift, and after denoising
LEAST = {"log_f0": 0.1, "tract": 0.5}  # pairs of utterances that are nearer, in ln Hz and cm, cannot show a movement

# FHVAE paper, Table 4, α = 0: the segment bound on the test set
PUBLISHED = {"TIMIT": {"fc": -348.63, "rnn": -261.19, "gru": -158.42, "lstm": -143.80}}


@torch.no_grad()
def run(runs: list[Run], options: Options) -> list[dict]:
    results, corpora = {}, {run.data for run in runs}
    for run in runs:
        print(f"{run.folder}: {run.name}, {run.trained}; {len(run.test)} utterances of {run.data}")
        result = evaluate(run, runs, options.seed)
        result |= {"run": str(run.folder), "model": run.name, "data": run.data, "split": options.split}
        write(run.target / "results.json", as_json(result))
        print(f"results.json, figures and wav files: {run.target}/")
        results[str(run.folder) + (f" on {run.data}" if len(corpora) > 1 else "")] = result
    comparable = len(corpora) == 1 and options == Options(seed=options.seed)  # the whole test split
    print(f"\n{bounds_table(results, runs[0].corpus.layout if comparable else None)}\n")
    print(f"{probes_table(results)}\n\n{movement_table(results)}\n\n{denoising_table(results)}")
    return list(results.values())


def evaluate(run: Run, runs: list[Run], seed: int) -> dict:
    """Numbers, pictures and sound of one run; those of `runs` that can stand beside it in the picture of
    reconstructions."""
    clear(run.target)
    training = run.corpus.split("train").spread(probes.UTTERANCES)
    train = probes.observe(run, training, "training split", keep=probes.FRAMES)
    test = probes.observe(run, run.test, "test split")
    config = run.model.config
    result = {
        "seed": seed,
        "features": recipe_of(run).features,
        "architecture": config.architecture,
        "alpha": config.alpha,
        "parameters": sum(p.numel() for name, p in run.model.named_parameters() if name != "table"),
        "bound": segment_bound(run, seed),
        "probes": probes.probes(run, train, test, training, seed),
        "movement": movement(run, probes.Instruments.fit(run, train), test, seed),
        "denoising": denoising(run, seed),
    }
    draw_segments(run, test, seed)
    draw_reconstructions(run, runs, seed)
    draw_utterances(run, seed)
    return result


# ------------------------------------------------------------------------------------------------ transformation


@dataclass
class Speech:
    """A whole utterance as segments side by side."""

    utterance: Utterance
    waveform: np.ndarray  # (samples,)
    features: Tensor  # (frames, bins)
    z1: Tensor  # (N, z1_latent), the means of q(z1) of its segments
    z2: Tensor
    mu2: Tensor  # (z2_latent,), its s-vector in closed form


def analyse(run: Run, index: int, condition: str = "clean", seed: int = 0) -> Speech:
    """An utterance of the run's test, a condition laid over it."""
    utterance, recipe = run.test.utterances[index], recipe_of(run)
    generator = probes.condition_generator(utterance, condition, seed)
    waveform = synthetic.apply_condition(run.test.waveform(index, trim=recipe.trim), condition, generator)
    x, z1, z2 = encode(run, waveform, shift=recipe.frames)
    return Speech(utterance, waveform, x, z1, z2, run.model.s_vector(z2))


def decode(run: Run, speech: Speech, z2: Tensor) -> Tensor:
    """Each segment from its own z1 and a given z2 (N, z2_latent), one after the other: features (frames, bins)."""
    return run.model.decode(speech.z1, z2).flatten(0, 1)[: len(speech.features)]


def swapped(source: Speech, reference: Speech) -> Tensor:
    """For segment n of the source, the z2 of segment n of the reference, over again where that is shorter."""
    return reference.z2[torch.arange(len(source.z2)) % len(reference.z2)]


def shifted(source: Speech, reference: Speech) -> Tensor:
    """z2 + Δμ2, where Δμ2 = μ2 of the reference − μ2 of the source, which the paper calls the target (appendix E)."""
    return source.z2 + (reference.mu2 - source.mu2)


def conversion_pairs(test: Corpus, count: int, seed: int) -> list[tuple[int, int]]:
    """(source, reference): sources spread over the corpus, for each a reference drawn from the other sex, of another
    speaker where the sexes are not known. Empty where there is one speaker."""
    random, utterances, pairs = np.random.default_rng(seed), test.utterances, []
    count = min(count, len(test))
    for source in (i * len(test) // count for i in range(count)):
        others = [k for k, u in enumerate(utterances) if u.speaker != utterances[source].speaker]
        other_sex = [k for k in others if {utterances[k].sex, utterances[source].sex} == {"F", "M"}]
        if others:
            pairs.append((source, int(random.choice(other_sex or others))))
    return pairs


def clean_reference(test: Corpus, index: int) -> int:
    """Another clean utterance of the same speaker; of any where there is none; `index` where there is no other."""
    others = [(index + k) % len(test) for k in range(1, len(test))]
    others = [k for k in others if test.utterances[k].condition in CLEAN]
    spoken = sorted(k for k in others if test.utterances[k].speaker == test.utterances[index].speaker)
    return (spoken or others or [index])[0]


def without_conditions(run: Run) -> Run:
    """The run on the utterances of its test before conditions were laid over them, where they are known."""
    return replace(run, test=run.test.without_conditions())


def utterances_to_denoise(test: Corpus, measured: bool) -> list[int]:
    """Those that the corpus has noisy, with `measured` only where it knows them without the noise; else the clean ones.
    Empty where it has no clean speech."""
    clean = [i for i, u in enumerate(test.utterances) if u.condition in CLEAN]
    noisy = [i for i, u in enumerate(test.utterances) if u.condition == "noisy"]
    if test.clean is None and (measured or not clean):
        return clean
    return noisy or clean


def analyse_noisy(run: Run, index: int, seed: int) -> Speech:
    """An utterance of the run's test as it is where the corpus has it noisy, else with noise laid over it."""
    noisy = run.test.utterances[index].condition == "noisy"
    return analyse(run, index, "clean" if noisy else "noise", seed)


# ------------------------------------------------------------------------------------------------------- numbers


@torch.no_grad()
def segment_bound(run: Run, seed: int) -> float:
    """The segment variational lower bound (eq. 1), mean over all segments of the test utterances, in nats: s-vectors
    in closed form, one draw of z1 and z2."""
    recipe, device = replace(recipe_of(run), domain=""), run.model.standardise.mean.device
    generator, total, count = torch.Generator().manual_seed(seed), 0.0, 0
    for batch, n in FeatureSegments(run.test, recipe, seed, device).development(run.test, run.model, recipe):
        loss, _ = run.model.loss(batch, run.model.draw_noise(n, generator))
        total, count = total - n * float(loss), count + n
    return total / count


def movement(run: Run, instruments: probes.Instruments, test: list[probes.Encoded], seed: int) -> dict:
    """What becomes of F0, vocal-tract length and phones when z2 changes, over pairs of utterances.

    For each of reconstruction, swap and shift: the median over pairs of (decoded − source) / (reference − source), of
    ln F0 ("log_f0") and of vocal-tract length ("tract"), source and reference measured on their real features; and
    the mean share of frames whose phone is recognised ("phones"). "instruments": R² of what is measured on real
    features against what is known. What cannot be measured is left out.
    """
    pairs = conversion_pairs(run.test, PAIRS, seed)
    phones, moved = {}, {}
    known = {name: {} for name in LEAST}  # what is measured on real features, by utterance
    for pair in pairs:
        source, reference = (analyse(run, index) for index in pair)
        here, there = (instruments.measure(run, s.features, s.utterance, s.waveform) for s in (source, reference))
        ways = {"reconstruction": source.z2, "swap": swapped(source, reference), "shift": shifted(source, reference)}
        found = {}
        for way, z2 in ways.items():
            found[way] = instruments.measure(run, decode(run, source, z2), source.utterance, source.waveform)
        for way, values in ({"original": here} | found).items():
            phones.setdefault(way, []).append(values["phones"])
        for name, least in LEAST.items():
            known[name] |= {pair[0]: here[name], pair[1]: there[name]}
            distance = there[name] - here[name]
            for way, values in found.items():
                if abs(distance) >= least and not math.isnan(values[name]):
                    moved.setdefault((way, name), []).append((values[name] - here[name]) / distance)
    result = {"pairs": len(pairs)}
    for way, shares in phones.items():
        counted = [share for share in shares if not math.isnan(share)]
        result[way] = {"phones": float(np.mean(counted))} if counted else {}
    for (way, name), shares in moved.items():
        result[way] |= {name: float(np.median(shares)), f"{name}_pairs": len(shares)}
    result["instruments"] = {}
    for name, values in known.items():
        truth = torch.tensor([[getattr(test[index], name), value] for index, value in values.items()]).view(-1, 2)
        truth = truth[~truth.isnan().any(1)]
        if len(truth) > 1:
            result["instruments"][name] = probes.r_squared(truth[:, 1], truth[:, 0])
    return result


def denoising(run: Run, seed: int) -> dict[str, float]:
    """How far features are from those of the clean utterance: the root mean square over frames and bins, in standard
    deviations of each bin, mean over utterances. With noise, the corpus's own or laid over it here ("noisy"); that
    reconstructed ("reconstruction"), and with z2 shifted toward another clean utterance ("denoised"); and the
    reconstruction of the clean one ("clean"), as near as it can come. Empty where the corpus has no clean speech."""
    before, sources = without_conditions(run), utterances_to_denoise(run.test, measured=True)
    if not sources:
        return {}
    count, rows = min(NOISY, len(sources)), []
    for index in (sources[i * len(sources) // count] for i in range(count)):
        clean, noisy = analyse(before, index), analyse_noisy(run, index, seed)
        denoised = shifted(noisy, analyse(before, clean_reference(before.test, index)))
        attempts = [noisy.features, decode(run, noisy, noisy.z2), decode(run, noisy, denoised)]
        attempts.append(decode(run, clean, clean.z2))
        deviation = run.model.standardise.deviation
        rows.append([float(((x - clean.features) / deviation).square().mean().sqrt()) for x in attempts])
    means = np.mean(rows, axis=0).tolist()
    return dict(zip(("noisy", "reconstruction", "denoised", "clean"), means, strict=True))


# ------------------------------------------------------------------------------------------------------ pictures


def choose_segments(run: Run, count: int, seed: int) -> Tensor:
    """Segments full of speech (count, frames, bins) from utterances spread over the test, men's in the first half and
    women's in the other. Which ones depends on the waveforms only: the same for every model."""
    recipe, random, chosen = recipe_of(run), np.random.default_rng(seed), []
    groups = [[i for i, u in enumerate(run.test.utterances) if u.sex == sex] for sex in "MF"]
    groups = groups if all(groups) else [range(len(run.test))] * 2
    for group, number in zip(groups, (count // 2, count - count // 2), strict=True):
        for i in range(number):
            waveform = run.test.waveform(group[int((i + random.random()) * len(group) / number)], trim=recipe.trim)
            speech = audio.voiced_frames(torch.from_numpy(waveform)).float()
            share = cut(speech[:, None], recipe.frames, recipe.frames).mean((1, 2)).numpy()
            x = features(waveform, recipe.features, run.model.standardise.mean.device)
            fullest = np.flatnonzero(share >= 0.9 * share.max())
            chosen.append(cut(x, recipe.frames, recipe.frames)[random.choice(fullest)])
    return torch.stack(chosen)


def draw_segments(run: Run, test: list[probes.Encoded], seed: int) -> None:
    """swap.png, the grid of Figure 4; traversal-z1.png and traversal-z2.png, as Figures 11 to 14 but of every latent,
    those first whose posterior means vary most over the test segments."""
    model = run.model
    rows, columns = choose_segments(run, ROWS, seed), choose_segments(run, COLUMNS, seed + 1)
    (_, z1, _, own), (_, other, _, z2) = model.infer(rows), model.infer(columns)
    grid = model.decode(z1.repeat_interleave(COLUMNS, 0), z2.repeat(ROWS, 1)).unflatten(0, (ROWS, COLUMNS))
    blocks = (model.decode(z1, own), columns, model.decode(other, z2), grid)
    figures.swap_grid(*(block.cpu().numpy() for block in blocks), run.target / "swap.png")

    seeds = choose_segments(run, SEEDS, seed + 2)
    _, z1, _, z2 = model.infer(seeds)
    for which, name in enumerate(("z1", "z2")):
        deviations, walks = torch.cat([getattr(e, name) for e in test]).std(0, correction=0), []
        for j in deviations.argsort(descending=True).tolist():
            latents = [z.repeat_interleave(len(TRAVERSED), 0) for z in (z1, z2)]
            latents[which][:, j] = torch.from_numpy(TRAVERSED).to(z1).repeat(SEEDS)
            decoded = model.decode(*latents).unflatten(0, (SEEDS, len(TRAVERSED)))
            walks.append((f"$z_{which + 1}$[{j}], deviation {deviations[j]:.2f}", decoded.cpu().numpy()))
        figures.traversal(seeds.cpu().numpy(), walks, TRAVERSED, run.target / f"traversal-{name}.png")


def draw_reconstructions(run: Run, runs: list[Run], seed: int) -> None:
    """reconstructions.png, Figure 6: this run and all others of the same speech and features."""

    def kind(run: Run) -> tuple:
        recipe = recipe_of(run)
        return run.data, recipe.features, recipe.frames, recipe.trim

    beside = [run, *(other for other in runs if other is not run and kind(other) == kind(run))]
    titles = [other.model.config.architecture.upper() for other in beside]
    if len(set(titles)) < len(titles):
        titles = [other.folder.name for other in beside]
    segments = choose_segments(run, EXAMPLES, seed + 3)
    columns = [segments]
    for other in beside:
        _, z1, _, z2 = other.model.infer(segments)
        columns.append(other.model.decode(z1, z2))
    examples = torch.stack(columns, dim=1).cpu().numpy()
    figures.reconstructions(examples, ["original", *titles], run.target / "reconstructions.png")


def draw_utterances(run: Run, seed: int) -> None:
    """Whole utterances, as Figures 1 and 5: from a man to a woman, from a woman to a man, from noise to clean."""
    words, drawn = {"M": "male", "F": "female"}, set()
    for source, reference in conversion_pairs(run.test, len(run.test), seed):
        sexes = [words.get(run.test.utterances[i].sex, "") for i in (source, reference)]
        known = set(sexes) == {"male", "female"}
        name = f"conversion-{'-to-'.join(sexes)}" if known else f"conversion-{len(drawn) + 1}"
        if name not in drawn and len(drawn) < 2:
            drawn.add(name)
            titles = [f"{sex} speaker" for sex in sexes] if known else ["a speaker", "another speaker"]
            draw_utterance(run, name, analyse(run, source), analyse(run, reference), titles, seed)
    if not drawn:
        print("no voice conversion: the test utterances are all of one speaker")
    if sources := utterances_to_denoise(run.test, measured=False):
        index, before = sources[len(sources) // 2], without_conditions(run)
        noisy, clean = analyse_noisy(run, index, seed), analyse(before, clean_reference(before.test, index))
        draw_utterance(run, "denoising", noisy, clean, ["noisy", "clean"], seed)
    else:
        print("no denoising: none of the test utterances is clean")
    if recipe_of(run).features != "log_magnitude":
        print("no wav files: filter banks cannot be turned to sound; train with --set features=log_magnitude")


def draw_utterance(run: Run, name: str, source: Speech, reference: Speech, titles: list[str], seed: int) -> None:
    """NAME.png, and of log-magnitude features the wav files NAME-….wav: source, reference, reconstruction; and the
    transformed utterance with the phase of the source and with one found by Griffin-Lim."""
    reconstruction = decode(run, source, source.z2)
    transformed = decode(run, source, shifted(source, reference))
    first, second = titles
    panels = {
        "source": (f"source: {first}, {source.utterance.name}", source.features),
        "reference": (f"reference: {second}, {reference.utterance.name}", reference.features),
        "reconstruction": ("reconstruction of the source", reconstruction),
        "transformed": (f"$z_1$ of the source, $z_2$ shifted: {first} to {second}", transformed),
        "other": ("reconstruction of the reference", decode(run, reference, reference.z2)),
    }
    panels = {place: (title, x[:SHOWN].cpu().numpy()) for place, (title, x) in panels.items()}
    figures.transformation(panels, run.target / f"{name}.png")
    if recipe_of(run).features != "log_magnitude":
        return
    spectrum, length = FEATURES.analyse(torch.from_numpy(source.waveform)), len(source.waveform)
    sounds = {"source": source.waveform, "reference": reference.waveform}
    for part, x in (("reconstruction", reconstruction), ("transformed", transformed)):
        power = audio.log_magnitude_to_power(x.cpu())
        sounds[f"{part}-source-phase"] = audio.resynthesise(power.log(), spectrum, FEATURES, length).numpy()
    generator = torch.Generator().manual_seed(seed)
    sounds["transformed-griffin-lim"] = audio.griffin_lim(power, FEATURES, length=length, generator=generator).numpy()
    for part, waveform in sounds.items():
        audio.write(run.target / f"{name}-{part}.wav", waveform)


# -------------------------------------------------------------------------------------------------------- tables


def cell(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def table(heading: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, the first to the left and the others to the right."""
    lines = [heading, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    texts = ([f"{text:>{width}}" for text, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join([f"{line[0]:<{widths[0]}}", *text[1:]]) for line, text in zip(lines, texts, strict=True))


def bounds_table(results: dict[str, dict], layout: str | None = None) -> str:
    """`layout` names the corpus where published rows may stand beside ours."""
    rows = []
    for title, r in results.items():
        rows.append([title, r["architecture"], r["features"], f"{r['alpha']:g}", f"{r['bound']:.2f}"])
    architectures = {r["architecture"] for r in results.values()}
    for name, bound in PUBLISHED.get(layout, {}).items():
        if name in architectures:
            rows.append([f"{name.upper()} (paper)", name, "", "0", f"{bound:.2f}"])
    return table(["", "architecture", "features", "α", "segment bound"], rows)


def probe_cell(probe: dict | None, which: str) -> str:
    return cell(probe and probe[which], ".2f" if probe and probe["measure"] == "r_squared" else ".1%")


def probes_table(results: dict[str, dict]) -> str:
    """Accuracies in %, of F0 and vocal-tract length R². What a corpus cannot tell is a dash."""
    columns = list(next(iter(results.values()))["probes"])
    rows, before = [], None
    for title, result in results.items():
        chance, z1, z2 = ([probe_cell(p, which) for p in result["probes"].values()] for which in ("chance", "z1", "z2"))
        if chance != before:
            rows.append(["chance", "", *chance])
        rows += [[title, "z1", *z1], ["", "z2", *z2]]
        before = chance
    note = (
        "Linear probes. phone, speaker: of each segment from z1 and z2; with μ: of each utterance from μ1 and μ2.\n"
        "Accuracy beside the most frequent class; of ln F0 and vocal-tract length R². Trained on the training split;\n"
        "speaker: on half of each test speaker's utterances. –: this corpus cannot tell."
    )
    return f"{table(['', '', *columns], rows)}\n{note}"


def movement_table(results: dict[str, dict]) -> str:
    rows = []
    for title, result in results.items():
        for way in ("original", "reconstruction", "swap", "shift"):
            values = result["movement"].get(way, {})
            cells = [cell(values.get(name), ".0%") for name in LEAST] + [cell(values.get("phones"), ".1%")]
            rows.append([title if way == "original" else "", way, *cells])
        quality = result["movement"]["instruments"]
        rows.append(["", "R² of the instrument", *(cell(quality.get(name), ".2f") for name in LEAST), ""])
    note = (
        f"F0, tract: the way from source, 0%, to reference, 100%; medians over up to {PAIRS} pairs of opposite sex\n"
        "(different speakers where it is unknown). swap: z2 of each segment from the reference; shift: z2 + Δμ2.\n"
        "phones: frames whose phone a linear classifier recognises that was trained on real features."
    )
    return f"{table(['', '', 'F0', 'tract', 'phones'], rows)}\n{note}"


def denoising_table(results: dict[str, dict]) -> str:
    ways = ("noisy", "reconstruction", "denoised", "clean")
    rows = [[title, *(cell(result["denoising"].get(way), ".3f") for way in ways)] for title, result in results.items()]
    note = "Distance to the clean features, RMS in deviations of a bin; clean: of the clean one's own reconstruction."
    return f"{table(['', 'noisy', 'reconstructed', 'denoised', 'clean'], rows)}\n{note}"
