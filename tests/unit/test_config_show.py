"""What is shown of a config: short, full with origins, the file that copy-cfg writes, the schema and the page."""

import json

import pytest
import yaml  # another reader of YAML, of version 1.1
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft.config import chat_templates, fields, recipes, schema, show
from fastft.config.load import flat, load

SECRET = "https://user:hunter2@host.example/model"  # made up

# Any text but lone surrogates, which no file holds; and what reads like other YAML.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.sampled_from(
        [
            "null",
            "~",
            "true",
            "on",
            "NO",
            "12",
            "1e5",
            "0x1f",
            "1:30",
            "2020-01-01",
            "- a",
            "a: b",
            "#a",
            "a #b",
            "'",
            '"',
            "\\",
            "*a",
            "&a",
            "!a",
            "%a",
            "@a",
            "`a",
            "{a}",
            "[a",
            "?",
            ":",
            "|",
            ">",
            "=",
            "<<",
            " a ",
            "a\nb",
            "\t",
            "\x00",
            "\x85",
            "\u2028",
            "\ufeff",
            "汉字",
            "\U0001f600",
            "./a b/c",
            "..",
            "1_000",
            "0o7",
            ".5",
            "-",
        ]
    ),
).filter(lambda text: "://" not in text)
WHOLE = st.integers(1, 65536)
RATIO = st.floats(0, 1)
ABOVE_0 = st.floats(1e-300, 1e300)
MAYBE_TEXT = st.none() | TEXT


def some(section, **fixed):
    """Any value of a section: some fields drawn, the rest at their default."""
    return st.fixed_dictionaries({}, optional=fixed).map(lambda values: section(**values))


LORA = some(
    schema.Lora,
    r=WHOLE,
    alpha=ABOVE_0,
    dropout=RATIO,
    rslora=st.booleans(),
    targets=st.just("all-linear") | st.lists(TEXT, max_size=3).map(tuple),
    modules_to_save=st.lists(TEXT, max_size=3).map(tuple),
)
MEMORY = some(
    schema.Memory,
    checkpoints=st.sampled_from(["auto", "device", "host"]),
    embedding=st.sampled_from(["auto", "device"]),
    head=st.sampled_from(["auto", "device"]),
    mlp_tile_tokens=st.sampled_from(["auto", "whole"]) | WHOLE,
    lora=st.sampled_from(["auto", "plain"]),
)
METHOD = st.one_of(
    st.just(schema.Method(kind="full")),
    LORA.map(lambda lora: schema.Method(kind="lora", lora=lora)),
    LORA.map(lambda lora: schema.Method(kind="qlora", lora=lora)),
)
COLUMNS = st.builds(schema.Columns, system=MAYBE_TEXT, user=TEXT, assistant=TEXT)
SOURCE = st.one_of(
    st.builds(
        schema.Source, source=TEXT, format=st.sampled_from(["auto", "text"]), subset=MAYBE_TEXT, system=MAYBE_TEXT
    ),
    st.builds(schema.Source, source=TEXT, format=st.just("columns"), columns=COLUMNS, max_rows=st.none() | WHOLE),
)
SOURCES = st.lists(SOURCE, min_size=1, max_size=3).map(tuple)
CONFIG = st.builds(
    schema.Config,
    name=TEXT,
    task=st.sampled_from(["sft", "pretrain"]),
    model=st.builds(
        schema.Model,
        name=TEXT,
        revision=MAYBE_TEXT,
        trust_remote_code=st.booleans(),
        chat_template=st.none() | st.sampled_from(chat_templates.names()),
    ),
    method=METHOD,
    data=st.builds(schema.Data, train=SOURCES, eval=SOURCES | st.just(())),
    train=some(
        schema.Train,
        epochs=ABOVE_0,
        max_steps=st.none() | WHOLE,
        lr=ABOVE_0,
        warmup_ratio=RATIO,
        betas=st.tuples(RATIO, RATIO),
        gradient_checkpointing=st.sampled_from([True, "auto"]),
        weight_decay=st.floats(0, 1e10),
        sample_steps=st.none() | WHOLE,
    ),
    memory=MEMORY,
    samples=some(schema.Samples, prompts=st.lists(TEXT, max_size=4).map(tuple), system=MAYBE_TEXT),
    output=st.builds(schema.Output, dir=TEXT, save_steps=st.none() | WHOLE),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(config=CONFIG)
def test_the_file_that_is_written_reads_back_as_the_same_config(tmp_path, config):
    path = tmp_path / "copy.yaml"
    path.write_text(show.flat_yaml(config), encoding="utf-8", newline="")
    assert load(str(path)).config == config


@settings(max_examples=40, deadline=None)
@given(config=CONFIG)
def test_other_readers_take_the_file_for_the_same(config):
    assert schema.Config.model_validate(yaml.safe_load(show.flat_yaml(config))) == config


@settings(max_examples=200, deadline=None)
@given(value=st.floats(0, allow_nan=False, allow_infinity=False) | st.integers(0, 2**60))
def test_numbers_are_written_exactly_for_every_reader(value):
    written = show.number(value)
    assert (int(written) if isinstance(value, int) else float(written)) == value
    assert yaml.safe_load(written) == value


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (2e-4, "2.0e-4"),
        (1e-5, "1.0e-5"),
        (0.00025, "2.5e-4"),
        (0.03, "0.03"),
        (3.0, "3"),
        (0, "0"),
        (0.5, "0.5"),
        (1e22, "1.0e+22"),
    ],
)
def test_numbers_read_well(value, written):
    assert show.number(value) == written


@pytest.mark.parametrize(
    "name", ["demo", "internlm2_chat_7b_qlora_alpaca_enzh_e3", "internlm_7b_full_custom_pretrain_e1"]
)
def test_a_copied_recipe_is_the_recipe(tmp_path, name):
    recipe = load(name).config
    path = tmp_path / f"{name}_copy.yaml"
    path.write_text(show.flat_yaml(recipe), encoding="utf-8")
    assert load(str(path)).config == recipe


def test_the_file_has_every_field_with_its_comment():
    text = show.flat_yaml(load("internlm2_7b_qlora_sql").config)
    assert "  lr: 2.0e-4  # peak learning rate\n" in text
    assert '      system: "You are an expert in SQL.' in text
    written = set(flat(load("internlm2_7b_qlora_sql").config))
    assert {key for key in fields.dotted_keys() if not key.startswith("data.eval.")} - written == {
        # sections, not values
        "model",
        "method",
        "method.lora",
        "method.quantization",
        "data",
        "data.train",
        "data.train.0.columns",
        "data.check",
        # of a model that sees
        *(key for key in fields.dotted_keys() if key.startswith("vision.")),
        "preference",
        "train",
        "memory",
        "samples",
        "output",
        "accelerate",
        "distributed",
    }
    assert max(map(len, text.splitlines())) < 200


def test_full_says_where_each_value_comes_from():
    text = show.full(load("internlm2_7b_qlora_sql_e2", ["train.seed=7"]))
    assert "  name: internlm/internlm2-7b  # configs/models/internlm2.yaml:5\n" in text
    assert "  lr: 2.0e-4  # configs/methods/qlora.yaml:13\n" in text
    assert "  epochs: 2  # recipe internlm2_7b_qlora_sql_e2\n" in text
    assert "  seed: 7  # override\n" in text
    assert "  schedule: cosine  # default\n" in text


def test_full_is_yaml_even_if_the_path_is_odd(tmp_path):
    path = tmp_path / "a\nb # c.yaml"
    path.write_text(show.flat_yaml(load("demo").config), encoding="utf-8")
    assert yaml.safe_load(show.full(load(str(path))))["model"]["name"] == "demo"


@pytest.mark.parametrize("name", [*recipes.names()[::200], "demo"])
def test_short_is_short(name):
    lines = show.short(load(name).config).splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("run ")


def test_short_of_a_long_config_stays_short():
    words = [f"data.train.{n}.source=some/very/long/name/of/a/file/number/{n}.json" for n in range(30)]
    words += [
        "train.max_steps=5",
        "output.save_steps=null",
        "data.eval_rows=10",
        "model.revision=main",
        "model.dtype=bf16",
    ]
    lines = show.short(load("internlm2_7b_lora_alpaca", words).config).splitlines()
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 80
    assert "5 steps" in "\n".join(lines)
    assert "checkpoint at the end" in "\n".join(lines)


def test_no_view_shows_a_password():
    words = [
        f"model.name={SECRET}",
        f"data.train.0.source={SECRET}",
        f"samples.prompts=[{SECRET}]",
        f"output.dir={SECRET}",
    ]
    loaded = load("demo", words)
    for text in (show.short(loaded.config), show.full(loaded), show.flat_yaml(loaded.config)):
        assert "hunter2" not in text
        assert "https://***@host.example/model" in text


def test_the_schema_is_for_editors():
    found = json.loads(show.json_schema())
    assert found["additionalProperties"] is False
    assert set(found["properties"]) == set(schema.Config.model_fields)
    assert found["required"] == ["model", "method", "data"]


def test_every_field_is_described():
    for key in fields.dotted_keys():
        known = fields.find(key.split("."))
        assert known.info.description, key
        assert fields.allowed(known.annotation), key


def test_the_reference_page_is_up_to_date(request):
    page = request.config.rootpath / "docs" / "config.md"
    assert page.read_text(encoding="utf-8") == show.reference_markdown(), (
        "write it anew: python -c 'from fastft.config import show; print(show.reference_markdown(), end=\"\")' > docs/config.md"
    )
