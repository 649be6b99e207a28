"""One stage under way: its cases, each measured once, recorded at once, and none after its time."""

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bench.gpu.records import Records, figures
from bench.gpu.scale import Scale

if TYPE_CHECKING:
    import torch

Measure = Callable[[], Mapping[str, Any]]

LATE = "not begun: the stage's time was spent"


class StageRun:
    """What a stage measures with."""

    def __init__(self, stage: str, scale: Scale, records: Records, deadline: float) -> None:
        """`deadline` is of time.perf_counter()."""
        self.scale = scale
        self._stage = stage
        self._records = records
        self._deadline = deadline
        self._known = figures(records.read(), stage)

    def __repr__(self) -> str:
        return f"<StageRun {self._stage}, {len(self._known)} cases known>"

    @property
    def device(self) -> "torch.device":
        """Where everything is measured."""
        import torch

        return torch.device(self.scale.device)

    @property
    def dtype(self) -> "torch.dtype":
        """Of weights, activations and KV."""
        import torch

        found: torch.dtype = getattr(torch, self.scale.dtype)
        return found

    @property
    def seconds_left(self) -> float:
        """How long the stage may still take; negative once its time is spent."""
        return self._deadline - time.perf_counter()

    def known(self, *names: str) -> bool:
        """Return whether all these cases were measured by now, in this run or one before."""
        return all(name in self._known for name in names)

    def case(self, name: str, measure: Measure) -> None:
        """Measure a case unless it is known, and record its figures or why there are none.

        Raises what leaves the device unusable, so that the stage ends there.
        """
        if name in self._known:
            return
        if self.seconds_left < 0:
            self._records.add(self._stage, case=name, error=LATE)
            return
        _free(self.scale.device)  # what the case before held, which its closures may have kept
        began = time.perf_counter()
        print(f"{self._stage}: {name}", flush=True)
        try:
            found = dict(measure())
        except ModuleNotFoundError as error:
            self._records.add(self._stage, case=name, error=missing(error))
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            self._records.add(self._stage, case=name, error=one_line(error))
            if not _device_works(self.scale.device):
                raise
        else:
            took = round(time.perf_counter() - began, 3)
            self._records.add(self._stage, case=name, took_s=took, figures=found)
            self._known[name] = found


def missing(error: ModuleNotFoundError) -> str:
    """Say which module is not there."""
    return f"skipped: no module {error.name}"


def one_line(error: BaseException) -> str:
    """Return an error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _device_works(device: str) -> bool:
    """After an illegal access every further call to CUDA fails, in this process for good."""
    if device != "cuda":
        return True
    import torch

    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
