"""Fixtures shared by the tests of several rooms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pytest
import torch
from matplotlib.figure import Figure

from cagsr.flow import Attention, EpisodeBatch, Prompt, PromptBatch, Readings, RewardBatch
from setup_browser import CHROMIUM

pytest_plugins = ["limits"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright: both are processes of their own already. Skips where one is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM} here (make browser, as root)")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(autouse=True)
def _precision_stays_in_its_test() -> Iterator[None]:
    """A trainer in bfloat16 sets accelerate's precision for the whole process: it must not follow into the next test."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None and state.AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _pictures_are_laid_out_but_not_rendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering a run's curves takes longer than a tiny training: matplotlib does it for tests marked ``renders`` only.

    All of our own code that chooses and lays out the curves runs as ever.
    """
    curves = sys.modules.get("cagsr.runs.curves")  # not imported for the tests that need none of it
    if curves is not None and request.node.get_closest_marker("renders") is None:
        monkeypatch.setattr(curves, "Figure", _Unrendered)


class _Unrendered(Figure):
    def savefig(self, stream: BinaryIO, **_: Any) -> None:  # type: ignore[override]
        stream.write(b"not rendered")


@pytest.fixture
def make_reward_batch() -> Callable[..., RewardBatch]:
    """Make a random reward batch: ``prompts`` times ``generations`` answers, all lengths from ``shortest`` on."""

    def make(
        seed: int = 0,
        prompts: int = 2,
        generations: int = 3,
        response: int = 6,
        prompt: int = 5,
        words: int = 3,
        shortest: int = 1,
    ) -> RewardBatch:
        g = torch.Generator().manual_seed(seed)
        batch = prompts * generations
        lengths = torch.randint(shortest, response + 1, (batch, 1), generator=g)
        mask = torch.arange(response) < lengths
        attention = torch.rand(batch, response, prompt, generator=g).softmax(dim=2)
        word_of = torch.randint(-1, words, (prompts, prompt), generator=g).repeat_interleave(generations, 0)
        salience = torch.rand(prompts, words, generator=g).repeat_interleave(generations, 0) + 0.1
        pooled = torch.stack([((word_of == w)[:, None] * attention).sum(2) for w in range(words)], dim=2)
        rows = tuple(Prompt(row=i + 1, text=f"prompt {i + 1}", columns={"answer": i}) for i in range(prompts))
        ids, ended = torch.randint(0, 4, (batch, response), generator=g), torch.rand(batch, generator=g) < 0.7
        return RewardBatch(
            episodes=EpisodeBatch.of_one_turn(
                PromptBatch(
                    prompts=tuple(rows[i // generations] for i in range(batch)),
                    ids=torch.randint(0, 9, (batch, prompt), generator=g),
                    real=torch.ones(batch, prompt, dtype=torch.bool),
                    words=word_of,
                    salience=salience,
                    group=torch.arange(prompts).repeat_interleave(generations),
                ),
                ids,
                mask,
                ended,
                tuple(f"answer {i}" for i in range(batch)),
            ),
            readings=Readings(
                logprobs=-torch.rand(batch, response, generator=g),
                entropy=torch.rand(batch, response, generator=g),
                certainty=torch.rand(batch, response, generator=g) * 3,
                sampling_correction=torch.zeros(batch, response),
                values=torch.randn(batch, response, generator=g),
            ),
            reference_logprobs=-torch.rand(batch, response, generator=g),
            attention=Attention(attention, pooled),
        )

    return make
