"""What the hosting service and package indexes read: citation, workflows, issue forms, versions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import convsim_init

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        pytest.param("vendor.citation-file-format", "CITATION.cff", id="citation"),
        pytest.param("vendor.github-workflows", ".github/workflows/*.yml", id="workflows"),
        pytest.param("custom.github-workflows-require-timeout", ".github/workflows/*.yml", id="timeouts"),
        pytest.param("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml", id="issue-forms"),
        pytest.param("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml", id="issue-config"),
    ],
)
def test_files_follow_their_schema(schema, pattern):
    pytest.importorskip("check_jsonschema")
    files = sorted(ROOT.glob(pattern))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_names_this_version():
    assert (
        re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
        == convsim_init.__version__
    )


def test_the_workflows_run_every_check_that_lands_a_change():
    workflows = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    targets = re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(targets) >= 4
    for target in set(targets) - {"test"}:  # run without make, which needs the layout of Unix environments
        assert f"make {target}" in workflows
    assert "python -m pytest" in workflows
