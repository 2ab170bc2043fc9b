"""Imports point one way, and only `xloom/vllm` touches vLLM: docs/structure.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "deployments" / "xloom"
EVERYWHERE = {"deadline", "protocol", "settings", "settings_file", "observability", "watchdog"}
# Package -> the other packages it may import. `front_end` is vllm/front_end: it sits over the router.
ARROWS: dict[str, set[str]] = {
    "deadline": set(),
    "protocol": set(),
    "wire": set(),
    "watchdog": set(),
    "settings": set(),
    "settings_file": set(),
    "observability": set(),
    "storage": set(),
    "quantization": {"mixtures", "sample", "storage"},  # the sample's corpus is what it calibrates on
    "mixtures": set(),
    "compose": {"engines", "mixtures", "quantization", "sample"},
    "engines": {"mixtures", "quantization"},
    "vllm": {"engines", "mixtures", "quantization"},
    "adapters": {"mixtures", "storage"},
    "verification": {"engines", "mixtures", "quantization"},
    "autoscaling": set(),
    "replica": {"engines", "adapters", "verification", "wire"},
    "router": {"adapters", "mixtures", "wire"},
    "front_end": {"router", "vllm", "adapters"},
    "sample": {"compose", "mixtures", "quantization"},
}


def package_of(module: str) -> str:
    """`xloom.vllm.front_end.app` is in `front_end`, `xloom.router.guard` in `router`."""
    parts = module.split(".")
    if parts[1:3] == ["vllm", "front_end"]:
        return "front_end"
    return parts[1] if len(parts) > 1 else ""


def module_of(file: Path) -> str:
    parts = ["xloom", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def imports(file: Path, *, at_import: bool = False) -> set[str]:
    """The modules a file names; with `at_import` those loaded with it, not those inside functions or for types."""
    found: set[str] = set()
    stack: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "xloom"}
        stack.extend(ast.iter_child_nodes(node))
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", [file for file in FILES if package_of(module_of(file)) in ARROWS], ids=module_of)
def test_imports_point_one_way(file: Path) -> None:
    package = package_of(module_of(file))
    allowed = ARROWS[package] | EVERYWHERE | {package}
    if package == "observability":
        allowed = {"protocol", "settings", "observability"}
    packages = {package_of(name) for name in imports(file) if name.split(".")[0] == "xloom"} - {""}
    assert packages <= allowed


def test_every_package_has_its_arrows() -> None:
    packages = {package_of(module_of(file)) for file in FILES}
    above = {
        "",
        "app",
        "cli",
        "commands",
        "launch",
        "start",
        "stages",
        "processes",
        "preflight",
    }  # these may import any package
    assert packages - above == set(ARROWS)


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_its_package_touches_vllm(file: Path) -> None:
    if file.is_relative_to(PACKAGE / "vllm"):
        return
    assert [name for name in imports(file) if name.split(".")[0] == "vllm"] == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_the_mixtures_know_neither_vllm_nor_ray(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports(file)}
    if file.is_relative_to(PACKAGE / "mixtures"):
        assert not roots & {"vllm", "ray"}


# Those that a process without vLLM and Ray imports; `xloom.vllm` itself is reached by name, through the registry.
LIGHT = [
    file for file in FILES if package_of(module_of(file)) not in ("vllm", "front_end", "adapters", "replica", "app")
]


@pytest.mark.parametrize("file", LIGHT, ids=module_of)
def test_what_is_light_loads_neither_vllm_nor_ray(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports(file, at_import=True)}
    assert not roots & {"vllm", "ray"}


def modules_at_import(name: str, seen: set[str]) -> set[str]:
    """The modules of xloom that importing one loads."""
    if name in seen:
        return seen
    base = PACKAGE.joinpath(*name.split(".")[1:])
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not file.is_file():
        return seen
    seen.add(name)
    for each in imports(file, at_import=True):
        if each.split(".")[0] == "xloom":
            modules_at_import(each, seen)
    return seen


def test_a_driver_that_deploys_loads_neither_torch_nor_vllm() -> None:
    # What `build` in app.py imports: the actors' classes, and the front end that the router is handed.
    modules: set[str] = set()
    for name in ("xloom.app", "xloom.start", "xloom.replica.actor", "xloom.router.deployment", "xloom.vllm.front_end"):
        modules_at_import(name, modules)
    assert len(modules) > 20
    for name in modules:
        base = PACKAGE.joinpath(*name.split(".")[1:])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        assert not {each.split(".")[0] for each in imports(file, at_import=True)} & {"torch", "vllm", "transformers"}, (
            name
        )


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_no_module_imports_itself_in_a_circle(file: Path) -> None:
    name = module_of(file)
    seen: set[str] = set()
    for each in imports(file):
        if each.split(".")[0] == "xloom" and each != name:
            modules_at_import(each, seen)
    assert name not in seen or file.name == "__init__.py"
