"""What is saved is what was trained: a model is written, loaded again and compared before a command says that it is done."""

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from cagsr.config import SamplingConfig
from cagsr.errors import RunError
from cagsr.flow import EncodedPrompt, ImageInputs
from cagsr.models.architecture import architecture_of
from cagsr.models.checkpointing import without_checkpointing
from cagsr.models.files import SENTENCEPIECE, adapter_base, copy_beside, is_adapter
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.tied import UNTIED
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.support.atomic import delete, replace_folder

TOLERANCE = 1e-3
"""How far a logit may be off, as a share of the largest (or of 1). All is computed in float32, so what is left is sums in
another order, 1e-5; a matrix that adapters were merged into twice, or a config that says something else, is off by 0.1 and
more."""
NOTEWORTHY = 0.05
"""Mean difference of a log-probability, nats, from which on the user is told how to avoid rounding."""
TEXTS, TOKENS = 4, 16
"""How many prompts with answers are compared, and how many tokens of each answer."""
PLAIN = ("eager", "sdpa")
"""Attention implementations that compute in any precision."""
DIFFERS = "differs"
"""Name, or ending of the name, of the folder that keeps a model whose comparison failed."""


class Outputs(NamedTuple):
    """What a model gives for the texts it is compared on."""

    logits: Tensor  # (positions, outputs) float32, on the CPU
    told: Tensor  # (positions,) what the user is told the difference of
    unit: str  # what that is, in words


Probe = Callable[[nn.Module], Outputs]
"""Runs a model on a few texts, in the precision of its weights: the trained one, with or without adapters, or the saved one."""


def answers_probe(
    loaded: LoadedModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    images: Sequence[ImageInputs | None] = (),
) -> Probe:
    """A language model's logits at the tokens of a few answers, all in one pass; ``texts``: ids of prompts and answers,
    ``images``: those of each prompt (empty: none has any).
    """
    texts = texts[:TEXTS]
    seen = tuple(images[:TEXTS]) if any(images[:TEXTS]) else None

    def outputs(model: nn.Module) -> Outputs:
        ids, mask = _padded([prompt for prompt, _ in texts], loaded, loaded.architecture.padding_side, model)
        answers, answer_mask = _padded([answer[:TOKENS] for _, answer in texts], loaded, "right", model)
        with torch.no_grad(), without_checkpointing(model), _plain_attention(model):
            logits = loaded.teacher_forced(PassInputs(ids, mask, answers, answer_mask, images=seen), model)
        found = logits[answer_mask].float().cpu()
        logprobs = found.log_softmax(dim=-1).gather(1, answers[answer_mask].cpu()[:, None])[:, 0]
        return Outputs(found, logprobs, "log-probabilities")

    return outputs


def _padded(texts: Sequence[Sequence[int]], loaded: LoadedModel, side: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    """``(texts, longest)`` token ids and the mask of the real ones, on the model's device."""
    rows = [torch.tensor(text, dtype=torch.long, device=next(model.parameters()).device) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=loaded.pad_token_id, padding_side=side)
    real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return ids, pad_sequence(real, batch_first=True, padding_side=side)


def scores_probe(loaded: LoadedModel, texts: Sequence[Sequence[int]]) -> Probe:
    """A reward model's scores of a few texts, padded as it reads them."""

    def outputs(model: nn.Module) -> Outputs:
        ids, mask = _padded(texts[:TEXTS], loaded, "right", model)
        with torch.no_grad(), without_checkpointing(model), _plain_attention(model):
            logits = model(input_ids=ids, attention_mask=mask.long()).logits.float().cpu()
        return Outputs(logits, logits[:, 0], "scores")

    return outputs


class Saved(NamedTuple):
    """A model that was saved, loaded again (in float32), and found to be the trained one, and what the user is told of it."""

    model: PreTrainedModel
    sentence: str


def saved_facts(loaded: LoadedModel, saved: Saved) -> str:
    """What a card tells of the files, as lines of a list."""
    untied = [note for note in loaded.notes if note.startswith(UNTIED)]
    return "\n".join(f"- {sentence}" for sentence in (saved.sentence, *untied))


def chosen_dtype(choice: str, loaded: LoadedModel) -> torch.dtype:
    """The precision to save in: ``auto`` is the starting model's own."""
    found: torch.dtype = loaded.stored_dtype if choice == "auto" else getattr(torch, choice)
    return found


def dtype_note(choice: str, loaded: LoadedModel, flag: str) -> str:
    """Tell the user before training which precision the model will be saved in."""
    dtype = chosen_dtype(choice, loaded)
    why = "as the starting model is" if choice == "auto" else "as asked"
    more = "" if dtype == torch.float32 else f"; {flag} float32 would keep every digit of the training"
    return f"To be saved in {str(dtype).removeprefix('torch.')}, {why}{more}."


def save_compared(
    folder: Path,
    model: nn.Module,
    loaded: LoadedModel,
    probe: Probe,
    dtype: torch.dtype,
    generation: GenerationConfig | None = None,
    *,
    texts: Callable[[Saved], Mapping[str, str]],
    place: Path,
    kept: Path,
) -> Saved:
    """Write a trained model (adapters merged) and its tokenizer, load them again and compare.

    The trained model (not sharded, in evaluation mode, perhaps with peft around it) is left as it is. Memory: a copy in float32,
    beside one for merging where there are adapters. ``folder`` is an empty one of a temporary name, which will be called
    ``place``; ``generation`` becomes its ``generation_config.json`` (None: the starting model's); ``texts`` are further files by
    name, written once the comparison has passed. Where it fails the files go to ``kept``.

    Raises:
        RunError: what was loaded again is not the trained model, or that one gives no numbers.
    """
    precision = str(dtype).removeprefix("torch.")
    full, trained = _without_adapters(model, probe)
    if bool(trained.logits.isnan().any()):
        raise RunError(
            f"{place} was not written, because the trained model gives no numbers (NaN) any more: the training diverged; go "
            "back to an earlier checkpoint, or start anew with a lower learning rate."
        )
    _write(folder, full, dtype, generation)
    write_tokenizer(folder, loaded)
    again = _load(folder, full)
    found = probe(again)
    problem = (
        _weights_unlike(again, full, dtype)
        or unlike(_with_weights(again, full, probe, dtype) if dtype != torch.float32 else found, trained)
        or _tokens_unlike(folder, loaded.tokenizer)
    )
    if problem is None and bool((found.logits.isfinite() != trained.logits.isfinite()).any()):
        delete(kept)
        kept.mkdir()
        _write(kept, full, torch.float32, generation)
        write_tokenizer(kept, loaded)
        raise RunError(
            f"{place} was not written, because in {precision} the trained model gives no numbers any more (save_dtype): it "
            f"is in {kept} instead, in float32."
        )
    if problem:
        delete(kept)
        os.replace(folder, kept)
        raise RunError(
            f"{place} was not written, because what was saved is not what was trained ({problem}): it is kept in {kept} for a "
            "look, and all checkpoints stay; please report this with the model's name."
        )
    off = (found.told - trained.told).abs()
    sentence = (
        f"Saved in {precision}, loaded again and compared: {found.unit} differ from the trained model's by "
        f"{float(off.mean()):.1g} on average, {float(off.max()):.1g} at most"
    )
    more = "; save_dtype float32 would round nothing" if float(off.mean()) > NOTEWORTHY else ""
    saved = Saved(again, f"{sentence}{more}.")
    for name, text in texts(saved).items():
        (folder / name).write_text(text, encoding="utf-8")
    return saved


def save_adapter_compared(
    place: Path, model: PeftModel, loaded: LoadedModel, probe: Probe, *, kept: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write the adapters alone, whole or not at all, load them again into the same base and compare, as ``save_compared``.

    In a ``dtype`` of fewer digits they are those of the model only if they were rounded to it before.
    """
    with loaded.autocast():
        trained = probe(model)
    with replace_folder(place) as folder:
        # The base's embeddings are frozen, so they are saved only where the base as stored lacks rows of them.
        model.save_pretrained(str(folder), save_embedding_layers=loaded.grown)
        if dtype != torch.float32:
            file = folder / "adapter_model.safetensors"
            # Rows of the embeddings that came with a grown vocabulary are the base's, and stay as they are.
            cast = {name: weight.to(dtype) for name, weight in load_file(file).items() if model.prefix in name}
            weights = {**load_file(file), **cast}
            save_file(weights, file, {"format": "pt"})
        if loaded.grown:
            write_tokenizer(folder, loaded)  # AutoPeftModel grows the base to its size
        active, again = model.active_adapter, "loaded-again"
        model.load_adapter(str(folder), again)
        try:
            model.set_adapter(again)
            with loaded.autocast():
                found = probe(model)
        finally:
            model.set_adapter(active)
            model.delete_adapter(again)
        if problem := unlike(found, trained):
            delete(kept)
            os.replace(folder, kept)
            raise RunError(
                f"{place} was not written, because the adapters that were saved are not those that were trained ({problem}): "
                f"they are kept in {kept} for a look, and all checkpoints stay; please report this with the model's name."
            )


def _without_adapters(model: nn.Module, probe: Probe) -> tuple[PreTrainedModel, Outputs]:
    """The model to be saved, in float32, and what the trained one gives.

    Adapters are merged in a copy, and in float32, so that the sum is rounded once.
    """
    if not isinstance(model, PeftModel):
        assert isinstance(model, PreTrainedModel)
        return model, probe(model)
    twin = copy.deepcopy(model).float()
    trained = probe(twin)
    # A merge of what is no number is refused by peft, in a sentence that is not for users.
    full = twin.unload() if bool(trained.logits.isnan().any()) else twin.merge_and_unload(safe_merge=True)
    assert isinstance(full, PreTrainedModel)
    return full, trained


def _with_weights(again: PreTrainedModel, full: PreTrainedModel, probe: Probe, dtype: torch.dtype) -> Outputs:
    """What the model that was loaded gives with the weights as they were before rounding: its config is then compared."""
    there, here = again.state_dict(), full.state_dict()
    with torch.no_grad():
        for name, tensor in here.items():
            there[name].copy_(tensor)
        found = probe(again)
        for name, tensor in here.items():
            there[name].copy_(tensor.to(_dtype_saved(full, name, tensor, dtype)))
    return found


def _write(folder: Path, model: PreTrainedModel, dtype: torch.dtype, generation: GenerationConfig | None) -> None:
    before, own = model.config.dtype, getattr(model, "generation_config", None)
    try:
        if own is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder, state_dict=_cast(model, dtype))
        model.config.dtype = dtype  # save_pretrained has written the one in memory
        model.config.save_pretrained(folder)
        if own is not None:
            # Not by save_pretrained, which refuses what published models have, as a temperature without do_sample.
            written = own if generation is None else generation
            written.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])
    finally:
        model.config.dtype = before
        if own is not None:
            model.generation_config = own


def write_tokenizer(folder: Path, loaded: LoadedModel) -> None:
    """The tokenizer, with its SentencePiece file where the model's folder has one, and what reads images."""
    loaded.tokenizer.save_pretrained(folder)
    copy_beside(adapter_base(loaded.path) if is_adapter(loaded.path) else loaded.path, (SENTENCEPIECE,), folder)
    if loaded.vision is not None:
        loaded.vision.save(folder)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights in the precision they are saved in, on the CPU where they are cast; tied ones stay one tensor."""
    found: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen:
            wanted = _dtype_saved(model, name, tensor, dtype)
            seen[key] = tensor if wanted == tensor.dtype else tensor.to("cpu", wanted)
        found[name] = seen[key]
    return found


def _dtype_saved(model: PreTrainedModel, name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """A weight's precision on disk: transformers has some modules stay in float32, and leaves whole numbers alone."""
    if not tensor.is_floating_point():
        return tensor.dtype
    kept = model._get_dtype_plan(dtype)
    return torch.float32 if any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept) else dtype


def _load(folder: Path, like: PreTrainedModel) -> PreTrainedModel:
    """Load a folder as anyone would, in float32 (which changes no weight), beside ``like``."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=like.is_remote_code())
    auto: Any = architecture_of(config).auto_class if like.can_generate() else AutoModelForSequenceClassification
    again = auto.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=like.is_remote_code(),
        attn_implementation=like.config._attn_implementation if like.config._attn_implementation in PLAIN else PLAIN[0],
    )
    assert isinstance(again, PreTrainedModel)
    again.config.dtype = config.dtype
    return again.to(like.device).eval()


def _weights_unlike(again: PreTrainedModel, full: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Whether any weight that was loaded is another than the trained one, rounded."""
    there = again.state_dict()
    for name, tensor in full.state_dict().items():
        if name not in there:
            return f"{name} is missing"
        rounded = tensor.to(_dtype_saved(full, name, tensor, dtype)).to(there[name].dtype)
        if not torch.equal(rounded, there[name]):
            return f"the weights of {name} are others"
    return None


def unlike(found: Outputs, trained: Outputs) -> str | None:
    """Whether two models give different logits, as part of a sentence; infinite ones (masked outputs) must agree."""
    finite = trained.logits.isfinite()
    allowed = TOLERANCE * max(1.0, float(trained.logits[finite].abs().max()))
    if not bool((found.logits.isfinite() == finite).all()):
        return "logits are infinite or no numbers where the trained model's are not"
    largest = float((found.logits - trained.logits)[finite].abs().max())
    return None if largest <= allowed else f"a logit is off by {largest:.3g} where {allowed:.1g} would be rounding"


def _tokens_unlike(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Whether the saved tokenizer reads a text otherwise; the text is made of pieces from all over the vocabulary."""
    step = max(1, len(tokenizer) // 200)
    text = tokenizer.decode(list(range(0, len(tokenizer), step)))
    remote = type(tokenizer).__module__.startswith("transformers_modules")
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
    same = again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.pad_token_id == tokenizer.pad_token_id
    return None if same else "the tokenizer reads texts otherwise"


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Have the model use an attention that computes in any precision (flash attention doesn't in float32)."""
    own = model.config._attn_implementation
    if own in PLAIN:
        yield
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.set_attn_implementation(PLAIN[0])
    try:
        yield
    finally:
        base.set_attn_implementation(own)


def greedy_probe(loaded: LoadedModel, prompts: Sequence[EncodedPrompt], longest: int) -> Probe:
    """Compare on a policy's greedy answers of at most ``longest`` tokens to a few short prompts."""
    some = sorted(prompts[: 16 * TEXTS], key=lambda prompt: len(prompt.ids))[:TEXTS]
    batch = prompt_batch(loaded, some)
    rollout = sample_responses(loaded, batch, SamplingConfig(temperature=0.0, max_new_tokens=min(TOKENS, longest)))
    answers = [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.sampled, strict=True)]
    texts = [(prompt.ids, answer) for prompt, answer in zip(some, answers, strict=True)]
    return answers_probe(loaded, texts, batch.images or ())
