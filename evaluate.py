"""Evaluate trained models.

    python evaluate.py                               # resynthesis by the newest run
    python evaluate.py runs/A runs/B --data DIR      # one table with a row for each run
    python evaluate.py runs/A --task verification    # or another task
    python evaluate.py vae-librispeech --data my.wav # a model that ships, on a file or a folder
    python evaluate.py runs/A --task resynthesis enhancement --report page.html    # an HTML page

Without --task, a run is evaluated by the first task that its model is for. Results, figures and
sounds are written to a folder below RUN/eval/TASK/, one for each corpus and setting. Those of a
published model, or of one that ships, are written below runs/NAME/eval/TASK/.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import nn

from minidvae import cli
from minidvae.data.audio import STFT
from minidvae.data.corpus import Corpus, load_corpus
from minidvae.evaluation import enhancement, exchange, generation, report, resynthesis
from minidvae.evaluation.results import Evaluation
from minidvae.evaluation.runs import Options, Run
from minidvae.fhvae import recognition, transformation, verification
from minidvae.files import write_json
from minidvae.inference.enhance import METHODS, EnhancementSettings
from minidvae.training import checkpoint
from minidvae.training.config import SettingError, known

TASKS = {
    "resynthesis": resynthesis,
    "generation": generation,
    "exchange": exchange,
    "transformation": transformation,
    "verification": verification,
    "recognition": recognition,
    "enhancement": enhancement,
}
USES_TRAINING_SPLIT = ("generation", "transformation", "verification")
# Options that only one task has.
TASK_OF_OPTION = {
    "mode": "resynthesis",
    "recogniser": "generation",
    "clips": "generation",
    "repeats": "generation",
    "w": "generation",
    "trials": "verification",
    "lexicon": "recognition",
    "noise": "enhancement",
    "snr": "enhancement",
    "pairs": "enhancement",
    "method": "enhancement",
    "iterations": "enhancement",
}


@dataclass
class LoadedModel:
    folder: Path  # run folder, as the user named it
    model: nn.Module
    stft: STFT
    content: dict  # content of its checkpoint

    @property
    def name(self) -> str:
        return self.content["model"]

    @property
    def results_folder(self) -> Path:
        """The folder in which `eval/` is."""
        if "plan" in self.content and self.folder.is_dir():
            return self.folder
        return checkpoint.RUNS / self.folder.resolve().name


def main() -> None:
    args = parse_arguments()
    device = cli.choose_device(args.device)
    models = []
    for folder in args.runs or [checkpoint.newest_run()]:
        models.append(LoadedModel(folder, *checkpoint.load_run(folder, device)))
    tasks = choose_tasks(models, args.task)
    check_options(args, tasks)
    # Everything is looked at before anything is evaluated, which may take long.
    prepared = [(task, *prepare_runs(args, task, models)) for task in tasks]

    evaluations = []
    for task, options, runs in prepared:
        for run in runs:
            print(
                f"{run.folder}: {run.name}, {run.trained}; {len(run.test)} utterances of {run.data}"
            )
        with threads_for(task, device):
            evaluation = TASKS[task].evaluate(runs, options)
        print(f"\n{report.render_text(evaluation)}\n")
        write_folders(evaluation, models)
        evaluations.append((evaluation, repeat_command(args, runs, task), runs))

    if args.json:
        results = {evaluation.task: report.to_json(evaluation) for evaluation, _, _ in evaluations}
        write_json(args.json, results if len(tasks) > 1 else results[tasks[0]])
    if args.report:
        command = shlex.join(["python", "evaluate.py", *sys.argv[1:]])
        report.write_html(args.report, command, evaluations)
        print(f"{args.report}: {args.report.stat().st_size / 1e6:.1f} MB")


def choose_tasks(models: list[LoadedModel], asked: list[str] | None) -> list[str]:
    """Return the tasks that were asked for, or the first one that is for the first model. Raises
    SettingError where one is for none of the models, or none for one of them."""
    for loaded in models:
        fitting = [task for task, module in TASKS.items() if loaded.name in module.MODELS]
        if not fitting:
            raise SettingError(
                f"{loaded.folder}: no task is for a {loaded.name}; its z are features for another "
                "model"
            )
        if asked is None:
            asked = fitting[:1]
        if not set(asked) & set(fitting):
            raise SettingError(
                f"--task {' '.join(asked)}: is not for {loaded.folder}, a {loaded.name}; "
                f"try {' or '.join(fitting)}"
            )
    names = {loaded.name for loaded in models}
    for task in asked:
        if not names & set(TASKS[task].MODELS):
            raise SettingError(
                f"--task {task}: is for none of these runs; it is for "
                f"{' or '.join(TASKS[task].MODELS)}"
            )
    return list(dict.fromkeys(asked))


def check_options(args: argparse.Namespace, tasks: list[str]) -> None:
    """Raise SettingError for options that are for another task, or out of range."""
    defaults = Options()
    for option, task in TASK_OF_OPTION.items():
        if getattr(args, option) != getattr(defaults, option) and task not in tasks:
            raise SettingError(f"--{option}: is for --task {task}, not {' '.join(tasks)}")
    if args.iterations is not None and args.iterations < 1:
        raise SettingError(f"--iterations {args.iterations}: expected at least 1")


def prepare_runs(
    args: argparse.Namespace, task: str, models: list[LoadedModel]
) -> tuple[Options, list[Run]]:
    """Return the options of a task, and the models that it is for with the speech that they are
    evaluated on."""
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    options.split = args.split or "test"
    models = [loaded for loaded in models if loaded.name in TASKS[task].MODELS]
    runs = []
    if args.pairs and task == "enhancement":
        mixtures = list(enhancement.load_pairs(args.pairs))[: args.limit]
        for loaded in models:
            runs.append(make_run(loaded, str(args.pairs), None, mixtures))
        return options, runs
    corpora = {}
    for loaded in models:
        data = args.data or loaded.content.get("plan", {}).get("data", "built-in")
        if data not in corpora:
            corpora[data] = load_corpus(data)
        runs.append(make_run(loaded, data, corpora[data], None))
    is_whole_corpus = False
    if args.data and args.split is None and task not in USES_TRAINING_SPLIT:
        corpus = corpora[args.data]
        is_whole_corpus = is_unseen(corpus, models)
        if is_whole_corpus:
            options = replace(options, split="all")
            print(
                f"{args.data}: has no splits of its own; all {len(corpus)} utterances are its test "
                "set"
            )
    for run in runs:
        test = run.corpus if is_whole_corpus else run.corpus.split(options.split)
        run.test = test.spread(args.limit or len(test))
    return options, runs


def make_run(loaded: LoadedModel, data: str, corpus: Corpus | None, test: list | None) -> Run:
    return Run(
        loaded.folder,
        loaded.name,
        loaded.model.eval(),
        loaded.stft,
        loaded.content,
        data,
        corpus,
        test,
    )


def is_unseen(corpus: Corpus, models: list[LoadedModel]) -> bool:
    """Return whether a corpus has no splits of its own, and none of the models was trained on
    it."""
    trained_on = {loaded.content.get("plan", {}).get("fingerprint") for loaded in models}
    fingerprints = {corpus.fingerprint, corpus.without_conditions().fingerprint}
    return corpus.drawn and trained_on.isdisjoint(fingerprints)


@contextmanager
def threads_for(task: str, device: torch.device) -> Iterator[None]:
    """Inside, torch has the threads that a task leaves it: in resynthesis the cores are busy with
    the metrics."""
    threads = torch.get_num_threads()
    if task == "resynthesis" and device.type == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_folders(evaluation: Evaluation, models: list[LoadedModel]) -> None:
    """Write the results of each run, and print where."""
    folders = {str(loaded.folder): loaded.results_folder for loaded in models}
    for result in evaluation.results:
        name = report.folder_name(evaluation, result)
        folder = folders[result.run] / "eval" / evaluation.task / name
        report.write_results(evaluation, result, folder)
        print(f"Results, sounds and figures: {folder}/")


def repeat_command(args: argparse.Namespace, runs: list[Run], task: str) -> str:
    """Return the command that repeats the evaluation of one task."""
    words = ["python", "evaluate.py", *(str(run.folder) for run in runs), "--task", task]
    not_repeated = ("runs", "task", "json", "report", "device")
    for option, value in vars(args).items():
        is_default = value is None or value == getattr(Options(split=None), option, None)
        of_another_task = TASK_OF_OPTION.get(option, task) != task
        if is_default or of_another_task or option in not_repeated:
            continue
        values = [f"{ratio:g}" for ratio in value] if option == "snr" else [str(value)]
        words += [f"--{option}", *values]
    return shlex.join(words)


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folders, folders with a published model, or names of models that ship "
        "(default: the newest run)",
    )
    add(
        "--task",
        nargs="+",
        metavar="TASK",
        help=f"one or several of {', '.join(TASKS)} (default: the first that the model is for)",
    )
    add(
        "--data",
        help=f"a sound file, {cli.SOURCES_OF_SPEECH} (default: the run's own; of published "
        "models and of those that ship, built-in)",
    )
    add(
        "--split",
        help="which split to evaluate on (default: test; all of --data without splits, unless the "
        "task learns from it)",
    )
    add("--limit", type=int, help="only so many utterances, spread over the split (default: all)")
    add_task_arguments(add)
    add("--json", type=Path, help="also write all results to this file (default: none)")
    add(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write one HTML page of tables, sounds and pictures (default: none)",
    )
    add("--seed", type=int, default=0, help="of everything that is drawn at random (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    args = parser.parse_args()
    move_runs_out_of_tasks(args)
    for task in args.task or []:
        known("task", task, TASKS)
    if args.limit is not None and args.limit < 1:
        raise SettingError(f"--limit {args.limit}: expected at least 1")
    cli.check_seed(args.seed)
    check_output_file("--json", args.json)
    check_output_file("--report", args.report)
    if args.report:
        report.load_template()
    return args


def add_task_arguments(add) -> None:
    """Add the options that only one task has."""
    clips, repeats = generation.DEFAULTS["cpu"]
    clips_on_gpu, repeats_on_gpu = generation.DEFAULTS["cuda"]
    add(
        "--mode",
        choices=("generation", "teacher_forcing"),
        default="generation",
        help="resynthesis: past of an autoregressive model, its own output or the true one "
        "(default: generation)",
    )
    add(
        "--trials",
        type=Path,
        help="verification: file of lines `enrol test target|nontarget` (default: all pairs of "
        "test utterances)",
    )
    add(
        "--recogniser",
        type=Path,
        metavar="RUN",
        help="generation: run of a deepspeech2, on whose features the distance to real speech is "
        "measured (default: not measured)",
    )
    add(
        "--clips",
        type=int,
        help=f"generation: clips on each side of the distance (default: {clips:,}, on a GPU "
        f"{clips_on_gpu:,})",
    )
    add(
        "--repeats",
        type=int,
        help=f"generation: how often all clips are drawn (default: {repeats}, on a GPU "
        f"{repeats_on_gpu})",
    )
    add(
        "--w",
        choices=generation.W_SOURCES,
        help="generation: draw a sequence latent from N(0, I) or from a Gaussian fitted to "
        "posteriors (default: as trained)",
    )
    add(
        "--lexicon",
        type=Path,
        help="recognition: file of lines `word phone phone …` (default: the built-in corpus's own; "
        "else no words)",
    )
    add(
        "--noise",
        type=Path,
        metavar="DIR",
        help="enhancement: folder of sounds of noise (default: built-in noises)",
    )
    add(
        "--snr",
        type=float,
        nargs="+",
        metavar="DB",
        help="enhancement: signal-to-noise ratios, dB "
        f"(default: {' '.join(f'{snr:g}' for snr in enhancement.SNRS)})",
    )
    add(
        "--pairs",
        type=Path,
        metavar="DIR",
        help="enhancement: recorded pairs in place of --data, DIR/clean and DIR/noisy, or clean-* "
        "and noisy-* in DIR (default: mixtures)",
    )
    add(
        "--method",
        choices=METHODS,
        help=f"enhancement: how latents are found (default: {EnhancementSettings.method})",
    )
    add(
        "--iterations",
        type=int,
        help=f"enhancement: at most so many steps (default: {EnhancementSettings.iterations})",
    )


def move_runs_out_of_tasks(args: argparse.Namespace) -> None:
    """Move runs from the tasks to the runs. In `--task exchange runs/A`, argparse takes `runs/A`
    for a task."""
    for word in (args.task or [])[1:]:
        is_run = "/" in word or Path(word).exists() or word in checkpoint.pretrained()
        if word not in TASKS and is_run:
            args.task.remove(word)
            args.runs.append(Path(word))


def check_output_file(flag: str, path: Path | None) -> None:
    """Raise SettingError where a file cannot be written there."""
    if path is None:
        return
    if path.is_dir():
        raise SettingError(f"{flag} {path}: is a folder; expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise SettingError(
            f"{flag} {path}: there is no folder {path.parent}; expected the name of a file"
        )


if __name__ == "__main__":
    cli.run(main)
