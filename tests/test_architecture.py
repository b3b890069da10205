"""The house stays as it is drawn: imports point down, models are functions, the README's tree is true."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tiglon"
MODULES = sorted(SOURCE.rglob("*.py"))

# What each part may import beside itself. Anything may import types, errors and threads.
ALLOWED = {
    "types": set(),
    "errors": set(),
    "threads": set(),
    "data": set(),
    "evaluation": set(),
    "train": set(),
    "nn": set(),
    "semantic_ids": set(),
    "retrieval": {"semantic_ids", "nn", "data", "train", "evaluation"},
    "ranking": {"semantic_ids", "nn", "data", "train", "evaluation"},
    "llm": {"data"},
    "serving": {"llm", "retrieval", "ranking", "semantic_ids", "nn", "data", "train", "evaluation", ""},
}
FACE = {"recipes", "cli", "terminal", "demo", "doctor", ""}  # may import everything below
PAPERS = ["retrieval/tiger_causal.py", "retrieval/tiger_paper.py"]
PURE = [*(SOURCE / paper for paper in PAPERS), *sorted((SOURCE / "nn").glob("*.py"))]


def part(path: Path) -> str:
    """ "data" of src/tiglon/data/events.py, "cli" of src/tiglon/cli.py, "" of the package itself."""
    name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield f"{node.module}"
            if node.module == "tiglon":
                yield from (f"tiglon.{alias.name}" for alias in node.names)


def own_parts(path: Path) -> set[str]:
    """The parts of Tiglon that a file imports."""
    named = [name.split(".") for name in imports(path)]
    return {words[1] if len(words) > 1 else "" for words in named if words[0] == "tiglon"}


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    here = part(path)
    if here in FACE:
        return
    wrong = own_parts(path) - ALLOWED[here] - {here, "types", "errors", "threads"}
    assert not wrong, f"{here} imports {', '.join(sorted(wrong))}"


def test_the_rules_name_every_part():
    assert {part(path) for path in MODULES} <= set(ALLOWED) | FACE


def test_the_command_line_only_parses_arguments():
    """Torch is not among what `tiglon --help` must wait for."""
    tree = ast.parse((SOURCE / "cli.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("tiglon")} == {"tiglon.errors"}
    assert not {"torch", "polars", "numpy"} & modules


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_pickled_or_evaluated(path):
    text = path.read_text(encoding="utf-8")
    assert not {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"} & {
        name.split(".")[0] for name in imports(path)
    }
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not {"eval", "exec"} & calls
    assert not re.search(r"torch\.(save|load)\(|allow_pickle=True", text)


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_models_are_functions_of_tensors(path):
    """No files, no optimizer, no device, no metric."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bopen\(|\bPath\(|save_file|load_file|torch\.optim|\.cuda\(|device=", text)
    assert not own_parts(path) & {"data", "train", "evaluation"}


@pytest.mark.parametrize("path", [SOURCE / paper for paper in PAPERS], ids=name_of)
def test_papers_do_not_import_papers(path):
    others = {"tiglon." + paper.removesuffix(".py").replace("/", ".") for paper in PAPERS}
    assert not others & set(imports(path))


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__init__.py"], ids=name_of)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_the_readmes_tree_is_true():
    """Every path that the tree names is there, and every module stands in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("```text tree\n")[1].split("```")[0]
    named = set()
    folders: list[str] = []
    for line in block.splitlines():
        if not line.strip():
            continue
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        paths = list(
            itertools.takewhile(re.compile(r"\S+/|\S+\.\w+|Makefile|LICENSE").fullmatch, line.split())
        )
        named |= {"".join(folders) + path for path in paths}
        if paths[0].endswith("/"):
            folders.append(paths[0])
    missing = [path for path in sorted(named) if not (ROOT / path).exists()]
    assert not missing, missing
    modules = {str(path.relative_to(ROOT)) for path in MODULES if path.name != "__init__.py"}
    assert not modules - named, sorted(modules - named)


def test_tests_mirror_the_tree():
    """A test file stands where what it tests does."""
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir()}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.relative_to(ROOT / "tests").parts[0]
        assert folder in packages | {"contracts", path.name}, path
