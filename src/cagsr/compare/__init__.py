"""Comparisons: methods x seeds from one YAML file, through the same loop, to one report.

``plan`` reads the file, ``jobs`` turns it into a graph of small jobs, ``scheduler`` runs what is not done yet, ``worker`` does
one of them with ``make_models``, ``judge_policy`` and ``reward_validity``; ``results`` reads what they left, ``result_tables``
and ``result_figures`` analyse it, ``comparison_report`` writes it down.
"""
