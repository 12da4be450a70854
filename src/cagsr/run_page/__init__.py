"""A run's page: curves, warnings, answers, settings and costs, as one file or served. Nothing else is written to a run."""
