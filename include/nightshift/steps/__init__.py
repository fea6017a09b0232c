"""The way of the data, one module per step: discover, plan, approve, submit, wait, collect, assemble, audit, publish, report."""
