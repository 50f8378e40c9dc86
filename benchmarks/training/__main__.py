"""Does it help? Small networks trained from every start, each at its own best learning rate, on the same seeds.

    pip install '.[bench]'
    python -m benchmarks.training                           # all arms on digits and patches: an hour or two on a core
    python -m benchmarks.training --arms base convsim       # fewer
    python -m benchmarks.training --cases photos:resnet --optimizers adamw --rates 0.003 0.01 0.03 --out longer
    python -m benchmarks.training --data ~/cifar-10-batches-bin --cases cifar:cifar_resnet18 --device cuda

Two rounds narrow the sweep. Tuning: every learning rate on a few seeds of its own; while the best one is at the end of
the grid, the grid grows by one. Final: the best rate alone, on fresh seeds that are the same for every arm, all arms of
a seed before the next one. A row per run goes to a CSV file, what an unfinished run needs to another one: started
again, it goes on from the last test of that run. Then a table and one picture per case. A run takes one thread: start
several with different folders to use more cores.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import convsim_init as ci
from benchmarks.machine import cpu_name
from benchmarks.training.arms import ARMS
from benchmarks.training.fit import OPTIMIZERS, fit
from benchmarks.training.networks import NETWORKS
from benchmarks.training.pictures import draw, draw_lengths
from benchmarks.training.records import Case, Record, Records
from benchmarks.training.snapshot import Snapshot
from benchmarks.training.summary import BASE, OURS, comparisons, rows_of, table
from benchmarks.training.tasks import TASKS, Task, cifar_task
from benchmarks.training.tasks.data import Data
from convsim_init.devices import describe_environment

RESULTS = Path(__file__).parents[1] / "results" / "training"
RATES = [0.03, 0.1, 0.3]
FACTOR = 10**0.5
MOST_EXTENSIONS = 2
FIRST_TUNING_SEED = 1000
ABOUT = [
    "Made by `python -m benchmarks.training`. Each arm at the learning rate that was best for it on tuning seeds; then "
    "fresh seeds, the same for all arms. Mean ± standard error; differences to the base in pairs of equal seeds, ± "
    "half of the 95 % interval (Student's t). Threshold: 90 % of the base's mean final accuracy; runs that miss it "
    "count with all their steps.",
    "",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["digits:vgg", "patches:resnet"], help="as task:network")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--optimizers", nargs="+", default=["sgd-no-decay"], choices=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--draw", default="fan_out", choices=["fan_out", "fan_in"], help="He's base draw: which fan")
    parser.add_argument("--widths", nargs="+", type=float, default=[1.0], help="factors on every layer's filters")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="the grid to begin with; one: no tuning")
    parser.add_argument("--seeds", type=int, default=10, help="of the final round")
    parser.add_argument("--tuning-seeds", type=int, default=3, help="of the tuning round")
    parser.add_argument("--steps", type=int, help="of each run; default: the task's own")
    parser.add_argument("--data", type=Path, help="folder with CIFAR's binary files, for the task cifar")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    try:
        run(options)
    except ci.InputError as error:
        parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    tasks = TASKS | ({"cifar": cifar_task(options.data)} if options.data else {})
    cases = []
    for name in options.cases:
        task, _, network = name.partition(":")
        if task not in tasks or network not in NETWORKS:
            raise ci.InputError(
                f"expected cases of task:network with tasks {', '.join(tasks)} and networks {', '.join(NETWORKS)}, "
                f"got {name!r}" + ("; the task cifar needs --data" if task == "cifar" else "")
            )
        steps = options.steps or tasks[task].steps
        cases += [
            Case(task, network, width, options.draw, optimizer, steps)
            for optimizer in options.optimizers
            for width in options.widths
        ]
    torch.set_num_threads(1)
    records = Records(options.out / "runs.csv")
    trainer = Trainer(tasks, records, options.device, options.out / "unfinished.pt")
    tuning = len(options.rates) * options.tuning_seeds if len(options.rates) > 1 else 0
    rounds = tuning + options.seeds
    with tqdm(total=rounds * len(cases) * len(options.arms), unit="run", smoothing=0.05) as trainer.bar:
        for case in cases:
            best = {arm: trainer.best_rate(case, arm, options.rates, options.tuning_seeds) for arm in options.arms}
            for seed in range(options.seeds):
                for arm, rate in best.items():
                    trainer.train(case, arm, rate, seed, final=True)
    write(records, options.out)


class Trainer:
    """Trains what is not recorded yet."""

    def __init__(self, tasks: dict[str, Task], records: Records, device: str, unfinished: Path) -> None:
        self.bar: tqdm[None] | None = None
        self._tasks, self._records, self._device, self._unfinished = tasks, records, device, unfinished

    def best_rate(self, case: Case, arm: str, rates: list[float], tuning_seeds: int) -> float:
        """The tuning round of an arm; a single rate is taken as it is."""
        if len(rates) == 1:
            return rates[0]
        reached = {rate: self._mean(case, arm, rate, tuning_seeds) for rate in sorted(rates)}
        best = max(reached, key=reached.__getitem__)
        for _ in range(MOST_EXTENSIONS):
            if min(reached) < best < max(reached):
                break
            further = float(f"{best * FACTOR if best == max(reached) else best / FACTOR:.1g}")
            reached[further] = self._mean(case, arm, further, tuning_seeds)
            best = max(reached, key=reached.__getitem__)
        return best

    def _mean(self, case: Case, arm: str, rate: float, seeds: int) -> float:
        tried = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
        return statistics.fmean(self.train(case, arm, rate, seed, final=False).accuracy for seed in tried)

    def train(self, case: Case, arm: str, rate: float, seed: int, *, final: bool) -> Record:
        """The record of a run, made now if there is none."""
        record = self._records.find(case, arm, rate, seed)
        if record is None:
            task = self._tasks[case.task]
            snapshot = Snapshot(self._unfinished, f"{case}, {arm}, rate {rate:g}, seed {seed}")
            data = on_device(task.draw(seed), self._device)
            torch.manual_seed(seed)
            model = NETWORKS[case.network](data.images.shape[1], data.classes, case.width)
            model = model.to(self._device, memory_format=torch.channels_last)  # twice as fast with depthwise layers
            curve = fit(
                data,
                model,
                ARMS[arm],
                draw=case.draw,
                optimizer=case.optimizer,
                rate=rate,
                steps=case.steps,
                batch=task.batch,
                seed=seed,
                snapshot=snapshot,
            )
            record = Record(case, arm, rate, seed, final, tuple(curve), snapshot.seconds)
            self._records.add(record)
            snapshot.remove()
        if self.bar is not None:
            self.bar.set_description(f"{case.task} {arm} rate {rate:g}")
            self.bar.update()
        return record


def write(records: Records, folder: Path) -> None:
    """Tables of everything recorded, and a picture for each case."""
    runs = list(records)
    lines = [f"# Training runs, {datetime.date.today()}", "", *ABOUT, f"On {cpu_name()}:", ""]
    lines += [f"- {name}: {value}" for name, value in describe_environment().items()]
    cases = sorted({run.case for run in runs})
    compared = sum(row.gain is not None for case in cases for row in rows_of(runs, case)[1])
    hours = sum(run.seconds for run in runs) / 3600
    lines += [
        "",
        f"{len(runs)} runs, {hours:.1f} hours. {compared} arms are compared with a base, each at its own rate; "
        "of such intervals one in twenty leaves out zero by luck alone.",
        "",
    ]
    for case in cases:
        rows = table(runs, case)
        lines += rows + comparisons(runs, case)
        rates = {run.rate for run in runs if run.case == case and run.final}
        for rate in sorted(rates) if len(rates) > 1 else ():
            lines += table(runs, case, rate)
        if rows:
            draw(runs, case, folder / f"{case.file_name}.png")
    for several in of_several_lengths(runs):
        draw_lengths(runs, several, folder / f"{several[0].file_name}-and-longer.png")
    (folder / "training.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def of_several_lengths(runs: list[Record]) -> list[list[Case]]:
    """The cases that differ in nothing but steps and have runs of base and convsim, the shortest first."""
    groups: dict[Case, list[Case]] = {}
    for case in sorted({run.case for run in runs}):
        if {BASE, OURS} <= {row.arm for row in rows_of(runs, case)[1]}:
            groups.setdefault(replace(case, steps=0), []).append(case)
    return [cases for cases in groups.values() if len(cases) > 1]


def on_device(data: Data, device: str) -> Data:
    names = ("images", "labels", "test_images", "test_labels")
    return replace(data, **{name: getattr(data, name).to(device) for name in names})


if __name__ == "__main__":
    main()
