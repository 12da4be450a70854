"""Comparisons: methods x seeds from one YAML file, through the same loop, to one report.

``plan`` reads the file, ``jobs`` turns it into a graph of small jobs, ``schedule`` runs what is not done yet, ``work`` does
one of them with ``policies``, ``judging`` and ``validity``; ``results`` reads what they left, ``tables`` and ``figures`` analyse
it, ``report`` writes it down.
"""
