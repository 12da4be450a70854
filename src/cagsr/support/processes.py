"""Several processes as one run: started through accelerate, given their share of the work, failing together."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from cagsr.errors import CagsrError, ConfigError, RolloutError

T = TypeVar("T")

PATIENCE = 1800.0
"""Seconds that processes wait for one of them: writing a large checkpoint, a user's slow metric. NCCL's own are 600."""


def start_accelerator(*, cpu: bool, longest_wait: float = 0.0) -> Accelerator:
    """Join the processes that ``accelerate launch`` or ``torchrun`` started, as its configuration says (DDP or FSDP2).

    ``cpu`` runs on the CPU although there is a GPU; one process may have to wait ``longest_wait`` seconds for a server.
    Raises ConfigError for a way of distributing (FSDP1, DeepSpeed, Megatron) or a setting of it that is not supported.
    """
    # Buffers (rotary frequencies) never change, so there is nothing to broadcast before a forward.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU accelerate joins processes only where it is told that they run on the CPU.
    cpu = cpu or (started > 1 and not torch.cuda.is_available())
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=PATIENCE + longest_wait))
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[ddp, group])
    if accelerator.num_processes != started:
        raise ConfigError(
            f"{started} processes were started and accelerate joined {accelerator.num_processes}: start them with accelerate "
            "launch or torchrun, as docs/scale.md shows."
        )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and accelerator.distributed_type == DistributedType.MULTI_CPU:
        _shard_on_cpu()
    if accelerator.distributed_type == DistributedType.FSDP:
        check_fsdp(accelerator.state.fsdp_plugin)
    elif accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}: cagsr trains data parallel (MULTI_GPU) or "
            "with FSDP2 (FSDP and fsdp_version 2), see docs/scale.md."
        )
    return accelerator


def check_precision(accelerator: Accelerator, compute_dtype: torch.dtype) -> None:
    """Refuse (ConfigError) a precision that accelerate would bring in by itself: its mixed_precision is not the model's."""
    chosen = accelerator.mixed_precision
    if chosen == "no" or (chosen == "bf16" and compute_dtype == torch.bfloat16):
        return
    raise ConfigError(
        f"accelerate's mixed_precision is {chosen} and the model computes in {str(compute_dtype).removeprefix('torch.')}: set "
        "mixed_precision to 'no' and choose the precision with --model.dtype."
    )


def check_processes(batch: int, answers: int, mini_batches: int, processes: int) -> None:
    """Refuse (ConfigError) a step of ``batch`` prompts with ``answers`` to each that can't be divided among the processes."""
    if batch % processes:
        below, above = batch - batch % processes, batch + processes - batch % processes
        raise ConfigError(
            f"--run.batch_size {batch}: the prompts of a step are divided among {processes} processes, so give a multiple of "
            f"{processes}, as {f'{below} or {above}' if below else above}."
        )
    if mini_batches > batch // processes * answers:
        raise ConfigError(
            f"--ppo.num_mini_batches {mini_batches}: more than the {batch // processes * answers} answers of "
            f"each of {processes} processes in a step."
        )


def split_between_processes(items: Sequence[T], accelerator: Accelerator | None) -> Sequence[T]:
    """Give this process its run of the items, which may be empty; ``gather_objects`` puts the results of all in order again.

    accelerate's function of that name gives a process that would have none the last item once more.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return items
    rank, processes = accelerator.process_index, accelerator.num_processes
    return items[len(items) * rank // processes : len(items) * (rank + 1) // processes]


def gather_objects(items: Sequence[T], accelerator: Accelerator | None) -> list[T]:
    """Collect the (picklable) items of all processes, in the order of their ranks; every process calls it."""
    if accelerator is None or accelerator.num_processes == 1:
        return list(items)
    return gather_object(list(items))


def in_all(work: Callable[[], T], accelerator: Accelerator | None) -> T:
    """Do something in every process; where it fails in one (a CagsrError), it fails in all, with the first one's sentence.

    Every process calls it. One that raised alone would leave the others waiting in the next exchange.
    """
    failure: CagsrError | None = None
    done: list[T] = []
    try:
        done.append(work())
    except CagsrError as error:
        failure = error
    told = gather_objects([None if failure is None else str(failure)], accelerator)
    first = next((sentence for sentence in told if sentence is not None), None)
    if failure is not None:
        raise failure
    if first is not None:
        raise RolloutError(f"another process failed: {first}")
    return done[0]


def broadcast(make: Callable[[], T], accelerator: Accelerator | None) -> T:
    """Compute something (picklable) on the main process and tell all; a CagsrError is raised in all of them.

    Every process calls it. A process that raised alone would leave the others waiting for ever.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return make()
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = make()
        except CagsrError as error:
            found[1] = error
    broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def _shard_on_cpu() -> None:
    """Do on the CPU what accelerate does for GPUs: it would leave FSDP out there and say nothing.

    torch's ``fully_shard`` runs on the CPU with gloo, so a GPU's configuration can be tried without one.
    """
    state = AcceleratorState()
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse (ConfigError) what accelerate's FSDP offers and is not supported here."""
    if plugin.fsdp_version != 2:
        raise ConfigError("accelerate is configured for FSDP1: set fsdp_version: 2 in its configuration.")
    offload = plugin.cpu_offload
    if offload is not None and offload is not False and type(offload).__name__ == "CPUOffloadPolicy":
        raise ConfigError(
            "accelerate's fsdp_offload_params is true: weights on the CPU are not supported, set it to false."
        )
    if plugin.activation_checkpointing:
        raise ConfigError(
            "accelerate's fsdp_activation_checkpointing is true: set it to false and give --model.gradient_checkpointing True."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "accelerate's fsdp_cpu_ram_efficient_loading is true: every process reads the model here, so set it to false."
        )
