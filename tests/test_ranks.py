"""One model over several processes answers as one process does, and none of them is left behind."""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from golden_cases import GOLDENS, SEARCHES, Golden, assert_same_ids, searches_of

from minigpt4_runtime import Message, MiniGPT4, SamplingParams, follow, image
from minigpt4_runtime.cli.main import run
from minigpt4_runtime.devices.cpu import CpuBackend
from minigpt4_runtime.devices.group import TorchGroup
from minigpt4_runtime.errors import ConfigError, RankLostError
from minigpt4_runtime.quantise.choice import QuantisePlan
from minigpt4_runtime.quantise.quantise import quantise

PICTURES = Path(__file__).parents[1] / "examples/images"
SAMPLED = SamplingParams(temperature=1.0, seed=7, max_new_tokens=30, stop=(), ignore_eos=True)
ENDLESS = SamplingParams(ignore_eos=True, stop=(), max_new_tokens=900)


@pytest.fixture(scope="module")
def eight_heads_dir(golden_model_dir, tmp_path_factory):
    """A golden checkpoint whose heads are cut into eight narrower ones: the shapes stay."""
    folder = tmp_path_factory.mktemp("eight") / "model"
    shutil.copytree(golden_model_dir("vicuna"), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    path.write_text(json.dumps(config), "utf-8")
    return folder


def load(model_dir=None, **options):
    return MiniGPT4.load(model_dir, device="cpu", dtype="float32", **options)


def followers():
    """The ranks that this process has started and that live."""
    return children_of(os.getpid())


def children_of(leader):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, rest = path.read_text().rsplit(")", 1)
            words = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if int(parent) == leader and state != "Z" and b"minigpt4_runtime.ranks" in words:
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What `minigpt4 describe` says of the pictures without other ranks, and its records."""
    out, said = tmp_path_factory.mktemp("alone") / "out.jsonl", io.StringIO()
    words = ["minigpt4", "describe", str(PICTURES), "--device", "cpu", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit):
            run()
    return said.getvalue(), answers_in(out)


def answers_in(records_path):
    """The answer for each picture of a file of records, whose last line may be half written."""
    text = records_path.read_text("utf-8") if records_path.exists() else ""
    records = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    return {record["image"]: record["answer"] for record in records}


def wait_until(is_so):
    deadline = time.monotonic() + 240  # Programs start slowly on a busy machine.
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- the same answers, until a rank is lost -----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "runs_ahead"),
    [("vicuna", 2, False), ("llama2", 4, True), ("minigptv2", 2, True)],
)
def test_the_original_s_answers_until_a_rank_is_killed(
    golden_model_dir, monkeypatch, name, size, runs_ahead
):
    """Ahead: steps are launched before the ids are read that the last ones have chosen."""
    alone, num_spread = load(golden_model_dir(name)), 0
    spread = TorchGroup.spread

    def count(group, numbers):
        nonlocal num_spread
        num_spread += 1
        return spread(group, numbers)

    monkeypatch.setattr(TorchGroup, "spread", count)
    monkeypatch.setattr(CpuBackend, "facts", replace(CpuBackend.facts, runs_ahead=runs_ahead))
    with load(golden_model_dir(name), tensor_parallel=size) as model:
        golden = Golden(GOLDENS / name, model)
        assert model.tensor_parallel == size
        pids = sorted(followers())
        assert len(pids) == size - 1
        tickets = [
            (model.submit(golden.question(case), golden.sampling(**SEARCHES[search])), ids)
            for case in golden.cases("single")
            for search, ids in searches_of(case)
            if not (runs_ahead and search.startswith("beam"))  # They are read at once.
        ]
        for ticket, ids in tickets:
            *_, last = ticket
            assert_same_ids(golden, last.reply.token_ids, ids)
        question = golden.question(golden.cases("single")[0])
        assert model.chat(question, SAMPLED) == alone.chat(question, SAMPLED)
        blind = {"blind": [Message("user", ("What?",))]}
        steered = {"processors": [away_from_the_blind], "branches": blind}
        assert model.chat(question, SAMPLED, **steered) == alone.chat(question, SAMPLED, **steered)
        candidates = ("a cat", [5], [7, 8, 9])
        expected = pytest.approx(alone.score(question, candidates), abs=1e-4)
        assert model.score(question, candidates) == expected
        assert model.probe.traffic().num_bytes > 0
        assert (num_spread > SAMPLED.max_new_tokens) == runs_ahead
        if size == 2:  # One that has nothing to do is killed, or one of several at work.
            os.kill(pids[0], signal.SIGKILL)
            with pytest.raises(RankLostError, match=r"Rank 1 of 2 ended with status -9\. Load"):
                model.chat(question)
        else:
            lose_at_work(model, pids[1], signal.SIGKILL, "Rank 2 of 4 ended with status -9")
    assert not followers()


def away_from_the_blind(seen):
    return 2 * seen.logits - seen.branches["blind"]


def lose_at_work(model, pid, blow, why):
    """Everything that runs ends and says why, and nothing more is taken."""
    tickets = [model.submit([Message("user", ("Count.",))], ENDLESS) for _ in range(3)]
    next(iter(tickets[0]))
    os.kill(pid, blow)
    for ticket in tickets:
        with pytest.raises(RankLostError, match=f"{why}.* Load the model again"):
            for _ in ticket:
                pass
    with pytest.raises(RankLostError):
        model.submit([Message("user", ("Still there?",))])


def test_heads_that_share_keys_and_an_odd_vocabulary_until_a_rank_hangs(
    golden_model_dir, monkeypatch
):
    monkeypatch.setattr("minigpt4_runtime.ranks.PATIENCE_SECONDS", 2)
    with load(golden_model_dir("llama2-gqa"), tensor_parallel=2) as model:
        golden = Golden(GOLDENS / "llama2-gqa", model)
        for case in golden.cases("single")[:6]:
            reply = model.chat(golden.question(case), golden.sampling())
            assert_same_ids(golden, reply.token_ids, case["output_ids"]["greedy"])
        lose_at_work(model, *followers(), signal.SIGSTOP, "does not answer")
    assert not followers()


def test_eight_ranks(eight_heads_dir):
    question = [Message("user", ("Tell me about it.",))]
    searches = [
        SAMPLED,
        SamplingParams(max_new_tokens=20),
        SamplingParams(num_beams=3, max_new_tokens=10),
    ]
    with load(eight_heads_dir, tensor_parallel=8) as model:
        ours = [model.chat(question, search) for search in searches]
    alone = load(eight_heads_dir)
    assert ours == [alone.chat(question, search) for search in searches]


def test_a_quantised_model_in_two_ranks(eight_heads_dir, tmp_path):
    """Each rank rounds its part of a row by its own scale: logits move, and answers stay."""
    quantise(eight_heads_dir, tmp_path / "w8a8", QuantisePlan(weights="w8a8"))
    question = [Message("user", (image(PICTURES / "three.png"), "Tell me about it."))]
    search = SamplingParams(max_new_tokens=8, stop=(), ignore_eos=True, logprobs=1)
    with load(tmp_path / "w8a8", tensor_parallel=2) as model:
        ours = model.chat(question, search)
    alone = load(tmp_path / "w8a8").chat(question, search)
    assert ours.token_ids == alone.token_ids
    chances = [[each.logprob for each in reply.logprobs] for reply in (ours, alone)]
    assert chances[0] == pytest.approx(chances[1], abs=0.1)


# --- programs of their own ----------------------------------------------------------------------


def torchrun(*program):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    done = subprocess.run(
        [*command, *program], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_starts_them(alone, tmp_path):
    """Every rank is given the same command; one of them does the job."""
    command = ["-m", "minigpt4_runtime.cli.main", "describe", str(PICTURES),
               "--device", "cpu", "--tensor-parallel", "2"]  # fmt: skip
    said, answers = alone
    assert torchrun(*command, "--out", str(tmp_path / "out.jsonl")) == said
    assert answers_in(tmp_path / "out.jsonl") == answers


PROGRAM = """
import os, sys
from minigpt4_runtime import ConfigError, MiniGPT4, follow

if os.environ["RANK"] == "1":
    try:
        MiniGPT4.load(device="cpu", tensor_parallel=2)
    except ConfigError as error:
        print("refused:", error)
if follow(2):
    print("followed")
    sys.exit()
with MiniGPT4.load(device="cpu", tensor_parallel=2) as model:
    print("answer:", model.describe(sys.argv[1]).text)
"""


def test_a_program_of_ones_own_follows_first(alone, tmp_path):
    program, picture = tmp_path / "program.py", str(PICTURES / "three.png")
    program.write_text(PROGRAM, "utf-8")
    answer, followed, refused = sorted(torchrun(str(program), picture).splitlines())
    assert (answer, followed) == (f"answer: {alone[1][picture]}", "followed")
    assert refused.startswith("refused: This process is rank 1 of 2 under torchrun")


def test_two_instances_side_by_side_end_each_for_itself(alone, tmp_path, request):
    """Each a program of its own, as two users on one machine would start it."""
    many = tmp_path / "many"
    many.mkdir()
    for number, picture in itertools.product(range(300), PICTURES.iterdir()):
        shutil.copy(picture, many / f"{number}-{picture.name}")
    command = [sys.executable, "-m", "minigpt4_runtime.cli.main", "describe", str(many),
               "--device", "cpu", "--tensor-parallel", "2", "--out"]  # fmt: skip
    records = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    one, other = (
        subprocess.Popen([*command, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for path in records
    )
    request.addfinalizer(one.kill)
    request.addfinalizer(other.kill)
    for path in records:
        wait_until(lambda path=path: len(answers_in(path)) >= 4)
    # A lost rank ends its own instance, in words, and what is done is kept.
    (follower,) = children_of(one.pid)
    os.kill(follower, signal.SIGKILL)
    _, err = one.communicate(timeout=240)
    assert one.returncode == 1
    assert b"error: Rank 1 of 2 ended with status -9." in err
    # A leader that is killed takes its ranks with it.
    (follower,) = children_of(other.pid)
    environment = Path(f"/proc/{follower}/environ").read_bytes().split(b"\0")
    (folder,) = (each for each in environment if each.startswith(b"MINIGPT4_RANKS="))
    other.kill()
    _, err = other.communicate(timeout=240)
    assert other.returncode == -signal.SIGKILL, err
    wait_until(lambda: has_ended(follower))
    assert not Path(folder.decode().partition("=")[2]).exists()
    for path in records:
        for picture, answer in answers_in(path).items():
            assert answer == alone[1][str(PICTURES / picture.rpartition("-")[2])]


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_rank_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1': raise SystemExit('no room for me')\n"
    )
    with pytest.raises(RankLostError, match=r"Rank 1 of 2 ended with status 1 .*no room for me"):
        load(tensor_parallel=2)
    assert not followers()


def test_ctrl_c_ends_all_at_once():
    program = (
        "from minigpt4_runtime import *\n"
        "model = MiniGPT4.load(device='cpu', tensor_parallel=2)\n"
        "print(*[p.pid for p in model._loaded.ranks._followers._processes.values()], flush=True)\n"
        "model.chat([Message('user', ('Count.',))], SamplingParams(\n"
        "    ignore_eos=True, stop=(), max_new_tokens=900))\n"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    follower = int(leader.stdout.readline())
    leader.send_signal(signal.SIGINT)
    _, err = leader.communicate(timeout=240)
    assert leader.returncode != 0
    assert "KeyboardInterrupt" in err
    wait_until(lambda: has_ended(follower))


def has_ended(pid):
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 3}, r"3, which does not divide .* It can be 1, 2, 4\."),
        ({"tensor_parallel": 2, "device": "cuda:1"}, "Name the kind alone: cuda"),
    ],
)
def test_what_cannot_be_divided(options, message):
    with pytest.raises(ConfigError, match=message):
        MiniGPT4.load(**options)
    assert not followers()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "4"}, r"tensor_parallel is 2, but .* RANK=0 of WORLD_SIZE=4"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"RANK": "-1"}, "but RANK is not set as torchrun sets it"),
        ({"WORLD_SIZE": "two", "MASTER_PORT": ""}, "but WORLD_SIZE, MASTER_PORT is not set"),
        ({"MASTER_ADDR": ""}, "but MASTER_ADDR is not set as torchrun sets it"),
    ],
)
def test_an_environment_that_torchrun_would_not_make(monkeypatch, changes, message):
    right = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in (right | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        load(tensor_parallel=2)


def test_one_rank_alone_asks_for_no_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    load().close()


def test_a_follower_of_torchruns_leaves_the_model_to_its_leader(monkeypatch):
    """It may be another than the follower's own options name: a shape with random weights."""
    environment = {"RANK": "7", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    followed = []
    monkeypatch.setattr("minigpt4_runtime.ranks.TorchGroup", lambda *where, folder: where)
    monkeypatch.setattr("minigpt4_runtime.ranks.serve", followed.append)
    # The follower's own options name the demo model, which has no eight heads.
    with pytest.raises(ConfigError, match=r"rank 7 of 8 .* Call minigpt4_runtime\.follow\(8\)"):
        MiniGPT4.load(tensor_parallel=8)
    assert follow(8)
    assert followed == [(7, 8)]
    monkeypatch.setenv("RANK", "0")
    assert not follow(8)
    assert not follow(1)
