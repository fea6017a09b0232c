"""Airflow glue: connections into clients, our errors into retries, waits into triggers. Decisions live in `nightshift`."""
