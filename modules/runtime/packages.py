"""The packages that this project needs: is it one of them that an import lacks, and what brings it?"""

import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements.txt"
# Packages that are imported under another name than they are installed under.
_IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}


def requirements(path: Path = REQUIREMENTS) -> dict[str, str]:
    """The lines of a requirements file by package."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {re.match(r"[\w.-]+", line)[0]: line for line in lines if line and not line.startswith("-")}


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package of requirements.txt that an import did not find; None for one of this project or part of a package.

    Both of these are faults of a program, not of the Python that was called.
    """
    found = {_IMPORTED_AS.get(name, name.replace("-", "_")): name for name in requirements()}
    return found.get(error.name or "")


def remedy(root: Path = ROOT, prefix: str = sys.prefix) -> str:
    """What to do about packages that the Python with ``prefix`` lacks."""
    environment = root / ".venv"
    if (environment / "bin" / "activate").is_file() and environment.resolve() != Path(prefix).resolve():
        shown = ".venv" if Path.cwd() == root else shlex.quote(str(environment))
        return f"activate the environment: source {shown}/bin/activate (made by bash setup.sh)"
    return "bash setup.sh"
