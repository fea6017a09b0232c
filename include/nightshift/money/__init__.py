"""What a run will cost, what it did cost, and by which price table."""
