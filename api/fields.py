"""Read fields from untrusted JSON: each is of the right type and in range, or is named."""

from collections.abc import Mapping

from baton.core.errors import InvalidRequest


class Fields:
    """The fields of one JSON object. null is the same as absent, as clients send it for that."""

    def __init__(self, body: object, *, where: str = "") -> None:
        """`where` names the object in errors, such as `stream_options`."""
        if not isinstance(body, dict):
            raise InvalidRequest(where or "body", body, "a JSON object")
        self._left = {name: value for name, value in body.items() if value is not None}
        self._prefix = f"{where}." if where else ""

    def take(self, name: str) -> object:
        """Return a field as it is, or None."""
        return self._left.pop(name, None)

    def integer(self, name: str, default: int | None, *, low: int, high: int) -> int | None:
        """Return a whole number from `low` to `high`."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        number = whole(value)
        if number is None or not low <= number <= high:
            raise self._refuse(name, value, f"a whole number from {low} to {high}")
        return number

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """Return a number from `low` to `high`."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not low <= value <= high
        ):
            raise self._refuse(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._refuse(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        """Return a string that is valid Unicode."""
        value = self._left.pop(name, None)
        return None if value is None else check_text(self._prefix + name, value)

    def only(self, defaults: Mapping[str, tuple[object, ...]]) -> None:
        """Let these fields be there only with a value that changes nothing."""
        for name, allowed in defaults.items():
            value = self._left.pop(name, None)
            if value is not None and not any(
                value == default and type(value) is type(default) for default in allowed
            ):
                values = " or ".join(repr(default) for default in allowed) or "leave it out"
                raise self._refuse(name, value, f"{values} (not supported)")

    def rest(self) -> dict[str, object]:
        """Return the fields that nobody has taken, and take them."""
        rest, self._left = self._left, {}
        return rest

    def done(self) -> None:
        """Refuse whatever was not asked for: a field that changes nothing would be a trap."""
        for name, value in self._left.items():
            raise self._refuse(name, value, "no such field")

    def _refuse(self, name: str, value: object, allowed: str) -> InvalidRequest:
        return InvalidRequest(f"{self._prefix}{name}"[:80], value, allowed)


def whole(value: object) -> int | None:
    """Return `value` if it is a whole number; 5.0 is one in JSON, and some clients write so."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def check_text(field: str, value: object) -> str:
    """Return `value` if it is a string that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise InvalidRequest(field, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(field, value, "Unicode text without lone surrogates") from None
    return value
