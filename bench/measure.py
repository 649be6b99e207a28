"""Send one streamed completion and take the time of everything that comes back."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter

import httpx
from workload import Job


@dataclass(slots=True)
class Outcome:
    """What happened to one job; times are in seconds of time.perf_counter."""

    job: Job
    started: float
    """When it arrived: in an open loop when it was due, even if it was sent later."""
    arrivals: list[float] = field(default_factory=list)
    """When each event with text came."""
    ended: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    """Both as the server counts them in its usage."""
    error: str = ""
    """The code of the error, if it failed."""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.started

    @property
    def tpot(self) -> float | None:
        """Mean time per token after the first; None if there was only one."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def itl(self) -> list[float]:
        """Gaps between events with text."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


class EventParser:
    """Splits a byte stream into the data of its server-sent events."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, chunk: bytes) -> Iterator[str]:
        """Yield the data of every event that `chunk` completes."""
        *events, self._buffer = (self._buffer + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines).decode()


async def measure(
    client: httpx.AsyncClient, model: str, job: Job, prompt: list[int], started: float
) -> Outcome:
    """Run one job; never raises for what the server or the network does."""
    outcome = Outcome(job, started)
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": job.output_length,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                outcome.error = _code(json.loads(await response.aread()))
            elif not await _read(response, outcome) and not outcome.error:
                outcome.error = "truncated"
    except httpx.HTTPError as error:
        outcome.error = type(error).__name__
    except ValueError:
        outcome.error = "malformed"
    outcome.ended = perf_counter()
    return outcome


async def _read(response: httpx.Response, outcome: Outcome) -> bool:
    """Read all events; return whether the stream ended as it should."""
    parser = EventParser()
    async for chunk in response.aiter_raw():
        now = perf_counter()
        for data in parser.feed(chunk):
            if data == "[DONE]":
                return True
            _take(json.loads(data), now, outcome)
    return False


def _take(event: dict[str, object], now: float, outcome: Outcome) -> None:
    if "error" in event:
        outcome.error = _code(event)
        return
    choices = event["choices"]
    if isinstance(choices, list) and choices and choices[0]["text"]:
        outcome.arrivals.append(now)
    usage = event.get("usage")
    if isinstance(usage, dict):
        outcome.input_tokens = usage["prompt_tokens"]
        outcome.output_tokens = usage["completion_tokens"]


def _code(body: dict[str, object]) -> str:
    error = body.get("error")
    return str(error.get("code")) if isinstance(error, dict) else "malformed"
