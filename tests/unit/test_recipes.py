"""Recipe names: every one that `list-cfg` prints becomes a checked config; XTuner's names resolve; search and start."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from fastft.config import recipes, schema, tree
from fastft.config.load import load
from fastft.config.schema import Config
from fastft.errors import ConfigError

CONFIGS = Path(recipes.__file__).parent.parent / "configs"


def is_product(name):
    """Whether a name is MODEL_METHOD_DATA, and not that of a file or of a LLaVA's stage."""
    return (name not in ("demo", "demo_vision") and not name.startswith("llava_")) or name.startswith("llava1_")


def test_every_name_that_is_listed_makes_a_config():
    names = recipes.names()
    assert len(names) > 5000
    assert len(set(names)) == len(names)
    for name in names:
        config = Config.model_validate(recipes.find(name))
        assert config.name == name


@pytest.mark.parametrize(
    ("name", "kind", "learn"),
    [
        # XTuner v0.1.23, configs/llava: the model's method, and what else is trained.
        ("internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain", "qlora", ("frozen", "full", "frozen")),
        ("internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain", "qlora", ("frozen", "full", "frozen")),
        ("internlm2_chat_20b_clip_vit_large_p14_336_e1_gpu8_pretrain", "qlora", ("frozen", "full", "frozen")),
        ("vicuna_7b_v15_clip_vit_large_p14_336_e1_gpu8_pretrain", "qlora", ("frozen", "full", "frozen")),
        ("llama3_8b_instruct_clip_vit_large_p14_336_e1_gpu8_pretrain", "qlora", ("frozen", "full", "frozen")),
        ("phi3_mini_4k_instruct_clip_vit_large_p14_336_e1_gpu8_pretrain", "qlora", ("frozen", "full", "frozen")),
        ("internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_finetune", "full", ("method", "full", "frozen")),
        ("vicuna_7b_v15_clip_vit_large_p14_336_e1_gpu8_finetune", "full", ("method", "full", "frozen")),
        ("llama3_8b_instruct_full_clip_vit_large_p14_336_e1_gpu8_finetune", "full", ("method", "full", "frozen")),
        ("phi3_mini_4k_instruct_full_clip_vit_large_p14_336_e1_gpu8_finetune", "full", ("method", "full", "frozen")),
        ("llama3_8b_instruct_full_clip_vit_large_p14_336_lora_e1_gpu8_finetune", "full", ("method", "full", "lora")),
        ("internlm2_chat_7b_full_clip_vit_large_p14_336_lora_e1_gpu8_finetune", "full", ("method", "full", "lora")),
        ("llama3_8b_instruct_qlora_clip_vit_large_p14_336_e1_gpu1_finetune", "qlora", ("method", "full", "frozen")),
        ("internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune", "qlora", ("method", "full", "lora")),
        ("internlm2_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune", "qlora", ("method", "full", "lora")),
        ("internlm2_chat_20b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune", "qlora", ("method", "full", "lora")),
        ("internlm_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune", "qlora", ("method", "full", "lora")),
        ("vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune", "qlora", ("method", "full", "lora")),
    ],
)
def test_xtuners_llava_names(name, kind, learn):
    """With XTuner's settings: learning rates, batches, ranks; the second stage begins with the first one's projector."""
    name = f"llava_{name}"
    assert name in recipes.names()
    assert recipes.search(name)[0] == name
    config = load(name).config
    assert config.method.kind == kind
    assert (config.vision.learn.llm, config.vision.learn.projector, config.vision.learn.tower) == learn
    assert (config.vision.tower, config.vision.select_layer) == ("openai/clip-vit-large-patch14-336", -2)
    assert (config.train.epochs, config.train.warmup_ratio, config.train.weight_decay) == (1, 0.03, 0)
    if name.endswith("pretrain"):
        assert (config.train.lr, config.train.batch_size, config.vision.projector) == (1e-3, 32, None)
        return
    assert config.train.batch_size == 16
    assert config.train.lr == (2e-5 if kind == "full" else 2e-4)
    first = config.vision.projector.removeprefix("work_dirs/").removesuffix("/llava/projector")
    assert first.endswith("_clip_vit_large_p14_336_e1_gpu8_pretrain")
    assert first in recipes.names()
    if kind != "full":
        assert (config.method.lora.r, config.method.lora.alpha, config.method.lora.dropout) == (512, 256, 0.05)
    if learn[2] == "lora":
        assert (config.vision.learn.tower_lora.r, config.vision.learn.tower_lora.alpha) == (64, 16)


@pytest.mark.parametrize(
    "name",
    [
        "llava_gemma2_9b_it_clip_vit_large_p14_336_e1_gpu8_pretrain",
        "llava_llama3_8b_instruct_full_clip_vit_large_p14_336_lora_e1_gpu8_pretrain",
        "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_e2_pretrain",
        "llava_internlm2_chat_7b_clip_vit_large_p14_336_internvl_finetune",
    ],
)
def test_llava_names_that_are_none(name):
    with pytest.raises(ConfigError, match="no such file and no such recipe"):
        recipes.find(name)


def test_every_part_loads_as_the_command_loads_it():
    """`load` costs ten times as much as the check above: here each model once and each method with each data set."""
    loaded = set()
    for name in recipes.names():
        if not is_product(name):
            continue
        recipe = recipes.parts(name)
        met = {recipe.model.name, (recipe.method, recipe.data.name)}
        if met <= loaded:
            continue
        loaded |= met
        config = load(name).config
        assert config.method.kind == {"dora": "lora"}.get(recipe.method, recipe.method.partition("_")[0])
        assert config.task == recipe.data.task
        assert config.train.epochs == recipe.data.epochs
        assert (config.name, config.output.dir) == (name, f"work_dirs/{name}")
    assert loaded >= recipes.models().keys()


@pytest.mark.parametrize(
    "name",
    [
        # Names of XTuner v0.1.23 for the models and data that we carry, all families.
        "internlm_7b_qlora_alpaca_e3",
        "internlm_7b_qlora_oasst1_512_e3",
        "internlm_chat_7b_qlora_colorist_e5",
        "internlm_chat_20b_qlora_lawyer_e3",
        "internlm_20b_qlora_alpaca_enzh_oasst1_e3",
        "internlm_7b_full_alpaca_e3",
        "internlm_7b_qlora_openorca_e1",
        "internlm_7b_qlora_medical_e1",
        "internlm2_1_8b_full_alpaca_e3",
        "internlm2_7b_qlora_arxiv_gentitle_e3",
        "internlm2_chat_1_8b_qlora_alpaca_e3",
        "internlm2_chat_7b_qlora_alpaca_e3",
        "internlm2_chat_7b_qlora_code_alpaca_e3",
        "internlm2_chat_20b_qlora_oasst1_512_e3",
        "internlm2_chat_7b_full_finetune_custom_dataset_e1",
        "internlm2_5_chat_7b_qlora_oasst1_e3",
        "internlm2_5_chat_7b_qlora_alpaca_e3",
        "llama2_7b_chat_qlora_sql_e3",
        "llama2_7b_qlora_open_platypus_e3",
        "llama2_7b_full_alpaca_e3",
        "llama2_70b_qlora_custom_sft_e1",
        "llama3_8b_instruct_qlora_alpaca_e3",
        "llama3_70b_instruct_qlora_alpaca_e3_2k_gpu8",
        "mistral_7b_full_custom_pretrain_e1",
        "mistral_7b_qlora_custom_sft_e1",
        "qwen1_5_0_5b_qlora_alpaca_e3",
        "qwen1_5_110b_chat_qlora_alpaca_e3_16k_2gpus",
        "qwen1_5_110b_chat_full_custom_sft_e1",
        "gemma_2b_it_qlora_alpaca_e3",
        "gemma_7b_full_custom_pretrain_e1",
        "yi_34b_qlora_custom_sft_e1",
        "yi_6b_qlora_alpaca_enzh_e3",
        "chatglm3_6b_base_qlora_alpaca_zh_e3",
        "chatglm3_6b_qlora_alpaca_e3",
        "phi3_mini_4k_instruct_qlora_alpaca_e3",
        "phi3_mini_128k_instruct_full_alpaca_e3",
    ],
)
def test_names_of_xtuner_resolve(name):
    assert load(name).config.name == name


def test_a_name_is_read_as_the_readme_says():
    config = load("internlm2_chat_7b_qlora_oasst1_512_e5_gpu8").config
    assert config.model.name == "internlm/internlm2-chat-7b"
    assert config.data.max_length == 512
    assert config.train.epochs == 5
    assert (config.data.train[0].source, config.data.train[0].format) == (
        "timdettmers/openassistant-guanaco",
        "guanaco",
    )
    assert load("llama3_70b_instruct_qlora_alpaca_e3_2k_gpu8").config.data.max_length == 2048


def test_the_longest_part_wins():
    assert recipes.parts("internlm2_7b_qlora_alpaca_zh").data.name == "alpaca_zh"
    assert recipes.parts("internlm2_7b_qlora_alpaca_enzh_oasst1").data.name == "alpaca_enzh_oasst1"
    assert recipes.parts("internlm2_chat_1_8b_sft_qlora_alpaca").model.name == "internlm2_chat_1_8b_sft"
    assert recipes.parts("yi_34b_200k_qlora_alpaca").model.name == "yi_34b_200k"


@pytest.mark.parametrize("task", get_args(schema.Task))
def test_every_task_has_recipes(task):
    """One for the demo's own data, one for data of the user's, one for a data set on the hub."""
    named = {name for name, part in recipes.data_sets().items() if part.task == task}
    assert any(name.startswith("demo") for name in named)
    assert any(name.startswith("custom_") for name in named)
    assert any(not name.startswith(("demo", "custom_")) for name in named) or task == "pretrain"
    assert any(recipes.parts(name).data.task == task for name in recipes.names() if is_product(name))


def test_methods_set_their_usual_rate():
    assert load("internlm2_7b_full_alpaca").config.train.lr == 2e-5
    assert load("internlm2_7b_lora_alpaca").config.train.lr == 2e-4
    assert load("internlm2_7b_qlora_alpaca").config.train.lr == 2e-4


@pytest.mark.parametrize("method", ["qlora_8gb", "qlora_6gb"])
def test_methods_for_a_small_card(method):
    """Listed for models up to 9B and only for them; whatever can wait outside of the card does."""
    listed = {recipes.parts(name).model.name for name in recipes.search(method) if is_product(name)}
    assert {"llama2_7b", "llama3_1_8b", "internlm2_7b", "qwen2_5_7b", "qwen1_5_0_5b", "internlm2_chat_1_8b"} <= listed
    assert {name for name in recipes.models() if name.endswith(("13b", "20b", "32b", "70b", "72b", "110b"))}
    assert not any(name.partition("_chat")[0].endswith(("13b", "20b", "32b", "34b", "70b", "72b")) for name in listed)
    config = load(f"qwen2_5_7b_{method}_alpaca").config
    memory = config.memory
    assert (memory.checkpoints, memory.embedding, memory.head, memory.lora) == ("host", "host", "host", "fused")
    assert isinstance(memory.mlp_tile_tokens, int)
    assert (config.train.optimizer, config.method.lora.dropout) == ("adamw_8bit", 0.0)
    assert load(f"llama3_70b_{method}_alpaca").config.memory == memory  # not listed, but it can be named


def test_find_gives_plain_values():
    found = recipes.find("internlm2_7b_full_alpaca_e2")
    assert found["name"] == "internlm2_7b_full_alpaca_e2"
    assert found["model"] == {"chat_template": "internlm2_chat", "name": "internlm/internlm2-7b"}
    assert found["method"] == {"kind": "full"}
    assert found["train"]["epochs"] == 2


def test_the_demo_is_its_named_recipe():
    config = load("demo").config
    assert (config.name, config.model.name, config.method.kind) == ("demo", "demo", "qlora")
    assert config.data.train[0].source == "demo/chat"
    scratch = load("demo_scratch_full_demo_text").config
    assert (scratch.model.name, scratch.model.init, scratch.task) == ("demo", "random", "pretrain")
    assert scratch.data.train[0].source == "demo/text"


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("internlm2_chat_7b_qlora_alpca_e3", "internlm2_chat_7b_qlora_alpaca_e3"),
        ("internlm2_chat_7b_qlroa_alpaca_e3", "internlm2_chat_7b_qlora_alpaca_e3"),
        ("Internlm2_Chat_7b_QLoRA_Alpaca_E3", "internlm2_chat_7b_qlora_alpaca_e3"),
        ("internlm2-chat-7b", "internlm2_chat_7b_full_alpaca_e3"),
        ("internlm2_chat_7b_qlora_alpaca_e0", "internlm2_chat_7b_qlora_alpaca_e3"),
        ("internlm2_chat_7b_qlora_alpaca_e3_e4", "internlm2_chat_7b_qlora_alpaca_e3"),
        ("internlm2_chat_7b_qlora_alpaca_", "internlm2_chat_7b_qlora_alpaca_e3"),
        ("demos", "demo"),
    ],
)
def test_a_name_that_is_none_gets_a_suggestion(name, suggestion):
    with pytest.raises(ConfigError, match="no such recipe; did you mean") as caught:
        recipes.find(name)
    assert suggestion in str(caught.value)


@pytest.mark.parametrize("name", ["", "_", "qlora", "../data/alpaca", "recipes/demo", "\0", "x" * 2000])
def test_no_name_reads_a_file_elsewhere(name):
    with pytest.raises(ConfigError, match="no such recipe"):
        recipes.tree(name)


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("internlm2 chat 7b qlora alpaca", "internlm2_chat_7b_qlora_alpaca_e3"),
        ("InternLM2-Chat-7B", "internlm2_chat_7b_full_alpaca_e3"),
        ("qwen2.5 7b instruct lora sql", "qwen2_5_7b_instruct_lora_sql_e3"),
        ("internlm2chat7bqlora", "internlm2_chat_7b_qlora_alpaca_e3"),
        ("sql yi_6b lora", "yi_6b_lora_sql_e3"),
        ("intrnlm2 chat 7b qlora oast1", "internlm2_chat_7b_qlora_oasst1_e3"),
        ("demo", "demo"),
    ],
)
def test_search_puts_the_best_first(pattern, first):
    assert recipes.search(pattern)[0] == first


def test_search_finds_nothing_in_nonsense_and_all_in_nothing():
    assert recipes.search("zzzzzz") == []
    assert recipes.search("  ") == recipes.names()


def test_a_substring_comes_before_what_is_alike():
    found = recipes.search("llama2_7b")
    assert all("llama2_7b" in name for name in found)


def test_names_read_quickly_are_those_that_yaml_holds():
    for path in CONFIGS.glob("models/*.yaml"):
        family = tree.plain(tree.parse(path.read_text(encoding="utf-8"), str))
        assert family.keys() <= {"base", "chat", "scratch", "vision", "all"}
        for kind in family.keys() - {"all"}:
            quick = {name for name, part in recipes.models().items() if part.family == path.stem and part.kind == kind}
            assert quick == family[kind].keys(), path
    for path in CONFIGS.glob("data/*.yaml"):
        data = tree.plain(tree.parse(path.read_text(encoding="utf-8"), str))
        part = recipes.data_sets()[path.stem]
        assert (part.task, part.epochs) == (data["task"], data["train"]["epochs"])
    assert set(recipes.METHODS) == {path.stem for path in CONFIGS.glob("methods/*.yaml")}


def test_parts_are_small_and_explained():
    paths = list(CONFIGS.glob("*/*.yaml"))
    assert len(paths) > 40
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 30, path
        assert lines[0].startswith("# "), path


def test_no_two_models_share_an_id():
    ids = [
        load(f"{name}_full_alpaca").config.model.name
        for name, part in recipes.models().items()
        if part.kind != "scratch"
    ]
    assert len(set(ids)) == len(ids)


def test_remote_code_runs_only_where_nothing_else_reads_the_model():
    remote = {name for name in recipes.models() if load(f"{name}_full_alpaca").config.model.trust_remote_code}
    assert remote == {"chatglm3_6b", "chatglm3_6b_32k", "chatglm3_6b_base"}


def test_listing_imports_no_yaml_no_pydantic_no_torch():
    code = (
        "import sys; from fastft.config import recipes; recipes.search('internlm2 qlora'); recipes.names();"
        "print(sorted({'torch', 'transformers', 'pydantic', 'ruamel'} & {m.split('.')[0] for m in sys.modules}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_models_that_see_are_listed_with_images_only():
    for name in recipes.names():
        if not is_product(name):
            continue
        recipe = recipes.parts(name)
        sees = recipe.model.kind == "vision" or recipe.model.name in recipes.ALSO_SEE
        assert sees or not recipe.data.sees, name
        assert recipe.model.kind != "vision" or recipe.data.sees, name
    config = load("gemma3_4b_it_qlora_custom_vision_e1").config
    assert config.vision == schema.Vision()
    assert load("gemma3_4b_it_qlora_alpaca_e3").config.vision is None
    # A model that only its own class reads learns from text too, when it is asked to.
    assert load("qwen2_5_vl_3b_instruct_lora_alpaca").config.vision == schema.Vision()
