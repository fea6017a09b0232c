"""Jobs out of their files, with errors that say what to mend where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, get_args

import orjson
import yaml
from pydantic import BaseModel, ValidationError

from nightshift.dates import interval_dates, render_dates
from nightshift.errors import JobInvalid, SettingInvalid, Unusable, nearest
from nightshift.formats import FILE_COLUMNS
from nightshift.job import DIMENSIONS, RETRYABLE, Expectation, Job, JobFile, Suite
from nightshift.money.prices import makes_embeddings
from nightshift.parameters import LIMIT, OTHER_LIMITS
from nightshift.prompts import PromptInvalid, parse_prompt
from nightshift.providers.bedrock_forms import MAKERS_THAT_SEE, maker_of
from nightshift.runs import prompt_key
from nightshift.schemas import inlined, unmet
from nightshift.shapes import Outcome
from nightshift.stores.objects import Objects

YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with libyaml
Loaded = TypeVar("Loaded")
NAME_SHOWN = 80  # characters of a file's name that is none
VERSION = re.compile(r"[0-9a-f]{12}")
OWN_COLUMNS = frozenset({"_model", "_tier", "_prompt_version", "_request_key", "row", "outcome", "reason", "raw"})


def find_job(name: str, jobs: Path) -> Path:
    """The file of a job given as a path or as the name of a file in the jobs folder. Raises JobInvalid."""
    for path in (Path(name), jobs / f"{name}.yaml", jobs / f"{name}.yml"):
        if path.is_file():
            return path
    known = [path.stem for path in job_files(jobs)]
    raise JobInvalid([f"{name}: no such job file, and no job of that name in {jobs}{nearest(name, known)}"])


def job_files(folder: Path) -> list[Path]:
    """The job files of a folder, in order. What an editor hides there is none."""
    return sorted(path for path in folder.glob("*.y*ml") if not path.name.startswith("."))


def load_jobs(folder: Path) -> list[Job]:
    """Every job of a folder whose file can be used; of the others their own DAG says what to mend."""
    jobs = []
    for path in job_files(folder):
        with suppress(Unusable):
            job = load_job(path)
            jobs += [job] if job.name == path.stem else []
    return jobs


def load_job(path: Path) -> Job:
    """The job in a file, with its prompt, schema and suite. Raises JobInvalid listing every problem found."""
    if twins := [each.name for each in job_files(path.parent) if each.stem == path.stem and each.name != path.name]:
        raise JobInvalid([f"{path}: {twins[0]} stands beside it, and both would be the job {path.stem}; remove one of them"])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise JobInvalid([f"{path}: cannot be read: {error}"]) from error
    tree, held = _parse_yaml(path, text)
    spec, wrong = _told(_load_spec, path, tree, held)  # what is wrong in one file is told with what is in the others
    prompt, wrong_prompt = _told(_load_prompt, path, tree, held)
    answer_schema, wrong_schema = _told(_load_schema, path, tree, held)
    expectations, wrong_suite = _told(_load_suite, path, tree, held)
    if spec is None or wrong_prompt or wrong_schema or wrong_suite:
        raise JobInvalid([*wrong, *wrong_prompt, *wrong_schema, *wrong_suite])
    job = Job(spec=spec, prompt_source=prompt or "", answer_schema=answer_schema, expectations=expectations or ())
    if problems := [f"{path}:{_line(tree, keys)}: {'.'.join(keys)}: {why}" for keys, why in _contradictions(job)]:
        raise JobInvalid(problems)
    return job


def _told(load: Callable[[Path, yaml.Node, Any], Loaded], path: Path, tree: yaml.Node, held: Any) -> tuple[Loaded | None, Sequence[str]]:
    """A part of a job, or what is wrong with it."""
    try:
        return load(path, tree, held), ()
    except JobInvalid as error:
        return None, error.problems


def _load_spec(path: Path, tree: yaml.Node, held: Any) -> JobFile:
    try:
        return JobFile.model_validate(held)
    except ValidationError as error:
        raise JobInvalid([_problem(path, tree, problem) for problem in error.errors()]) from error


def vary(job: Job, *, model: str | None = None, prompt_source: str | None = None) -> Job:
    """A job that asks another model, or by another prompt. Raises JobInvalid where that does not fit the rest of it."""
    request = job.spec.request.model_copy(update={"model": model} if model else {})
    varied = Job(
        spec=job.spec.model_copy(update={"request": request}),
        prompt_source=prompt_source or job.prompt_source,
        answer_schema=job.answer_schema,
        expectations=job.expectations,
    )
    try:
        parse_prompt(varied.prompt_source)
    except PromptInvalid as error:
        raise JobInvalid([f"the prompt, line {error.line}: {error}"]) from error
    problems = [f"{'.'.join(keys)}: {why}" for keys, why in _contradictions(varied)]
    if problems:
        raise JobInvalid(problems)
    return varied


def read_prompt(store: Objects, path: Path, name: str, *, within: bool = False) -> str:
    """A prompt by the version that an earlier run has asked with (12 hex digits), or by its file as a job names it. Raises SettingInvalid.

    `within`: only of the folder of the jobs and of the prompts beside it: who may start a run may not read all of a worker's disk.
    """
    if VERSION.fullmatch(name):
        kept = store.get(prompt_key(name))
        if kept is None:
            raise SettingInvalid([f"no run has asked with version {name} of a prompt: name a version of a report, or a prompt file"])
        return kept.decode()
    part = _part_path(path, name)
    homes = (path.parent, path.parent.parent / "prompts")
    if within and not any(part.resolve().is_relative_to(home.resolve()) for home in homes):
        raise SettingInvalid([f"{name}: not one of the prompts beside the jobs: {', '.join(prompt_files(path))}"])
    try:
        return part.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise SettingInvalid([f"{name}: no such prompt{nearest(name, prompt_files(path))}"]) from error


def prompt_files(path: Path) -> list[str]:
    """The prompt files beside a job file, as a job names them."""
    return [f"prompts/{part.name}" for part in sorted((path.parent.parent / "prompts").glob("*.md"))]


def redriven(names: Iterable[str]) -> tuple[Outcome, ...]:
    """The outcomes of these names that can be driven again; all of them where none is named. Raises SettingInvalid."""
    wanted = tuple(names) or RETRYABLE
    for name in wanted:
        if name not in RETRYABLE:
            raise SettingInvalid([f"{name!r} cannot be driven again{nearest(name, list(RETRYABLE))}; known: {', '.join(RETRYABLE)}"])
    return tuple(outcome for outcome in RETRYABLE if outcome in wanted)


def _contradictions(job: Job) -> Iterator[tuple[tuple[str, ...], str]]:
    """Parts that are fine alone and do not fit each other: (keys of the job file, what to mend)."""
    spec, fields = job.spec, job.fields
    for part in (_wrong_dates, _wrong_places, _wrong_embedding, _wrong_pictures):
        yield from part(job)
    if spec.policy.on_demand and spec.request.provider == "live":
        yield ("policy", "on_demand"), "is for batches; the provider live is asked on demand already"
    cut = spec.policy.retry.truncated
    if cut.times and not cut.model and job.token_limit is None:
        yield ("policy", "retry", "truncated"), "would ask the same again: set request.parameters.max_output_tokens, or another model"
    kept = job.kept
    for column in sorted(set(kept) & set(fields)):
        yield ("output", "keep"), f"{column!r} is an input column and an answer field too; rename one of them"
    seen: dict[str, str] = {}
    for column in dict.fromkeys([*kept, *fields]):  # tables of results do not tell upper from lower case
        if column.casefold() in seen:
            yield ("output",), f"{seen[column.casefold()]!r} and {column!r} differ only in case; rename one of them"
        if column.casefold() in OWN_COLUMNS or not column:
            yield ("output",), f"{column!r} is a name that Nightshift's own columns have; rename it"
        seen[column.casefold()] = column
    readable = [*fields, *kept]
    for key in ("drift", "charts"):
        for column in getattr(spec.report, key):
            if column not in readable:
                yield ("report", key), f"{column!r} is not in the results{nearest(column, readable)}"
    for column in ("partition", "day"):
        if spec.report.figures and column in readable:
            yield (
                ("report", "figures"),
                f"the results have a column {column!r} of their own, which figures know as that of the partition; rename it",
            )
    for expectation in job.expectations:
        if expectation.column and expectation.column not in readable:
            yield (
                ("output", "expectations"),
                f"{expectation.type} looks at {expectation.column!r}, which is not in the results{nearest(expectation.column, readable)}",
            )


def _wrong_dates(job: Job) -> Iterator[tuple[tuple[str, ...], str]]:
    """Templates that a run could not fill in."""
    spec = job.spec
    if not spec.schedules and not spec.on_upload and "{{" in spec.input.uri:
        yield ("input", "uri"), "uses run dates, but the job has no schedule; name the objects or set a schedule"
    if spec.on_upload and "{{" in (spec.output.partition or ""):
        yield ("output", "partition"), "uses run dates, and runs of uploads have none; without it, each is named for its object"
    day = datetime(2026, 1, 1, tzinfo=UTC)
    for loc, template in ((("input", "uri"), spec.input.uri), (("output", "partition"), spec.output.partition or "")):
        try:
            render_dates(template, interval_dates(day, day + timedelta(days=1), spec.timezone))
        except JobInvalid as error:
            yield loc, error.problems[0]


def _wrong_places(job: Job) -> Iterator[tuple[tuple[str, ...], str]]:
    """Providers, endpoints and models that do not belong together."""
    spec, request = job.spec, job.spec.request
    for name in sorted(request.parameters.keys() & set(OTHER_LIMITS)) if request.provider != "live" else ():
        yield ("request", "parameters"), f"{name} is called {LIMIT} here, whatever the provider calls it"
    if request.provider == "openai" and request.is_on_bedrock:
        yield ("request", "endpoint"), f"{request.endpoint} is an endpoint of Bedrock; set provider: bedrock, or live to ask it on demand"
    if request.provider == "bedrock" and not request.is_on_bedrock:
        yield ("request", "endpoint"), f"{request.endpoint} is an endpoint of OpenAI; Bedrock knows converse and invoke"
    vectors = "invoke" if request.is_on_bedrock else "/v1/embeddings"
    for model in (request.model, *spec.stand_ins):
        if makes_embeddings(model) and not request.is_embedding:
            yield ("request", "model"), f"{model!r} answers with a vector; set endpoint: {vectors}"
    makers = {model: maker_of(model) for model in (request.model, *spec.stand_ins)} if request.endpoint == "invoke" else {}
    for model, maker in makers.items():
        if maker is None:
            yield ("request", "model"), f"{model!r}: how to ask it with invoke is not known here; set endpoint: converse"
        elif maker != makers[request.model]:
            yield ("policy", "retry"), f"{model!r} is asked in other words than {request.model!r}; set endpoint: converse"


def _wrong_pictures(job: Job) -> Iterator[tuple[tuple[str, ...], str]]:
    """Pictures that nobody can be asked about, or that are not there."""
    spec, request = job.spec, job.spec.request
    if request.images and (request.is_embedding or (request.endpoint == "invoke" and maker_of(request.model) not in MAKERS_THAT_SEE)):
        yield ("request", "images"), f"how {request.model!r} is shown pictures at {request.endpoint} is not known here; try converse"
    if spec.output.renditions and not request.images:
        yield ("output", "renditions"), "are made of the pictures of request.images, and there are none"
    names = [each.name for each in spec.output.renditions]
    taken = {spec.input.id, *spec.output.keep, *job.fields}
    for name in dict.fromkeys(names):
        if name in taken or names.count(name) > 1:
            yield ("output", "renditions"), f"the column {name!r} stands twice in the results; change the width or the format"
    if spec.input.format == "files":
        unknown = sorted(set(job.columns) - set(FILE_COLUMNS))
        if unknown:
            yield ("input", "format"), f"rows of files have no column {unknown[0]!r}; they have {', '.join(FILE_COLUMNS)}"


def _wrong_embedding(job: Job) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a job cannot ask of a model that answers with a vector."""
    if not job.spec.request.is_embedding:
        return
    if job.answer_schema is not None:
        yield ("output", "schema"), "an embedding has no schema; remove it"
    if job.prompt.system:
        yield ("request", "prompt"), "an embedding is made of the user part alone; remove the system part"
    if job.dimensions is None:
        why = f"how many numbers an embedding of {job.spec.request.model!r} has is not known here; set output.dimensions"
        yield ("request", "model"), why
    asked, told = job.spec.request.parameters.get("dimensions"), job.spec.output.dimensions
    if asked is not None and told is not None and asked != told:
        yield ("output", "dimensions"), f"{told} is not what request.parameters.dimensions asks for, {asked}; remove it"
    known = DIMENSIONS.get(job.spec.request.model)
    if asked is None and None not in (told, known) and told != known:
        why = f"{job.spec.request.model} answers with {known} numbers; ask for {told} by request.parameters.dimensions, or remove it"
        yield ("output", "dimensions"), why
    if job.spec.stand_ins:
        yield ("policy", "retry"), "the vectors of two models do not compare; remove the other model"


def _parse_yaml(path: Path, text: str, keys: str = "name, input and request") -> tuple[yaml.Node, Any]:
    """A file's tree, which knows its lines, and what it holds. `keys`: such as it should have."""
    try:
        loader = YAML(text)
        tree = loader.get_single_node()
        held = loader.construct_document(tree) if tree is not None else None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise JobInvalid([f"{path}:{line}: not valid YAML: {why}"]) from error
    if not isinstance(tree, yaml.MappingNode):
        raise JobInvalid([f"{path}:1: expected a mapping of keys such as {keys}"])
    duplicates = list(_duplicate_keys(path, tree))
    if duplicates:
        raise JobInvalid(duplicates)
    return tree, held


def _duplicate_keys(path: Path, node: yaml.Node) -> Iterator[str]:
    """YAML lets a later key win silently; a job file must not."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield f"{path}:{key.start_mark.line + 1}: {key.value}: this key stands twice; remove one"
            seen.add(key.value)
            yield from _duplicate_keys(path, value)


def _problem(path: Path, tree: yaml.Node, problem: Mapping[str, Any], model: type[BaseModel] = JobFile) -> str:
    """One pydantic error as `file:line: key: what was expected`."""
    loc = tuple(str(part) for part in problem["loc"])
    where = f"{path}:{_line(tree, loc)}: {'.'.join(loc) or 'job'}"
    if problem["type"] == "extra_forbidden":
        known = _known_names(loc[:-1], model)
        return f"{where}: unknown key{nearest(loc[-1], known)}; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where}: missing, but required"
    if problem["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        found = problem["input"]
        return f"{where}: expected one of {', '.join(choices)}, found {found!r}{nearest(str(found).lower(), choices)}"
    if problem["type"] in ("list_type", "tuple_type") and isinstance(problem["input"], str):
        return f"{where}: expected a list, such as [{problem['input']}]"
    if loc == ("name",) and problem["type"] == "string_pattern_mismatch":
        return f"{where}: expected a small letter and then small letters, digits and underscores, found {problem['input']!r}"
    if problem["type"] == "model_type":
        return f"{where}: expected a mapping of keys, found {problem['input']!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}; found {problem['input']!r}"


def _known_names(loc: tuple[str, ...], model: type[BaseModel]) -> list[str]:
    """The keys that a contract knows below a location of its file."""
    for part in loc:
        field = next((each for name, each in model.model_fields.items() if part in (name, each.alias)), None)
        if field is not None:  # else a place in a list, or a free name such as a column of input.require
            model = _section_in(field.annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The mapping that a key's type holds, in a list, by free names, or beside a short form."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _line(tree: yaml.Node, loc: tuple[str, ...]) -> int:
    """1-based line of the deepest part of `loc` that the file has."""
    node, line = tree, tree.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _part_path(path: Path, name: str) -> Path:
    """A file the job names: beside the job file, or from the folder above it (`jobs/` and `prompts/` are neighbours)."""
    beside, above = path.parent / name, path.parent.parent / name
    return beside if beside.is_file() else above


def _read_part(path: Path, tree: yaml.Node, held: Any, *keys: str) -> tuple[Path, str] | None:
    """A file that the job names, and its text; None where it names none. Raises JobInvalid where it cannot be read."""
    name = held
    for key in keys:
        name = name.get(key) if isinstance(name, dict) else None
    if not isinstance(name, str):
        return None
    try:
        part = _part_path(path, name)
        return part, part.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        known = list[str]()
        with suppress(OSError, ValueError):  # the folder may be no name either
            folder = path.parent.parent / Path(name).parent.name
            known = sorted(f"{Path(name).parent}/{found.name}" for found in folder.glob("*") if found.is_file())
        why = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or str(error)
        shown = " ".join(name.split())[:NAME_SHOWN] or "''"
        raise JobInvalid([f"{path}:{_line(tree, keys)}: {'.'.join(keys)}: {shown}: {why}{nearest(name, known)}"]) from error


def _load_prompt(path: Path, tree: yaml.Node, held: Any) -> str | None:
    read = _read_part(path, tree, held, "request", "prompt")
    if read is None:
        return None
    part, source = read
    try:
        parse_prompt(source)
    except PromptInvalid as error:
        raise JobInvalid([f"{part}:{error.line}: {error}"]) from error
    return source


def _load_schema(path: Path, tree: yaml.Node, held: Any) -> dict[str, Any] | None:
    import jsonschema_rs

    read = _read_part(path, tree, held, "output", "schema")
    if read is None:
        return None
    part, text = read
    try:
        schema = orjson.loads(text)
        jsonschema_rs.validator_for(schema)
    except orjson.JSONDecodeError as error:
        raise JobInvalid([f"{part}:{error.lineno}: not valid JSON: {error.msg}"]) from error
    except (jsonschema_rs.ValidationError, ValueError) as error:
        loc = tuple(map(str, getattr(error, "instance_path", ())))
        where = f"{part}:{_json_line(text, loc)}: {'.'.join(loc)}".removesuffix(": ")
        raise JobInvalid([f"{where}: not a JSON Schema: {str(error).splitlines()[0]}"]) from error
    if not isinstance(schema, dict) or schema.get("type") != "object" or not schema.get("properties"):
        raise JobInvalid([f"{part}:1: the answer has to be an object with properties: each becomes a column of the results"])
    if problems := [f"{part}:{_json_line(text, loc)}: {why}" for loc, why in unmet(inlined(schema, schema))]:
        raise JobInvalid(problems)
    return schema


def _json_line(text: str, loc: tuple[str, ...]) -> int:
    """1-based line of a place in JSON text: read as YAML, which knows lines, it is 1 where it is not YAML as well."""
    try:
        tree = yaml.compose(text, Loader=YAML)
    except yaml.YAMLError:
        return 1
    return _line(tree, loc) if tree is not None else 1


def _load_suite(path: Path, tree: yaml.Node, held: Any) -> tuple[Expectation, ...]:
    read = _read_part(path, tree, held, "output", "expectations")
    if read is None:
        return ()
    part, text = read
    suite_tree, suite = _parse_yaml(part, text, "expectations")
    try:
        return Suite.model_validate(suite).expectations
    except ValidationError as error:
        raise JobInvalid([_problem(part, suite_tree, problem, Suite) for problem in error.errors()]) from error
