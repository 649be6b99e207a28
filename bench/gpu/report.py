"""The tables that a run ends with: what was measured, as fractions of what the machine can do."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu import floors, targets
from bench.gpu.floors import Ceilings, ModelShape, Work
from bench.gpu.records import Record, cases, figures
from bench.gpu.scale import SCALES

_NONE = "\N{EN DASH}"


def report(records: Iterable[Record]) -> str:
    """Return all tables that the records have figures for, and what went wrong."""
    records = list(records)
    machine = next((r for r in records if r["stage"] == "machine"), None)
    if machine is None:
        return "nothing was measured yet"
    parts = [_machine(machine), _ceilings(records)]
    ceilings = ceilings_of(records)
    shape = SCALES[machine["scale"]].shape
    if ceilings is not None:
        parts += [
            _decode(records, ceilings, shape),
            _prefill(records, ceilings, shape),
            _kernels(records, ceilings),
        ]
    parts += [_correctness(records), _handover(records), _peers(records), _troubles(records)]
    return "\n\n".join(part for part in parts if part)


def ceilings_of(records: Iterable[Record]) -> Ceilings | None:
    """Return the measured ceilings, the best product's among them; None if one is missing."""
    found = figures(records, "ceilings")
    products = [f["flops_s"] for name, f in found.items() if name.startswith("product")]
    if "read" not in found or not products:
        return None
    return Ceilings(found["read"]["bytes_s"], max(products))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, or nothing where there are no rows."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(machine: Record) -> str:
    scale = machine["scale"]
    warning = "" if scale == "full" else f"; {scale}: these are not the figures of an 8B model"
    return (
        f"{machine['device']}, torch {machine['torch']} (CUDA {machine['cuda']}), Python "
        f"{machine['python']}, commit {machine['commit']}{warning}"
    )


def _ceilings(records: list[Record]) -> str:
    rows = []
    for name, found in figures(records, "ceilings").items():
        if "bytes_s" in found:
            rows.append((name, f"{found['bytes_s'] / 1e9:,.0f} GB/s"))
        elif "flops_s" in found:
            rows.append((name, f"{found['flops_s'] / 1e12:,.1f} TFLOP/s"))
        else:
            rows.append((name, f"{found['node_s'] * 1e6:.2f} µs"))
    return markdown(("ceiling", "measured"), rows)


def _decode(records: list[Record], ceilings: Ceilings, shape: ModelShape) -> str:
    """Steps through the executor; `overhead` is the share of a step in which the GPU waits."""
    rows = []
    for found in figures(records, "decode").values():
        batch, context = found["batch"], found["context"]
        floor = floors.decode_step(shape, batch, context).seconds(ceilings)
        fraction, target = floor / found["step_s"], targets.DECODE.get((batch, context))
        row = [str(batch), str(context), _ms(floor), _ms(found["step_s"]), f"{fraction:.2f}"]
        row += [_target(target), targets.verdict(fraction, target) if target else _NONE]
        overhead = found.get("overhead")
        row.append(_NONE if overhead is None else _overhead(overhead))
        rows.append([*row, f"{batch / found['step_s']:,.0f}"])
    head = ("batch", "context", "floor ms", "step ms", "fraction", "targets", "reached")
    return markdown((*head, "overhead", "tokens/s"), rows)


def _prefill(records: list[Record], ceilings: Ceilings, shape: ModelShape) -> str:
    rows = []
    for found in figures(records, "prefill").values():
        tokens = found["tokens"]
        floor = floors.prefill(shape, tokens).seconds(ceilings)
        fraction = floor / found["prompt_s"]
        named = f"{tokens} by pieces" if found.get("pieces") else str(tokens)
        row = [named, _ms(floor), _ms(found["prompt_s"]), f"{fraction:.2f}"]
        row += [_target(targets.PREFILL), targets.verdict(fraction, targets.PREFILL)]
        rows.append([*row, f"{tokens / found['prompt_s']:,.0f}"])
    head = ("prompt", "floor ms", "measured ms", "fraction (MFU)", "targets", "reached")
    return markdown((*head, "tokens/s"), rows)


def _kernels(records: list[Record], ceilings: Ceilings) -> str:
    """Fractions of bytes or operations; what is bound by a launch has none worth reading."""
    rows = []
    for name, found in figures(records, "kernels").items():
        floor = Work(found["bytes"], found["flops"]).seconds(ceilings)
        spread = (found["high_s"] - found["low_s"]) / found["median_s"]
        fraction = floor / found["median_s"]
        aim = _attention_target(name)
        reached = targets.verdict(fraction, aim) if aim else _NONE
        row = [name, f"{floor * 1e6:,.1f}", f"{found['median_s'] * 1e6:,.1f}", f"{spread:.0%}"]
        rows.append([*row, f"{fraction:.2f}", _target(aim), reached])
    head = ("kernel", "floor µs", "measured µs", "spread", "fraction", "targets", "reached")
    return markdown(head, rows)


def _attention_target(name: str) -> targets.Target | None:
    for (batch, context), target in targets.ATTENTION.items():
        if name == f"decode_attention bf16 batch {batch} at {context}":
            return target
    return None


def _correctness(records: list[Record]) -> str:
    """Errors are against transformers in float32 on the same weights, relative to the norm."""
    rows = [
        (
            name,
            str(found["layers"]),
            f"{found['error']:.2e}",
            f"{found['peer_error']:.2e}",
            f"{found['error'] / found['peer_error']:.2f}" if found["peer_error"] else _NONE,
            f"{found['same_best']:.1%}",
        )
        for name, found in figures(records, "correctness").items()
    ]
    head = ("logits", "layers", "error", "transformers' own", "ratio", "same best token")
    return markdown(head, rows)


def _handover(records: list[Record]) -> str:
    rows = []
    for name, found in figures(records, "handover").items():
        same = "yes" if found["identical"] else "NO"
        rows.append((name, f"{found['bytes'] / 1e9:.2f}", f"{found['bytes_s'] / 1e9:.1f}", same))
    return markdown(("handover", "GB", "GB/s", "tokens identical"), rows)


def _peers(records: list[Record]) -> str:
    ours = {
        (found["batch"], found["context"]): found["batch"] / found["step_s"]
        for found in figures(records, "decode").values()
    }
    rows = []
    for name, found in figures(records, "transformers").items():
        own = ours.get((found["batch"], found["context"]))
        ratio = f"{own / found['tokens_s']:.2f}" if own else _NONE
        beside = f"{own:,.0f}" if own else _NONE
        rows.append((name, f"{found['tokens_s']:,.0f}", beside, ratio))
    return markdown(("transformers", "tokens/s", "Baton's steps", "ratio"), rows)


def _troubles(records: list[Record]) -> str:
    """List what was skipped, failed or had no time, in the file's order."""
    lines = []
    for stage in dict.fromkeys(r["stage"] for r in records):
        for name, record in cases(records, stage).items():
            if "error" in record:
                lines.append(f"- {stage}, {name}: {record['error']}")
        ends = [r["ended"] for r in records if r["stage"] == stage and "ended" in r]
        if ends and ends[-1] != "complete":
            lines.append(f"- {stage}: {ends[-1]}")
    return "Not measured:\n" + "\n".join(lines) if lines else ""


def _overhead(share: float) -> str:
    return f"{share:.1%} ({targets.overhead_verdict(share)})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _target(target: targets.Target | None) -> str:
    wanted: list[Any] = [] if target is None else [t for t in target if t is not None]
    return " / ".join(f"{t:.2f}" for t in wanted) or _NONE
