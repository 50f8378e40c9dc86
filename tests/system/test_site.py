"""The documentation site is whole, and needs no other host."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import convsim_init

ROOT = Path(__file__).parents[2]


class Loads(HTMLParser):
    """Addresses that a browser loads to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag != "a" and values.get("rel") not in ("canonical", "next", "prev"):
            self.addresses += [values[name] for name in ("src", "href", "srcset", "data") if values.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_no_page_loads_anything_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.addresses
        outside = [address for address in loads.addresses if re.match(r"(\w+:)?//", address)]
        assert outside == [], page


def test_style_sheets_load_nothing_from_another_host(site):
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        assert not re.search(r"url\([\"']?(\w+:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.parametrize("name", sorted(set(convsim_init.__all__) - {"__version__"}))
def test_the_reference_has_every_public_name(name, site):
    assert f'id="convsim_init.{name}"' in (site / "api.html").read_text(encoding="utf-8")


def test_pages_outside_of_docs_are_part_of_it(site):
    assert 'href="CONTRIBUTING.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "CONTRIBUTING.html").is_file()
    assert (site / "examples" / "ddp_train.py").read_bytes() == (ROOT / "examples" / "ddp_train.py").read_bytes()
