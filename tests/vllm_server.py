"""A real local HTTP server that speaks the part of vLLM's protocol that cagsr uses; it stands in for ``vllm serve``.

It holds its own copy of a transformers model, answers from it, and loads new weights from a folder when it is told to.
Paths, fields and replies are vLLM's (``vllm/entrypoints/openai/completion/protocol.py``, ``serve/tokenize``,
``serve/rpc``, ``serve/cache``, ``serve/instrumentator/server_info.py``); unknown fields are refused, so that a client that
invents one fails. What it is not: vLLM's engine, its kernels, its precision, its loading of weights.

It is a process of its own (``serving``); a test looks into it and changes it through the path ``/test``.
As a program: ``python tests/vllm_server.py MODEL [PORT]`` prints its address and serves until it is killed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import apart

COMPLETION_FIELDS = {
    *("model", "prompt", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n", "presence_penalty"),
    *(
        "seed",
        "stop",
        "stream",
        "temperature",
        "top_p",
        "user",
        "top_k",
        "min_p",
        "repetition_penalty",
        "length_penalty",
    ),
    *("stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("add_special_tokens", "return_tokens_as_token_ids", "return_token_ids", "priority", "request_id"),
}


class Refused(Exception):
    """An error reply: status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeVLLM:
    """The engine behind the HTTP: a model, how the server was started, and what it was asked."""

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.dev_mode = True
        self.context = self.model.config.max_position_embeddings
        self.settings: dict[str, Any] = {
            "model_config": {"model": self.path, "logprobs_mode": "processed_logprobs"},
            "weight_transfer_config": None,
        }
        self.asked: list[tuple[str, Any]] = []
        """Path and body of every request."""
        self.given: list[dict[str, Any]] = []
        """Every choice sent, in order."""
        self.fault: str | None = None
        """What is wrong with the completion replies, to play a faulty server."""

    def get(self, path: str) -> Any:
        if path == "/health":
            return None
        if path == "/v1/models":
            entry = {"id": self.path, "object": "model", "root": self.path, "max_model_len": self.context}
            return {"object": "list", "data": [entry]}
        if path == "/server_info?config_format=json" and self.dev_mode:
            return {"vllm_config": self.settings, "vllm_env": {}, "system_env": {}}
        raise Refused(404, "Not Found")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions":
            reply = self.complete(body)
            self.given += reply["choices"]
            return self._spoiled(reply) if self.fault else reply
        if path == "/tokenize":
            tokens = self.tokenizer(body["prompt"]).input_ids
            return {"count": len(tokens), "max_model_len": self.context, "tokens": tokens}
        if path == "/reset_prefix_cache" and self.dev_mode:
            return {"success": True}
        if path == "/collective_rpc" and self.dev_mode:
            if body.keys() - {"method", "args", "kwargs", "timeout"} or body["method"] != "reload_weights":
                raise Refused(500, f"no such method: {body}")
            self.reload(Path(body["kwargs"]["weights_path"]))
            return {"results": [None]}
        raise Refused(404, "Not Found")

    def _spoiled(self, reply: dict[str, Any]) -> Any:
        first = reply["choices"][0]
        match self.fault:
            case "an answer too few":
                reply["choices"].pop()
            case "numbers":
                first["index"] = 1
            case "no ids":
                first["token_ids"] = None
            case "other prompt":
                first["prompt_token_ids"] = [1, 2]
            case "too many tokens":
                first["token_ids"] = first["token_ids"] + [3] * 9
                first["logprobs"]["token_logprobs"] = [-1.0] * len(first["token_ids"])
            case "a logprob too few":
                first["logprobs"]["token_logprobs"].pop()
            case "outside":
                first["token_ids"][0] = 999
            case "nan":
                first["logprobs"]["token_logprobs"][0] = None
            case "cut":
                first["token_ids"], first["finish_reason"] = first["token_ids"][:1], "length"
                first["logprobs"]["token_logprobs"] = [-1.0]
            case "other stop":
                first["token_ids"], first["finish_reason"] = [5], "stop"
                first["logprobs"]["token_logprobs"] = [-1.0]
            case "no json":
                return b"<html>"
            case "nothing from the third on":
                return reply if [path for path, _ in self.asked].count("/v1/completions") < 3 else {"choices": []}
            case _:
                raise Refused(500, f"no such fault: {self.fault}")
        return reply

    def change(self, name: str, value: Any) -> None:
        """What a test does to it."""
        if name == "scale":
            with torch.no_grad():
                self.model.get_parameter(value[0]).mul_(value[1])
        elif name == "model":
            self.model = AutoModelForCausalLM.from_pretrained(value, dtype=torch.float32).eval()
        elif name == "tokenizer":
            self.tokenizer = AutoTokenizer.from_pretrained(value)
        elif name in vars(self):
            setattr(self, name, value)
        else:
            raise Refused(404, name)

    def look(self, path: str) -> Any:
        """What a test sees of it."""
        if path == "/test/weights":
            return save({name: value.detach() for name, value in self.model.named_parameters()})
        return {"asked": self.asked, "given": self.given}

    def reload(self, folder: Path) -> None:
        """As ``reload_weights``: every tensor of a checkpoint into the model; names and shapes must be known."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise Refused(500, f"Cannot find any model weights with `{folder}`")
        own = self.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in (item for file in files for item in load_file(file).items()):
                if name not in own or own[name].shape != value.shape:
                    raise Refused(500, f"can't load {name}")
                own[name].copy_(value)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if unknown := body.keys() - COMPLETION_FIELDS:
            raise Refused(400, f"unknown fields {sorted(unknown)}")
        if body["model"] != self.path:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        choices: list[dict[str, Any]] = []
        for prompt in body["prompt"]:
            if len(prompt) + body["max_tokens"] > self.context:
                raise Refused(400, f"This model's maximum context length is {self.context} tokens.")
            choices += [{"index": len(choices) + i, **choice} for i, choice in enumerate(self._answers(prompt, body))]
        return {"id": "cmpl-0", "object": "text_completion", "model": self.path, "choices": choices}

    @torch.no_grad()
    def _answers(self, prompt: list[int], body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        stop_ids = body.get("stop_token_ids") or []
        ids = torch.tensor([prompt])
        found = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=body["max_tokens"],
                min_new_tokens=body.get("min_tokens") or None,
                eos_token_id=stop_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                do_sample=True,
                temperature=body["temperature"],
                top_p=body["top_p"],
                top_k=body["top_k"],
                num_return_sequences=body["n"],
                output_scores=True,
                return_dict_in_generate=True,
            ),
        )
        logprobs = torch.stack(found.scores, dim=1).log_softmax(dim=2)  # processed: after temperature and filters
        for row in range(body["n"]):  # cut at stop strings here: what would have followed is never seen
            tokens = found.sequences[row, len(prompt) :].tolist()
            length = next((i for i, token in enumerate(tokens, 1) if token in stop_ids), len(tokens))
            text = ""
            for i in range(1, length + 1):
                text = self.tokenizer.decode(tokens[:i], skip_special_tokens=True)
                if any(stop in text for stop in body.get("stop") or []):
                    length = i
                    break
            tokens = tokens[:length]
            stopped = tokens[-1] in stop_ids or any(stop in text for stop in body.get("stop") or [])
            drawn = [float(logprobs[row, i, token]) for i, token in enumerate(tokens)]
            yield {
                "text": text,
                "finish_reason": "stop" if stopped else "length",
                "prompt_token_ids": prompt,
                "token_ids": tokens,
                "logprobs": {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": drawn},
            }


def _handler(engine: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/test"):
                return self._reply(lambda: engine.look(self.path))
            engine.asked.append((self.path, None))
            return self._reply(lambda: engine.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/test":
                return self._reply(lambda: [engine.change(name, value) for name, value in body.items()])
            engine.asked.append((self.path, body))
            return self._reply(lambda: engine.post(self.path, body))

        def _reply(self, work: Any) -> None:
            try:
                status, content = 200, work()
            except Refused as error:
                status, content = error.status, {"error": {"message": str(error), "code": error.status}}
            payload = (
                b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
            )
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    return Handler


class Served:
    """A server in another process, as a test sees it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def change(self, **changes: Any) -> None:
        """Change the engine: an attribute; ``scale`` a weight; another ``model`` or ``tokenizer`` from a folder."""
        self._ask("/test", changes)

    @property
    def asked(self) -> list[list[Any]]:
        """Path and body of every request, in order."""
        return json.loads(self._ask("/test"))["asked"]

    @property
    def given(self) -> list[dict[str, Any]]:
        """Every choice sent, in order."""
        return json.loads(self._ask("/test"))["given"]

    @property
    def weights(self) -> dict[str, Tensor]:
        return load(self._ask("/test/weights"))

    def _ask(self, path: str, body: Any = None) -> bytes:
        with urlopen(
            Request(self.url + path, None if body is None else json.dumps(body).encode()), timeout=60
        ) as reply:
            return reply.read()


@contextmanager
def serving(model: Path | str, **changes: Any) -> Iterator[Served]:
    """Serve a model in a process of its own, the engine ``changes``d."""
    with apart.served(serve, str(model)) as url:
        served = Served(url)
        served.change(**changes)
        yield served


def serve(model: str, port: int = 0) -> None:
    """Serve until killed."""
    torch.set_num_threads(1)
    with ThreadingHTTPServer(("127.0.0.1", port), _handler(FakeVLLM(model))) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
