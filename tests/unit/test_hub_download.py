"""`fastft download` and what training fetches, when the hub or the line fails: the real client against a hub of our own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest
from hub_server import Hub

from fastft.hub import checksum, locate
from fastft.hub.checksum import Listed

PYTHON = Path(locate.__file__).parent.parent.parent
SNAPSHOT = f"hf/hub/models--acme--{{}}/snapshots/{hub_server.COMMIT}"


@pytest.fixture(scope="module")
def endpoint():
    with hub_server.running() as address:
        yield address


@pytest.fixture(autouse=True)
def _forget():
    Hub.forget()


def environment(home, endpoint, **variables):
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PYTHON),
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": endpoint,
        "NO_PROXY": "127.0.0.1",
        **variables,
    }


def run_code(home, endpoint, code):
    """A program of our own, which has changed something before it calls the command."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(home, endpoint),
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
    )


def start(home, endpoint, *words, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", "fastft", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home, endpoint, **variables),
        cwd=home,
    )


def run(home, endpoint, *words, **variables):
    """Exit code, stdout and stderr of `fastft WORDS`."""
    process = start(home, endpoint, *words, **variables)
    out, err = process.communicate(timeout=240)
    return process.returncode, out.strip(), err.strip()


def error(home, endpoint, *words, **variables):
    """The one line that it says when it fails."""
    code, out, err = run(home, endpoint, *words, **variables)
    lines = [line for line in err.splitlines() if not line.startswith("huggingface_hub: ")]
    assert (code, out, len(lines)) == (1, "", 1), err
    return lines[0]


def test_into_the_cache_where_training_finds_it(tmp_path, endpoint):
    code, out, err = run(tmp_path, endpoint, "download", "acme/safe")
    folder = tmp_path / SNAPSHOT.format("safe")
    assert (code, err) == (0, "")
    assert out == f"acme/safe is in {folder} (4 files, 0.00 MB)"
    assert (folder / "model.safetensors").read_bytes() == hub_server.WEIGHTS
    Hub.forget()
    assert run(tmp_path, endpoint, "download", "acme/safe")[0] == 0
    assert not [asked for asked in Hub.asked if "/resolve/" in asked]


def test_into_a_folder_whole_and_nothing_else(tmp_path, endpoint):
    assert run(tmp_path, endpoint, "download", "acme/safe", "--to", "models/mine")[1].startswith(
        "acme/safe is in models/mine (4 files"
    )
    assert sorted(path.name for path in (tmp_path / "models/mine").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]
    assert "exists already; choose another folder, or add --force" in error(
        tmp_path, endpoint, "download", "acme/safe", "--to", "models/mine"
    )
    assert run(tmp_path, endpoint, "download", "acme/pickle", "--to", "models/mine", "--force")[0] == 0
    assert (tmp_path / "models/mine/pytorch_model.bin").is_file()
    assert not (tmp_path / "models/mine/model.safetensors").exists()


def test_a_folder_here_comes_first(tmp_path, endpoint):
    (tmp_path / "acme/safe").mkdir(parents=True)
    (tmp_path / "acme/safe/config.json").write_text("{}")
    code, out, _ = run(tmp_path, endpoint, "download", "acme/safe")
    assert (code, Hub.asked) == (0, [])
    assert out.startswith("acme/safe is a folder on this machine")
    assert "is on this machine already" in error(tmp_path, endpoint, "download", "acme/safe", "--to", "x")


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path, endpoint):
    """The client keeps what came in pieces of 10 MiB."""
    large = {**hub_server.SIDE, "model.safetensors": hub_server.safetensors(6_500_000)}
    hub_server.REPOSITORIES["acme/broken-line"] = large
    Hub.faults["acme/broken-line"] = {"cut": 22_000_000}
    code, _, err = run(tmp_path, endpoint, "download", "acme/broken-line")
    assert code == 0
    fetched = tmp_path / SNAPSHOT.format("broken-line") / "model.safetensors"
    assert fetched.read_bytes() == large["model.safetensors"]
    assert [wanted for wanted in Hub.ranges if wanted] == [f"bytes={2 * 10 * 2**20}-"]
    assert "peer closed connection" in err  # the client says so, and goes on


def test_a_download_that_was_killed_keeps_its_whole_files_and_is_no_model(tmp_path, endpoint):
    Hub.faults["acme/large"] = {"slow_s": 0.0}
    hub_server.REPOSITORIES["acme/killed"] = dict(hub_server.REPOSITORIES["acme/large"])
    Hub.faults["acme/killed"] = {"cuts": 100_000}  # and so on until the client gives up, or is killed
    process = start(tmp_path, endpoint, "download", "acme/killed", "--to", "mine")
    until = time.monotonic() + 60
    while time.monotonic() < until and len(Hub.ranges) < 5:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "mine").exists()
    assert sorted(path.name for path in (tmp_path / ".mine.download").iterdir() if path.is_file()) == [
        "README.md",
        "config.json",
        "tokenizer.json",
    ]
    Hub.forget()
    assert run(tmp_path, endpoint, "download", "acme/killed", "--to", "mine")[0] == 0
    got = [asked for asked in Hub.asked if asked.startswith("GET") and "/resolve/" in asked]
    assert [asked.rpartition("/")[2] for asked in got] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if "mine" in path.name] == ["mine"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("to", [(), ("--to", "mine")])
def test_a_download_that_is_stopped_goes_at_once_and_keeps_whole_files(tmp_path, endpoint, to, number, code):
    """The client's threads wait for a file that does not come; nobody waits for them."""
    Hub.faults["acme/large"] = {"slow_s": 30, "slow_bytes": hub_server.LFS_BYTES}
    folder = tmp_path / (".mine.download" if to else SNAPSHOT.format("large"))
    process = start(tmp_path, endpoint, "download", "acme/large", *to)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (
        {path.name for path in folder.glob("*")} >= set(hub_server.SIDE)
        and any(asked.startswith("GET") and asked.endswith("model.safetensors") for asked in Hub.asked)
    ):
        time.sleep(0.05)
    process.send_signal(number)
    sent_at = time.monotonic()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (code, "", "stopped\n")
    assert time.monotonic() - sent_at < 10
    assert [path.name for path in tmp_path.iterdir() if "mine" in path.name] == ([".mine.download"] if to else [])
    Hub.forget()
    assert run(tmp_path, endpoint, "download", "acme/large", *to)[0] == 0
    got = [asked for asked in Hub.asked if asked.startswith("GET") and "/resolve/" in asked]
    assert [asked.rpartition("/")[2] for asked in got] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if "mine" in path.name] == (["mine"] if to else [])


def test_a_disk_that_fails_at_the_end_costs_no_download(tmp_path, endpoint):
    code = (
        "import errno, sys\n"
        "from fastft import publish\n"
        "def refuse(folder): raise OSError(errno.EIO, 'Input/output error', str(folder))\n"
        "publish.flush = refuse\n"
        "from fastft.__main__ import main\n"
        "sys.exit(main(['download', 'acme/safe', '--to', 'mine']))\n"
    )
    done = run_code(tmp_path, endpoint, code)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: cannot write {tmp_path}/.mine.download: Input/output error; ")
    assert [path.name for path in tmp_path.iterdir() if "mine" in path.name] == [".mine.download"]
    Hub.forget()
    assert run(tmp_path, endpoint, "download", "acme/safe", "--to", "mine")[0] == 0
    assert not [asked for asked in Hub.asked if asked.startswith("GET") and "/resolve/" in asked]


def test_a_half_fetched_model_in_the_cache_is_not_taken_for_a_whole_one(tmp_path, endpoint):
    assert run(tmp_path, endpoint, "download", "acme/safe")[0] == 0
    weights = tmp_path / SNAPSHOT.format("safe") / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    said = error(tmp_path, endpoint, "download", "acme/safe", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set and the model is not, or not wholly, in" in said


@pytest.mark.parametrize("to", [(), ("--to", "mine")])
def test_another_content_than_the_hub_lists_is_refused_and_removed(tmp_path, endpoint, to):
    Hub.faults["acme/safe"] = {"flip": True}
    said = error(tmp_path, endpoint, "download", "acme/safe", *to)
    assert "did not come as it is on the hub (" in said
    assert "and was removed, and 3 more files likewise; start again" in said
    assert not (tmp_path / "mine").exists()
    Hub.forget()
    code, _, _ = run(tmp_path, endpoint, "download", "acme/safe", *to)
    folder = tmp_path / "mine" if to else tmp_path / SNAPSHOT.format("safe")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (code, files) == (0, {name: hub_server.REPOSITORIES["acme/safe"][name] for name in files})


def test_checksums_are_git_ids_and_sha256(tmp_path):
    """Known values: `git hash-object` and `sha256sum` of the same bytes."""
    file = tmp_path / "x"
    file.write_bytes(b"hello\n")
    git, sha256 = "ce013625030ba8dba906f756967f9e9ca394464a", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"  # fmt: skip
    assert checksum.complaint(file, Listed("x", 6, git)) is None
    assert checksum.complaint(file, Listed("x", 6, sha256)) is None
    assert checksum.complaint(file, Listed("x", None, None)) is None
    assert checksum.complaint(file, Listed("x", 7, git)) == "6 bytes came, the hub lists 7"
    assert "SHA-256 5891b5b522d5... came" in str(checksum.complaint(file, Listed("x", 6, "0" * 64)))
    assert "git id ce013625030b... came" in str(checksum.complaint(file, Listed("x", 6, "0" * 40)))


def test_two_at_once_fetch_one_model(tmp_path, endpoint):
    Hub.faults["acme/large"] = {"slow_s": 0.3}
    pair = [start(tmp_path, endpoint, "download", "acme/large") for _ in range(2)]
    ends = [(process.communicate(timeout=120), process.returncode) for process in pair]
    assert [code for _, code in ends] == [0, 0], ends
    folder = tmp_path / SNAPSHOT.format("large")
    assert (folder / "model.safetensors").read_bytes() == hub_server.REPOSITORIES["acme/large"]["model.safetensors"]


def test_two_at_once_into_one_folder_one_waits_its_turn(tmp_path, endpoint):
    Hub.faults["acme/large"] = {"slow_s": 1.5}
    pair = [start(tmp_path, endpoint, "download", "acme/large", "--to", "mine") for _ in range(2)]
    ends = [(*process.communicate(timeout=120), process.returncode) for process in pair]
    assert sorted(code for *_, code in ends) == [0, 1], ends
    assert "another process is writing" in next(err for _, err, code in ends if code)
    assert (tmp_path / "mine/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("acme/nothere", {}, "none at {} that you may read (HTTP 404); check the spelling"),
        ("acme/private", {}, "none at {} that you may read (HTTP 401)"),
        ("acme/gated", {}, "its owner restricts access; accept the terms at {}/acme/gated, then log in"),
        ("acme/safe", {"status": 429}, "{} answers no more for now (HTTP 429: too many requests)"),
        ("acme/safe", {"status": 500}, "{} fails (HTTP 500) and the model is not, or not wholly, in"),
        ("acme/safe", {"status": 503}, "{} fails (HTTP 503) and the model is not, or not wholly, in"),
        ("acme/safe", {"file_status": 500}, "{} fails (HTTP 500); start again later, what is complete is kept."),
        ("acme/shardless", {}, "the repository lacks model-00002-of-00002.safetensors that its index names"),
        ("acme/broken-weights", {}, "not a whole model: "),
    ],
)
def test_a_failure_is_one_line(tmp_path, endpoint, name, fault, said):
    Hub.faults[name] = fault
    assert f"error: model {name}: " in (line := error(tmp_path, endpoint, "download", name))
    assert said.format(endpoint) in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("acme/nothere", "data set acme/nothere: no such folder here, and none at"),
        ("acme/gated", "data set acme/gated: its owner restricts access; accept the terms at"),
    ],
)
def test_a_data_set_that_fails_is_one_line(tmp_path, endpoint, name, said):
    assert said in error(tmp_path, endpoint, "download", name, "--data")


def test_data_goes_where_training_looks_for_it_or_into_a_folder(tmp_path, endpoint):
    code, out, _ = run(tmp_path, endpoint, "download", "acme/rows", "--data")
    assert (code, out) == (0, "acme/rows/train is in the cache of `datasets` (1 rows)")
    assert run(tmp_path, endpoint, "download", "acme/rows", "--data", "--to", "rows")[0] == 0
    assert (tmp_path / "rows/rows.jsonl").read_bytes() == hub_server.ROWS
    line = error(tmp_path, endpoint, "download", "acme/rows", "--data", "--split", "test")
    assert line.startswith("error: data set acme/rows/test: Unknown split")


def test_words_that_do_not_go_together_are_wrong_use(tmp_path, endpoint):
    for words in (("--split", "test"), ("--data", "--to", "x", "--subset", "y")):
        code, _, err = run(tmp_path, endpoint, "download", "acme/rows", *words)
        assert (code, err.startswith("error: download: ")) == (2, True)


def test_no_network_is_one_line(tmp_path):
    line = error(tmp_path, "http://127.0.0.1:9", "download", "acme/safe")
    assert "http://127.0.0.1:9 cannot be reached (" in line
    assert "set HF_ENDPOINT to a mirror, or give a folder" in line


def test_offline_asks_nobody(tmp_path, endpoint):
    assert run(tmp_path, endpoint, "download", "acme/safe")[0] == 0
    Hub.forget()
    assert run(tmp_path, endpoint, "download", "acme/safe", FASTFT_OFFLINE="1")[0] == 0
    assert "FASTFT_OFFLINE is set and the model is not" in error(
        tmp_path, endpoint, "download", "acme/large", FASTFT_OFFLINE="1"
    )
    assert Hub.asked == []


def test_a_full_disk_is_said_before_the_first_byte(tmp_path, endpoint):
    code = (
        "import shutil, sys\n"
        "shutil.disk_usage = lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000)\n"
        "from fastft.__main__ import main\n"
        "sys.exit(main(['download', 'acme/large']))\n"
    )
    done = run_code(tmp_path, endpoint, code)
    assert done.returncode == 1
    assert done.stderr.startswith("error: model acme/large: ")
    assert "1.00 MB are needed, 1,000 bytes are free" in done.stderr
    assert not [asked for asked in Hub.asked if "/resolve/" in asked]


@pytest.mark.parametrize("to", [(), ("--to", "mine")])
def test_a_disk_that_fills_up_meanwhile_is_said_as_such(tmp_path, endpoint, to):
    """The library's own step that puts a file in place fails as it does on a full disk."""
    code = (
        "import sys, errno\n"
        "import huggingface_hub.file_download as hub\n"
        "hub._chmod_and_move = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device'))\n"
        "from fastft.__main__ import main\n"
        "sys.exit(main(['download', 'acme/safe', *sys.argv[1:]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *to],
        env=environment(tmp_path, endpoint),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (1, "")
    place = f"make room at {tmp_path}, or choose" if to else f"free space at {tmp_path}/hf/hub, or set HF_HOME"
    assert done.stderr.startswith(f"error: model acme/safe: the disk is full; {place} ")
    assert done.stderr.count("\n") == 1


def test_what_came_before_a_kill_is_checked_by_the_next_run(tmp_path, endpoint):
    """The first run is killed between the download and the check of a file that came changed."""
    code = (
        "import os, sys\n"
        "from fastft.hub import huggingface\n"
        "huggingface._check = lambda *_: os._exit(9)\n"
        "from fastft.__main__ import main\n"
        "sys.exit(main(['download', 'acme/safe']))\n"
    )
    Hub.faults["acme/safe"] = {"flip": True}
    killed = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path, endpoint), check=False, cwd=tmp_path
    )
    assert killed.returncode == 9
    Hub.forget()
    assert "did not come as it is on the hub" in error(tmp_path, endpoint, "download", "acme/safe")
    assert run(tmp_path, endpoint, "download", "acme/safe")[0] == 0
    assert (tmp_path / SNAPSHOT.format("safe") / "model.safetensors").read_bytes() == hub_server.WEIGHTS
    assert not (tmp_path / "hf/hub/models--acme--safe/.fastft_unchecked").exists()


def test_the_revision_is_pinned(tmp_path, endpoint):
    assert run(tmp_path, endpoint, "download", "acme/safe", "--revision", hub_server.COMMIT)[0] == 0
    line = error(tmp_path, endpoint, "download", "acme/safe", "--revision", "v9")
    assert f"no revision 'v9' at {endpoint}" in line


TOKEN = "hf_" + "abcdefghij0123456789"


def test_a_token_goes_to_the_hub_and_nowhere_else(tmp_path, endpoint):
    secret = {"HF_TOKEN": TOKEN}
    said = [
        run(tmp_path, endpoint, "download", "acme/safe", **secret),
        run(tmp_path, endpoint, "download", "acme/private", "--debug", **secret),
        run(tmp_path, endpoint, "download", "acme/nothere", "--data", "--debug", **secret),
        run(tmp_path, endpoint, "download", TOKEN + "/x", "--debug", **secret),
        run(tmp_path, endpoint.replace("http://", "http://me:hunter2hunter2@"), "download", "acme/nothere", "--debug", **secret),
        run(tmp_path, "http://me:hunter2hunter2@127.0.0.1:9", "download", "acme/safe", "--debug", **secret),
        run(tmp_path, endpoint, "config", "show", "demo", f"model.name=https://me:{TOKEN}@host/x", **secret),
        run(tmp_path, endpoint, "train", "demo", f"data.train.0.source=a/{TOKEN}/x", "--debug", **secret),
    ]  # fmt: skip
    assert TOKEN in Hub.tokens
    assert any("Traceback" in err for _, _, err in said)
    for _, out, err in said:
        for text in (out, err):
            assert TOKEN not in text
            assert "hunter2" not in text
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]


def test_the_config_and_the_variable_choose_the_hub(tmp_path, endpoint):
    _, _, err = run(tmp_path, endpoint, "download", "acme/safe", FASTFT_HUB="ollama")
    assert err == "error: FASTFT_HUB=ollama: no such hub; allowed are huggingface and modelscope."
    code = (
        "import json, sys; from fastft.config.schema import Model; from fastft.hub import locate;"
        "print(json.dumps(str(locate.model(Model(name='acme/safe', hub='modelscope')))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path, endpoint, FASTFT_HUB="huggingface"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == str(tmp_path / SNAPSHOT.format("safe"))
