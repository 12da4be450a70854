"""Who plays a conversation's user: a transformers chat model beside the policy, or a model behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from cagsr.config import ConversationConfig, ModelConfig, SalienceConfig, SamplingConfig
from cagsr.errors import ConfigError, DataError, RolloutError
from cagsr.flow import EncodedPrompt
from cagsr.models.load import UNLIMITED, LoadedModel, load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.rows import USER_TURNS
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.support.http_json import JsonServer
from cagsr.tasks.conversation import Messages, PlayedUser, Replay
from cagsr.tasks.task import Task

AT_ONCE = 8
"""Messages asked of a server at the same time."""
KEY = "CAGSR_USER_API_KEY"
"""Environment variable with the server's key."""
REPLAY = "replay"


def conversation_task(config: ConversationConfig, model: ModelConfig, prompts: Sequence[EncodedPrompt]) -> Task | None:
    """The task of a conversation; None where nobody speaks after an answer.

    ``model`` says on which device and in which precision a second model is loaded. ConfigError: nothing is to be replayed, or the
    model has no chat template; ModelError: it can't be loaded.
    """
    if config.user is None:
        return None
    if config.user == REPLAY:
        if not any(one.prompt.columns.get(USER_TURNS) for one in prompts):
            raise ConfigError(
                "--conversation.user replay: no row has a second message of the user's (in messages, turns or user_turns); "
                "give conversations, or leave it out."
            )
        return Replay(config.turns)
    plain = next((one.prompt.row for one in prompts if one.prompt.messages is None), None)
    if plain is not None:
        raise ConfigError(
            f"--conversation.user {config.user}: row {plain} is plain text, behind which nobody is to speak; give prompts as chat "
            "messages."
        )
    if config.server is not None:
        key = os.environ.get(KEY)
        server = JsonServer(
            config.server,
            config.timeout,
            name="server that plays the user",
            url_setting="--conversation.user",
            timeout_setting="--conversation.timeout",
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        return PlayedUser(ServerSpeaker(server, config), config)
    loaded = load_model(replace(model, path=config.user))
    if getattr(loaded.tokenizer, "chat_template", None) is None:
        raise ConfigError(f"--conversation.user {config.user}: its tokenizer has no chat template; take a chat model.")
    loaded.model.eval().requires_grad_(False)
    sampling = SamplingConfig(num_generations=1, temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    return PlayedUser(ModelSpeaker(loaded, sampling), config)


@dataclass(frozen=True)
class ModelSpeaker:
    """A transformers chat model that is not trained. It draws from torch's generator, so that a resumed run hears the same."""

    loaded: LoadedModel
    sampling: SamplingConfig

    def __call__(self, conversations: Sequence[Messages]) -> Sequence[str]:
        """Sampled, all at once; nothing where a conversation has become longer than the model can read."""
        tokenizer, salience = self.loaded.tokenizer, SalienceConfig(weighting="uniform")
        room = self.loaded.room_for_prompts(self.sampling.max_new_tokens)
        said = [""] * len(conversations)
        try:
            encoded = encode_texts(conversations, tokenizer, salience, UNLIMITED, source="conversation")
        except DataError as error:
            raise RolloutError(
                f"--conversation.user {self.loaded.path}: its model can't read what was said ({error})"
            ) from error
        heard = [place for place, one in enumerate(encoded) if len(one.ids) <= room]
        if heard:
            batch = prompt_batch(self.loaded, [encoded[place] for place in heard])
            for place, text in zip(heard, sample_responses(self.loaded, batch, self.sampling).completions, strict=True):
                said[place] = text
        return said


@dataclass(frozen=True)
class ServerSpeaker:
    """A model behind an OpenAI-compatible server; what it says is its own draw, so a resumed run may hear something else."""

    server: JsonServer
    config: ConversationConfig

    def __call__(self, conversations: Sequence[Messages]) -> Sequence[str]:
        """Asked for a few at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._say, conversations))

    def _say(self, conversation: Messages) -> str:
        body = {
            "model": self.config.model_name,
            "messages": conversation,
            "max_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
        }
        found = self.server.post("/v1/chat/completions", body)
        try:
            return str(found["choices"][0]["message"]["content"] or "")
        except (TypeError, KeyError, IndexError) as error:
            raise RolloutError(
                f"The server that plays the user at {self.server.url} gave no message (choices[0].message.content): "
                "it is no OpenAI-compatible server; give another one with --conversation.user."
            ) from error
