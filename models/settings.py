"""The backbones' settings and presets, read from the syntax trees of their files.

``--help`` lists the flags of every backbone and must not wait for torch, which a backbone's file imports; and a run
imports no backbone but its own. So ``Settings`` and ``PRESETS`` of a backbone's file are literals, evaluated here
without running the file: no other expression has a value.
"""

import ast
import dataclasses
import functools
from pathlib import Path
from typing import Any

from models import SYSTEMS, location
from modules.runtime.settings import setting

ROOT = Path(__file__).resolve().parent.parent
TYPES = {"int": int, "float": float, "bool": bool, "str": str}


def declared_settings(name: str) -> type:
    """A frozen dataclass with the fields of the backbone's ``Settings``: types, defaults and facts, but no methods.

    ValueError, with file and line, for what is not a literal ``name: type = setting(...)``.
    """
    return _settings(location(name)[0], "Settings")


@functools.cache
def declared_presets(name: str) -> dict[str, dict[str, Any]]:
    """``PRESETS`` of the backbone's file, or what its ``SYSTEMS`` have of a published system: flag values by data set.

    Those of every data set are under ``*``.
    """
    if name in SYSTEMS:
        return _assigned(location(SYSTEMS[name])[0], "SYSTEMS")[name]
    return _assigned(location(name)[0], "PRESETS")


def _assigned(module: str, name: str) -> dict[str, dict[str, Any]]:
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return _literal(node.value, module)
    return {}


def _path(module: str) -> str:
    return module.replace(".", "/") + ".py"


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT / _path(module)).read_text(encoding="utf-8"), _path(module))


@functools.cache
def _settings(module: str, kind: str) -> type:
    """The fields of class ``kind`` in ``module`` as a dataclass, derived from those of its bases."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == kind:
                    return _settings(node.module, alias.name)
        if isinstance(node, ast.ClassDef) and node.name == kind:
            bases = tuple(_settings(module, ast.unparse(base)) for base in node.bases)
            own = [_field(part, module) for part in node.body if isinstance(part, ast.AnnAssign)]
            made = dataclasses.make_dataclass(kind, own, bases=bases, frozen=True)
            made.__module__ = module
            return made
    raise ValueError(f"{_path(module)}: declares no class {kind} with the backbone's settings")


def _field(node: ast.AnnAssign, module: str) -> tuple[str, type, Any]:
    name, kind, call = ast.unparse(node.target), TYPES.get(ast.unparse(node.annotation)), node.value
    if kind is None or not isinstance(call, ast.Call) or ast.unparse(call.func) != "setting":
        raise ValueError(
            f"{_path(module)}, line {node.lineno}: a setting is declared as name: {'|'.join(TYPES)} = setting(...), "
            f"found {ast.unparse(node)[:60]}"
        )
    values = [_literal(value, module) for value in call.args]
    facts = {keyword.arg or "**": _literal(keyword.value, module) for keyword in call.keywords}
    return name, kind, setting(*values, **facts)


def _literal(node: ast.expr, module: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{_path(module)}, line {node.lineno}: must be a literal, as it is read without running the file; found "
            f"{ast.unparse(node)[:60]}"
        ) from error
