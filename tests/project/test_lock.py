"""requirements/lock.txt: one version with hashes for everything that requirements.txt asks for, and no index."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "requirements/lock.txt").read_text(encoding="utf-8")
HOW = "bash scripts/requirements.sh lock"


def locked():
    """Requirement -> number of hashes, of every entry."""
    entries = re.sub(r"\s*\\\n\s*", " ", TEXT).splitlines()
    found = {}
    for entry in entries:
        if entry and not entry.lstrip().startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=sha256:", entry)
            assert all(re.fullmatch(r"[0-9a-f]{64}", digest.strip()) for digest in hashes), entry
            found[Requirement(requirement)] = len(hashes)
    return found


def test_every_entry_is_one_version_with_hashes():
    entries = locked()
    assert len(entries) > 50
    for requirement, hashes in entries.items():
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)) and hashes and not requirement.url


def test_no_index_no_address():
    assert not re.search(r"://|--index|--extra|--find-links|--trusted", TEXT)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_what_is_asked_for_is_locked_in_a_version_that_fits(python):
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    versions = {}
    for requirement in locked():
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"{name} is locked twice for Python {python}"
            versions[name] = str(requirement.specifier).removeprefix("==")
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        wanted = Requirement(line)
        version = versions.get(canonicalize_name(wanted.name))
        assert version and wanted.specifier.contains(version, prereleases=True), f"{line}: {version} is locked; {HOW}"
