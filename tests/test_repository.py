"""The repository keeps its own rules: what imports what, what needs what, and a README whose examples run."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxmoe
from jaxmoe.__main__ import COMMANDS, main
from jaxmoe.implementation import default_implementation

ROOT = Path(__file__).parents[1]
OURS = ("kernels_pallas", "jaxmoe", "bridge", "benchmarks")
# Spec, section 1: what each package may import of the others and of the frameworks.
MAY_IMPORT = {
    "kernels_pallas": {"jax"},
    "jaxmoe": {"jax", "kernels_pallas"},
    "bridge": {"jax", "kernels_pallas", "jaxmoe", "torch", "transformers"},
}
WATCHED = {*OURS, "jax", "torch", "transformers", "tests"}


def _imports(path: Path) -> set[str]:
    """The packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module).split(".")[0])
    return found


def _run_without(blocked: tuple[str, ...], code: str) -> None:
    """Runs `code` in a fresh interpreter in which the blocked packages cannot be imported."""
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    done = subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_one_way(package: str) -> None:
    """kernels_pallas <- jaxmoe <- bridge; jaxmoe never imports torch."""
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = (_imports(path) & WATCHED) - MAY_IMPORT[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_jaxmoe_works_without_torch() -> None:
    """A JAX user need not install torch, nor triton."""
    _run_without(
        ("torch", "triton", "transformers"),
        "import jax.numpy as jnp, jaxmoe\n"
        "config = jaxmoe.RoutingConfig(num_experts=8, top_k=2)\n"
        "assert jaxmoe.route(jnp.ones((3, 8)), config=config).experts.tolist() == [[0, 1]] * 3\n",
    )


def test_bridge_works_without_transformers() -> None:
    pytest.importorskip("torch", reason="needs the torch package")
    _run_without(("transformers",), "import bridge\nassert callable(bridge.route)\n")


def test_private_names_of_jax_stand_in_one_file() -> None:
    """jax._src and jaxlib change without notice; kernels_pallas/targets.py alone deals with them."""
    private = re.compile(r"^\s*(from|import) (jax\._src|jaxlib)", re.M)
    files = [path for package in OURS for path in (ROOT / package).rglob("*.py")]
    assert [str(p.relative_to(ROOT)) for p in files if private.search(p.read_text())] == ["kernels_pallas/targets.py"]


def test_one_warning_is_silenced_and_in_one_place() -> None:
    """Only the deprecation of Pallas' Triton backend, where it is launched; pytest's twin says the same."""
    files = [path for package in OURS for path in (ROOT / package).rglob("*.py")]
    silencing = re.compile(r"\b(filterwarnings|simplefilter|catch_warnings)\(")
    found = [str(p.relative_to(ROOT)) for p in files if silencing.search(p.read_text())]
    assert found == ["kernels_pallas/launch.py"]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["filterwarnings"][0] == "error"
    assert "ignore:The Pallas Triton backend is deprecated:DeprecationWarning" in settings["filterwarnings"]


def test_every_package_is_packed_and_type_checked() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert settings["setuptools"]["packages"]["find"]["include"] == [f"{name}*" for name in OURS]
    assert settings["mypy"]["packages"] == list(OURS)
    typed = {path.parent.name for path in ROOT.glob("*/py.typed")}
    assert typed == {*OURS} - {"benchmarks"}, "the API is typed"


def test_distributions(tmp_path: Path) -> None:
    """The source's tests can be run, from its files alone; what is installed says that it is typed, and has no more."""
    pytest.importorskip("setuptools", minversion="77", reason="needs what pyproject.toml builds with")
    source, built = tmp_path / "source", tmp_path / "built"
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "*_output")
    shutil.copytree(ROOT, source, ignore=left_out)
    built.mkdir()
    build = f"from setuptools import build_meta as b; b.build_sdist({str(built)!r}); b.build_wheel({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    code = {str(path) for path in files if path.parts[0] in OURS and path.suffix == ".py"}
    beside = {str(path) for path in files if path.parts[0] in ("tests", "docs", "examples")}
    assert code | beside | {"README.md", "LICENSE", "Makefile", "pyproject.toml"} <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith("benchmarks/results")]

    with zipfile.ZipFile(wheel) as file:
        installed = {name for name in file.namelist() if ".dist-info/" not in name}
        file.extractall(tmp_path / "site")
    assert installed == code | {f"{name}/py.typed" for name in OURS if name != "benchmarks"}

    where = "from benchmarks import bench; print(bench.ROOT, bench.RESULTS.resolve(), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.check_output([sys.executable, "-c", where], cwd=tmp_path, env=environment, text=True)
    root, results = found.splitlines()
    assert root == str(tmp_path / "site")
    assert Path(results).parent == tmp_path, "results of what is installed go where the user is"


def test_extras_bring_what_they_need() -> None:
    """torch, where the command or the module imports it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all("jaxmoe[torch]" in extras[name] for name in ("huggingface", "bench", "demo"))
    for command in COMMANDS.values():
        assert bool(command.extra) == (not command.module.startswith("jaxmoe.")), command
        assert not command.extra or command.extra in extras


def test_without_torch() -> None:
    """What needs it says which extra brings it."""
    remedy = "torch is not installed: pip install 'jaxmoe[{}]'"
    _run_without(
        ("torch",),
        "import contextlib, io\n"
        "from jaxmoe.__main__ import main\n"
        "for command, extra in (('audit', 'torch'), ('demo', 'demo')):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        try: main([command, '--help'])\n"
        "        except SystemExit as stopped: assert stopped.code == 2\n"
        f"    assert {remedy!r}.format(extra) in said.getvalue(), said.getvalue()\n"
        "for module in ('bridge', 'bridge.compat.vllm'):\n"
        "    try: __import__(module)\n"
        "    except ModuleNotFoundError as error: found = error\n"
        "    assert str(found) == \"bridge needs torch: pip install 'jaxmoe[torch]'\", found\n"
        "    assert found.name == 'torch'\n",
    )


RESULTS = ROOT / "benchmarks" / "results"  # which a source distribution does not have
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file or folder that is there, and to a heading that it has."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not RESULTS.exists() and target.resolve().is_relative_to(RESULTS):
            continue
        assert target.exists(), f"{link}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in names, f"{link}: no such heading"


@pytest.mark.skipif(not RESULTS.exists(), reason="a source distribution has no results")
def test_pages_name_results_that_are_there() -> None:
    for page in PAGES:
        for folder in re.findall(r"\bh[12]00-20\d\d-\d\d-\d\d(?:-[a-z]+)?", page.read_text()):
            assert (RESULTS / folder).is_dir(), f"{page}: {folder}"


def test_info_lists_every_function(capsys: pytest.CaptureFixture[str]) -> None:
    """A function that joins the API must say what runs it."""
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    chosen, why = default_implementation()
    functions = {name for name in jaxmoe.__all__ if callable(getattr(jaxmoe, name)) and name.islower()}
    assert functions == set(re.findall(r"^  (\w+) +(?:pallas|xla) ", out, re.M))
    assert re.search(rf"^  route +{chosen} +{re.escape(why)}$", out, re.M)


def test_default_implementation_is_what_runs() -> None:
    """What `info` says is what `implementation=None` lowers to on this machine."""
    import jax

    config = jaxmoe.RoutingConfig(num_experts=8, top_k=2)
    text = jax.jit(lambda x: jaxmoe.route(x, config=config).experts).lower(jax.numpy.ones((3, 8))).as_text()
    assert ("triton" in text) == (default_implementation()[0] == "pallas")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert "beside transformers' own; needs jaxmoe[torch]\n" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"jaxmoe {jaxmoe.__version__}\n"


def _readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_readme_examples_run() -> None:
    """The blocks run in order, as a reader would type them."""
    blocks = _readme_blocks()
    assert blocks
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
