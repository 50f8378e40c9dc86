"""The page of a run: what it shows, that names are data, that it loads and runs nothing."""

import base64
import hashlib
import re

import pytest
from page import Page

from convsim_init import LayerReport, Outcome, Report, Settings
from convsim_init.report.html import page

BEFORE = {"similarity": 8.0, "normalized_similarity": 0.5, "feature_correlation_natural": 0.25}
AFTER = {"similarity": 2.0, "normalized_similarity": 1.25e-5, "feature_correlation_natural": 0.0625, "norm_ratio": 1.0}
PICTURE = "data:image/png;base64,AAAA"
HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table></script><img src=x onerror=alert(2)>",
    "\"onmouseover='alert(3)'",
    "$style $title ${script}",
    "&lt;b&gt;",
    "\u202egnp.\nrow\x00",
    "\udcff",
]


def run(*names: str, model: str = "net") -> Report:
    layers = [
        LayerReport(name, "Conv2d", [4, 3, 2, 1], Outcome.INITIALIZED, None, 2, 0.5, BEFORE, AFTER, [0.5, 0.3, 0.1])
        for name in names
    ]
    layers.append(LayerReport("frozen", "Conv2d", [1], Outcome.SKIPPED, "frozen: <requires_grad> & more"))
    return Report(Settings(steps=7), layers, 1.25, model, 3, remarks=["a <remark>"])


def test_the_page_shows_layers_pictures_settings_and_versions():
    shown = Page(page(run("stem", "head"), {"stem": {"filters before": PICTURE, "filters after": PICTURE}}))
    assert shown.open == []
    heads = ["layer", "shape", "outcome", "similarity", "after", "corr-natural", "after", "norm ratio", "steps"]
    assert shown.texts["th"] == [*heads, "seconds", "remark"]
    cells = ["stem", "4x3x2x1", "initialized", "0.5", "1.25e-05", "0.25", "0.0625", "1", "2", "0.5", ""]
    assert shown.texts["td"][:11] == cells
    assert shown.texts["td"][-11:-8] == ["frozen", "1", "skipped"]
    assert shown.texts["td"][-1] == "frozen: <requires_grad> & more"
    assert [attributes["src"] for tag, attributes in shown.elements if tag == "img"] == [PICTURE] * 2
    assert shown.texts["figcaption"] == ["filters before", "filters after", *["loss by step, logarithmic"] * 2]
    terms = dict(zip(shown.texts["dt"], shown.texts["dd"], strict=True))
    assert (terms["model"], terms["seed"], terms["steps"], terms["file"]) == ("net", "3", "7", "-")
    assert {"convsim-init", "torch", "python"} <= terms.keys()
    assert "a <remark>" in shown.texts["p"][0]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_name_is_data_and_runs_nothing(name):
    text = page(run(name, model=name), {name: {"filters before": PICTURE}})
    text.encode()
    plain = Page(page(run("stem", model="net"), {"stem": {"filters before": PICTURE}}))
    shown = Page(text)
    assert shown.open == []
    tags = [(tag, sorted(attributes)) for tag, attributes in shown.elements]
    assert tags == [(tag, sorted(attributes)) for tag, attributes in plain.elements]
    assert shown.texts["script"] == plain.texts["script"]
    printed = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)
    assert shown.texts["td"][0] == shown.texts["h1"][0] == printed


def test_nothing_is_loaded_and_only_the_pages_own_script_and_style_count():
    text = page(run("stem"), {"stem": {"filters before": PICTURE}})
    shown = Page(text)
    assert not re.search(r"https?:|//\w|url\(|@import", text)
    assert {
        value for _, attributes in shown.elements for key, value in attributes.items() if key in ("src", "href")
    } == {PICTURE}
    assert not [key for _, attributes in shown.elements for key in attributes if key.startswith("on") or key == "style"]
    (policy,) = [one["content"] for tag, one in shown.elements if one.get("http-equiv") == "Content-Security-Policy"]
    hashes = {
        tag: base64.b64encode(hashlib.sha256(shown.texts[tag][0].encode()).digest()).decode()
        for tag in ("script", "style")
    }
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'"
    )


@pytest.mark.parametrize("losses", [[], [0.5], [0.0, 0.0], [1.0, 0.0], [2.0, 1.0, 0.5]])
def test_a_loss_is_drawn_whatever_it_is(losses):
    layer = LayerReport("a", "Conv2d", [1], Outcome.INITIALIZED, before=BEFORE, after=AFTER, losses=losses)
    text = page(Report(Settings(), [layer]), {})
    assert text.count("<polyline") == (len(losses) > 1)
    assert not re.search("nan|inf", text.split("<polyline")[-1].split("/>")[0])
