"""The work of a step, stated once for all systems: a random model, prompts, and how much is sampled and trained on them.

The model is a Llama with random weights, which would nearly never say its stop token and now and then its padding token.
So one coordinate of the embeddings is constant, no layer writes to it, and the output embedding's weights on it give the
two tokens the logits that the work asks for.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "7M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "14M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 6},
    "30M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "60M": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 11, "num_attention_heads": 10},
    "116M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 12},
}
VOCABULARY = 8192
PAD, STOP, FIRST_WORD = 0, 1, 3
TEMPERATURE, LEARNING_RATE, KL, LORA_ALPHA = 1.0, 1e-6, 0.05, 32


@dataclass(frozen=True)
class Work:
    """One step's work, the same for every system."""

    name: str
    model: str = "30M"
    prompt: int = 256
    """Longest prompt, tokens."""
    response: int = 128
    """Longest answer, tokens."""
    prompts: int = 4
    generations: int = 4
    """Answers to each prompt."""
    micro_batch: int = 8
    """Sequences in a forward of scoring and update."""
    epochs: int = 2
    """Passes over the answers in the update, an optimizer step each."""
    varied: bool = False
    """Answers stop at random, after half of ``response`` on average if they could go on; prompts have half to all of
    ``prompt``. Else all prompts and answers have the full length."""
    vocabulary: int = VOCABULARY
    """Pieces; real models have 32,000 to 262,144."""
    layers: str = "last-4"
    """Layers whose attention is read (ours)."""
    device: Literal["cpu", "cuda"] = "cpu"
    start: str = ""
    """Folder of a pretrained model to start from, instead of ``model``; its answers are kept from ending before ``response``."""
    data: str = ""
    """With ``start``: JSONL file whose first rows are the prompts."""
    lora: int = 0
    """Rank of LoRA adapters on all linear layers; 0 trains all weights."""

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """What both sides compute in; trained weights are float32."""
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def sequences(self) -> int:
        """Answers in a step."""
        return self.prompts * self.generations


def save_start(work: Work, folder: Path) -> int:
    """Write the model every system starts from, its tokenizer, and ``prompts.jsonl``; returns its parameters' number.

    A pretrained model is linked to, and its number of parameters not counted: 0.
    """
    if work.start:
        for file in Path(work.start).resolve().iterdir():
            (folder / file.name).symlink_to(file)
        rows = Path(work.data).read_text(encoding="utf-8").splitlines()[: work.prompts]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return 0
    torch.manual_seed(0)
    sizes = MODELS[work.model]
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        num_key_value_heads=sizes["num_attention_heads"] // 2,
        max_position_embeddings=max(64, work.prompt + work.response),
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=STOP,
        tie_word_embeddings=False,
        **sizes,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    shortest = work.prompt // 2 if work.varied else work.prompt
    lengths = torch.linspace(shortest, work.prompt, work.prompts).long().tolist()
    prompts = [torch.randint(FIRST_WORD, work.vocabulary, (n,), generator=generator) for n in lengths]
    _set_logits(model, prompts[0][None], stop=2.0 / work.response if work.varied else None)
    model.save_pretrained(folder)
    words = {"<pad>": PAD, "<stop>": STOP, "<unk>": 2} | {f"w{i}": i for i in range(FIRST_WORD, work.vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<stop>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    rows = [json.dumps({"prompt": " ".join(f"w{i}" for i in ids.tolist())}) for ids in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return sum(parameter.numel() for parameter in model.parameters())


def read_prompts(folder: Path) -> list[str]:
    """The prompts that ``save_start`` wrote."""
    return [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]


@torch.no_grad()
def _set_logits(model: LlamaForCausalLM, ids: torch.Tensor, stop: float | None) -> None:
    """Give the stop token the probability ``stop`` at every position (None: none), and the padding token none."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding[:, 0] = embedding[:, 1:].norm(dim=1).mean()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    head[:, 0] = 0.0
    head[[PAD, STOP]] = 0.0
    hidden = model.model(input_ids=ids).last_hidden_state[0]
    constant = float(hidden[:, 0].mean())
    others = float((hidden @ head.T)[:, FIRST_WORD:].logsumexp(dim=1).mean())
    head[PAD, 0] = -30.0 / constant
    head[STOP, 0] = (-30.0 if stop is None else others + math.log(stop / (1 - stop))) / constant
