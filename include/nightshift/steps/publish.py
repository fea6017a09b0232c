"""publish: swap a partition in one atomic step.

Parts are named by their content, so that writing them never disturbs a reader; the manifest is one object, written
last: whoever reads through it sees the old partition or the new one. Publishing again writes the same bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from nightshift.errors import RunHeld
from nightshift.partitions import MANIFEST, Manifest, Part, quarantine_folder, results_folder
from nightshift.runs import Run, Site
from nightshift.shapes import Assembled, Audit, Published
from nightshift.stores.objects import Found

ORPHAN_SECONDS = 3600.0  # a publisher is done with its parts long before


def publish(site: Site, run: Run, assembled: Assembled, audit: Audit) -> Published:
    """Make the staged dataset what readers see. Raises RunHeld, and touches nothing, when the audit is red."""
    if not audit.passed:
        raise RunHeld(audit.reasons, site.store.uri_of(run.key("report.html")))
    _swap(site, run, quarantine_folder(run), assembled.quarantine, assembled)
    manifest = _swap(site, run, results_folder(run), assembled.parts, assembled)
    return Published(
        uri=site.store.uri_of(results_folder(run)),
        rows=assembled.outcomes["succeeded"],
        parts=tuple(part.name for part in manifest.parts),
    )


def _swap(site: Site, run: Run, folder: str, staged: tuple[str, ...], assembled: Assembled) -> Manifest:
    """Copy parts in, commit by manifest, then sweep what the replaced manifest named and the one that stands now does not.

    Parts that no manifest names may belong to a publisher at work beside us; they are swept once they are old. One beside us may
    sweep what we have found there and named, before it can see that we do: so what is named is looked at once more.
    """
    parts = tuple(_put_part(site, folder, number, key) for number, key in enumerate(staged))
    replaced = site.store.get_shape(f"{folder}/{MANIFEST}", Manifest)
    manifest = Manifest(
        job=run.job.name,
        partition=run.input.partition,
        parts=parts,
        outcomes=assembled.outcomes,
        prompt_version=run.job.prompt.version,
        model=run.job.spec.request.model,
        made_from=run.made_from,
    )
    site.store.put_shape(f"{folder}/{MANIFEST}", manifest)
    for number, (key, part) in enumerate(zip(staged, parts, strict=True)):
        if site.store.head(f"{folder}/{part.name}") is None:
            _put_part(site, folder, number, key)
    old = {part.name for part in replaced.parts} if replaced else set()
    found = [item for item in site.store.scan(folder) if item.key.rpartition("/")[0] == folder]
    stands = site.store.get_shape(f"{folder}/{MANIFEST}", Manifest) or manifest
    site.store.delete([item.key for item in found if is_swept(item, stands, old, site.now().timestamp())])
    return manifest


def _put_part(site: Site, folder: str, number: int, staged: str) -> Part:
    """Copy one part in, unless it is there."""
    with site.scratch() as scratch:
        path = site.store.download(staged, Path(scratch) / "part.parquet")
        digest = _sha256(path)
        part = Part(name=f"part-{number:05d}-{digest[:16]}.parquet", size=path.stat().st_size, sha256=digest)
        if site.store.head(f"{folder}/{part.name}") is None:
            site.store.put(f"{folder}/{part.name}", path)
        return part


def is_swept(found: Found, manifest: Manifest, old: set[str], now: float) -> bool:
    """Whether an object of a partition's folder is of no use to anybody any more."""
    name = found.key.rpartition("/")[2]
    if name == MANIFEST or name in {part.name for part in manifest.parts}:
        return False
    return name in old or now - found.modified > ORPHAN_SECONDS


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
