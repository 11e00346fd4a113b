"""One harness: real processes on PostgreSQL, a load generator of its own, ratios within one interleaved run."""
