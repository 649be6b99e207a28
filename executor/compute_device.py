"""Where an instance computes, and how many steps it has under way: decided once, at start."""

from dataclasses import dataclass

import torch

from baton.core.config import WorkerConfig
from baton.core.errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class StepsUnderWay:
    """How many steps may be under way at once."""

    depth: int
    ahead: bool
    """Whether they may have the same sequences: see engine/scheduler.py."""


def compute_device(config: WorkerConfig) -> torch.device:
    """Return the device that computes; InvalidConfig if what is asked for cannot be had."""
    engine = config.engine
    if engine.device == "cpu" or (engine.device == "auto" and not _gpu_suits(config)):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidConfig("device", engine.device, "cpu or auto: torch finds no CUDA device here")
    if config.parallel.size > 1:
        allowed = "cpu or auto with more than one rank: ranks compute on CPUs only"
        raise InvalidConfig("device", engine.device, allowed)
    if engine.executor == "native":
        raise InvalidConfig("executor", engine.executor, "auto or torch on a GPU")
    if engine.batch_invariant:
        allowed = "false on a GPU: there, sums are split by the sizes of the batch"
        raise InvalidConfig("batch_invariant", "true", allowed)
    return torch.device("cuda", torch.cuda.current_device())


def steps_under_way(config: WorkerConfig, *, on_gpu: bool) -> StepsUnderWay:
    """Return it; raises InvalidConfig if `run_ahead` is asked for and cannot be had."""
    parallel, wanted = config.parallel, config.engine.run_ahead
    possible = parallel.pp == parallel.cp == 1
    if wanted and not possible:
        allowed = "false with stages or context parallelism: not all ranks have the last tokens"
        raise InvalidConfig("run_ahead", "true", allowed)
    ahead = possible and (on_gpu if wanted is None else wanted)
    return StepsUnderWay(2 if ahead else parallel.pp, ahead)


def _gpu_suits(config: WorkerConfig) -> bool:
    suits = config.parallel.size == 1 and config.engine.executor != "native"
    return suits and not config.engine.batch_invariant and torch.cuda.is_available()
