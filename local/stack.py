"""The local stack: S3 (ministack), the rehearsal provider and Airflow, as processes of one machine, state in one folder.

`up` starts what is not running, `down` stops it. Everything listens on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from local import compose, postgres
from local.airflow_api import AirflowApi, is_healthy

ROOT = Path(__file__).resolve().parent.parent
BUCKETS = ("reviews", "pictures", "nightshift")
STORE = "s3://nightshift/store"
USER = "admin"  # of Airflow
KEY = "sk-rehearsal"
AWS = {"AWS_ACCESS_KEY_ID": "rehearsal", "AWS_SECRET_ACCESS_KEY": "rehearsal", "AWS_DEFAULT_REGION": "us-east-1"}
BEDROCK_SERVICES = ("bedrock", "bedrock-runtime", "service-quotas")
BEDROCK_ROLE_ARN = "arn:aws:iam::123456789012:role/rehearsal"
START_SECONDS = 240
WARM = {  # LocalExecutor's workers come from a process that has imported what tasks import
    "AIRFLOW__SCHEDULER__MP_START_METHOD": "forkserver",
    "AIRFLOW__SCHEDULER__MP_FORKSERVER_PRELOAD": "nightshift_airflow.warm",
}
PORTS = {  # and the part that listens there
    "aws_port": "aws",
    "database_port": "database",
    "queue_port": "queue",
    "provider_port": "provider",
    "airflow_port": "airflow",
    "worker_log_port": "airflow",
    "trigger_log_port": "airflow",
}
AIRFLOW = str(Path(sys.executable).parent / "airflow")


class StackFailed(Exception):
    """A part of the stack did not come up, or died; the message ends with the end of its log."""


@dataclass(kw_only=True)
class Stack:
    """Where everything is. Written to `stack.json` in the state folder."""

    folder: str
    aws_port: int
    database_port: int
    provider_port: int
    airflow_port: int
    worker_log_port: int
    trigger_log_port: int
    password: str
    jwt_secret: str
    fernet_key: str
    queue_port: int = 6380
    workers: int = 0  # 0: tasks run in the scheduler's own executor
    pids: dict[str, int] = field(default_factory=dict)

    @property
    def aws(self) -> str:
        """The S3 endpoint."""
        return f"http://127.0.0.1:{self.aws_port}"

    @property
    def database(self) -> str:
        """Airflow's metadata database."""
        return f"postgresql+psycopg2://{postgres.USER}:{self.password}@127.0.0.1:{self.database_port}/{postgres.DATABASE}"

    @property
    def queue(self) -> str:
        """The queue of tasks, where workers take them from."""
        return f"redis://:{self.password}@127.0.0.1:{self.queue_port}/0"

    @property
    def provider(self) -> str:
        """The rehearsal provider's root."""
        return f"http://127.0.0.1:{self.provider_port}"

    @property
    def airflow(self) -> str:
        """The Airflow UI and API."""
        return f"http://127.0.0.1:{self.airflow_port}"

    def save(self) -> None:
        """Keep it for `down`, and for the next `up`."""
        path = Path(self.folder) / "stack.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self), indent=1))


def load(folder: Path) -> Stack | None:
    """The stack that was started on a folder, running or not."""
    path = folder / "stack.json"
    return Stack(**json.loads(path.read_text())) if path.exists() else None


def reserve(folder: Path, *, apart: bool = False) -> Stack:
    """The stack of a folder as it will be started: where its parts will listen. `apart`: where no other stack begins to look."""
    folder.mkdir(parents=True, exist_ok=True)
    stack = _ports(load(folder) or _new(folder))
    for name in PORTS if apart else ():
        setattr(stack, name, _free_port())
    stack.save()
    return stack


def up(
    folder: Path,
    *,
    jobs: Path | None = None,
    rehearse: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
    extra: Mapping[str, str] | None = None,
    workers: int = 0,
) -> Stack:
    """Start what is not running; every part is healthy when this returns. Raises StackFailed with the log of what is not.

    With `workers` tasks are queued for so many Celery workers, and Airflow's parts are the processes of docker-compose.yaml.
    """
    stack = reserve(folder)
    stack.workers = workers
    try:
        say("S3 (ministack)")
        _start(stack, "aws", [str(ROOT / ".venv/local/bin/ministack")], _aws_env(stack))
        _until(stack, "aws", lambda: _ok(f"{stack.aws}/_ministack/health"))
        _make_buckets(stack)
        if postgres.wrapper() is None:
            say("no PostgreSQL can be run here: SQLite in its place, with which Airflow creates no backfills")
        else:
            say("PostgreSQL")
            postgres.make(folder / "database", stack.password)
            _start(stack, "database", postgres.server(folder / "database", stack.database_port), client_env(stack))
            _until(stack, "database", lambda: postgres.is_ready(stack.database_port))
        say("rehearsal provider")
        command = [
            sys.executable,
            "-m",
            "nightshift.cli",
            "rehearse",
            "--state",
            str(folder / "provider"),
            "--port",
            str(stack.provider_port),
        ]
        _start(stack, "provider", [*command, "--key", KEY, *rehearse], client_env(stack))
        _until(stack, "provider", lambda: _ok(f"{stack.provider}/rehearsal/health"))
        env = {**airflow_env(stack, jobs), **(extra or {})}
        if workers:
            _start_queued(stack, env, say)
        else:
            say("Airflow (scheduler, triggerer, dag-processor, API server)")
            _start(stack, "airflow", [AIRFLOW, "standalone"], env)
            _until(stack, "airflow", lambda: is_healthy(stack.airflow))
    except BaseException:
        down(folder)
        raise
    return stack


def _start_queued(stack: Stack, env: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Start the queue, the processes of docker-compose.yaml, and the workers."""
    say("Redis")
    queue = ["redis-server", "--port", str(stack.queue_port), "--bind", "127.0.0.1", "--requirepass", stack.password, "--save", ""]
    _start(stack, "queue", queue, client_env(stack))
    _until(stack, "queue", lambda: not _is_free(stack.queue_port))
    say("Airflow (API server, scheduler, dag-processor, triggerer)")
    subprocess.run([AIRFLOW, "db", "migrate"], env=dict(env), check=True, capture_output=True, cwd=ROOT)
    for service in compose.PARTS:
        if service == "airflow-worker":
            continue
        command = [str(stack.airflow_port) if part == "8080" else part for part in compose.command(service)]
        _start(stack, service, [AIRFLOW, *command], env)
    _until(stack, "airflow-apiserver", lambda: is_healthy(stack.airflow))
    for number in range(1, stack.workers + 1):
        say(f"worker {number}")
        start_worker(stack, number, env)


def start_worker(stack: Stack, number: int, env: Mapping[str, str]) -> None:
    """Start one Celery worker. Of several on one machine none serves logs: they would want the same port."""
    own = ["--celery-hostname", f"worker-{number}@localhost", "--skip-serve-logs"]
    _start(stack, f"worker-{number}", [AIRFLOW, *compose.command("airflow-worker"), *own], env)


def down(folder: Path) -> None:
    """Stop what runs, gently: ministack writes its queues only when it is asked to stop."""
    stack = load(folder)
    if stack is None:
        return
    last = ("provider", "queue", "database", "aws")
    for name in [*(name for name in stack.pids if name not in last), *last]:
        pid = stack.pids.pop(name, None)
        if pid is not None:
            _end(pid)
    stack.save()


def is_up(folder: Path) -> bool:
    """Whether every part runs."""
    stack = load(folder)
    return stack is not None and any(name.startswith("airflow") for name in stack.pids) and all(_alive(pid) for pid in stack.pids.values())


def client_env(stack: Stack) -> dict[str, str]:
    """The environment in which `nightshift` and every AWS tool talk to the stack."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "NIGHTSHIFT", "AWS_", "OPENAI_"))}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # where it is set, every Airflow process compiles all its imports again
    return {
        **env,
        **AWS,
        "AWS_ENDPOINT_URL": stack.aws,
        **{f"AWS_ENDPOINT_URL_{service.upper().replace('-', '_')}": stack.provider for service in BEDROCK_SERVICES},
        "NIGHTSHIFT_BEDROCK_ROLE_ARN": BEDROCK_ROLE_ARN,
        "OPENAI_BASE_URL": f"{stack.provider}/v1",
        "OPENAI_API_KEY": KEY,
        "NIGHTSHIFT_STORE": STORE,
        "NIGHTSHIFT_POLL_SECONDS": "2",
    }


def airflow_env(stack: Stack, jobs: Path | None = None) -> dict[str, str]:
    """The environment of Airflow: connections to the stack, and nothing outside its folder."""
    home = Path(stack.folder) / "airflow"
    home.mkdir(parents=True, exist_ok=True)
    passwords = home / "passwords.json"
    passwords.touch(mode=0o600)
    passwords.write_text(json.dumps({USER: stack.password}))
    aws = {
        "conn_type": "aws",
        "login": AWS["AWS_ACCESS_KEY_ID"],
        "password": AWS["AWS_SECRET_ACCESS_KEY"],
        "extra": {
            "region_name": AWS["AWS_DEFAULT_REGION"],
            "endpoint_url": stack.aws,
            "service_config": {
                **{service: {"endpoint_url": stack.provider} for service in BEDROCK_SERVICES},
                "bedrock": {"endpoint_url": stack.provider, "role_arn": BEDROCK_ROLE_ARN},
            },
        },
    }
    openai = {"conn_type": "openai", "host": f"{stack.provider}/v1", "password": KEY}
    env = {name: value for name, value in client_env(stack).items() if not name.startswith(("OPENAI_", "AWS_"))}
    return {
        **env,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW_CONN_AWS_DEFAULT": json.dumps(aws),
        "AIRFLOW_CONN_OPENAI_DEFAULT": json.dumps(openai),
        "AIRFLOW__API__BASE_URL": stack.airflow,
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(stack.airflow_port),
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": stack.jwt_secret,
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{stack.airflow}/execution/",
        "AIRFLOW__CORE__FERNET_KEY": stack.fernet_key,
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        **({} if postgres.wrapper() is None else {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": stack.database}),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(stack.trigger_log_port),
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(stack.worker_log_port),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
        **(_queued_env(stack) if stack.workers else WARM),
        "NIGHTSHIFT_JOBS": str(jobs or ROOT / "include" / "jobs"),
        "NIGHTSHIFT_UPLOAD_POLL_SECONDS": "2",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",  # standalone calls `airflow` by name
        "PYTHONWARNINGS": "ignore",
    }


def _queued_env(stack: Stack) -> dict[str, str]:
    """What is different where workers take tasks from a queue: the settings of docker-compose.yaml, with the places of this machine."""
    return {
        **compose.settings(),
        "AIRFLOW__CELERY__BROKER_URL": stack.queue,
        "AIRFLOW__CELERY__RESULT_BACKEND": f"db+{stack.database.replace('+psycopg2', '')}",
        "AIRFLOW__CELERY__WORKER_CONCURRENCY": "2",
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_SERVER_PORT": str(_free_port()),
        "AIRFLOW__CORE__PARALLELISM": "16",
    }


def airflow_api(stack: Stack) -> AirflowApi:
    """The stack's Airflow, signed in as its only user."""
    return AirflowApi(stack.airflow, USER, stack.password)


def s3_client(stack: Stack) -> Any:
    """A boto3 client of the stack's S3."""
    import boto3

    return boto3.client(
        "s3", endpoint_url=stack.aws, aws_access_key_id="rehearsal", aws_secret_access_key="rehearsal", region_name="us-east-1"
    )


def tail(folder: Path, name: str, lines: int = 40) -> str:
    """The end of a part's log."""
    path = folder / f"{name}.log"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def _new(folder: Path) -> Stack:
    return Stack(
        folder=str(folder),
        aws_port=4566,
        database_port=5433,
        provider_port=8790,
        airflow_port=8080,
        worker_log_port=8793,
        trigger_log_port=8794,
        password=secrets.token_urlsafe(9),
        jwt_secret=secrets.token_hex(32),
        fernet_key=urlsafe_b64encode(secrets.token_bytes(32)).decode(),
    )


def _ports(stack: Stack) -> Stack:
    """Keep the ports of parts that run; move the others where somebody else listens."""
    for name, part in PORTS.items():
        runs = any(_alive(pid) for each, pid in stack.pids.items() if each == part or each.startswith(f"{part}-"))
        if not runs and not _is_free(getattr(stack, name)):
            setattr(stack, name, _free_port())
    return stack


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _aws_env(stack: Stack) -> dict[str, str]:
    state = Path(stack.folder) / "aws"
    state.mkdir(exist_ok=True)
    return {
        **client_env(stack),
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(stack.aws_port),
        "MINISTACK_HOST": "127.0.0.1",
        "PERSIST_STATE": "1",
        "STATE_DIR": str(state),
        "S3_PERSIST": "1",
        "S3_DATA_DIR": str(state / "s3"),
    }


def _make_buckets(stack: Stack) -> None:
    client = s3_client(stack)
    for bucket in BUCKETS:
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=bucket)


def _start(stack: Stack, name: str, command: list[str], env: Mapping[str, str]) -> None:
    """Start a part in a session of its own, unless it runs."""
    if name in stack.pids and _alive(stack.pids[name]):
        return
    with (Path(stack.folder) / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=dict(env), stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=ROOT
        )
    stack.pids[name] = process.pid
    stack.save()


def _until(stack: Stack, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if not _alive(stack.pids[name]):
            raise StackFailed(f"{name} ended while starting. The end of its log:\n{tail(Path(stack.folder), name)}")
        if time.monotonic() > deadline:
            raise StackFailed(f"{name} is not healthy after {START_SECONDS} s. The end of its log:\n{tail(Path(stack.folder), name)}")
        time.sleep(0.5)


def _alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a dead child of ours would look alive until it is waited for
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _end(pid: int) -> None:
    """SIGTERM to the whole session, SIGKILL to what is left of it."""
    for sign, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, sign)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _session_alive(pid):
            time.sleep(0.2)


def _session_alive(pid: int) -> bool:
    _alive(pid)
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def main() -> None:
    """`python -m local.stack up|down|env`"""
    folder = ROOT / ".nightshift"
    match sys.argv[1:]:
        case ["up"]:
            stack = up(folder, say=lambda part: print(f"starting {part}", flush=True))
            print(f"\nAirflow    {stack.airflow}   user {USER}, password {stack.password}")
            print(f"S3         {stack.aws}   upload to s3://reviews/inbox/ and the DAG `uploads` starts a run")
            print(f"provider   {stack.provider}/v1   bill at {stack.provider}/rehearsal/bill")
            print('\nFor the command line: eval "$(make env)"   Stop with: make down')
        case ["down"]:
            down(folder)
        case ["env"]:
            found = load(folder)
            if found is None:
                sys.exit("The stack was never started: make up")
            for name, value in client_env(found).items():
                if name.startswith(("AWS_", "OPENAI_", "NIGHTSHIFT_")):
                    print(f"export {name}={value}")
        case _:
            sys.exit(main.__doc__)


if __name__ == "__main__":
    try:
        main()
    except StackFailed as failed:
        sys.exit(str(failed))
