"""requirements/lock*.txt: one version with hashes for everything that is asked for, extras too, and no index."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = [
    "requirements/serve.txt",
    "requirements/shards.txt",
    "requirements/dicom.txt",
    "requirements/weights.txt",
    "requirements/parquet.txt",
]
# Lock file -> what it locks.
LOCKS = {"requirements/lock.txt": ["requirements.txt"], "requirements/lock-all.txt": ["requirements.txt", *EXTRAS]}
HOW = "bash scripts/requirements.sh lock"


def locked(lock):
    """Requirement -> number of hashes, of every entry."""
    text = (ROOT / lock).read_text(encoding="utf-8")
    entries = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    found = {}
    for entry in entries:
        if entry and not entry.lstrip().startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=sha256:", entry)
            assert all(re.fullmatch(r"[0-9a-f]{64}", digest.strip()) for digest in hashes), entry
            found[Requirement(requirement)] = len(hashes)
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_entry_is_one_version_with_hashes(lock):
    entries = locked(lock)
    assert len(entries) > 50
    for requirement, hashes in entries.items():
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)) and hashes and not requirement.url


@pytest.mark.parametrize("lock", LOCKS)
def test_no_index_no_address(lock):
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--extra|--find-links|--trusted", text)


def test_both_lock_the_same_versions():
    both = [{(entry.name, str(entry.specifier)) for entry in locked(lock)} for lock in LOCKS]
    assert both[0] <= both[1]


def test_the_script_locks_and_audits_all_extras():
    script = (ROOT / "scripts/requirements.sh").read_text(encoding="utf-8")
    assert all(name in script for name in EXTRAS) and "--requirement requirements/lock-all.txt" in script
    others = {"requirements/dev.txt", "requirements/constraints-v100.txt", *LOCKS}
    assert {f"requirements/{path.name}" for path in (ROOT / "requirements").glob("*.txt")} == {*EXTRAS, *others}


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_what_is_asked_for_is_locked_in_a_version_that_fits(python, lock):
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    versions = {}
    for requirement in locked(lock):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in versions, f"{name} is locked twice for Python {python}"
            versions[name] = str(requirement.specifier).removeprefix("==")
    for line in "\n".join((ROOT / file).read_text(encoding="utf-8") for file in LOCKS[lock]).splitlines():
        if not line.strip() or line.startswith(("#", "-r")):
            continue
        wanted = Requirement(line)
        version = versions.get(canonicalize_name(wanted.name))
        assert version and wanted.specifier.contains(version, prereleases=True), f"{line}: {version} is locked; {HOW}"
