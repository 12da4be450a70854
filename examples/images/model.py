"""A small LLaVA of random weights that reads the world's pictures, and its processor.

The vision tower's patches are the grid's fields, so that an image token is what a field shows; two layers bring them to the
text's width, and a Llama reads them in front of the instruction.
"""

from __future__ import annotations

from typing import Any

import torch

from examples.generated.write import small_llama, word_tokenizer
from examples.images.world import COLOURS, FIELD, GROUND, INSTRUCTIONS, NUMBERS, PLACES, SHAPES, SIDE

IMAGE = "<image>"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>", IMAGE)
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def untrained(processor: Any, seed: int, *, width: int = 128, layers: int = 2, vision: int = 64) -> Any:
    """A LLaVA of random weights: ``width`` and ``layers`` of its Llama, ``vision`` the width of a tower of two layers."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    tokenizer = processor.tokenizer
    tower = SiglipVisionConfig(
        hidden_size=vision,
        intermediate_size=2 * vision,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=FIELD,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=small_llama(tokenizer, width, layers),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=len(PLACES),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def reader() -> Any:
    """What reads pictures and prompts: pixels less the ground's colour, and a token for each word."""
    from transformers import LlavaProcessor, SiglipImageProcessor

    texts = [*INSTRUCTIONS, *NUMBERS, *COLOURS, *SHAPES, *SHAPES.values()]
    texts += [f"{place.capitalize()}:" for place in PLACES]
    pixels = SiglipImageProcessor(
        do_resize=False,
        size={"height": SIDE, "width": SIDE},
        image_mean=[part / 255 for part in GROUND],
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=word_tokenizer(texts, SPECIAL, template=CHAT),
        patch_size=FIELD,
        vision_feature_select_strategy="full",
        chat_template=CHAT,
        image_token=IMAGE,
    )
