"""Jobs that ask about pictures: fetched from anywhere, made fit on the worker, sent as each provider wants them, copies beside the results."""

from __future__ import annotations

import io
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pytest_httpserver import HTTPServer

from nightshift.errors import InputChanged, ProviderUnavailable
from nightshift.job import ImagesSpec, Job, RenditionSpec
from nightshift.job_file import load_job
from nightshift.pictures import PictureUnreadable, prepare, render
from nightshift.providers.forms import form_of
from nightshift.providers.protocol import Question
from nightshift.steps.approve import approve
from nightshift.steps.discover import discover
from nightshift.steps.plan import draft, plan
from tests.conftest import World, go, make_world

ROOT = Path(__file__).parents[1]
SCHEMA = {"type": "object", "properties": {"alt_text": {"type": "string"}}, "required": ["alt_text"], "additionalProperties": False}
CLAUDE, NOVA = "us.anthropic.claude-haiku-4-5-20251001-v1:0", "amazon.nova-lite-v1:0"
PLACES = {
    "openai": {"provider": "openai", "model": "gpt-5.4-mini"},
    "responses": {"provider": "openai", "model": "gpt-5.4-mini", "endpoint": "/v1/responses"},
    "live": {"provider": "live", "model": "gpt-5.4-mini"},
    "converse": {"provider": "bedrock", "model": NOVA},
    "invoke": {"provider": "bedrock", "model": CLAUDE, "endpoint": "invoke"},
    "bedrock on demand": {"provider": "live", "model": NOVA, "endpoint": "converse"},
}


def picture(size=(64, 48), colour="red", form="PNG", **options) -> bytes:
    target = io.BytesIO()
    Image.new("RGBA" if form == "PNG" else "RGB", size, colour).save(target, form, **options)
    return target.getvalue()


def put(world: World, name: str, data: bytes) -> str:
    path = world.folder / "pictures" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return f"file://{path}"


def picture_job(world: World, request: dict, **changes) -> Job:
    return world.job(
        request={**request, "images": "picture"}, prompt="user:\nSay what {{ id }} shows.\n", schema=SCHEMA,
        **{"input": {"require": {}}, "output": {"keep": []}, **changes},
    )  # fmt: skip


def published(world: World) -> dict:
    parts = sorted(found.key for found in world.site.store.scan("results") if found.key.endswith(".parquet"))
    table = pa.concat_tables(pq.read_table(world.site.store.open(part)) for part in parts)
    return {row["id"]: row for row in table.to_pylist()}


@pytest.fixture
def cloud(tmp_path, rehearsal, bucket) -> World:
    rehearsal.faults(minimum_records=1)
    return make_world(tmp_path, rehearsal, store_uri=f"{bucket}/store")


@pytest.mark.parametrize("request_", PLACES.values(), ids=PLACES)
def test_every_row_is_asked_about_its_own_picture(cloud, request_):
    rows = [
        {"id": "red", "picture": put(cloud, "red.png", picture((64, 48), "red"))},
        {"id": "blue", "picture": put(cloud, "blue.jpg", picture((48, 64), "blue", "JPEG"))},
        {"id": "white", "picture": put(cloud, "white.webp", picture((50, 50), "white", "WEBP"))},
        {"id": "gone", "picture": f"file://{cloud.folder}/pictures/none.png"},
        {"id": "text", "picture": put(cloud, "text.png", b"not a picture at all")},
        {"id": "null", "picture": None},
    ]
    uri = cloud.write("a.jsonl", rows)
    summary, bill = go(cloud, picture_job(cloud, request_), uri), cloud.rehearsal.bill()
    assert (summary.outcomes["succeeded"], summary.outcomes["rejected"], bill["requests"]) == (3, 3, 3)
    found = published(cloud)
    assert found["red"]["alt_text"] == "A wide and dark picture, mostly red."
    assert found["blue"]["alt_text"] == "A tall and dark picture, mostly blue."
    assert found["white"]["alt_text"] == "A square and bright picture, mostly white."
    assert set(summary.reasons["rejected"]) >= {"picture: there is nothing at its URI", "picture: no picture"}
    assert any("not a picture that can be read" in reason for reason in summary.reasons["rejected"])
    assert not any(" at 0x" in reason for reason in summary.reasons["rejected"]), "the same picture is rejected in the same words"
    assert summary.cost_usd.actual == pytest.approx(bill["usd"], abs=2e-6)
    assert go(cloud, picture_job(cloud, request_), uri).requests.submitted == 0, "the same pictures are not bought again"


def test_a_picture_is_known_by_what_it_is_and_not_by_where(world):
    same = picture((32, 32), "green")
    rows = [{"id": "x", "picture": put(world, "one.png", same)}, {"id": "x2", "picture": put(world, "two.png", same)}]
    job = world.job(
        request={"images": "picture"},
        prompt="user:\nWhat is it{{ '' if id else '' }}?\n",
        schema=SCHEMA,
        input={"require": {}},
        output={"keep": []},
    )
    summary = go(world, job, world.write("a.jsonl", rows))
    assert (summary.outcomes["succeeded"], summary.requests.unique, summary.requests.duplicates) == (2, 1, 1)
    put(world, "two.png", picture((32, 32), "yellow"))
    assert go(world, job, world.write("a.jsonl", rows)).requests.submitted == 1


def test_F84_pictures_come_from_the_web_from_bytes_and_in_lists(world, httpserver: HTTPServer):
    httpserver.expect_request("/blue.png").respond_with_data(picture((48, 64), "blue"), content_type="image/png")
    httpserver.expect_request("/none.png").respond_with_data("no", status=404)
    job = picture_job(world, {})
    rows = [
        {"id": "web", "picture": httpserver.url_for("/blue.png")},
        {"id": "two", "picture": [httpserver.url_for("/blue.png"), put(world, "red.png", picture())]},
        {"id": "none", "picture": httpserver.url_for("/none.png")},
    ]
    summary = go(world, job, world.write("a.jsonl", rows))
    assert summary.reasons["rejected"] == {"picture: cannot be fetched (HTTP 404)": 1}
    assert published(world)["two"]["alt_text"] == "A tall and dark picture, mostly blue."
    table = pa.table({"id": ["bytes"], "picture": [picture((64, 48), "red")]})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    go(world, job, world.write("b.parquet", sink.getvalue()))
    assert published(world)["bytes"]["alt_text"] == "A wide and dark picture, mostly red."


def test_the_estimate_counts_what_a_picture_costs_and_not_its_bytes(world):
    """Noise does not compress: its base64 is a hundred times what the model is billed for."""
    noise = Image.effect_noise((900, 700), 120).convert("RGB")
    target = io.BytesIO()
    noise.save(target, "JPEG")
    rows = [{"id": f"r{i}", "picture": put(world, "noise.jpg", target.getvalue())} for i in range(4)]
    summary = go(world, picture_job(world, {}), world.write("a.jsonl", rows))
    assert summary.usage.input_tokens / 4 == pytest.approx(900 * 700 / 750, rel=0.2)
    assert summary.cost_usd.estimated == pytest.approx(summary.cost_usd.actual, rel=0.5)


def test_the_example_job_publishes_alt_texts_and_copies_that_load_quickly(world):
    job = load_job(ROOT / "include" / "jobs" / "image_alt_text.yaml")
    put(world, "sea.jpg", picture((2400, 1600), (50, 90, 200), "JPEG"))
    put(world, "tower.png", picture((300, 900), (120, 80, 50)))
    summary = go(world, job, f"file://{world.folder}/pictures/*")
    assert (summary.outcomes["succeeded"], summary.rows) == (2, 2)
    parts = sorted(found.key for found in world.site.store.scan("results") if found.key.endswith(".parquet"))
    rows = {row["name"]: row for row in pq.read_table(world.site.store.open(parts[0])).to_pylist()}
    assert rows["sea.jpg"]["alt_text"] == "A wide and dark picture, mostly blue."
    assert rows["sea.jpg"]["tags"] == ["wide", "dark", "blue"]
    sizes = {}
    for column, form in (("rendition_480_webp", "WEBP"), ("rendition_1600_avif", "AVIF")):
        for name, row in rows.items():
            with Image.open(io.BytesIO(world.site.store.get(world.site.store.key_of(row[column])))) as copy:
                assert copy.format == form
                sizes[name, form] = copy.size
    assert sizes == {
        ("sea.jpg", "WEBP"): (480, 320), ("sea.jpg", "AVIF"): (1600, 1067), ("tower.png", "WEBP"): (300, 900), ("tower.png", "AVIF"): (300, 900),
    }  # fmt: skip


def test_a_plan_that_keeps_nothing_writes_no_copies(world):
    job = load_job(ROOT / "include" / "jobs" / "image_alt_text.yaml")
    put(world, "sea.jpg", picture((2400, 1600), (50, 90, 200), "JPEG"))
    run = discover(world.site, job, pattern=f"file://{world.folder}/pictures/*", label="x", run="r", dates={})
    draft(world.site, run, keep=False)
    assert list(world.site.store.scan("results")) == []
    [shard] = approve(world.site, run, plan(world.site, run), ask=lambda: True).shards
    assert len(list(world.site.store.scan("results"))) == 2
    line = world.site.store.get(f"shards/{shard}/requests.jsonl")
    assert len(line) < 120_000, "2400 pixels have been made 1024"


def test_pictures_are_sent_upright_small_and_without_what_is_not_seen():
    image = Image.new("RGB", (400, 200), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    target = io.BytesIO()
    image.save(target, "JPEG", exif=exif)
    made = prepare(target.getvalue(), ImagesSpec(columns=["x"], longest_side=100))
    with Image.open(io.BytesIO(made.data)) as seen:
        assert (seen.size, seen.format, dict(seen.getexif())) == ((50, 100), "JPEG", {})
    assert made.tokens == 7
    clear = prepare(picture((10, 10), (0, 0, 0, 0)), ImagesSpec(columns=["x"], format="png"))
    with Image.open(io.BytesIO(clear.data)) as seen:
        assert seen.convert("RGB").getpixel((0, 0)) == (255, 255, 255), "what is clear is white, not black"


def test_F84_a_host_that_is_down_for_a_moment_rejects_nothing(world, httpserver: HTTPServer, monkeypatch):
    monkeypatch.setattr("nightshift.pictures.FETCH_TRIES", 1)
    httpserver.expect_oneshot_request("/red.png").respond_with_data("busy", status=503)
    httpserver.expect_request("/red.png").respond_with_data(picture(), content_type="image/png")
    uri = world.write("a.jsonl", [{"id": "web", "picture": httpserver.url_for("/red.png")}])
    with pytest.raises(ProviderUnavailable, match="HTTP 503"):
        go(world, picture_job(world, {}), uri)
    assert go(world, picture_job(world, {}), uri).outcomes["succeeded"] == 1


@pytest.mark.parametrize("value", ["http://a..b/x.png", "s3://b//x", "ftp://x", "file:///a/../b", 7, ""])
def test_a_place_that_can_be_nobodys_rejects_its_row_alone(cloud, value):
    rows = [{"id": "odd", "picture": value}, {"id": "red", "picture": put(cloud, "red.png", picture())}]
    summary = go(cloud, picture_job(cloud, {}, policy={"publish_at_least": 0.5}), cloud.write("a.jsonl", rows))
    assert (summary.outcomes["succeeded"], summary.outcomes["rejected"]) == (1, 1)


def test_objects_that_are_rows_are_read_as_they_are_pinned_and_none_is_left_out(world):
    job = load_job(ROOT / "include" / "jobs" / "image_alt_text.yaml")
    put(world, "a.png", picture((64, 48), "red"))
    put(world, "empty.png", b"")
    run = discover(world.site, job, pattern=f"file://{world.folder}/pictures/*", label="x", run="r", dates={})
    drafted = draft(world.site, run, keep=False)
    assert (drafted.rows, drafted.rejected) == (2, 1)
    put(world, "a.png", picture((48, 64), "blue"))
    with pytest.raises(InputChanged):
        draft(world.site, run, keep=False)


def test_pictures_of_any_shape_and_depth_become_renditions():
    tall = picture((300, 17_000), "red")
    with Image.open(io.BytesIO(render(tall, RenditionSpec(width=300)))) as copy:
        assert copy.height <= 16_000
    deep = io.BytesIO()
    Image.new("I;16", (20, 20), 32_768).save(deep, "PNG")
    with Image.open(io.BytesIO(render(deep.getvalue(), RenditionSpec(width=20, format="png")))) as copy:
        assert copy.convert("L").getpixel((0, 0)) == 128, "half bright, not white"


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG\r\n\x1a\n" + b"0" * 40, picture()[:60], b"<svg xmlns='http://www.w3.org/2000/svg'/>"],
    ids=["nothing", "broken", "cut", "svg"],
)
def test_what_is_no_picture_is_told(data):
    with pytest.raises(PictureUnreadable, match="not a picture that can be read"):
        prepare(data, ImagesSpec(columns=["x"]))


def test_a_bomb_is_not_opened(monkeypatch):
    monkeypatch.setattr("nightshift.pictures.MOST_PIXELS", 1000)
    with pytest.raises(PictureUnreadable, match="too many"):
        render(picture((100, 100)), RenditionSpec(width=50))


@pytest.mark.parametrize("request_", PLACES.values(), ids=PLACES)
def test_a_picture_stands_in_the_body_as_the_provider_wants_it(request_):
    endpoint = request_.get("endpoint", "converse" if request_["provider"] == "bedrock" else "/v1/chat/completions")
    form = form_of(endpoint)
    body = form.body(Question(model=request_["model"], system="S", user="U", parameters={}, schema=None, pictures=True))
    assert orjson.dumps(body).count(b"PICTURES") == 1
    part = form.picture("image/jpeg", "AAAA")
    wanted = {
        "/v1/chat/completions": {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}},
        "/v1/responses": {"type": "input_image", "image_url": "data:image/jpeg;base64,AAAA"},
        "converse": {"image": {"format": "jpeg", "source": {"bytes": "AAAA"}}},
        "invoke": {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "AAAA"}},
    }
    assert part == wanted[endpoint]
