"""What one tenant may use: requests at once, and tokens per minute."""

from dataclasses import dataclass

from baton.core.clock import Clock
from baton.core.tenants import Tenant

_MINUTE_S = 60.0


class TokenBucket:
    """Lets through so many tokens per minute; it holds what one minute brings.

    A request takes its tokens when it comes, its output as far as can be guessed. What was guessed
    wrong is put right when it ends, which may leave a debt that the next one has to wait for. What
    is larger than the bucket has to find it full.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._clock = clock
        self._per_minute = float(per_minute)
        self._level = self._per_minute
        self._at = clock()

    def __repr__(self) -> str:
        return f"TokenBucket({self._level:.0f} of {self._per_minute:.0f})"

    def seconds_until(self, tokens: int) -> float:
        """Return when so many tokens can be taken, in seconds from now; 0: at once."""
        self._fill()
        lacking = min(float(tokens), self._per_minute) - self._level
        return max(0.0, lacking * _MINUTE_S / self._per_minute)

    def take(self, tokens: int) -> None:
        """Take tokens out, or put them back if negative."""
        self._fill()
        self._level = min(self._per_minute, self._level - tokens)

    def resize(self, per_minute: int) -> None:
        """Change the rate; a debt stays a debt, and savings are no more than the new one allows."""
        self._fill()
        self._per_minute = float(per_minute)
        self._level = min(self._level, self._per_minute)

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._at) * self._per_minute / _MINUTE_S
        self._level = min(self._per_minute, self._level + gained)
        self._at = now

    @property
    def is_full(self) -> bool:
        """Whether it is as a new one would be."""
        self._fill()
        return self._level >= self._per_minute


@dataclass(slots=True)
class _Use:
    """What one tenant uses now."""

    tenant: Tenant
    bucket: TokenBucket | None
    started: int = 0
    """Requests that are at instances."""
    known: int = 0
    """… or wait to be."""


class TenantLimits:
    """Keeps the books of all tenants; there is a row of each that has used anything lately."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def __len__(self) -> int:
        return len(self._uses)

    def __repr__(self) -> str:
        return f"TenantLimits({len(self)} tenants)"

    def seconds_until(self, tenant: Tenant, tokens: int) -> float:
        """Return in how many seconds its rate allows a request of so many tokens; 0: now."""
        bucket = self._use(tenant).bucket
        return 0.0 if bucket is None else bucket.seconds_until(tokens)

    def came(self, tenant: Tenant, tokens: int) -> None:
        """A request was let in, to wait at least."""
        use = self._use(tenant)
        use.known += 1
        if use.bucket is not None:
            use.bucket.take(tokens)

    def may_start(self, name: str) -> bool:
        """Return whether a tenant with a request here may have one more at instances."""
        use = self._uses[name]
        most = use.tenant.max_concurrent
        return most is None or use.started < most

    def started(self, name: str) -> None:
        """One of its requests goes to an instance."""
        self._uses[name].started += 1

    def left(self, name: str, *, started: bool, back: int) -> None:
        """One of its requests is over; `back` tokens were taken too many, if negative too few."""
        use = self._uses[name]
        use.known -= 1
        use.started -= started
        assert use.known >= use.started >= 0, use
        if use.bucket is not None:
            use.bucket.take(-back)
        if not use.known and (use.bucket is None or use.bucket.is_full):
            del self._uses[name]

    def _use(self, tenant: Tenant) -> _Use:
        use = self._uses.get(tenant.name)
        rate = tenant.tokens_per_minute
        if use is None:
            bucket = None if rate is None else TokenBucket(rate, self._clock)
            use = self._uses[tenant.name] = _Use(tenant, bucket)
        elif use.tenant != tenant:  # its limits have changed
            use.tenant = tenant
            if rate is None:
                use.bucket = None
            elif use.bucket is None:
                use.bucket = TokenBucket(rate, self._clock)
            else:
                use.bucket.resize(rate)
        return use

    def check(self, known: dict[str, int], started: dict[str, int]) -> None:
        """Assert that these are the requests that each tenant has, and has at instances."""
        for name, use in self._uses.items():
            assert use.known == known.get(name, 0), (name, use, known)
            assert use.started == started.get(name, 0), (name, use, started)
        assert set(known) <= set(self._uses), known
