"""Penn Treebank tokenisation of captions, as COCO's evaluation has it: Stanford's tokeniser from pycocoevalcap's jar.

pycocoevalcap's own wrapper does the same, but asks for a java on the PATH and writes into the package's folder.
"""

import os
import subprocess
from collections.abc import Sequence

from modules.evaluation.meteor import JAVA_VARIABLES, MeteorError, find_java
from modules.runtime.errors import InputError

TOKENISER = "Penn Treebank (Stanford CoreNLP 3.4.1, lower-cased, without punctuation)"


def ptb_tokenise(texts: Sequence[str], *, java: str | None = None, timeout: float = 600.0) -> list[str]:
    """The tokens of each text, lower-cased, without punctuation, joined by single spaces.

    One Java process reads them all (570,000 captions: 5 s on one core). InputError where it cannot: no Java, or no
    answer in ``timeout`` seconds.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR
    from pycocoevalcap.tokenizer.ptbtokenizer import __file__ as wrapper

    if not texts:
        return []
    # A text is a line, so every kind of line break in it becomes a space.
    lines = [" ".join(text.split()) for text in texts]
    try:
        command = [
            java or find_java(),
            "-Xmx1G",
            "-XX:+UseSerialGC",
            "-Dfile.encoding=UTF-8",
            "-cp",
            os.path.join(os.path.dirname(wrapper), STANFORD_CORENLP_3_4_1_JAR),
            "edu.stanford.nlp.process.PTBTokenizer",
            "-preserveLines",
            "-lowerCase",
            "-encoding",
            "UTF-8",
        ]
        environment = {name: value for name, value in os.environ.items() if name not in JAVA_VARIABLES}
        done = subprocess.run(
            command,
            input="".join(f"{line}\n" for line in lines).encode(errors="replace"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=timeout,
        )
    except (MeteorError, OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"COCO's scores need Java for the Penn Treebank tokeniser: {error}") from error
    found = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(found) != len(lines):
        raise InputError(
            "COCO's scores need the Penn Treebank tokeniser, and its Java process ended with exit code "
            f"{done.returncode} after {len(found)} of {len(lines)} captions"
        )
    dropped = frozenset(PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in found]


class PtbTokeniser:
    """``ptb_tokenise`` for references, which come again in every validation: each text is asked for once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def references(self, captions: Sequence[Sequence[str]]) -> list[list[str]]:
        """The tokens of every caption of every image."""
        new = list(dict.fromkeys(text for texts in captions for text in texts if text not in self._known))
        self._known.update(zip(new, ptb_tokenise(new), strict=True))
        return [[self._known[text] for text in texts] for texts in captions]
