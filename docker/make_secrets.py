"""Secrets of a new installation, made once into a folder that its containers share: a second start finds them."""

import json
import secrets
import sys
from base64 import urlsafe_b64encode
from pathlib import Path


def make(folder: Path) -> None:
    """Write what is missing. The folder is the volume of this installation, and nobody else sees it."""
    database, queue = (_once(folder / name, secrets.token_urlsafe(24)) for name in ("database_password", "redis_password"))
    _once(folder / "jwt_secret", secrets.token_hex(32))
    _once(folder / "fernet_key", urlsafe_b64encode(secrets.token_bytes(32)).decode())
    _once(folder / "passwords.json", json.dumps({"admin": secrets.token_urlsafe(12)}))
    _once(folder / "database_url", f"postgresql+psycopg2://airflow:{database}@postgres/airflow")
    _once(folder / "result_backend", f"db+postgresql://airflow:{database}@postgres/airflow")
    _once(folder / "broker_url", f"redis://:{queue}@redis:6379/0")
    _once(folder / "redis.conf", f"requirepass {queue}\ndir /data\nappendonly yes\nmaxmemory-policy noeviction\n")


def _once(path: Path, value: str) -> str:
    if path.exists():
        return path.read_text()
    path.write_text(value)
    path.chmod(0o644)  # the database and the queue run as other users
    return value


if __name__ == "__main__":
    make(Path(sys.argv[1]))
