"""`minigpt4 fetch` from nothing to a described picture, with the published hosts on loopback."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_web import GOLDENS, TOKEN, Mishap, golden_files, write_table

from minigpt4_runtime import MiniGPT4, SamplingParams
from minigpt4_runtime.checkpoint.config_file import load_config
from minigpt4_runtime.devices.cpu import CpuBackend
from minigpt4_runtime.hub import download
from minigpt4_runtime.hub.hosts import Hiccup
from minigpt4_runtime.presets import PRESETS

TOWER = "eva_vit_g.pth"
PICTURE = GOLDENS / "vicuna" / "images" / "grey.png"
Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def table(web, tmp_path):
    return write_table(web, tmp_path / "test.toml", "vicuna", "vicuna-7b")


@pytest.fixture
def fetch(real_minigpt4, table, monkeypatch):
    """Runs `minigpt4 fetch vicuna-7b --sources test.toml …`, with no waiting between tries."""
    monkeypatch.setattr(download, "FIRST_WAIT_SECONDS", 0.0)
    return lambda *more, name="vicuna-7b": real_minigpt4("fetch", name, "--sources", table, *more)


def files_of(home):
    """What lies in the cache, but for the lock."""
    paths = sorted(path for path in home.rglob("*") if path.is_file())
    return [path.relative_to(home).as_posix() for path in paths if path.name != ".fetch.lock"]


def test_from_nothing_to_a_described_picture(fetch, real_minigpt4, cache_home, golden_model_dir):
    shown = fetch()
    assert shown.status == 0, shown.err
    folder = cache_home / "models" / "vicuna-7b"
    path, *answer = shown.out.splitlines()
    assert path == str(folder)
    assert "To download: 4.6 MiB" in shown.err
    # No terminal, no bars: a line for each file.
    assert shown.err.count(", all is here.\n") == 11
    assert re.search(r"projection/pretrained_minigpt4_7b\.pth: .* KiB, all is here\.", shown.err)
    assert shown.err.endswith("Now yours: minigpt4 describe photo.jpg --model vicuna-7b\n")
    # It is what `convert` makes of the same files.
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (golden_model_dir("vicuna") / weights).read_bytes()
    model = MiniGPT4.load("vicuna-7b")
    example = Path(shown.err.partition("An example, ")[2].partition(":\n")[0])
    reply = model.describe(example, sampling=SamplingParams(max_new_tokens=60))
    assert "\n".join(answer) == reply.text
    described = real_minigpt4("describe", PICTURE, "--model", "vicuna-7b", "--max-new-tokens", 12)
    assert (
        described.out.strip()
        == model.describe(PICTURE, sampling=SamplingParams(max_new_tokens=12)).text
    )
    # What was downloaded is gone; what it was is known.
    assert files_of(cache_home) == [
        "downloads.json",
        *(f"models/vicuna-7b/{name}" for name in
          ("config.json", "manifest.json", weights, "tokenizer.model")),
    ]  # fmt: skip
    known = {
        each["sha256"] for each in json.loads((cache_home / "downloads.json").read_text()).values()
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {source["sha256"] for source in manifest["sources"]} <= known


def test_quantised_weights_in_one_go(fetch, real_minigpt4, cache_home):
    assert fetch("--format", "w4a16").status == 0
    shown = real_minigpt4("describe", PICTURE, "--model", "vicuna-7b-w4a16", "--max-new-tokens", 8)
    assert shown.status == 0
    assert shown.out
    folder = cache_home / "models" / "vicuna-7b-w4a16"
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert manifest["weight_format"]["language.layers"] == "w4a16-g32"
    again = fetch("--format", "w4a16", "--no-example")
    assert f"vicuna-7b-w4a16 is in {folder} already" in again.err
    for other in ([], ["--format", "w8a16"]):
        refused = fetch("--no-example", "--out", folder, *other)
        assert refused.status == 1
        assert "is there already, as w4a16-g32 in language.layers" in refused.err


def test_a_fetched_model_is_not_fetched_again(fetch, web):
    fetch("--no-example")
    web.seen.clear()
    shown = fetch("--no-example")
    assert (shown.status, web.seen) == (0, [])
    assert "already" in shown.err
    assert "Now yours" in shown.err


def test_what_is_there_is_stored_otherwise_than_asked_for(fetch, web, tmp_path):
    assert fetch("--no-example", "--dtype", "float32").status == 0
    assert fetch("--no-example", "--dtype", "float32").status == 0
    shown = fetch("--no-example", "--dtype", "float16")
    assert shown.status == 1
    assert "stored in float32 and not in float16 alone. Run `minigpt4 models --delete" in shown.err
    fetch("--no-example", "--out", tmp_path / "model", "--dtype", "float16")
    shown = fetch("--no-example", "--out", tmp_path / "model", "--dtype", "float32")
    assert shown.status == 1
    assert "in float16 and not in float32 alone. Choose another --out." in shown.err


def test_another_model_in_the_folder_does_not_pass_for_this_one(
    fetch, web, golden_model_dir, table
):
    text = table.read_text(encoding="utf-8")
    named = text.replace("[models.vicuna-7b]", '[models.vicuna-7b]\npreset = "vicuna-7b"')
    table.write_text(named, encoding="utf-8")
    shown = fetch("--no-example", "--out", golden_model_dir("vicuna"))
    assert shown.status == 1
    assert f"{golden_model_dir('vicuna')} is of another model than vicuna-7b: " in shown.err
    assert "Choose another --out." in shown.err
    assert web.seen == []


def test_the_gated_variant(fetch, web, tmp_path, monkeypatch):
    web.files.clear()
    web.files |= golden_files("llama2")
    web.gated.add("meta-llama/Llama-2-7b-chat-hf")
    write_table(web, tmp_path / "test.toml", "llama2", "llama2-7b")
    shown = fetch(name="llama2-7b")
    assert shown.status == 1
    assert f"Accept the licence at {web.site}/meta-llama/Llama-2-7b-chat-hf" in shown.err
    assert shown.err.count("error: ") == 1
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    shown = fetch(name="llama2-7b")
    assert shown.status == 0, shown.err
    assert MiniGPT4.load("llama2-7b").config.qformer is None


def test_a_dry_run_only_tells(fetch, web, cache_home):
    shown = fetch("--dry-run")
    assert shown.status == 0
    size = len(web.files[TOWER]) / 2**20
    assert f"vision      {TOWER}: {web.site[7:]}, {size:.1f} MiB\n" in shown.out
    assert "The model folder takes up to 4.6 MiB: " in shown.out
    assert files_of(cache_home) == []


def test_a_dry_run_without_a_network_says_what_it_knows(fetch, web, monkeypatch):
    @contextmanager
    def fail(*_, **__):
        raise Hiccup("the connection broke")
        yield

    monkeypatch.setattr("minigpt4_runtime.hub.fetch_plan.open_reply", fail)
    shown = fetch("--dry-run")
    assert shown.status == 0
    assert f"vision      {TOWER}: {web.site[7:]}, size unknown\n" in shown.out
    (line,) = (line for line in shown.out.splitlines() if "more than can be said" in line)
    assert web.site[7:] in line
    assert line.endswith(" did not answer, or told no size.")
    assert "The model folder: " in shown.out


def test_sources_that_are_kept_are_checked_and_used(fetch, web, cache_home, tmp_path):
    assert fetch("--keep-sources", "--no-example").status == 0
    kept = [name for name in files_of(cache_home) if name.startswith("downloads/")]
    assert len(kept) == 11
    tower = cache_home / "downloads" / "tower" / TOWER
    damaged = bytearray(tower.read_bytes())
    damaged[5000] ^= 1
    tower.write_bytes(damaged)
    web.seen.clear()
    shown = fetch("--no-example", "--out", tmp_path / "again", "--dtype", "float32")
    assert shown.status == 0, shown.err
    # The disk has changed one: that one comes again.
    assert {each.path.rsplit("/", 1)[-1] for each in web.seen} == {TOWER}
    assert f"--model {tmp_path / 'again'}" in shown.err
    manifest = json.loads((tmp_path / "again" / "manifest.json").read_text())
    assert manifest["dtypes"] == ["float32"]


def test_files_under_any_name(fetch, web, tmp_path, cache_home, golden_model_dir, monkeypatch):
    folder = tmp_path / "from a friend"
    for number, content in enumerate(web.files.values()):
        path = folder / f"sub{number % 3}" / f"{number}.download"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "notes.txt").write_text("nothing of a model")
    # No network is needed then, nor what reaches one.
    monkeypatch.setitem(sys.modules, "httpx2", None)
    shown = fetch("--from", folder, "--no-example")
    assert shown.status == 0, shown.err
    assert web.seen == []
    made = (cache_home / "models" / "vicuna-7b" / "model.safetensors").read_bytes()
    assert made == (golden_model_dir("vicuna") / "model.safetensors").read_bytes()
    assert len([path for path in folder.rglob("*") if path.is_file()]) == len(web.files) + 1


def test_what_is_not_in_the_folder_is_downloaded(fetch, web, tmp_path):
    """And so one file that no host gives can be brought by hand."""
    shard, folder = "pytorch_model-00001-of-00004.bin", tmp_path / "some"
    folder.mkdir()
    contents = {name: web.files.pop(name) for name in (TOWER, shard, "tokenizer.model")}
    shown = fetch("--no-example")
    assert shown.status == 1
    assert "--from DIR" in shown.err
    (folder / "tower.bin").write_bytes(contents[TOWER])
    (folder / "downloaded (1)").write_bytes(contents["tokenizer.model"])
    (folder / shard).write_bytes(contents[shard])
    # What was on its way when the first error ended all may still ask.
    while any(thread.name == "fetch" for thread in threading.enumerate()):
        time.sleep(0.01)
    web.seen.clear()
    shown = fetch("--from", folder, "--no-example")
    assert shown.status == 0, shown.err
    assert not any(web.requests_for(name) for name in contents)
    assert web.requests_for("pytorch_model-00002-of-00004.bin")


def test_what_of_a_folder_cannot_be_used_is_told(fetch, web, tmp_path):
    """Nobody should wonder why a file that is there is downloaded again."""
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / TOWER).write_bytes(web.files[TOWER][:5000])
    (folder / "shard.bin").write_bytes(b"<html>Sign in</html>")
    (folder / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "config.json").write_bytes(b"")
    (folder / "projection.pth").write_bytes(b"too many requests")
    (folder / "old.pth").write_bytes(b"\x80\x02" + bytes(5000))
    (folder / "notes.html").write_bytes(b"<html>Notes</html>")
    shown = fetch("--from", folder, "--no-example")
    assert shown.status == 0, shown.err
    (told,) = [line for line in shown.err.splitlines() if line.startswith("Passed over: ")]
    assert f"{folder / TOWER} " in told
    assert f"{folder / 'shard.bin'} is a web page" in told
    assert f"{folder / 'tokenizer.model'} is a Git LFS pointer" in told
    assert f"{folder / 'config.json'} is empty" in told
    assert f"{folder / 'projection.pth'} holds a text" in told
    assert f"{folder / 'old.pth'} is a pickle that torch did not write" in told
    assert "notes.html" not in told
    assert web.requests_for(TOWER)


def change(content):
    """The same weights but for one: another file of the same form."""
    weights = torch.load(io.BytesIO(content), weights_only=True)
    weights["pos_embed"][0, 0, 0] += 1
    changed = io.BytesIO()
    torch.save(weights, changed)
    return changed.getvalue()


def test_two_files_for_one_part(fetch, web, tmp_path):
    (tmp_path / "one").write_bytes(web.files[TOWER])
    (tmp_path / "two").write_bytes(change(web.files[TOWER]))
    shown = fetch("--from", tmp_path)
    assert shown.status == 1
    assert "holds more than one file that could be tower" in shown.err
    assert web.seen == []


def test_another_file_of_the_same_form_is_told(fetch, web, tmp_path):
    """As Vicuna v1.1 in place of v0: only a digest that is known can tell."""
    assert fetch("--no-example").status == 0
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / TOWER).write_bytes(change(web.files[TOWER]))
    shown = fetch("--from", folder, "--no-example", "--out", tmp_path / "model")
    assert shown.status == 0, shown.err
    assert f"Not the published file, though of its form: tower: {TOWER}" in shown.err


def test_a_part_of_the_published_files_is_no_other_file(fetch, web, tmp_path):
    """The index comes from its host, and nothing of it is in the model."""
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(web.files["tokenizer.model"])
    shown = fetch("--from", folder, "--no-example")
    assert shown.status == 0, shown.err
    assert not web.requests_for("tokenizer.model")
    assert "Not the published file" not in shown.err


def test_where_nothing_was_downloaded_nothing_is_kept(fetch, web, tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    for name, content in golden_files("llama2").items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    (folder / "bert.json").write_bytes(web.files["bert/config.json"])
    qformer = "blip2_pretrained_flant5xxl.pth"
    (folder / qformer).write_bytes(web.files[qformer])
    shown = fetch("--from", folder)
    assert shown.status == 1
    assert "it was made for the variant without a Q-Former" in shown.err
    assert "downloaded" not in shown.err


def test_files_that_do_not_belong_together(fetch, real_minigpt4, web, cache_home):
    projection = "pretrained_minigpt4_llama2_7b.pth"
    web.files["pretrained_minigpt4_7b.pth"] = golden_files("llama2")[projection]
    shown = fetch()
    assert shown.status == 1
    assert "it was made for the variant without a Q-Former" in shown.err
    # The message is about the file itself, and says how to have it anew.
    assert f"{cache_home / 'downloads' / 'projection'}" in shown.err
    assert "minigpt4 models --delete downloads" in shown.err
    assert real_minigpt4("models").out == ""
    # A next try needs no second download but for the one that was refused.
    assert f"downloads/tower/{TOWER}" in files_of(cache_home)
    web.files["pretrained_minigpt4_7b.pth"] = golden_files("vicuna")["pretrained_minigpt4_7b.pth"]
    web.seen.clear()
    assert fetch("--no-example").status == 0
    assert not web.requests_for(TOWER)


@pytest.mark.parametrize("is_deleted", [True, False])
def test_what_a_conversion_refuses_is_no_first_arrival(fetch, real_minigpt4, web, is_deleted):
    """Rubbish that begins as weights do, once: the next fetch takes the real file."""
    right = web.files[TOWER]
    web.files[TOWER] = b"PK\x03\x04" + bytes(5000)
    shown = fetch("--no-example")
    assert shown.status == 1
    assert f"{TOWER} is " in shown.err
    if is_deleted:
        assert real_minigpt4("models", "--delete", "downloads").status == 0
    web.files[TOWER] = right
    shown = fetch("--no-example")
    assert shown.status == 0, shown.err


def test_an_error_in_place_of_weights_is_refused_at_once(fetch, web, cache_home):
    right = web.files[TOWER]
    web.files[TOWER] = '{"error": "请求过于频繁"}'.encode()
    shown = fetch("--no-example")
    assert shown.status == 1
    assert "请求过于频繁" in shown.err
    assert files_of(cache_home) == []
    web.files[TOWER] = right
    assert fetch("--no-example").status == 0


@pytest.fixture
def small_preset(web, tmp_path, monkeypatch, golden_model_dir):
    """The golden's sizes in place of those of Vicuna 7B, which the table now names."""
    config = load_config(golden_model_dir("vicuna"))
    monkeypatch.setitem(PRESETS, "vicuna-7b", config)
    write_table(web, tmp_path / "test.toml", "vicuna", "vicuna-7b", preset="vicuna-7b")
    return config


def test_another_language_model_is_refused_before_its_weights(
    fetch, small_preset, web, cache_home, monkeypatch
):
    """As Llama 2 in place of Vicuna, which is as wide."""
    longer = replace(small_preset.language, max_position_embeddings=4096)
    monkeypatch.setitem(PRESETS, "vicuna-7b", replace(small_preset, language=longer))
    shown = fetch("--no-example")
    assert shown.status == 1
    host = web.site.removeprefix("http://")
    assert (
        f"error: config.json from {host} is of another model than vicuna-7b: "
        "max_position_embeddings 2048, and vicuna-7b has max_position_embeddings 4096. Look at"
    ) in shown.err
    assert "downloads/language-model/config.json" not in files_of(cache_home)
    # Asked once, for its size.
    assert len(web.requests_for("pytorch_model-00001-of-00004.bin", "store")) == 1
    monkeypatch.setitem(PRESETS, "vicuna-7b", small_preset)
    assert fetch("--no-example").status == 0


def test_another_tower_is_refused(fetch, small_preset, real_minigpt4, cache_home, monkeypatch):
    deeper = replace(small_preset.vision, num_hidden_layers=9)
    monkeypatch.setitem(PRESETS, "vicuna-7b", replace(small_preset, vision=deeper))
    shown = fetch("--no-example")
    assert shown.status == 1
    assert "is of another model than vicuna-7b: vision num_hidden_layers " in shown.err
    assert real_minigpt4("models").out == ""
    monkeypatch.setitem(PRESETS, "vicuna-7b", small_preset)
    assert fetch("--no-example").status == 0


def test_a_page_in_place_of_weights_stops_all_at_once(fetch, web, cache_home):
    page = b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>"
    web.mishaps["pretrained_minigpt4_7b.pth"] = [Mishap(page=page)]
    shown = fetch()
    assert shown.status == 1
    assert shown.err.splitlines()[-1].startswith("error: pretrained_minigpt4_7b.pth could not be")
    assert "Google Drive - Quota exceeded" in shown.err
    # Not one byte of the large files was waited for.
    assert files_of(cache_home) == []


def test_a_full_disk_is_known_before(fetch, web, cache_home, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(2**30, 2**30 - 2**20, 2**20))
    shown = fetch()
    assert shown.status == 1
    # Downloads and model lie there at once.
    assert (
        "vicuna-7b needs 9.1 MiB there while it is made, 1.0 MiB are free and 8.1 MiB" in shown.err
    )
    assert files_of(cache_home) == []


def test_too_little_memory_is_known_before(fetch, cache_home, monkeypatch):
    monkeypatch.setattr(CpuBackend, "free_memory_bytes", lambda _: 2**30)
    shown = fetch()
    assert shown.status == 1
    assert "Converting vicuna-7b needs 1.0 GiB of memory, 1.0 GiB are free and 3.2 MiB" in shown.err
    assert files_of(cache_home) == []


def test_a_model_too_large_to_answer_here(fetch, monkeypatch):
    from minigpt4_runtime.hub.fetch_plan import FetchPlan

    monkeypatch.setattr(FetchPlan, "smallest_running_bytes", 10**15)
    shown = fetch()
    assert shown.status == 1
    assert "are missing" in shown.err
    assert "--no-example" in shown.err
    assert fetch("--no-example").status == 0


def test_where_float32_is_too_large_the_example_is_in_half(fetch, monkeypatch):
    from minigpt4_runtime.hub.fetch_plan import FetchPlan

    monkeypatch.setattr(FetchPlan, "smallest_running_bytes", 2**31)
    monkeypatch.setattr(CpuBackend, "free_memory_bytes", lambda _: 3 * 2**30)
    shown = fetch()
    assert shown.status == 0, shown.err
    assert shown.err.endswith("--model vicuna-7b --dtype float16\n")


@pytest.mark.skipif(os.name != "posix", reason="signals as Linux has them")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_nothing_that_passes_for_whole(
    fetch, real_minigpt4, web, table, cache_home, how
):
    web.mishaps[TOWER] = [Mishap(cut_after=1000), Mishap(cut_after=200_000, stalls=True)]
    process = subprocess.Popen(
        [sys.executable, "-m", "minigpt4_runtime.cli.main", "fetch", "vicuna-7b",
         "--sources", table, "--no-example"],
        stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    assert web.stalled.wait(60)
    beside = cache_home / "downloads" / "tower" / f"{TOWER}.partial"
    for _ in range(6000):
        if beside.exists() and beside.stat().st_size >= 200_000:
            break
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    if how == signal.SIGINT:
        assert err.endswith("the same command goes on from there.\n")
    assert not (cache_home / "downloads" / "tower" / TOWER).exists()
    assert real_minigpt4("models").out == ""
    shown = fetch("--no-example")
    assert shown.status == 0, shown.err
    assert "range" in web.requests_for(TOWER)[-1].headers


def test_two_at_once_do_not_get_into_each_others_way(fetch, cache_home):
    from minigpt4_runtime.hub.fetch import cache_lock

    with cache_lock():
        shown = fetch()
    assert shown.status == 1
    assert "Another `minigpt4 fetch` or `convert` is at work" in shown.err


def convert_golden(real_minigpt4, out):
    folder = GOLDENS / "llama2" / "checkpoint"
    return real_minigpt4(
        "convert", "--language", folder / "llama", "--vision", folder / TOWER,
        "--projection", folder / "pretrained_minigpt4_llama2_7b.pth", "--out", out,
    )  # fmt: skip


def test_a_conversion_into_the_cache_and_a_fetch_wait_for_each_other(
    real_minigpt4, cache_home, tmp_path
):
    """A fetch that begins would take the unfinished folder for a killed one's."""
    from minigpt4_runtime.hub.fetch import cache_lock

    inside = cache_home / "models" / "mine"
    with cache_lock():
        shown = convert_golden(real_minigpt4, inside)
        assert convert_golden(real_minigpt4, tmp_path / "elsewhere").status == 0
    assert shown.status == 1
    assert "Another `minigpt4 fetch` or `convert` is at work" in shown.err
    assert convert_golden(real_minigpt4, inside).status == 0
    assert real_minigpt4("models").out.startswith("mine\t")


@pytest.mark.skipif(os.name != "posix", reason="~user as Unix has it")
def test_where_no_cache_can_be_a_conversion_needs_none(real_minigpt4, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_HOME", "~no-such-user/home")
    assert convert_golden(real_minigpt4, tmp_path / "model").status == 0


def test_downloads_are_not_deleted_while_a_fetch_is_at_work(real_minigpt4, cache_home):
    from minigpt4_runtime.hub.fetch import cache_lock

    kept = cache_home / "downloads" / "tower" / TOWER
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"on its way")
    with cache_lock():
        shown = real_minigpt4("models", "--delete", "downloads")
    assert shown.status == 1
    assert "Another `minigpt4 fetch` or `convert` is at work" in shown.err
    assert kept.exists()
    assert real_minigpt4("models", "--delete", "downloads").status == 0
    assert not kept.exists()


def without_colours(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_bars_where_someone_sees_them(fetch, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = without_colours(fetch("--no-example").err)
    assert re.search(rf"tower/{TOWER} +[━╸]+ +[\d.]+/3\.2 MiB", shown)


def test_bars_in_a_narrow_terminal(fetch, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    shown = without_colours(fetch("--no-example").err)
    assert re.search(rf"tower/{TOWER} +[\d.]+/3\.2 MiB", shown)


def test_names_that_are_not_known(fetch, real_minigpt4, cache_home):
    shown = real_minigpt4("fetch", "vicuna-33b")
    assert (shown.status, shown.err) == (
        1,
        "error: There is no model 'vicuna-33b' to fetch; there is vicuna-7b, vicuna-13b, "
        "llama2-7b, minigpt-v2.\n",
    )
    shown = real_minigpt4("describe", PICTURE, "--model", "vicuna-13b")
    assert shown.status == 1
    assert "Run: minigpt4 fetch vicuna-13b" in shown.err


def test_the_cache_itself_is_no_model(fetch, web, cache_home):
    shown = fetch("--out", cache_home)
    assert shown.status == 1
    assert "which holds the cache" in shown.err
    assert web.seen == []


def test_a_folder_that_is_no_model_is_not_written_into(fetch, web, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    shown = fetch("--out", tmp_path / "photos")
    assert shown.status == 1
    assert "is not a model folder" in shown.err
    assert web.seen == []


def test_nothing_is_downloaded_for_a_place_in_a_file(fetch, web, tmp_path):
    (tmp_path / "file").touch()
    shown = fetch("--out", tmp_path / "file" / "model")
    assert shown.status == 1
    assert f"{tmp_path / 'file'} is no folder" in shown.err
    assert web.seen == []


def test_a_cache_that_cannot_be_written(fetch, web, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    shown = fetch()
    assert shown.status == 1
    assert "cannot be written (Not a directory). Set MINIGPT4_HOME to a folder" in shown.err
    assert "--out" not in shown.err


@pytest.mark.skipif(os.name != "posix", reason="~user as Unix has it")
def test_a_cache_in_nobodys_home(fetch, real_minigpt4, monkeypatch):
    monkeypatch.setenv("MINIGPT4_HOME", "~no-such-user/home")
    for shown in (fetch(), real_minigpt4("models")):
        assert shown.status == 1
        assert shown.err.startswith("error: The cache would be in a user's home folder")
        assert "Set MINIGPT4_HOME" in shown.err


def test_without_the_extra_it_says_what_to_install(fetch, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    shown = fetch()
    assert shown.status == 1
    assert "pip install 'minigpt4-runtime[hub]'" in shown.err
