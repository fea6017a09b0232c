"""The local stack: what `make demo`, `make up` and the end-to-end tests start on one machine."""
