"""The other projects that the benchmark measures beside the product, where they are there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import classifier, curator

CURATORS_PYTHON, INSTALLED = Path(".venv/peers/bin/python"), Path(".venv/peers-installed")


@dataclass(frozen=True, slots=True)
class Peer:
    """A project and its commands: `python -m module NAME FOLDER OUT`, after `prepare`."""

    module: str
    names: Sequence[str]
    python: str
    is_there: bool
    how: str  # it gets there

    def prepare(self, folder: Path, out: Path) -> None:
        """Give the peer rows and results in its own forms, once a folder."""
        mark = folder / f"{self.module}-prepared"
        if not mark.exists():
            subprocess.run([self.python, "-m", self.module, "prepare", str(folder), str(out)], check=True, stdout=subprocess.DEVNULL)
            mark.touch()

    def command(self, name: str, folder: Path, out: Path) -> list[str]:
        """What takes its turn."""
        return [self.python, "-m", self.module, name, str(folder), str(out)]


def peers() -> list[Peer]:
    """All of them."""
    return [
        Peer("bench.classifier", tuple(classifier.PEERS), sys.executable, classifier.is_there(), "python -m bench.classifier fetch"),
        Peer("bench.curator", tuple(curator.PEERS), str(CURATORS_PYTHON.absolute()), INSTALLED.exists(), "make peers"),
    ]
