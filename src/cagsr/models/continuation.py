"""An answer as the tokens behind its prompt's, and such tokens as text: the one place where both are done.

As in a rollout, prompt ids + answer ids must read as prompt + answer. Neither of the two usual ways does that. Tokenised alone,
an answer is taken for the beginning of a text: the tokenizers of Llama 2, Mistral and T5 put a space before it (``▁``) that
nobody wrote, and drop the first token's in decoding. Tokenised together with the prompt, its first token may swallow the prompt's
last (``Answer: `` + ``The``: GPT-2 makes ``Ġ`` of the space alone and ``ĠThe`` of both): no model that reads the prompt says it.
"""

from collections.abc import Sequence
from typing import Any

_STAND_INS = ("\n", ":", "a", "0")
"""Short texts to put an answer behind where it can't be put behind its prompt."""
_SPACE_MARK = "▁"


def encode_continuation(tokenizer: Any, before: str, text: str) -> list[int]:
    """Token ids of ``text`` as it stands behind the tokens of ``before``, the prompt as the model reads it.

    They are what the tokenizer makes of both together beyond the tokens of ``before``. Where that text's last token would
    merge with the answer's first, the answer is put behind a stand-in whose token doesn't. Where a word can't be written
    without the space that its token holds (a vocabulary of whole words knows ``▁cat`` alone), the answer is tokenised
    alone, so that no word is lost: a typed answer often lacks that space.

    No special tokens are put in; those that the text writes out are read as such.
    """
    alone = _ids(tokenizer, text)
    if not before or not text:
        return alone
    for stand_in in (before, *_STAND_INS):
        found = _behind(tokenizer, stand_in, text)
        if found is not None and (stand_in == before or tokenizer.decode(_ids(tokenizer, stand_in)) == stand_in):
            unknown = tokenizer.unk_token_id
            return alone if found.count(unknown) > alone.count(unknown) else found
    return alone


def continuation_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that an answer's tokens add to their prompt's, special tokens left out; the reverse of encoding.

    Like ``tokenizer.decode``, but the space of the first token stays.
    """
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    special = set(tokenizer.all_special_ids)
    first = next((int(token) for token in ids if int(token) not in special), None)
    if first is None or not str(tokenizer.convert_ids_to_tokens(first)).startswith(_SPACE_MARK):
        return text
    # Behind a token the first one keeps what a decoder takes off the beginning of a text.
    lead = tokenizer.decode([first], skip_special_tokens=True)
    longer: str = tokenizer.decode([first, *ids], skip_special_tokens=True)
    return longer[len(lead) :] if longer.startswith(lead) else text


def _behind(tokenizer: Any, before: str, text: str) -> list[int] | None:
    """The tokens that ``text`` adds to those of ``before``; None where it changes them, or adds none."""
    start, both = _ids(tokenizer, before), _ids(tokenizer, before + text)
    return both[len(start) :] or None if start and both[: len(start)] == start else None


def _ids(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: transformers warns about texts above its own limit; ours is checked with a clear error.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
