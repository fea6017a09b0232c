"""Places that take a shard of requests now and have answers later."""
