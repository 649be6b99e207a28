"""What every engine is given: the same token ids and output lengths, from a fixed seed."""

import random
from dataclasses import asdict, dataclass

MIX_REQUESTS, MIX_INPUT, MIX_OUTPUT = 32, 9196, 2710


@dataclass(frozen=True, slots=True)
class Case:
    """Requests that are submitted all at once."""

    name: str
    kind: str
    """decode, prefill or mix: which figure counts."""
    prompts: list[list[int]]
    outputs: list[int]
    repeat: int = 1
    """Runs in each round."""

    def fields(self) -> dict[str, object]:
        """Return what an adapter needs to know of it."""
        return {name: asdict(self)[name] for name in ("prompts", "outputs", "repeat")}


@dataclass(frozen=True, slots=True)
class Size:
    """How much work a model's size allows in the time there is."""

    decodes: dict[int, tuple[int, int]]
    """Batch size to (tokens of context, new tokens)."""
    prefills: dict[int, int]
    """Length of the prompt to runs per round."""
    mix_requests: int
    """Of the ragged mix; 0 leaves it out."""


def cases(size: Size, vocabulary: int, seed: int = 1) -> list[Case]:
    """Return the cases of one model; no two prompts share a prefix that a cache could find."""
    rng = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(1, vocabulary) for _ in range(length)]

    found = []
    for batch, (context, new) in size.decodes.items():
        prompts = [prompt(context) for _ in range(batch)]
        found.append(Case(f"decode {batch}", "decode", prompts, [new] * batch))
    for length, repeat in size.prefills.items():
        found.append(Case(f"prefill {length}", "prefill", [prompt(length)], [1], repeat))
    if size.mix_requests:
        lengths = mix(size.mix_requests)
        prompts = [prompt(given) for given, _ in lengths]
        name = f"mix of {len(lengths)}"
        found.append(Case(name, "mix", prompts, [wanted for _, wanted in lengths]))
    return found


def mix(requests: int = MIX_REQUESTS) -> list[tuple[int, int]]:
    """Return (prompt, output) lengths: log-normal, 9,196 tokens in and 2,710 out for 32 requests.

    Fewer requests have that mean.
    """
    rng = random.Random(7)
    given = [rng.lognormvariate(0.0, 0.8) for _ in range(requests)]
    wanted = [rng.lognormvariate(0.0, 0.6) for _ in range(requests)]
    share = requests / MIX_REQUESTS
    inputs = scaled(given, round(MIX_INPUT * share))
    return list(zip(inputs, scaled(wanted, round(MIX_OUTPUT * share)), strict=True))


def scaled(weights: list[float], total: int) -> list[int]:
    """Return whole numbers of at least 1 in proportion to `weights` that add up to `total`."""
    factor = total / sum(weights)
    found = [max(1, int(weight * factor)) for weight in weights]
    found[found.index(max(found))] += total - sum(found)
    return found
