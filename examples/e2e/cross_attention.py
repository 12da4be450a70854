"""An untrained encoder-decoder of the size of the example's Llama, for the comparison on cross-attention.

    python -m examples.e2e.cross_attention --work runs/cross_attention

reads the tokenizer of ``init/`` that ``examples.e2e.prepare`` wrote and writes ``init-cross/``: a T5 of about a million parameters
with random weights. ``cagsr sft --from_scratch`` makes a start of it, on the same pairs as the Llama's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from cagsr.errors import DataError
from cagsr.support.atomic import replace_folder


@dataclass(frozen=True)
class Options:
    """Write the model."""

    work: Path = Path("runs/cross_attention")
    """Folder that ``prepare`` wrote."""
    hidden_size: int = 128
    """Width of the model."""
    heads: int = 4
    """Attention heads of a layer."""
    feed_forward: int = 168
    """Width of the feed-forward layers."""
    layers: int = 3
    """Layers of the encoder and of the decoder; each of the decoder's has a cross-attention. As many in both: transformers'
    cache takes the encoder's number for the decoder's."""
    seed: int = 0
    """Seeds the weights."""


def main(options: Options) -> None:
    """Write ``init-cross/`` and say how large it is. Raises DataError where ``init/`` is missing."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    init, folder = options.work / "init", options.work / "init-cross"
    if not (init / "tokenizer.json").exists():
        raise DataError(f"{init} holds no tokenizer; run python -m examples.e2e.prepare --work {options.work} first.")
    tokenizer = AutoTokenizer.from_pretrained(init)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=options.hidden_size,
        d_kv=options.hidden_size // options.heads,
        d_ff=options.feed_forward,
        num_layers=options.layers,
        num_decoder_layers=options.layers,
        num_heads=options.heads,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    torch.manual_seed(options.seed)
    model = T5ForConditionalGeneration(config)
    with replace_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    print(f"{folder}: {model.num_parameters():,} parameters, untrained")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
