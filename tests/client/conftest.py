"""The front door of tests/api, for the client to talk to."""

from tests.api.conftest import (  # noqa: F401 - fixtures
    board,
    front_door,
    gateway,
    leader,
    make_front_door,
    make_gateway,
    make_leader,
    served_model,
    text_script,
    tokenizer,
    until,
)
