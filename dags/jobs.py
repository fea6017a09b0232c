"""One DAG per job file in `include/jobs` (or NIGHTSHIFT_JOBS)."""

from airflow.sdk import get_parsing_context

from nightshift.errors import JobInvalid
from nightshift.job_file import job_files, load_job
from nightshift.settings import read_settings
from nightshift_airflow.dags import broken_dag_id, broken_job_dag, job_dag, own_dags

wanted = get_parsing_context().dag_id  # a worker needs one DAG of this file, not all of them

for path in job_files(read_settings().jobs):
    if wanted not in (None, path.stem, broken_dag_id(path)):
        continue
    try:
        spec = load_job(path).spec
        if spec.name != path.stem:  # a worker finds the file of a DAG by its name
            raise JobInvalid([f"{path}: name: expected {path.stem!r}, the name of the file; found {spec.name!r}"])
        if spec.name in own_dags():
            raise JobInvalid([f"{path}: name: a periodic report has this name (NIGHTSHIFT_REPORTS); rename one of them"])
        dag = job_dag(spec, path)
    except Exception as error:  # noqa: BLE001 — whatever is wrong with one file, the jobs of the others go on
        dag = broken_job_dag(path, error)
    globals()[dag.dag_id] = dag
