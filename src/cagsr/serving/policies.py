"""One base model and the versions of its adapter, of which one at a time is switched on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError

from cagsr.errors import RunError
from cagsr.models.load import LoadedModel
from cagsr.serving.versions import Versions

MOST = 4
"""Adapters in memory; the one that was not used for longest makes room."""


class Policies:
    """The versions as models; for one thread. ``loaded`` is the base, which is version 0."""

    def __init__(self, loaded: LoadedModel, versions: Versions) -> None:
        self._loaded, self._versions = loaded, versions
        self._there: list[int] = []  # the latest used last

    @contextmanager
    def using(self, number: int) -> Iterator[LoadedModel]:
        """Give the model as it is in a version, inside the block. RunError where the version's files can't be used."""
        if number == 0:
            policy = self._loaded.model
            if isinstance(policy, PeftModel):
                with policy.disable_adapter():
                    yield self._loaded
            else:
                yield self._loaded
            return
        self._bring(number)
        self._loaded.model.set_adapter(_name(number))
        yield self._loaded

    def _bring(self, number: int) -> None:
        """Load a version's adapter, unless it is there; its files are compared with the manifest first."""
        if number in self._there:
            self._there.remove(number)
            self._there.append(number)
            return
        self._versions.check(number)
        self.load(number, self._versions.path(number))

    def load(self, number: int, folder: Path) -> None:
        """Load an adapter under a version's number; RunError where it is none for this base."""
        policy = self._loaded.model
        try:
            if isinstance(policy, PeftModel):
                policy.load_adapter(str(folder), _name(number))
            else:
                policy = PeftModel.from_pretrained(policy, str(folder), adapter_name=_name(number))
                self._loaded = replace(self._loaded, model=policy.eval(), lora=True)
        except (ValueError, KeyError, RuntimeError, OSError, SafetensorError) as error:
            raise RunError(
                f"{folder} is no adapter of {self._loaded.path} ({type(error).__name__}); serve the model that it was trained on."
            ) from error
        self._there.append(number)
        if len(self._there) > MOST:
            self._loaded.model.delete_adapter(_name(self._there.pop(0)))


def _name(number: int) -> str:
    return f"version-{number}"
