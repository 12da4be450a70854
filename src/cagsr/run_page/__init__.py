"""The run's page: curves, warnings, answers over time, settings and costs of one or several runs, as HTML.

A run folder in, one self-contained file out, or the same page served while training goes on. Nothing here writes to a
run but the page itself.
"""
