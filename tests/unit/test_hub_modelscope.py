"""Fetching from ModelScope: its real client against a hub on the loopback device."""

import os
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import modelscope_server
import pytest
from modelscope_server import Scope

from fastft.hub import locate

pytest.importorskip("modelscope_hub", reason="the extra `modelscope` is not installed")

PYTHON = Path(locate.__file__).parent.parent.parent
FILES = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture(scope="module")
def endpoint():
    with modelscope_server.running() as address:
        yield address


@pytest.fixture(autouse=True)
def _forget():
    Scope.forget()


def environment(home, endpoint, **variables):
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PYTHON),
        "HOME": str(home),
        "MODELSCOPE_CACHE": str(home / "ms"),
        "MODELSCOPE_ENDPOINT": endpoint,
        "NO_PROXY": "127.0.0.1",
        "FASTFT_HUB": "modelscope",
        **variables,
    }


def run(home, endpoint, *words, **variables):
    """Exit code, stdout and stderr of `fastft WORDS`."""
    done = subprocess.run(
        [sys.executable, "-m", "fastft", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment(home, endpoint, **variables),
        cwd=home,
        timeout=240,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def error(home, endpoint, *words, **variables):
    """The one line that it says when it fails; the client's own warnings before it are notes."""
    code, out, err = run(home, endpoint, *words, **variables)
    lines = [line for line in err.splitlines() if not line.startswith("modelscope_hub: ")]
    assert (code, out, len(lines)) == (1, "", 1), err
    return lines[0]


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def test_a_model_once_and_without_its_copies(tmp_path, endpoint):
    code, out, err = run(tmp_path, endpoint, "download", "acme/safe")
    folder = Path(out.removeprefix("acme/safe is in ").partition(" (")[0])
    assert (code, err, files(folder)) == (0, "", FILES)
    assert (folder / "model.safetensors").read_bytes() == hub_server.WEIGHTS
    Scope.forget()
    assert run(tmp_path, endpoint, "download", "acme/safe")[:2] == (0, out)
    assert not [asked for asked in Scope.asked if "FilePath=" in asked]


def test_pickles_where_there_are_no_safetensors(tmp_path, endpoint):
    assert run(tmp_path, endpoint, "download", "acme/pickle", "--to", "mine")[0] == 0
    assert files(tmp_path / "mine") == ["README.md", "config.json", "pytorch_model.bin", "tokenizer.json"]
    assert "the repository holds no weights" in error(tmp_path, endpoint, "download", "acme/empty", "--to", "none")
    assert not (tmp_path / "none").exists()


def test_a_data_set(tmp_path, endpoint):
    assert run(tmp_path, endpoint, "download", "acme/rows", "--data", "--to", "rows")[0] == 0
    assert (tmp_path / "rows/rows.jsonl").read_bytes() == hub_server.ROWS


def test_the_config_is_followed_and_fetches_what_training_needs(tmp_path, endpoint):
    code = (
        "from fastft.config.schema import Model, Source; from fastft.hub import locate;"
        "print(locate.model(Model(name='acme/safe', hub='modelscope', revision='v1', init='random')));"
        "print(locate.dataset(Source(source='acme/rows', hub='modelscope')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(tmp_path, endpoint, FASTFT_HUB=""),
        capture_output=True,
        text=True,
        check=True,
    )
    model, rows = map(Path, done.stdout.split())
    assert files(model) == ["README.md", "config.json", "tokenizer.json"]
    assert files(rows) == ["README.md", "rows.jsonl"]
    assert any("Revision=v1&FilePath=config.json" in asked for asked in Scope.asked)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path, endpoint):
    Scope.faults["acme/large"] = {"cut": 300_000}
    assert run(tmp_path, endpoint, "download", "acme/large", "--to", "mine")[0] == 0
    assert (tmp_path / "mine/model.safetensors").read_bytes() == hub_server.REPOSITORIES["acme/large"][
        "model.safetensors"
    ]
    assert "bytes=300000-" in Scope.ranges


def test_the_next_run_goes_on_where_a_killed_one_was(tmp_path, endpoint):
    Scope.faults["acme/large"] = {"cuts": 100_000}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastft", "download", "acme/large", "--to", "mine"],
        env=environment(tmp_path, endpoint),
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while time.monotonic() < until and not any(Scope.ranges):
        time.sleep(0.05)
    process.kill()
    process.wait(timeout=60)
    assert not (tmp_path / "mine").exists()
    Scope.forget()
    assert run(tmp_path, endpoint, "download", "acme/large", "--to", "mine")[0] == 0
    assert len(Scope.ranges) == 1  # the small files were whole
    assert int(str(Scope.ranges[0]).removeprefix("bytes=").rstrip("-")) >= 100_000
    assert (tmp_path / "mine/model.safetensors").read_bytes() == hub_server.REPOSITORIES["acme/large"][
        "model.safetensors"
    ]


@pytest.mark.slow  # the client waits half a minute between its tries
def test_a_connection_that_breaks_for_good_is_one_line(tmp_path, endpoint):
    Scope.faults["acme/large"] = {"cuts": 10_000}
    _, _, err = run(tmp_path, endpoint, "download", "acme/large", "--to", "mine")
    assert err.splitlines()[-1].startswith("error: model acme/large: the connection to ")
    assert err.endswith("broke off; start again, it goes on where it broke.")


def test_another_content_than_the_hub_lists_is_refused(tmp_path, endpoint):
    Scope.faults["acme/safe"] = {"flip": True}
    said = error(tmp_path, endpoint, "download", "acme/safe", "--to", "mine")
    assert "a file did not come as it is on" in said
    assert not (tmp_path / "mine").exists()
    Scope.forget()
    assert run(tmp_path, endpoint, "download", "acme/safe", "--to", "mine")[0] == 0
    assert (tmp_path / "mine/model.safetensors").read_bytes() == hub_server.WEIGHTS


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("acme/nothere", {}, "not on {} (HTTP 404); check the id (owners often differ"),
        ("acme/private", {}, "{} does not let you read it (HTTP 403)"),
        ("acme/safe", {"status": 401}, "{} does not let you read it (HTTP 401)"),
        ("acme/shardless", {}, "the repository lacks model-00002-of-00002.safetensors"),
    ],
)
def test_a_failure_is_one_line(tmp_path, endpoint, name, fault, said):
    Scope.faults[name] = fault
    assert said.format(endpoint) in error(tmp_path, endpoint, "download", name)


@pytest.mark.slow  # the client waits between its tries
@pytest.mark.parametrize(
    ("fault", "said"),
    [({"status": 429}, "(HTTP 429: too many requests)"), ({"status": 503}, "fails")],
)
def test_a_hub_that_fails_is_one_line(tmp_path, endpoint, fault, said):
    Scope.faults["acme/safe"] = fault
    assert said in error(tmp_path, endpoint, "download", "acme/safe")


def test_without_a_network_what_was_fetched_whole_will_do(tmp_path, endpoint):
    dead = "http://127.0.0.1:9"
    assert f"{dead} cannot be reached (Connection refused)" in error(tmp_path, dead, "download", "acme/safe")
    _, out, _ = run(tmp_path, endpoint, "download", "acme/safe")
    code, again, err = run(tmp_path, dead, "download", "acme/safe")
    assert (code, again) == (0, out)
    assert "ModelScope cannot be reached; taking what was fetched before" in err


def test_offline_takes_whole_models_only(tmp_path, endpoint):
    assert "FASTFT_OFFLINE is set and it is not in" in error(
        tmp_path, endpoint, "download", "acme/safe", FASTFT_OFFLINE="1"
    )
    _, out, _ = run(tmp_path, endpoint, "download", "acme/safe")
    Scope.forget()
    assert run(tmp_path, endpoint, "download", "acme/safe", FASTFT_OFFLINE="1")[:2] == (0, out)
    assert Scope.asked == []
    next((tmp_path / "ms").rglob("tokenizer.json")).unlink()
    assert "is not whole; unset it to download the rest" in error(
        tmp_path, endpoint, "download", "acme/safe", FASTFT_OFFLINE="1"
    )


def test_a_token_goes_nowhere_else(tmp_path, endpoint):
    token = "ms-01234567-89ab-cdef-0123-456789abcdef"
    said = [
        run(tmp_path, endpoint, "download", name, "--debug", MODELSCOPE_API_TOKEN=token)
        for name in ("acme/safe", "acme/private", f"{token}/x")
    ]
    said.append(run(tmp_path, "http://me:hunter2hunter2@127.0.0.1:9", "download", "acme/safe", "--debug"))
    assert any("Traceback" in err for _, _, err in said)
    for _, out, err in said:
        assert not [word for word in (token, "hunter2") if word in out or word in err]
