"""Comparisons: methods x seeds from one YAML file (``plan``), as a graph of jobs, through the same loop, to one report."""
