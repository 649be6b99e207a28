"""What backing up to a peer saves when a decode instance dies, and what it costs while none does.

    python bench/failover.py --model tiny --context 8192 --repeat 5

Two decode processes of one thread each, no prefill instance. Recovery: one request with a prompt
that is new each time; its instance is killed (kill -9) after some tokens, and the gap is the
longest pause between two tokens that its reader sees. Without a backup, the other instance computes
prompt and output anew. Cost: the time per output token of a batch, with and without a backup in
turn, on the same two processes.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoints import DEFAULT_FOLDER, SHAPES, TOKENIZER_FROM, checkpoint

from baton.api.decode_session import DecodeSession, Ended
from baton.api.gateway import Gateway
from baton.api.validate import TextRequest
from baton.core.clock import monotonic
from baton.core.config import EngineConfig, GatewayConfig, HandoverConfig, WorkerConfig
from baton.core.ids import RequestId
from baton.core.metrics import GatewayMetrics
from baton.core.request import GenerateRequest, SamplingParams, TokenLogprobs
from baton.core.served_model import FrontModel
from baton.core.spans import DecodeSpans
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role
from baton.decode_worker.worker import DecodeWorker
from baton.models.tokenizer import load_tokenizer

PATIENCE_S = 600.0
KILLED_AFTER = 300
"""Output tokens; the backup has caught up with the prompt by then."""
OUTPUT = 340


class Process:
    """A decode instance in a process of its own."""

    def __init__(self, name: str, model: Path, context: int, backup: str) -> None:
        handover = HandoverConfig(backup=backup, secret="of this benchmark only")
        config = WorkerConfig(
            instance_id=name,
            role=Role.DECODE,
            model_dir=model,
            model_name="bench",
            engine=EngineConfig(kv_memory_mib=1024, max_model_len=context + 1024),
            handover=handover,
        )
        command = [sys.executable, __file__, "--worker", config.model_dump_json()]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        facts = json.loads(self._process.stdout.readline())
        self.info = InstanceInfo(**facts | {"role": Role.DECODE})

    @property
    def cpu_s(self) -> float:
        """Processor time that it has taken so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End it as by kill -9."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(PATIENCE_S)


async def work(config: WorkerConfig) -> None:
    """Be such a process, until whoever started it is gone."""
    async with await DecodeWorker.start(config, on_progress=lambda _: None) as worker:
        info = worker.info
        facts = {name: getattr(info, name) for name in InstanceInfo.__dataclass_fields__}
        print(json.dumps(facts), flush=True)
        await asyncio.to_thread(sys.stdin.readline)


@dataclass(frozen=True, slots=True)
class Recovery:
    """One request whose instance was killed."""

    gap_s: float
    cached: int
    backed_up: int
    tokens: int
    """Prompt and output at the time."""


def request_of(length: int, output: int, draw: random.Random) -> GenerateRequest:
    """Return a request with a prompt that nobody has seen."""
    prompt = tuple(draw.randrange(5, 4000) for _ in range(length))
    name = RequestId(f"r{draw.randrange(1 << 40)}")
    return GenerateRequest(name, prompt, output, SamplingParams(temperature=0.8, seed=1))


async def recover(model: Path, context: int, backup: str, draw: random.Random) -> Recovery:
    """Kill an instance in the middle of a request, and see how long its reader waits."""
    doomed = await asyncio.to_thread(Process, "a-doomed", model, context, backup)
    peer = await asyncio.to_thread(Process, "b-peer", model, context, "peer")
    board = MembershipBoard(Membership(1, (doomed.info, peer.info)))
    gateway = Gateway(
        GatewayConfig(http_port=0, grpc_port=0, request_timeout_s=PATIENCE_S, lease_s=60),
        {FrontModel(name="bench"): load_tokenizer(TOKENIZER_FROM)},
        board,
        GatewayMetrics(),
    )
    request = request_of(context - KILLED_AFTER, OUTPUT, draw)
    last, gap, tokens = 0.0, 0.0, 0
    try:
        async with gateway, aclosing(gateway.generate(TextRequest(request))) as pieces:
            async for piece in pieces:
                now = time.perf_counter()
                gap = max(gap, now - last) if tokens else 0.0
                last, tokens = now, tokens + len(piece.tokens)
                if tokens >= KILLED_AFTER:
                    doomed.kill()
        trace = gateway.trace(request.request_id)
    finally:
        doomed.kill()
        peer.kill()
    assert trace is not None, "no trace"
    (move,) = trace.migrations
    length = len(request.prompt) + move.output_tokens
    return Recovery(gap, move.cached_tokens, move.backed_up_tokens, length)


class Answer:
    """Hears one request's tokens; see baton.api.decode_session.Listener."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.backed_up_tokens = 0
        self.over = asyncio.Event()

    def deliver(
        self, tokens: Sequence[int], at: float, logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        """Note when they came."""
        self.times += [at] * len(tokens)

    def cached(self, prompt_tokens: int) -> None:
        """Not wanted."""

    def first_token(self, spans: DecodeSpans) -> None:
        """See Listener."""

    def backed_up(self, tokens: int) -> None:
        """Note how far it got."""
        self.backed_up_tokens = tokens

    def ended(self, ended: Ended) -> None:
        """Note that it is over."""
        assert ended.error is None, ended
        self.over.set()

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


async def tpots(
    model: Path, options: argparse.Namespace, draw: random.Random
) -> dict[str, list[float]]:
    """Return, for each batch, without and with a backup in turn, all in milliseconds: its mean TPOT
    (`off`, `on`), and the processor time of both instances per output token (`cpu off`, `cpu on`).
    """
    one = await asyncio.to_thread(Process, "a-decode", model, options.context, "peer")
    two = await asyncio.to_thread(Process, "b-peer", model, options.context, "peer")
    session = DecodeSession(one.info, clock=monotonic, max_unsent=1024)
    ready = asyncio.Event()
    holding = asyncio.create_task(session.run(connect_timeout_s=30, on_ready=ready.set))
    found: dict[str, list[float]] = {"off": [], "on": [], "cpu off": [], "cpu on": []}
    try:
        async with asyncio.timeout(PATIENCE_S):
            await ready.wait()
        for number in range(options.rounds + 1):  # the first one warms up
            for kind in ("off", "on") if number % 2 else ("on", "off"):
                answers = [Answer() for _ in range(options.batch)]
                began = one.cpu_s + two.cpu_s
                for answer in answers:
                    session.submit(
                        request_of(options.cost_prompt, 256, draw),
                        (),
                        timeout_s=PATIENCE_S,
                        listener=answer,
                        backup=two.info if kind == "on" else None,
                    )
                async with asyncio.timeout(PATIENCE_S):
                    for answer in answers:
                        await answer.over.wait()
                assert all((a.backed_up_tokens > 0) == (kind == "on") for a in answers), kind
                if number:
                    found[kind].append(1e3 * statistics.mean(a.tpot for a in answers))
                    cpu_s = one.cpu_s + two.cpu_s - began
                    found[f"cpu {kind}"].append(1e3 * cpu_s / (256 * options.batch))
    finally:
        holding.cancel()
        await asyncio.wait({holding})
        one.kill()
        two.kill()
    return found


def spread(values: Sequence[float]) -> str:
    """Return the median, and least to most."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


async def main(options: argparse.Namespace) -> None:
    """Measure and print Markdown."""
    draw = random.Random(options.seed)
    shape = replace(SHAPES[options.model], positions=1 << 14)
    SHAPES[name := f"{options.model}-16k"] = shape
    model = await asyncio.to_thread(checkpoint, name, options.folder)
    load = os.getloadavg()[0]
    found: dict[str, list[Recovery]] = {"off": [], "peer": []}
    for _ in range(options.repeat):
        for kind, recoveries in found.items():
            recoveries.append(await recover(model, options.context, kind, draw))
            print(kind, recoveries[-1], flush=True)
    print(f"\nload {load:.0f} to {os.getloadavg()[0]:.0f}\n")
    print("| backup | gap, s | tokens at the time | backed up | not computed anew |")
    print("|---|---|---|---|---|")
    for kind, recoveries in found.items():
        medians = (
            statistics.median(getattr(r, field) for r in recoveries)
            for field in ("tokens", "backed_up", "cached")
        )
        cells = (kind, spread([r.gap_s for r in recoveries]), *(f"{m:.0f}" for m in medians))
        print(f"| {' | '.join(cells)} |")
    costs = await tpots(model, options, draw)
    print("\n| per output token | off, ms | on, ms | on / off |")
    print("|---|---|---|---|")
    for name, off, on in (("TPOT", "off", "on"), ("processor, both", "cpu off", "cpu on")):
        ratios = [b / a for a, b in zip(costs[off], costs[on], strict=True)]
        print(f"| {name} | {spread(costs[off])} | {spread(costs[on])} | {spread(ratios)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cost-prompt", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(work(WorkerConfig.model_validate_json(arguments.worker)))
    else:
        asyncio.run(main(arguments))
