import json
import os
from pathlib import Path

import pytest

from baton.api.identity import Identity, require_admin
from baton.api.key_file import KeyEntry, new_key
from baton.core.errors import Forbidden, InvalidConfig, Unauthenticated
from baton.core.tenants import ANONYMOUS, ANYBODY


def write(path: Path, *entries: KeyEntry) -> None:
    tenants = {entry.tenant: {} for entry in entries}
    keys = [entry.model_dump() for entry in entries]
    path.write_text(json.dumps({"tenants": tenants, "keys": keys}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_without_a_file_everybody_is_anonymous():
    identity = Identity(None)
    assert not identity.asks
    assert identity.caller(None) is ANYBODY
    assert identity.caller("Bearer whatever a client must send") is ANYBODY
    assert not identity.refresh()


def test_a_key_tells_its_tenant(path):
    (one, first), (two, second) = new_key("acme"), new_key("other", admin=True)
    write(path, first, second)
    identity = Identity(path)
    caller = identity.caller(f"Bearer {one}")
    assert (caller.tenant.name, caller.key_id, caller.admin) == ("acme", first.id, False)
    assert identity.caller(f"bearer  {two} ").tenant.name == "other"
    require_admin(identity.caller(f"Bearer {two}"), "/metrics")
    with pytest.raises(Forbidden, match="/metrics"):
        require_admin(caller, "/metrics")


def test_what_is_no_key_is_refused_without_being_repeated(path):
    key, entry = new_key("acme")
    write(path, entry)
    identity = Identity(path)
    forged = f"bt_{entry.id}_{new_key('acme')[0].split('_', 2)[2]}"
    stranger, _ = new_key("acme")
    wrong = [forged, stranger, key[:-1], key + "x", key.upper(), "", "x", "bt_", "é" * 9, key * 999]
    for value in [f"Bearer {key}" for key in wrong] + [f"Basic {key}", key, "Bearer", "\udcff"]:
        with pytest.raises(Unauthenticated) as refused:
            identity.caller(value)
        assert all(key not in str(refused.value) for key in (key, forged, stranger))
    for nothing in (None, ""):
        with pytest.raises(Unauthenticated, match="no API key was sent"):
            identity.caller(nothing)


def test_a_changed_file_counts_and_a_bad_one_does_not(path):
    (old, first), (new, second) = new_key("acme"), new_key("acme")
    refusals: list[int] = []
    write(path, first)
    identity = Identity(path, lambda: refusals.append(1))
    assert not identity.refresh()
    tenants = {"acme": {"weight": 3}}
    path.write_text(json.dumps({"tenants": tenants, "keys": [second.model_dump()]}))
    assert identity.refresh()
    assert identity.tenant("acme").weight == 3
    assert identity.tenant("none") is ANONYMOUS
    assert identity.caller(f"Bearer {new}").key_id == second.id
    with pytest.raises(Unauthenticated):
        identity.caller(f"Bearer {old}")
    for bad in ("keys: [", "keys: 3"):
        path.write_text(bad)
        assert not identity.refresh()
        assert not identity.refresh(), "it is told once"
    path.unlink()
    assert not identity.refresh()
    assert len(refusals) == 3
    assert identity.caller(f"Bearer {new}")
    write(path, first)
    assert identity.refresh()
    assert identity.caller(f"Bearer {old}")


def test_a_link_that_is_turned_to_another_folder(tmp_path):
    """As Kubernetes exchanges a secret: keys.yaml -> ..data/keys.yaml, ..data -> ..2026_11_21."""
    (old, first), (new, second) = new_key("acme"), new_key("acme")
    for name, entry in (("one", first), ("two", second)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys.yaml", entry)
        os.utime(tmp_path / name / "keys.yaml", ns=(0, 0))  # the time stamp tells nothing
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    identity = Identity(tmp_path / "keys.yaml")
    assert identity.caller(f"Bearer {old}")
    (tmp_path / "..new").symlink_to("two")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert identity.refresh()
    assert identity.caller(f"Bearer {new}")


def test_a_file_that_is_bad_at_first_is_refused(path):
    with pytest.raises(InvalidConfig, match="api_keys"):
        Identity(path)
    path.write_text("keys: 3")
    with pytest.raises(InvalidConfig, match="keys"):
        Identity(path)
