"""The repository keeps its own rules: what imports what, what needs what, and a README whose examples run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
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


PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To a file or folder that is there, and to a heading that it has."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in names, f"{link}: no such heading"


def test_pages_name_results_that_are_there() -> None:
    for page in PAGES:
        for folder in re.findall(r"\bh[12]00-20\d\d-\d\d-\d\d(?:-[a-z]+)?", page.read_text()):
            assert (ROOT / "benchmarks" / "results" / folder).is_dir(), f"{page}: {folder}"


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


def _readme_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_readme_examples_run() -> None:
    """The blocks run in order, as a reader would type them."""
    blocks = _readme_blocks()
    assert blocks
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
