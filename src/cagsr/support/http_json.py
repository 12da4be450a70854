"""JSON over HTTP to a server, with one sentence for everything that can go wrong on the way."""

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from cagsr.errors import RolloutError

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Between two looks at a server that is not up yet."""


class JsonServer:
    """The server at one address; a vLLM server where nothing else is said.

    TRL's ``VLLMClient`` can't be used for it: it wants vllm installed beside the trainer even to ask for answers, never
    times out, and retries a POST that may have been carried out. ``url`` may end in a slash or ``/v1``; ``timeout`` is how
    many seconds each reply may take; ``headers`` go with every request. The sentences call it ``name``, and say with which
    settings its address (``url_setting``) and ``timeout_setting`` are given.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        *,
        name: str = "vLLM server",
        url_setting: str = "--rollout.url",
        timeout_setting: str = "--rollout.timeout",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        self._name, self._url_setting, self._timeout_setting = name, url_setting, timeout_setting
        self._headers = {"Content-Type": "application/json", **(headers or {})}

    def wait(self, seconds: float) -> None:
        """Wait until the server says that it is healthy; RolloutError where it is not within ``seconds``."""
        deadline, said = time.monotonic() + seconds, False
        while True:
            try:
                left = max(POLL_SECONDS, deadline - time.monotonic())
                self._send(urllib.request.Request(self.url + "/health"), "/health", min(self._timeout, left))
                return
            except RolloutError:
                if time.monotonic() + POLL_SECONDS > deadline:
                    raise
            if not said:
                logger.warning("Waiting up to %g seconds for the %s at %s.", seconds, self._name, self.url)
                said = True
            time.sleep(POLL_SECONDS)

    def get(self, path: str) -> Any:
        """Ask for ``path``; gives the decoded JSON, None for an empty body.

        Raises RolloutError: unreachable, too slow, an error status (its ``status`` is in the sentence), or no JSON.
        """
        return self._send(urllib.request.Request(self.url + path), path)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send ``body`` as JSON to ``path``; the rest as ``get``."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers=self._headers, method="POST"
        )
        return self._send(request, path)

    def _send(self, request: urllib.request.Request, path: str, timeout: float | None = None) -> Any:
        timeout = self._timeout if timeout is None else timeout
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                content = reply.read()
        except urllib.error.HTTPError as error:
            raise HttpStatusError(
                f"The {self._name} at {self.url} refused {path} with status {error.code} ({_reason(error.read())}): "
                "look at its log.",
                error.code,
            ) from error
        except TimeoutError as error:
            raise RolloutError(
                f"The {self._name} at {self.url} gave no reply on {path} within {timeout:g} seconds: "
                f"look at its log, or raise {self._timeout_setting}."
            ) from error
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, TimeoutError):
                reason = f"no connection within {timeout:g} seconds"
            raise RolloutError(
                f"The {self._name} at {self.url} can't be reached ({reason}): start it, or give its address with "
                f"{self._url_setting}."
            ) from error
        if not content.strip():
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise RolloutError(
                f"The server at {self.url} replied to {path} with no JSON, so it is no {self._name}: "
                f"give the right address with {self._url_setting}."
            ) from error


class HttpStatusError(RolloutError):
    """The server replied with an error status; ``status`` tells which."""

    def __init__(self, message: str, status: int = 0) -> None:  # one argument is enough for unpickling
        super().__init__(message)
        self.status = status


def _reason(body: bytes) -> str:
    """The message in an error's body, as vLLM (``error.message``) and FastAPI (``detail``) put it; one line."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        error = found.get("error", found)
        text = str(error.get("message") or error.get("detail") or text) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "no reason given"
