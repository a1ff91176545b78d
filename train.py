"""Train a model.

    python train.py --model light_dvae                          # built-in corpus; no GPU needed
    python train.py --model vae --data ~/LibriSpeech --recipe light2023

A step is a pure function of (seed, step) and the state before it, so an interrupted run that is resumed goes on
exactly as if it had not been interrupted.
"""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minidvae import cli
from minidvae.cli import SOURCES_OF_SPEECH, Parser, check_seed, choose_device, has_bf16
from minidvae.evaluation import figures
from minidvae.files import CheckpointError
from minidvae.models import MODELS
from minidvae.training import distributed
from minidvae.training.config import RECIPES, SettingError
from minidvae.training.muon import Muon
from minidvae.training.run import TrainingRun, begin, resume

CURVES_EVERY = 60  # seconds between two pictures of the training at least
AHEAD = (
    "cuda",
)  # devices that leave a core free to prepare the next batch while a step runs; a CPU does not
OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}


def train(run: TrainingRun, batches, held_out, compiled: bool) -> None:
    model, recipe, progress = run.model.train(), run.recipe, run.progress
    optimiser = OPTIMISERS[recipe.optimiser](
        model.parameter_groups(batches),
        betas=recipe.betas,
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
    )
    if run.resumed:
        run.load_optimiser(optimiser)
    same_noise = {"fallback_random": True}  # as it is drawn without compiling
    loss_of = Loss(torch.compile(model.loss, options=same_noise) if compiled else model.loss, model)
    if distributed.count() > 1:
        loss_of = DistributedDataParallel(loss_of)
    stop, clock, drawn = StopRequest(), Clock(progress.seconds), float("-inf")
    # The next batch is prepared in one thread: several and those of the step wait on each other
    loader, upcoming, unread = (
        ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)),
        None,
        [],
    )
    quiet = distributed.rank() > 0 or None  # None: where no terminal shows it
    bar = tqdm(
        total=recipe.steps, initial=progress.step, desc=run.plan.model, unit="step", disable=quiet
    )

    while progress.step < recipe.steps and not (
        recipe.patience and progress.waited >= recipe.patience
    ):
        step = progress.step
        reporting = (step + 1) % recipe.report == 0 or step + 1 == recipe.steps
        torch.manual_seed(seed_of(run.plan.seed, step))
        prepared = upcoming and upcoming.result()
        model.before_step(batches, optimiser, step)
        batch = batches(step) if prepared is None else prepared
        upcoming = (
            loader.submit(batches, step + 1) if run.device.type in AHEAD and not reporting else None
        )
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate_at(step) * group.get("rate", 1.0)

        with autocast(run):
            loss, terms = loss_of(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or float("inf"))
        unread.append(
            terms | {"gradient norm": norm, "stop": torch.full_like(norm, float(stop.requested))}
        )
        stopping = False  # a GPU is not waited for at every step: what it found is read at reports
        if run.device.type == "cpu" or reporting or (stop.requested and distributed.count() == 1):
            for terms in read_terms(unread, run, step):
                del terms["gradient norm"]
                stopping = terms.pop("stop") > 0  # any process was asked to
                progress.sums = {
                    name: progress.sums.get(name, 0.0) + value for name, value in terms.items()
                }
            unread = []
        optimiser.step()

        progress.step += 1
        progress.count += 1
        clock.count(batch)
        bar.update()
        if compiled and clock.steps == 1:
            bar.write(
                f"The first step took {clock.now() - progress.seconds:.1f} s, compiling included."
            )
        if reporting:
            rate, dev = clock.frames_per_second(), development_loss(run, held_out, step)
            progress.seconds = clock.now()
            report = {
                "step": progress.step,
                "train": {name: total / progress.count for name, total in progress.sums.items()},
                "dev": dev,
                "learning_rate": recipe.learning_rate_at(step),
                "own_past": recipe.own_past_at(step),
                "seconds": round(progress.seconds, 1),
            }
            better = dev["loss"] < progress.best
            progress.best, progress.waited = (
                (dev["loss"], 0) if better else (progress.best, progress.waited + 1)
            )
            progress.sums, progress.count = {}, 0
            if better:
                run.save("best.pt")
            run.log(report)
            run.save("last.pt", optimiser=optimiser.state_dict())
            if run.reports and clock.now() - drawn >= CURVES_EVERY:
                figures.curves(run.reports, run.folder / "curves.png")
                drawn = clock.now()
            bar.write(f"{describe(report, recipe.steps)}   {rate:,.0f} frames/s")
            clock.restart()
        elif stopping:
            progress.seconds = clock.now()
            run.save("last.pt", optimiser=optimiser.state_dict())
        if stopping:
            bar.close()
            print(
                f"Stopped after step {progress.step}. Go on with: python train.py --resume --run {run.folder}"
            )
            raise SystemExit(130)
    bar.close()
    if run.reports:
        figures.curves(run.reports, run.folder / "curves.png")


@torch.no_grad()
def development_loss(run: TrainingRun, held_out, step: int) -> dict[str, float]:
    """The terms of the loss over the development split, the same noise every time."""
    run.model.eval()
    sums, everyone = Counter(), distributed.count()
    with distributed.each_apart():
        for number, (batch, count) in enumerate(held_out.development(run.model)):
            if number % everyone == distributed.rank():
                torch.manual_seed(seed_of(run.plan.seed, -1 - number))
                with autocast(run):
                    _, terms = run.model.loss(batch)
                (values,) = read_terms([terms], run, step)
                sums.update({name: value * count for name, value in values.items()})
                sums["examples"] += count
    run.model.train()
    totals = distributed.total(
        torch.tensor(list(sums.values()), dtype=torch.float64, device=run.device)
    ).tolist()
    sums = dict(zip(sums, totals, strict=True))
    return {name: value / sums["examples"] for name, value in sums.items() if name != "examples"}


def read_terms(
    steps: list[dict[str, torch.Tensor]], run: TrainingRun, last: int
) -> list[dict[str, float]]:
    """The terms of some steps up to `last` as numbers, means over the distributed. Raises CheckpointError at the first
    that is not finite."""
    table = torch.stack([torch.stack(list(terms.values())) for terms in steps])
    rows = (distributed.total(table) / distributed.count()).tolist()
    found = [dict(zip(steps[0], row, strict=True)) for row in rows]
    for step, values in enumerate(found, start=last + 1 - len(steps)):
        for name in sorted(values, key=lambda name: name == "loss"):  # a cause before the sum
            if not abs(values[name]) < float("inf"):
                kept = run.folder / "last.pt" if (run.folder / "last.pt").exists() else "none yet"
                raise CheckpointError(
                    f"step {step}: {name} is {values[name]}; stopped. Last good checkpoint: {kept}"
                )
    return found


def seed_of(seed: int, step: int) -> int:
    """One seed per (seed, step); steps below 0 are the batches of the development set."""
    return (seed * 2_654_435_761 + step + 1) % 2**63


def autocast(run: TrainingRun) -> torch.autocast:
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.plan.precision == "bf16")


def describe(report: dict, steps: int) -> str:
    parts = [f"step {report['step']:>6}/{steps}", f"{report['seconds']:7.1f} s"]
    for part in ("train", "dev"):
        parts.append(
            f"{part} " + "  ".join(f"{name} {value:.4g}" for name, value in report[part].items())
        )
    return "   ".join(parts)


class Loss(nn.Module):
    """A loss as the forward pass of a module, which is what DistributedDataParallel takes."""

    def __init__(self, loss: Callable, model: nn.Module):
        super().__init__()
        self.model, self.forward = model, loss


class Clock:
    """Seconds of the run, those before it was resumed included, and frames of all processes per second since the last
    report."""

    def __init__(self, seconds: float):
        self.started, self.steps = time.perf_counter() - seconds, 0
        self.restart()

    def now(self) -> float:
        return time.perf_counter() - self.started

    def restart(self) -> None:
        self.since, self.frames = self.now(), 0

    def count(self, batch) -> None:
        """batch: spectra (batch, frames, bins), or a tuple with features `x` of this shape."""
        self.steps += 1
        self.frames += distributed.count() * getattr(batch, "x", batch).shape[:2].numel()

    def frames_per_second(self) -> float:
        return self.frames / (self.now() - self.since)


class StopRequest:
    """Ctrl-C and SIGTERM take effect between two steps; a second Ctrl-C at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    parser = Parser(
        description="Train a model.",
        epilog="Settings for --set: see minidvae/training/settings.py and "
        "the dataclass at the top of each model's file.",
    )
    parser.add_argument("--model", help=f"one of {', '.join(MODELS)}")
    parser.add_argument(
        "--recipe", help=f"one of {', '.join(RECIPES)} (default: the paper's on a GPU, else quick)"
    )
    parser.add_argument("--data", help=f"{SOURCES_OF_SPEECH} (default: built-in)")
    parser.add_argument(
        "--run", type=Path, help="folder for the results (default: a new one in runs/)"
    )
    parser.add_argument("--steps", type=int, help="length of training (default: the recipe's)")
    parser.add_argument(
        "--init", type=Path, help="start from this run, published model or model that ships"
    )
    parser.add_argument(
        "--seed", type=int, help="of the parameters, the batches and the noise (default: 0)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)"
    )
    precision = "of matrix products; auto: bf16 where the chip has instructions for it (default: fp32, on a GPU TF32)"
    parser.add_argument("--precision", choices=("fp32", "bf16", "auto"), help=precision)
    compiled = "torch.compile of the loss; the graph breaks at recurrent layers (default: off)"
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in --run (default: the newest)"
    )
    settings = {"action": "extend", "default": [], "metavar": "KEY=VALUE"}
    parser.add_argument("--set", nargs="+", **settings, help="settings of recipe or model")
    args = parser.parse_args()

    if args.steps is not None and args.steps < 1:
        raise SettingError(f"--steps {args.steps}: expected at least 1")
    check_seed(args.seed or 0)
    device = distributed.join(choose_device(args.device))
    if distributed.rank() > 0:
        sys.stdout = open(os.devnull, "w")
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else "fp32"
    run = (resume if args.resume else begin)(args, device)
    with distributed.first_alone():
        batches, held_out = run.sources()
    if not run.resumed:
        run.model.fit(batches, fresh=not run.plan.init)
    run.make_folder(exist_ok=bool(args.run or args.resume))

    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    minutes = batches.corpus.seconds / 60
    print(
        f"{run.plan.model}, {parameters:.2f} M parameters in {run.plan.precision}, recipe {run.plan.recipe_name}: "
        f"{run.recipe.steps} steps of"
    )
    print(f"{batches.size} out of {minutes:.1f} minutes. Results: {run.folder}/")
    if (
        run.plan.precision == "bf16"
        and device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    ):
        print("bf16 is many times slower than fp32 on this CPU, which has no instructions for it.")
    if batches.skipped:
        print(f"{batches.skipped} utterances are {batches.unused} and are not used.")
    train(run, batches, held_out, args.compile)
    distributed.leave()
    print(
        f"Finished: {run.folder}/ (curves.png shows the training). Next: python evaluate.py {run.folder}"
    )


if __name__ == "__main__":
    cli.run(main)
