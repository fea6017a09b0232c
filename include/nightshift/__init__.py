"""Batch LLM inference that pays once, accounts for every row and reports what it did. Plain Python: imports no Airflow."""

__version__ = "0.1.0"
