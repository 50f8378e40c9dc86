"""Pictures: what they show of the data, that they can be read, and that the same data give the same bytes."""

import dataclasses
import itertools
import math
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import imread
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from torch import nn

from convsim_init import InputError, LayerReport, Outcome, Report, Settings, build_model, initialize_
from convsim_init.functional.bank import filter_bank
from convsim_init.metrics.expected import expected_correlation
from convsim_init.metrics.snapshot import Snapshot, take_snapshot
from convsim_init.plotting.figure import check_plot, choose_layer, figure_of, figure_of_run, is_dark, save_figure
from convsim_init.plotting.panels import MAX_FILTERS, MAX_MAPS

SIMILARITY = "Similarity of each layer's filters"
MEASURES = ("normalized_similarity", "feature_correlation_natural")


class Small(nn.Module):
    """Five convolutions of several kinds, one of them with two groups, one transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5)
        self.wide = nn.Conv2d(8, 200, (3, 1), groups=2)
        self.up = nn.ConvTranspose2d(200, 6, 3)
        self.alone = nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Conv2d(6, 4, 1)


@pytest.fixture(scope="module")
def run() -> tuple[Report, Snapshot, Snapshot]:
    torch.manual_seed(0)
    model = Small()
    before = take_snapshot("before", model, copy=True)
    report = initialize_(model, settings=Settings(steps=4))
    return report, before, take_snapshot("after", model)


def synthetic(label: str, names: list[str], *, channels: int = 3) -> Snapshot:
    """A snapshot of small layers with made-up measures, so that many of them cost nothing."""
    generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))
    banks = {name: torch.randn(1, 4, channels, 3, 3, generator=generator) for name in names}
    layers = [
        LayerReport(
            name,
            "Conv2d",
            [4, channels, *((3, 3), (1, 1), (7, 7))[index % 3]],
            Outcome.MEASURED,
            before=dict.fromkeys(MEASURES, float(torch.rand((), generator=generator))),
        )
        for index, name in enumerate(names)
    ]
    return Snapshot(label, Report(Settings(), layers), banks)


def drawn(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def texts(figure: FigureBase) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def title_of(part: FigureBase) -> str:
    over = part._suptitle.get_text() if part._suptitle is not None else part.axes[0].get_title(loc="left")
    return over.replace("\n", " ")


def panel(figure: Figure, title: str) -> FigureBase:
    """The part of a figure with that title over it."""
    (found,) = [part for part in figure.findobj(FigureBase) if not part.subfigs and title in title_of(part)]
    return found


def image(figure: FigureBase, index: int) -> np.ndarray:
    return np.ma.filled(figure.axes[index].images[0].get_array(), math.nan)


# What they show


def test_each_layer_is_marked_before_and_after_and_joined(run):
    figure = figure_of_run(*run)
    axes = panel(figure, SIMILARITY).axes[0]
    points = np.concatenate([one.get_offsets() for one in axes.findobj(PathCollection)])
    measured = [layer for layer in run[1].report.layers if layer.before]
    assert [label.get_text() for label in axes.get_xticklabels()] == [layer.name for layer in measured]
    expected = {
        (float(place), layer.before["normalized_similarity"])
        for snapshot in run[1:]
        for place, layer in enumerate(layer for layer in snapshot.report.layers if layer.before)
    }
    assert {(float(x), float(y)) for x, y in points} == expected
    assert len(axes.findobj(LineCollection)) == 1
    assert len(axes.findobj(LineCollection)[0].get_segments()) == len(measured)
    assert axes.get_yscale() == "log"


def test_markers_tell_kernel_sizes_apart_and_colours_the_snapshots(run):
    figure = figure_of_run(*run)
    (legend,) = panel(figure, SIMILARITY).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("before", "after", "kernel 1×1", "kernel 3×1", "kernel 3×3", "kernel 5×5"),
    ]
    markers = [handle.get_marker() for handle in legend.legend_handles[2:]]
    colours = [handle.get_facecolor() for handle in legend.legend_handles[:2]]
    assert len(set(markers)) == 4
    assert len(set(colours)) == 2


def test_the_most_changed_layers_correlations_are_shown_on_one_scale(run):
    _, before, after = run
    name = choose_layer([before, after])
    drops = {
        old.name: abs(old.before[MEASURES[1]] - new.before[MEASURES[1]])
        for old, new in zip(before.report.layers, after.report.layers, strict=True)
        if old.before
    }
    assert name == max(drops, key=drops.get)
    part = panel(figure_of_run(*run), f"correlation of feature maps: {name},")
    assert len({axes.images[0].get_clim() for axes in part.axes[:2]}) == 1
    for index, snapshot in enumerate((before, after)):
        mean = next(layer for layer in snapshot.report.layers if layer.name == name).before[MEASURES[1]]
        assert part.axes[index].get_title() == f"{snapshot.label}\nmean {mean:.3f}"


@pytest.mark.parametrize(("name", "groups", "transposed"), [("stem", 1, False), ("wide", 2, False), ("up", 1, True)])
def test_a_chosen_layers_correlations_are_its_own(name, groups, transposed, run):
    part = panel(figure_of_run(*run, layer=name), f"correlation of feature maps: {name},")
    torch.manual_seed(0)
    weight = Small().get_submodule(name).weight.detach()
    bank = filter_bank(weight, groups=groups, transposed=transposed)
    expected = expected_correlation(bank).abs()[:MAX_MAPS, :MAX_MAPS]
    shown = image(part, 0)
    assert np.isnan(shown.diagonal()).all()
    np.testing.assert_allclose(np.nan_to_num(shown), expected.fill_diagonal_(0).numpy(), rtol=1e-4, atol=1e-6)
    assert ("first 128 of 200" in title_of(part)) is (name == "wide")


def test_the_first_layers_filters_are_shown_with_zero_in_grey(run):
    part = panel(figure_of_run(*run), "First layer: stem")
    for index, snapshot in enumerate(run[1:]):
        bank = snapshot.banks["stem"][0]  # [8, 3, 5, 5]
        largest = max(float(one.banks["stem"].abs().max()) for one in run[1:])
        shown = image(part, index)
        finer = 2
        tile = shown[: 5 * finer : finer, : 5 * finer : finer]
        np.testing.assert_allclose(tile[..., :3], 0.5 + 0.5 * bank[0].movedim(0, -1).numpy() / largest, atol=1e-6)
        assert (tile[..., 3] == 1).all()
        assert (shown[5 * finer, :, 3] == 0).all()  # the background between the filters


@pytest.mark.parametrize(
    "shape", [(70, 1, 3, 3), (4, 2, 3, 3), (4, 2, 5), (4, 3, 2, 3, 4), (8, 3, 16, 16), (5, 3, 1, 7)]
)
def test_filters_of_any_shape_are_shown(shape):
    snapshot = take_snapshot("x", {"stem.weight": torch.randn(shape)} if shape[1] > 1 else conv(shape))
    part = panel(figure_of([snapshot], title="x"), "First layer")
    assert np.isfinite(image(part, 0)).all()
    assert (f"first {MAX_FILTERS} of 70" in title_of(part)) is (shape[0] == 70)


def test_of_many_channels_each_filters_strongest_is_shown():
    weight = 0.1 * torch.ones(2, 4, 3, 3)
    weight[0, 3], weight[1, 1] = -2, 1
    part = panel(figure_of([take_snapshot("x", {"a.weight": weight})], title="x"), "First layer")
    assert "strongest of 4 channels each" in title_of(part)
    shown = image(part, 0)
    assert shown[0, 0, :1] == 0  # black: the most negative
    assert shown[0, -1, :1] == 0.75


def conv(shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(shape[1], shape[0], shape[2:]))


def test_the_losses_are_shown_over_their_start_and_summed(run):
    report = run[0]
    part = panel(figure_of_run(*run), "Loss, over its start")
    lines = [line.get_ydata() for line in part.axes[0].lines if len(line.get_ydata())]
    treated = [layer.losses for layer in report.layers if layer.after]
    assert len(lines) == len(treated) + 1
    for line, losses in zip(lines, treated, strict=False):
        np.testing.assert_allclose(line, np.array(losses) / losses[0])
    assert lines[-1][0] == 1
    np.testing.assert_allclose(lines[-1][-1], sum(x[-1] for x in treated) / sum(x[0] for x in treated))


def test_a_similarity_of_zero_is_told_and_not_drawn():
    weight = torch.zeros(2, 2, 3, 3)
    weight[0, 0], weight[1, 1] = 1, 1  # disjoint channels
    snapshot = take_snapshot("x", {"a.weight": weight, "b.weight": torch.randn(4, 2, 3, 3)})
    axes = panel(figure_of([snapshot], title="x"), SIMILARITY).axes[0]
    assert "1 at zero, not shown" in axes.get_title(loc="left")


def test_the_title_tells_what_is_left_in_the_median_layer(run):
    report = run[0]
    treated = sorted(layer.after[MEASURES[0]] / layer.before[MEASURES[0]] for layer in report.layers if layer.after)
    left = (treated[1] + treated[2]) / 2
    assert len(treated) == 4
    assert (
        f"model: {left:.1%} of the filters' similarity is left in the median layer"
        == figure_of_run(*run).get_suptitle()
    )
    nothing_treated = Report(Settings(), [], model="net")
    assert figure_of_run(nothing_treated, *run[1:]).get_suptitle() == "net"


def test_correlations_and_filters_stand_above_the_layers(run):
    figure = drawn(figure_of_run(*run))
    lowest = {
        title: min(axes.get_window_extent().y0 for axes in panel(figure, title).axes)
        for title in ("Expected correlation", "First layer", SIMILARITY, "Loss, over its start")
    }
    below = panel(figure, SIMILARITY).axes[0].get_window_extent().y1
    assert min(lowest["Expected correlation"], lowest["First layer"]) > below
    heights = [axes.get_window_extent().height for axes in panel(figure, "First layer").axes]
    assert min(heights) > figure.bbox.height / 4


# That they can be read

LONG = "backbone.stages.{}.blocks.depthwise_separable_convolution.pointwise"
NAMES = {
    "five": [f"layer{index}" for index in range(5)],
    "thirty-long": [LONG.format(index) for index in range(30)],
    "hundred-and-fifty": [f"layer{index // 9}.{index % 9}.conv{index % 3}" for index in range(150)],
    "thousand": [f"features.{index}" for index in range(1000)],
    "one": [""],
    "dollars": ["a$b$c", "$x^2$", r"\alpha", "_$"],
}
LABELS = {
    "one": ["resnet18"],
    "two": ["before", "after"],
    "three-files": ["runs/2024/baseline-with-a-long-name-epoch300.safetensors", "init.pt", "a$b$.pth"],
    "nine": [f"checkpoint-{index}.safetensors" for index in range(9)],
}


def outside(box: Bbox, canvas: Bbox) -> bool:
    return box.x0 < canvas.x0 - 1 or box.y0 < canvas.y0 - 1 or box.x1 > canvas.x1 + 1 or box.y1 > canvas.y1 + 1


def overlap(a: Bbox, b: Bbox) -> bool:
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("names", "labels"),
    [
        *((names, labels) for names in NAMES for labels in ("two", "three-files") if names != "thousand"),
        *(("five", labels) for labels in ("one", "nine")),
        *((names, "one") for names in ("one", "thousand")),
        ("thirty-long", "nine"),
        ("hundred-and-fifty", "nine"),
    ],
)
def test_no_label_is_cut_or_overlaps_another(names, labels):
    snapshots = [synthetic(label, NAMES[names]) for label in LABELS[labels]]
    losses = {name: [1.0, 0.3, 0.1] for name in NAMES[names]} if labels == "two" else None
    figure = drawn(figure_of(snapshots, title=" | ".join(LABELS[labels]), losses=losses))
    ticks = {id(tick) for axes in figure.findobj(lambda one: hasattr(one, "get_xticks")) for tick in off_axis(axes)}
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts(figure) if id(text) not in ticks]
    assert len(boxes) > 10
    assert [text for text, box in boxes if outside(box, figure.bbox)] == []
    assert [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if overlap(x, y)] == []


def off_axis(axes) -> list[Text]:
    """Labels of ticks outside of the limits, or of axes that are off: matplotlib keeps them and draws none."""
    hidden = []
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not axes.axison or not min(limits) <= tick.get_loc() <= max(limits):
                hidden += [tick.label1, tick.label2]
    return hidden


def test_names_are_shown_as_they_are():
    figure = drawn(figure_of([synthetic("x$y$", NAMES["dollars"])], title="$t$", layer="$x^2$"))
    shown = [text.get_text().replace(r"\$", "$") for text in texts(figure)]
    assert {*NAMES["dollars"], "$t$"} <= set(shown)


@pytest.mark.parametrize("names", ["thirty-long", "hundred-and-fifty"])
def test_as_many_layers_are_named_as_fit_side_by_side(names):
    figure = drawn(figure_of([synthetic("x", NAMES[names])], title="x"))
    axes = panel(figure, SIMILARITY).axes[0]
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) > 3
    assert max(box.height for box in boxes) < figure.bbox.height / 30
    assert len(axes.get_xticks()) + len(axes.get_xticks(minor=True)) == len(NAMES[names])
    step = int(axes.get_xticks()[1])
    assert f"one in {step} is named" in axes.get_xlabel()


def test_a_long_name_keeps_its_start_and_its_end():
    axes = panel(figure_of([synthetic("x", NAMES["thirty-long"])], title="x"), SIMILARITY).axes[0]
    assert axes.get_xticklabels()[0].get_text() == "backbone.st....pointwise"


def contrast(a: object, b: object) -> float:
    """Of two colours, from 1 to 21, as WCAG defines it."""
    light = []
    for colour in (a, b):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour)]
        light.append(float(np.dot([0.2126, 0.7152, 0.0722], linear)) + 0.05)
    return max(light) / min(light)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_background(dark, run, tmp_path):
    figure = figure_of_run(*run, dark=dark)
    save_figure(figure, tmp_path / "a.png")  # which draws once more, in another style
    background = figure.get_facecolor()
    assert (sum(background[:3]) < 0.5) is dark
    assert min(contrast(text.get_color(), background) for text in texts(figure)) > 7
    handles = [handle for legend in figure.findobj(Legend) for handle in legend.legend_handles]
    colours = [one.get_facecolor() if isinstance(one, Patch) else one.get_color() for one in handles]
    assert min(contrast(colour, background) for colour in colours) > 2


@pytest.mark.parametrize(
    ("name", "dark"), [("a-dark.png", True), ("a.png", False), ("dark.svg", False), ("a-dark/b.png", False)]
)
def test_a_files_name_asks_for_a_dark_background(name, dark):
    assert is_dark(Path(name)) is dark


@pytest.mark.parametrize("name", ["a-dark.png", "a.png"])
@pytest.mark.parametrize(
    "arguments", [["a.pt"], ["inspect", "a.pt"], ["compare", "a.pt", "a.pt"]], ids=lambda one: one[0]
)
def test_every_command_draws_on_the_background_that_the_files_name_asks_for(arguments, name, command):
    torch.save(conv((8, 4, 3, 3)).state_dict(), "a.pt")
    assert command(*arguments, "--plot", name)[0] == 0
    assert bool(imread(name)[0, 0, :3].sum() < 0.5) is ("dark" in name)


def test_the_picture_of_a_large_model_is_of_a_size_that_fits_a_page():
    figure = figure_of([synthetic("x", NAMES["thousand"])], title="x")
    width, height = figure.get_size_inches()
    assert width <= 13
    assert height <= 10


# Files


SIGNATURES = {".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_the_same_data_give_the_same_bytes(suffix, run, tmp_path, monkeypatch):
    from matplotlib import rcParams

    first, second = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
    assert save_figure(figure_of_run(*run), first) == first
    monkeypatch.setitem(rcParams, "font.size", 30.0)  # the user's own style
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12345")
    save_figure(figure_of_run(*run), second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(SIGNATURES[suffix])
    assert rcParams["font.size"] == 30.0


def test_places_are_rounded_since_the_layouts_last_bits_change_from_run_to_run(run):
    figure = figure_of_run(*run)
    parts = [*figure.subfigs, *(inner for part in figure.subfigs for inner in part.subfigs)]
    places = [axes.get_position(original=True) for axes in figure.axes] + [part.bbox_relative for part in parts]
    assert len(places) == 13
    for place in places:
        assert place.bounds == pytest.approx([round(share, 5) for share in place.bounds], abs=1e-12)


def test_a_png_is_whole_and_of_the_size_of_the_figure(run, tmp_path):
    figure = figure_of_run(*run)
    content = save_figure(figure, tmp_path / "a.png").read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == tuple(int(150 * inches) for inches in figure.get_size_inches())
    end = content.rindex(b"IEND")
    assert struct.unpack(">I", content[end + 4 :])[0] == zlib.crc32(b"IEND")


def test_nothing_global_of_matplotlib_is_touched(run, tmp_path, monkeypatch):
    from matplotlib import rcParams

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it would fail
    before = rcParams.copy()
    save_figure(figure_of_run(*run), tmp_path / "a.svg")
    assert rcParams.copy() == before


def test_without_matplotlib_the_extra_to_install_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr("convsim_init.plotting.figure.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for attempt in (lambda: check_plot(tmp_path / "a.png"), lambda: figure_of_run(*run)):
        with pytest.raises(InputError, match=r"pip install 'convsim-init\[plot\]'$"):
            attempt()


def test_the_pictures_in_the_readme_are_there_for_both_backgrounds():
    root = Path(__file__).parents[2]
    pictures = re.findall(r'src(?:set)?="([^"]+)"', (root / "README.md").read_text(encoding="utf-8"))
    assert sorted(is_dark(Path(picture)) for picture in pictures) == [False, True]
    for picture in pictures:
        assert bool(imread(root / picture)[0, 0, :3].sum() < 0.5) is is_dark(Path(picture))


# What cannot be drawn


def test_a_layer_that_is_not_there_is_refused(run):
    with pytest.raises(InputError, match=r"got 'gone': the choices are 'stem', 'wide', 'up', 'head'$"):
        figure_of_run(*run, layer="gone")


def test_snapshots_that_have_no_layer_in_common_are_refused():
    with pytest.raises(InputError, match="compare like with like"):
        figure_of([synthetic("a", ["x"]), synthetic("b", ["y"])], title="")


def test_of_one_model_the_most_correlated_layer_is_shown():
    snapshot = take_snapshot("x", build_model("cifar_resnet18"))
    values = {layer.name: layer.before[MEASURES[1]] for layer in snapshot.report.layers}
    assert choose_layer([snapshot]) == max(values, key=values.get)


# Snapshots


def test_a_snapshot_keeps_a_copy_where_it_is_asked_to():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    weight = model[0].weight.detach().clone()
    kept, shared = take_snapshot("a", model, copy=True), take_snapshot("b", model.state_dict())
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(kept.banks["0"][0], weight)
    assert torch.equal(shared.banks["0"][0], torch.zeros_like(weight))


def test_a_snapshot_keeps_what_was_measured_in_the_models_order():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1))
    model.append(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)))
    snapshot = take_snapshot("x", model)
    assert list(snapshot.banks) == ["0", "2", "3"]
    assert list(snapshot.select(["[12]"]).banks) == ["2"]
    assert [layer.name for layer in snapshot.select(["[12]"]).report.layers] == ["1", "2"]
    assert dataclasses.replace(snapshot, label="y").banks is snapshot.banks
