"""What requests are called, so that any gateway knows which one has a request.

cmpl-9f0c…41              a call of a gateway that is alone
cmpl-gateway-1.7-9f0c…41  a call of the gateway `gateway-1.7`
cmpl-gateway-1.7-9f0c…41-2   its third choice, if it has several
"""

import re
import secrets

_RANDOM_BYTES = 12
_ID = re.compile(
    rf"[a-z]+-(?:(?P<gateway>[a-z0-9.-]{{1,63}})-)?[0-9a-f]{{{2 * _RANDOM_BYTES}}}"
    r"(?P<choice>-[0-9]{1,3})?"
)


def new_call_id(prefix: str, gateway: str = "") -> str:
    """Return a name for a call that `gateway` has; "": the only gateway there is."""
    own = f"{gateway}-" if gateway else ""
    return f"{prefix}-{own}{secrets.token_hex(_RANDOM_BYTES)}"


def gateway_of(request_id: str) -> str:
    """Return the name of the gateway that has a request; "" if its id does not tell."""
    found = _ID.fullmatch(request_id)
    return "" if found is None else found["gateway"] or ""


def is_named(own: str, asked: str) -> bool:
    """Return whether `asked` is a request's own id, or that of the call that it is a choice of."""
    if asked == own:
        return True
    found = _ID.fullmatch(own)
    return found is not None and bool(found["choice"]) and asked == own[: found.start("choice")]
