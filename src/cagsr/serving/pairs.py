"""Thumbs as preference pairs in TRL's format, which ``cagsr reward-model`` and ``cagsr dpo`` take as they are."""

import json
from collections.abc import Sequence
from typing import Any

from cagsr.serving.prompt_store import RatedAnswer


def thumb_pairs(rated: Sequence[RatedAnswer]) -> list[dict[str, Any]]:
    """Rows ``{"prompt", "chosen", "rejected"}``: to each prompt, sent once or often, each answer with a thumb up against each with
    one down.

    An answer that got both counts for nothing; of equal pairs there is one. A conversation's answers become one message of the
    assistant each.
    """
    by_prompt: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for one in rated:
        liked, disliked = by_prompt.setdefault(json.dumps(one.prompt, ensure_ascii=False), ({}, {}))
        (liked if one.thumb > 0 else disliked)[one.answer] = None
    rows = []
    for prompt, (liked, disliked) in by_prompt.items():
        read = json.loads(prompt)
        for up in liked.keys() - disliked.keys():
            for down in disliked.keys() - liked.keys():
                if not up.strip() or not down.strip():
                    continue
                answers: list[Any] = [up, down]
                if not isinstance(read, str):
                    answers = [[{"role": "assistant", "content": text}] for text in answers]
                rows.append({"prompt": read, "chosen": answers[0], "rejected": answers[1]})
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))
