"""FHVAE paper, section 4.3: recognition in domains that the recogniser has not heard.

    python studies/recognition.py 2 --recipe quick                                Table 2: trained on all or on men only
    python studies/recognition.py 3 --recipe quick                                Table 3: trained on all or clean only
    python studies/recognition.py 3 --recipe quick --data conditions:~/TIMIT      on any corpus without conditions
    python studies/recognition.py 2 --recipe fhvae2017 --data TIMIT               as in the paper

First the extractors are trained, FHVAE and (Table 3) β-VAEs, then a recogniser for each row; one table has their errors
in every domain, in the paper's order. Where conditions are laid over a corpus, those that are trained on clean speech
hear all of it as it was before. A training that was interrupted goes on when called again.
"""

from pathlib import Path

from study import arguments, evaluate_all, evaluated, train_all

from minidvae.cli import run
from minidvae.data.corpus import CONDITIONS_OF, load_corpus
from minidvae.fhvae.recognition import read_lexicon
from minidvae.training.checkpoint import load_run
from minidvae.training.config import SettingError, overrides
from minidvae.training.run import resolve

BETAS = (1, 2, 4, 8)
FHVAE = {"fhvae": ["--model", "fhvae"]}
EXTRACTORS = {
    "2": FHVAE,
    "3": {f"beta_vae-{beta}": ["--model", "beta_vae", "--set", f"beta={beta}"] for beta in BETAS}
    | FHVAE
    | {"fhvae-without-both": ["--model", "fhvae", "--set", "domain=clean,noisy,channel"]},
}
# Row: the domain that the recogniser is trained on, the extractor of its features (none: FBank) and its latent
ROWS = {
    "2": {
        "fbank-all": ("", None, None),
        "z1-all": ("", "fhvae", "z1"),  # not in the paper
        "fbank-male": ("male", None, None),
        "z1-male": ("male", "fhvae", "z1"),
    },
    "3": {"fbank-all": ("", None, None), "fbank-clean": ("clean", None, None)}
    | {f"beta_vae-{beta}-clean": ("clean", f"beta_vae-{beta}", "z") for beta in BETAS}
    | {
        "z1-clean": ("clean", "fhvae", "z1"),
        "z2-clean": ("clean", "fhvae", "z2"),
        "z1-without-both-clean": ("clean", "fhvae-without-both", "z1"),
    },
}
DATA = {"2": "built-in", "3": CONDITIONS_OF + "built-in"}
PAIRS = {"nargs": "+", "default": [], "metavar": "KEY=VALUE"}
STEPS = {"type": int, "metavar": "N"}
FLAGS = {
    "table": {"choices": tuple(ROWS), "help": "of the paper: 2 (sexes) or 3 (noise and channel)"},
    "--data": {
        "help": "as of train.py (default: the built-in corpus, for table 3 with conditions laid over it)"
    },
    "--extractor": {
        "type": Path,
        "metavar": "RUN",
        "help": "a trained FHVAE (default: one is trained)",
    },
    "--extractor-steps": {
        "type": int,
        "metavar": "N",
        "help": "length of an extractor's training (default: the recipe's)",
    },
    "--extractor-set": PAIRS | {"help": "settings of every extractor"},
    "--recogniser-steps": {
        "type": int,
        "metavar": "N",
        "help": "length of a recogniser's training (default: the recipe's)",
    },
    "--recogniser-set": PAIRS | {"help": "settings of every recogniser"},
    "--lexicon": {
        "type": Path,
        "help": "for words of another corpus than the built-in one: see evaluate.py",
    },
}


def settings(steps: int | None, pairs: list[str]) -> list[str]:
    return [*(["--steps", str(steps)] if steps else []), *(["--set", *pairs] if pairs else [])]


def main() -> None:
    args, common = arguments(__doc__, "runs/recognition", FLAGS)
    if any(flag.split("=")[0] in ("--set", "--steps") for flag in common):
        raise SettingError(
            "--set, --steps: are two here, of extractors and recognisers: --extractor-set, …"
        )
    data = args.data or DATA[args.table]
    check(data, args)
    folder, extractors = args.runs / f"table-{args.table}", EXTRACTORS[args.table]
    trained = {"fhvae": args.extractor.absolute()} if args.extractor else {}
    training = {title: flags for title, flags in extractors.items() if title not in trained}
    if training:
        flags = [*common, "--data", data, *settings(args.extractor_steps, args.extractor_set)]
        trained |= train_all(training, folder / "extractors", flags)

    variants = {}
    for title, (domain, extractor, latent) in ROWS[args.table].items():
        heard = data
        if domain == "clean" and data.startswith(CONDITIONS_OF):
            heard, domain = data.removeprefix(CONDITIONS_OF), ""
        pairs = [f"domain={domain}"] if domain else []
        pairs += (
            [f"extractor={trained[extractor].absolute()}", f"latent={latent}"] if extractor else []
        )
        variants[title] = ["--model", "acoustic", "--data", heard, *settings(None, pairs)]
    flags = [*common, *settings(args.recogniser_steps, args.recogniser_set)]
    runs = train_all(variants, folder / "recognisers", flags)
    evaluate_all(runs, ["--task", "recognition", "--data", data, *evaluated(args, "lexicon")])


def check(data: str, args) -> None:
    """SettingError or CheckpointError, before the first training, where a later one or the table would have it: for
    what the extractor, the recognisers' settings and steps, the lexicon or the corpus are."""
    if args.extractor and (kind := load_run(args.extractor)[2]["model"]) != "fhvae":
        raise SettingError(f"--extractor {args.extractor}: holds a {kind}; expected an fhvae")
    for flag, steps in (("extractor", args.extractor_steps), ("recogniser", args.recogniser_steps)):
        if steps is not None and steps < 1:
            raise SettingError(f"--{flag}-steps {steps}: expected at least 1")
    resolve("acoustic", "quick", overrides(args.recogniser_set))
    if args.lexicon:
        read_lexicon(args.lexicon)
    training = [u for u in load_corpus(data).utterances if u.split == "train"]
    if args.table == "3" and not {"clean", "both"} <= {u.condition for u in training}:
        raise SettingError(f"--data {data}: table 3 needs conditions; try {CONDITIONS_OF}{data}")
    frames = not any(pair.startswith("targets=") for pair in args.recogniser_set)
    if frames and not any(u.phones for u in training):
        raise SettingError(
            f"--data {data}: has no phone labels; try --recogniser-set targets=characters"
        )


if __name__ == "__main__":
    run(main)
