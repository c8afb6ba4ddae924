"""Where names point, and fetching from a hub: the real client library against a hub on the loopback device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest

from fastft.config.load import load
from fastft.config.schema import Model, Source
from fastft.errors import ConfigError, FileError, HubError
from fastft.hub import locate

SAFE = {"name": "acme/safe"}
PYTHON = Path(locate.__file__).parent.parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, no FASTFT_HUB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTFT_HUB", raising=False)
    return tmp_path


def fetch(home, endpoint, *models, **variables):
    """What `locate.model` says of each model, in a process of its own (the library reads its variables on import)."""
    code = (
        "import sys, json\n"
        "from fastft.config.schema import Model\n"
        "from fastft.errors import HubError\n"
        "from fastft.hub import locate\n"
        "for model in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        folder = locate.model(Model(**model))\n"
        "        print(json.dumps({'folder': str(folder), 'files': sorted(p.name for p in folder.rglob('*'))}))\n"
        "    except HubError as error: print(json.dumps({'error': str(error)}))\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PYTHON),
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(models or [SAFE])],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=home,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return said if models else said[0]


@pytest.fixture(scope="module")
def endpoint():
    with hub_server.running() as address:
        yield address


@pytest.fixture(scope="module")
def filled(tmp_path_factory, endpoint):
    """A home whose cache holds acme/safe, and what was said when it was fetched."""
    home = tmp_path_factory.mktemp("home")
    return home, fetch(home, endpoint)


def test_safetensors_are_fetched_once_and_nothing_else(filled):
    _, first = filled
    assert first["files"] == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert (Path(first["folder"]) / "model.safetensors").read_bytes() == hub_server.WEIGHTS


def test_what_is_cached_is_not_fetched_again(filled, endpoint):
    home, first = filled
    hub_server.Hub.asked.clear()
    assert fetch(home, endpoint) == first
    assert not [asked for asked in hub_server.Hub.asked if asked.startswith("GET /acme/safe/resolve")]


def test_offline_takes_the_cache(filled):
    home, first = filled
    assert fetch(home, "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == first


def test_a_dead_hub_takes_the_cache(filled):
    home, first = filled
    assert fetch(home, f"http://127.0.0.1:{free_port()}") == first


def test_the_choice_of_files_and_revisions(tmp_path, endpoint):
    pickle, without_weights, revision = fetch(
        tmp_path, endpoint, {"name": "acme/pickle"}, {**SAFE, "init": "random"}, {**SAFE, "revision": hub_server.COMMIT}
    )
    assert pickle["files"] == ["README.md", "config.json", "pytorch_model.bin", "tokenizer.json"]
    assert without_weights["files"] == ["README.md", "config.json", "tokenizer.json"]
    assert revision["files"] == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert Path(revision["folder"]).name == hub_server.COMMIT


def test_a_failure_is_one_line_with_a_remedy(tmp_path, endpoint):
    expected = {
        ("acme/nothere", None): ["no such folder here, and none at http://127.0.0.1", "HTTP 404", "check the spelling"],
        ("acme/private", None): ["no such folder here, and none at http://127.0.0.1", "HTTP 401", "HF_TOKEN"],
        ("acme/gated", None): ["its owner restricts access; accept the terms at http://127.0.0.1"],
        ("acme/safe", "v9"): ["no revision 'v9' at http://127.0.0.1"],
        ("acme/empty", None): ["the repository holds no weights"],
    }
    models = [{"name": name, "revision": revision} for name, revision in expected]
    for (name, _), words, said in zip(expected, expected.values(), fetch(tmp_path, endpoint, *models), strict=True):
        assert said["error"].startswith(f"model {name}: ")
        assert "\n" not in said["error"]
        for word in words:
            assert word in said["error"]


def test_offline_without_the_model_is_one_line_with_a_remedy(tmp_path, endpoint):
    error = fetch(tmp_path, endpoint, HF_HUB_OFFLINE="1")["error"]
    assert error.startswith("model acme/safe: HF_HUB_OFFLINE is set and the model is not, or not wholly, in ")
    assert "\n" not in error


def test_no_network_is_one_line_with_a_remedy(tmp_path):
    address = f"http://127.0.0.1:{free_port()}"
    error = fetch(tmp_path, address)["error"]
    assert error.startswith(f"model acme/safe: {address} cannot be reached (")
    assert "set HF_ENDPOINT to a mirror, or give a folder" in error
    assert "\n" not in error


def free_port():
    """A port of the loopback device where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_folder_here_wins(here):
    for name in ("demo", "acme/safe"):
        folder = here / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert locate.model(Model(name=name)) == Path(name)
        assert locate.model(Model(name=str(folder))) == folder


def test_demo_is_the_model_in_the_package(here):
    (here / "demo").mkdir()  # a folder that is no model does not hide it
    assert locate.model(Model(name="demo")) == PYTHON / "fastft" / "demo" / "base"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nothere", "no such folder"),
        ("/nothere/at/all", r"no such folder. The folder /nothere/at does not exist either"),
        ("a/b/c", "no such folder"),
        ("./modle", r"Did you mean model\?"),
        ("model", "holds no config.json"),
        ("weights.safetensors", "this is a file"),
        ("a b/c", "not here, and no id of a hub"),
        ("acme/..", "not here, and no id of a hub"),
        ("acme/x--y", "not here, and no id of a hub"),
        ("https://user:hunter2@host/x", r"https://\*\*\*@host/x: an address cannot be given"),
    ],
)
def test_a_model_that_cannot_be_is_refused_without_network(here, name, words):
    (here / "model").mkdir()
    (here / "weights.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match=words) as caught:
        locate.model(Model(name=name))
    assert "hunter2" not in str(caught.value)


def test_data_here_wins_over_the_hub(here):
    (here / "rows.json").write_text("[]")
    (here / "tatsu-lab" / "alpaca").mkdir(parents=True)
    assert locate.dataset(Source(source="rows.json")) == Path("rows.json")
    assert locate.dataset(Source(source="tatsu-lab/alpaca")) == Path("tatsu-lab/alpaca")


def test_an_id_goes_to_the_hub_with_its_choice(here):  # noqa: ARG001  # an empty folder
    source = Source(source="shibing624/medical", subset="finetune", split="test", revision="v1")
    assert locate.dataset(source) == locate.HubDataset("shibing624/medical", "finetune", "test", "v1")


def test_demo_data_comes_with_the_package(here, monkeypatch):
    data = here / "data"
    data.mkdir()
    (data / "chat.jsonl").write_text("")
    monkeypatch.setattr(locate, "DEMO_DATA", data)
    assert locate.dataset(Source(source="demo/chat")) == data / "chat.jsonl"
    for name in ("demo/nothere", "demo/../data/chat", "demo/"):
        with pytest.raises(HubError, match=r"no such demo data; there are demo/chat, demo/text\."):
            locate.dataset(Source(source=name))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("rows.jsonl", r"no such file or folder. Did you mean rows.json\?"),
        ("./data/arxiv_data.json", "no such file or folder. The folder data does not exist either"),
        ("~/nothere/x.csv", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
    ],
)
def test_a_file_that_is_not_there_is_said(here, source, words):
    (here / "rows.json").write_text("[]")
    with pytest.raises(FileError, match=words):
        locate.dataset(Source(source=source))


@pytest.mark.parametrize("name", ["demo_lora_custom_sft", "demo_scratch_full_custom_pretrain"])
def test_the_placeholder_of_the_custom_recipes_says_what_to_set(here, name):  # noqa: ARG001
    config = load(name).config
    with pytest.raises(ConfigError, match=r"data\.train\.0\.source=my\.json"):
        locate.dataset(config.data.train[0])
    with pytest.raises(ConfigError, match=r"data\.train\.0\.source=my\.json"):
        locate.check(config)


def test_check_refuses_early_what_is_not_there(here, monkeypatch):
    (here / "my.json").write_text("[]")
    locate.check(load("demo_lora_custom_sft", ["data.train.0.source=my.json"]).config)
    locate.check(load("internlm2_7b_qlora_alpaca").config)
    with pytest.raises(FileError, match="no such file"):
        locate.check(load("demo_lora_custom_sft", ["data.train.0.source=your.json"]).config)
    with pytest.raises(HubError, match="no such folder"):
        locate.check(load("demo", ["model.name=./x", "data.train.0.source=my.json"]).config)
    monkeypatch.setenv("FASTFT_HUB", "ollama")
    with pytest.raises(HubError, match="FASTFT_HUB=ollama: no such hub; allowed are huggingface and modelscope"):
        locate.check(load("internlm2_7b_qlora_alpaca").config)


def test_without_the_package_modelscope_says_what_to_install(here, monkeypatch):  # noqa: ARG001
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(HubError, match=r"pip install fastft\[modelscope\]"):
        locate.model(Model(name="acme/x", hub="modelscope"))
