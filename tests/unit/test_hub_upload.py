"""`fastft upload`: what is sent, what is refused, and the sending through both real clients to hubs of our own."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hub_server
import modelscope_server
import pytest
from hub_server import Hub
from modelscope_server import Scope
from ruamel.yaml import YAML

from fastft.__main__ import main
from fastft.config import load, show
from fastft.errors import FastftError
from fastft.hub import card, locate, push

PYTHON = Path(locate.__file__).parent.parent.parent
TOKEN = "hf_" + "abcdefghij0123456789"
MS_TOKEN = "ms-01234567-89ab-cdef-0123-456789abcdef"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
BASE = "acme/base-1b"


@pytest.fixture(scope="module")
def endpoint():
    with hub_server.running() as address:
        yield address


@pytest.fixture(scope="module")
def scope():
    with modelscope_server.running() as address:
        yield address


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    Hub.forget()
    Scope.forget()
    monkeypatch.delenv("FASTFT_HUB", raising=False)


@pytest.fixture
def run_folder(tmp_path):
    """A run folder as a training leaves it, whose base lies in a folder with a card of its own."""
    base = tmp_path / "cache" / "base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\n")
    run = tmp_path / "work_dirs" / "robin"
    (run / "adapter").mkdir(parents=True)
    (run / "checkpoint-4").mkdir()
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"x")
    (run / "log.txt").write_text("private")
    (run / "samples.jsonl").write_text("{}\n")
    (run / "loss.png").write_bytes(PNG)
    metrics = [{"step": 1, "loss": 2.5}, {"step": 4, "loss": 1.25}, {"step": 4, "eval_loss": 1.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    words = [f"model.name={BASE}", "data.train.0.source=acme/rows", "train.max_steps=4", "output.dir=work_dirs/robin"]
    (run / "config.yaml").write_text(show.flat_yaml(load.load("demo_qlora_custom_sft", words).config))
    record = {
        "fastft": "0.1.0", "task": "sft", "method": "qlora", "data": {"rows": 12, "tokens": 3456, "processes": 2},
        "base": {"name": BASE, "folder": str(base), "revision": None}, "quantization": {"type": "nf4"},
        "versions": {"torch": "2.11.0"},
    }  # fmt: skip
    for folder in (run, run / "adapter"):
        (folder / "fastft_training.json").write_text(json.dumps(record))
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}  # fmt: skip
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(hub_server.safetensors())
    (run / "adapter" / "tokenizer.json").write_text("{}")
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    return run


SENT = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "fastft_training.json",
    "loss.png", "tokenizer.json",
]  # fmt: skip


def front_matter(text):
    return YAML(typ="safe").load(text.split("---\n")[1])


def test_of_a_run_the_result_is_sent_without_this_machine(run_folder, tmp_path):
    upload = push.plan(run_folder, "me/robin")
    assert (upload.kind, [item.name for item in upload.items], upload.notes) == ("adapter", SENT, ())
    for item in upload.items:
        assert str(tmp_path).encode() not in item.content(), item.name
    sent = {item.name: item.content() for item in upload.items}
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(sent["fastft_training.json"])["base"] == {"name": BASE, "revision": None}
    assert sent["loss.png"] == PNG


def test_the_card_says_what_it_was_made_from(run_folder):
    upload = push.plan(run_folder, "me/robin")
    assert front_matter(upload.card) == {
        "base_model": BASE,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["fastft", "qlora", "sft"],
        "datasets": ["acme/rows"],
    }
    for words in (
        f"A QLoRA adapter for [{BASE}](https://huggingface.co/{BASE}): instruction tuning (SFT), made with fastft 0.1.0.",
        "- [acme/rows](https://huggingface.co/datasets/acme/rows) (split train)",
        "12 packed rows of at most 2,048 tokens, 3,456 tokens.",
        "| rank | 8 |",
        "| base held in | 4 bit (nf4) |",
        "Loss per learned token: 2.500 at step 1, 1.250 at step 4.",
        "Loss on held-back data: 1.500 at step 4.",
        "![loss](loss.png)",
        "licence is `apache-2.0`",
        f"convert merge {BASE} adapter merged",
    ):
        assert words in upload.card, words


def test_modules_are_named_once(run_folder):
    """Adapters onto InternLM2's files name each layer's: hundreds of them."""
    file = run_folder / "adapter/adapter_config.json"
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(32) for name in ("v_proj", "q_proj")]
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": names}))
    assert "| modules | q_proj, v_proj |" in push.plan(run_folder, "me/robin").card


def test_rows_of_a_step_count_all_processes(run_folder):
    config = load.load(str(run_folder / "config.yaml")).config
    rows = config.train.batch_size * config.train.grad_accumulation * 2
    assert f"| rows per step | {rows} |" in push.plan(run_folder, "me/robin").card


def test_own_data_and_an_unknown_licence_are_said_without_names(run_folder, tmp_path):
    own = tmp_path / "letters_of_my_patients.jsonl"
    own.write_text("{}")
    (tmp_path / "cache/base/README.md").unlink()
    config = load.load(str(run_folder / "config.yaml"), [f"data.train.0.source={own}"]).config
    (run_folder / "config.yaml").write_text(show.flat_yaml(config))
    upload = push.plan(run_folder, "me/robin")
    assert "- a data set of the author's, not published" in upload.card
    assert "patients" not in "".join(item.content().decode(errors="replace") for item in upload.items)
    assert "datasets" not in front_matter(upload.card)
    assert "license" not in front_matter(upload.card)
    assert "was not found by the program that wrote this card" in upload.card
    assert upload.notes == ("the base's licence is not known; the card says so",)


def test_a_base_in_a_folder_needs_its_id(run_folder, tmp_path):
    for file in (run_folder / "fastft_training.json", run_folder / "adapter/fastft_training.json"):
        record = json.loads(file.read_text())
        record["base"]["name"] = str(tmp_path / "cache/base")
        file.write_text(json.dumps(record))
    config = load.load(str(run_folder / "config.yaml"), [f"model.name={tmp_path}/cache/base"]).config
    (run_folder / "config.yaml").write_text(show.flat_yaml(config))
    upload = push.plan(run_folder, "me/robin")
    assert "the base is known only as `base`; say with --base OWNER/NAME which model others need" in upload.notes
    assert "base_model" not in front_matter(upload.card)
    assert str(tmp_path) not in upload.card
    named = push.plan(run_folder, "me/robin", base=BASE)
    assert front_matter(named.card)["base_model"] == BASE
    assert (
        json.loads({i.name: i for i in named.items}["adapter_config.json"].content())["base_model_name_or_path"] == BASE
    )


def test_an_adapter_and_a_model_by_themselves(run_folder, tmp_path):
    adapter = Path(shutil.copytree(run_folder / "adapter", tmp_path / "alone"))
    upload = push.plan(adapter, "me/robin")
    assert [item.name for item in upload.items] == [name for name in SENT if name != "loss.png"]
    assert "## Result" not in upload.card
    (adapter / "fastft_training.json").unlink()
    assert "A LoRA adapter for" in push.plan(adapter, "me/robin", base=BASE).card
    model = tmp_path / "merged"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": str(tmp_path)}))
    (model / "model.safetensors").write_bytes(hub_server.WEIGHTS)
    upload = push.plan(model, "me/robin", base=BASE)
    assert (upload.kind, [item.name for item in upload.items]) == (
        "model",
        ["README.md", "config.json", "model.safetensors"],
    )
    assert front_matter(upload.card)["library_name"] == "transformers"
    assert str(tmp_path).encode() not in upload.items[1].content()


def test_no_text_breaks_out_of_the_front_matter(run_folder):
    about = card.read_about(run_folder / "adapter", run_folder, "adapter", "me/robin", None)
    hostile = card.About(**{**vars(about), "licence": 'x"\n---\nbase_model: evil', "base_id": 'a/b"\nevil: 1'})
    assert set(front_matter(card.text(hostile))) == set(front_matter(card.text(about)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: shutil.rmtree(run / "adapter"), "this run has no result yet; go on with"),
        (lambda run: (run / "adapter/adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda run: (run / "adapter/adapter_model.safetensors").write_bytes(hub_server.WEIGHTS[:-4]), "not a whole result"),
        (lambda run: (run / "adapter/training_args.bin").write_bytes(b"x"), "is a pickle, which may hold code"),
        (lambda run: (run / "adapter/diary.docx").write_bytes(b"x"), "is no part of a model (diary.docx)"),
        (lambda run: (run / "adapter/.env").write_text("x"), "is no part of a model (.env)"),
        (lambda run: (run / "adapter/.git").mkdir(), "is no part of a model; move it away"),
        (lambda run: (run / "adapter/x.json").symlink_to("/etc/passwd"), "is a link; upload a folder of plain files"),
        (lambda run: (run / "adapter/note.txt").write_text(f"key: {TOKEN}"), "note.txt holds what looks like a token"),
        (lambda run: (run / "adapter/note.txt").write_text("https://me:secret@host/x"), "looks like a token or a password"),
        (lambda run: (run / "adapter/tokenizer.json").write_text("of-the-environment"), "tokenizer.json holds what looks"),
        (lambda run: (run / "metrics.jsonl").write_text("{"), "metrics.jsonl of the run is broken"),
        (lambda run: (run / "config.yaml").write_text("task: x"), "config.yaml of the run cannot be read"),
        (lambda run: (run / "adapter/adapter_config.json").write_text("[]"), "adapter_config.json"),
    ],
)  # fmt: skip
def test_what_must_not_leave_is_refused(run_folder, monkeypatch, change, said):
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    change(run_folder)
    with pytest.raises(FastftError) as caught:
        push.plan(run_folder, "me/robin")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("nothere", "no such folder; give a run's folder"),
        ("file", "is a file; give a run's folder"),
        ("empty", "neither a run with a result, nor an adapter (adapter_config.json), nor a model (config.json)"),
        (".mine.partial-0a1b2c3d", "is what a broken-off run has left"),
        (".mine.download", "is what a broken-off run has left"),
        ("checkpoint-4", "is a checkpoint of a training; upload its result"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, folder, said):
    for name in ("empty", ".mine.partial-0a1b2c3d", ".mine.download", "checkpoint-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FastftError) as caught:
        push.plan(tmp_path / folder, "me/robin")
    assert said in str(caught.value)


def test_without_yes_nothing_is_sent_and_the_card_is_shown(run_folder, capsys, monkeypatch):
    monkeypatch.setattr("socket.create_connection", lambda *_: pytest.fail("asks the network"))
    assert main(["upload", str(run_folder), "me/robin", "--private", "--revision", "v1"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("adapter to me/robin on huggingface (private, branch v1): 7 files, ")
    assert "  adapter_model.safetensors" in said.out
    assert "# robin\n" in said.out
    assert said.err == "nothing was sent; add --yes to send it\n"


def test_the_owner_must_be_named(run_folder, capsys):
    assert main(["upload", str(run_folder), "robin"]) == 1
    assert capsys.readouterr().err == "error: upload robin: the owner is missing; give OWNER/NAME\n"


CHATTY = (
    "import sys; from fastft import console; console.PLAIN_LINE_EVERY_S = 0.0;"
    "from fastft.__main__ import main; sys.exit(main(sys.argv[1:]))"
)


def upload(run_folder, *words, chatty=False, **variables):
    """Exit code, stdout and stderr of `fastft upload RUN me/robin WORDS`; chatty: a line whenever there is progress."""
    home = run_folder.parent.parent
    program = ["-c", CHATTY] if chatty else ["-m", "fastft"]
    done = subprocess.run(
        [sys.executable, *program, "upload", str(run_folder), "me/robin", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        timeout=240,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(PYTHON),
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "MODELSCOPE_CACHE": str(home / "ms"),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1",  # the hub's chunk store is not played here; LFS is
            **variables,
        },
    )
    return done.returncode, done.stdout, done.stderr


def test_it_arrives_in_one_commit(run_folder, endpoint):
    expected = {item.name: item.content() for item in push.plan(run_folder, "me/robin").items}
    code, out, err = upload(run_folder, "--yes", "--private", HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    assert code == 0, err
    assert out.splitlines()[-1] == f"sent: {endpoint}/me/robin/commit/{hub_server.COMMIT}"
    assert Hub.written["me/robin"]["main"] == expected
    assert len([asked for asked in Hub.asked if "/commit/" in asked]) == 1
    assert Hub.created[0].get("private") is True or Hub.created[0].get("visibility") == "private"
    assert {TOKEN} == Hub.tokens
    assert TOKEN not in out + err
    # Once more, onto a branch: the repository is there already.
    code, _, err = upload(run_folder, "--yes", "--revision", "v2", HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    assert code == 0, err
    assert Hub.written["me/robin"]["v2"] == expected


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            {"status": 401},
            "does not know you (HTTP 401); log in with `hf auth login` or set HF_TOKEN, with a token that",
        ),
        ({"status": 403}, "your token may not write there (HTTP 403)"),
        ({"commit_status": 412}, "the repository changed meanwhile (HTTP 412); upload again."),
        ({"commit_status": 507}, "fails (HTTP 507)"),
        ({"put_status": 403}, "your token may not write there (HTTP 403)"),
    ],
)
def test_a_hub_that_refuses_is_one_line(run_folder, endpoint, fault, said):
    Hub.faults["me/robin"] = fault
    code, _, err = upload(run_folder, "--yes", HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    lines = [line for line in err.splitlines() if not line.startswith(("sending ", "huggingface_hub: "))]
    assert (code, len(lines)) == (1, 1), err
    assert lines[0].startswith("error: upload me/robin: ")
    assert said in lines[0]


def test_without_a_token_or_a_network_it_is_one_line(run_folder, endpoint):
    Hub.faults["me/robin"] = {"status": 401}
    assert "does not know you" in upload(run_folder, "--yes", HF_ENDPOINT=endpoint)[2]
    assert "cannot be reached (" in upload(run_folder, "--yes", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN)[2]
    assert "unset it to upload" in upload(run_folder, "--yes", HF_ENDPOINT=endpoint, FASTFT_OFFLINE="1")[2]


def test_it_arrives_on_modelscope(run_folder, scope):
    pytest.importorskip("modelscope_hub", reason="the extra `modelscope` is not installed")
    expected = {item.name: item.content() for item in push.plan(run_folder, "me/robin", hub="modelscope").items}
    words = ("--yes", "--hub", "modelscope", "--private")
    code, out, err = upload(run_folder, *words, MODELSCOPE_ENDPOINT=scope, MODELSCOPE_API_TOKEN=MS_TOKEN)
    assert code == 0, err
    assert out.splitlines()[-1] == f"sent: {scope}/models/me/robin"
    assert Scope.written["me/robin@master"] == expected
    assert MS_TOKEN not in out + err
    assert b"frameworks" in expected["README.md"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_upload_leaves_no_scratch_folder(tmp_path, number, code):
    """ModelScope's client takes a folder; ours is of links, and is removed though nothing waits for the client's threads."""
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from fastft import stop\n"
        "from fastft.hub import modelscope_push\n"
        "stop.listen()\n"
        "with modelscope_push._scratch() as scratch:\n"
        "    (scratch / 'files').mkdir()\n"
        "    (scratch / 'files/x').write_text('x')\n"
        "    assert list(Path(sys.argv[1]).iterdir()) == [scratch]\n"
        "    os.kill(os.getpid(), int(sys.argv[2]))\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path, str(int(number))],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(PYTHON)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (code, "stopped\n")
    assert list(tmp_path.iterdir()) == []


def grown(run_folder):
    """The run with an adapter of two million bytes, which is sent outside of the commit."""
    (run_folder / "adapter/adapter_model.safetensors").write_bytes(hub_server.safetensors(500_000))
    return run_folder


def test_progress_is_said_in_plain_lines_where_there_is_no_terminal(run_folder, endpoint):
    expected = {item.name: item.content() for item in push.plan(grown(run_folder), "me/robin").items}
    code, _, err = upload(run_folder, "--yes", chatty=True, HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    assert code == 0, err
    assert Hub.written["me/robin"]["main"] == expected
    assert len([asked for asked in Hub.asked if "/commit/" in asked]) == 1
    assert len([asked for asked in Hub.asked if asked.startswith("PUT ")]) == len(Hub.objects)  # nothing twice
    lines = [line for line in err.splitlines() if line.startswith("sending to me/robin: ")]
    assert any(line.endswith(" adapter_model.safetensors") for line in lines)
    assert lines[-1].startswith("sending to me/robin: 2/2 MB, ")
    assert "\r" not in err
    assert "%" not in err  # no bar of the client's


def test_a_large_file_that_is_refused_is_one_line(run_folder, endpoint):
    """The client wraps what happened to one file into an error of its own."""
    Hub.faults["me/robin"] = {"put_status": 403}
    code, _, err = upload(grown(run_folder), "--yes", HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    assert (code, err.splitlines()[-1].partition(";")[0]) == (
        1,
        "error: upload me/robin: your token may not write there (HTTP 403)",
    )
    assert not [asked for asked in Hub.asked if "/commit/" in asked]


def test_progress_on_modelscope(run_folder, scope):
    pytest.importorskip("modelscope_hub", reason="the extra `modelscope` is not installed")
    expected = {item.name: item.content() for item in push.plan(grown(run_folder), "me/robin", hub="modelscope").items}
    words = ("--yes", "--hub", "modelscope")
    code, _, err = upload(run_folder, *words, chatty=True, MODELSCOPE_ENDPOINT=scope, MODELSCOPE_API_TOKEN=MS_TOKEN)
    assert code == 0, err
    assert Scope.written["me/robin@master"] == expected
    lines = [line for line in err.splitlines() if line.startswith("sending to me/robin: ")]
    assert lines[-1].startswith("sending to me/robin: 2/2 MB, ")
    assert "\r" not in err
    assert "%" not in err


def test_a_branch_of_modelscope(run_folder, scope):
    """Its client makes none: one that is there is written to, another one is refused before anything is made."""
    pytest.importorskip("modelscope_hub", reason="the extra `modelscope` is not installed")
    expected = {item.name: item.content() for item in push.plan(run_folder, "me/robin", hub="modelscope").items}
    words = ("--yes", "--hub", "modelscope", "--revision")
    variables = {"MODELSCOPE_ENDPOINT": scope, "MODELSCOPE_API_TOKEN": MS_TOKEN}
    code, _, err = upload(run_folder, *words, "v1", **variables)
    assert code == 1
    assert "there is no branch 'v1' (master), and ModelScope makes branches on its website only" in err.splitlines()[-1]
    assert Scope.created == []
    Scope.written["me/robin@master"] = {"README.md": b"# robin"}
    Scope.branches.append("v1")
    code, out, err = upload(run_folder, *words, "v1", **variables)
    assert code == 0, err
    assert out.splitlines()[-1] == f"sent: {scope}/models/me/robin"
    assert Scope.written["me/robin@v1"] == expected
    assert Scope.written["me/robin@master"] == {"README.md": b"# robin"}
    code, _, err = upload(run_folder, *words, "v0", **variables)  # a tag
    assert code == 1
    assert "there is no branch 'v0' (master, v1)" in err
