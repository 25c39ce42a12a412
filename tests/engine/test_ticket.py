"""What who holds a ticket sees, from any thread and from asyncio. No torch."""

import asyncio
import threading
import time

import pytest

from minigpt4_runtime import RequestError
from minigpt4_runtime.engine import ticket as ticket_module
from minigpt4_runtime.engine.request import TokenEvent
from minigpt4_runtime.engine.ticket import Inbox, Ticket

PATIENCE = 20  # Seconds until what waits counts as hanging.


def token(token_id, finish_reason=None):
    return TokenEvent(token_id, finish_reason)


def id_of(event):
    return event.token_id


def answer(*token_ids):
    """A whole answer, the last id with the reason why it ends."""
    *ids, last = token_ids
    return [*(token(each) for each in ids), token(last, "stop")]


@pytest.fixture
def inbox():
    return Inbox()


@pytest.fixture
def ticket(inbox):
    return Ticket(inbox, id_of)


def put(inbox, items):
    for item in items:
        inbox.put(item)


def put_from_another_thread(inbox, items):
    threading.Thread(target=put, args=(inbox, items)).start()


class Reader:
    """Another thread that reads a ticket to its end."""

    def __init__(self, ticket):
        self._pieces = None
        self._thread = threading.Thread(target=self._read, args=(ticket,), daemon=True)
        self._thread.start()

    def _read(self, ticket):
        self._pieces = list(ticket)

    def pieces(self):
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "it waits for ever"
        return self._pieces


def rest_of(ticket):
    return Reader(ticket).pieces()


async def pieces_of(ticket):
    return [piece async for piece in ticket]


def rest_by_asyncio(ticket):
    return asyncio.run(asyncio.wait_for(pieces_of(ticket), PATIENCE))


@pytest.fixture
def start_waiting(inbox, ticket, monkeypatch):
    """Starts a reader that waits already, and does not look up by itself."""
    monkeypatch.setattr(ticket_module, "_SECONDS_BETWEEN_SIGNALS", 2 * PATIENCE)

    def start():
        reader = Reader(ticket)
        while not inbox._alarms:
            time.sleep(0)
        return reader

    return start


def test_it_gives_what_reading_makes_of_the_events(inbox):
    put(inbox, answer(3, 4, 5))
    assert rest_of(Ticket(inbox, lambda event: f"<{event.token_id}>")) == ["<3>", "<4>", "<5>"]


def test_it_waits_for_what_has_not_come(inbox, start_waiting):
    reader = start_waiting()
    put(inbox, answer(3, 4, 5))
    assert reader.pieces() == [3, 4, 5]


def test_it_ends_with_the_last_token_and_stays_ended(inbox, ticket):
    put(inbox, [*answer(3), token(9)])
    assert rest_of(ticket) == [3]
    assert rest_of(ticket) == []
    assert ticket.poll(pytest.fail) is None
    assert not inbox.is_cancelled


@pytest.mark.parametrize("ids", [(0, 3, 0, 0, 4), (3, 4, 0)])
def test_what_reads_as_none_is_left_out(ids):
    def poll_often(ticket):
        return [piece for _ in ids if (piece := ticket.poll(lambda: None)) is not None]

    for read in (rest_of, poll_often, rest_by_asyncio):
        inbox = Inbox()
        put(inbox, answer(*ids))
        assert read(Ticket(inbox, lambda event: event.token_id or None)) == [3, 4]


def test_an_error_is_raised_where_it_is_read_and_ends_the_ticket(inbox, ticket):
    error = RequestError("no room")
    put(inbox, [token(3), error, token(4)])
    assert next(ticket) == 3
    with pytest.raises(RequestError) as seen:
        next(ticket)
    assert seen.value is error
    assert rest_of(ticket) == []


def test_an_error_of_reading_ends_the_ticket_and_cancels_the_request(inbox):
    ticket = Ticket(inbox, lambda event: 1 // event.token_id)
    put(inbox, [token(1), token(0), token(1)])
    assert next(ticket) == 1
    with pytest.raises(ZeroDivisionError):
        next(ticket)
    assert inbox.is_cancelled
    assert rest_of(ticket) == []


# --- poll ---------------------------------------------------------------------------------------


def test_polling_gives_what_has_come_without_an_alarm(inbox, ticket):
    put(inbox, [token(3), token(4)])
    assert [ticket.poll(pytest.fail), ticket.poll(pytest.fail)] == [3, 4]
    put(inbox, [token(5)])
    assert ticket.poll(pytest.fail) == 5


def test_an_alarm_rings_once_when_there_is_more(inbox, ticket):
    alarms = []
    assert ticket.poll(lambda: alarms.append("more")) is None
    assert alarms == []
    put(inbox, answer(3, 4))
    assert alarms == ["more"]
    assert [ticket.poll(pytest.fail) for _ in range(3)] == [3, 4, None]


def test_an_alarm_rings_for_an_error_too(inbox, ticket):
    alarms = []
    ticket.poll(lambda: alarms.append("more"))
    inbox.put(RequestError("no room"))
    assert alarms == ["more"]
    with pytest.raises(RequestError, match="no room"):
        ticket.poll(pytest.fail)
    assert ticket.poll(pytest.fail) is None


def test_an_alarm_may_read_the_ticket(inbox, ticket):
    seen = []
    ticket.poll(lambda: seen.append(ticket.poll(pytest.fail)))
    inbox.put(token(3))
    assert seen == [3]


def test_an_alarm_that_fails_is_the_reader_s_error_alone(inbox, ticket):
    def fail():
        raise OSError("the alarm is out of order")

    ticket.poll(fail)
    inbox.put(token(3))
    assert next(ticket) == 3
    with pytest.raises(OSError, match="out of order"):
        next(ticket)
    assert inbox.is_cancelled


# --- cancelling ---------------------------------------------------------------------------------


def test_who_cancels_gets_no_more(inbox, ticket):
    put(inbox, answer(3, 4, 5))
    assert next(ticket) == 3
    ticket.cancel()
    assert inbox.is_cancelled
    assert rest_of(ticket) == []
    assert ticket.poll(pytest.fail) is None


def test_cancelling_wakes_who_waits_in_another_thread(ticket, start_waiting):
    reader = start_waiting()
    ticket.cancel()
    assert reader.pieces() == []


def test_cancelling_rings_the_alarm(ticket):
    alarms = []
    ticket.poll(lambda: alarms.append("over"))
    ticket.cancel()
    assert alarms == ["over"]


def test_a_ticket_that_nobody_holds_is_cancelled(inbox):
    ticket = Ticket(inbox, id_of)
    assert not inbox.is_cancelled
    del ticket
    assert inbox.is_cancelled


def test_a_loop_that_is_left_cancels_the_request(inbox):
    inbox.put(token(3))
    for piece in Ticket(inbox, id_of):
        assert piece == 3
        break
    assert inbox.is_cancelled


# --- asyncio ------------------------------------------------------------------------------------


def test_asyncio_reads_what_has_come(inbox, ticket):
    put(inbox, answer(3, 4, 5))
    assert rest_by_asyncio(ticket) == [3, 4, 5]


def test_asyncio_waits_for_what_comes_from_another_thread(inbox, ticket):
    async def main():
        reading = asyncio.create_task(pieces_of(ticket))
        await asyncio.sleep(0)
        assert not reading.done()
        put_from_another_thread(inbox, answer(*range(100)))
        return await asyncio.wait_for(reading, PATIENCE)

    assert asyncio.run(main()) == list(range(100))


def test_waiting_for_one_ticket_does_not_stop_the_loop():
    async def main():
        inboxes = [Inbox() for _ in range(3)]
        reading = [asyncio.create_task(pieces_of(Ticket(each, id_of))) for each in inboxes]
        await asyncio.sleep(0)
        for number, inbox in reversed(list(enumerate(inboxes))):
            put(inbox, answer(number))
            assert await asyncio.wait_for(reading[number], PATIENCE) == [number]

    asyncio.run(main())


def test_asyncio_raises_the_error_of_the_request(inbox, ticket):
    put(inbox, [token(3), RequestError("no room")])

    async def main():
        assert await anext(ticket) == 3
        with pytest.raises(RequestError, match="no room"):
            await anext(ticket)
        return await pieces_of(ticket)

    assert asyncio.run(main()) == []


def test_a_task_that_is_cancelled_cancels_the_ticket(inbox, ticket):
    async def main():
        reading = asyncio.create_task(pieces_of(ticket))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(main())
    assert inbox.is_cancelled
    assert rest_of(ticket) == []


def test_cancelling_ends_the_task_that_waits(ticket):
    async def main():
        reading = asyncio.create_task(pieces_of(ticket))
        await asyncio.sleep(0)
        ticket.cancel()
        return await asyncio.wait_for(reading, PATIENCE)

    assert asyncio.run(main()) == []


def test_what_comes_after_the_loop_was_closed_can_still_be_read(inbox, ticket):
    loop = asyncio.new_event_loop()
    reading = loop.create_task(pieces_of(ticket))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    reading._log_destroy_pending = False  # It is left behind on purpose.
    put(inbox, answer(3, 4))
    assert rest_of(ticket) == [3, 4]
