"""The quickstart's start model: a word tokenizer and a tiny Llama, trained from nothing on the hasty annotator's pairs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cagsr.config import SftConfig
from cagsr.parse import parse_command, to_yaml
from cagsr.quickstart.task import all_words, make_pairs
from cagsr.sft import SETTINGS, sft
from cagsr.support.atomic import write_text_atomically

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer of the task's words: one token a word, another for each punctuation mark.

    Words carry the space before them ("▁Mara"), so decoding gives back the text; pad, bos and eos are distinct.
    """
    specials = [PAD, BOS, EOS, UNKNOWN]
    pieces = [*specials, *(f"▁{word}" for word in all_words()), ".", ",", ":", ";"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
            pre_tokenizers.Split(Regex(r"[.,:;]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def save_blank(folder: Path, seed: int) -> None:
    """Save an untrained Llama of 376,000 random weights and its tokenizer, as ``cagsr sft --from_scratch`` takes them."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    sizes = yaml.safe_load(Path(__file__).with_name("blank.yaml").read_text(encoding="utf-8"))
    specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **specials)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Recipe:
    """How a model is made from nothing: what ``folder`` holds in the end depends on these alone.

    It gets ``pairs.jsonl`` (drawn with ``data_seed``), ``blank/`` (architecture and tokenizer) and ``NAME/``, the result of so
    many steps of 16 pairs; ``seed`` draws the random weights and the order of the pairs.
    """

    folder: Path
    name: str
    data_seed: int
    seed: int
    pairs: int
    steps: int

    def settings(self) -> SftConfig:
        """Give the settings as ``cagsr sft`` takes them."""
        given: dict[str, object] = {"model": self.folder / "blank", "data": self.folder / "pairs.jsonl"}
        given |= {"output_dir": self.folder / self.name, "steps": self.steps, "seed": self.seed}
        flags = [f"--{key}={value}" for key, value in given.items()]
        file = Path(__file__).with_name("sft.yaml")
        return parse_command(SftConfig, ["--config", str(file), *flags], prog="cagsr quickstart")

    def rows(self) -> str:
        """Give the text of ``pairs.jsonl``."""
        return as_jsonl(make_pairs(self.pairs, self.data_seed))

    def is_made(self) -> bool:
        """Whether the folder holds the finished result of this very recipe.

        ``sft`` takes ``config.json`` away before it changes anything and writes it last.
        """
        result = self.folder / self.name
        wanted = {result / SETTINGS: to_yaml(self.settings()), self.folder / "pairs.jsonl": self.rows()}
        found = (path.is_file() and path.read_text(encoding="utf-8") == text for path, text in wanted.items())
        return (result / "config.json").is_file() and all(found)

    def make(self) -> Path:
        """Train the model with ``sft``, from random weights, and return its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.folder / "pairs.jsonl", self.rows())
        save_blank(self.folder / "blank", self.seed)
        return sft(self.settings())


def as_jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as JSON, one object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)
