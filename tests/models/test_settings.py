"""What a backbone's file declares: read without running it, equal to its class, and in agreement with the others."""

import dataclasses

import pytest

from models import MODELS, settings, settings_class
from models.settings import declared_presets, declared_settings
from modules.config import require_agreement
from modules.runtime.settings import setting

FILE = '''
raise RuntimeError("this file is read, never run")
from models.base import BackboneSettings as Base
PRESETS = {"*": {"width": 3}}
class Settings(Base):
    """Text."""
    width: int = setting(2 * 8, "own", "a width", low=1)
    def method(self): ...
'''


@pytest.mark.parametrize("backbone", MODELS)
def test_settings_read_from_the_source_are_those_of_the_class(backbone):
    read, declared = (
        [(item.name, item.type, item.default, dict(item.metadata)) for item in dataclasses.fields(kind)]
        for kind in (declared_settings(backbone), settings_class(backbone))
    )
    assert read == declared


@pytest.fixture
def declare(tmp_path, monkeypatch):
    """Declares a backbone "own" by the text of its file, with the base of all as it is."""

    def write(text):
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "base.py").write_text((settings.ROOT / "models" / "base.py").read_text())
        (tmp_path / "models" / "own.py").write_text(text)
        for cached in (settings._settings, settings._tree, declared_presets):
            monkeypatch.setattr(settings, cached.__name__, cached.__wrapped__)
        monkeypatch.setattr(settings, "ROOT", tmp_path)
        monkeypatch.setitem(MODELS, "own", "models.own.Own")

    return write


def test_a_file_is_read_and_not_run(declare):
    declare(FILE.replace("2 * 8", "16"))
    names = [item.name for item in dataclasses.fields(declared_settings("own"))]
    assert names == ["d_model", "d_ff", "num_heads", "num_layers", "dropout", "width"]
    assert declared_settings("own")().width == 16
    assert settings.declared_presets("own") == {"*": {"width": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE, r"models/own.py, line 7: must be a literal, .* found 2 \* 8"),
        (
            FILE.replace(": int", ": list"),
            r"models/own.py, line 7: a setting is declared as name: int\|float\|bool\|str",
        ),
        (FILE.replace("setting(2 * 8", "field(16"), "models/own.py, line 7: a setting is declared as"),
        ("class Own: ...\n", "models/own.py: declares no class Settings"),
    ],
)
def test_what_cannot_be_read_is_named_with_file_and_line(declare, text, message):
    declare(text)
    with pytest.raises(ValueError, match=message):
        declared_settings("own")


def test_a_flag_that_two_files_declare_differently_names_both():
    def part(module, default):
        made = dataclasses.make_dataclass("Settings", [("width", int, setting(default, "own", "a width"))])
        made.__module__ = module
        return made

    require_agreement([part("models.one", 3), part("models.two", 3)])
    with pytest.raises(ValueError, match="--width is declared in models.one and in models.two with another"):
        require_agreement([part("models.one", 3), part("models.two", 4)])
