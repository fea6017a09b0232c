"""Measurements: what the product costs in time, and what it survives."""
