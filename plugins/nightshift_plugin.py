"""Tells Airflow of Nightshift. Every process imports this, under Celery every task: it imports next to nothing.

Airflow loads a plugin under the name of its file, so this one must not be called `nightshift`: it would stand in for the package.
"""

from nightshift_airflow.plugin import NightshiftPlugin

__all__ = ["NightshiftPlugin"]
