"""What z1 and z2 of an FHVAE hold: exchange, shift and traversal (FHVAE paper, section 4.1, appendices D, E and H).

Pictures and sound: the A/B/C grid (Figure 4), utterances whose z2 is shifted toward a reference's (Figures 1 and 5),
traversal of each latent (Figures 11 to 14), reconstructions of several models side by side (Figure 6). Numbers for
them: the segment bound, linear probes, and what a change of z2 moves and what it keeps.
"""

import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from ..data import audio
from ..data.corpus import CLEAN, Corpus
from ..evaluation import figures, report
from ..evaluation.runs import Options, Run, Speech, encode, features_of
from ..inference.convert import segments_of
from ..training.segment_batches import FeatureSegments
from . import probes

MODELS = ["fhvae"]

ROWS, COLUMNS, SEEDS, EXAMPLES = (
    4,
    10,
    5,
    3,
)  # blocks A and B of the grid, traversal, reconstructions
TILED = 8  # latents whose traversal a page shows with a slider
TRAVERSED = np.linspace(-3, 3, 7)
SHOWN = 400  # frames of an utterance in a picture
PAIRS, NOISY = 32, 16  # utterances that are measured after a swap and a shift, and after denoising
LEAST = {
    "log_f0": 0.1,
    "tract": 0.5,
}  # pairs of utterances that are nearer, in ln Hz and cm, cannot show a movement


@torch.no_grad()
def evaluate(runs: list[Run], options: Options) -> list[dict]:
    """Four tables, and results.json, figures and wav files in the folder of every run."""
    results = report.evaluate_each(
        runs, options, partial(evaluate_run, runs=runs), "figures and wav files"
    )
    rows = dict(zip(report.titles(runs), results, strict=True))
    print(f"\n{bounds_table(rows, report.published_layout(runs, options))}\n")
    print(f"{probes_table(rows)}\n\n{movement_table(rows)}\n\n{denoising_table(rows)}")
    return results


def evaluate_run(run: Run, options: Options, runs: list[Run]) -> dict:
    """Numbers, pictures and sound of one run; those of `runs` that can stand beside it in the picture of
    reconstructions."""
    config, seed = run.model.config, options.seed
    train = run.corpus.split("train").spread(probes.UTTERANCES)
    train = probes.observe(run, train, "training split", keep=probes.FRAMES)
    test = probes.observe(run, run.test, "test split")
    result = {
        "features": run.recipe.features,
        "architecture": config.architecture,
        "alpha": config.alpha,
        "parameters": sum(p.numel() for name, p in run.model.named_parameters() if name != "table"),
        "bound": segment_bound(run, seed),
        "probes": probes.probes(train, test),
        "movement": movement(run, probes.fit_instruments(train), test, seed),
        "denoising": denoising(run),
    }
    result["traversals"] = draw_segments(run, test, seed)
    draw_reconstructions(run, runs, seed)
    draw_utterances(run, seed)
    return result


def analyse(run: Run, test: Corpus, index: int) -> Speech:
    """An utterance in segments side by side."""
    return encode(run, test, index, shift=run.recipe.frames)


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
    after = [*range(index + 1, len(test)), *range(index)]
    others = [k for k in after if test.utterances[k].condition in CLEAN]
    spoken = [
        k for k in sorted(others) if test.utterances[k].speaker == test.utterances[index].speaker
    ]
    return (spoken or others or [index])[0]


def noisy_utterances(test: Corpus) -> list[int]:
    """Those with noise, of a corpus that has clean speech too; else empty."""
    clean = any(u.condition in CLEAN for u in test.without_conditions().utterances)
    return [i for i, u in enumerate(test.utterances) if clean and u.condition == "noisy"]


def noisy_and_reference(run: Run, index: int) -> tuple[Speech, Speech]:
    """A noisy test utterance, and the clean one that its z2 is shifted to."""
    before = run.test.without_conditions()
    return analyse(run, run.test, index), analyse(run, before, clean_reference(before, index))


@torch.no_grad()
def segment_bound(run: Run, seed: int) -> float:
    """The segment variational lower bound (eq. 1), mean over all segments of the test utterances, in nats: s-vectors
    in closed form, one draw of z1 and z2."""
    recipe, generator, total, count = (
        replace(run.recipe, domain=""),
        torch.Generator().manual_seed(seed),
        0.0,
        0,
    )
    for batch, n in FeatureSegments(run.test, recipe, seed, run.device).development(run.model):
        loss, _ = run.model.loss(batch, run.model.draw_noise(n, generator))
        total, count = total - n * float(loss), count + n
    return total / count


def movement(run: Run, measure: probes.Measure, test: list[probes.Encoded], seed: int) -> dict:
    """What becomes of F0, vocal-tract length and phones when z2 changes, over pairs of utterances.

    For each of reconstruction, swap and shift: the median over pairs of (decoded − source) / (reference − source), of
    ln F0 ("log_f0") and of vocal-tract length ("tract"), source and reference measured on their real features; and the
    mean share of frames whose phone is recognised ("phones"). "instruments": R² of what is measured on real features
    against what is known. What cannot be measured is left out."""
    pairs, measured = conversion_pairs(run.test, PAIRS, seed), {}  # on real features, by utterance
    phones, moved = defaultdict(list), defaultdict(list)
    for pair in pairs:
        source, reference = (analyse(run, run.test, index) for index in pair)
        here, there = (measure(run, speech, speech.features) for speech in (source, reference))
        measured |= {pair[0]: here, pair[1]: there}
        ways = {
            "reconstruction": source.z2,
            "swap": swapped(source, reference),
            "shift": shifted(source, reference),
        }
        found = {way: measure(run, source, decode(run, source, z2)) for way, z2 in ways.items()}
        for way, values in ({"original": here} | found).items():
            phones[way].append(values["phones"])
        for name, least in LEAST.items():
            distance = there[name] - here[name]
            for way, values in found.items():
                if abs(distance) >= least and not math.isnan(values[name]):
                    moved[way, name].append((values[name] - here[name]) / distance)
    result = {"pairs": len(pairs)}
    for way, shares in phones.items():
        counted = [share for share in shares if not math.isnan(share)]
        result[way] = {"phones": float(np.mean(counted))} if counted else {}
    for (way, name), shares in moved.items():
        result[way] |= {name: float(np.median(shares)), f"{name}_pairs": len(shares)}
    result["instruments"] = {}
    for name in LEAST:
        truth = torch.tensor(
            [[getattr(test[i], name), values[name]] for i, values in measured.items()]
        ).view(-1, 2)
        truth = truth[~truth.isnan().any(1)]
        if len(truth) > 1:
            result["instruments"][name] = probes.r_squared(truth[:, 1], truth[:, 0])
    return result


def denoising(run: Run) -> dict[str, float]:
    """How far features are from those of the clean utterance: the root mean square over frames and bins, in standard
    deviations of each bin, mean over utterances with noise. With the noise ("noisy"); that reconstructed
    ("reconstruction"), and with z2 shifted toward another clean utterance ("denoised"); and the reconstruction of the
    clean one ("clean"), as near as it can come. Empty where the corpus does not know them without the noise."""
    sources, rows = noisy_utterances(run.test) if run.test.clean is not None else [], []
    count = min(NOISY, len(sources))
    for index in (sources[i * len(sources) // count] for i in range(count)):
        clean = analyse(run, run.test.without_conditions(), index)
        noisy, reference = noisy_and_reference(run, index)
        attempts = {
            "noisy": noisy.features,
            "reconstruction": decode(run, noisy, noisy.z2),
            "denoised": decode(run, noisy, shifted(noisy, reference)),
            "clean": decode(run, clean, clean.z2),
        }
        deviation = run.model.standardise.deviation
        rows.append(
            [
                float(((x - clean.features) / deviation).square().mean().sqrt())
                for x in attempts.values()
            ]
        )
    return dict(zip(attempts, np.mean(rows, axis=0).tolist(), strict=True)) if rows else {}


def choose_segments(run: Run, count: int, seed: int) -> Tensor:
    """Segments full of speech (count, frames, bins) from utterances spread over the test, men's in the first half and
    women's in the other. Which ones depends on the waveforms only: the same for every model."""
    frames, random, chosen = run.recipe.frames, np.random.default_rng(seed), []
    groups = [[i for i, u in enumerate(run.test.utterances) if u.sex == sex] for sex in "MF"]
    groups = groups if all(groups) else [range(len(run.test))] * 2
    for group, number in zip(groups, (count // 2, count - count // 2), strict=True):
        for i in range(number):
            index = group[int((i + random.random()) * len(group) / number)]
            waveform = run.test.waveform(index, trim=run.recipe.trim)
            speech = audio.voiced_frames(torch.from_numpy(waveform)).float()
            share = segments_of(speech[:, None], frames, frames).mean((1, 2)).numpy()
            fullest = np.flatnonzero(share >= 0.9 * share.max())
            chosen.append(
                segments_of(features_of(run, waveform), frames, frames)[random.choice(fullest)]
            )
    return torch.stack(chosen)


def draw_segments(run: Run, test: list[probes.Encoded], seed: int) -> dict[str, list]:
    """swap.png, the grid of Figure 4; traversal-z1.png and traversal-z2.png, as Figures 11 to 14 but of every latent,
    those first whose posterior means vary most over the test segments. And the first of them as tiles; returns what is
    in these: {"values": of a latent, "traversal-z1": names of latents, "traversal-z2"}."""
    model = run.model
    rows, columns = choose_segments(run, ROWS, seed), choose_segments(run, COLUMNS, seed + 1)
    of_rows, of_columns = model.infer(rows), model.infer(columns)
    grid = model.decode(of_rows.z1.repeat_interleave(COLUMNS, 0), of_columns.z2.repeat(ROWS, 1))
    grid = grid.unflatten(0, (ROWS, COLUMNS))
    own_rows, own_columns = (
        model.decode(latents.z1, latents.z2) for latents in (of_rows, of_columns)
    )
    blocks = (own_rows[:, None], torch.stack([columns, own_columns]), grid)
    figures.swap_grid(*(block.cpu().numpy() for block in blocks), run.target / "swap.png")

    seeds = choose_segments(run, SEEDS, seed + 2)
    means, tiled = model.infer(seeds), {"values": TRAVERSED.tolist()}
    for which, name in enumerate(("z1", "z2")):
        deviations, walks = torch.cat([getattr(e, name) for e in test]).std(0, correction=0), []
        for j in deviations.argsort(descending=True).tolist():
            latents = [z.repeat_interleave(len(TRAVERSED), 0) for z in (means.z1, means.z2)]
            latents[which][:, j] = torch.from_numpy(TRAVERSED).to(seeds).repeat(SEEDS)
            decoded = model.decode(*latents).unflatten(0, (SEEDS, len(TRAVERSED)))
            walks.append(
                (f"$z_{which + 1}$[{j}], deviation {deviations[j]:.2f}", decoded.cpu().numpy())
            )
        figures.traversal(
            seeds.cpu().numpy(), walks, TRAVERSED, run.target / f"traversal-{name}.png"
        )
        figures.traversal_tiles(
            seeds.cpu().numpy(), walks[:TILED], run.target / f"traversal-{name}-tiles.png"
        )
        tiled[f"traversal-{name}"] = [
            title.replace("$", "").replace("_", "") for title, _ in walks[:TILED]
        ]
    return tiled


def draw_reconstructions(run: Run, runs: list[Run], seed: int) -> None:
    """reconstructions.png, Figure 6: this run and all others of the same speech and features."""
    kind = attrgetter("data", "recipe.features", "recipe.frames", "recipe.trim")
    beside = [run, *(other for other in runs if other is not run and kind(other) == kind(run))]
    titles = [other.model.config.architecture.upper() for other in beside]
    if len(set(titles)) < len(titles):
        titles = [other.folder.name for other in beside]
    segments = choose_segments(run, EXAMPLES, seed + 3)
    latents = [other.model.infer(segments) for other in beside]
    decoded = [
        other.model.decode(own.z1, own.z2) for other, own in zip(beside, latents, strict=True)
    ]
    examples = torch.stack([segments, *decoded], dim=1).cpu().numpy()
    figures.reconstructions(examples, ["original", *titles], run.target / "reconstructions.png")


def draw_utterances(run: Run, seed: int) -> None:
    """Whole utterances, as Figures 1 and 5: from a man to a woman, from a woman to a man, from noise to clean."""
    words, drawn = {"M": "male", "F": "female"}, set()
    for pair in conversion_pairs(run.test, len(run.test), seed):
        sexes = [words.get(run.test.utterances[i].sex, "") for i in pair]
        known = set(sexes) == {"male", "female"}
        name = "-to-".join(sexes) if known else str(len(drawn) + 1)
        titles = [f"{sex} speaker" for sex in sexes] if known else ["a speaker", "another speaker"]
        if name not in drawn and len(drawn) < 2:
            drawn.add(name)
            draw_utterance(
                run, f"conversion-{name}", *(analyse(run, run.test, i) for i in pair), titles, seed
            )
    if not drawn:
        print("no voice conversion: the test utterances are all of one speaker")
    if sources := noisy_utterances(run.test):
        noisy, reference = noisy_and_reference(run, sources[len(sources) // 2])
        draw_utterance(run, "denoising", noisy, reference, ["noisy", "clean"], seed)
    else:
        print("no denoising: needs noisy and clean test utterances; try --data conditions:CORPUS")
    if run.recipe.features != "log_magnitude":
        print(
            "no wav files: filter banks cannot be turned to sound; train with --set features=log_magnitude"
        )


def draw_utterance(
    run: Run, name: str, source: Speech, reference: Speech, titles: list[str], seed: int
) -> None:
    """NAME.png, and of log-magnitude features the wav files NAME-….wav: source, reference, reconstruction; and the
    transformed utterance with the phase of the source and with one found by Griffin-Lim."""
    reconstruction = decode(run, source, source.z2)
    transformed = decode(run, source, shifted(source, reference))
    panels = {
        "source": (f"source: {titles[0]}, {source.utterance.name}", source.features),
        "reference": (f"reference: {titles[1]}, {reference.utterance.name}", reference.features),
        "reconstruction": ("reconstruction of the source", reconstruction),
        "transformed": (f"$z_1$ of the source, $z_2$ shifted: {' to '.join(titles)}", transformed),
        "other": ("reconstruction of the reference", decode(run, reference, reference.z2)),
    }
    panels = {place: (title, x[:SHOWN].cpu().numpy()) for place, (title, x) in panels.items()}
    figures.transformation(panels, run.target / f"{name}.png")
    if run.recipe.features != "log_magnitude":
        return
    stft, sounds = audio.FEATURE_STFT, {"source": source.waveform, "reference": reference.waveform}
    spectrum, length = stft.analyse(torch.from_numpy(source.waveform)), len(source.waveform)
    for part, x in (("reconstruction", reconstruction), ("transformed", transformed)):
        power = audio.log_magnitude_to_power(x.cpu())
        sounds[f"{part}-source-phase"] = audio.resynthesise(
            power.log(), spectrum, stft, length
        ).numpy()
    generator = torch.Generator().manual_seed(seed)
    sounds["transformed-griffin-lim"] = audio.griffin_lim(
        power, stft, length=length, generator=generator
    ).numpy()
    for part, waveform in sounds.items():
        audio.write(run.target / f"{name}-{part}.wav", waveform)


def bounds_table(results: dict[str, dict], layout: str | None = None) -> str:
    """`layout` names the corpus where published rows may stand beside ours."""
    rows = []
    for title, r in results.items():
        rows.append(
            [title, r["architecture"], r["features"], f"{r['alpha']:g}", f"{r['bound']:.2f}"]
        )
    for name, bound in report.published("transformation", layout):
        if name in {r["architecture"] for r in results.values()}:
            rows.append([f"{name.upper()} (paper)", name, "", "0", bound])
    return report.table(["", "architecture", "features", "α", "segment bound"], rows)


def probes_table(results: dict[str, dict]) -> str:
    """Accuracies in %, of F0 and vocal-tract length R². What a corpus cannot tell is a dash."""
    forms, rows, before = {"accuracy": ".1%", "r_squared": ".2f"}, [], None
    for title, result in results.items():
        chance, z1, z2 = (
            [format(p[which], forms[p["measure"]]) if p else "–" for p in result["probes"].values()]
            for which in ("chance", "z1", "z2")
        )
        if chance != before:
            rows.append(["chance", "", *chance])
        rows += [[title, "z1", *z1], ["", "z2", *z2]]
        before = chance
    note = (
        "Linear probes. phone, speaker: of each segment from z1 and z2; with μ: of each utterance from μ1 and μ2.\n"
        "Accuracy beside the most frequent class; of ln F0 and vocal-tract length R². Trained on the training split;\n"
        "speaker: on half of each test speaker's utterances. –: this corpus cannot tell."
    )
    return (
        f"{report.table(['', '', *next(iter(results.values()))['probes']], rows, left=2)}\n{note}"
    )


def movement_table(results: dict[str, dict]) -> str:
    rows = []
    for title, result in results.items():
        for way in ("original", "reconstruction", "swap", "shift"):
            values = result["movement"].get(way, {})
            cells = [report.number(values.get(name), ".0%") for name in LEAST]
            rows.append(
                [
                    title if way == "original" else "",
                    way,
                    *cells,
                    report.number(values.get("phones"), ".1%"),
                ]
            )
        quality = result["movement"]["instruments"]
        rows.append(
            [
                "",
                "R² of the instrument",
                *(report.number(quality.get(name), ".2f") for name in LEAST),
                "",
            ]
        )
    note = (
        f"F0, tract: the way from source, 0%, to reference, 100%; medians over up to {PAIRS} pairs of opposite sex\n"
        "(different speakers where it is unknown). swap: z2 of each segment from the reference; shift: z2 + Δμ2.\n"
        "phones: frames whose phone a linear classifier recognises that was trained on real features."
    )
    return f"{report.table(['', '', 'F0', 'tract', 'phones'], rows, left=2)}\n{note}"


def denoising_table(results: dict[str, dict]) -> str:
    headings = {
        "noisy": "noisy",
        "reconstruction": "reconstructed",
        "denoised": "denoised",
        "clean": "clean",
    }
    rows = [
        [title, *(report.number(r["denoising"].get(w), ".3f") for w in headings)]
        for title, r in results.items()
    ]
    note = "Distance to the clean features, RMS in deviations of a bin; clean: of the clean one's own reconstruction."
    return f"{report.table(['', *headings.values()], rows)}\n{note}"
