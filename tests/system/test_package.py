"""What is installed, what an import costs, and which module may import which."""

import ast
import email
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import convsim_init

ROOT = Path(__file__).parents[2]
PROGRAMS, EXE, LIBRARIES = (  # in an environment
    ("Scripts", ".exe", "Lib/site-packages") if os.name == "nt" else ("bin", "", "lib/python*/site-packages")
)
SOURCES = {
    **{path.relative_to(ROOT).as_posix(): path for path in (ROOT / "convsim_init").rglob("*.py")},
    **{f"convsim_init/{path.relative_to(ROOT).as_posix()}": path for path in (ROOT / "cli").rglob("*.py")},
}
MODULES = {path[:-3].replace("/", ".").removesuffix(".__init__"): source for path, source in SOURCES.items()}


def run_python(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What is installed


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it, so that both are shown to be complete."""
    folder = tmp_path_factory.mktemp("build")  # a copy: building litters its folder, and takes up old litter
    for name in ("convsim_init", "cli"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    run_python("-c", "from setuptools import build_meta; build_meta.build_sdist('.')", cwd=folder)
    (archive,) = folder.glob("*.tar.gz")
    run_python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", archive, cwd=folder)
    (built,) = folder.glob("*.whl")
    return archive, built


@pytest.fixture
def wheel(archives) -> Path:
    return archives[1]


def test_the_wheel_holds_exactly_the_package(wheel):
    about = f"convsim_init-{convsim_init.__version__}.dist-info/"
    files = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    in_c = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("convsim_init/backends/*.c")}
    expected = {*SOURCES, *in_c, "convsim_init/py.typed", *(about + name for name in files)}
    if shutil.which("gcc" if os.name == "nt" else "cc"):
        expected.add("convsim_init/backends/_step.so")
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == expected
        assert archive.read(f"{about}top_level.txt").decode().split() == ["convsim_init"]
        assert "convsim-init = convsim_init.cli.main:main" in archive.read(f"{about}entry_points.txt").decode()
        metadata = email.message_from_bytes(archive.read(f"{about}METADATA"))
        for name, path in SOURCES.items():
            assert archive.read(name) == path.read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_wheel_is_for_every_python_of_its_platform(wheel):
    assert re.fullmatch(rf"convsim_init-{re.escape(convsim_init.__version__)}-py3-none-(?!any)\w+\.whl", wheel.name)


@pytest.mark.parametrize("kind", ["source distribution", "wheel"])
def test_it_is_installed_in_a_clean_environment(kind, archives, tmp_path):
    run_python("-m", "venv", "--without-pip", tmp_path / "clean", cwd=tmp_path)
    python, command = (tmp_path / "clean" / PROGRAMS / f"{name}{EXE}" for name in ("python", "convsim-init"))
    (rest,) = (tmp_path / "clean").glob(LIBRARIES)
    (rest / "rest.pth").write_text(sysconfig.get_paths()["purelib"])  # what it depends on; not the editable install
    archive = archives[kind == "wheel"]
    pip = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--no-build-isolation"]
    run_python(*pip, "--ignore-installed", archive, cwd=tmp_path)
    done = subprocess.run([command, "list", "vgg11"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("vgg11 ")
    code = "import convsim_init.cli as cli, convsim_init; print(cli.__file__, convsim_init.__file__)"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert all(Path(path).is_relative_to(rest) for path in where.split())


def test_without_a_compiler_the_package_is_installed_all_the_same(archives, tmp_path):
    pip = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run_python(*pip, archives[0], cwd=tmp_path, CC="false")
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert not [name for name in archive.namelist() if "_step" in name]
        archive.extractall(tmp_path / "site")
    told = run_python("-m", "convsim_init", "env", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert re.search(r"^step +in torch's operations: \S+[/\\]_step\.so was not compiled$", told, re.MULTILINE)


WHERE = """
import importlib.util, convsim_init, convsim_init.cli.main
print(importlib.util.find_spec("cli"), convsim_init.__file__, convsim_init.cli.__file__, sep="\\n")
"""


def test_the_wheel_runs_and_installs_no_top_level_cli(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    top, package, cli = run_python("-c", WHERE, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert top == "None"
    assert Path(package) == site / "convsim_init" / "__init__.py"
    assert Path(cli) == site / "convsim_init" / "cli" / "__init__.py"
    listed = run_python("-m", "convsim_init", "list", "vgg11", cwd=tmp_path, PYTHONPATH=str(site))
    assert listed.startswith("vgg11 ")


def test_what_is_installed_here_has_no_top_level_cli_either(tmp_path):
    top, package, cli = run_python("-c", WHERE, cwd=tmp_path).splitlines()
    assert top == "None"
    assert Path(package) == Path(convsim_init.__file__)
    assert Path(cli).parent.name == "cli"
    installed = Path(package).parents[1] / "cli"
    assert not installed.exists() or installed == ROOT / "cli"  # the sources, where the install is editable


# What an import costs

HEAVY = {"torch", "torchvision", "timm", "matplotlib", "triton", "numpy", "safetensors", "tqdm", "click"}
IMPORTED = "; import sys; print(*sorted(sys.modules))"


@pytest.mark.parametrize(
    ("statement", "kept_out"),
    [
        pytest.param("import convsim_init", HEAVY, id="package"),
        pytest.param("import convsim_init; dir(convsim_init)", HEAVY, id="dir"),
        pytest.param("from convsim_init import Settings, Report, InputError, build_model", HEAVY, id="light-names"),
        pytest.param("import convsim_init.cli.main", HEAVY - {"click"}, id="command"),
        pytest.param(
            "from convsim_init import *; import convsim_init.metrics.measure, convsim_init.models.zoo.resnet",
            {"torchvision", "timm", "matplotlib", "click"},
            id="everything",
        ),
    ],
)
def test_imports_are_no_heavier_than_need_be(statement, kept_out, tmp_path):
    imported = run_python("-c", statement + IMPORTED, cwd=tmp_path).split()
    assert "convsim_init" in imported
    assert kept_out & set(imported) == set()


# The public names


@pytest.mark.parametrize("name", convsim_init.__all__)
def test_public_names_are_there_and_explained(name):
    value = getattr(convsim_init, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("convsim_init.")
        assert value.__doc__
        assert not value.__doc__.startswith(f"{name}(")  # what dataclasses write where nobody wrote anything


def test_the_list_of_public_names_is_whole_and_in_order():
    assert convsim_init.__all__ == sorted(convsim_init.__all__)
    assert dir(convsim_init) == convsim_init.__all__
    typed = next(node for node in ast.parse(MODULES["convsim_init"].read_bytes()).body if isinstance(node, ast.If))
    declared = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared | {"__version__"} == set(convsim_init.__all__)  # type checkers see what users get


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'convsim_init' has no attribute 'nothing'"):
        convsim_init.nothing  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_for(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_bytes()))


# Which folder may import which

LEVELS = [  # a folder, or a file at the top of the package, may import itself and what stands above it
    {"errors"},
    {"version", "settings"},
    {"files"},
    {"functional"},
    {"report"},
    {"backends", "layers"},
    {"models", "tracking", "parallel", "checkpoint", "schemes"},
    {"optim", "metrics", "regularizer"},
    {"treat", "plotting", "devices"},
    {"initialize"},
    {"context"},
    {"cli"},
    {"convsim_init", "__main__"},
]


def folder_of(module: str) -> str:
    """The name in `LEVELS` that a module goes by."""
    name = module.removeprefix("convsim_init.")
    (folder,) = {folder for level in LEVELS for folder in level if f"{name}.".startswith(f"{folder}.")}
    return folder


def level_of(module: str) -> int:
    return next(number for number, level in enumerate(LEVELS) if folder_of(module) in level)


def imports_of(module: str) -> Iterator[tuple[str, str]]:
    """Every module that a module imports, anywhere in it, and the name that it takes from it."""
    for node in ast.walk(ast.parse(MODULES[module].read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield (inner, "") if inner in MODULES else (origin, alias.name)


def own_imports_of(module: str) -> set[str]:
    return {name for name, _ in imports_of(module) if name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for imported in own_imports_of(module):
        inside = folder_of(imported) == folder_of(module)
        assert inside or level_of(imported) < level_of(module), f"{module} imports {imported}"


def test_contributors_are_told_this_order():
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    levels = {name: level_of(name) for _, name in rows}
    assert {path.name for path in (ROOT / "convsim_init").iterdir() if (path / "__init__.py").is_file()} < set(levels)
    for (one, name), (other, above) in itertools.product(rows, rows):
        assert int(one) >= int(other) or levels[name] < levels[above], f"{name}, {above}"


def test_imports_do_not_go_in_circles():
    inner = {module: own_imports_of(module) for module in MODULES if module != "convsim_init"}
    assert len(list(TopologicalSorter(inner).static_order())) == len(inner)


@pytest.mark.parametrize(
    ("package", "folders"),
    [
        pytest.param("click", {"cli"}, id="click"),
        pytest.param("click_default_group", {"cli"}, id="click-default-group"),
        pytest.param("safetensors", {"checkpoint"}, id="safetensors"),
        pytest.param("tqdm", {"initialize", "cli"}, id="tqdm"),
        pytest.param(
            "torch.nn",
            {"layers", "parallel", "metrics", "models", "checkpoint", "schemes", "optim", "regularizer", "initialize"}
            | {"tracking", "context", "plotting"},
            id="modules-of-torch",
        ),
        pytest.param("matplotlib", {"plotting"}, id="matplotlib"),
        pytest.param("triton", {"backends"}, id="triton"),
        *(pytest.param(name, set(), id=name) for name in ("torchvision", "timm")),
    ],
)
def test_packages_are_imported_only_where_they_belong(package, folders):
    found = set()
    for module in MODULES:
        for name, taken in imports_of(module):
            if f"{name}.{taken}.".startswith(f"{package}."):
                found.add(folder_of(module))
    assert found <= folders
    assert found or not folders  # a rule for what nobody imports says nothing
