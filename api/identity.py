"""Who is calling: API keys to tenants, at the edge of both APIs."""

import hmac
from collections.abc import Callable
from pathlib import Path

from baton.api.key_file import KeyEntry, KeyFile, hash_of, id_of, new_key, parse
from baton.core.errors import Forbidden, InvalidConfig, Unauthenticated
from baton.core.log import get_logger
from baton.core.tenants import ANONYMOUS, ANYBODY, Caller, Tenant

_log = get_logger("identity")
_DECOY = new_key("nobody")[1]
"""What an unknown key is compared with, so that it takes as long as a wrong one."""
_HOW = "Authorization: Bearer and an API key"


def _nothing() -> None:
    """Tell nobody."""


class Identity:
    """Tells callers by their keys; with no file of keys, everybody is the anonymous tenant.

    One event loop only, but for `refresh`, which is for a thread: it reads a file.
    """

    def __init__(self, path: Path | None, on_refused: Callable[[], None] = _nothing) -> None:
        """`path` is the file of keys; raises InvalidConfig if it is not as it should be.

        `on_refused` is called when it has changed for one that is not, and those of before hold.
        """
        self._path = path
        self._on_refused = on_refused
        self._raw = b""
        self._keys: dict[str, tuple[KeyEntry, Caller]] = {}
        self._tenants: dict[str, Tenant] = {}
        self._bad = b""
        """What the file held when it was last found bad."""
        self._complaint = ""
        if path is not None:
            self._raw = _read(path)
            self._take(parse(path, self._raw))

    def __repr__(self) -> str:
        return f"Identity({self._path}, {len(self._keys)} keys)"

    @property
    def asks(self) -> bool:
        """Whether callers need a key."""
        return self._path is not None

    def caller(self, authorization: str | None) -> Caller:
        """Return who brings this Authorization header; Unauthenticated if nobody that we know."""
        if self._path is None:
            return ANYBODY
        if not authorization:
            raise Unauthenticated(f"no API key was sent; send {_HOW}")
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(f"the Authorization header is of another kind; send {_HOW}")
        key = key.strip()
        entry, caller = self._keys.get(id_of(key), (_DECOY, None))
        # How long this takes tells nothing of the hash, and the id is no secret.
        good = hmac.compare_digest(hash_of(key), entry.hash)
        if not good or caller is None:
            raise Unauthenticated("the API key is not known here, or is known no more")
        return caller

    def tenant(self, name: str) -> Tenant:
        """Return the tenant of that name with the limits that hold now, or the anonymous one.

        One that is no longer in the file may still have requests open.
        """
        return self._tenants.get(name, ANONYMOUS)

    def refresh(self) -> bool:
        """Read the file again; return whether it holds something new and good.

        What is bad changes nothing but the log. All of it is compared, since a time stamp may stay
        the same when a link is turned to another file, as Kubernetes does with secrets.
        """
        if self._path is None:
            return False
        try:
            raw = _read(self._path)
            if raw in (self._raw, self._bad):
                return False
            self._bad = raw  # unless it turns out to be good
            file = parse(self._path, raw)
        except InvalidConfig as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                self._on_refused()
                _log.error("bad API keys; those of before hold", reason=str(error))
            return False
        self._raw, self._bad, self._complaint = raw, b"", ""
        self._take(file)
        _log.info("new API keys", keys=len(file.keys))
        return True

    def _take(self, file: KeyFile) -> None:
        self._tenants = file.tenants
        self._keys = {
            entry.id: (entry, Caller(file.tenants[entry.tenant], entry.id, entry.admin))
            for entry in file.keys
        }


def require_admin(caller: Caller, what: str) -> None:
    """Raise Forbidden unless the caller is an admin."""
    if not caller.admin:
        raise Forbidden(f"{what} needs the API key of an admin")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        allowed = f"a file that can be read ({error.strerror})"
        raise InvalidConfig("api_keys", str(path), allowed) from None
