"""Prompts: read, encode, decide which words matter.

In the order in which they run: ``load`` (files to ``rows``), ``render`` and ``chat`` (a row to the text the model reads),
``find_words`` and ``salience`` (which words count, how much, and which tokens are pieces of them), ``encode`` (tokens),
``prepare`` (all of it, to a ``PromptSet``), ``stream`` (batches for a run) and ``batch`` (tensors).
"""
