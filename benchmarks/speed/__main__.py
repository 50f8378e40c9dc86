"""Time and memory of the command and of the descent, each against a peer measured in turn in the same run.

    pip install '.[timm]'
    python -m benchmarks.speed [--parts step target] [--repeats 5] [--write]

Ratios carry over from machine to machine, seconds do not. With ``--write`` the table goes to ``benchmarks/results/``,
to a file named for the processor, and for the parts where not all were chosen. All take about half an hour on two
cores, most of it the peers'.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from benchmarks.machine import cpu_name, file_name
from benchmarks.page import RESULTS, Page
from benchmarks.speed.commands import Row, command_rows, ranks_rows, stage_rows, sweep_rows
from benchmarks.speed.roofline import roofline_rows
from benchmarks.speed.steps import scaling_rows, step_rows, target_rows

PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "command": command_rows,
    "stages": stage_rows,
    "sweep": sweep_rows,
    "ranks": ranks_rows,
    "step": step_rows,
    "target": target_rows,
    "scaling": scaling_rows,
    "roofline": roofline_rows,
}
DEFAULTS = {"repeats": 5, "cap": 30}
NOTES = (
    "Ours is a step of conjugate gradients, the peers' one of Adam(0.002). A network's step is timed as a whole; of a "
    "peer every distinct shape is, and counted for every layer that has it, as on the way to the target.",
    "OCNN's conv2d(W, W) sums over the channels before squaring, and adjacent pairs are a few of all: these two lower "
    "other things, so only their step is compared.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--repeats", type=int, help="medians are over so many (default %(default)s)")
    parser.add_argument(
        "--cap", type=int, help="seconds after which a peer gives up a layer's target (default %(default)s)"
    )
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"expected --repeats to be at least 1, got {options.repeats}")
    chosen = [] if options.parts == list(PARTS) else options.parts
    changed = [f"--{name} {getattr(options, name)}" for name in DEFAULTS if getattr(options, name) != DEFAULTS[name]]
    command = " ".join(["python -m benchmarks.speed", *(["--parts", *chosen] if chosen else []), *changed, "--write"])
    bound = f"a peer has {options.cap} s for a layer's target"
    made = f"Made by `{command}`; medians of {options.repeats}, peers in turn; {bound}."
    page = Page(f"Speed on {cpu_name()}", made)
    for note in NOTES:
        page.add("", note)
    page.head(["what", "median", "peer", "ratio", "goal"])
    for part in options.parts:
        bounds = {"cap": options.cap} if part == "target" else {}
        page.rows(PARTS[part](options.repeats, **bounds))
    if options.write:
        page.write(RESULTS / ("-".join(["speed", file_name(cpu_name()), *chosen]) + ".md"))


if __name__ == "__main__":
    main()
