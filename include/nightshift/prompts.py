"""Prompt files: optional YAML front matter, then `system:` and `user:` parts, each a sandboxed Jinja2 template.

The role lines are those of the Prompty format: a line that is just `system:` or `user:` starts that part.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nightshift.errors import nearest

ROLE_LINE = re.compile(r"^(system|user):[ \t]*$", re.MULTILINE)
ASSIGNING = (
    nodes.Assign, nodes.AssignBlock, nodes.Block, nodes.Import, nodes.FromImport, nodes.Include, nodes.Macro, nodes.Extends,
    nodes.EvalContextModifier, nodes.ScopedEvalContextModifier,
)  # fmt: skip
LIKE_A_ROLE = re.compile(r"(system|user|usr|assistant|developer)[ \t]*:", re.IGNORECASE)
TEXT_SHOWN = 40  # characters
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


class PromptInvalid(ValueError):
    """The prompt file cannot be used; `line` is 1-based."""

    def __init__(self, line: int, why: str) -> None:
        self.line = line
        super().__init__(why)


class NullInPrompt(ValueError):
    """A template printed a null: the model would read the word None."""

    def __str__(self) -> str:
        return "it prints a null"


# What filters raise on values that they cannot take, and Python on text that UTF-8 cannot say.
UNRENDERED = (NullInPrompt, TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Printed:
    """A column that a template prints as it is."""

    column: str


@dataclass(frozen=True, slots=True)
class Rendered:
    """A piece of a template that holds logic, and the columns that it reads."""

    template: Template
    columns: tuple[str, ...]
    assigns: bool  # whether it may leave something behind in its context, which therefore serves one row only


@dataclass(frozen=True, slots=True)
class Part:
    """One compiled template, the columns that it reads, and the same in pieces: what they say, one after another, is what it says."""

    template: Template
    variables: frozenset[str]
    pieces: tuple[str | Printed | Rendered, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The parts of a prompt. `version` is the hash of the source: what was asked, exactly."""

    system: Part | None
    user: Part
    version: str  # 12 hex digits

    @property
    def variables(self) -> frozenset[str]:
        """The columns that the prompt reads."""
        return self.user.variables | (self.system.variables if self.system else frozenset())


def _refuse_null(value: object) -> object:
    if value is None:
        raise NullInPrompt
    return value


def environment() -> ImmutableSandboxedEnvironment:
    """The one environment prompts are compiled in: sandboxed, and loud about unknown names and nulls."""
    env = ImmutableSandboxedEnvironment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=False, finalize=_refuse_null)
    env.globals.clear()  # a column called `range` is a column
    del env.filters["random"]  # a row would ask something else each time, and be paid for each time
    env.filters.update({name: _refusing_null(filter_) for name, filter_ in env.filters.items() if name not in ("default", "d")})
    return env


def _refusing_null(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses a null: most of them would make the text None of it."""
    position = 1 if hasattr(filter_, "jinja_pass_arg") else 0

    @wraps(filter_)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if args[position] is None:
            raise NullInPrompt
        return filter_(*args, **kwargs)

    return refusing


def parse_prompt(source: str) -> Prompt:
    """A prompt from its file's text. Raises PromptInvalid with the line to mend."""
    source = source.replace("\r\n", "\n").removeprefix("\ufeff")
    body, offset = _without_front_matter(source)
    env = environment()
    parts: dict[str, Part] = {}
    for role, text, line in _split_roles(body, offset):
        try:
            parsed = env.parse(text)
            parts[role] = Part(env.from_string(text), frozenset(meta.find_undeclared_variables(parsed)), tuple(_pieces(env, parsed)))
        except TemplateSyntaxError as error:
            raise PromptInvalid(line + error.lineno - 1, f"template error: {error.message}") from error
        except UNRENDERED as error:
            raise PromptInvalid(line, f"the {role} part cannot be rendered: {error}") from error
    if not any(part.variables for part in parts.values()):
        raise PromptInvalid(offset + 1, "the prompt reads no column, so every row would ask the same; use {{ column }}")
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    return Prompt(system=parts.get("system"), user=parts["user"], version=version)


def _pieces(env: Environment, template: nodes.Template) -> Iterator[str | Printed | Rendered]:
    """A template in pieces. One that gives names stays whole: a piece may be about a name that an earlier one gave."""
    if any(True for _ in template.find_all(ASSIGNING)):
        yield _rendered(env, template, assigns=True)
        return
    for found in _grouped(env, chain.from_iterable(each.nodes if isinstance(each, nodes.Output) else [each] for each in template.body)):
        first = found[0]
        if isinstance(first, nodes.TemplateData):
            yield first.data
        elif isinstance(first, nodes.Name) and first.name != "self":  # which is the template itself
            yield Printed(first.name)
        else:
            yield _rendered(env, _alone(found))


def _grouped(env: Environment, parts: Iterable[nodes.Node]) -> Iterator[list[nodes.Node]]:
    """The parts of a template; of those with logic, neighbours that read the same columns together, with the constants between them."""
    groups = list[tuple[set[str] | None, list[nodes.Node]]]()  # what is read by logic, and the parts
    for part in parts:
        if isinstance(part, nodes.TemplateData | nodes.Name):
            groups.append((None, [part]))
            continue
        read = meta.find_undeclared_variables(_alone([part]).set_environment(env))  # type: ignore[arg-type]
        between = 1 if groups and isinstance(groups[-1][1][0], nodes.TemplateData) else 0
        if len(groups) > between and groups[-1 - between][0] == read:
            groups[-1 - between :] = [(read, [each for _, group in groups[-1 - between :] for each in group] + [part])]
        else:
            groups.append((read, [part]))
    return (group for _, group in groups)


def _alone(parts: Sequence[nodes.Node]) -> nodes.Template:
    """Some parts of a template as one of their own."""
    return nodes.Template([nodes.Output([part]) if isinstance(part, nodes.Expr) else part for part in parts], lineno=parts[0].lineno)


def _rendered(env: Environment, parsed: nodes.Template, *, assigns: bool = False) -> str | Rendered:
    """A piece with logic; where that reads no column, what it says."""
    parsed.set_environment(env)
    columns, template = tuple(sorted(meta.find_undeclared_variables(parsed))), env.from_string(parsed)
    return Rendered(template, columns, assigns) if columns else _said(template, parsed.lineno)


def _said(template: Template, line: int) -> str:
    """What a template says whatever the row. Raises TemplateSyntaxError where it cannot be said."""
    try:
        said = template.render()
        said.encode()
    except UNRENDERED as error:
        raise TemplateSyntaxError(f"it cannot be rendered ({error or type(error).__name__})", line) from error
    return said


def _without_front_matter(source: str) -> tuple[str, int]:
    """The text after the front matter, which is for people, and the number of lines before it."""
    found = FRONT_MATTER.match(source)
    if not found:
        return source, 0
    try:
        front = yaml.safe_load(found[1]) or {}
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        raise PromptInvalid(1, f"front matter is not YAML: {error}") from error
    if not isinstance(front, dict):
        raise PromptInvalid(1, "front matter has to be a YAML mapping")
    return source[found.end() :], found[0].count("\n")


def _split_roles(body: str, offset: int) -> list[tuple[str, str, int]]:
    """(role, template text, 1-based line of its first line) in file order."""
    marks = list(ROLE_LINE.finditer(body))
    if not marks:
        if found := LIKE_A_ROLE.match(body.lstrip()):
            why = f"{found[0].strip()!r} begins no part; a part begins with `system:` or `user:` on a line of its own"
            raise PromptInvalid(offset + 1, why)
        return [("user", body.strip("\n"), offset + 1)]
    if body[: marks[0].start()].strip():
        first = body.lstrip().partition("\n")[0].strip()
        meant = nearest(first, ["system:", "user:"])
        why = f"text before the first `system:` or `user:` line belongs to no part: {first[:TEXT_SHOWN]!r}{meant}"
        raise PromptInvalid(offset + 1, why)
    roles = [mark[1] for mark in marks]
    if sorted(roles) not in (["user"], ["system", "user"]):
        raise PromptInvalid(offset + 1, f"expected one `user:` part and at most one `system:` part, found {roles}")
    ends = [mark.start() for mark in marks[1:]] + [len(body)]
    return [
        (mark[1], body[mark.end() : end].strip("\n"), offset + body.count("\n", 0, mark.end()) + 2)
        for mark, end in zip(marks, ends, strict=True)
    ]
