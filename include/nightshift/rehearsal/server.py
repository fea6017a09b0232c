"""The rehearsal server: OpenAI's Files, Batches, Chat Completions, Responses, Embeddings and Models; Bedrock beside it; one bill.

Fidelity is to the OpenAI API as read on 2026-11-21. What is under `/rehearsal` is ours: bill, faults, pace.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import FileResponse, HTMLResponse, Response, StreamingResponse

from nightshift.rehearsal import model, openai_desk
from nightshift.rehearsal.answers import broken
from nightshift.rehearsal.bedrock_server import add_bedrock
from nightshift.rehearsal.book import ON_DEMAND, Book, StoredBatch
from nightshift.rehearsal.engine import Pace
from nightshift.rehearsal.faults import Faults
from nightshift.rehearsal.openai_desk import new_file_id
from nightshift.rehearsal.state import BATCH_ENDPOINTS, KEY, ApiError, State

FILE_LIFE_SECONDS = 2_592_000
PLAYED = ("gpt-5.4-nano", "gpt-5.4-mini", "gpt-5.4", "gpt-4o-mini", "gpt-4.1-mini", "text-embedding-3-small", model.NAME)


def build_app(folder: Path, *, key: str = KEY, pace: Pace | None = None, faults: Faults | None = None) -> FastAPI:
    """The server over a state folder: stopped and started again on it, it goes on where it was."""
    book = Book(folder)
    state = State(book, key, pace or Pace(), faults or Faults())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.engine.start()
        yield
        state.engine.stop()
        book.close()

    app = FastAPI(title="Nightshift rehearsal", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(ApiError)
    async def shown(request: Request, error: ApiError) -> Response:
        headers = {name.replace("_", "-"): value for name, value in error.headers.items()}
        return _json(error.body, error.status, headers)

    _files(app, state)
    _batches(app, state)
    _models(app, state)
    _on_demand(app, state)
    _rehearsal(app, state)
    add_bedrock(app, state)
    return app


def _files(app: FastAPI, state: State) -> None:
    @app.post("/v1/files")
    async def create_file(request: Request) -> Response:
        state.admit(request)
        form = await request.form()
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(purpose, str):
            raise ApiError(400, "Missing required parameter: 'purpose'.", "missing_required_parameter", "purpose")
        if isinstance(upload, str) or upload is None:
            raise ApiError(400, "Missing required parameter: 'file'.", "missing_required_parameter", "file")
        if purpose == "batch" and not str(upload.filename).endswith(".jsonl"):
            raise ApiError(400, "Invalid file format for Batch API. Must be .jsonl")
        file_id, now = new_file_id(), time.time()
        size = _keep(upload, state.book.path_of(file_id))
        life = form.get("expires_after[seconds]")
        expires_at = now + int(str(life)) if life else (now + FILE_LIFE_SECONDS if purpose == "batch" else None)
        state.book.add_file(file_id, str(upload.filename), purpose, size, now, expires_at)
        return _json(_file_object(state.file(file_id)))

    @app.get("/v1/files")
    def list_files(request: Request, after: str | None = None, limit: int = 10_000, purpose: str | None = None) -> Response:
        state.admit(request)
        files = [_file_object(file) for file in state.book.list_files() if purpose in (None, file["purpose"])]
        return _json(_page(files, after, limit))

    @app.get("/v1/files/{file_id}")
    def retrieve_file(request: Request, file_id: str) -> Response:
        state.admit(request)
        return _json(_file_object(state.file(file_id)))

    @app.get("/v1/files/{file_id}/content")
    def file_content(request: Request, file_id: str) -> Response:
        state.admit(request)
        state.file(file_id)
        path = state.book.path_of(file_id)
        if state.use("content_502"):
            raise ApiError(502, "Bad gateway.")
        if state.faults.results_gone or state.use("content_404"):
            raise ApiError(404, f"No such File object: {file_id}", param="id")
        if state.use("content_cut"):
            return broken(path.read_bytes(), path.stat().st_size)
        if state.use("content_short"):
            return StreamingResponse(iter([path.read_bytes()[: path.stat().st_size // 2]]), media_type="application/octet-stream")
        return FileResponse(path, media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}")
    def delete_file(request: Request, file_id: str) -> Response:
        state.admit(request)
        state.file(file_id)
        state.book.delete_file(file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})


def _batches(app: FastAPI, state: State) -> None:
    @app.post("/v1/batches")
    async def create_batch(request: Request) -> Response:
        state.admit(request)
        body = await _body(request)
        file = _checked_batch(state, body)
        if state.use("create_quota"):
            raise ApiError(429, "You exceeded your current quota, please check your plan and billing details.", "insufficient_quota")
        if state.use("create_500"):
            raise ApiError(500, "The server had an error while processing your request.")
        now = time.time()
        batch = StoredBatch(
            id=f"batch_{secrets.token_hex(16)}",
            endpoint=body["endpoint"],
            input_file_id=file["id"],
            metadata=body.get("metadata"),
            created_at=now,
            expires_at=now + state.engine.pace.window,
        )
        state.book.add_batch(batch)
        if state.use("create_500_after_accept"):
            raise ApiError(500, "The server had an error while processing your request.")
        shaped = orjson.dumps(_batch_object(state, batch))
        return broken(shaped, len(shaped)) if state.use("create_cut_after_accept") else Response(shaped, media_type="application/json")

    @app.get("/v1/batches")
    def list_batches(request: Request, after: str | None = None, limit: int = 20) -> Response:
        state.admit(request)
        if not 1 <= limit <= 100:
            raise ApiError(400, "Invalid 'limit': must be between 1 and 100.", "invalid_value", "limit")
        shown = [
            batch for batch in state.book.batches() if not batch.settings and state.visible(batch.created_at, state.faults.list_lag_seconds)
        ]
        return _json(_page([_batch_object(state, batch) for batch in shown], after, limit))

    @app.get("/v1/batches/{batch_id}")
    def retrieve_batch(request: Request, batch_id: str) -> Response:
        state.admit(request)
        if state.use("poll_500"):
            raise ApiError(500, "The server had an error while processing your request.")
        if state.use("poll_html"):
            return HTMLResponse("<html><body>Welcome to the proxy</body></html>")
        return _json(_batch_object(state, state.batch(batch_id)))

    @app.post("/v1/batches/{batch_id}/cancel")
    def cancel_batch(request: Request, batch_id: str) -> Response:
        state.admit(request)
        if state.use("cancel_500"):
            raise ApiError(500, "The server had an error while processing your request.")
        before = state.batch(batch_id)
        if before.status in ("completed", "failed", "expired"):
            raise ApiError(409, f"Cannot cancel a batch with status '{before.status}'.")
        batch = state.engine.cancel(batch_id)
        return _json(_batch_object(state, batch or before))


def _checked_batch(state: State, body: dict[str, Any]) -> dict[str, Any]:
    """The input file of a batch about to be created, or the 400 that OpenAI answers."""
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not body.get(name):
            raise ApiError(400, f"Missing required parameter: '{name}'.", "missing_required_parameter", name)
    if body["endpoint"] not in BATCH_ENDPOINTS:
        raise ApiError(400, f"Invalid value: '{body['endpoint']}'.", "invalid_value", "endpoint")
    if body["completion_window"] != "24h":
        raise ApiError(400, "Invalid value for 'completion_window'. Supported: '24h'.", "invalid_value", "completion_window")
    _check_metadata(body.get("metadata"))
    file = state.book.file(body["input_file_id"])
    if file is None or not state.visible(file["created_at"], state.faults.file_hidden_seconds):
        why = f"Cannot find file {body['input_file_id']}, or project proj_rehearsal does not have access to it."
        raise ApiError(400, why, param="file_id")
    if file["purpose"] != "batch":
        raise ApiError(400, f"File {file['id']} has purpose '{file['purpose']}', expected 'batch'.", param="input_file_id")
    return file


def _models(app: FastAPI, state: State) -> None:
    @app.get("/v1/models")
    def list_models(request: Request) -> Response:
        state.admit(request)
        return _json({"object": "list", "data": [_model_object(name) for name in PLAYED]})

    @app.get("/v1/models/{name}")
    def retrieve_model(request: Request, name: str) -> Response:
        state.admit(request)
        if not openai_desk.known_model(name):
            raise ApiError(404, f"The model '{name}' does not exist or you do not have access to it.", "model_not_found", "model")
        return _json(_model_object(name))


def _on_demand(app: FastAPI, state: State) -> None:
    def answering(endpoint: str) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            state.admit(request)
            body = await _body(request)
            if state.use("live_429"):
                raise ApiError(429, "Rate limit reached for requests.", "rate_limit_exceeded", retry_after="0.2")
            if state.use("live_500"):
                raise ApiError(500, "The server had an error while processing your request.")
            if state.use("live_html"):
                return HTMLResponse("<html><body>Welcome to the proxy</body></html>")
            async with state.slot():
                await asyncio.sleep(state.faults.live_seconds)
                status, shaped, tokens_in, tokens_out = openai_desk.answer(endpoint, body)
                if status == 200:
                    asked = request.headers.get("x-client-request-id") or secrets.token_hex(16)
                    line = (asked, str(body.get("model")), tokens_in, tokens_out)
                    state.book.charge(f"{ON_DEMAND} {secrets.token_hex(8)}", [line], "standard")
                if state.use("live_cut"):
                    return broken(orjson.dumps(shaped), 1 << 20)
            return _json(shaped, status)

        return answer

    for endpoint in BATCH_ENDPOINTS:
        app.add_api_route(endpoint, answering(endpoint), methods=["POST"])


def _rehearsal(app: FastAPI, state: State) -> None:
    @app.get("/rehearsal/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "model": model.NAME}

    @app.get("/rehearsal/bill")
    def bill(by_request: bool = False) -> Response:
        return _json(state.book.bill(by_request=by_request))

    @app.get("/rehearsal/load")
    def load() -> dict[str, int]:
        return {"running": state.running, "most_running": state.most_running}

    @app.get("/rehearsal/faults")
    def faults() -> Faults:
        return state.faults

    @app.put("/rehearsal/faults")
    def set_faults(wanted: Faults) -> Faults:
        state.faults = wanted
        return wanted

    @app.put("/rehearsal/pace")
    async def set_pace(request: Request) -> Response:
        state.engine.pace = Pace(**await _body(request))
        return _json(state.engine.pace)


def _keep(upload: UploadFile | Any, path: Path) -> int:
    """Stream an upload to disk; its size in bytes."""
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file, 1 << 20)
    return path.stat().st_size


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "We could not parse the JSON body of your request.") from error
    if not isinstance(body, dict):
        raise ApiError(400, "The body has to be a JSON object.")
    return body


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if len(metadata) > 16 or any(len(k) > 64 or not isinstance(v, str) or len(v) > 512 for k, v in metadata.items()):
        raise ApiError(
            400, "Invalid 'metadata': at most 16 pairs, keys of 64 and string values of 512 characters.", "invalid_value", "metadata"
        )


def _file_object(file: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "file",
        "id": file["id"],
        "purpose": file["purpose"],
        "filename": file["filename"],
        "bytes": file["bytes"],
        "created_at": int(file["created_at"]),
        "expires_at": int(file["expires_at"]) if file["expires_at"] else None,
        "status": "processed",
        "status_details": None,
    }


def _batch_object(state: State, batch: StoredBatch) -> dict[str, Any]:
    running = batch.status in ("in_progress", "finalizing", "cancelling")
    done = state.engine.progress(batch, batch.cancelling_at or time.time()) if running else batch.completed
    failed = 0 if running else batch.failed
    moments = ("in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")
    times = {name: None if getattr(batch, name) is None else int(getattr(batch, name)) for name in moments}
    ended_at = max(getattr(batch, name) or 0.0 for name in ("completed_at", "failed_at", "expired_at", "cancelled_at"))
    lag = state.faults.results_lag_seconds
    unheard_of = state.faults.unknown_status and batch.status == "in_progress"
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": f"{batch.model}-rehearsal" if batch.model else None,
        "errors": {"object": "list", "data": batch.errors} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": "contemplating" if unheard_of else batch.status,
        "output_file_id": batch.output_file_id if state.visible(ended_at, lag) else None,
        "error_file_id": batch.error_file_id if state.visible(ended_at, lag / 2) else None,
        "created_at": int(batch.created_at),
        **times,
        "request_counts": {"total": batch.total + 7 * state.faults.odd_counts, "completed": done, "failed": failed},
        "metadata": batch.metadata,
    }


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "rehearsal"}


def _page(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """One page of a list, newest first; `after` is the id that the last page ended with."""
    start = next((i + 1 for i, item in enumerate(items) if item["id"] == after), 0) if after else 0
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    shown = {"x-request-id": f"req_{secrets.token_hex(16)}", "openai-version": "2020-10-01", **(headers or {})}
    return Response(orjson.dumps(body), status, shown, "application/json")
