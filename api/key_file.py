"""The file of tenants and API keys, in which no key stands: only hashes of them.

    tenants:
      acme: {weight: 2, max_concurrent: 8}      # limits: core/tenants.py
    keys:
      - {id: 3f9a61c2b0de, tenant: acme, hash: "sha256:…"}
      - {id: 77e0c1d2a4b5, tenant: acme, hash: "sha256:…", admin: true}

YAML, or JSON if its name ends so (which is read much faster: worth it from some thousand keys on).

A key is `bt_<id>_<256 random bits>`, and its hash the SHA-256 of all of it. A slow hash, or a
secret one, is for passwords, which can be guessed; to guess 256 bits takes 2^255 tries, whatever
one of them costs. The id, another for each key, is its salt, and what logs may show of it.
"""

import hashlib
import json
import re
import secrets
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from baton.core.config import Config
from baton.core.errors import InvalidConfig
from baton.core.tenants import TENANT_NAME, Tenant
from baton.core.yaml_text import compose, line_of, values_of

MAX_BYTES = 16 << 20
"""Of a file."""
_HIDDEN = "(not shown)"
"""Stands for values in errors: one that is wrong may be a key, by mistake."""


class KeyEntry(Config):
    """One key, as far as it is written down."""

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    """The part of the key that is no secret."""
    tenant: str
    """Whose it is; one of the file's tenants."""
    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    """Of the whole key."""
    admin: bool = False
    """Opens /metrics, and the traces of all tenants."""


class KeyFile(Config):
    """What a file of keys says."""

    tenants: dict[str, Tenant] = Field(default_factory=dict)
    """By name."""
    keys: tuple[KeyEntry, ...] = ()
    """A tenant may have several, such as an old and a new one."""

    @field_validator("tenants", mode="before")
    @classmethod
    def _name(cls, values: Any) -> Any:
        """Give each tenant its name; None, which is what YAML makes of nothing, is {}."""
        if not isinstance(values, dict):
            return values
        for name in values:
            if not re.fullmatch(TENANT_NAME, name):
                allowed = "a to z, 0 to 9, dots, dashes and underscores, at most 63"
                raise InvalidConfig("tenants", name, allowed)
        return {name: _named(name, tenant) for name, tenant in values.items()}

    @field_validator("keys", mode="after")
    @classmethod
    def _once(cls, keys: tuple[KeyEntry, ...]) -> tuple[KeyEntry, ...]:
        seen: set[str] = set()
        for index, key in enumerate(keys):
            if key.id in seen:
                raise InvalidConfig(f"keys.{index}.id", key.id, "an id that no other key has")
            seen.add(key.id)
        return keys


def _named(name: str, tenant: Any) -> Any:
    if tenant is None:
        tenant = {}
    return {**tenant, "name": name} if isinstance(tenant, dict) else tenant


def parse(path: Path, raw: bytes) -> KeyFile:
    """Return what a file says; `path` is for its kind and for errors.

    Raises InvalidConfig for the first mistake, with file, field and what is allowed, and the line
    if it is YAML. What it says of a key's value is nothing.
    """
    if len(raw) > MAX_BYTES:
        raise InvalidConfig(str(path), f"{len(raw)} bytes", f"at most {MAX_BYTES}")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise InvalidConfig(str(path), _HIDDEN, "text in UTF-8") from None
    if path.suffix == ".json":
        root, values = None, _json(path, text)
    else:
        root = compose(path, text)
        values = values_of(root)
    try:
        file = KeyFile.checked(**values)
        _check_tenants(file)
    except InvalidConfig as error:
        shown = error.value if error.field.startswith("tenants") else _HIDDEN
        where = f"{path}: " if root is None else f"{path}:{line_of(root, error.field.split('.'))}: "
        raise InvalidConfig(f"{where}{error.field}", shown, error.allowed) from None
    return file


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(str(path), _HIDDEN, f"valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise InvalidConfig(str(path), _HIDDEN, "a JSON object")
    return values


def _check_tenants(file: KeyFile) -> None:
    for index, key in enumerate(file.keys):
        if key.tenant not in file.tenants:
            # Limits that are not there by a misspelt name would be no limits.
            known = ", ".join(sorted(file.tenants)[:8]) or "none yet"
            allowed = f"one of the file's tenants: {known}"
            raise InvalidConfig(f"keys.{index}.tenant", key.tenant, allowed)


def new_key(tenant: str, *, admin: bool = False) -> tuple[str, KeyEntry]:
    """Return a fresh key, and what is to be written down of it; InvalidConfig for a bad name."""
    if not re.fullmatch(TENANT_NAME, tenant):
        raise InvalidConfig("tenant", tenant, "a to z, 0 to 9, dots, dashes and underscores")
    key_id = secrets.token_hex(6)
    key = f"bt_{key_id}_{secrets.token_urlsafe(32)}"
    return key, KeyEntry(id=key_id, tenant=tenant, hash=hash_of(key), admin=admin)


def hash_of(key: str) -> str:
    """Return what a file has of a key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def id_of(key: str) -> str:
    """Return the id in a key, or in what may be none: then perhaps not an id of any key."""
    return key.removeprefix("bt_").partition("_")[0]
