"""Load a policy and its tokenizer: safetensors only, device and precision chosen by themselves and stated."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cagsr.config import LoraConfig, ModelConfig, SamplingConfig
from cagsr.errors import ConfigError, ModelError
from cagsr.models.architecture import Architecture, architecture_of, teacher_forced
from cagsr.models.checkpointing import checkpoint_without_dropout
from cagsr.models.files import loading
from cagsr.models.generation import GenerationRules, read_generation_rules
from cagsr.models.hearing import Hearing
from cagsr.models.inputs import PassInputs
from cagsr.models.lengths import length_borders
from cagsr.models.logit_rule import LogitRule, find_logit_rule
from cagsr.models.output_layer import Statistics
from cagsr.models.parts import load_parts
from cagsr.models.stops import split_stop_strings, stop_tokens
from cagsr.models.texts import TokenTexts, token_texts
from cagsr.models.token_pass import token_statistics
from cagsr.models.vision import Vision
from cagsr.support.progress import working

if TYPE_CHECKING:
    from peft import PeftModel

UNLIMITED = 1_000_000
"""Room for a prompt where the model has relative positions and states no limit."""


@dataclass(frozen=True)
class LoadedModel:
    """A policy ready for use, with what was chosen for it."""

    model: nn.Module
    """The transformers model, or the peft model around it; in eval mode, on ``device``."""
    tokenizer: PreTrainedTokenizerBase
    path: str
    device: torch.device
    compute_dtype: torch.dtype
    """float32, or bfloat16 under autocast (trained weights stay float32)."""
    architecture: Architecture
    """Decoder-only or encoder-decoder, and all that follows from it."""
    stop_ids: tuple[int, ...]
    """Token ids that end an answer; the model's generation config names them too, so a saved model stops alike."""
    lora: bool
    notes: tuple[str, ...]
    """What was chosen and why, one sentence each."""
    generation: GenerationRules = field(default_factory=GenerationRules)
    """What the model's generation config means for sampling and scoring."""
    stored_dtype: torch.dtype = torch.float32
    """The precision that the model's files say they have: float32, bfloat16 or float16."""
    grown: bool = False
    """Whether the vocabulary has more rows than the stored model has."""
    untied: bool = False
    """Whether matrices that the stored model shares were made apart for the adapters."""
    vision: Vision | Hearing | None = None
    """What reads the images, or the sounds, of prompts; None: prompts are text."""

    @cached_property
    def logit_rule(self) -> LogitRule | None:
        """What the model makes of its output layer's numbers, asked of it once, with its weights whole.

        None: not known, so its logits are made all at once.
        """
        with self.autocast():
            return find_logit_rule(self.model, self.architecture, self.device, self.compute_dtype)

    @property
    def pad_token_id(self) -> int:
        """The id used to fill up batches; masks, never this id, tell what is padding."""
        return int(self.tokenizer.pad_token_id)

    @cached_property
    def texts(self) -> TokenTexts:
        """What each token says, for comparing answers with prompts; read off the tokenizer once."""
        return token_texts(self.tokenizer, int(self.model.config.get_text_config().vocab_size)).to(self.device)

    def autocast(self) -> torch.autocast:
        """The context in which every forward pass of this model runs."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    def stops(self, sampling: SamplingConfig) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What ends an answer under these settings: token ids, and texts that are looked for in it (``split_stop_strings``)."""
        ids, texts = split_stop_strings(self.tokenizer, sampling.stop_strings)
        return tuple(dict.fromkeys((*self.stop_ids, *ids))), texts

    def text_of(self, ids: Sequence[int]) -> str:
        """An answer's tokens as text, special tokens left out; behind a prompt the first token's space is part of it."""
        return self.architecture.text_of(self.tokenizer, ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Special tokens; chat markers are often in no list of them."""
        named = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(self.tokenizer.all_special_ids) | named

    def spans(self, ids: Sequence[int]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text of some tokens, and where each lies in it, as characters; special tokens take no room."""
        plain = [number for number in ids if number not in self.special_ids]
        ends = iter([len(self.text_of(plain[: count + 1])) for count in range(len(plain))])
        text, offsets, last = self.text_of(plain), [], 0
        for number in ids:
            end = last if number in self.special_ids else max(last, next(ends))
            offsets.append((last, end))
            last = end
        return text, tuple(offsets)

    def teacher_forced(self, inputs: PassInputs, model: nn.Module | None = None) -> Tensor:
        """Logits ``(batch, response, vocabulary)`` of one pass over prompts and answers, by this model or another of its kind.

        Of a few short answers: they are held whole. Else :meth:`token_statistics`.
        """
        return teacher_forced(self.model if model is None else model, self.architecture, inputs, self.pad_token_id)[0]

    def hidden_states(self, inputs: PassInputs, model: nn.Module | None = None) -> Tensor:
        """Last hidden states ``(batch, response, width)`` of one pass; no logits are made.

        The logits where the output layer can't be run by itself.
        """
        policy, known = self.model if model is None else model, self.logit_rule is not None
        logits, hidden = teacher_forced(
            policy, self.architecture, inputs, self.pad_token_id, with_hidden=known, with_logits=not known
        )
        return logits if hidden is None else hidden

    def token_statistics(
        self, inputs: PassInputs, statistics: Statistics, at: Tensor, model: nn.Module | None = None
    ) -> Tensor:
        """One pass over prompts and answers, of this model or of another of its kind (:func:`token_statistics`)."""
        policy = self.model if model is None else model
        return token_statistics(policy, self.architecture, inputs, self.pad_token_id, self.logit_rule, statistics, at)[
            0
        ]

    def pair_context(self) -> int | None:
        """The longest prompt + answer; None where they do not share the model's positions, or it states no limit."""
        return self.context_length() if self.architecture.shares_context else None

    def context_length(self) -> int | None:
        """The longest prompt + response the model has positions for, None where it states no limit."""
        return context_length(self.model.config)

    def room_for_prompts(self, max_new_tokens: int) -> int:
        """Longest prompt in tokens that leaves ``max_new_tokens`` of the context for the answer.

        ConfigError where no room is left, or an encoder-decoder's decoder has fewer positions.
        """
        context = self.context_length()
        if context is None:
            return UNLIMITED
        if not self.architecture.shares_context and max_new_tokens + len(self.generation.forced) > context:
            raise ConfigError(
                f"--sampling.max_new_tokens {max_new_tokens}: the decoder of {self.path} has positions for {context} tokens; "
                f"lower it."
            )
        room = context - max_new_tokens if self.architecture.shares_context else context
        if room < 1:
            raise ConfigError(
                f"--sampling.max_new_tokens {max_new_tokens}: leaves no room for a prompt in the context of {context} tokens "
                f"of {self.path}; lower it."
            )
        return room


def context_length(config: PretrainedConfig) -> int | None:
    """The number of tokens a model has positions for (its encoder, for encoder-decoder models; its decoder, for those that hear),
    by its transformers config.

    None where that states none (relative positions, as T5).
    """
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_target_positions"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0 and text_config.model_type not in ("t5", "mt5", "umt5"):
            return value
    return None


@working("loading the model")
def load_model(config: ModelConfig, lora: LoraConfig | None = None, *, for_training: bool = True) -> LoadedModel:
    """Load the model in eval mode, its tokenizer and, with a rank in ``lora``, fresh LoRA adapters; trained weights are
    float32.

    Training needs a PAD token that is not EOS; reading and sampling do not, and then say what fills the batches instead.

    Raises ModelError: no such path, no safetensors weights or ones that do not make this model, no tokenizer or usable PAD
    token; ConfigError: a device that is not there.
    """
    notes: list[str] = []
    device = _choose_device(config.device, notes)
    compute_dtype = _choose_dtype(config.dtype, device, notes)
    use_lora = lora is not None and lora.r > 0
    dtype = compute_dtype if use_lora or not for_training else torch.float32
    model, tokenizer, stored_dtype, untied, vision = load_parts(config, dtype, notes)
    if isinstance(vision, Vision):
        vision.processor.tokenizer = tokenizer  # an adapter has its own
    added_pad = _choose_pad(config, tokenizer, for_training=for_training, notes=notes)
    grown = len(tokenizer) > model.get_input_embeddings().weight.shape[0]
    if grown:
        model.resize_token_embeddings(len(tokenizer))
    if added_pad:
        notes.append(f"PAD: {tokenizer.pad_token!r} was added to the vocabulary (id {tokenizer.pad_token_id}).")
    stop_ids = _stop_ids(model, tokenizer, config.path, notes)
    architecture = architecture_of(model.config)
    generation = read_generation_rules(
        model.generation_config, encoder_decoder=not architecture.one_sequence, stop_ids=stop_ids, path=config.path
    )
    if vision is not None and 0 <= vision.token_id < model.config.get_text_config().vocab_size:
        # Where it stood in an answer, the model would look for an image to put there.
        generation = replace(generation, never=tuple(sorted({*generation.never, vision.token_id})))
    policy: nn.Module = model
    if use_lora:
        assert lora is not None
        from cagsr.models.tied import untie_adapted  # brings peft, which takes its time

        adapted = add_lora(model, lora, architecture.peft_task)
        made_two = untie_adapted(adapted, lora.target_modules)
        policy = adapted
        notes.append(f"LoRA: rank {lora.r}, alpha {lora.alpha} on {lora.target_modules}; the base weights are frozen.")
        notes += [made_two] if made_two else []
        untied = untied or made_two is not None
    policy.to(device)
    policy.eval()
    length_borders(policy)
    if config.gradient_checkpointing and for_training:
        checkpoint_without_dropout(policy)
    loaded = LoadedModel(
        model=policy,
        tokenizer=tokenizer,
        path=config.path,
        device=device,
        compute_dtype=compute_dtype,
        architecture=architecture,
        stop_ids=stop_ids,
        lora=use_lora,
        notes=tuple(notes),
        generation=generation,
        stored_dtype=stored_dtype,
        grown=grown,
        untied=untied,
        vision=vision,
    )
    if loaded.logit_rule is not None:
        return loaded
    own = (
        f"Logits: this {model.config.model_type} model makes them in a way of its own, so those of a whole micro-batch are held "
        "at once; with a large vocabulary take a small --ppo.micro_batch_size."
    )
    return replace(loaded, notes=(*notes, own))


def _choose_device(name: str, notes: list[str]) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        chosen = next(device for device, there in available.items() if there)
        missing = [device.upper() for device, there in available.items() if not there]
        notes.append(f"Device: {chosen}" + (f" ({' and '.join(missing)} not available)." if missing else "."))
        return torch.device(chosen)
    if not available[name]:
        raise ConfigError(f"--model.device {name}: this machine has no {name} device; use auto or cpu.")
    notes.append(f"Device: {name}, as asked.")
    return torch.device(name)


def _choose_dtype(name: str, device: torch.device, notes: list[str]) -> torch.dtype:
    if name != "auto":
        notes.append(f"Precision: {name}, as asked.")
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        notes.append("Precision: bfloat16, which this GPU computes natively; trained weights stay float32.")
        return torch.bfloat16
    notes.append(f"Precision: float32 (bfloat16 is not chosen by itself on {device.type}).")
    return torch.float32


def _choose_pad(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, for_training: bool, notes: list[str]
) -> bool:
    """Give the tokenizer its PAD token; True when the vocabulary grew."""
    if config.pad_token is not None:
        before = len(tokenizer)
        tokenizer.add_special_tokens({"pad_token": config.pad_token})
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise ModelError(
                f"--model.pad_token {config.pad_token}: this is the EOS of {config.path}; name another token, as '<pad>'."
            )
        return len(tokenizer) > before
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return False
    lack = "has no PAD token" if tokenizer.pad_token_id is None else f"uses its EOS {tokenizer.eos_token!r} as PAD"
    if for_training:
        raise ModelError(
            f"--model.path {config.path}: the tokenizer {lack}, and a model trained so may never learn to stop; "
            "name one with --model.pad_token '<pad>' (added to the vocabulary if it is new)."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"--model.path {config.path}: the tokenizer has neither PAD nor EOS; give --model.pad_token."
            )
        tokenizer.pad_token = tokenizer.eos_token
    notes.append(f"PAD: the tokenizer {lack}; EOS fills up batches here, which masks hide (training would refuse).")
    return False


def _stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str, notes: list[str]
) -> tuple[int, ...]:
    """The model's stop tokens, which its generation config then names too."""
    generation = model.generation_config
    ids = stop_tokens(generation, tokenizer)
    if not ids:
        raise ModelError(f"--model.path {path}: neither the tokenizer nor the generation config names an EOS token.")
    named = None if generation is None else generation.eos_token_id
    known = {tokenizer.eos_token_id, *([named] if isinstance(named, int) else named or [])}
    for number in ids:
        if number not in known:
            token = tokenizer.convert_ids_to_tokens(number)
            notes.append(f"Stop: {token!r} ends answers too, because the chat template ends them with it.")
    if generation is not None:
        generation.eos_token_id = ids[0] if len(ids) == 1 else list(ids)
    return ids


def add_lora(model: PreTrainedModel, lora: LoraConfig, task: str | None) -> PeftModel:
    """Put fresh adapters on a model, in place; its weights are frozen. ``task`` is peft's task type, as CAUSAL_LM, or None.

    ConfigError where a name in ``lora.target_modules`` fits no module that can have an adapter.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    names = [name.strip() for name in lora.target_modules.split(",") if name.strip()]
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=names[0] if names == ["all-linear"] else names,
        task_type=task,
    )
    missing = f"--lora.target_modules {lora.target_modules}: peft finds no such modules in this {model.config.model_type} model"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # untie_adapted sees to it
            policy = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"{missing}.") from error
    found = policy.base_model.targeted_module_names
    for name in names:
        if name != "all-linear" and not any(one == name or one.endswith(f".{name}") for one in found):
            raise ConfigError(f"{missing} as {name}.")
    return policy


def go_on_from(policy: PeftModel, folder: str) -> None:
    """Give fresh adapters the weights of those in a folder.

    ConfigError where it holds no adapter, or one of another rank, scale or other modules.
    """
    from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    what, own = f"--lora.start {folder}", policy.peft_config[policy.active_adapter]
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{what}: there is no adapter_model.safetensors in it; name the folder of a PEFT adapter.")
    with loading(f"{what}: can't be read"):
        stored, settings = load_peft_weights(folder, device="cpu"), PeftConfig.from_pretrained(folder)
    fresh = get_peft_model_state_dict(policy, save_embedding_layers=False)
    # Of a grown vocabulary the file has the embeddings too.
    given = {name: weight.shape for name, weight in stored.items() if "lora_" in name}
    if given != {name: weight.shape for name, weight in fresh.items()} or (settings.r, settings.lora_alpha) != (
        own.r,
        own.lora_alpha,
    ):
        raise ConfigError(
            f"{what}: its adapters have another rank or scale, or other modules; give their --lora settings."
        )
    set_peft_model_state_dict(policy, stored)
