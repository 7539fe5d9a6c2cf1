"""Ctrl-C at some moments: every finished picture is kept, nothing is left over or broken."""

import signal
from collections.abc import Iterator

import pytest

from tests.interrupts import COMMANDS, interrupt
from tests.support.server import Server, is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="commands cannot be forked here")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.mark.parametrize("moment", [0.1, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_finished_is_kept_and_nothing_else(name, moment, server):
    ended = interrupt(server, name, moment)
    assert ended.exit_code in (-signal.SIGINT, 0), ended
    assert ended.kept >= ended.told and not ended.broken and not ended.left_over, ended
    if name == "quantize":
        said = "nothing was written to" in ended.said
        assert not (said and ended.kept), ended
    elif ended.exit_code and moment > 0.1:
        assert f"{ended.kept} of 4 pictures are written" in ended.said, ended
