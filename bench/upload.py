"""What it costs a plan to put its shards into S3 while it makes them: `python -m bench.upload`.

The same plan takes turns, into a folder and into an S3 that swallows what it is given and remembers nothing: neither a disk nor
a network is measured, only signing, hashing and sending. Wall seconds, medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from bench.__main__ import FOLDER, MANY, Contender, measured, take_turns
from bench.scale import until_up
from bench.steps import forget
from nightshift.rehearsal.served import free_port

BAR = 1.3
AWS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
ABSENT = b"<Error><Code>NoSuchKey</Code><Message>nothing is kept here</Message></Error>"
EMPTY = b"<ListBucketResult><Name>bench</Name><IsTruncated>false</IsTruncated></ListBucketResult>"


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: every write succeeds, nothing is ever found."""
    while head := await _head(reader):
        method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        found = LENGTH.search(head)
        left = int(found[1]) if found else 0
        while left:
            chunk = await reader.read(min(left, 1 << 20))
            if not chunk:  # who sent it has gone
                writer.close()
                return
            left -= len(chunk)
        status, body = _answer(method, target)
        writer.write(
            b'HTTP/1.1 %b\r\nETag: "0"\r\nLast-Modified: Sun, 22 Nov 2026 12:00:00 GMT\r\nContent-Length: %d\r\n\r\n%b'
            % (status, len(body), b"" if method == "HEAD" else body)
        )
        await writer.drain()
    writer.close()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def _answer(method: str, target: str) -> tuple[bytes, bytes]:
    asked = parse_qs(urlsplit(target).query, keep_blank_values=True)
    if method == "POST" and "uploads" in asked:
        return b"200 OK", b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
    if method == "POST":
        return b"200 OK", b'<CompleteMultipartUploadResult><ETag>"0"</ETag></CompleteMultipartUploadResult>'
    if method == "GET" and "list-type" in asked:
        return b"200 OK", EMPTY
    return (b"404 Not Found", ABSENT) if method in ("GET", "HEAD") else (b"200 OK", b"")


async def serve(port: int) -> None:
    """The S3 that swallows, until it is stopped."""
    async with await asyncio.start_server(swallow, "127.0.0.1", port, limit=1 << 20) as server:
        await server.serve_forever()


def main() -> int:
    """Take turns, print, and say by the exit code whether the bar holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve))
        return 0
    folder: Path = (FOLDER / f"{given.rows}").resolve()
    if not (folder / "reviews.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        measured([sys.executable, "-m", "bench.reviews", str(folder / "reviews.parquet"), str(given.rows)])
    port = free_port()
    os.environ.update(AWS, AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{port}")
    serving = subprocess.Popen([sys.executable, "-m", "bench.upload", "--serve", str(port)])
    plan = [sys.executable, "-m", "bench.steps", "plan", str(folder)]
    try:
        until_up(f"http://127.0.0.1:{port}")
        much = given.rows >= MANY
        disk = Contender("plan, into a folder", [plan], lambda: forget(folder, "plan"), much)
        s3 = Contender("plan, into S3", [[*plan, "reviews", "s3://bench/store"]], moves_much=much)
        take_turns([disk, s3], given.rounds)
    finally:
        serving.terminate()
    print(f"| {given.rows:,} rows | wall s | CPU-s | MB |\n|---|---:|---:|---:|")
    for each in (disk, s3):
        print(f"| {each.name} | {each.wall:.2f} | {each.cpu:.2f} | {each.rss:.0f} |")
    ratio = s3.wall / disk.wall
    print(f"\nS3 against the folder, wall: {ratio:.2f} (at most {BAR})")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
