"""A setting that is declared and that no code reads would be a flag that does nothing."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What objects that hold settings are called; "self" is one inside the dataclass itself.
HOLDERS = ("config", "settings", "options", "decoding", "stage", "self.optim", "self.loop")
# Settings that must have one value, that of another: read by the check alone.
CHECKED_ONLY = {"rm_d_model"}


def trees(root: Path) -> Iterator[ast.Module]:
    """The syntax trees of the code below ``root``."""
    paths = [*root.glob("main_*.py")]
    for folder in ("modules", "models", "scripts"):
        paths += (root / folder).rglob("*.py")
    for path in sorted(paths):
        yield ast.parse(path.read_text(encoding="utf-8"))


def declared(tree: ast.Module) -> dict[str, ast.ClassDef]:
    """The settings that dataclasses of this file declare, by name."""
    return {
        item.target.id: node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call)
        if ast.unparse(item.value.func) == "setting" and isinstance(item.target, ast.Name)
    }


def read(tree: ast.AST, inside: bool = False) -> Iterator[str]:
    """Names read from a holder of settings, by ``getattr``, or from the flags ``given``; checks do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("__post_init__", "_check_")):
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = ast.unparse(node.value)
            if holder.endswith(HOLDERS) or (inside and holder == "self"):
                yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "given.get"):
            yield from (part.value for part in node.args if isinstance(part, ast.Constant))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "given":
            yield getattr(node.slice, "value", "")
        yield from read(node, inside or (isinstance(node, ast.ClassDef) and "setting(" in ast.unparse(node)))


def unread_settings(root: Path) -> list[str]:
    """The settings declared below ``root`` that nothing below it reads."""
    found: set[str] = set()
    known: set[str] = set()
    for tree in trees(root):
        known |= declared(tree).keys()
        found |= set(read(tree))
    assert len(known) > 100
    return sorted(known - found - CHECKED_ONLY)


def test_every_setting_is_read():
    assert not unread_settings(ROOT), "flags that nobody reads"


def test_settings_that_nobody_reads_are_found():
    tree = ast.parse(
        "class Settings:\n"
        "    a: int = setting(1, 'x', 'y')\n    b: int = setting(1, 'x', 'y')\n    c: int = setting(1, 'x', 'y')\n"
        "    def __post_init__(self):\n        assert self.a > 0\n"
        "    def twice(self):\n        return 2 * self.b\n"
        "NAMES = ('a', 'b', 'c')\ndef run(config, other):\n    return config.c + other.a\n"
    )
    assert declared(tree).keys() - set(read(tree)) == {"a"}
