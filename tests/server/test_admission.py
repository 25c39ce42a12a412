"""Who is let in during a drain."""

import asyncio

import pytest

from minigpt4_runtime.server.admission import Admission
from minigpt4_runtime.server.failures import Failure


def test_a_drain_refuses_new_requests_and_lets_those_in_progress_grow():
    admission = Admission(limit=4)
    with admission.enter() as arrived, admission.enter() as without_body:
        arrived.grow(1)
        admission.close()
        arrived.grow(1)  # As one does whose body is read while the drain begins.
        arrived.grow(3)
        assert admission.num_taken == 3
        for refused in (lambda: without_body.grow(1), lambda: admission.enter().__enter__()):
            with pytest.raises(Failure) as caught:
                refused()
            assert caught.value.code == "shutting_down"
        with pytest.raises(Failure, match="no room"):
            arrived.grow(5)
        assert not asyncio.run(admission.drain(grace_seconds=0))
    assert asyncio.run(admission.drain(grace_seconds=0))
