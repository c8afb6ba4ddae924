"""One config in the shape of each of XTuner's families: what is trained, on what, and what has no counterpart.

The samples are written here in that style. The same importer was also run over every config of XTuner 0.1.0, 0.1.9,
0.1.23 and 0.2.0: what it refuses there are MOSS's and InternLM's own data files, RefCOCO's boxes, 8-bit bases, and adapters in a tower beside a
language model that is trained in full.
"""

import json
import shlex

import pytest

from fastft.__main__ import main
from fastft.config.load import load
from fastft.config.xtuner import imported
from fastft.config.xtuner_names import FORMATS, PARTS, SYSTEMS, TEMPLATES
from fastft.errors import ConfigError
from fastft.hub.locate import DEMO_MODEL

IMPORTS = """
import torch
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from xtuner.dataset import ConcatDataset, process_hf_dataset
from xtuner.dataset import map_fns
from xtuner.dataset.preference_dataset import build_preference_dataset, load_jsonl_dataset, orpo_dpo_mix_40k_map_fn
from xtuner.engine.hooks import EvaluateChatHook, HFCheckpointHook, ThroughputHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import DPO, ORPO, RewardModel, SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path='acme/base', padding_side='right')
"""


def rows(source="dict(type=load_dataset, path='acme/rows')", function="map_fns.openai_map_fn", template="PROMPT_TEMPLATE.qwen_chat", more=""):  # fmt: skip
    return (
        f"dict(type=process_hf_dataset, dataset={source}, tokenizer=tokenizer, max_length=2048,"
        f" dataset_map_fn={function}, template_map_fn=dict(type=map_fns.template_map_fn_factory, template={template}),"
        f" pack_to_max_length=True, {more})"
    )


def pairs(source, function="None"):
    return (
        f"dict(type=build_preference_dataset, dataset={source}, tokenizer=tokenizer, max_length=2048,"
        f" dataset_map_fn={function}, is_dpo=True, is_reward=False, reward_token_id=-1, num_proc=32,"
        " use_varlen_attn=True, max_packed_length=4096, shuffle_before_pack=True)"
    )


def config(data, model="type=SupervisedFinetune", llm="", hooks="", more="", accumulation=4):
    """A runner's config around a data set and what the model is besides its base."""
    return f"""{IMPORTS}
model = dict({model}, llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path='acme/base',
    trust_remote_code=True, {llm}))
train_dataloader = dict(batch_size=1, num_workers=0, dataset={data}, sampler=dict(type=DefaultSampler, shuffle=True))
optim_wrapper = dict(type=AmpOptimWrapper, optimizer=dict(type=AdamW, lr=2e-5, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False), accumulative_counts={accumulation}, dtype='bfloat16')
param_scheduler = [dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=0.06, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=0.06, end=2, convert_to_iter_based=True)]
train_cfg = dict(type=TrainLoop, max_epochs=2)
custom_hooks = [{hooks}]
load_from = None
{more}
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read_text(text):
        (tmp_path / "run.py").write_text(text, encoding="utf-8")
        return load("run.py")

    return read_text


LORA = "lora=dict(type=LoraConfig, r=16, lora_alpha=32, lora_dropout=0.1, bias='none', task_type='CAUSAL_LM')"
NF4 = (
    "quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type='nf4',"
    " bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)"
)


@pytest.mark.parametrize(
    ("model", "llm", "kind"),
    [
        ("type=SupervisedFinetune", "", "full"),
        (f"type=SupervisedFinetune, {LORA}", "", "lora"),
        (f"type=SupervisedFinetune, {LORA}", NF4, "qlora"),
    ],
)
def test_full_lora_and_qlora_on_own_dialogues(read, model, llm, kind):
    own = "dict(type=load_dataset, path='json', data_files='own.json')"
    loaded = read(config(rows(own), model, llm))
    assert loaded.config.method.kind == kind
    (source,) = loaded.config.data.train
    assert (source.source, source.format, loaded.config.task) == ("own.json", "messages", "sft")
    assert loaded.config.model.chat_template == "chatml"  # for a tokenizer that has none
    assert (loaded.config.data.packing, loaded.config.train.warmup_ratio) == (True, pytest.approx(0.03))
    if kind == "qlora":
        assert loaded.config.method.quantization.compute_dtype == "bf16"


def test_pretraining_takes_no_template(read):
    own = "dict(type=load_dataset, path='json', data_files=['a.json', 'b.json'])"
    loaded = read(config(rows(own, "map_fns.pretrain_map_fn")))
    assert loaded.config.task == "pretrain"
    assert loaded.config.model.chat_template is None
    assert not [note for note in loaded.notes if "data_files" in note]


def test_a_folder_of_files_is_a_folder(read):
    own = "dict(type=load_jsonl_dataset, data_dir='rows', suffix='.jsonl')"
    (source,) = read(config(pairs(own), "type=DPO")).config.data.train
    assert source.source == "rows/"


@pytest.mark.parametrize("function", sorted({*FORMATS, *PARTS} - {"pretrain_map_fn", "orpo_dpo_mix_40k_map_fn"}))
def test_every_map_function_reads_its_columns(read, function):
    """The columns are those that XTuner's function reads from a row; spec/cli.md 1.2 lists the functions."""
    columns = {
        "alpaca_zh_map_fn": ("instruction_zh", "input_zh", "output_zh"),
        "arxiv_map_fn": ("abstract", "title"),
        "code_alpaca_map_fn": ("prompt", "completion"),
        "colors_map_fn": ("description", "color"),
        "crime_kg_assitant_map_fn": ("input", "output"),
        "law_reference_map_fn": ("question", "answer"),
        "openorca_map_fn": ("system_prompt", "question", "response"),
        "sql_map_fn": ("context", "question", "answer"),
        "stack_exchange_map_fn": ("question", "response"),
        "tiny_codes_map_fn": ("prompt", "response"),
        "default_map_fn": ("input", "output"),
    }.get(function)
    loaded = read(config(rows("dict(type=load_dataset, path='acme/other')", f"map_fns.{function}")))
    (source,) = loaded.config.data.train
    if columns is None:
        assert source.format in {"alpaca", "messages", "guanaco", "sharegpt"}
    else:
        read_columns = source.columns
        text = f"{read_columns.system or ''} {read_columns.user} {read_columns.assistant}"
        assert tuple(word.split("}")[0] for word in text.split("{")[1:]) == columns
    assert (source.source, source.subset, source.split) == ("acme/other", None, "train")
    assert not [note for note in loaded.notes if "not run" in note]


def test_a_joined_data_set_of_xtuner_0_1_0_is_a_mapping(read):
    joined = f"dict(type=ConcatDataset, datasets_cfg=dict(en={rows()}, zh={rows(function='map_fns.alpaca_zh_map_fn')}))"
    sources = read(config(joined)).config.data.train
    assert [source.format for source in sources] == ["messages", "columns"]


def test_dpo(read):
    own = "dict(type=load_jsonl_dataset, data_files=['a.jsonl', 'b.jsonl'])"
    model = f"type=DPO, use_varlen_attn=True, loss_type='sigmoid', beta=0.2, label_smoothing=0.1, {LORA}"
    loaded = read(config(pairs(own), model, NF4))
    wanted = loaded.config
    assert (wanted.task, wanted.method.kind) == ("dpo", "qlora")
    assert (wanted.preference.beta, wanted.preference.label_smoothing) == (0.2, 0.1)
    assert [source.source for source in wanted.data.train] == ["a.jsonl", "b.jsonl"]
    assert not [note for note in loaded.notes if "model." in note and "trust_remote_code" not in note]


def test_orpo(read):
    hub = "dict(type=load_dataset, path='acme/pairs')"
    loaded = read(config(pairs(hub, "orpo_dpo_mix_40k_map_fn"), "type=ORPO, beta=0.3"))
    assert (loaded.config.task, loaded.config.preference.beta) == ("orpo", 0.3)
    assert loaded.config.data.train[0].format == "preference"


def test_reward(read):
    hub = "dict(type=load_dataset, path='acme/pairs')"
    hooks = "dict(type=EvaluateChatHook, every_n_iters=8, evaluation_inputs=['Hi'])"
    loaded = read(config(pairs(hub), "type=RewardModel, loss_type='focal', penalty_type='log_barrier'", hooks=hooks))
    assert (loaded.config.task, loaded.config.samples.prompts, loaded.config.train.sample_steps) == ("reward", (), None)
    assert any("Bradley-Terry" in note for note in loaded.notes)
    assert any("gives no answers" in note for note in loaded.notes)


def test_sequence_parallelism_keeps_the_tokens_of_a_step(read):
    loaded = read(config(rows(more="use_varlen_attn=True"), accumulation=16, more="sequence_parallel_size = 4"))
    assert loaded.config.train.grad_accumulation == 4
    assert any(note.startswith("sequence_parallel_size = 4: no counterpart") for note in loaded.notes)


def test_a_deepspeed_strategy_is_listed(read):
    loaded = read(config(rows(), more="strategy = dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=2))"))
    assert "strategy.zero_optimization.stage = 2: no counterpart; left out" in loaded.notes


def test_hooks_that_are_of_no_use_here_are_not_listed(read):
    hooks = "dict(type=ThroughputHook), dict(type=HFCheckpointHook), dict(type=EvaluateChatHook, every_n_iters=8, evaluation_inputs=['Hi'], system=SYSTEM_TEMPLATE.coder)"  # fmt: skip
    loaded = read(config(rows(), hooks=hooks))
    assert not [note for note in loaded.notes if "Hook" in note]
    assert loaded.config.samples.system.startswith("You are a professional programmer")
    assert loaded.config.train.sample_steps == 2


HUGGINGFACE = f"""{IMPORTS}
framework = 'huggingface'
trainer = Trainer
training_args = dict(
    type=TrainingArguments, do_train=True, learning_rate=2e-4, weight_decay=0.1, lr_scheduler_type='linear',
    warmup_steps=10, max_steps=200, per_device_train_batch_size=2, gradient_accumulation_steps=8, num_train_epochs=3,
    fp16=True, logging_steps=5, optim='paged_adamw_32bit', save_strategy='steps', save_steps=100, save_total_limit=2,
    output_dir='work_dirs/hf', ddp_find_unused_parameters=False)
model = dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path='acme/base', {NF4})
{LORA.replace("lora=", "lora = ")}
train_dataset = {rows(function="map_fns.oasst1_map_fn", template="PROMPT_TEMPLATE.default")}
"""


def test_the_hugging_face_framework(read):
    loaded = read(HUGGINGFACE)
    wanted = loaded.config
    assert (wanted.method.kind, wanted.method.lora.r, wanted.data.train[0].format) == ("qlora", 16, "guanaco")
    train = wanted.train
    assert (train.lr, train.weight_decay, train.schedule, train.warmup_ratio) == (2e-4, 0.1, "linear", 0.05)
    assert (train.max_steps, train.batch_size, train.grad_accumulation, train.epochs) == (200, 2, 8, 3)
    # transformers counts optimizer steps, as we do: nothing is divided.
    assert (train.log_steps, wanted.output.save_steps, wanted.output.keep) == (5, 100, 2)
    assert (train.optimizer, wanted.output.dir) == ("adamw", "work_dirs/hf")
    assert loaded.notes == ()


def test_a_warm_up_in_steps_without_their_number_is_said(read):
    notes = read(HUGGINGFACE.replace("max_steps=200, ", "")).notes
    assert notes == ("training_args.warmup_steps = 10: set train.warmup_ratio, a part of all steps, yourself",)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_prompt_templates_map_by_name(read, name):
    loaded = read(config(rows(template=f"PROMPT_TEMPLATE.{name}")))
    assert loaded.config.model.chat_template == TEMPLATES[name]


def test_a_prompt_template_that_we_do_not_carry_is_said(read):
    loaded = read(config(rows(template="PROMPT_TEMPLATE.openassistant")))  # of XTuner 0.1.0
    assert loaded.config.model.chat_template is None
    assert any(note.startswith("template openassistant: the tokenizer's own") for note in loaded.notes)
    own = read(config(rows(template="dict(INSTRUCTION='[{input}]')")))
    assert any(note.startswith("template_map_fn.template: a form of its own") for note in own.notes)


def measured(data, evaluator="dict(type='xtuner.evaluation.MMLUMetric', tokenizer=tokenizer, prefix='mmlu')"):
    loader = f"val_dataloader = dict(batch_size=1, num_workers=0, dataset={data}, sampler=dict(type=DefaultSampler, shuffle=False))"
    return (
        f"{loader}\nval_cfg = dict(type='ValLoop')\nval_evaluator = {evaluator}\ntest_dataloader = dict(dataset={data})"
    )


FILES = "dict(type=load_dataset, path='json', data_files=dict(val='five_shot_val.json', test='five_shot_test.json'))"


def test_the_data_of_val_dataloader_is_measured_on(read):
    """As XTuner's one recipe with such data has it: iterations between two measurements, the part of the rows outside."""
    val = rows(FILES, "map_fns.default_map_fn", more="split='val', input_ids_with_output=False")
    text = config(rows(), more=measured(val)).replace("max_epochs=2)", "max_epochs=2, val_interval=500)")
    loaded = read(text)
    (source,) = loaded.config.data.eval
    assert (source.source, source.format, source.columns.user) == ("five_shot_val.json", "columns", "{input}")
    assert loaded.config.train.eval_steps == 125
    notes = [note for note in loaded.notes if "trust_remote_code" not in note]
    assert notes == [
        "test_dataloader: no counterpart; data.eval is measured on, from val_dataloader",
        "val_evaluator MMLUMetric: no counterpart; on data.eval the loss is measured",
    ]


def test_a_split_of_a_hubs_data_set_is_measured_on(read):
    hub = "dict(type=load_dataset, path='acme/rows')"
    test, dev = rows(hub, more="split='test'"), rows("dict(type=load_dataset, path='acme/rows', split='dev')")
    joined = f"dict(type=ConcatDataset, datasets=[{test}, {dev}])"
    loaded = read(config(rows(), more=measured(joined, "None")))
    assert [(source.source, source.split) for source in loaded.config.data.eval] == [
        ("acme/rows", "test"),
        ("acme/rows", "dev"),
    ]
    assert loaded.config.train.eval_steps == 250  # mmengine's 1000 iterations
    assert loaded.config.data.train[0].split == "train"


def test_data_to_measure_on_that_is_not_read_is_said(read):
    loaded = read(config(rows(), more=measured("dict(type='xtuner.dataset.MOSSSFTDataset')", "None")))
    assert (loaded.config.data.eval, loaded.config.train.eval_steps) == ((), None)
    assert any(
        note.startswith("val_dataloader.dataset: data sets of MOSSSFTDataset are not read") for note in loaded.notes
    )
    assert read(config(rows(), more="val_dataloader = None\nval_cfg = None")).config.data.eval == ()


def test_system_texts_are_our_own(read):
    for name, part in SYSTEMS.items():
        hook = f"dict(type=EvaluateChatHook, evaluation_inputs=['Hi'], system=SYSTEM_TEMPLATE.{name})"
        assert read(config(rows(), hooks=hook)).config.samples.system, part


IMAGES = (
    "dict(type='xtuner.dataset.LLaVADataset', data_path='llava.json', image_folder='pictures', tokenizer=tokenizer,"
    " image_processor=dict(type='transformers.CLIPImageProcessor.from_pretrained'), dataset_map_fn=map_fns.llava_map_fn,"
    " template_map_fn=dict(type=map_fns.template_map_fn_factory, template=PROMPT_TEMPLATE.internlm2_chat),"
    " max_length=int(2048 - (336 / 14)**2), pad_image_to_square=True)"
)
TOWER = "visual_encoder=dict(type='transformers.CLIPVisionModel.from_pretrained', pretrained_model_name_or_path='acme/clip')"  # fmt: skip
LLAVA = f"type='xtuner.model.LLaVAModel', {TOWER}"
LLM_LORA, TOWER_LORA = LORA.replace("lora=", "llm_lora="), LORA.replace("lora=", "visual_encoder_lora=")


def test_llava_pretraining_learns_the_projector_alone(read):
    model = f"{LLAVA}, freeze_llm=True, freeze_visual_encoder=True"
    hook = "dict(type=EvaluateChatHook, every_n_iters=8, evaluation_inputs=['What?'], evaluation_images='view.jpg')"
    loaded = read(config(IMAGES, model, NF4, hooks=hook))
    vision = loaded.config.vision
    assert (loaded.config.model.name, vision.tower, vision.select_layer) == ("acme/base", "acme/clip", -2)
    assert (vision.learn.llm, vision.learn.projector, vision.learn.tower) == ("frozen", "full", "frozen")
    assert (loaded.config.method.kind, loaded.config.method.quantization.type) == ("qlora", "nf4")
    (source,) = loaded.config.data.train
    assert (source.source, source.format, source.images) == ("llava.json", "sharegpt", "pictures")
    assert (loaded.config.data.max_length, loaded.config.data.packing) == (1472, False)
    assert (loaded.config.samples.prompts, loaded.config.samples.images) == (("What?",), ("view.jpg",))
    assert read(config(IMAGES, model)).config.method.kind == "full"  # of which only the projector is trained


def test_llava_fine_tuning_with_adapters_in_both(read):
    tower = TOWER_LORA.replace("0.1", "0.3")
    model = f"{LLAVA}, freeze_llm=True, freeze_visual_encoder=True, pretrained_pth='a/projector', {LLM_LORA}, {tower}"
    loaded = read(config(IMAGES, model, NF4))
    learn = loaded.config.vision.learn
    assert (learn.llm, learn.projector, learn.tower) == ("method", "full", "lora")
    assert (learn.tower_lora.r, learn.tower_lora.alpha, learn.tower_lora.dropout) == (16, 32, 0.1)
    assert (loaded.config.method.kind, loaded.config.method.lora.r) == ("qlora", 16)
    assert loaded.config.vision.projector == "a/projector"
    assert any(note.startswith("model.visual_encoder_lora.lora_dropout = 0.3") for note in loaded.notes)
    assert not [note for note in loaded.notes if "freeze" in note]


def test_llava_fine_tuning_in_full(read):
    model = f"{LLAVA}, freeze_llm=False, freeze_visual_encoder=False, pretrained_pth='a/iter_9.pth'"
    hook = "dict(type=EvaluateChatHook, evaluation_inputs=['What?'], evaluation_images='https://host/view.jpg')"
    loaded = read(config(f"dict(type=ConcatDataset, datasets=[{IMAGES}, {IMAGES}])", model, hooks=hook))
    learn = loaded.config.vision.learn
    assert (loaded.config.method.kind, learn.llm, learn.tower) == ("full", "method", "full")
    assert len(loaded.config.data.train) == 2
    assert (loaded.config.vision.projector, loaded.config.samples.prompts) == (None, ())
    assert any(
        "run `fastft convert pth_to_hf run.py a/iter_9.pth a/iter_9_hf` and set vision.projector=a/iter_9_hf/projector."
        in note
        for note in loaded.notes
    )
    assert any("addresses are not fetched" in note for note in loaded.notes)


def test_llava_fine_tuning_in_full_with_adapters_in_the_tower(read):
    """llava_llama3_8b_instruct_full_clip_vit_large_p14_336_lora_e1_gpu8_finetune of XTuner."""
    tower = "visual_encoder_lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.05, bias='none')"
    model = f"{LLAVA}, freeze_llm=False, freeze_visual_encoder=True, {tower}"
    loaded = read(config(IMAGES, model))
    learn = loaded.config.vision.learn
    assert (loaded.config.method.kind, learn.llm, learn.tower) == ("full", "method", "lora")
    assert (learn.tower_lora.r, learn.tower_lora.alpha, learn.tower_lora.dropout) == (64, 16, 0.05)
    assert not [note for note in loaded.notes if "visual_encoder_lora" in note]


def test_internvl_is_one_model(read):
    data = (
        "dict(type='xtuner.dataset.InternVL_V1_5_Dataset', model_path='acme/internvl', data_paths=['a.json', 'b.json'],"
        " image_folders=['a', None], repeat_times=[2, 0.5], template=PROMPT_TEMPLATE.internlm2_chat, max_length=8192)"
    )
    model = (
        "type='xtuner.model.InternVL_V1_5', model_path='acme/internvl', freeze_llm=True, freeze_visual_encoder=True,"
        f" quantization_llm=True, quantization_vit=False, {LLM_LORA}"
    )
    loaded = read(config(data, model))
    wanted = loaded.config
    assert (wanted.model.name, wanted.vision.tower, wanted.vision.learn.projector) == ("acme/internvl", None, "full")
    assert (wanted.method.kind, wanted.data.max_length) == ("qlora", 8192)
    parts = [(source.source, source.images, source.weight) for source in wanted.data.train]
    assert parts == [("a.json", "a", 2), ("b.json", None, 0.5)]
    assert any("give the same model in transformers' own layout" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            config(IMAGES.replace("data_path='llava.json', ", ""), LLAVA),
            "data_path, the file with the dialogues, is missing",
        ),
        (config(IMAGES, f"{LLAVA}, freeze_llm=False", NF4), "without `llm_lora` must be frozen"),
        (config(rows()).replace("type=process_hf_dataset", "type='xtuner.dataset.MOSSSFTDataset'"), "MOSS's own form"),
        (config("dict(type='xtuner.dataset.build_packed_dataset', packed_length=8)"), "InternLM's own files"),
        (config("dict(type='xtuner.dataset.refcoco_json.RefCOCOJsonDataset')"), "boxes of RefCOCO are not built"),
        (config(rows("dict(type='datasets.load_from_disk', dataset_path='x')")), "save the rows as jsonl or parquet"),
        (config(rows("dict(type=load_jsonl_dataset)")), "data_files: the names of the train files are missing"),
        (config("None"), "train_dataloader.dataset: the data set is missing"),
        (config(rows(), llm="load_in_8bit=True"), "8-bit bases are not built; use 4 bit"),
        (config(pairs("dict(type=load_dataset, path='acme/p')"), "type=DPO, loss_type='ipo'"), "only DPO's own loss"),
        (config(pairs("dict(type=load_dataset, path='acme/p')"), "type=DPO, loss_type='kto_pair'"), "task: kto takes"),
        ("_base_ = ['../base.py']\n" + config(rows()), "builds on another config (_base_)"),
    ],
)
def test_what_is_not_built_is_refused_with_a_way_out(text, said):
    with pytest.raises(ConfigError) as caught:
        imported(text, "run.py")
    assert str(caught.value).startswith("run.py: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


DEMO = config(
    rows("dict(type=load_dataset, path='json', data_files='rows.jsonl')"), f"type=SupervisedFinetune, {LORA}"
).replace("'acme/base'", "'demo'")
COMMANDS = (
    ["config", "show", "run.py"],
    ["copy-cfg", "run.py", "ours.yaml"],
    ["config", "import", "run.py", "ours.yaml"],
    ["check-dataset", "run.py"],
    ["log-dataset", "run.py"],
    ["train", "run.py", "--dry-run"],
    ["plan", "run.py", "--vram", "8GiB"],
)


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words[:2]) for words in COMMANDS])
def test_every_command_takes_the_file_itself(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Robin."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(20)))
    (tmp_path / "run.py").write_text(DEMO)
    assert main(words) == 0
    said = capsys.readouterr()
    assert "run.py: model.llm.trust_remote_code = True: not taken over" in said.err


def test_the_plan_of_the_file_is_that_of_its_yaml(tmp_path, monkeypatch, capsys):
    """`plan` reads no data, so that the numbers can be compared."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").write_text(DEMO)
    assert main(["config", "import", "run.py", "ours.yaml"]) == 0
    capsys.readouterr()
    found = []
    for name in ("run.py", "ours.yaml"):
        assert main(["plan", name, "--vram", "8GiB", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]


def test_an_adapter_of_the_file_s_run_is_converted(tmp_path, monkeypatch, capsys):
    """XTuner's whole road: its config, its .pth, and a PEFT adapter with the alpha that only the config knows."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").write_text(DEMO)
    base = json.loads((DEMO_MODEL / "config.json").read_text())
    tensors = {}
    for layer in range(base["num_hidden_layers"]):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{at}.lora_A.weight"] = torch.randn(16, base["hidden_size"])
        tensors[f"{at}.lora_B.weight"] = torch.randn(base["hidden_size"], 16)
    state = {f"llm.{name.replace('.weight', '.default.weight')}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": state, "meta": {}}, "iter_9.pth")
    assert main(["convert", "pth_to_hf", "run.py", "iter_9.pth", "out"]) == 0, capsys.readouterr().err
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in tensors.items())
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (16, 32)
    assert settings["base_model_name_or_path"] == "demo"


def test_the_projector_of_the_first_stage_is_converted_as_the_note_says(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    model = f"{LLAVA}, freeze_llm=True, freeze_visual_encoder=True, pretrained_pth='first stage/iter_9.pth', {LLM_LORA}"
    (tmp_path / "run.py").write_text(config(IMAGES, model, NF4))
    (tmp_path / "first stage").mkdir()
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    state = {f"projector.model.{name}": torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"state_dict": state, "meta": {}}, "first stage/iter_9.pth")
    (note,) = [note for note in load("run.py").notes if "pretrained_pth" in note]
    program, *words = shlex.split(note.split("`")[1])
    assert program == "fastft"
    assert main(words) == 0, capsys.readouterr().err
    folder = shlex.split(note.partition("vision.projector=")[2])[0].removesuffix(".")
    found = load_file(f"{folder}/model.safetensors")
    assert found.keys() == {name.removeprefix("projector.") for name in state}
    assert all(torch.equal(found[name], state[f"projector.{name}"]) for name in found)
    assert load("run.py", [f"vision.projector={folder}"]).config.vision.projector == "first stage/iter_9_hf/projector"
