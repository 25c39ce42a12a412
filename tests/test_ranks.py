"""One model over several processes answers as one process does, and none of them is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_cases import GOLDENS, SEARCHES, Golden, assert_same_ids

from minigpt4_runtime import Message, MiniGPT4, SamplingParams, follow
from minigpt4_runtime.errors import ConfigError, RankLostError

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


# --- the same answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["vicuna", "llama2"])
def test_the_original_s_answers(golden_model_dir, name, size):
    alone = load(golden_model_dir(name))
    with load(golden_model_dir(name), tensor_parallel=size) as model:
        golden = Golden(GOLDENS / name, model)
        assert model.tensor_parallel == size
        assert len(followers()) == size - 1
        tickets = [
            (model.submit(golden.question(case), golden.sampling(**SEARCHES[search])), ids)
            for case in golden.cases("single")
            for search, ids in case["output_ids"].items()
        ]
        for ticket, ids in tickets:
            *_, last = ticket
            assert_same_ids(golden, last.reply.token_ids, ids)
        question = golden.question(golden.cases("single")[0])
        assert model.chat(question, SAMPLED) == alone.chat(question, SAMPLED)
        assert model.probe.traffic().num_bytes > 0
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


def test_heads_that_share_keys_and_an_odd_vocabulary(golden_model_dir):
    with load(golden_model_dir("llama2-gqa"), tensor_parallel=2) as model:
        golden = Golden(GOLDENS / "llama2-gqa", model)
        for case in golden.cases("single")[:6]:
            reply = model.chat(golden.question(case), golden.sampling())
            assert_same_ids(golden, reply.token_ids, case["output_ids"]["greedy"])


def test_two_instances_side_by_side(tmp_path):
    """Each a program of its own, as two users on one machine would start it."""
    command = [sys.executable, "-m", "minigpt4_runtime.cli.main", "describe", str(PICTURES),
               "--device", "cpu", "--tensor-parallel", "2"]  # fmt: skip
    runs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    alone = subprocess.run([*command[:-1], "1"], capture_output=True, text=True, check=True)
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert (run.returncode, out) == (0, alone.stdout), err


def torchrun(*program):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    return subprocess.run(
        [*command, *program], capture_output=True, text=True, check=False, timeout=120
    )


def test_torchrun_starts_them(tmp_path):
    """Every rank is given the same command; one of them does the job."""
    command = ["-m", "minigpt4_runtime.cli.main", "describe", str(PICTURES),
               "--device", "cpu", "--tensor-parallel", "2"]  # fmt: skip
    ours = torchrun(*command, "--out", str(tmp_path / "out.jsonl"))
    assert ours.returncode == 0, ours.stderr
    alone = subprocess.run([sys.executable, *command[:-2]], capture_output=True, text=True)
    assert ours.stdout == alone.stdout
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == len(
        list(PICTURES.iterdir())
    )


PROGRAM = """
import sys
from minigpt4_runtime import MiniGPT4, follow

with_follow, picture = sys.argv[1] == "follow", sys.argv[2]
if with_follow and follow(2):
    print("followed")
    sys.exit()
with MiniGPT4.load(device="cpu", tensor_parallel=2) as model:
    print("answer:", model.describe(picture).text)
"""


def test_a_program_of_ones_own_follows_first(tmp_path):
    program, picture = tmp_path / "program.py", PICTURES / "three.png"
    program.write_text(PROGRAM, "utf-8")
    done = torchrun(str(program), "follow", str(picture))
    assert done.returncode == 0, done.stderr
    answer = load().describe(picture).text
    assert sorted(done.stdout.splitlines()) == [f"answer: {answer}", "followed"]
    refused = torchrun(str(program), "no", str(picture))
    assert refused.returncode != 0
    assert "This process is rank 1 of 2 under torchrun" in refused.stderr


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_what_runs(blow, monkeypatch):
    monkeypatch.setattr("minigpt4_runtime.ranks.PATIENCE_SECONDS", 4)
    with load(tensor_parallel=4) as model:
        tickets = [model.submit([Message("user", ("Count.",))], ENDLESS) for _ in range(3)]
        next(iter(tickets[0]))
        os.kill(sorted(followers())[1], blow)
        why = "Rank 2 of 4 ended with status -9" if blow == signal.SIGKILL else "does not answer"
        for ticket in tickets:
            with pytest.raises(RankLostError, match=f"{why}.* Load the model again"):
                for _ in ticket:
                    pass
        with pytest.raises(RankLostError):
            model.submit([Message("user", ("Still there?",))])
    assert not followers()


def test_a_killed_rank_is_named():
    with load(tensor_parallel=2) as model:
        (pid,) = followers()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RankLostError, match=r"Rank 1 of 2 ended with status -9\. Load"):
            model.chat([Message("user", ("Hello?",))])


def test_the_command_line_says_so_and_keeps_what_is_done(tmp_path):
    pictures = [str(path) for path in PICTURES.iterdir()] * 200
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "minigpt4_runtime.cli.main", "describe", *pictures,
               "--device", "cpu", "--tensor-parallel", "2", "--out", str(out)]  # fmt: skip
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline()
    (follower,) = children_of(run.pid)
    os.kill(follower, signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "error: Rank 1 of 2 ended with status -9." in err
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert records
    assert all(record["answer"] for record in records)


def test_a_rank_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1': raise SystemExit('no room for me')\n"
    )
    with pytest.raises(RankLostError, match=r"Rank 1 of 2 ended with status 1 .*no room for me"):
        load(tensor_parallel=2)
    assert not followers()


def test_ranks_end_with_a_leader_that_is_killed():
    program = (
        "import os, signal, sys\n"
        "from minigpt4_runtime import MiniGPT4\n"
        "model = MiniGPT4.load(device='cpu', tensor_parallel=2)\n"
        "followers = model._loaded.ranks._followers\n"
        "print(*[p.pid for p in followers._processes.values()], followers._folder, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    leader = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert leader.returncode == -signal.SIGKILL
    follower, folder = leader.stdout.split()
    assert has_ended(int(follower))
    assert not Path(folder).exists()


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
    _, err = leader.communicate(timeout=60)
    assert leader.returncode != 0
    assert "KeyboardInterrupt" in err
    assert has_ended(follower)


def has_ended(pid):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


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
    load().close()  # One rank alone asks for no environment.


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
