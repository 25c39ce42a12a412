"""Which tokens run when, against a runner that remembers what each cache slot holds. No torch."""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from fake_runner import END, PLACEHOLDER, FakeRunner, SumWatch, answer_without_cache, choose
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_runtime.config import EngineConfig, SamplingParams
from minigpt4_runtime.engine.request import Beside, ImageInput, NoWatch, Request
from minigpt4_runtime.engine.room import Room
from minigpt4_runtime.engine.scheduler import Scheduler
from minigpt4_runtime.engine.sequence import Sequence
from minigpt4_runtime.text.tokenizer import EncodedPrompt, ImageSpan
from minigpt4_runtime.text.window import Window

ROWS = 3  # Of every picture.
MANY_BLOCKS = 1000
ENOUGH_STEPS = 2000
SCORED_AT_ONCE = 3


class Stepper:
    """Steps as the engine does, without thread and torch, and checks every step."""

    def __init__(self, *, num_blocks=MANY_BLOCKS, **config):
        self.config = EngineConfig(**config)
        self.num_blocks = num_blocks
        self.scheduler = Scheduler(self.config, num_blocks=num_blocks, eos_id=END)
        self.plans = []
        self.answers = {}  # Sequence → its ids so far.
        self.finish_reasons = {}
        self._runner = FakeRunner(self.config.block_size)

    def add(self, request):
        sequence = Sequence(
            len(self.answers), request, seed=0, max_new_tokens=most_new_tokens(request),
            scored_at_once=min(SCORED_AT_ONCE, self.config.max_running),
        )  # fmt: skip
        self.scheduler.add(sequence)
        self.answers[sequence] = []
        return sequence

    def cancel(self, sequence):
        if sequence not in self.finish_reasons:
            self.scheduler.remove(sequence)
            self._check_blocks()

    def step(self):
        """One step; gives its plan."""
        plan = self._plan()
        states = iter(self._runner.execute(plan))
        sampled = [sequence for _, sequence in self.scheduler.sampled(plan)]
        choices = [choose(each, [next(states) for _ in range(each.num_rows)]) for each in sampled]
        assert not list(states), "there are logits that nobody asked for"
        self.scheduler.commit(plan)
        for sequence, choice in zip(sampled, choices, strict=True):
            for event in self.scheduler.extend(sequence, choice):
                new = event.note if sequence.scoring else event.token_id
                self.answers[sequence].append(new)
                if event.finish_reason:
                    self.finish_reasons[sequence] = event.finish_reason
            if sequence in self.finish_reasons:
                self.scheduler.remove(sequence)
        self._check_blocks()
        return plan

    def fail(self):
        """A step that breaks down in the middle: what it wrote is rubbish."""
        self._runner.fail(self._plan())
        self.scheduler.preempt_all()
        self._check_blocks()

    def run(self):
        """Step until all is done; gives the answers in the order of their requests."""
        for _ in range(ENOUGH_STEPS):
            if not self.scheduler.has_work:
                assert self.scheduler.num_free_blocks == self.num_blocks
                return list(self.answers.values())
            self.step()
        raise AssertionError("it comes to no end")

    def _plan(self):
        in_mid_answer = [each for each in self.scheduler.running if lacks_one_token(each)]
        plan = self.scheduler.plan()
        running, waiting = self.scheduler.running, self.scheduler.waiting
        planned = {each.sequence_id for each in plan.slices}
        assert 0 < plan.num_tokens <= self.config.max_step_tokens
        assert sum(each.max_branches for each in running) <= self.config.max_running
        assert planned <= {each.id for each in running}
        assert all(each.id in planned for each in in_mid_answer if each in running), "stalled"
        for queue in (running, waiting):
            assert [each.id for each in queue] == sorted(each.id for each in queue)
        self.plans.append(plan)
        return plan

    def _check_blocks(self):
        """A block is free unless a running sequence holds it."""
        held = {
            block
            for sequence in self.scheduler.running
            for branch in sequence.branches
            for block in branch.blocks
        }
        assert self.scheduler.num_free_blocks == self.num_blocks - len(held)
        assert not any(
            branch.blocks for sequence in self.scheduler.waiting for branch in sequence.branches
        )


def lacks_one_token(sequence):
    return all(
        sequence.num_tokens(branch) == branch.num_computed + 1 for branch in sequence.branches
    )


def most_new_tokens(request):
    return max(map(len, request.candidates), default=request.sampling.max_new_tokens)


def blocks_needed(request, block_size):
    room = Room(EngineConfig(block_size=block_size), num_blocks=1, max_context=1)
    sampling, num_prompt, count = request.sampling, len(request.token_ids), most_new_tokens(request)
    if request.candidates:
        return room.blocks_needed(num_prompt - 1, SCORED_AT_ONCE, count + 1)
    limit = request.window.limit if request.window else None
    return room.blocks_needed(num_prompt, sampling.num_beams, count, limit) + sum(
        room.blocks_needed(len(each.token_ids), 1, count) for each in request.beside
    )


def slow_twin(request):
    return answer_without_cache(request, request.sampling.max_new_tokens)


# --- random loads -------------------------------------------------------------------------------

# Put together at random, prompts often begin alike; all pictures have the same ids.
PIECES = ((1,), (3, 4), (5, 6, 7, 8, 9), "cat", "dog")


@dataclass(frozen=True)
class Ask:
    """A request of a random load, and when it comes and goes."""

    pieces: list
    goes_on: bool  # From the prompt and the answer of the request before it.
    max_new_tokens: int
    num_beams: int
    divisor: int | None  # Of its stop watch.
    steps_before: int
    cancelled_after: int | None
    window: int | None
    beside: list  # Pieces of each other prompt.
    candidates: list

    def request(self, before, max_running):
        ids, images = [], []
        if before and self.goes_on:
            ids += [*before.token_ids, *(() if before.candidates else slow_twin(before))]
            images += before.images
        put_together(self.pieces, ids, images)
        if self.candidates:
            candidates = tuple(map(tuple, self.candidates))
            return Request(tuple(ids), tuple(images), SamplingParams(), candidates=candidates)
        num_beams = min(self.num_beams, max_running)
        sampling = SamplingParams(max_new_tokens=self.max_new_tokens, num_beams=num_beams)
        watch = SumWatch(self.divisor) if self.divisor else NoWatch()
        if self.window is None:
            others = self.beside[: max_running - 1] if num_beams == 1 else ()
            beside = tuple(Beside(str(n), *put_together(each)) for n, each in enumerate(others))
            return Request(tuple(ids), tuple(images), sampling, watch, beside=beside)
        images = [replace(image, start=image.start + 1) for image in images]
        window = window_of([1, *ids], images, self.window)
        ids, starts = window.fit(0).token_ids, window.fit(0).image_starts
        left = images[len(images) - len(starts) :]
        images = [replace(image, start=start) for image, start in zip(left, starts, strict=True)]
        return Request(ids, tuple(images), sampling, watch, window=window)


def put_together(pieces, ids=None, images=None):
    """Ids and images; those that are given grow."""
    ids, images = [] if ids is None else ids, [] if images is None else images
    for piece in pieces:
        if isinstance(piece, str):
            images.append(ImageInput(None, piece, len(ids), ROWS))
        ids += [PLACEHOLDER] * ROWS if isinstance(piece, str) else piece
    return tuple(ids), tuple(images)


def window_of(ids, images, size):
    """The first token stays; of the others each may leave, and a picture as a whole."""
    inside = {image.start + row for image in images for row in range(1, ROWS)}
    cuts = [place for place in range(1, len(ids) + 1) if place not in inside]

    def encode(skipped):
        cut = cuts[skipped]
        spans = [ImageSpan(each.start - cut + 1, ROWS) for each in images if each.start >= cut]
        return EncodedPrompt((ids[0], *ids[cut:]), tuple(spans), (), "")

    sizes = [stop - start for start, stop in pairwise(cuts)]
    return Window(encode, sizes, size=size, room=MANY_BLOCKS)


@dataclass(frozen=True)
class Load:
    """Requests, an engine hardly large enough for them, and what goes wrong at which steps."""

    asks: list
    block_size: int
    max_running: int
    spare_tokens: int
    spare_blocks: int
    prefix_cache: bool
    accidents: dict

    def requests(self):
        requests = []
        for ask in self.asks:
            requests.append(ask.request(requests[-1] if requests else None, self.max_running))
        return requests

    def stepper(self, requests):
        most = max(blocks_needed(request, self.block_size) for request in requests)
        return Stepper(
            num_blocks=most + self.spare_blocks,
            block_size=self.block_size,
            max_running=self.max_running,
            max_step_tokens=self.max_running + self.spare_tokens,
            prefix_cache=self.prefix_cache,
        )


SOME_PIECES = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4)
ASKS = st.builds(
    Ask,
    pieces=SOME_PIECES,
    goes_on=st.booleans(),
    max_new_tokens=st.integers(1, 12),
    num_beams=st.sampled_from((1, 1, 1, 2, 3, 4)),
    divisor=st.sampled_from((None, None, 6)),
    steps_before=st.sampled_from((0, 0, 1, 4)),
    cancelled_after=st.sampled_from((None, None, None, None, 0, 1, 2, 7)),
    window=st.sampled_from((None, None, 4, 7, 12)),
    beside=st.lists(SOME_PIECES, max_size=3),
    candidates=st.sampled_from(
        ([],) * 8 + ([[3]], [[4, 5, 6], [3], [3, 4]], [[n] * (1 + n % 5) for n in range(8)])
    ),
)
LOADS = st.builds(
    Load,
    asks=st.lists(ASKS, min_size=1, max_size=8),
    block_size=st.integers(1, 4),
    max_running=st.integers(1, 6),
    spare_tokens=st.integers(0, 6),
    spare_blocks=st.integers(0, 6),
    prefix_cache=st.booleans(),
    accidents=st.dictionaries(
        st.integers(0, 25), st.sampled_from(("preempt", "fail", "halve")), max_size=2
    ),
)


def serve(load, requests):
    """Run a load to its end; gives the stepper and the requests' sequences."""
    stepper = load.stepper(requests)
    arrivals = list(accumulate(ask.steps_before for ask in load.asks))
    sequences = []
    for clock in range(arrivals[-1] + 10):
        while len(sequences) < len(requests) and arrivals[len(sequences)] == clock:
            sequences.append(stepper.add(requests[len(sequences)]))
        for sequence, ask, arrival in zip(sequences, load.asks, arrivals, strict=False):
            if ask.cancelled_after is not None and clock == arrival + ask.cancelled_after:
                stepper.cancel(sequence)
        if stepper.scheduler.has_work:
            step_with(stepper, load.accidents.get(clock))
    stepper.run()
    return stepper, sequences


def step_with(stepper, accident):
    if accident == "fail":
        stepper.fail()
        return
    if accident:
        stepper.scheduler.preempt_all()
    if accident == "halve":
        stepper.scheduler.max_running = max(1, stepper.scheduler.max_running // 2)
    stepper.step()


@settings(max_examples=250, deadline=None)
@given(LOADS)
def test_every_answer_is_what_it_is_alone(load):
    requests = load.requests()
    stepper, sequences = serve(load, requests)
    for sequence, ask in zip(sequences, load.asks, strict=True):
        answer, expected = stepper.answers[sequence], slow_twin(sequence.request)
        if sequence in stepper.finish_reasons:
            assert answer == expected
        else:
            assert ask.cancelled_after is not None
            assert answer == expected[: len(answer)]
