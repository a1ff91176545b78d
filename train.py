"""Train a model.

    python train.py --model light_dvae                          # built-in corpus; no GPU needed
    python train.py --model vae --data ~/LibriSpeech --recipe light2023

A step depends on (seed, step) and the state before it, so an interrupted run that is resumed goes
on exactly as if it had not been interrupted.
"""

import argparse
import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minidvae import cli
from minidvae.evaluation import figures
from minidvae.files import CheckpointError
from minidvae.models import MODELS
from minidvae.training import distributed
from minidvae.training.batches import Batches
from minidvae.training.checkpoint import newest_run
from minidvae.training.config import RECIPES, SettingError, overrides
from minidvae.training.muon import Muon
from minidvae.training.run import TrainingRequest, TrainingRun, begin, paper_recipe, resume

SECONDS_BETWEEN_PLOTS = 60
DEVICES_WITH_LOADER_THREAD = ("cuda",)
OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}


def train(run: TrainingRun, batches: Batches, held_out: Batches, compile_loss: bool) -> None:
    model = run.model.train()
    recipe = run.recipe
    progress = run.progress
    optimiser = make_optimiser(run, batches)
    loss_function = make_loss_function(run, compile_loss)
    loader = BatchLoader(batches)
    terms_since_report = TermsOfSteps(run)
    stop_request = StopRequest()
    timer = Timer(progress.seconds)
    bar = make_progress_bar(run)

    while progress.step < recipe.steps and not is_out_of_patience(run):
        step = progress.step
        is_report_step = (step + 1) % recipe.report == 0 or step + 1 == recipe.steps

        # Get the batch. Every random draw of this step follows from (seed, step).
        batch = loader.get(step, prepare_next=not is_report_step)
        torch.manual_seed(distributed.seed_of_process(seed_of_step(run.plan.seed, step)))
        batches.before_step(model, optimiser, step)

        # Set the learning rate.
        learning_rate = recipe.learning_rate_at(step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)

        # Forward and backward pass.
        with autocast(run):
            loss, terms = loss_function(batch, **batches.loss_arguments(step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        max_norm = recipe.clip or float("inf")
        gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

        # Check the loss: on a CPU before its gradient is used, on a GPU only at reports, since
        # reading it would wait for the device.
        terms_since_report.add(terms, gradient_norm, stop_request.requested)
        is_stopping = False
        if run.device.type == "cpu" or is_report_step or stop_request.is_urgent():
            is_stopping = terms_since_report.read(step)

        # Update the parameters.
        optimiser.step()
        progress.step += 1
        progress.count += 1
        timer.count_step(batch)
        bar.update()
        if compile_loss and timer.steps == 1:
            seconds = timer.seconds() - progress.seconds
            bar.write(f"The first step took {seconds:.1f} s, compiling included.")

        # Report and save.
        if is_report_step:
            frames_per_second = timer.frames_per_second()
            report = make_report(run, batches, held_out, step, timer)
            if report["dev"]["loss"] < progress.best:
                progress.best = report["dev"]["loss"]
                progress.waited = 0
                run.save("best.pt")
            else:
                progress.waited += 1
            run.log(report)
            run.save("last.pt", optimiser=optimiser.state_dict())
            timer.plot_if_due(run)
            bar.write(f"{describe(report, recipe.steps)}   {frames_per_second:,.0f} frames/s")
            timer.restart()
        elif is_stopping:
            progress.seconds = timer.seconds()
            run.save("last.pt", optimiser=optimiser.state_dict())
        if is_stopping:
            bar.close()
            print(
                f"Stopped after step {progress.step}. "
                f"Continue with: python train.py --resume --run {run.folder}"
            )
            raise SystemExit(130)
    bar.close()
    if run.reports:
        figures.curves(run.reports, run.folder / "curves.png")


def make_optimiser(run: TrainingRun, batches: Batches) -> torch.optim.Optimizer:
    recipe = run.recipe
    optimiser = OPTIMISERS[recipe.optimiser](
        batches.parameter_groups(run.model),
        betas=recipe.betas,
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
    )
    if run.resumed:
        run.load_optimiser(optimiser)
    return optimiser


def make_loss_function(run: TrainingRun, compile_loss: bool):
    """Return `model.loss`, compiled if asked for, and wrapped so that gradients are averaged over
    processes if there are several."""
    loss_function = run.model.loss
    if compile_loss:
        # Random numbers as they are drawn without compiling.
        loss_function = torch.compile(loss_function, options={"fallback_random": True})
    if distributed.process_count() > 1:
        return DistributedDataParallel(LossModule(loss_function, run.model))
    return loss_function


class LossModule(nn.Module):
    """A loss as the forward pass of a module, which is what DistributedDataParallel takes."""

    def __init__(self, loss_function, model: nn.Module):
        super().__init__()
        self.model = model
        self.loss_function = loss_function

    def forward(self, batch, **arguments):
        return self.loss_function(batch, **arguments)


class BatchLoader:
    """The batches of the training steps. On a GPU the next one is prepared in a thread while a
    step runs; a CPU has no core free for that. It is one thread: several, and those of the step,
    would wait for each other."""

    def __init__(self, batches: Batches):
        self.batches = batches
        self.has_thread = batches.device.type in DEVICES_WITH_LOADER_THREAD
        self.next_batch = None
        self.executor = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    def get(self, step: int, prepare_next: bool):
        """Return the batch of a step."""
        batch = self.batches(step) if self.next_batch is None else self.next_batch.result()
        self.next_batch = None
        if self.has_thread and prepare_next:
            self.next_batch = self.executor.submit(self.batches, step + 1)
        return batch


class TermsOfSteps:
    """The terms of the loss of the steps since they were last read, still on the device."""

    def __init__(self, run: TrainingRun):
        self.run = run
        self.steps: list[dict[str, Tensor]] = []

    def add(self, terms: dict[str, Tensor], gradient_norm: Tensor, stop: bool) -> None:
        stop = torch.full_like(gradient_norm, float(stop))
        self.steps.append(terms | {"gradient norm": gradient_norm, "stop": stop})

    def read(self, last_step: int) -> bool:
        """Add the terms to the sums of the run. Return whether any process was asked to stop.
        Raises CheckpointError where a term is not finite."""
        stop = False
        sums = self.run.progress.sums
        for terms in read_terms(self.steps, self.run, last_step):
            del terms["gradient norm"]
            stop = terms.pop("stop") > 0
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
        self.steps = []
        return stop


def read_terms(
    steps: list[dict[str, Tensor]], run: TrainingRun, last_step: int
) -> list[dict[str, float]]:
    """Return the terms of consecutive steps as numbers, means over the processes. Raises
    CheckpointError at the first that is not finite."""
    table = torch.stack([torch.stack(list(terms.values())) for terms in steps])
    means = distributed.sum_over_processes(table) / distributed.process_count()
    rows = [dict(zip(steps[0], row, strict=True)) for row in means.tolist()]
    for step, row in enumerate(rows, start=last_step + 1 - len(steps)):
        # The term that caused it comes before the sum.
        for name in sorted(row, key=lambda name: name == "loss"):
            if not abs(row[name]) < float("inf"):
                last = run.folder / "last.pt"
                checkpoint = last if last.exists() else "none yet"
                raise CheckpointError(
                    f"step {step}: {name} is {row[name]}; stopped. "
                    f"Last good checkpoint: {checkpoint}"
                )
    return rows


@torch.no_grad()
def development_loss(run: TrainingRun, held_out: Batches, step: int) -> dict[str, float]:
    """Return the terms of the loss over the development split, with the same noise every time."""
    run.model.eval()
    sums = Counter()
    for number, (batch, count) in enumerate(held_out.development(run.model)):
        if number % distributed.process_count() != distributed.rank():
            if number > 0:
                continue
            count = 0  # Another process counts it; here it only gives the names of the terms.
        torch.manual_seed(seed_of_step(run.plan.seed, -1 - number))
        with autocast(run):
            _, terms = run.model.loss(batch, **held_out.loss_arguments(None))
        for name, value in terms.items():
            sums[name] += value.double() * count
        sums["examples"] += torch.tensor(count, dtype=torch.float64, device=run.device)
    run.model.train()
    totals = torch.stack(list(sums.values()))
    totals = dict(zip(sums, distributed.sum_over_processes(totals).tolist(), strict=True))
    examples = totals.pop("examples")
    means = {name: total / examples for name, total in totals.items()}
    for name, value in means.items():
        if not abs(value) < float("inf"):
            raise CheckpointError(f"step {step}: {name} of development speech is {value}; stopped")
    return means


def make_report(
    run: TrainingRun, batches: Batches, held_out: Batches, step: int, timer: "Timer"
) -> dict:
    """Return a line of the log: means of the terms since the last report, and the development
    loss."""
    progress = run.progress
    dev = development_loss(run, held_out, step)
    progress.seconds = timer.seconds()
    report = {
        "step": progress.step,
        "train": {name: total / progress.count for name, total in progress.sums.items()},
        "dev": dev,
        "learning_rate": run.recipe.learning_rate_at(step),
        **batches.loss_arguments(step),
        "seconds": round(progress.seconds, 1),
    }
    progress.sums = {}
    progress.count = 0
    return report


def describe(report: dict, steps: int) -> str:
    parts = [f"step {report['step']:>6}/{steps}", f"{report['seconds']:7.1f} s"]
    for part in ("train", "dev"):
        terms = [f"{name} {value:.4g}" for name, value in report[part].items()]
        parts.append(f"{part} {'  '.join(terms)}")
    return "   ".join(parts)


def is_out_of_patience(run: TrainingRun) -> bool:
    return run.recipe.patience > 0 and run.progress.waited >= run.recipe.patience


def seed_of_step(seed: int, step: int) -> int:
    """Return one seed for each (seed, step). Steps below 0: batches of the development set."""
    return (seed * 2_654_435_761 + step + 1) % 2**63


def autocast(run: TrainingRun) -> torch.autocast:
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.plan.precision == "bf16")


def make_progress_bar(run: TrainingRun) -> tqdm:
    # None: tqdm shows nothing where there is no terminal.
    disable = True if distributed.rank() > 0 else None
    return tqdm(
        total=run.recipe.steps,
        initial=run.progress.step,
        desc=run.plan.model,
        unit="step",
        disable=disable,
    )


class Timer:
    """Seconds of the run, those before it was resumed included; frames of all processes per second
    since the last report; and when to plot the curves."""

    def __init__(self, seconds_before: float):
        self.start = time.perf_counter() - seconds_before
        self.steps = 0
        self.last_plot = self.seconds()
        self.restart()

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def restart(self) -> None:
        self.last_report = self.seconds()
        self.frames = 0

    def count_step(self, batch) -> None:
        """batch: spectra (batch, frames, bins), or a tuple with features `x` of this shape."""
        batch_size, num_frames = getattr(batch, "x", batch).shape[:2]
        self.steps += 1
        self.frames += distributed.process_count() * batch_size * num_frames

    def frames_per_second(self) -> float:
        return self.frames / (self.seconds() - self.last_report)

    def plot_if_due(self, run: TrainingRun) -> None:
        if run.reports and self.seconds() - self.last_plot >= SECONDS_BETWEEN_PLOTS:
            figures.curves(run.reports, run.folder / "curves.png")
            self.last_plot = self.seconds()


class StopRequest:
    """Ctrl-C and SIGTERM take effect between two steps; a second Ctrl-C at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def is_urgent(self) -> bool:
        """Return whether to stop after this step. Several processes stop together, at a report."""
        return self.requested and distributed.process_count() == 1


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(
        description="Train a model.",
        epilog="Settings for --set: the fields of Recipe in minidvae/training/config.py, and the "
        "dataclass at the top of each model's file.",
    )
    add = parser.add_argument
    add("--model", help=f"one of {', '.join(MODELS)}")
    add(
        "--recipe",
        help=f"one of {', '.join(RECIPES)} (default: the paper's on a GPU, else quick)",
    )
    add("--data", help=f"{cli.SOURCES_OF_SPEECH} (default: built-in)")
    add("--run", type=Path, help="folder for the results (default: a new one in runs/)")
    add("--steps", type=int, help="length of training (default: the recipe's)")
    add(
        "--init",
        type=Path,
        help="start from this run, published model or model that ships (default: from scratch)",
    )
    add("--seed", type=int, help="of the parameters, the batches and the noise (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    add(
        "--precision",
        choices=("fp32", "bf16", "auto"),
        help="of matrix products; auto: bf16 where the chip has instructions for it "
        "(default: fp32, on a GPU TF32)",
    )
    add(
        "--compile",
        action="store_true",
        help="torch.compile of the loss; the graph breaks at recurrent layers (default: off)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue the run in --run (default: the newest one)",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings of the recipe or the model (default: the recipe's)",
    )
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        raise SettingError(f"--steps {args.steps}: expected at least 1")
    cli.check_seed(args.seed or 0)
    if args.resume:
        for flag in ("model", "recipe", "data", "init", "seed", "precision", "set"):
            if getattr(args, flag) not in (None, []):
                raise SettingError(
                    f"--{flag}: cannot change in a run that is resumed; leave it out"
                )
    elif args.model is None and args.init is None:
        raise SettingError(f"--model: missing; choose one of {', '.join(MODELS)}")
    return args


def begin_run(args: argparse.Namespace, device: torch.device) -> TrainingRun:
    precision = args.precision or "fp32"
    if precision == "auto":
        precision = "bf16" if cli.has_bf16(device) else "fp32"
    request = TrainingRequest(
        model=args.model,
        recipe=args.recipe,
        data="built-in" if args.data is None else args.data,
        settings=overrides(args.set),
        steps=args.steps,
        init=args.init,
        seed=args.seed or 0,
        precision=precision,
        folder=args.run,
    )
    run = begin(request, device)
    if args.recipe is None:
        print_recipe_choice(run)
    return run


def print_recipe_choice(run: TrainingRun) -> None:
    """Say which recipe was chosen by the device, and how to choose the other one."""
    chosen = run.plan.recipe_name
    paper = paper_recipe(run.plan.model)
    if paper is None:
        return
    if chosen == paper:
        print(f"Recipe {chosen}, since there is a GPU; choose the small one with --recipe quick.")
    else:
        print(f"Recipe {chosen}, since there is no GPU; choose the paper's with --recipe {paper}.")


def resume_run(args: argparse.Namespace, device: torch.device) -> TrainingRun:
    run = resume(args.run or newest_run(), args.steps, device)
    if is_out_of_patience(run):
        print(
            f"This run stopped early, after {run.recipe.patience} reports without a better "
            "development loss."
        )
    return run


def describe_run(run: TrainingRun, batches: Batches) -> None:
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(
        f"{run.plan.model}, {parameters:.2f} M parameters in {run.plan.precision}, recipe "
        f"{run.plan.recipe_name}: {run.recipe.steps} steps of\n"
        f"{batches.size} out of {batches.corpus.seconds / 60:.1f} minutes. Results: {run.folder}/"
    )
    if run.plan.precision == "bf16" and is_slow_in_bf16(run.device):
        print("bf16 is many times slower than fp32 on this CPU, which has no instructions for it.")
    if batches.skipped:
        print(f"{batches.skipped} utterances are {batches.skipped_because} and are not used.")


def is_slow_in_bf16(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def main() -> None:
    args = parse_arguments()
    device = distributed.join(cli.choose_device(args.device))
    if distributed.rank() > 0:
        sys.stdout = open(os.devnull, "w")
    run = resume_run(args, device) if args.resume else begin_run(args, device)
    with distributed.first_process_first():
        batches, held_out = run.load_batches()
    if run.resumed:
        batches.resume(run.model)
    else:
        batches.prepare(run.model, fresh=not run.plan.init)
    run.open_folder(exist_ok=bool(args.run or args.resume))
    describe_run(run, batches)
    try:
        train(run, batches, held_out, args.compile)
    finally:
        run.close()
    distributed.leave()
    print(
        f"Finished: {run.folder}/ (curves.png shows the training). "
        f"Next: python evaluate.py {run.folder}"
    )


if __name__ == "__main__":
    cli.run(main)
