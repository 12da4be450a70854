"""A server from its settings: the folder opened and checked, the model loaded, the threads started, and all of it ended."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cagsr.config import DataConfig
from cagsr.errors import ConfigError, ModelError, RunError
from cagsr.models.files import fingerprint_model
from cagsr.models.generation import generation_notes
from cagsr.models.hearing import Hearing
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.load import load_rows
from cagsr.prompts.prepare import prepare_prompts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.runs.folder import LOCK, lock_folder
from cagsr.runs.reward import with_run_reward
from cagsr.serving.activity import Activity
from cagsr.serving.app import Server
from cagsr.serving.asking import Reader
from cagsr.serving.engine import Engine
from cagsr.serving.judges import Judges
from cagsr.serving.learner import FEWEST, Learner
from cagsr.serving.policies import Policies
from cagsr.serving.prompt_store import FILE, PromptStore
from cagsr.serving.settings import ServeConfig
from cagsr.serving.versions import Versions
from cagsr.support.atomic import disk_errors, write_text_atomically
from cagsr.support.localhost import HOST, listen, serve_until_interrupted
from cagsr.support.progress import say

TOKEN, BASE = "token", "base.json"


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C.

    Raises:
        CagsrError: settings, model, folder or port can't be used; nothing is served then.
    """
    folder = Path(config.folder)
    with ExitStack() as stack:
        taken = stack.enter_context(listen(config.port))
        stack.enter_context(opened_folder(folder))
        token, new = read_token(folder)
        config, _ = with_run_reward(config, config.sampling.temperature)
        loaded = load_model(config.model, for_training=False)
        if isinstance(loaded.vision, Hearing):
            raise ModelError(
                f"--model {config.model.path} hears, and no client can send a sound; name one that reads texts."
            )
        check_base(folder, config)
        rows, frequency, notes = _held_out(config, loaded)
        _check_trainable(config, loaded)
        versions = Versions(folder)
        versions.clean()
        store = PromptStore(folder / FILE, config.consent, hold_out=rows is None)
        stack.callback(store.close)
        judges, policies = Judges(config, versions, frequency), Policies(loaded, versions)
        for number in {0, versions.manifest().current}:  # what can't be served or judged is refused now
            with policies.using(number) as policy:
                judges.scorer(policy, number)
        say(*loaded.notes, *generation_notes(loaded, config.sampling), *notes)
        activity = Activity()
        learner = Learner(config, folder, store, versions, activity, rows)
        engine = Engine(policies, judges, config.limits)
        stack.callback(engine.close)
        stack.callback(learner.close)
        server = Server(
            config,
            engine,
            store,
            versions,
            Reader(loaded, config, judges.of),
            learner.status,
            activity,
        )
        port = taken.getsockname()[1]

        def ready() -> None:
            learner.start()
            say(*_told(config, folder, versions, port, token if new else None))

        with suppress(KeyboardInterrupt):
            serve_until_interrupted(server.application(token, port), taken, ready)
    say("Stopped. The same command goes on, with a training that was under way too.")


@contextmanager
def opened_folder(folder: Path) -> Iterator[None]:
    """Make the server's folder, for its owner alone, and keep other servers out; RunError where that fails."""
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = {file.name for file in folder.iterdir()}
        if TOKEN not in there and there - {LOCK, f".{TOKEN}.new"}:  # what a kill leaves of a beginning
            raise RunError(f"{folder} holds files that are not a server's: choose an empty or new --folder.")
    with lock_folder(folder):
        yield


def read_token(folder: Path) -> tuple[str, bool]:
    """The token that requests must bring, and whether it was made just now; its file is for its owner alone."""
    path = folder / TOKEN
    with disk_errors(path):
        if path.exists():
            found = path.read_text(encoding="utf-8").strip()
            if len(found) < 32:
                raise RunError(f"{path} holds no token of 32 characters or more; delete it, and a new one is made.")
            return found, False
        made = secrets.token_urlsafe(32)
        temporary = path.with_name(f".{TOKEN}.new")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(made + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        return made, True


def check_base(folder: Path, config: ServeConfig) -> None:
    """See that the folder's versions are of this model, and note which it is; RunError where they are another's."""
    path, found = folder / BASE, fingerprint_model(config.model.path)
    if path.exists():
        before: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if None not in (found, before["fingerprint"]) and found != before["fingerprint"]:
            raise RunError(
                f"{folder} holds the versions of another model ({before['model']}); serve that one, or choose another --folder."
            )
        return
    write_text_atomically(path, json.dumps({"model": config.model.path, "fingerprint": found}) + "\n")


def _check_trainable(config: ServeConfig, loaded: LoadedModel) -> None:
    """Refuse now what every training would refuse."""
    if not config.learning.enabled:
        return
    if loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id:
        raise ConfigError(
            f"--model.path {config.model.path}: its tokenizer has no PAD token of its own, which training needs; name one with "
            "--model.pad_token '<pad>', or only serve (--learning.no_enabled)."
        )
    names = {name.strip() for name in config.lora.target_modules.split(",")}
    base = loaded.model
    matrices = (base.get_input_embeddings(), base.get_output_embeddings())
    if shared := sorted(
        name for name, module in base.named_modules() if module in matrices and name.rpartition(".")[2] in names
    ):
        raise ConfigError(
            f"--lora.target_modules {config.lora.target_modules}: versions have no adapter on the embedding or the output "
            f"head; leave out {shared[0].rpartition('.')[2]}."
        )
    loaded.room_for_prompts(config.sampling.max_new_tokens)


_HeldOut = tuple[list[dict[str, Any]] | None, DocumentFrequency | None, tuple[str, ...]]


def _held_out(config: ServeConfig, loaded: LoadedModel) -> _HeldOut:
    """The prompts that versions are compared on, where a file names them, and their words, counted."""
    path = config.learning.held_out
    if path is None:
        kept = "Versions are compared on a fifth of the prompts that are kept, which is never trained on."
        return None, None, (kept,) if config.learning.enabled else ()
    data = DataConfig(path, limit=config.learning.held_out_prompts)
    limit = loaded.room_for_prompts(config.sampling.max_new_tokens)
    found = prepare_prompts(data, config.salience, loaded.tokenizer, max_length=limit, vision=loaded.vision)
    if seen := next((one.prompt.row for one in found.prompts if one.prompt.images), None):
        raise ConfigError(
            f"--learning.held_out {path}: row {seen} has images; give prompts of text alone, or leave the flag out, and versions "
            "are compared on a fifth of the prompts that are kept, with their images."
        )
    rows = [{"prompt": row.values["prompt"]} for row in load_rows(data)]
    if len(rows) < FEWEST:
        raise ConfigError(
            f"--learning.held_out {path}: {len(rows)} prompts are too few to compare versions on; give {FEWEST}."
        )
    return rows, found.frequency, (f"Versions are compared on {len(rows)} prompts of {path}.",)


def _told(config: ServeConfig, folder: Path, versions: Versions, port: int, token: str | None) -> Iterator[str]:
    """What whoever started the server should know."""
    yield f"Serving {config.served_name}@{versions.manifest().current} at http://{HOST}:{port}/v1"
    if token is None:
        yield f"The token is in {folder / TOKEN}."
    else:
        yield f"Token: {token} (said this once; it is in {folder / TOKEN})"
    asked = "unless a request says no" if config.consent.default else "only of requests that say so"
    limits = f"at most {config.consent.prompts:,} and {config.consent.bytes:,} bytes, then the oldest go"
    yield f"Prompts are kept {asked} ({limits}). Ctrl-C stops; docs/serve.md says the rest."
