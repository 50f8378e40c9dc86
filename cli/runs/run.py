"""One run of the main command: build or read a model, decorrelate it, and write the files that were asked for."""

from __future__ import annotations

import glob
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from convsim_init.errors import InputError
from convsim_init.files.writing import STDOUT, write_text
from convsim_init.models.classifier import classifier_keys, pointwise_convolutions
from convsim_init.models.spec import Source, parse
from convsim_init.plotting.figure import choose_layer, figure_of_run, is_dark, save_figure
from convsim_init.report import html, record
from convsim_init.report.report import Outcome, Report
from convsim_init.report.text import shown, some
from convsim_init.settings import Settings

from ..arguments import OWN_OPTIONS
from ..devices import MPS_REMARK, cuda_errors, find_device
from ..signals import exit_on_signal
from ..sources import Loaded, ModelOptions, is_file, load
from ..terminal import stdout_for_results
from .plan import Run
from .results import Result, Status, failure

UNTREATED = "no convolution was treated: the weights are as they were"

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from convsim_init.checkpoint.save import Contents
    from convsim_init.metrics.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The user's choices for every run, most of them under the names of their options.

    Attributes:
        writes: Whether there is an --out.
        folder: Whether --out names a folder.
        origins: A line for each place other than the command line that options were taken from.
    """

    settings: Settings
    how: ModelOptions
    base: str
    calibrate: tuple[int, ...] | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    device: str
    convs_only: bool
    writes: bool
    folder: bool
    head: str
    without: tuple[str, ...]
    prefix: str
    dtype: str
    plot_layer: str | None
    force: bool
    dry_run: bool
    as_json: bool
    quiet: bool
    verbose: bool
    debug: bool
    origins: tuple[str, ...]

    @property
    def of_files(self) -> dict[str, object]:
        """Options that change a file, without defaults, settings, base and calibration; ready for JSON."""
        arguments = self.how.arguments
        given = {
            **{name: value for name, value in arguments.items() if name in OWN_OPTIONS},
            "model_arg": [f"{name}={value!r}" for name, value in arguments.items() if name not in OWN_OPTIONS],
            "like": self.how.like,
            "key": self.how.key,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "convs_only": self.convs_only,
            "head": self.head if self.head == "drop" else None,
            "without": list(self.without),
            "prefix": self.prefix,
            "dtype": self.dtype if self.dtype != "float32" else None,
        }
        return {name: value for name, value in given.items() if value}


@stdout_for_results()
def make(run: Run, choices: Choices, *, progress: bool = False, group: dist.ProcessGroup | None = None) -> Result:
    """Do all of a run but the writing; the result has nothing to write if a layer failed.

    The layers are divided among the processes of the group, which all call this function; the run has the files that
    this process is to write.

    Raises:
        InputError: If the model cannot be built or treated as asked.
        RunError: If a process of the group has died.
    """
    with exit_on_signal():
        import torch

        # Imported before a model's own code, which may replace functions of torch.nn.init by ones that do nothing.
        import convsim_init.schemes.draw  # noqa: F401
        from convsim_init.checkpoint.save import checkpoint_contents
        from convsim_init.checkpoint.state_dict import check_entry, state_entries, without_keys
        from convsim_init.models.hub import describe

        if choices.settings.optimizer == "adam":
            import torch._dynamo  # torch.optim imports it later, where an interrupt would be lost

    device = find_device(choices.device)
    start = load(run.model, replace(choices.how, seed=run.seed))
    network = start.content
    head_layers, head_keys, head_remarks = _classifier(run, start, choices)
    # These are names, whose brackets are not to be taken for patterns.
    without = [*choices.without, *map(glob.escape, head_keys)]
    for key, value in without_keys(state_entries(network), without).items() if choices.writes else ():
        check_entry(key, value)  # refused before the work
    checkpoint = config = None
    if isinstance(network, torch.nn.Module):
        config = describe(network) if choices.folder else None
    elif choices.folder:
        raise InputError(f"expected a model for a folder, got the weights {run.model!r}: --like names their model")
    elif choices.calibrate is not None:
        raise InputError(f"--calibrate: {run.model!r} is a file of weights: name their model with --like")
    report, snapshots = _treat(run, network, choices, head_layers, device, progress=progress, group=group)
    report.model, report.seed, report.base, report.options = start.name, run.seed, choices.base, choices.of_files
    report.remarks += [*start.remarks, *head_remarks, *choices.origins]
    if choices.device == "mps":
        report.remarks.append(MPS_REMARK)
    report.remarks += _filled_remarks(report, start, choices)
    # The checkpoint has the plain report, so that it is the same with and without a record.
    complete = report if snapshots is None else report.with_measures(*(snapshot.report for snapshot in snapshots))
    error = failure(report)
    if choices.dry_run or error is not None:
        return Result(run, Status.FAILED if error else Status.PLANNED, complete, error)
    if not any(layer.after or layer.factor for layer in report.layers):
        complete.remarks.append(UNTREATED)
    if run.out is not None:
        checkpoint = checkpoint_contents(
            network,
            report=report,
            prefix=choices.prefix,
            convs_only=choices.convs_only,
            exclude=without,
            dtype=getattr(torch, choices.dtype),
        )
        complete.remarks += [*_file_remarks(network, checkpoint, choices, head_keys), *checkpoint.remarks]
    drawn = not (is_file(run.model) or start.filled)
    return Result(run, Status.DONE, complete, checkpoint=checkpoint, config=config, drawn=drawn, snapshots=snapshots)


def _treat(
    run: Run,
    network: torch.nn.Module | Mapping[str, torch.Tensor],
    choices: Choices,
    left_alone: Sequence[str],
    device: torch.device | None,
    *,
    progress: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Report, tuple[Snapshot, Snapshot] | None]:
    """Draw, decorrelate and scale the layers: the report, and snapshots if a file is to show them."""
    with exit_on_signal():
        import torch

        from convsim_init.initialize import initialize_layers, plan
        from convsim_init.layers.find import find_layers
        from convsim_init.metrics.snapshot import take_snapshot
        from convsim_init.schemes.calibrate import scale_layers
        from convsim_init.schemes.draw import draw_base_

    exclude = (*choices.exclude, *map(glob.escape, left_alone))
    settings, layers = choices.settings, {"include": choices.include, "exclude": exclude}
    if choices.dry_run:
        return plan(network, settings=settings, **layers), None
    draw_base_(network, choices.base, seed=run.seed or 0, **layers)
    before = take_snapshot("before", network, copy=True) if run.record or run.plot else None
    if before is not None and choices.plot_layer is not None:
        choose_layer([before], choices.plot_layer)
    with cuda_errors():
        found = find_layers(network, choices.include, exclude)
        report = initialize_layers(network, found, settings, device, progress=progress, group=group)
    if choices.calibrate is not None:
        assert isinstance(network, torch.nn.Module)
        factors, left = scale_layers(network, None, choices.calibrate, seed=0, **layers)
        report = report.with_factors(factors)
        report.remarks += [f"not scaled: {some(names)}: {reason}" for reason, names in left.items()]
        report.calibrated = list(choices.calibrate)
    return report, None if before is None else (before, take_snapshot("after", network))


def _filled_remarks(report: Report, start: Loaded, choices: Choices) -> list[str]:
    """A remark on treated layers that the model's own code had filled, perhaps with trained weights."""
    moved = (layer.name for layer in report.layers if layer.after or layer.outcome is Outcome.PLANNED)
    filled = [shown(name) for name in moved if name in start.filled]
    if not filled or choices.base != "model":
        return []
    return [
        f"filled by the model's own code: {some(filled)}; if they are trained --exclude them, for what filters "
        "have learned is lost when they are moved"
    ]


def _file_remarks(
    network: torch.nn.Module | Mapping[str, torch.Tensor],
    checkpoint: Contents,
    choices: Choices,
    head_keys: Sequence[str],
) -> list[str]:
    """Remarks on entries that the file lacks or has in less precision than the model."""
    from convsim_init.checkpoint.state_dict import state_entries

    own = {choices.prefix + key: value for key, value in state_entries(network).items() if key not in head_keys}
    left_out = [key for key in own if key not in checkpoint.tensors]
    rounded = [key for key in checkpoint.tensors if str(getattr(own[key], "dtype", None)) == "torch.float64"]
    remarks = [f"left out of the file: {some(map(shown, left_out))}"] if left_out else []
    if rounded and choices.dtype == "float32":  # the default: other dtypes were asked for
        text = f"float64 in the model, float32 in the file: {some(map(shown, rounded))}; --dtype float64 keeps them"
        remarks.append(text)
    return remarks


def _classifier(run: Run, start: Loaded, choices: Choices) -> tuple[list[str], list[str], list[str]]:
    """A classifier's convolutions, which are left alone, its keys if they are dropped, and remarks on both."""
    drop = choices.head == "drop"
    convolutions = pointwise_convolutions(start.content)
    own_code = start.built is None or parse(start.built).source in (Source.MODULE, Source.FILE)
    if not drop and (own_code or not convolutions):
        return [], [], []
    try:
        if start.built is None or isinstance(start.content, Mapping):
            raise InputError("a file alone does not say which entries are its classifier")
        keys = classifier_keys(start.content, start.built, **choices.how.arguments)
    except InputError as error:
        if drop:
            raise InputError(f"--head drop: {error}: name the entries, as --without 'fc.*' does") from error
        return [], [], []
    layers = sorted({key.rpartition(".")[0] for key in keys} & convolutions)
    remarks = [f"left alone, as linear classifiers are: {some(map(shown, layers))}"] if layers else []
    if drop and run.out is not None:
        remarks.append(f"left out of the file, for they depend on the number of classes: {some(map(shown, keys))}")
    return layers, keys if drop else [], remarks


def write(result: Result, choices: Choices) -> Result:
    """Write the result's files, each whole or not at all, and return the result without what was written."""
    run, report, figure = result.run, result.report, None
    if report is None:
        return result
    if result.snapshots is not None and run.plot is not None:
        figure = figure_of_run(report, *result.snapshots, layer=choices.plot_layer, dark=is_dark(run.plot))
    if run.out is not None and result.checkpoint is not None:
        from convsim_init.checkpoint.folder import write_folder
        from convsim_init.checkpoint.save import checkpoint_bytes, write_checkpoint

        if result.config is not None:
            picture = (f"plot{run.plot.suffix}", partial(save_figure, figure)) if run.plot and figure else None
            write_folder(
                result.checkpoint, run.out, config=result.config, report=report, drawn=result.drawn, picture=picture
            )
            report.file, report.file_bytes = str(run.out), sum(path.stat().st_size for path in run.out.iterdir())
        elif run.out == STDOUT:
            report.file, report.file_bytes = "stdout", _write_stdout(checkpoint_bytes(result.checkpoint))
        else:
            write_checkpoint(result.checkpoint, run.out, overwrite=choices.force)
            report.file, report.file_bytes = str(run.out), run.out.stat().st_size
    if result.snapshots is not None and run.record is not None:
        if run.record.suffix in html.SUFFIXES:
            from convsim_init.plotting.images import layer_images

            before, after = result.snapshots
            pictures = layer_images(before, after, [layer.name for layer in report.layers if layer.after])
            text, suffixes = html.page(report, pictures), html.SUFFIXES
        else:
            text, suffixes = record.record_text(report), record.SUFFIXES
        write_text(run.record, text, suffixes=suffixes, overwrite=choices.force)
    if figure is not None and run.plot is not None:
        save_figure(figure, run.plot, overwrite=choices.force)
    return replace(result, checkpoint=None, config=None, snapshots=None)


def _write_stdout(data: bytes) -> int:
    left, stream = memoryview(data), sys.stdout.buffer
    while left:  # with PYTHONUNBUFFERED the stream writes what it can and says how much
        left = left[stream.write(left) :]
    stream.flush()
    return len(data)
