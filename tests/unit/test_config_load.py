"""Config files, recipes and overrides to a Config; and what is said about each mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastft.config import schema
from fastft.config.load import load
from fastft.errors import ConfigError, FileError

WHOLE = """\
model:
  name: some/model
method:
  kind: lora
data:
  train:
    - source: rows.json
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a config file; complaints name it as the user does, by a relative path."""
    monkeypatch.chdir(tmp_path)

    def write_file(text, name="my.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write_file


def complaints(name, *words):
    with pytest.raises(ConfigError) as caught:
        load(name, words)
    return str(caught.value).splitlines()


def test_a_file_becomes_a_config_with_origins(write):
    loaded = load(write(WHOLE))
    config = loaded.config
    assert (config.name, config.task, config.output.dir) == ("my", "sft", "work_dirs/my")
    assert config.method.lora is not None
    assert config.method.lora.r == 64
    assert str(loaded.path) == "my.yaml"
    assert loaded.origin["model.name"] == "my.yaml:2"
    assert loaded.origin["data.train.0.source"] == "my.yaml:7"
    assert loaded.origin["train.lr"] == "default"
    assert loaded.origin["method.quantization"] == "default"


def test_every_value_has_an_origin(write):
    loaded = load(write(WHOLE), ["train.lr=1e-5", "samples.prompts=[a, b]"])
    assert loaded.origin["train.lr"] == loaded.origin["samples.prompts"] == "override"
    assert all(loaded.origin.values())
    assert {"train.seed", "data.train.0.split", "method.lora.targets", "output.keep"} <= loaded.origin.keys()


def test_an_override_reaches_the_value_where_it_is_used(write):
    file = write(WHOLE)
    words = [
        "train.lr=1e-5",
        "data.train.0.source=other.json",
        "data.train.1.source=b.csv",
        "samples.prompts=[a, 'b: c']",
    ]
    config = load(file, words).config
    assert config.train.lr == 1e-5
    assert [source.source for source in config.data.train] == ["other.json", "b.csv"]
    assert config.samples.prompts == ("a", "b: c")


def test_later_overrides_win_and_mappings_are_joined(write):
    config = load(write(WHOLE), ["train.lr=1", "train={lr: 2, epochs: 7}", "train.epochs=0.5"]).config
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (2, 0.5, 1)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("12345", "12345"),
        ("0x1F", "0x1F"),
        ("1e5", "1e5"),
        ("true", "true"),
        ("a: b", "a: b"),
        ("[x", "[x"),
        ("a # b", "a # b"),
        ("'12'", "12"),
        ('"a\\tb"', "a\tb"),
        ("C:\\models\\x", "C:\\models\\x"),
        ("k=v", "k=v"),
    ],
)
def test_text_stays_text_in_an_override(write, word, value):
    assert load(write(WHOLE), [f"model.name={word}"]).config.model.name == value


def test_text_stays_text_in_a_file(write):
    file = write(
        WHOLE.replace("some/model", "0123") + "samples: {prompts: [1, 2.50, on, true]}\noutput: {dir: 2020-01-01}\n"
    )
    config = load(file).config
    assert config.model.name == "0123"
    assert config.samples.prompts == ("1", "2.50", "on", "true")
    assert config.output.dir == "2020-01-01"


def test_null_is_null_where_it_is_allowed(write):
    config = load(write(WHOLE), ["output.save_steps=null", "model.revision=null", "samples.system="]).config
    assert (config.output.save_steps, config.model.revision, config.samples.system) == (None, None, None)


def test_the_run_folder_follows_the_name(write):
    file = write(WHOLE)
    assert load(file, ["name=other"]).config.output.dir == "work_dirs/other"
    assert load(file, ["name=other", "output.dir=here"]).config.output.dir == "here"
    assert load(file, ["output.dir=null"]).config.output.dir == "work_dirs/my"


def test_a_file_wins_over_a_recipe_of_its_name(write):
    assert load(write(WHOLE, "demo")).config.model.name == "some/model"


def test_a_folder_does_not_hide_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load("demo").config.model.name == "demo"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothere.yaml", "no such file"),
        ("nothere.yml", "no such file"),
        ("configs/demo", "no such file"),
        ("x.py", "no such file"),
        ("", "the name is empty"),
        ("de\0mo", "no such"),
        ("dem", "did you mean demo"),
    ],
)
def test_a_name_that_is_nothing_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    assert words in "\n".join(complaints(name))


def test_a_python_file_that_is_no_xtuner_config_is_refused(write):
    (line,) = complaints(write("x = 1\n", "xtuner.py"))
    assert line.startswith("xtuner.py: no XTuner config: it has no `model = dict(...)`")


def test_a_folder_given_as_a_path_is_refused(tmp_path):
    assert "is a folder" in complaints(f"{tmp_path}/")[0]


def test_bytes_that_are_no_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_bytes(b"model:\n  name: \xff\n")
    assert complaints("my.yaml")[0].startswith("my.yaml:2: not UTF-8")


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + WHOLE.encode())
    assert load(str(path)).config.model.name == "some/model"


def test_a_file_that_cannot_be_read_is_a_file_error(write, monkeypatch):
    file = write(WHOLE)

    def refuse(*_args, **_keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(FileError, match=r"my\.yaml: cannot be read: Permission denied"):
        load(file)


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n"])
def test_an_empty_file_lacks_what_must_be_given(write, text):
    lines = complaints(write(text))
    assert [line.split(": ")[1] for line in lines] == ["model", "method", "data"]
    assert all("missing; it must be given" in line for line in lines)


@pytest.mark.parametrize("text", ["- a\n", "just words\n", "3\n"])
def test_a_file_that_is_no_mapping_is_refused(write, text):
    assert complaints(write(text)) == ["my.yaml:1: a config is a mapping such as `model: {name: ...}`."]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("trian: {lr: 1}", "my.yaml:8: trian: no such key; did you mean train?"),
        ("train: {epoch: 1}", "my.yaml:8: train.epoch: no such key; did you mean train.epochs?"),
        ("lr: 1", "my.yaml:8: lr: no such key; did you mean train.lr?"),
        ("learning_rate: 1", "my.yaml:8: learning_rate: no such key; did you mean train.lr?"),
        ("zzz: 1", "my.yaml:8: zzz: no such key; `fastft config schema` lists all keys"),
        ("train: {lr: '1e-5'}", "my.yaml:8: train.lr: text '1e-5' came; allowed: a number above 0"),
        ("train: {lr: 0}", "my.yaml:8: train.lr: 0 came; allowed: a number above 0"),
        ("train: {lr: .inf}", "my.yaml:8: train.lr: .inf came; allowed: a number above 0"),
        ("train:\n  lr: [1]", "my.yaml:9: train.lr: a list of 1 came; allowed: a number above 0"),
        ("train: {batch_size: 1.5}", "my.yaml:8: train.batch_size: 1.5 came; allowed: a whole number of at least 1"),
        ("train: {batch_size: true}", "my.yaml:8: train.batch_size: true came; allowed: a whole number of at least 1"),
        (
            "train: {betas: [0.9]}",
            "my.yaml:8: train.betas: a list of 1 came; allowed: a list of 2, each a number of at",
        ),
        ("train: 5", "my.yaml:8: train: 5 came; allowed: a mapping with the keys epochs,"),
        ("train:", "my.yaml:8: train: nothing came; allowed: a mapping with the keys epochs,"),
        (
            "task: sftt",
            "my.yaml:8: task: text 'sftt' came; allowed: pretrain, sft, dpo, orpo, reward or kto; did you mean sft?",
        ),
        (
            "output: {save_steps: 0}",
            "my.yaml:8: output.save_steps: 0 came; allowed: a whole number of at least 1 or null",
        ),
        (
            "samples: {prompts: hello}",
            "my.yaml:8: samples.prompts: text 'hello' came; allowed: a list ([a, b]) of text",
        ),
        ("samples: {prompts: ['']}", "my.yaml:8: samples.prompts.0: text '' came; allowed: text of at least one"),
        ("name: {a: 1}", "my.yaml:8: name: a mapping came; allowed: text"),
    ],
)
def test_a_mistake_is_one_line_with_place_key_value_and_remedy(write, text, line):
    (said,) = complaints(write(WHOLE + text + "\n"))
    assert said.startswith(line)


@pytest.mark.parametrize("word", ["yes", "on", "1", "True1", '"true"'])
def test_booleans_are_strict(write, word):
    (line,) = complaints(write(WHOLE), f"model.trust_remote_code={word}")
    assert line.startswith(f"override model.trust_remote_code={word}: model.trust_remote_code: ")
    assert line.endswith("allowed: true or false")


def test_a_choice_between_word_and_list_is_one_complaint(write):
    (line,) = complaints(write(WHOLE), "method.lora.targets=5")
    assert line.endswith("method.lora.targets: 5 came; allowed: all-linear or a list ([a, b]) of text")


def test_a_wrong_key_in_a_list_item_does_not_complain_about_the_list_too(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("model: {name: demo}\nmethod: {kind: lora}\ndata: {train: [{source: a.json, formt: alpaca}]}\n")
    (line,) = complaints(str(path))
    assert line.endswith(":3: data.train.0.formt: no such key; did you mean data.train.0.format?")


def test_blocks_that_would_have_no_effect_are_refused(write):
    (line,) = complaints(write(WHOLE.replace("kind: lora", "kind: full\n  lora: {r: 8}")))
    assert line.startswith("my.yaml:3: method: `lora` has no effect with kind: full")


def test_a_recipe_changes_its_method_when_its_block_goes_too():
    (line,) = complaints("internlm2_7b_qlora_sql", "method.kind=lora")
    assert line.endswith("set method.quantization=null, or kind: qlora")
    config = load("internlm2_7b_qlora_sql", ["method.kind=lora", "method.quantization=null"]).config
    assert (config.method.kind, config.method.quantization) == ("lora", None)


def test_loading_and_showing_import_no_torch():
    code = (
        "import sys; from fastft.config import load, show; from fastft.hub import locate\n"
        "loaded = load.load('demo'); show.flat_yaml(loaded.config); show.json_schema(); locate.hub('huggingface')\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'datasets'} & {m.split('.')[0] for m in sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(schema.__file__).parent.parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_a_missing_key_names_where_and_what(write):
    lines = complaints(write("model: {}\nmethod: {kind: lora}\ndata:\n  train:\n    - format: alpaca\n"))
    assert lines[0].startswith("my.yaml:1: model.name: missing; it must be given: folder on this machine")
    assert lines[1].startswith("my.yaml:5: data.train.0.source: missing; it must be given: file")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("trian.lr=1", "trian.lr: no such key; did you mean train.lr?"),
        ("data.train.0.sorce=x", "data.train.0.sorce: no such key; did you mean data.train.0.source?"),
        ("data.source=x", "data.source: no such key; did you mean data.train.0.source?"),
        ("train_dataloader.batch_size=4", "train_dataloader.batch_size: no such key; did you mean train.batch_size?"),
        ("train.lr.x=1", "train.lr.x: no such key; did you mean"),
        ("train.lr", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("data.train.5.source=x", "data.train: has 1 items, counted from 0"),
        ("train.lr={a: 1}", "train.lr: a mapping came; allowed: a number above 0"),
        ("train.lr=[1", "not YAML"),
        ("train.lr=", "train.lr: nothing came; allowed: a number above 0"),
    ],
)
def test_a_wrong_override_is_quoted(write, word, line):
    (said,) = complaints(write(WHOLE), word)
    assert said.startswith(f"override {word}: {line}")


def test_all_mistakes_are_said_at_once_but_at_most_ten(write):
    text = WHOLE + "train:\n" + "".join(f"  bad{n}: 1\n" for n in range(12))
    lines = complaints(write(text), "lr=1")
    assert len(lines) == 11
    assert lines[0].startswith("override lr=1: lr: no such key")
    assert lines[-1] == "... and 3 more"


def test_an_unknown_chat_template_is_refused(write):
    (line,) = complaints(write(WHOLE), "model.chat_template=internlm2chat")
    assert line.endswith("chat template internlm2chat: no such template; did you mean internlm2_chat?")


def test_a_chat_template_may_be_a_file(write, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert load(write(WHOLE), ["model.chat_template=mine.jinja"]).config.model.chat_template == "mine.jinja"


def test_no_message_shows_a_password(write):
    with pytest.raises(ConfigError) as caught:
        load(write(WHOLE), ["nam=https://user:hunter2@host/x", "task=https://user:hunter2@host/x"])
    assert "hunter2" not in str(caught.value)
