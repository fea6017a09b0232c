"""Partitions of published results: where they stand, what they consist of, and what they were made of."""

from __future__ import annotations

from nightshift.runs import Run
from nightshift.shapes import Outcome, Wire

MANIFEST = "_manifest.json"
UNANSWERED: tuple[Outcome, ...] = ("errored", "expired", "cancelled", "missing")  # the next run asks them again


class Part(Wire):
    """One file of a partition."""

    name: str
    size: int  # bytes
    sha256: str


class Manifest(Wire):
    """What a partition consists of. Stored as `results/<job>/<partition>/_manifest.json`: the commit."""

    job: str
    partition: str
    parts: tuple[Part, ...]
    outcomes: dict[Outcome, int]
    prompt_version: str
    model: str
    made_from: str | None = None  # the objects and the recipe; the same make the same partition


def results_folder(run: Run) -> str:
    """Where the run's partition stands; a sample never replaces one."""
    if run.input.sample is not None:
        return f"samples/{run.job.name}/{run.input.run}/results"
    return f"results/{run.job.name}/{run.input.partition}"


def quarantine_folder(run: Run) -> str:
    """Where the rows of the run's partition stand that did not succeed."""
    if run.input.sample is not None:
        return f"samples/{run.job.name}/{run.input.run}/quarantine"
    return f"quarantine/{run.job.name}/{run.input.partition}"


def is_up_to_date(run: Run) -> bool:
    """Whether the run's partition was made of the same already, and no request of it could be answered better now."""
    manifest = run.store.get_shape(f"{results_folder(run)}/{MANIFEST}", Manifest)
    return manifest is not None and manifest.made_from == run.made_from and not any(manifest.outcomes[name] for name in UNANSWERED)
