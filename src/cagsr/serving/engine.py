"""The model's thread: requests wait in a queue, those of equal settings are answered together, each by one version."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cagsr.config import SamplingConfig
from cagsr.errors import RolloutError
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.rollout.variates import row_variates
from cagsr.serving.judges import Judges, Worth
from cagsr.serving.policies import Policies
from cagsr.serving.settings import LimitsConfig
from cagsr.serving.writing import Piece, Writing


@dataclass(frozen=True)
class Asked:
    """What a request asks of the model."""

    prompt: EncodedPrompt
    version: int
    count: int
    """Answers that are given."""
    sampled: int
    """Answers that are sampled, of which the best by the reward are given; ``count`` or more."""
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    top: int | None
    """How many likely tokens are told with each; None: no log-probabilities."""
    reward: bool


@dataclass(frozen=True)
class Answered:
    """The answers to a request, the best first where the reward chose them."""

    version: int
    writings: tuple[Writing, ...]
    sampled_tokens: int
    """Of all that were sampled, given or not."""
    worth: tuple[Worth, ...] | None = None
    scales: str = ""


Event = Piece | Answered | Exception


@dataclass
class Job:
    """A request in the queue; ``tell`` takes pieces (where ``streamed``), then the answers or what went wrong."""

    asked: Asked
    tell: Callable[[Event], None]
    streamed: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> tuple[int, int, float, float, int]:
        """Requests of one key can be sampled in one batch: the others' settings are those of single rows.

        Their prompts have as many images: some models take no others together.
        """
        asked = self.asked
        return asked.version, asked.sampled, asked.temperature, asked.top_p, len(asked.prompt.prompt.images)


class Busy(RolloutError):
    """More requests wait than may."""


class Engine:
    """Answers jobs in their order, in a thread of its own, which alone touches the model."""

    def __init__(self, policies: Policies, judges: Judges, limits: LimitsConfig) -> None:
        self._policies, self._judges, self._limits = policies, judges, limits
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: list[Job] = []
        self._over = False
        self._thread = threading.Thread(target=self._work, name="cagsr-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job into the queue; Busy where too many wait."""
        with self._changed:
            if len(self._waiting) >= self._limits.waiting:
                raise Busy(f"{len(self._waiting)} requests wait already; try again later.")
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End, what is being answered too."""
        with self._changed:
            self._over = True
            for job in self._running:
                job.cancelled.set()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            try:
                self._answer(jobs)
            except Exception as error:  # whatever it is, the next requests are answered
                for job in jobs:
                    job.tell(error)

    def _next(self) -> list[Job] | None:
        """The jobs of the next batch: the first that waits, and others of its key; None: it is over."""
        with self._changed:
            while not self._over:
                self._waiting = deque(job for job in self._waiting if not job.cancelled.is_set())
                if self._waiting:
                    first = self._waiting[0]
                    most = max(1, self._limits.rows // first.asked.sampled)
                    jobs = [job for job in self._waiting if job.key == first.key][:most]
                    chosen = set(map(id, jobs))
                    self._waiting = deque(job for job in self._waiting if id(job) not in chosen)
                    self._running = jobs
                    return jobs
                self._changed.wait()
        return None

    def _answer(self, jobs: Sequence[Job]) -> None:
        version = jobs[0].asked.version
        with self._policies.using(version) as loaded:
            for job, writings in zip(jobs, sampled(loaded, jobs), strict=True):
                if not job.cancelled.is_set():
                    job.tell(self._answered(loaded, job.asked, writings))

    def _answered(self, loaded: LoadedModel, asked: Asked, writings: Sequence[Writing]) -> Answered:
        tokens = sum(len(one.ids) for one in writings)
        if not asked.reward and asked.sampled == asked.count:
            return Answered(asked.version, tuple(writings), tokens)
        answers = [one.response() for one in writings]
        worth, scales = self._judges.worth(loaded, asked.version, asked.prompt, answers)
        # As they came, unless some are left out.
        order = list(range(len(answers)))
        if asked.sampled > asked.count:
            order = sorted(order, key=lambda row: -worth[row].total)[: asked.count]
        return Answered(
            asked.version,
            tuple(writings[row] for row in order),
            tokens,
            tuple(worth[row] for row in order) if asked.reward else None,
            scales,
        )


def sampled(loaded: LoadedModel, jobs: Sequence[Job]) -> list[list[Writing]]:
    """Sample the answers to jobs of one key; pieces are told as they come, a row ends where its own request says."""
    asked, many = [job.asked for job in jobs], jobs[0].asked.sampled

    def token_of(number: int) -> str:
        # Special tokens are left out of a text, but here each is shown.
        return loaded.text_of([number]) or str(loaded.tokenizer.convert_ids_to_tokens(number))

    rows = [
        Writing(
            place,
            loaded.text_of,
            token_of,
            frozenset(loaded.stop_ids),
            one.stop,
            one.max_tokens,
            one.top,
            job.tell if job.streamed else None,
        )
        for job, one in zip(jobs, asked, strict=True)
        for place in range(many)
    ]
    generators = [
        torch.Generator().manual_seed((one.seed + 7919 * place) % 2**63) for one in asked for place in range(many)
    ]
    with_chances = any(one.top is not None for one in asked)

    def watch(held: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
        chances = logits.log_softmax(dim=-1).cpu() if with_chances else None
        numbers = held.tolist()
        for at, (row, token) in enumerate(zip(numbers, tokens.tolist(), strict=True)):
            rows[row].add(token, None if chances is None else chances[at])
        over = [rows[row].finish is not None or jobs[row // many].cancelled.is_set() for row in numbers]
        return torch.tensor(over, device=held.device)

    sampling = SamplingConfig(
        num_generations=many,
        temperature=asked[0].temperature,
        top_p=asked[0].top_p,
        max_new_tokens=max(one.max_tokens for one in asked),
    )
    sample_responses(
        loaded,
        prompt_batch(loaded, [one.prompt for one in asked], many),
        sampling,
        variates=lambda total, held, width: row_variates(generators, held, width),
        watch=watch,
    )
    return [rows[start : start + many] for start in range(0, len(rows), many)]
