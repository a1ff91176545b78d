"""Evaluate trained models.

    python evaluate.py                                # the newest run, resynthesis of its corpus's test split
    python evaluate.py runs/A runs/B --data DIR       # one table, a row for each run
    python evaluate.py runs/A --task verification     # or generation, exchange, transformation, recognition,
                                                      # enhancement
    python evaluate.py light_dvae-librispeech --data my.wav    # a model that ships; a file or a folder of your own
    python evaluate.py runs/A --task resynthesis enhancement --report page.html    # to look at and listen to

Without --task, a run is evaluated by the first of the tasks below that its model is for; with several, by those of them
that its model is for. Results, figures and wav files are written to RUN/eval/TASK/; for a published model or one that
ships, to runs/NAME/eval/TASK/.
"""

import argparse
import io
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import fields, replace
from pathlib import Path

import torch

from minidvae.cli import SOURCES_OF_SPEECH, Parser, check_seed, choose_device, run
from minidvae.data.corpus import Corpus, load_corpus
from minidvae.evaluation import enhancement, exchange, generation, html, resynthesis
from minidvae.evaluation.runs import Options, Run
from minidvae.fhvae import recognition, transformation, verification
from minidvae.files import write_json
from minidvae.inference.enhance import E_STEPS, Settings
from minidvae.training import checkpoint
from minidvae.training.checkpoint import RUNS, newest_run
from minidvae.training.config import SettingError, known

MODULES = (
    resynthesis,
    generation,
    exchange,
    transformation,
    verification,
    recognition,
    enhancement,
)
TASKS = {module.__name__.split(".")[-1]: module for module in MODULES}
LEARN = ("generation", "transformation", "verification")  # tasks that learn from the training split
ONLY_FOR = dict.fromkeys(
    ("recogniser", "clips", "repeats", "w"), "generation"
)  # flag: the task that it is for
ONLY_FOR |= {"mode": "resynthesis", "trials": "verification", "lexicon": "recognition"}
ONLY_FOR |= dict.fromkeys(("noise", "snr", "pairs", "method", "iterations"), "enhancement")


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    runs = "run folders, folders with a published model, or names of models that ship (default: the newest run)"
    add("runs", nargs="*", type=Path, metavar="RUN", help=runs)
    tasks = (
        f"one or several of {', '.join(TASKS)} (default: the first of these that the model is for)"
    )
    add("--task", nargs="+", metavar="TASK", help=tasks)
    own = "default: the run's own; of a model that ships, built-in"
    add("--data", help=f"a sound file, {SOURCES_OF_SPEECH} ({own})")
    split = "which split to evaluate on (default: test; all of --data without splits, unless the task learns from it)"
    add("--split", help=split)
    past = "resynthesis: past of an autoregressive model, its own output or the true one (default: generation)"
    add("--mode", choices=("generation", "teacher_forcing"), default="generation", help=past)
    add("--limit", type=int, help="only so many utterances, spread over the split (default: all)")
    trials = "verification: file of lines `enrol test target|nontarget` (default: all pairs of test utterances)"
    add("--trials", type=Path, help=trials)
    recogniser = "generation: run of a deepspeech2, whose features the distance to real speech is measured on"
    add("--recogniser", type=Path, metavar="RUN", help=recogniser)
    (clips, repeats), (gpu_clips, gpu_repeats) = (
        generation.DEFAULTS["cpu"],
        generation.DEFAULTS["cuda"],
    )
    clips = f"generation: clips on each side of the distance (default: {clips:,}, on a GPU {gpu_clips:,})"
    add("--clips", type=int, help=clips)
    repeats = (
        f"generation: how often all clips are drawn (default: {repeats}, on a GPU {gpu_repeats})"
    )
    add("--repeats", type=int, help=repeats)
    w = "generation: a sequence latent is drawn from N(0, I) or a Gaussian fitted to posteriors (default: as trained)"
    add("--w", choices=generation.W, help=w)
    lexicon = "recognition: file of lines `word phone phone …` (default: the built-in corpus's own; else no words)"
    add("--lexicon", type=Path, help=lexicon)
    add(
        "--noise",
        type=Path,
        metavar="DIR",
        help="enhancement: folder of sounds of noise (default: built-in noises)",
    )
    ratios = f"enhancement: signal-to-noise ratios, dB (default: {' '.join(map('{:g}'.format, enhancement.SNRS))})"
    add("--snr", type=float, nargs="+", metavar="DB", help=ratios)
    pairs = "enhancement: recorded pairs in place of --data, DIR/clean and DIR/noisy, or clean-* and noisy-* in DIR"
    add("--pairs", type=Path, metavar="DIR", help=pairs)
    method = f"enhancement: how latents are found (default: {Settings.method})"
    add("--method", choices=E_STEPS, default=Settings.method, help=method)
    add(
        "--iterations",
        type=int,
        help=f"enhancement: at most so many steps (default: {Settings.iterations})",
    )
    add("--json", type=Path, help="also write all results to this file")
    report = (
        "also write one HTML page of tables, sounds and pictures, which needs nothing beside it"
    )
    add("--report", type=Path, metavar="FILE", help=report)
    add("--seed", type=int, default=0, help="of all that is drawn at random (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    args = parser.parse_args()
    for word in (args.task or [])[
        1:
    ]:  # `--task exchange runs/A`: argparse takes the run for a task
        if word not in TASKS and (
            "/" in word or Path(word).exists() or word in checkpoint.pretrained()
        ):
            args.task.remove(word)
            args.runs.append(Path(word))
    return args


class Printed(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self):
        super().__init__()
        self.terminal = sys.stdout

    def write(self, text: str) -> int:
        self.terminal.write(text)
        return super().write(text)


def tasks_for(models: dict[Path, str], asked: list[str] | None) -> list[str]:
    """The tasks that were asked for, or the first that is for the first model. SettingError where one is for none of
    the models, or none for one of them."""
    for folder, model in models.items():
        fitting = [name for name, module in TASKS.items() if model in module.MODELS]
        if not fitting:
            raise SettingError(
                f"{folder}: no task is for a {model}; its z are features for another model"
            )
        asked = asked or fitting[:1]
        if not set(asked) & set(fitting):
            wrong = f"--task {' '.join(asked)}: is not for {folder}, a {model}"
            raise SettingError(f"{wrong}; try {' or '.join(fitting)}")
    for task in asked:
        if not set(models.values()) & set(TASKS[task].MODELS):
            raise SettingError(
                f"--task {task}: is for none of these runs; it is for {' or '.join(TASKS[task].MODELS)}"
            )
    return list(dict.fromkeys(asked))


def command(args: argparse.Namespace, folders: list[Path], task: str) -> str:
    """What repeats the evaluation of one task."""
    words = ["python", "evaluate.py", *map(str, folders), "--task", task]
    for flag, value in vars(args).items():
        told = value is not None and value != getattr(Options(split=None), flag, None)
        if (
            told
            and flag not in ("runs", "task", "json", "report", "device")
            and ONLY_FOR.get(flag, task) == task
        ):
            words += [f"--{flag}", *(map("{:g}".format, value) if flag == "snr" else [str(value)])]
    return shlex.join(words)


def check_file(flag: str, path: Path | None) -> None:
    """SettingError where a file cannot be written there."""
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        wrong = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise SettingError(f"{flag} {path}: {wrong}; expected the name of a file")


def is_unseen(corpus: Corpus, loaded: list[tuple]) -> bool:
    """Whether a corpus has no splits of its own, and none of the models was trained on it."""
    known = {content.get("plan", {}).get("fingerprint") for *_, content in loaded}
    return corpus.drawn and known.isdisjoint(
        {corpus.fingerprint, corpus.without_conditions().fingerprint}
    )


def speech_of(
    args: argparse.Namespace, options: Options, task: str, loaded: list[tuple]
) -> tuple[list, dict, dict]:
    """What each model is evaluated on, its name; and by these names the corpora, and what is evaluated of them."""
    if args.pairs and task == "enhancement":
        pairs = {str(args.pairs): list(enhancement.pairs_of(args.pairs))[: args.limit]}
        return list(pairs) * len(loaded), dict.fromkeys(pairs), pairs
    sources = [
        args.data or content.get("plan", {}).get("data", "built-in") for *_, content in loaded
    ]
    corpora = {data: load_corpus(data) for data in dict.fromkeys(sources)}
    if (
        args.data
        and args.split is None
        and task not in LEARN
        and is_unseen(corpora[args.data], loaded)
    ):
        options.split, corpus = "all", corpora[args.data]
        print(
            f"{args.data}: has no splits of its own; all {len(corpus)} utterances are its test set"
        )
        tests = {args.data: corpus}
    else:
        tests = {data: corpus.split(options.split) for data, corpus in corpora.items()}
    tests = {data: corpus.spread(args.limit or len(corpus)) for data, corpus in tests.items()}
    return sources, corpora, tests


def runs_for(
    args: argparse.Namespace, options: Options, task: str, loaded: list[tuple]
) -> list[Run]:
    """The models that a task is for, with the speech that they are evaluated on. May set the split of `options`."""
    loaded = [one for one in loaded if one[-1]["model"] in TASKS[task].MODELS]
    sources, corpora, tests = speech_of(args, options, task, loaded)
    runs = []
    for (folder, model, stft, content), data in zip(loaded, sources, strict=True):
        ours = "plan" in content and folder.is_dir()
        target = (folder if ours else RUNS / folder.resolve().name) / "eval" / task
        model_and_speech = (model.eval(), stft, content, data, corpora[data], tests[data])
        runs.append(Run(folder, content["model"], *model_and_speech, target))
    return runs


def main() -> None:
    args = arguments()
    for task in args.task or []:
        known("task", task, TASKS)
    if args.limit is not None and args.limit < 1:
        raise SettingError(f"--limit {args.limit}: expected at least 1")
    check_seed(args.seed)
    device = choose_device(args.device)
    folders = args.runs or [newest_run()]
    check_file("--json", args.json)
    check_file("--report", args.report)
    if args.report:
        html.template()
    loaded = [(folder, *checkpoint.load_run(folder, device)) for folder in folders]
    tasks = tasks_for({folder: content["model"] for folder, *_, content in loaded}, args.task)
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    options.split = args.split or "test"
    for flag, only in ONLY_FOR.items():
        if getattr(options, flag) != getattr(Options(), flag) and only not in tasks:
            raise SettingError(f"--{flag}: is for --task {only}, not {' '.join(tasks)}")

    prepared, results, sections, threads = [], {}, [], torch.get_num_threads()
    for task in tasks:
        own = replace(options)
        prepared.append((task, own, runs_for(args, own, task, loaded)))
    for task, own, runs in prepared:
        # In resynthesis the cores are busy with the metrics.
        torch.set_num_threads(1 if device.type == "cpu" and task == "resynthesis" else threads)
        with redirect_stdout(Printed()) as printed:
            results[task] = TASKS[task].evaluate(runs, own)
        told = {
            "command": command(args, [run.folder for run in runs], task),
            "printed": printed.getvalue(),
        }
        sections.append(
            {"task": task, "about": TASKS[task].__doc__.split("\n\n")[0], "runs": runs} | told
        )
    if args.json:
        write_json(args.json, results if len(tasks) > 1 else results[tasks[0]])
    if args.report:
        html.write(args.report, shlex.join(["python", "evaluate.py", *sys.argv[1:]]), sections)
        print(f"{args.report}: {args.report.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
