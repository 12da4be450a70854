"""Prompts: read, encode, decide which words matter.

In the order in which they run: ``load`` and ``json_rows`` (files to ``rows``), ``render`` and ``chat`` (a row to the text the
model reads), ``find_words`` and ``salience`` (which words count, and how much), ``encode`` and ``word_tokens`` (tokens, and the
word each is a piece of), ``prepare`` (all of it, to a ``PromptSet``), ``stream`` (batches for a run) and ``batch`` (tensors).
"""
