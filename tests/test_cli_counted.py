"""Numbers of things are said as people say them."""

import pytest
from relora_opt_cli.counted import counted


@pytest.mark.parametrize(
    ("number", "thing", "words"),
    [
        (0, "token", "0 tokens"),
        (1, "update", "1 update"),
        (2000, "document", "2,000 documents"),
    ],
)
def test_one_thing_is_said_as_one(number: int, thing: str, words: str) -> None:
    assert counted(number, thing) == words
