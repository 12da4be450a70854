"""Which tokens of an answer are pieces of a word that states something."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cagsr.flow import EpisodeBatch
from cagsr.models.load import LoadedModel
from cagsr.prompts.stating_words import StatingWords


@dataclass(frozen=True)
class StatingTokensOf:
    """Finds them in the answers of a model (``stating`` says which words state something)."""

    loaded: LoadedModel
    stating: StatingWords

    def __call__(self, episodes: EpisodeBatch) -> Tensor:
        """``(batch, response)`` int64: the how-manieth stating word of the answer a sampled token is a piece of, -1 for none."""
        found = torch.full(episodes.ids.shape, -1, dtype=torch.int64)
        for row, (ids, sampled) in enumerate(zip(episodes.ids.tolist(), episodes.sampled.tolist(), strict=True)):
            places = [place for place, own in enumerate(sampled) if own]
            text, offsets = self.loaded.spans([ids[place] for place in places])
            words = self.stating.of(text)
            number = 0
            for place, (start, end) in zip(places, offsets, strict=True):
                while number < len(words) and words[number].end <= start:
                    number += 1
                if number < len(words) and start < end and words[number].start < end:
                    found[row, place] = number
        return found.to(episodes.ids.device)
