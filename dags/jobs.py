"""One DAG per job file in `include/jobs` (or NIGHTSHIFT_JOBS)."""

from airflow.sdk import get_parsing_context

from nightshift.errors import JobInvalid, Unusable
from nightshift.job_file import load_job
from nightshift.settings import read_settings
from nightshift_airflow.dags import broken_job_dag, job_dag

wanted = get_parsing_context().dag_id  # a worker needs one DAG of this file, not all of them

for path in sorted(read_settings().jobs.glob("*.y*ml")):
    if wanted not in (None, path.stem):
        continue
    try:
        spec = load_job(path).spec
        if spec.name != path.stem:  # a worker finds the file of a DAG by its name
            raise JobInvalid([f"{path}: name: expected {path.stem!r}, the name of the file; found {spec.name!r}"])
        dag = job_dag(spec, path)
    except Unusable as error:
        dag = broken_job_dag(path, error)
    globals()[dag.dag_id] = dag
