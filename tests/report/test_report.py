"""What a report shows and holds: its totals, tables, records, and the file of a run's full record."""

import copy
import csv
import io
import json
import math
import platform
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from page import Page
from torch import nn

import convsim_init
from convsim_init import InputError, LayerReport, Outcome, Report, Settings, initialize_, measure
from convsim_init.report.record import record_text, run_record
from convsim_init.report.table import as_csv
from convsim_init.report.text import printable

MEASURED = {"similarity": 4.0, "normalized_similarity": 0.25, "effective_rank_natural": 0.5}
BEFORE, AFTER = {"similarity": 8.0, "normalized_similarity": 0.5}, {"similarity": 2.0, "normalized_similarity": 0.125}


def layer(name: str, outcome: Outcome = Outcome.INITIALIZED, **details: object) -> LayerReport:
    return LayerReport(name, "Conv2d", [4, 3, 2, 1], outcome, **details)


def run() -> Report:
    layers = [
        layer("stem", before=BEFORE, after=AFTER | {"norm_ratio": 1.0}, steps=2, seconds=0.5, losses=[0.5, 0.3, 0.125]),
        layer("head.0", before=BEFORE, after=BEFORE | {"norm_ratio": 0.5}, losses=[0.5]),
        layer("frozen", Outcome.SKIPPED, reason="frozen: <requires_grad> & more"),
    ]
    return Report(Settings(), layers, 1.25, "net", 3)


def measured(*values: float) -> Report:
    layers = [
        layer(f"layer{index}", Outcome.MEASURED, before=MEASURED | {"normalized_similarity": value})
        for index, value in enumerate(values)
    ]
    return Report(Settings(), [*layers, layer("odd", Outcome.SKIPPED, reason="one filter")], 0.5)


# Totals


def test_totals_sum_the_raw_similarity_and_average_the_rest():
    assert run().totals == {
        "layers": 3,
        "initialized": 2,
        "skipped": 1,
        "before": {"similarity": 16.0, "normalized_similarity": 0.5},
        "after": {"similarity": 10.0, "normalized_similarity": 0.3125, "norm_ratio": 0.75},
    }
    assert measured(0.25, 0.75).totals == {
        "layers": 3,
        "measured": 2,
        "skipped": 1,
        "before": {"similarity": 8.0, "normalized_similarity": 0.5, "effective_rank_natural": 0.5},
        "after": {},
    }


def test_a_measure_is_averaged_over_the_layers_that_have_it():
    layers = [
        layer("a", Outcome.MEASURED, before={"x": 1.0, "y": 2.0}),
        layer("b", Outcome.MEASURED, before={"x": 3.0}),
    ]
    assert Report(Settings(), layers).totals["before"] == {"x": 2.0, "y": 2.0}


# Tables


def test_means_of_matched_and_of_all_channels_are_told_apart():
    report = run()
    report.layers = [
        replace(one, channels=channels) for one, channels in zip(report.layers, ["matched", "all", None], strict=True)
    ]
    assert [line for line in str(report).splitlines() if line.startswith("mean")] == [
        "mean normalized similarity of 1 with channels matched 5.000e-01 -> 1.250e-01 (25.0%)",
        "mean normalized similarity of 1 with channels all 5.000e-01 -> 5.000e-01 (100.0%)",
    ]
    assert report.cells[1:3] == ["1 with channels matched", "5.000e-01 -> 1.250e-01"]


def test_a_run_shows_as_a_table_in_print_and_in_a_shell():
    text = str(run())
    assert text == repr(run())
    header, *rows = [re.split(r"\s{2,}", line) for line in text.split("\n\n")[0].splitlines()]
    assert header == ["layer", "shape", "similarity before -> after", "norm ratio"]
    assert rows == [
        ["stem", "4x3x2x1", "5.000e-01 -> 1.250e-01", "25.0%", "1.000000"],
        ["head.0", "4x3x2x1", "5.000e-01 -> 5.000e-01", "100.0%", "0.500000"],
        ["frozen", "4x3x2x1", "skipped", "frozen: <requires_grad> & more"],
    ]
    assert text.split("\n\n")[1].splitlines() == [
        "net, 3 convolutions: 2 initialized, 1 skipped",
        "mean normalized similarity 5.000e-01 -> 3.125e-01 (62.5%), norm ratio 0.750000",
        "sum of raw similarity 16 -> 10",
        "1.25 s, no checkpoint written",
    ]


def test_large_sums_are_written_alike():
    large = Report(
        Settings(), [layer("stem", before=BEFORE | {"similarity": 45000.4}, after=AFTER | {"norm_ratio": 1.0})]
    )
    assert "sum of raw similarity 45000 -> 2\n" in str(large)


@pytest.mark.parametrize("width", [60, 72, 80, 100, 200])
@pytest.mark.parametrize("name", ["stem", "stage" * 20], ids=["short", "long"])
@pytest.mark.parametrize("kind", ["changed", "measured", "planned"])
def test_a_table_is_cut_to_a_width_and_says_what_it_left_out(kind, name, width):
    report = {
        "changed": run(),
        "measured": measured(0.5, 0.25),
        "planned": Report(Settings(), [layer("a", Outcome.PLANNED)]),
    }[kind]
    report.layers.append(layer(name, Outcome.SKIPPED, reason="a long story " * 20))
    table = report.table
    rows, summary = table.text(width).split("\n\n")
    assert max(map(len, rows.splitlines())) <= width
    assert len(rows.splitlines()) == len(table.rows) + 1
    whole, whole_summary = table.text().split("\n\n")
    assert "a long story a long" in whole
    left_out = [title for title in table.header if title and title not in rows.splitlines()[0]]
    note = summary.removeprefix(whole_summary).removeprefix("\n")
    assert set(filter(None, note.removeprefix(f"left out to fit {width} columns: ").split(", "))) == set(left_out)
    assert not left_out or width < (100 if name == "stem" else 200)


@pytest.mark.parametrize("report", [run(), measured(0.25)], ids=["run", "measured"])
def test_remarks_stand_below_the_counts(report):
    report.remarks = ["taken from there", "odd\udcff name"]
    counts, *others = str(report).split("\n\n")[1].splitlines()
    assert "3 convolutions: 2 init" in counts or "2 convolutions: 1 measured" in counts
    assert others[:2] == ["taken from there", r"odd\udcff name"]
    assert report.to_dict()["remarks"] == report.remarks


def test_a_measured_model_shows_its_measures_and_their_means():
    table, summary = str(measured(0.25, 0.75)).split("\n\n")
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    assert rows == [
        ["layer", "shape", "similarity", "corr-white", "corr-natural", "rank-natural"],
        ["layer0", "4x3x2x1", "2.500e-01", "-", "-", "0.5000"],
        ["layer1", "4x3x2x1", "7.500e-01", "-", "-", "0.5000"],
        ["odd", "4x3x2x1", "-", "-", "-", "-", "skipped: one filter"],
        ["mean of 2", "5.000e-01", "-", "-", "0.5000"],
    ]
    assert summary.splitlines() == [
        "model, 3 convolutions: 2 measured, 1 skipped",
        "sum of raw similarity 8",
        "0.50 s",
    ]


def test_one_convolution_is_told_as_one():
    assert "\nConv2d, 1 convolution: 1 measured\n" in str(replace(measure(nn.Conv2d(3, 4, 3)), model="Conv2d"))


def test_a_remark_that_all_layers_share_is_made_once():
    text = str(measure(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).state_dict()))
    assert text.count("without groups") == 1
    assert "\neach layer: taken from its shape" in text


def test_the_last_line_says_where_it_was_computed():
    report = run()
    report.device, report.processes = "cuda:0", 3
    assert str(report).splitlines()[-1] == "1.25 s on cuda:0 in 3 processes, no checkpoint written"
    assert report.to_dict()["device"] == "cuda:0"


def test_a_report_of_a_run_names_its_device():
    assert initialize_(nn.Conv2d(3, 4, 3)).device == "cpu"
    assert measure(nn.Conv2d(3, 4, 3)).device is None


HOSTILE = {
    "newline": "stem\nhead.0  4x3x2x1  5.000e-01 -> 1.250e-01",
    "return": "stem\rfine",
    "escape": "\x1b[2J\x1b]0;title\x07",
    "override": "\u202egnp.exe",
    "surrogate": "a\udcff",
    "separator": "a\u2028b\x85c",
    "long": "layer." * 500,
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("outcome", [Outcome.INITIALIZED, Outcome.MEASURED, Outcome.PLANNED], ids=lambda one: one.value)
def test_a_name_is_data_in_every_table(name, outcome):
    before = {} if outcome is Outcome.PLANNED else MEASURED
    after = AFTER | {"norm_ratio": 1.0} if outcome is Outcome.INITIALIZED else {}
    one = layer(name, outcome, before=before, after=after)
    other = layer("plain", Outcome.SKIPPED, reason=f"shares its weight with {name}")
    report = Report(Settings(), [one, other], 1.0, name, remarks=[f"{name} was taken off"])
    report.file, report.file_bytes = name, 5
    plain = copy.deepcopy(report)
    plain.layers = [layer("x", outcome, before=before, after=after), layer("plain", Outcome.SKIPPED, reason="why")]
    plain.model, plain.remarks, plain.file = "model", ["remark"], "file"
    assert len(str(report).splitlines()) == len(str(plain).splitlines())
    assert all(part.isprintable() for part in str(report).split("\n"))
    table = str(report).split("\n\n")[0]
    assert max(map(len, table.splitlines())) < 400
    seen = Page(report._repr_html_()).texts["div"][0]
    assert seen.isprintable()
    assert report.to_dict()["layers"][0]["name"] == name
    assert json.loads(json.dumps(report.to_dict()))["model"] == name


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "='a'!B1"])
def test_no_text_is_a_formula_in_a_spreadsheet(name):
    report = measured(-0.25)
    report.layers[0] = layer(name, Outcome.MEASURED, before={"x": -0.25}, reason=name)
    records = list(csv.DictReader(io.StringIO(as_csv(report.to_records()))))
    assert records[0]["name"] == records[0]["reason"] == "'" + printable(name)
    assert records[0]["x"] == "-0.25"  # a number


def test_a_spreadsheet_gets_one_line_a_layer():
    report = measured(0.25)
    report.layers[0] = layer("a\nb\x1b,c", Outcome.MEASURED, before={"x": 1.0})
    lines = as_csv(report.to_records()).splitlines()
    assert len(lines) == 3
    assert all(map(str.isprintable, lines))


def test_a_plan_shows_outcomes():
    report = Report(Settings(), [layer("", Outcome.PLANNED), layer("b", Outcome.FAILED, reason="why")])
    rows = [re.split(r"\s{2,}", line) for line in str(report).split("\n\n")[0].splitlines()]
    assert rows == [
        ["layer", "shape", "outcome"],
        ["(the model itself)", "4x3x2x1", "planned"],
        ["b", "4x3x2x1", "failed", "why"],
    ]


@pytest.mark.parametrize(("size", "text"), [(2_340_000, "2.3 MB"), (120_000, "0.1 MB"), (1_260, "1.3 kB")])
def test_the_file_is_named_whatever_bytes_its_name_is_made_of(size, text):
    report = run()
    report.file, report.file_bytes = "a\udcff.pt", size
    assert str(report).endswith(rf"1.25 s, a\udcff.pt ({text})")
    str(report).encode()


def test_a_notebook_shows_the_same_escaped():
    report = run()
    report.model = "<script>alert(1)</script>"
    shown = Page(report._repr_html_())
    assert shown.open == []
    assert len(shown.texts["tr"]) == 4
    assert "script" not in shown.texts
    assert "frozen: <requires_grad> & more" in shown.texts["td"]
    assert shown.texts["p"][0].startswith("<script>alert(1)</script>, 3 convolutions: 2 initialized, 1 skipped")


@pytest.mark.parametrize(("layers", "opened"), [(2, True), (150, False)])
def test_a_long_table_is_folded_in_a_notebook(layers, opened):
    assert ("<details open>" in measured(*[0.5] * layers)._repr_html_()) is opened


# Records


def test_records_are_flat_and_have_the_same_keys():
    records = run().to_records()
    assert [list(record) for record in records] == [list(records[0])] * 3
    assert records[0] == {
        "name": "stem",
        "kind": "Conv2d",
        "shape": "4x3x2x1",
        "outcome": "initialized",
        "reason": None,
        "channels": None,
        "factor": None,
        "steps": 2,
        "seconds": 0.5,
        "similarity_before": 8.0,
        "normalized_similarity_before": 0.5,
        "similarity_after": 2.0,
        "normalized_similarity_after": 0.125,
        "norm_ratio_after": 1.0,
    }
    assert records[2]["outcome"] == "skipped"
    assert records[2]["norm_ratio_after"] is None
    assert type(records[0]["outcome"]) is str


def test_records_of_a_measured_model_have_the_measures_bare_names():
    records = measured(0.25).to_records()
    assert records[0]["normalized_similarity"] == 0.25
    assert records[1]["normalized_similarity"] is None
    assert not [key for key in records[0] if key.endswith(("before", "after"))]


def test_records_of_nothing_are_no_records():
    assert Report(Settings(), []).to_records() == []


# Choosing and ordering layers


@pytest.mark.parametrize(
    ("include", "names"),
    [
        ([], ["stem", "head.0", "frozen"]),
        (["head*"], ["head.0"]),
        (["frozen", "s*"], ["stem", "frozen"]),
        (["*"], ["stem", "head.0", "frozen"]),
    ],
    ids=str,
)
def test_layers_are_selected_by_patterns(include, names):
    report = run()
    assert [one.name for one in report.select(include).layers] == names
    assert len(report.layers) == 3
    assert report.select(include).totals["layers"] == len(names)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match=r"no convolution matches 'head'; did you mean 'head\.\*'\?$"):
        run().select(["stem", "head"])
    names = "the convolutions are 'stem', 'head.0', 'frozen'"
    with pytest.raises(InputError, match=rf"no convolution matches 'x\*'; {names}$"):
        run().select(["*", "x*"])
    with pytest.raises(InputError, match=rf"'head0'; {names}: did you mean head.0\?$"):
        run().select(["head0"])


def test_layers_are_ordered_from_high_to_low_and_those_without_a_value_last():
    report = measured(0.25, math.inf, 0.75, 0.25).sorted_by("normalized_similarity")
    assert [one.name for one in report.layers] == ["layer1", "layer2", "layer0", "layer3", "odd"]
    assert [one.name for one in run().sorted_by("normalized_similarity").layers] == ["head.0", "stem", "frozen"]


def test_measures_are_added_where_the_report_has_none_and_replace_none():
    old = Report(Settings(), [layer("stem", Outcome.MEASURED, before={"similarity": -1.0, "x": 1.0})])
    new = Report(Settings(), [layer("frozen", Outcome.MEASURED, before={"x": 9.0}), layer("stem", before={"x": 2.0})])
    report = run().with_measures(old, new)
    assert report.layers[0].before == BEFORE | {"x": 1.0}
    assert report.layers[0].after == AFTER | {"norm_ratio": 1.0, "x": 2.0}
    assert report.layers[1:] == run().layers[1:]


# The file of the full record


def test_the_record_holds_everything_known_of_a_run():
    report = run()
    data = json.loads(record_text(report))
    assert data == run_record(report)
    versions = {"convsim-init": convsim_init.__version__, "torch": torch.__version__}
    assert data["format_version"] == 1
    assert data["versions"] == versions | {"python": platform.python_version()}
    assert [one["losses"] for one in data["layers"]] == [[0.5, 0.3, 0.125], [0.5], []]
    for key, value in report.to_dict().items():
        if key != "layers":
            assert data[key] == value
    for plain, one in zip(data["layers"], report.layers, strict=True):
        assert {key: value for key, value in plain.items() if key != "losses"} == one.to_dict()


def test_the_documents_schema_names_every_field():
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([^`]+)`", text, re.M))
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    before = measure(model)
    record = run_record(initialize_(model).with_measures(before, measure(model)))
    fields = {*record, *record["versions"], *record["settings"], *record["totals"], *record["layers"][0]}
    fields |= record["layers"][0]["after"].keys() | {outcome.value for outcome in Outcome}
    assert documented == fields


def test_numbers_that_json_does_not_have_are_null():
    report = run()
    report.layers[0] = layer("a", before={"similarity": math.inf}, losses=[math.nan, 1.0])
    data = json.loads(record_text(report), parse_constant=pytest.fail)
    assert data["layers"][0]["before"] == {"similarity": None}
    assert data["layers"][0]["losses"] == [None, 1.0]


def test_plain_data_are_ready_for_json_and_the_table_shows_all_numbers():
    report = measured(math.inf, np.float32(0.5))
    report.seed = np.int64(3)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [one["before"].get("normalized_similarity") for one in data["layers"]] == [None, 0.5, None]
    assert data["seed"] == 3
    assert re.search(r"layer0 .* inf ", str(report))


def test_a_report_can_be_copied_and_compared():
    assert copy.deepcopy(run()) == run()
    assert run() != measured(0.5)
