"""Write a generated task's files and an untrained model for it.

    python -m examples.generated.write --task steps --work runs/steps

writes ``sft.jsonl`` (the hasty annotator's pairs), ``prompts.jsonl`` and ``held_out.jsonl`` (without answers), ``test.jsonl``, and
``init/``: a Llama of half a million random weights with a tokenizer of characters (words, for conversations) and a chat template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from cagsr.support.atomic import replace_folder
from examples.e2e.prepare import write_jsonl
from examples.generated.tasks import ASK, FACTS, NAMES, rows

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>")
TALK = (
    *(ASK, "My name is", "You are", "and", *NAMES),
    *(part for told, phrase, values in FACTS.values() for part in (told, phrase, values)),
)
"""All words of the conversations."""
SPELLED = 'abcdefghijklmnopqrstuvwxyzASMTR0123456789 \n.,:=+-*%()#"_'


@dataclass(frozen=True)
class Options:
    """Write the files."""

    task: Literal["steps", "code", "conversation"]
    """Which task."""
    work: Path
    """Folder to write into."""
    pairs: int = 3000
    """Pairs for the supervised start."""
    prompts: int = 1500
    """Prompts to train on."""
    held_out: int = 100
    """Prompts to watch training with."""
    test: int = 400
    """Prompts to judge by."""
    hidden_size: int = 128
    """Width of the model."""
    layers: int = 4
    """Layers of the model."""
    seed: int = 0
    """Seeds the rows and the weights."""


def main(options: Options) -> None:
    """Write all and say what was written."""
    options.work.mkdir(parents=True, exist_ok=True)
    asked = rows(options.task, "prompts", options.prompts + options.held_out, options.seed)
    files = {
        "sft": rows(options.task, "pairs", options.pairs, options.seed),
        "prompts": asked[options.held_out :],
        "held_out": asked[: options.held_out],
        "test": rows(options.task, "test", options.test, options.seed),
    }
    if options.task == "conversation":
        # Tests go on from the data's history; what is trained on is asked turn by turn.
        files["test"] = [{"prompt": row.pop("messages"), **row} for row in files["test"]]
        # The turns before the last one are learned too.
        files["sft"] += [
            {"messages": row["messages"][: 2 * (1 + number % 3)]} for number, row in enumerate(files["sft"][::2])
        ]
    for name, own in files.items():
        write_jsonl(options.work / f"{name}.jsonl", own)
    count = save_model(options)
    print(
        f"{options.work}: {', '.join(f'{len(own)} {name}' for name, own in files.items())}; init/: {count:,} random weights"
    )


def save_model(options: Options) -> int:
    """Write ``init/`` and give its number of weights."""
    from transformers import LlamaForCausalLM

    tokenizer = word_tokenizer() if options.task == "conversation" else character_tokenizer()
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(small_llama(tokenizer, options.hidden_size, options.layers))
    with replace_folder(options.work / "init") as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return int(model.num_parameters())


def small_llama(tokenizer: Any, width: int, layers: int) -> Any:
    """The config of a Llama for a tokenizer's vocabulary, whose output layer is its embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def character_tokenizer() -> Any:
    """A token for each character of the steps' and the code's texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, "<unk>", *SPELLED])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return _wrapped(core)


def word_tokenizer(texts: Sequence[str] = TALK, special: Sequence[str] = SPECIAL, template: str | None = CHAT) -> Any:
    """A token for each word of the texts (the conversations'), with the space before it and the colon behind it, and each mark."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = list(dict.fromkeys(word for text in texts for word in re.findall(r"\w+:?", text)))
    pieces = [*special, "<unk>", *words, *(f"▁{word}" for word in words), ".", "?"]
    core = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True),
            pre_tokenizers.Split(Regex(r"[.?]"), behavior="isolated"),
        ]
    )
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
    return _wrapped(core, chat_template=template, additional_special_tokens=list(special[3:]))


def _wrapped(core: Any, **more: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        **more,
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
