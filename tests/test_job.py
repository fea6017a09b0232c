from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nightshift.errors import JobInvalid, SettingInvalid
from nightshift.job import Job, job_schema
from nightshift.job_file import find_job, load_job, load_jobs, read_prompt
from nightshift.pages import render_job_reference
from nightshift.stores.objects import open_objects
from tests.conftest import SCHEMA

ROOT = Path(__file__).parent.parent
JOB = """\
name: reviews
input:
  uri: s3://bucket/in/*.jsonl
  id: review_id
  require:
    text: {min_length: 1}
request:
  provider: openai
  model: gpt-5.4-nano
  prompt: prompts/p.md
output:
  schema: schemas/s.json
  keep: [stars]
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("jobs", "prompts", "schemas", "expectations"):
        (tmp_path / name).mkdir()
    (tmp_path / "prompts" / "p.md").write_text("{{ text }}")
    (tmp_path / "schemas" / "s.json").write_text(json.dumps(SCHEMA))
    return tmp_path


def load(folder: Path, text: str = JOB) -> Job:
    path = folder / "jobs" / "reviews.yaml"
    path.write_text(text)
    return load_job(path)


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(JobInvalid) as caught:
        load(folder, text)
    return [problem.removeprefix(f"{folder}/jobs/") for problem in caught.value.problems]


def test_a_job_brings_everything_that_it_names(folder):
    job = load(folder)
    assert job.answer_schema == SCHEMA
    assert job.prompt.variables == {"text"}
    assert job.columns == ("review_id", "text", "stars")


@pytest.mark.parametrize("name", ["../../secret.md", "../secret.md", "secret.md", "prompts/../secret.md", "{folder}/secret.md"])
def test_who_starts_a_run_may_name_the_prompts_beside_the_jobs_and_no_other_file(tmp_path, name):
    """Also where the folder of the jobs lies at the root of a disk, so that everything lies beside it."""
    job, store = tmp_path / "jobs" / "reviews.yaml", open_objects(f"file://{tmp_path}/store")
    for part in ("jobs/own.md", "prompts/p.md", "secret.md"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text(part)
    assert [read_prompt(store, job, part, within=True) for part in ("prompts/p.md", "own.md")] == ["prompts/p.md", "jobs/own.md"]
    with pytest.raises(SettingInvalid, match=r"not one of the prompts beside the jobs: prompts/p\.md"):
        read_prompt(store, job, name.format(folder=tmp_path), within=True)


@pytest.mark.parametrize("path", sorted((ROOT / "include" / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_jobs_are_valid(path):
    assert load_job(path).name == path.stem


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        pytest.param("  id: ", "  idd: ", "reviews.yaml:4: input.idd: unknown key; did you mean 'id'?", id="misspelt key"),
        pytest.param("provider: openai", "provider: opnai", "reviews.yaml:8: request.provider: expected one of openai, bedrock, live, found 'opnai'; did you mean 'openai'?", id="unknown provider"),
        pytest.param("name: reviews\n", "", "reviews.yaml:1: name: missing, but required", id="missing key"),
        pytest.param("s3://bucket/in", "bucket/in", "reviews.yaml:3: input.uri: expected a URI", id="no scheme"),
        pytest.param("min_length: 1", "min_lenght: 1", "reviews.yaml:6: input.require.text.min_lenght: unknown key; did you mean 'min_length'?", id="in a free name"),
        pytest.param("keep: [stars]", "keep: [stars]\nreport: {figures: [{titel: x, value: 1}]}", "report.figures.0.titel: unknown key; did you mean 'title'?", id="in a list"),
        pytest.param("name: reviews\n", "name: reviews\non_upload: {uri: 's3://b/i/*', queu: x}\n", "on_upload.queu: unknown key; did you mean 'queue'?", id="beside a short form"),
        pytest.param("keep: [stars]", "keep: stars", "output.keep: expected a list, such as [stars]", id="one in place of a list"),
        pytest.param("name: reviews\n", "name: my-reviews\n", "name: expected a small letter and then small letters, digits and underscores", id="a name with a dash"),
        pytest.param("provider: openai", "provider: OpenAI", "did you mean 'openai'?", id="capitals"),
        pytest.param("min_length: 1", "min_length: many", "reviews.yaml:6: input.require.text.min_length", id="wrong type"),
        pytest.param("prompts/p.md", "prompts/q.md", "reviews.yaml:10: request.prompt: prompts/q.md: no such file; did you mean 'prompts/p.md'?", id="missing prompt"),
        pytest.param("prompts/p.md", "'Judge this: " + "x" * 300 + "'", "reviews.yaml:10: request.prompt: Judge this: xxx", id="prompt in place of its file"),
        pytest.param("prompts/p.md", "Judge/" + "x" * 300 + "/this", "reviews.yaml:10: request.prompt: Judge/xxx", id="prompt with slashes in place of its file"),
        pytest.param("prompts/p.md", "''", "reviews.yaml:10: request.prompt: '': Is a directory", id="no prompt"),
        pytest.param("keep: [stars]", "keep: [sentiment]", "reviews.yaml:13: output.keep: 'sentiment' is an input column and an answer field", id="name taken twice"),
        pytest.param("keep: [stars]", "keep: [stars]\nreport: {drift: [sentimnt]}", "'sentimnt' is not in the results; did you mean 'sentiment'?", id="report of nothing"),
        pytest.param("  model: ", "  parameters: {stream: true}\n  model: ", "stream cannot be set here", id="reserved parameter"),
        pytest.param("  model: ", "  parameters: {toolConfig: {}}\n  model: ", "toolConfig cannot be set here", id="F91 tools in a batch"),
        pytest.param("keep: [stars]", "keep: [stars]\n  renditions: [{width: 90}, {width: 90, quality: 10}]", "the column 'rendition_90_webp' stands twice", id="two renditions of one name"),
        pytest.param("keep: [stars]", "keep: [stars]\n  renditions: [{width: 90}]", "are made of the pictures of request.images, and there are none", id="renditions of nothing"),
        pytest.param("keep: [stars]", "keep: [Stars, stars]", "'Stars' and 'stars' differ only in case", id="names that differ in case"),
        pytest.param("keep: [stars]", "keep: [reason]", "'reason' is a name that Nightshift's own columns have", id="our own column"),
        pytest.param("name: reviews", "name: reviews\nstart_date: '2026-13-45'", "start_date", id="no such day"),
        pytest.param("name: reviews", "name: reviews\ntimezone: Mars/X", "timezone: expected a time zone", id="no such zone"),
        pytest.param("name: reviews", "name: reviews\nschedule: '@foo'", "schedule: expected a cron expression", id="no such preset"),
        pytest.param("name: reviews", "name: reviews\nschedule: '0 25 * * *'", "schedule: expected a cron expression", id="no such hour"),
        pytest.param("name: reviews", "name: reviews\nschedule: ['0 2 * * *', '0 0 31 2 *']", "schedule: expected a cron expression", id="never"),
        pytest.param("name: reviews", "name: uploads", "'uploads' is the name of a DAG of Nightshift's own", id="a name of ours"),
        pytest.param("name: reviews", f"name: reviews\ntags: [{'x' * 101}]", "tags.0: String should have at most 100", id="a tag that Airflow refuses"),
        pytest.param("  model: ", "  parameters: {temprature: 0}\n  model: ", "temprature: no such parameter is known here; did you mean 'temperature'?", id="misspelt parameter"),
        pytest.param("  model: ", "  parameters: {max_tokens: 9}\n  model: ", "max_tokens is called max_output_tokens here", id="the limit by another name"),
        pytest.param("keep: [stars]", "keep: [stars]\n  partition: dt={{ ds }}\non_upload: s3://bucket/in/*.jsonl", "output.partition: uses run dates, and runs of uploads have none", id="dates of an upload"),
        pytest.param("  model: ", "  parameters: {max_output_tokens: many}\n  model: ", "max_output_tokens has to be a whole number", id="tokens in words"),
        pytest.param("in/*.jsonl", "dt={{ ds }}/*", "input.uri: uses run dates, but the job has no schedule", id="dates without a schedule"),
        pytest.param("provider: openai", "provider: openai\n  endpoint: converse", "reviews.yaml:9: request.endpoint: converse is an endpoint of Bedrock", id="endpoint of another provider"),
        pytest.param("provider: openai", "provider: bedrock\n  endpoint: /v1/responses", "request.endpoint: /v1/responses is an endpoint of OpenAI", id="endpoint that Bedrock has not"),
        pytest.param("provider: openai", "provider: bedrock\n  endpoint: invoke", "request.model: 'gpt-5.4-nano': how to ask it with invoke is not known here; set endpoint: converse", id="model that invoke does not know"),
        pytest.param("provider: openai\n  model: gpt-5.4-nano\n  prompt: prompts/p.md", "provider: bedrock\n  endpoint: invoke\n  model: amazon.nova-lite-v1:0\n  prompt: prompts/p.md\npolicy: {retry: {invalid: {model: meta.llama4-x}}}", "policy.retry: 'meta.llama4-x' is asked in other words", id="stand-in of another maker"),
        pytest.param("  model: gpt-5.4-nano\n  prompt: prompts/p.md\noutput:\n", "  endpoint: /v1/embeddings\n  parameters: {dimensions: 64}\n  model: text-embedding-3-small\n  prompt: prompts/p.md\noutput:\n  dimensions: 32\n", "output.dimensions: 32 is not what request.parameters.dimensions asks for, 64", id="two lengths of an embedding"),
        pytest.param("provider: openai", "provider: openai\n  endpoint: /v1/embeddings", "output.schema: an embedding has no schema", id="schema of an embedding"),
        pytest.param("provider: openai", "provider: openai\n  endpoint: /v1/embeddings", "how many numbers an embedding of 'gpt-5.4-nano' has is not known here; set output.dimensions", id="embedding of unknown length"),
        pytest.param("  model: gpt-5.4-nano", "  model: a\n  model: b", "model: this key stands twice", id="key twice"),
    ],
)  # fmt: skip
def test_each_mistake_is_told_with_its_place_and_its_mend(folder, old, new, problem):
    assert old in JOB
    assert problem in "\n".join(problems(folder, JOB.replace(old, new)))


def test_two_files_of_one_name_are_told_and_hidden_files_are_none(folder):
    jobs = folder / "jobs"
    load(folder)
    (jobs / ".#reviews.yaml").write_text("an editor's")
    assert [job.name for job in load_jobs(jobs)] == ["reviews"]
    (jobs / "reviews.yml").write_text(JOB)
    assert load_jobs(jobs) == []
    with pytest.raises(JobInvalid, match="yaml stands beside it, and both would be the job reviews"):
        load_job(jobs / "reviews.yml")


def test_parameters_that_nobody_here_knows_are_handed_on(folder):
    text = JOB.replace("  model: ", "  parameters: {top_n: 3, guided_choice: [a, b], temperature: 0}\n  model: ")
    assert load(folder, text).spec.request.parameters == {"top_n": 3, "guided_choice": ["a", "b"], "temperature": 0}


def test_all_mistakes_are_told_at_once(folder):
    (folder / "schemas" / "s.json").write_text('{"type": "object"')
    suite = {"expectations": [{"type": "a", "severty": "info"}, {"kwargs": {}}]}
    (folder / "expectations" / "e.yaml").write_text(json.dumps(suite))
    text = JOB.replace("  id: ", "  idd: ").replace("openai", "opnai").replace("p.md", "q.md") + "  expectations: expectations/e.yaml\n"
    told = (
        "input.id:",
        "input.idd:",
        "request.provider:",
        "request.prompt:",
        "not valid JSON",
        "expectations.0.severty: unknown key; did you mean 'severity'",
        "expectations.1.type: missing",
    )
    assert all(part in problem for part, problem in zip(told, problems(folder, text), strict=True))


def test_a_key_that_stands_twice_is_an_error(folder):
    assert "this key stands twice" in problems(folder, JOB + "name: other\n")[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param("- a\n- b\n", "expected a mapping", id="a list"),
        pytest.param("name: [unclosed\n", "not valid YAML", id="not YAML"),
        pytest.param("", "expected a mapping", id="empty"),
    ],
)
def test_what_is_no_job_file_is_told_so(folder, text, problem):
    assert problem in problems(folder, text)[0]


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        pytest.param("user:\n{{ text\n", "p.md:2: template error", id="unclosed tag"),
        pytest.param("Always the same.", "reads no column", id="no column"),
        pytest.param("user:\n{{ a }}\nuser:\n{{ b }}", "expected one `user:` part", id="two user parts"),
        pytest.param("stray\nuser:\n{{ a }}", "belongs to no part", id="text before a part"),
        pytest.param("sytem:\nx\nuser:\n{{ a }}", "p.md:1: .* belongs to no part: 'sytem:'; did you mean 'system:'", id="misspelt part"),
    ],
)
def test_prompt_mistakes_name_the_prompt_file(folder, prompt, problem):
    (folder / "prompts" / "p.md").write_text(prompt)
    with pytest.raises(JobInvalid, match=problem):
        load(folder)


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        pytest.param('{"type": "object",}', "not valid JSON", id="not JSON"),
        pytest.param('{"type": "objekt"}', "not a JSON Schema", id="not a schema"),
        pytest.param('{"type": "array"}', "has to be an object", id="not an object"),
        pytest.param(
            '{"type": "object",\n"properties": {\n"a": {"type": "strng"}}}',
            r"s\.json:3: properties\.a\.type: not a JSON Schema",
            id="its line",
        ),
        pytest.param(
            '{"type": "object",\n"properties": {"a": {}},\n"required": ["b"]}',
            r"s\.json:3: the answer: required names 'b'",
            id="the line of required",
        ),
    ],
)
def test_schema_mistakes_name_the_schema_file(folder, schema, problem):
    (folder / "schemas" / "s.json").write_text(schema)
    with pytest.raises(JobInvalid, match=problem):
        load(folder)


def test_an_expectation_on_a_column_that_will_not_be_there_is_told(folder):
    (folder / "expectations" / "e.yaml").write_text(
        yaml.safe_dump({"expectations": [{"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "sentimental"}}]})
    )
    found = problems(folder, JOB.replace("keep:", "expectations: expectations/e.yaml\n  keep:"))
    assert "looks at 'sentimental', which is not in the results; did you mean 'sentiment'?" in found[0]


def test_a_job_is_found_by_path_and_by_name(folder):
    load(folder)
    assert find_job("reviews", folder / "jobs") == folder / "jobs" / "reviews.yaml"
    with pytest.raises(JobInvalid, match="did you mean 'reviews'"):
        find_job("review", folder / "jobs")


def test_an_edit_of_anything_that_is_asked_changes_the_digest(folder):
    before = load(folder).digest
    assert load(folder).digest == before
    (folder / "prompts" / "p.md").write_text("{{ text }} ")
    assert load(folder).digest != before


def test_the_published_schema_is_the_code(folder):
    published = json.loads((ROOT / "docs" / "job.schema.json").read_text())
    assert published == job_schema(), "run `make schema`"
    assert (ROOT / "docs" / "jobs.md").read_text() == render_job_reference(job_schema()), "run `make schema`"
