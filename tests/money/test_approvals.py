"""Approvals: who asks, who waits, and who draws on what was granted, when many runs of a backfill need a yes at the same time."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest

from nightshift.approvals import Ask, Decision, Draw, Grants, Question, Refused, Wait, approvals_of, next_step, record
from nightshift.pages import render_report
from nightshift.question import question, said_in
from nightshift.shapes import Approval
from nightshift.steps.discover import discover
from nightshift.steps.plan import plan
from nightshift.steps.report import report
from nightshift.stores.objects import open_objects
from tests.conftest import NOON, reviews

OPEN = Question(run="a", at=NOON)
YES = Decision(usd=Decimal(10), by="Ada", at=NOON)
NO = Decision(usd=None, by="Ada", at=NOON)
WITHDRAWN = Decision(usd=None, by="nobody", at=NOON, withdrawn=True)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.mark.parametrize(
    ("question", "answer", "used_after", "run", "waited_for", "after", "step"),
    [
        pytest.param(None, None, None, "a", None, HOUR, Ask(1), id="nobody has asked"),
        pytest.param(OPEN, None, None, "a", None, HOUR, Ask(3), id="I have asked and died"),
        pytest.param(OPEN, None, None, "b", None, HOUR, Wait(3), id="another one has asked"),
        pytest.param(OPEN, None, None, "b", 3, 2 * DAY, Ask(4), id="nobody has answered it in time"),
        pytest.param(OPEN, YES, None, "b", None, HOUR, Draw(3, YES), id="granted"),
        pytest.param(OPEN, YES, 20 * HOUR, "b", None, 30 * HOUR, Draw(3, YES), id="granted, and drawn on since"),
        pytest.param(OPEN, YES, None, "b", None, 30 * HOUR, Ask(4), id="granted to a backfill that is over"),
        pytest.param(OPEN, NO, None, "b", 3, HOUR, Refused(3, NO), id="refused while I waited"),
        pytest.param(OPEN, NO, None, "b", None, HOUR, Ask(4), id="refused to others before"),
        pytest.param(OPEN, WITHDRAWN, None, "b", 3, HOUR, Ask(4), id="who has asked was stopped"),
    ],
)
def test_what_a_run_of_a_backfill_does_next(question, answer, used_after, run, waited_for, after, step):
    used_at = None if used_after is None else NOON + used_after
    assert next_step(3 if question else 0, question, answer, used_at, run=run, waited_for=waited_for, now=NOON + after) == step


@pytest.fixture
def grants(tmp_path) -> Grants:
    return Grants(open_objects(f"file://{tmp_path}/store"), "reviews")


def test_one_asks_the_others_wait_and_all_draw_until_it_is_used_up(grants):
    assert grants.step("a", waited_for=None, now=NOON) == Ask(1)
    assert grants.asked_by("a") == 1
    assert grants.step("b", waited_for=None, now=NOON) == Wait(1)
    answer = grants.settle(1, YES)
    for run in ("a", "b"):
        step = grants.step(run, waited_for=1, now=NOON)
        assert step == Draw(1, answer)
        assert grants.draw(step, run, Decimal(4), NOON) is None
        assert grants.draw(step, run, Decimal(4), NOON) is None, "once"
    assert grants.draw(Draw(1, answer), "c", Decimal(4), NOON) == Ask(2), "what is beyond it asks again"
    assert grants.step("d", waited_for=None, now=NOON) == Wait(2)


def test_the_first_answer_stays(grants):
    grants.step("a", waited_for=None, now=NOON)
    grants.settle(1, NO)
    assert grants.settle(1, YES) == NO


def test_what_was_said_to_a_run_is_kept_in_order_and_reported(world):
    run = discover(world.site, world.job(), pattern=world.write("in.jsonl", reviews(2)), label="x", run="r1", dates={})
    for decision in ("refused", "approved"):
        record(run, Approval(decision=decision, by="Ada", at=NOON, estimate_usd=Decimal("1.5"), note="<b>go</b>"))
    assert [each.decision for each in approvals_of(run)] == ["refused", "approved"]
    page = render_report(report(world.site, run, published=None, problem="stopped"))
    assert "refused by Ada" in page
    assert "approved by Ada" in page
    assert "&lt;b&gt;go&lt;/b&gt;" in page


def test_the_question_shows_the_estimate_the_reuse_and_the_first_of_what_is_asked(world):
    run = discover(world.site, world.job(), pattern=world.write("in.jsonl", reviews(5)), label="x", run="r1", dates={})
    text = question(run, plan(world.site, run))
    assert "**5 requests**" in text
    assert "between $" in text
    assert "| answered earlier, reused | 0 |" in text
    assert "```\nThe room number 0 was awful.\n\nThe room number 1 was lovely." in text
    assert "number 3" not in text, "the first three"
    assert "The room" not in question(run, plan(world.site, run), with_sample=False)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "image_url", "image_url": {"url": "data:"}}]}
            ]
        },
        {"input": "hello"},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]},
        {"messages": [{"role": "user", "content": [{"text": "hello"}]}]},
        {"inputText": "hello"},
    ],
)
def test_the_words_of_a_request_are_found_in_every_form(body):
    assert said_in(body) == "hello"
