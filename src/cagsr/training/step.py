"""One step of a run: collect, update, evaluate now and then, write, watch, save."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cagsr.config import TrainConfig
from cagsr.errors import MonitorStop, RewardError, RolloutError
from cagsr.evaluation.held_out import HeldOutMetric, JudgedAnswers, answer, evaluation_metrics
from cagsr.flow import EncodedPrompt, EpisodeBatch, Experience
from cagsr.models.load import LoadedModel
from cagsr.models.sharding import gathered
from cagsr.reward.trainer_calls import TrainerCalls
from cagsr.reward.user_functions import TextFunction
from cagsr.rollout.episodes import EpisodePlayer
from cagsr.runs.numbers import StepNumbers
from cagsr.support.clock import peak_memory_bytes
from cagsr.support.processes import broadcast, gather_objects
from cagsr.support.progress import say
from cagsr.tasks.curriculum import Curriculum
from cagsr.training.monitors import Alert, Monitors
from cagsr.training.ppo import PPO
from cagsr.training.record import RunRecord


@dataclass(frozen=True)
class Steps:
    """What the steps of a run work with."""

    config: TrainConfig
    loaded: LoadedModel
    ppo: PPO
    curriculum: Curriculum
    held_out: Sequence[EncodedPrompt]
    metric: HeldOutMetric
    monitors: Monitors
    record: RunRecord
    trainer: TrainerCalls

    def start(self) -> None:
        """Evaluate the starting model, before the first step."""
        metrics, answered = self._evaluate()
        self.record.log(0, metrics, {}, [], answered)
        self.record.evaluated(0, metrics)
        self.trainer.state.log_history.append({"step": 0, **metrics})
        self.monitors.observe(0, metrics)

    def step(self, step: int, numbers: StepNumbers) -> dict[str, float]:
        """Take one step; gives the timings.

        Raises:
            RewardError, RolloutError: with the step, and where the run can be resumed.
            MonitorStop: a monitor stops the run, which is saved.
        """
        config, ppo, record = self.config, self.ppo, self.record
        started = time.perf_counter()
        self.trainer.begin(step - 1, self.curriculum.epoch)
        prompts = self.curriculum.next()
        try:
            experience = ppo.collect(prompts, self.trainer)
        except RewardError as error:  # of this process's answers: the others may know nothing of it
            raise RewardError(f"step {step}: {error} {record.where_to_resume()}") from error
        except RolloutError as error:
            raise RolloutError(f"step {step}: {error} {self._where_to_resume()}") from error
        self.curriculum.observe(prompts, experience.returns)
        collected = time.perf_counter()
        metrics = ppo.update(experience)
        updated = time.perf_counter()
        last = step == self.monitors.last_step(config.run.steps)
        answered: list[dict[str, Any]] = []
        if last or _is_due(step, config.evaluation.every):
            found, answered = self._evaluate()
            self.record.evaluated(step, found)
            metrics |= found
        if any(isinstance(term, TextFunction) for term in ppo.reward.terms):
            try:
                metrics |= self.trainer.averages(lambda items: gather_objects(items, ppo.accelerator), metrics)
            except RewardError as error:
                raise RewardError(f"step {step}: {error} {self._where_to_resume()}") from error
        self.trainer.state.log_history.append({"step": step, **metrics})
        timings = {
            "collect_seconds": collected - started,
            "update_seconds": updated - collected,
            "evaluation_seconds": time.perf_counter() - updated,
            "response_tokens": float(ppo.reduce(_drawn(experience.episodes).sum().float())),
            **{f"{name}_seconds": seconds for name, seconds in ppo.clock.take().items()},
            "peak_memory_bytes": peak_memory_bytes(self.loaded.device),
        }
        samples = sample_rows(experience, config.run.sample_rows, self.trainer.extra)
        record.log(step, metrics, timings, samples, answered)
        numbers.step(step, metrics)
        self._watch(step, metrics, last)
        return timings

    def _watch(self, step: int, metrics: Mapping[str, float], last: bool) -> None:
        """Warn, save, or stop."""
        alerts = self.monitors.observe(step, metrics)
        alerts += [Alert("shared_prompts", step, sentence, "warn") for sentence in self.ppo.take_warnings()]
        self.record.warn(alerts)
        for alert in alerts:
            # One that stops the run is said by the error.
            if alert.action != "stop" and self.ppo.accelerator.is_main_process:
                say(f"{'warning: ' if alert.action == 'warn' else ''}step {step}: {alert.sentence}")
        stopping = [alert.sentence for alert in alerts if alert.action == "stop"]
        if last or stopping or _is_due(step, self.config.run.save_every):
            self.record.save(step)
        if stopping:
            raise MonitorStop(f"step {step}: {' '.join(stopping)} {self._where_to_resume()}")

    def _where_to_resume(self) -> str:
        """The main process's sentence, which all of them say."""
        return broadcast(self.record.where_to_resume, self.ppo.accelerator)

    def _evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The held-out metrics, and the greedy answers to the first ``evaluation.samples`` prompts as rows."""
        config, prompts = self.config, self.held_out
        if not prompts:
            return {}, []
        # Steps are the reward's to judge, and references are for training: the metric judges whole answers of the model's own.
        player = self.ppo.player if isinstance(self.ppo.player, EpisodePlayer) else None

        def answers(temperature: float) -> JudgedAnswers:
            sampling = dataclasses.replace(config.sampling, temperature=temperature)
            return answer(
                self.loaded,
                prompts,
                sampling,
                self.metric,
                seed=config.run.seed,
                batch_size=config.rollout.batch_size,
                accelerator=self.ppo.accelerator,
                player=player,
            )

        with gathered(self.loaded.model):
            sampled, greedy = answers(config.sampling.temperature), answers(0.0)
        shown = {encoded.prompt.row for encoded in prompts[: config.evaluation.samples]}
        rows = [
            {
                "prompt": prompt.text,
                "completion": greedy.completions[number],
                "metric": greedy.metric[number],
                "tokens": greedy.lengths[number],
                "ended": greedy.ended[number],
            }
            for number, prompt in enumerate(greedy.prompts)
            if prompt.row in shown
        ]
        return evaluation_metrics(sampled=sampled, greedy=greedy), rows


def sample_rows(experience: Experience, limit: int, extra: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A few answers with their reward breakdown and what reward functions logged of them, one of each prompt first."""
    episodes, returns = experience.episodes, experience.returns
    generations = max(1, int((episodes.prompts.group == episodes.prompts.group[0]).sum()))
    count, context = len(episodes.completions), episodes.context
    order = [start + offset for offset in range(generations) for start in range(0, count, generations)][:limit]
    return [
        {
            "prompt": episodes.prompts.prompts[row].text,
            "completion": episodes.completions[row],
            "reward": float(returns.total[row]),
            "terms": {name: float(value[row]) for name, value in returns.terms.items()},
            "contributions": {name: float(value[row]) for name, value in returns.contributions.items()},
            "tokens": int(episodes.lengths[row]),
            "ended": bool(episodes.ended[row]),
            **({"given": bool(episodes.given[row])} if episodes.given is not None else {}),
            **({"extra": {column: values[row] for column, values in extra.items()}} if extra else {}),
            **(
                {}
                if context is None
                else {
                    "segments": [{"role": one.role, "content": one.text} for one in context.episodes[row].segments],
                    "by_turn": returns.by_turn[row].tolist(),
                }
            ),
        }
        for row in order
    ]


def _drawn(episodes: EpisodeBatch) -> Tensor:
    """What the policy said, ``(batch, response)`` bool: references among its answers are not."""
    return episodes.sampled if episodes.given is None else episodes.sampled & ~episodes.given[:, None]


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
