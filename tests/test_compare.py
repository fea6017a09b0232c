"""Old against new: two prompts on the same sample, two runs that have ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nightshift.compare import compare
from nightshift.drive import begin, drive
from nightshift.errors import InputMissing
from nightshift.job_file import vary
from nightshift.runs import Options, Run
from tests.conftest import World, reviews


def go(world: World, job, uri: str, **options) -> Run:
    run = begin(world.site, job, pattern=uri, dates={}, scheduled=False, options=Options(**options))
    drive(world.site, run, ask=lambda run, plan: True)
    return run


def test_two_prompts_are_compared_row_by_row_on_the_same_sample(world):
    job, uri = world.job(), world.write("in.jsonl", reviews(100))
    old = go(world, job, uri, sample=40)
    new = go(world, vary(job, prompt_source="user:\nA terrible, awful, dirty hotel. {{ text }}\n"), uri, sample=40)
    found = compare(world.site, old, new)
    assert (found.common, found.only_old, found.only_new) == (40, 0, 0)
    [sentiment] = [field for field in found.fields if field.name == "sentiment"]
    assert sentiment.same + sentiment.changed == 40
    assert sentiment.changed > 10
    assert (sentiment.changes[0].old, sentiment.changes[0].new) == ("positive", "negative")
    assert {example.field for example in found.examples} == {"sentiment", "confidence"}
    page = world.site.store.get(world.site.store.key_of(found.page)).decode()
    assert "old against new" in page
    assert found.old.prompt_version in page
    assert "<script" not in page


def test_the_same_run_twice_differs_in_nothing(world):
    run = go(world, world.job(), world.write("in.jsonl", reviews(10)))
    found = compare(world.site, run, run)
    assert [field.changed for field in found.fields] == [0, 0]
    assert found.examples == ()


def test_two_runs_over_the_same_objects_are_compared_as_each_had_published(world):
    """The second has published the partition of the first anew."""
    job, uri = world.job(), world.write("in.jsonl", reviews(20))
    old = go(world, job, uri)
    new = go(world, vary(job, prompt_source="user:\nA terrible, awful, dirty hotel. {{ text }}\n"), uri)
    found = compare(world.site, old, new)
    assert (found.common, found.only_old, found.only_new) == (20, 0, 0)
    assert next(field for field in found.fields if field.name == "sentiment").changed > 5


def test_runs_without_a_row_in_common_are_told_so(world):
    old, new = (go(world, world.job(), world.write(f"{at}.jsonl", reviews(at + 5)[at:])) for at in (0, 10))
    with pytest.raises(InputMissing, match=r"it has published no row that .* has as well"):
        compare(world.site, old, new)


def test_a_field_whose_type_has_changed_is_compared_as_text(world, monkeypatch):
    uri, found = world.write("in.jsonl", reviews(4)), []
    for kind, value in (("number", "1.5"), ("string", '"low"')):
        schema = {"type": "object", "properties": {"score": {"type": kind}}, "required": ["score"], "additionalProperties": False}
        monkeypatch.setattr("nightshift.rehearsal.model.answer", lambda text, asked, value=value: f'{{"score": {value}}}')
        run = begin(world.site, world.job(schema=schema), pattern=uri, dates={}, scheduled=False, options=Options(sample=4))
        found.append(run)
        assert drive(world.site, run, ask=lambda run, planned: True).published
    [field] = compare(world.site, *found).fields
    assert (field.changed, field.changes[0].old, field.changes[0].new) == (4, "1.5", "low")


def test_a_run_that_has_published_nothing_cannot_be_compared(world):
    world.rehearsal.faults(errored=1.0)
    held = go(world, world.job(policy={"retry": {"errored": 0}}), world.write("in.jsonl", reviews(3)))
    with pytest.raises(InputMissing, match="has published nothing"):
        compare(world.site, held, held)


def test_the_command_runs_both_samples_and_says_what_changed(world, tmp_path):
    world.job()
    world.write("in.jsonl", reviews(30))
    other = tmp_path / "other.md"
    other.write_text("user:\nA terrible, awful hotel. {{ text }}\n")
    env = {
        **os.environ,
        "OPENAI_BASE_URL": f"{world.rehearsal.url}/v1",
        "OPENAI_API_KEY": world.rehearsal.key,
        "NIGHTSHIFT_POLL_SECONDS": "0.1",
    }
    job = str(world.folder / "job-1" / "jobs" / "reviews.yaml")
    command = [str(Path(sys.executable).parent / "nightshift"), "compare", job, "--store", world.site.store.uri, "--sample", "10"]
    done = subprocess.run([*command, "--prompt", str(other), "--json"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["common"], found["old"]["rows"]) == (10, 10)
    assert world.rehearsal.bill()["requests"] == 20
    wrong = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert (wrong.returncode, "say what is new" in wrong.stderr) == (2, True)
    old, new = found["old"]["run"], found["new"]["run"]
    for more, said in (([old], "named were 1"), ([old, new, "--model", "gpt-5.4"], "--model says nothing beside them")):
        wrong = subprocess.run([*command, *more], env=env, capture_output=True, text=True, timeout=120)
        assert (wrong.returncode, said in wrong.stderr) == (2, True)
