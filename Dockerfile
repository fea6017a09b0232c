# Nightshift's image: Airflow, the locked libraries, and beside them an environment of its own for the local S3.
ARG BASE_IMAGE=apache/airflow:slim-3.3.2-python3.12
FROM ${BASE_IMAGE}

USER root
# A volume that is mounted on a folder takes over who owns it.
RUN install -d -o 50000 -g 0 -m 0775 /run/nightshift /state /opt/nightshift /opt/local /opt/airflow /opt/airflow/logs

USER 50000:0
COPY --chown=50000:0 docker/requirements.txt /opt/nightshift/requirements.txt
RUN pip install --no-cache-dir --require-hashes -r /opt/nightshift/requirements.txt
# The emulator pins its own botocore.
COPY --chown=50000:0 local/requirements.txt /opt/nightshift/local-requirements.txt
RUN python -m venv /opt/local && /opt/local/bin/pip install --no-cache-dir --require-hashes -r /opt/nightshift/local-requirements.txt
# The base image has no bytecode: compiled here once, and not by each container as it starts. What is a template and no Python stays as it is.
RUN python -m compileall -q -j 0 /home/airflow/.local/lib || true

COPY --chown=50000:0 docker/make_secrets.py docker/make_buckets.py docker/upload_sample.py local/sample.py /opt/nightshift/
COPY --chown=50000:0 include /opt/airflow/include
COPY --chown=50000:0 dags /opt/airflow/dags
COPY --chown=50000:0 plugins /opt/airflow/plugins
RUN python -m compileall -q /opt/airflow/include /opt/airflow/dags /opt/airflow/plugins
ENV PYTHONPATH=/opt/airflow/include
