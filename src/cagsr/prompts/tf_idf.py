"""Texts as vectors of their words, by the words' weights in a set of prompts."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from cagsr.prompts.find_words import find_words
from cagsr.prompts.salience import DocumentFrequency


def tf_idf(texts: Sequence[str], frequency: DocumentFrequency) -> csr_array:
    """``(texts, words)``: how often a text says a word times the word's IDF, rows of length 1."""
    index: dict[str, int] = {}
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        for word in find_words(text):
            rows.append(row)
            columns.append(index.setdefault(word.key, len(index)))
            values.append(frequency.idf(word.key))
    found = csr_array((values, (rows, columns)), shape=(len(texts), max(len(index), 1)))
    lengths = np.sqrt(found.multiply(found).sum(axis=1))
    return csr_array(found / np.where(lengths > 0, lengths, 1.0)[:, None])
