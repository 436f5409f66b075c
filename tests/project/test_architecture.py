"""The design's rules, enforced on the source: who may import whom, sizes, and the few calls that are never made."""

import ast
import graphlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The rooms of modules/ from the ground up, and the rooms that each may import besides itself.
ROOMS: dict[str, tuple[str, ...]] = {
    "runtime": (),
    "layers": ("runtime",),
    "decoding": ("runtime",),
    "ithn": ("runtime",),
    "data": ("runtime",),
    "labels": ("data", "runtime"),
    "mining": ("labels", "data", "runtime"),
    "evaluation": ("decoding", "labels", "data", "runtime"),
    "training": ("ithn", "evaluation", "decoding", "labels", "data", "runtime"),
    "inference": ("training", "evaluation", "decoding", "data", "runtime"),
    "pages": ("inference", "evaluation", "labels", "data", "runtime"),
    "prepare": ("labels", "data", "runtime"),
}
MODEL_ROOMS = ("layers", "decoding", "runtime")  # what a backbone is made of
SHARED_MODELS = ("models.base", "models.transformer_base")  # what several backbones are made of
LIGHT_MODELS = ("models", "models.settings")  # the table of the backbones and their settings, without torch
# Beside the rooms: the flags, which modules/run, main_* and scripts/ see as a whole.
FLAG_FILES = ("config", "flags", "study_flags")
# Where the rooms declare their settings, of which modules/config.py puts a Config together.
SETTINGS_FILES = (
    "modules.data.dataset_specs",
    "modules.data.settings",
    "modules.decoding.options",
    "modules.ithn.settings",
    "modules.training.settings",
    "modules.evaluation.settings",
    "modules.evaluation.metric_table",
)
# Of layers, which hold networks of these libraries, and decoding, which is torch and nothing else.
PURE_ROOMS = {"layers": {"torch", "torchvision", "timm", "transformers", "peft", "safetensors"}, "decoding": {"torch"}}
HANDED_IN = {
    "modules.training.trainer": ("modules.ithn", "modules.data.datasets", "modules.evaluation.metrics"),
    "modules.evaluation.tester": ("modules.ithn", "modules.data.datasets", "modules.evaluation.metrics"),
}
# Must be importable in a moment: --help, checks and error lines stand on them.
LIGHT = (
    "modules.runtime.errors",
    "modules.runtime.environment",
    "modules.runtime.settings",
    "modules.decoding.options",
    "modules.evaluation.settings",
    "modules.evaluation.metric_table",
    "modules.ithn.settings",
    "modules.config",
    "modules.flags",
    "modules.study_flags",
    "models",
    "models.settings",
    "modules.data.annotations",
    "modules.data.dataset_specs",
    "modules.data.tokenizers",
)
HEAVY_PACKAGES = {"torch", "torchvision", "timm", "transformers", "sklearn", "scipy", "pandas", "matplotlib"}
OURS = {"modules", "models", "scripts", "benchmarks", "tests"}
BAGS = {"args", "opt", "opts", "cfg", "namespace"}
MAX_FILE, MAX_FUNCTION = 450, 60


@dataclass(frozen=True)
class Source:
    """One of our files: dotted name, syntax tree, number of lines."""

    name: str
    tree: ast.Module
    lines: int = 0

    @property
    def room(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_entry_point(self) -> bool:
        return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in self.tree.body)


def read_sources() -> dict[str, Source]:
    paths = [*ROOT.glob("*.py")]
    for folder in ("modules", "models", "scripts", "benchmarks", "tests"):
        paths += (ROOT / folder).rglob("*.py")
    sources = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        sources[name] = Source(name, ast.parse(text), text.count("\n"))
    return sources


SOURCES = read_sources()
PRODUCT = {name: source for name, source in SOURCES.items() if source.room != "tests"}


def statements(tree: ast.AST, *, inside_functions: bool):
    """Every node outside ``if TYPE_CHECKING`` blocks, with or without the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        yield node
        yield from statements(node, inside_functions=inside_functions)


def imports_of(source: Source, *, inside_functions: bool = True) -> set[str]:
    """Dotted names that ``source`` imports; ``from modules import losses`` is "modules.ithn.losses"."""
    found = set()
    for node in statements(source.tree, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in SOURCES else node.module)
    return found


def room_of(name: str) -> str | None:
    """The room of modules/ that a dotted name lies in: "data" for modules.data.images, None outside the rooms."""
    parts = name.split(".")
    return parts[1] if parts[0] == "modules" and len(parts) > 1 and parts[1] not in FLAG_FILES else None


def import_offence(source: Source, imported: str) -> str | None:
    """The rule that this import breaks, or None."""
    name, ours = source.name, imported.split(".")[0] in ("modules", "models", "scripts", "benchmarks")
    room, other = room_of(name), room_of(imported)
    if imported.startswith("main_"):
        return "nothing imports the entry points"
    if not ours:
        allowed = PURE_ROOMS.get(room or "")
        package = imported.split(".")[0]
        outside = allowed is not None and package not in allowed | sys.stdlib_module_names
        return f"modules/{room} imports {', '.join(sorted(allowed or ()))} only" if outside else None
    if source.room == "modules" and imported.split(".")[0] in ("scripts", "benchmarks"):
        return "modules/ never imports what calls it"
    if name in LIGHT_MODELS or source.room in ("scripts", "benchmarks") or name.startswith("main_"):
        return None
    if source.room == "models":
        own_part = imported in SHARED_MODELS or imported.startswith(f"{name}_")
        return (
            None if own_part or other in MODEL_ROOMS else f"a backbone imports {SHARED_MODELS} and {MODEL_ROOMS} only"
        )
    if imported.split(".")[0] == "models" and room != "run" and not (room is None and imported in LIGHT_MODELS):
        return "only modules/run imports models/"
    if room == "run":
        return None
    if room is None:
        light = other in (None, "runtime") or imported in SETTINGS_FILES
        return None if light else "flags stand on runtime and the rooms' settings"
    if imported in [f"modules.{file}" for file in FLAG_FILES]:
        return "only modules/run, main_* and scripts/ see the whole Config"
    if other != room and other not in ROOMS[room]:
        return f"modules/{room} imports {ROOMS[room]} only"
    if any(imported.startswith(part) for part in HANDED_IN.get(name, ())):
        return "objective, loaders and metrics are handed in"
    return None


def test_every_room_is_placed_and_described():
    rooms = {path.name for path in (ROOT / "modules").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {*ROOMS, "run"}
    order = list(ROOMS)
    upwards = [
        (room, other) for room, below in ROOMS.items() for other in below if order.index(other) > order.index(room)
    ]
    assert not upwards
    bare = [room for room in rooms if (ast.get_docstring(SOURCES[f"modules.{room}"].tree) or "").count(".\n") < 1]
    assert not bare, "say in __init__.py what lives there and what may not"
    loose = {path.stem for path in (ROOT / "modules").glob("*.py")} - {"__init__", *FLAG_FILES}
    assert not loose, "files outside the rooms"


def test_imports_follow_the_design():
    offences = [
        f"{source.name} imports {imported}: {offence}"
        for source in PRODUCT.values()
        for imported in sorted(imports_of(source))
        if (offence := import_offence(source, imported))
    ]
    assert not offences, "\n".join(offences)


def test_no_import_cycles():
    graph = {name: imports_of(source) & set(PRODUCT) for name, source in PRODUCT.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("cycle: " + " <- ".join(error.args[1]))


def packages_at_import(name: str, seen: set[str] | None = None) -> dict[str, str]:
    """Packages that importing our module ``name`` brings in, directly or through others of ours, and by which."""
    seen = set() if seen is None else seen
    seen.add(name)
    found = {}
    for imported in imports_of(SOURCES[name], inside_functions=False):
        package = imported.split(".")[0]
        if imported in SOURCES:
            found |= packages_at_import(imported, seen) if imported not in seen else {}
        elif package not in sys.stdlib_module_names and package not in OURS:
            found[package] = name
    return found


def test_light_modules_and_help_need_no_torch():
    starting = [name for name, source in PRODUCT.items() if source.is_entry_point and source.room != "benchmarks"]
    missing = [name for name in LIGHT if name not in SOURCES]
    assert not missing
    slow = {name: heavy for name in (*LIGHT, *starting) if (heavy := HEAVY_PACKAGES & packages_at_import(name).keys())}
    assert not slow, "import these inside the functions that need them: " + repr(slow)


def test_entry_points_start_without_any_package():
    """Where the environment was not activated, run_entry_point says so: it has to be reached."""
    needing = {
        name: found for name, source in PRODUCT.items() if source.is_entry_point and (found := packages_at_import(name))
    }
    assert not needing, "import these inside the functions that need them: " + repr(needing)


def size_offences(source: Source) -> list[str]:
    limit = MAX_FILE
    found = [f"{source.name}: {source.lines} lines"] if source.lines > limit else []
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            found += [f"{source.name}.{node.name}: {length} lines"] if length > MAX_FUNCTION else []
    return found


def call_offences(source: Source) -> list[str]:
    """Calls that would run code from a file, from a hub or from a shell string."""
    found = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called.endswith("torch.load") and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if re.fullmatch(r"(dill|joblib)\.loads?|pickle\.load|(pd|pandas)\.read_pickle|eval|exec|os\.system", called):
            found.append(called)
        # A test may take bytes apart that it has just made, to show that a data set can travel to a worker.
        if called == "pickle.loads" and source.room != "tests":
            found.append(called)
        for flag in ("trust_remote_code", "allow_pickle", "shell"):
            if keywords.get(flag, "False") != "False":
                found.append(f"{flag}={keywords[flag]}")
    imported = imports_of(source)
    if "torch" in imported and any(
        isinstance(node, ast.ImportFrom)
        and node.module == "torch"
        and any(alias.name == "load" for alias in node.names)
        for node in ast.walk(source.tree)
    ):
        found.append("from torch import load")
    return [f"{source.name}: {offence}" for offence in found]


def bag_offences(source: Source) -> list[str]:
    """Signs that parsed arguments travel: argparse outside the command line, parameters called args, opt, cfg."""
    if source.room not in ("modules", "models") or source.name in ("modules.flags", "modules.study_flags"):
        return []
    found = ["argparse"] if "argparse" in imports_of(source) else []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.arguments):
            names = {argument.arg for argument in (*node.posonlyargs, *node.args, *node.kwonlyargs)}
            found += sorted(names & BAGS)
    return [f"{source.name}: {offence}" for offence in found]


@pytest.mark.parametrize("rule", [size_offences, call_offences, bag_offences])
def test_code_keeps(rule):
    offences = [offence for source in SOURCES.values() for offence in rule(source)]
    assert not offences, "\n".join(offences)


# "(B, T, D)", "(..., d)", "(N,)", "scalar" and the like.
SHAPE = re.compile(r"\((?:[A-Za-z0-9.][\w.+*/ -]*,|\.\.\.)[^()]*\)|[Ss]calar|shape")


def public_functions(tree: ast.AST, owner: str = ""):
    """(qualified name, function) of every public function and method of public classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield owner + node.name, node


def takes_tensors(function: ast.FunctionDef) -> bool:
    """Whether an argument is annotated as a tensor or an array."""
    arguments = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return any(re.search(r"\bTensor\b|ndarray", ast.unparse(item.annotation)) for item in arguments if item.annotation)


def test_public_functions_that_take_tensors_say_their_shapes():
    silent = [
        f"{source.name}.{name}"
        for source in PRODUCT.values()
        if source.room in ("modules", "models")
        for name, function in public_functions(source.tree)
        if takes_tensors(function) and not SHAPE.search(ast.get_docstring(function) or "")
    ]
    assert not silent, "\n".join(silent)


def raised_by(function: ast.AST) -> set[str]:
    """Names of the exceptions that the function itself raises, and not those inside of it."""
    found = set()
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            exception = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc).split(".")[-1]
            found |= {exception} if exception[0].isupper() and exception != "NotImplementedError" else set()
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            found |= raised_by(node)
    return found


def test_public_functions_that_raise_say_what():
    silent = [
        f"{source.name}.{name}"
        for source in PRODUCT.values()
        if source.room in ("modules", "models")
        for name, function in public_functions(source.tree)
        if raised_by(function) and not re.search("|".join(raised_by(function)), ast.get_docstring(function) or "")
    ]
    assert not silent, "\n".join(silent)


def test_no_drawer_for_everything():
    assert not [name for name in SOURCES if name.split(".")[-1] in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize(
    ("name", "code", "rule"),
    [
        ("modules.x", "import torch\ntorch.load(path)", call_offences),
        ("modules.x", "import torch\ntorch.load(path, weights_only=False)", call_offences),
        ("modules.x", "from torch import load", call_offences),
        ("tests.x", "import pickle\npickle.load(file)", call_offences),
        ("scripts.x", "import pickle\npickle.loads(content)", call_offences),
        ("scripts.x", "AutoModel.from_pretrained(name, trust_remote_code=flag)", call_offences),
        ("scripts.x", "np.load(path, allow_pickle=True)", call_offences),
        ("modules.x", "def run(args): pass", bag_offences),
        ("models.x", "def build():\n    import argparse", bag_offences),
        ("modules.x", "def long():\n" + "    a = 1\n" * MAX_FUNCTION, size_offences),
    ],
)
def test_rules_see_offences(name, code, rule):
    assert rule(Source(name, ast.parse(code)))


@pytest.mark.parametrize(
    ("name", "imported", "allowed"),
    [
        ("modules.layers.transformer", "modules.runtime.errors", True),
        ("modules.layers.transformer", "modules.data.images", False),
        ("modules.layers.transformer", "numpy", False),
        ("modules.layers.transformer", "torch", True),
        ("modules.decoding.search", "modules.decoding.cache", True),
        ("modules.decoding.search", "modules.layers.transformer", False),
        ("models.r2gen", "models.r2gencmn", False),
        ("models.r2gen", "models.base", True),
        ("models.r2gen", "models.transformer_base", True),
        ("models.r2gen", "modules.data.images", False),
        ("modules.config", "models.settings", True),
        ("modules.config", "models.r2gen", False),
        ("models.r2gen", "modules.layers.cross_modal_memory", True),
        ("models.r2gen", "modules.ithn.losses", False),
        ("modules.ithn.objective", "modules.ithn.losses", True),
        ("modules.ithn.objective", "modules.runtime.distributed", True),
        ("modules.ithn.objective", "modules.config", False),
        ("modules.ithn.objective", "models.base", False),
        ("modules.training.trainer", "modules.ithn.objective", False),
        ("modules.training.trainer", "modules.config", False),
        ("modules.data.images", "modules.evaluation.metrics", False),
        ("modules.runtime.errors", "modules.data.images", False),
        ("modules.run.training", "modules.config", True),
        ("modules.run.training", "models.base", True),
        ("modules.run.training", "main_train", False),
        ("modules.run.training", "scripts.predict", False),
        ("modules.config", "modules.runtime.errors", True),
    ],
)
def test_import_rules(name, imported, allowed):
    assert (import_offence(Source(name, ast.parse("")), imported) is None) is allowed


# Written as patterns, so that this file does not contain what it looks for.
MACHINE_BOUND = {
    "path of one machine": re.compile(r"(?<![\w.~-])/(work|root|home/\w+|Users/\w+|opt/\w+)/"),
    "host of a package registry": re.compile(r"\b(pypi\.org|pythonhosted\.org|npmjs\.org|deb\.debian\.org)\b"),
}


def test_tracked_files_name_no_machine_and_no_registry():
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listing.stdout.decode().split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" in content[:4096]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            found += [f"{name}:{number}: {what}" for what, pattern in MACHINE_BOUND.items() if pattern.search(line)]
    assert not found, "\n".join(found)
