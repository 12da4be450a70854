"""A server of ``cagsr serve`` in a process of its own, requests as any program could make them, and a reward for its trainings."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import apart
import tiny

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}"


def save_chat_model(folder: Path) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    tiny.save_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def says_the_prompt(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward: words of the prompt in the answer."""
    return [
        float(sum(word in prompt.split() for word in set(completion.split())))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@dataclass
class Live:
    """A server that runs."""

    process: apart.Process
    folder: Path
    port: int

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text().strip()

    def send(self, method: str, path: str, body: Any = None, **headers: str | None) -> tuple[int, Any]:
        """A request with what a client sends, changed by ``headers`` (None leaves one out); the status and the body."""
        sent: dict[str, str | None] = {
            "Host": f"127.0.0.1:{self.port}",
            "Authorization": f"Bearer {self.token}",
            "Content-Type": "application/json",
        }
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True)
            for name, value in sent.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(content)))
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
                connection.endheaders(content)
            reply = connection.getresponse()
            text = reply.read().decode()
        finally:
            connection.close()
        try:
            return reply.status, json.loads(text)
        except ValueError:
            return reply.status, text

    def complete(self, prompt: str, **fields: Any) -> dict[str, Any]:
        """An answer that must come."""
        status, found = self.send("POST", "/v1/completions", {"model": "model", "prompt": prompt, **fields})
        assert status == 200, found
        return found

    def status(self) -> dict[str, Any]:
        return self.send("GET", "/cagsr/status")[1]


@contextmanager
def served(model: Path, folder: Path, *flags: Any) -> Iterator[Live]:
    """Serve a model until the end of the block."""
    given = ("--model", model, "--name", "model", "--folder", folder, "--port", 0, "--model.device", "cpu", *flags)
    with apart.cagsr("serve", *given) as process:
        port = int(process.wait_for(r"http://127\.0\.0\.1:(\d+)/v1\n")[1])
        yield Live(process, folder, port)
