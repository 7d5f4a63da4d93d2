"""The house rules, read off the syntax trees: who may import whom, and what no file may hold."""

from __future__ import annotations

import ast
import doctest
import importlib
import operator
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {
    "config": 0,
    "conformal": 0,
    "coresets": 0,
    "drawn_defects": 0,
    "evaluation": 0,
    "files": 0,
    "layers": 0,
    "plots": 0,
    "scripts": 0,
    "engine": 1,
    "image_files": 1,
    "perceptual_loss": 1,
    "series_generator": 1,
    "series_plots": 1,
    "streams": 0,
    "tiles": 0,
    "checkpoints": 2,
    "demo_textures": 2,
    "image_folders": 2,
    "data_loader": 3,
    "data_loader_supervised": 4,
    "defect_maps": 4,
    "plot_calibration": 4,
    "plot_strokes": 4,
    "vae_model": 4,
    "classifier_data": 5,
    "crop_training": 5,
    "detail_training": 5,
    "trimming": 5,
    "vae_classifier": 5,
    "classifier_training": 6,
    "detail_data": 6,
    "latent_space": 6,
    "train_with_validation": 7,
    "test_vae": 7,
    "classify_images": 7,
    "train_vae_classifier": 7,
    "inference_vae_classifier": 7,
}
SAME_LEVEL = {
    ("evaluation", "config"),
    ("plots", "config"),
    ("plots", "files"),
    ("files", "config"),
    ("scripts", "config"),
    ("defect_maps", "vae_model"),
    ("plot_calibration", "plot_strokes"),
}
"""Arrows within a level, each named here, so that a new one is a decision; together they have no circle."""
PRINTS = {
    "data_loader": {"main"},
    "data_loader_supervised": {"render_main", "generate_main", "run"},
    "perceptual_loss": {"fetch_weights"},
    "scripts": {"_run", "_without_traceback_when_interrupted"},
}
"""Functions outside the stages that may print: those that run only when the file is run as a command."""
NOTEBOOKS = {
    "vae_model": {"DetailVAE", "load_detail_vae"},
    "perceptual_loss": {"PerceptualLoss"},
    "data_loader": {"load_images", "MVTecFolder"},
    "classify_images": {"load_detector", "classify_folder"},
    "vae_classifier": {"VAEClassifier"},
    "inference_vae_classifier": {"load_vae_classifier", "predict_single_image", "batch_predict", "predict_from_csv"},
}
"""Names that notebooks import, and from where, wherever they live."""
KWARGS = {("config", "replace")}
"""Functions that may take ** arguments: each hands them on to something that checks their names."""

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
STAGES = [name for name in TREES if LEVELS.get(name) == max(LEVELS.values())]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
each_module = pytest.mark.parametrize("name", TREES)


def nodes(name, *kinds):
    return [node for node in ast.walk(TREES[name]) if isinstance(node, kinds)]


def imported(name):
    """Top names of all imports, those inside functions too."""
    return imported_by(nodes(name, ast.Import, ast.ImportFrom))


def imported_by(statements):
    return {
        each.split(".")[0]
        for node in statements
        for each in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }


def parts(node):
    """a.b.c as ["a", "b", "c"]; [] for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    return [*parts(node.value), node.attr] if isinstance(node, ast.Attribute) and parts(node.value) else []


def test_every_module_has_a_level():
    assert TREES.keys() == LEVELS.keys()
    assert {"config", "engine", "vae_model", "train_with_validation"} <= TREES.keys()


def test_named_arrows_within_a_level_are_level_and_have_no_circle():
    assert all(LEVELS[a] == LEVELS[b] for a, b in SAME_LEVEL)
    left = set(SAME_LEVEL)
    while left:
        ends = {(a, b) for a, b in left if b not in {first for first, _ in left}}
        assert ends, f"a circle among {left}"
        left -= ends


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if ">>> " in source])
def test_examples_in_docstrings_are_true(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted and not failed


@each_module
def test_imports_only_go_down(name):
    for other in imported(name) & LEVELS.keys():
        assert LEVELS[other] < LEVELS[name] or (name, other) in SAME_LEVEL, f"{name} imports {other}"


@each_module
def test_no_relative_or_star_imports(name):
    for node in nodes(name, ast.ImportFrom):
        assert node.level == 0 and all(alias.name != "*" for alias in node.names)


@pytest.mark.parametrize("name", STAGES)
def test_stages_never_import_one_another(name):
    assert not imported(name) & (set(STAGES) | {f"{ROOT.name}.{stage}" for stage in STAGES})


@each_module
def test_heavy_libraries_have_one_home(name):
    if name != "plots":
        assert not imported(name) & {"matplotlib", "seaborn"}
    if name != "config":
        assert not imported(name) & {"argparse", "yaml"}
    if name in ("config", "scripts"):
        assert not imported(name) & {"torch", "numpy", "cv2"}
    if name != "series_generator":
        assert "betise" not in imported(name)
    # imported where they are used: classifying needs none of them, and would start a second later
    at_import = {node for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert not imported_by(at_import) & {"pandas", "scipy", "sklearn", "torchvision"}


@each_module
def test_no_argument_sinks(name):
    sinks = {node.name for node in nodes(name, *FUNCTION) if node.args.kwarg}
    sinks |= {"lambda" for node in nodes(name, ast.Lambda) if node.args.kwarg}
    assert {(name, sink) for sink in sinks} <= KWARGS


@each_module
def test_no_error_is_swallowed_whole(name):
    for node in nodes(name, ast.ExceptHandler):
        assert node.type is not None, f"{name}.py:{node.lineno}: bare except"
        caught = {parts(each)[-1] for each in getattr(node.type, "elts", [node.type]) if parts(each)}
        if caught & {"Exception", "BaseException"}:
            assert any(isinstance(inner, ast.Raise) for inner in ast.walk(node)), f"{name}.py:{node.lineno}"


@each_module
def test_files_are_never_opened_in_a_way_that_could_run_code(name):
    for node in nodes(name, ast.Call):
        called = parts(node.func)
        if called[-1:] == ["load"] and called[0] == "torch":
            safe = {keyword.arg: keyword.value for keyword in node.keywords}.get("weights_only")
            assert isinstance(safe, ast.Constant) and safe.value is True, f"{name}.py:{node.lineno}"
        assert called not in (
            ["eval"],
            ["exec"],
            ["pickle", "load"],
            ["pickle", "loads"],
            ["yaml", "load"],
            ["yaml", "unsafe_load"],
        ), f"{name}.py:{node.lineno}"
        allowed = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
        assert all(isinstance(value, ast.Constant) and value.value is False for value in allowed), (
            f"{name}.py:{node.lineno}"
        )


@each_module
def test_only_what_is_run_prints(name):
    if name in STAGES:
        return
    for function in nodes(name, *FUNCTION):
        prints = [node for node in ast.walk(function) if isinstance(node, ast.Call) and parts(node.func) == ["print"]]
        assert not prints or function.name in PRINTS.get(name, ()), f"{name}.py:{prints[0].lineno}"


def test_scripts_print_to_stderr_only():
    for node in nodes("scripts", ast.Call):
        if parts(node.func) == ["print"]:
            assert any(key.arg == "file" and parts(key.value) == ["sys", "stderr"] for key in node.keywords)


@each_module
def test_nothing_happens_at_import(name):
    allowed = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Assign, ast.AnnAssign, *FUNCTION)
    for node in TREES[name].body:
        if isinstance(node, ast.If):
            assert {"__name__", "TYPE_CHECKING"} & {
                each.id for each in ast.walk(node.test) if isinstance(each, ast.Name)
            }, f"{name}.py:{node.lineno}"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant) and isinstance(node.value.value, str), (
                f"{name}.py:{node.lineno}"
            )
        else:
            assert isinstance(node, allowed), f"{name}.py:{node.lineno}"


@each_module
def test_functions_are_short_and_files_say_what_they_are(name):
    assert ast.get_docstring(TREES[name])
    for node in nodes(name, *FUNCTION):
        length = node.end_lineno - node.lineno + 1
        assert length <= 60, f"{name}.{node.name} has {length} lines"


def test_the_median_function_is_small():
    lengths = [node.end_lineno - node.lineno + 1 for name in TREES for node in nodes(name, *FUNCTION)]
    assert statistics.median(lengths) <= 16


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_find_their_names(name):
    assert NOTEBOOKS[name] <= set(dir(importlib.import_module(name)))


def readme_names():
    """Every ``module.name`` in README's table of where the steps are."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| step | in the code |")[1].split("\n\n")[0]
    return re.findall(r"`(\w+)\.([\w.]+)`", table)


def test_readmes_steps_are_in_the_code():
    assert len(readme_names()) > 20
    for module, name in readme_names():
        assert operator.attrgetter(name)(importlib.import_module(module)) is not None


def test_pytest_never_takes_a_script_for_a_test():
    assert not (ROOT / "tests" / "test_vae.py").exists()
    assert not (ROOT / "utils.py").exists()
    assert [
        node.name for name in TREES for node in nodes(name, *FUNCTION, ast.ClassDef) if node.name.startswith("test_")
    ] == []


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def anchors(document):
    """Where links into a document may lead, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_the_documents_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = document.parent / path if path else document
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target
