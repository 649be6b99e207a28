import pytest

from baton.api.request_names import gateway_of, is_named, new_call_id


@pytest.mark.parametrize("gateway", ["", "gateway-0.3", "a"])
def test_an_id_tells_its_gateway_and_its_choices_are_of_its_call(gateway):
    call = new_call_id("cmpl", gateway)
    assert gateway_of(call) == gateway
    assert gateway_of(f"{call}-127") == gateway
    assert is_named(call, call)
    assert is_named(f"{call}-12", f"{call}-12")
    assert is_named(f"{call}-12", call)
    assert not is_named(call, f"{call}-12")
    assert not is_named(f"{call}-1", f"{call}-12")
    assert not is_named(call, call.rpartition("-")[0])
    assert new_call_id("cmpl", gateway) != call


@pytest.mark.parametrize("text", ["", "gen-x", "mine", "x" * 10_000, "gen-G-" + "0" * 24])
def test_what_is_no_id_of_ours_is_nobodys_and_names_itself_alone(text):
    assert gateway_of(text) == ""
    assert is_named(text, text)
    assert not is_named(f"{text}-1", text)
