"""Tiny real models that read images, each with its processor, made from configs with random weights; and small images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3Processor,
    Idefics3Config,
    Idefics3Processor,
    LlavaConfig,
    LlavaProcessor,
    MllamaConfig,
    MllamaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    SmolVLMConfig,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import tiny
from cagsr.flow import Prompt
from cagsr.models.load import LoadedModel
from cagsr.models.pictures import open_picture
from cagsr.models.vision import image_only

KINDS = ("llava", "qwen2_5_vl", "idefics3", "gemma3", "paligemma", "mllama")
SIBLINGS = (
    "qwen2_vl",
    pytest.param(
        "smolvlm", marks=pytest.mark.skipif(find_spec("num2words") is None, reason="its processor needs num2words")
    ),
)
"""Kinds that share the code of one of those."""
MARKS = ["<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<boi>", "<eoi>", "<soft>", "<|image|>",
         "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<user>", "<assistant>"]  # fmt: skip
SHORT = {
    "llava": "<image>",
    "qwen2_5_vl": "<|image_pad|>",
    "idefics3": "<image>",
    "gemma3": "<boi>",
    "paligemma": "<image>",
    "qwen2_vl": "<|image_pad|>",
    "smolvlm": "<image>",
    "mllama": "<|image|>",
}
"""What stands for an image in a prompt."""
_MARKED = "<|vision_start|><|image_pad|><|vision_end|>"
IN_CHAT = {"qwen2_5_vl": _MARKED, "qwen2_vl": _MARKED, "llava": "<image>near "}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<user>{% for part in m.content %}{% if part.type == 'image' %}IMAGE"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template that reads contents in parts alone, as LLaVA's."""


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The words of :mod:`tiny`, with what stands for images in the models' prompts."""
    named = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"} if kind == "gemma3" else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tiny.tokenizer().backend_tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>", model_specific_special_tokens=named,
    )  # fmt: skip
    grid = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    made.add_special_tokens({"additional_special_tokens": [*MARKS, *grid]})
    made.chat_template = CHAT.replace("IMAGE", IN_CHAT.get(kind, SHORT[kind]))
    return made


def processor(kind: str, own: PreTrainedTokenizerFast) -> Any:
    """The processor of a kind of model, for images of a few patches."""
    if kind == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        return LlavaProcessor(images, own, 4, "default", own.chat_template, "<image>", 1)
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 1024}
        )
        made = Qwen2_5_VLProcessor if kind == "qwen2_5_vl" else Qwen2VLProcessor
        return image_only(made)(images, own, None, own.chat_template)
    if kind == "idefics3":
        images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        return Idefics3Processor(images, own, 4, own.chat_template)
    if kind == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        return Gemma3Processor(images, own, own.chat_template, 4)
    if kind == "smolvlm":
        images = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        return image_only(SmolVLMProcessor)(images, own, None, 4, own.chat_template)
    if kind == "paligemma":
        images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
        images.image_seq_length = 16
        return PaliGemmaProcessor(images, own, own.chat_template)
    images = MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4)
    return MllamaProcessor(images, own, own.chat_template)


def config(kind: str, own: PreTrainedTokenizerFast) -> Any:
    """A config of two or three layers."""
    ids = dict(zip(MARKS, own.convert_tokens_to_ids(MARKS), strict=True))
    common = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = common | {
        "vocab_size": len(own), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    seen = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
            "patch_size": 4}  # fmt: skip
    if kind == "llava":
        return LlavaConfig(
            text_config={**text, "model_type": "llama"},
            vision_config={**seen, "model_type": "clip_vision_model", "projection_dim": 16},
            image_token_id=ids["<image>"], image_seq_length=16, **common,
        )  # fmt: skip
    if kind == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        return Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={
                "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
            },
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], **common,
        )  # fmt: skip
    if kind == "qwen2_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        return Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4,
                           "spatial_merge_size": 2, "temporal_patch_size": 2},
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], **common,
        )  # fmt: skip
    if kind == "paligemma":
        return PaliGemmaConfig(
            text_config={**text, "model_type": "gemma", "head_dim": 8},
            vision_config={**seen, "model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=ids["<image>"], projection_dim=32, hidden_size=32, **common,
        )  # fmt: skip
    if kind in ("idefics3", "smolvlm"):
        return (Idefics3Config if kind == "idefics3" else SmolVLMConfig)(
            text_config={**text, "model_type": "llama"},
            vision_config=seen,
            image_token_id=ids["<image>"],
            scale_factor=2,
            **common,
        )
    if kind == "gemma3":
        return Gemma3Config(
            text_config={**text, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8,
                         "layer_types": ["sliding_attention", "full_attention"]},
            vision_config={**seen, "model_type": "siglip_vision_model"},
            image_token_id=ids["<soft>"], boi_token_id=ids["<boi>"], eoi_token_id=ids["<eoi>"], mm_tokens_per_image=4, **common,
        )  # fmt: skip
    vision = {
        **seen, "attention_heads": 2, "num_global_layers": 1, "max_num_tiles": 4, "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
    }  # fmt: skip
    return MllamaConfig(
        text_config={**text, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        vision_config=vision, image_token_index=ids["<|image|>"], **common,
    )  # fmt: skip


def save_model(folder: Path, kind: str, *, seed: int = 0, scale: float = 4.0) -> Path:
    """Save a random model that sees, sharp enough to look somewhere, with its processor; returns the folder."""
    torch.manual_seed(seed)
    own = tokenizer(kind)
    reads = processor(kind, own)  # first: PaliGemma's adds tokens
    model = AutoModelForImageTextToText.from_config(config(kind, own))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "norm" not in name:
                parameter.mul_(scale)
            if name.endswith("gate"):  # mllama's cross-attention starts closed
                parameter.fill_(0.8)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    reads.save_pretrained(folder)
    return folder


def read_alone(loaded: LoadedModel, prompt: Prompt) -> dict[str, Any]:
    """What a user of transformers makes of a prompt by itself."""
    assert loaded.vision is not None
    processor = loaded.vision.processor
    images = [open_picture(picture) for picture in prompt.images]
    # A template has written the BOS, or mllama's processor has put it in.
    written = prompt.messages is not None or loaded.vision.model_type == "mllama"
    special = {"add_special_tokens": False} if written else {}
    made = dict(processor(text=[prompt.text], images=[images], return_tensors="pt", **special))
    made.pop("labels", None)  # PaliGemma's, of no use without a suffix
    return made


def alone(loaded: LoadedModel, model: Any, prompt: Prompt, answer: list[int]) -> tuple[Any, int]:
    """A prompt and its answer by themselves, as a user of transformers reads them: nothing padded, nothing shared."""
    assert loaded.vision is not None
    made, suffix = read_alone(loaded, prompt), int(loaded.vision.model_type == "paligemma")
    width = made["input_ids"].shape[1]
    made["input_ids"] = torch.cat([made["input_ids"], torch.tensor([answer])], dim=1)
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in made:
            made[name] = torch.nn.functional.pad(made[name], (0, len(answer)), value=suffix)
    if (mask := made.get("cross_attention_mask")) is not None:
        made["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(answer), -1, -1)], dim=1)
    with torch.no_grad():
        return model(**made, output_attentions=True, use_cache=False), width


def picture(colour: str, size: tuple[int, int] = (24, 24), box: Sequence[int] = (4, 4, 12, 12)) -> Image.Image:
    """A white image with one rectangle."""
    made = Image.new("RGB", size, "white")
    ImageDraw.Draw(made).rectangle(tuple(box), fill=colour)
    return made


def save_rows(folder: Path, count: int = 6, images: int = 1, **columns: Any) -> Path:
    """Save prompts with images as JSON lines, the images beside them; returns the file."""
    rows = []
    for number in range(count):
        names = []
        for place in range(images):
            name = f"{number}-{place}.png"
            picture(("red", "blue", "green")[(number + place) % 3], (24, 16), (2 + number, 2, 10 + number, 10)).save(
                folder / name
            )
            names.append(name)
        texts = "tell me about the cat", "the big house near the tree", "a small bird likes food"
        rows.append({"prompt": texts[number % 3], "images": names, **columns})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
