"""README.md and docs/: every command line in them parses, every flag and file that they name exists."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from modules.flags import build_parser, parse_flags, resolve_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / room / "README.md" for room in (".", "data", "benchmarks")), *sorted((ROOT / "docs").rglob("*.md"))]
DOCKER_FLAGS = {"--build", "--gpus", "--network", "--rm", "--shm"}  # up to a hyphen, as flags are looked for below
SOURCE = re.compile(r"(?:\b(?:models|modules|scripts|tests|docs|data|benchmarks)/)?\w[\w/.-]*\.(?:py|sh|md|svg)\b")


def command_lines() -> list[tuple[str, str]]:
    """(page, command line) of all fenced shell blocks, continued lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, " ".join(line.split())) for line in lines if shlex.split(line, comments=True)]
    return found


def script_parser(script: str, monkeypatch, room: str = "scripts") -> argparse.ArgumentParser:
    """The parser of scripts/``script`` (or of another room's), caught where its main would use it."""
    caught = []

    def catch(parser):
        caught.append(parser)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(SystemExit):
            importlib.import_module(f"{room}.{script}").main()
    return caught[0]


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_command_line(page, line, monkeypatch):
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, target, *arguments = words
    assert program in ("bash", "python", "pip"), f"{page}: {line}"
    if program == "pip":
        assert all((ROOT / word).is_file() for word in arguments if word.endswith(".txt"))
        return
    assert (ROOT / target).is_file(), f"{page}: {target}"
    # run_tests.sh hands its arguments to pytest, setup.sh reads its own: both are tested elsewhere.
    if target.startswith(("main_", "run_iu", "run_mimic", "run_demo")):
        given, ignored = parse_flags(arguments, target, "")
        resolve_config(given)
        assert not [note for note in ignored if "ignored" in note], f"{page}: {line}"
    elif target.startswith(("scripts/", "benchmarks/")) and target.endswith(".py"):
        parser = script_parser(Path(target).stem, monkeypatch, ".".join(Path(target).parent.parts))
        monkeypatch.setattr(sys, "argv", [target])
        parser.parse_args(arguments)


def test_flags_exist(monkeypatch):
    known = {"--help"} | DOCKER_FLAGS
    files = [
        path for room in ("scripts", "scripts/research", "benchmarks") for path in sorted((ROOT / room).glob("*.py"))
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    programs = [
        path for path, text in texts.items() if re.search(r"\bParser\(|build_parser\(", text) and "def main(" in text
    ]
    rooms = {path: ".".join(path.parent.relative_to(ROOT).parts) for path in programs}
    parsers = (script_parser(path.stem, monkeypatch, rooms[path]) for path in programs)
    for parser in (build_parser("", ""), *parsers):
        known |= {option for action in parser._actions for option in action.option_strings}
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z]\w+)"', benchmark.read_text(encoding="utf-8")))
    for script in (*ROOT.glob("*.sh"), *(ROOT / "scripts").glob("*.sh")):
        known |= set(re.findall(r"--[a-z]\w+", script.read_text(encoding="utf-8")))
    for benchmark in ROOT.glob("benchmarks/*.py"):
        known |= set(re.findall(r'"(--[a-z]\w+)"', benchmark.read_text(encoding="utf-8")))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z]\w+", page.read_text(encoding="utf-8")))
        assert not named - known, f"{page.name}: {sorted(named - known)}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def spelled_out(code: str) -> list[str]:
    """``modules/ithn/{losses,settings}.py`` as the two paths that it stands for."""
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", code)
    return [f"{found[1]}{name}{found[3]}" for name in found[2].split(",")] if found else [code]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for code in re.findall(r"`([^`\n]+)`", text):
        for name in (name for part in spelled_out(code) for name in SOURCE.findall(part)):
            places = [ROOT, page.parent, ROOT / "modules", ROOT / "scripts"]
            assert any((place / name).is_file() for place in places), name


def test_the_readme_stays_short_and_its_picture_small():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    picture = (ROOT / "docs" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 300_000


def test_figure_stands_alone():
    figure = ElementTree.parse(ROOT / "docs" / "method.svg").getroot()
    for element in figure.iter():
        for name, value in element.attrib.items():
            assert not name.endswith("href") or value.startswith("#"), value
        assert not element.tag.endswith(("script", "image", "foreignObject"))
        assert not re.search(r"@import|url\(\s*['\"]?(?!#)", element.text or "")


def test_ignored_flags_are_those_of_the_page():
    row = next(
        line
        for line in (ROOT / "docs" / "FROM_R2GEN.md").read_text(encoding="utf-8").splitlines()
        if "named in the log as ignored" in line
    )
    flags = re.findall(r"--\w+", row)
    assert flags
    _, ignored = parse_flags([word for flag in flags for word in (flag, "1")], "main_train.py", "")
    assert len(ignored) == len(flags)
