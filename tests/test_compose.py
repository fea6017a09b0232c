"""docker-compose.yaml and the Dockerfile, checked without an engine: the specification, and what no tool looks at."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from local import compose
from local.stack import BUCKETS
from nightshift.settings import read_settings

ROOT = Path(__file__).parents[1]
FILE = yaml.safe_load(compose.FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = FILE["services"]


def test_it_is_what_the_specification_of_compose_says():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(compose.FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_bounded_unprivileged_and_watched(name):
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"]
    assert limits["cpus"]
    assert service["user"] not in ("root", "0", 0)
    assert service["cap_drop"] == ["ALL"]
    assert "healthcheck" in service or service["restart"] == "no", "what goes on running says how it is"


def test_every_name_that_a_service_uses_is_defined():
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES, f"{name} waits for {needed}, which is nowhere"
            one_shot = SERVICES[needed]["restart"] == "no"
            assert how["condition"] == ("service_completed_successfully" if one_shot else "service_healthy")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in FILE["volumes"] or (ROOT / source).exists(), f"{name} mounts {source}, which is nowhere"


def test_no_secret_stands_in_the_file_or_in_an_environment():
    text = compose.FILE.read_text(encoding="utf-8")
    assert not re.search(
        r"(?i)(password|secret|fernet_key|token)\w*: *[\"']?(?!/run/nightshift|cat /run/nightshift)[A-Za-z0-9+/=_-]{12,}", text
    )
    secret = ("SQL_ALCHEMY_CONN", "FERNET_KEY", "BROKER_URL", "RESULT_BACKEND", "JWT_SECRET")
    named = [key for key in SERVICES["airflow-worker"]["environment"] if any(word in key for word in secret)]
    assert len(named) == len(secret)
    assert all(key.endswith("_CMD") for key in named)


def test_secrets_are_made_once_and_fit_together(tmp_path):
    command = [sys.executable, str(ROOT / "docker" / "make_secrets.py"), str(tmp_path)]
    subprocess.run(command, check=True)
    first = {path.name: path.read_text() for path in tmp_path.iterdir()}
    subprocess.run(command, check=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == first
    assert f":{first['database_password']}@postgres/" in first["database_url"]
    assert f":{first['redis_password']}@redis:6379/" in first["broker_url"]
    assert f"requirepass {first['redis_password']}\n" in first["redis.conf"]
    assert list(json.loads(first["passwords.json"])) == ["admin"]
    used = set(re.findall(r"/run/nightshift/([\w.]+)", compose.FILE.read_text(encoding="utf-8")))
    assert used <= set(first), "every secret that a container reads is made"


def test_the_rehearsal_sets_what_the_file_asks_for():
    lines = (ROOT / "docker" / "rehearsal.env").read_text(encoding="utf-8").splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert read_settings(given).store == "s3://nightshift/store"
    assert {json.loads(given[name].strip("'"))["conn_type"] for name in given if name.startswith("AIRFLOW_CONN_")} == {"aws", "openai"}
    assert set(given) <= set(re.findall(r"\$\{(\w+)", compose.FILE.read_text(encoding="utf-8")))


def test_the_image_takes_what_its_containers_start():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [part for line in dockerfile.splitlines() if line.startswith("COPY") for part in line.split()[2:-1]]
    assert all((ROOT / part).exists() for part in copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert all(any(part.startswith(line[1:]) for line in ignored if line.startswith("!")) for part in copied)
    assert "USER 50000:0" in dockerfile
    assert "--require-hashes" in dockerfile


def test_the_rehearsal_has_the_buckets_of_the_local_stack():
    made = re.search(r"^BUCKETS = (.+)$", (ROOT / "docker" / "make_buckets.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert made
    assert ast.literal_eval(made[1]) == BUCKETS
