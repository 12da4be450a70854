"""``cagsr serve``: an OpenAI-compatible server that learns from consenting users in idle time, and what it has kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cagsr.config.ranges import OutputFile, PositiveInt
from cagsr.errors import DataError, RunError
from cagsr.serving.settings import ServeConfig
from cagsr.support.progress import say

if TYPE_CHECKING:
    from cagsr.serving.prompt_store import PromptStore
    from cagsr.serving.versions import Versions


@dataclass(frozen=True)
class Config(ServeConfig):
    """Serve a model as OpenAI's servers do, and train an adapter in idle time on prompts whose senders consent (run); list and
    remove what was kept (prompts, remove), make pairs of thumbs (pairs), show versions and go back one (versions, rollback).
    """

    mode: Literal["run", "prompts", "remove", "pairs", "versions", "rollback"] = "run"
    """What to do (given without a flag: cagsr serve rollback). All but run read --folder alone, while the server runs or not."""
    id: PositiveInt | None = None
    """remove: number of the prompt."""
    out: OutputFile | None = None
    """prompts, pairs: JSONL file; None: standard output."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        yield from super().conflicts()
        if self.mode == "run" and not self.model.path:
            yield "--model is missing: give the folder or Hub id of the model to serve."
        if (self.mode == "remove") != (self.id is not None):
            yield "--id N names the prompt that cagsr serve remove removes; give it there, and there alone."
        if self.out is not None and self.mode not in ("prompts", "pairs"):
            yield "--out belongs to cagsr serve prompts and pairs."


def run(config: Config) -> None:
    """Serve, or do something with a server's folder."""
    from cagsr.serving.prompt_store import FILE, PromptStore
    from cagsr.serving.server import TOKEN, serve
    from cagsr.serving.versions import Versions

    if config.mode == "run":
        return serve(ServeConfig(**{one.name: getattr(config, one.name) for one in fields(ServeConfig)}))
    folder = Path(config.folder)
    if not (folder / TOKEN).is_file():
        raise RunError(f"--folder {folder}: no server's folder; cagsr serve --model MODEL --folder {folder} makes one.")
    if config.mode in ("versions", "rollback"):
        return _versions(config, Versions(folder))
    with closing(PromptStore(folder / FILE, config.consent)) as store:
        _kept(config, store)


def _versions(config: Config, versions: Versions) -> None:
    from cagsr.serving.versions import list_versions

    if config.mode == "rollback":
        say(f"Version {versions.roll_back()} is served from now on, by a running server too.")
    else:
        print(json.dumps(list_versions(versions), indent=1))


def _kept(config: Config, store: PromptStore) -> None:
    from cagsr.commands.inputs import write_rows
    from cagsr.serving.pairs import thumb_pairs

    where = config.out or "Standard output"
    if config.mode == "remove":
        assert config.id is not None
        if not store.remove(config.id):
            raise DataError(f"--id {config.id}: there is no such prompt; cagsr serve prompts lists them.")
        say(f"Prompt {config.id} is removed, with its answers; a training that has read it ends.")
    elif config.mode == "prompts":
        kept = store.prompts()
        write_rows([asdict(one) for one in kept], config.out)
        say(f"{where}: {len(kept):,} prompts.")
    else:
        rated = store.rated()
        rows = thumb_pairs(rated)
        if not rows:
            raise DataError(f"{len(rated):,} answers have a thumb, and to no prompt there is one up and one down.")
        write_rows(rows, config.out)
        say(f"{where}: {len(rows):,} preference pairs of {len(rated):,} answers with a thumb.")
