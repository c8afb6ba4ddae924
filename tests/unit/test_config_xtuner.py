"""XTuner's configs, in the shape of each of its families, become ours; what has no counterpart is said."""

import pytest
from ruamel.yaml import YAML

from fastft.__main__ import main
from fastft.config.load import load
from fastft.config.xtuner import imported
from fastft.errors import ConfigError

HEAD = """
import torch
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from xtuner.dataset import ConcatDataset, process_hf_dataset, process_ms_dataset
from xtuner.dataset.map_fns import alpaca_map_fn, oasst1_map_fn, openai_map_fn, pretrain_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook, VarlenAttnArgsToMessageHubHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.parallel.sequence import SequenceParallelSampler
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

# PART 1
pretrained_model_name_or_path = 'internlm/internlm2-chat-1_8b'
use_varlen_attn = False
alpaca_path = 'tatsu-lab/alpaca'
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = 1024
pack_to_max_length = True
sequence_parallel_size = 1
batch_size = 2
accumulative_counts = 8
accumulative_counts *= sequence_parallel_size
max_epochs = 4
optim_type = AdamW
lr = 1e-4
betas = (0.9, 0.95)
weight_decay = 0.1
max_norm = 0.5
warmup_ratio = 0.1
save_steps = 400
save_total_limit = 3
evaluation_freq = 200
SYSTEM = ''
evaluation_inputs = ['Who are you?']
"""
TOKENIZER = """
tokenizer = dict(
    type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=pretrained_model_name_or_path,
    trust_remote_code=True, padding_side='right')
"""
QUANTIZED = """quantization_config=dict(
            type=BitsAndBytesConfig, load_in_4bit=True, load_in_8bit=False, llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False, bnb_4bit_compute_dtype=torch.float16, bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type='nf4')"""
LORA = """lora=dict(
        type=LoraConfig, r=32, lora_alpha=64, lora_dropout=0.05, bias='none', task_type='CAUSAL_LM')"""
DATA = """
train_set = dict(
    type=process_hf_dataset, dataset=dict(type=load_dataset, path=alpaca_path), tokenizer=tokenizer,
    max_length=max_length, dataset_map_fn=alpaca_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template), remove_unused_columns=True,
    shuffle_before_pack=True, pack_to_max_length=pack_to_max_length, use_varlen_attn=use_varlen_attn)
"""
TAIL = """
sampler = SequenceParallelSampler if sequence_parallel_size > 1 else DefaultSampler
train_dataloader = dict(
    batch_size=batch_size, num_workers=4, dataset=train_set, sampler=dict(type=sampler, shuffle=True),
    collate_fn=dict(type=None, use_varlen_attn=use_varlen_attn))
optim_wrapper = dict(
    type=AmpOptimWrapper, optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False), accumulative_counts=accumulative_counts,
    loss_scale='dynamic', dtype='float16')
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup_ratio * max_epochs,
         convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=warmup_ratio * max_epochs, end=max_epochs,
         convert_to_iter_based=True)]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=EvaluateChatHook, tokenizer=tokenizer, every_n_iters=evaluation_freq,
         evaluation_inputs=evaluation_inputs, system=SYSTEM, prompt_template=prompt_template)]
if use_varlen_attn:
    custom_hooks += [dict(type=VarlenAttnArgsToMessageHubHook)]
default_hooks = dict(
    timer=dict(type=IterTimerHook), logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=16),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=save_steps, max_keep_ckpts=save_total_limit),
    sampler_seed=dict(type=DistSamplerSeedHook))
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0))
visualizer = None
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=False)
"""


def model(*parts, llm=()):
    inner = ", ".join(
        [
            "type=AutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path=pretrained_model_name_or_path",
            "torch_dtype=torch.float16",
            *llm,
        ]
    )
    whole = ", ".join(["type=SupervisedFinetune", "use_varlen_attn=use_varlen_attn", f"llm=dict({inner})", *parts])
    return f"model = dict({whole})\n"


QLORA = HEAD + TOKENIZER + model(LORA, llm=[QUANTIZED]) + DATA + TAIL


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write_file(text, name="my_run.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write_file


def test_a_qlora_config_is_taken_over_whole(write):
    loaded = load(write(QLORA))
    config = loaded.config
    assert (config.name, config.task, config.output.dir) == ("my_run", "sft", "work_dirs/my_run")
    assert config.model.name == "internlm/internlm2-chat-1_8b"
    # From our own part for this model: its tokenizer as published has no template.
    assert config.model.chat_template == "internlm2_chat"
    assert config.method.kind == "qlora"
    assert (config.method.lora.r, config.method.lora.alpha, config.method.lora.dropout) == (32, 64, 0.05)
    assert (config.method.quantization.type, config.method.quantization.double_quant) == ("nf4", True)
    (source,) = config.data.train
    assert (source.source, source.format) == ("tatsu-lab/alpaca", "alpaca")
    assert (config.data.max_length, config.data.packing, config.data.shuffle) == (1024, True, True)
    train = config.train
    assert (train.epochs, train.batch_size, train.grad_accumulation, train.lr) == (4, 2, 8, 1e-4)
    assert (train.betas, train.weight_decay, train.max_grad_norm) == ((0.9, 0.95), 0.1, 0.5)
    assert (train.schedule, train.warmup_ratio, train.seed) == ("cosine", pytest.approx(0.1), 42)
    # 400, 200 and 16 iterations of 8 to a step.
    assert (config.output.save_steps, config.output.keep) == (50, 3)
    assert (train.sample_steps, train.log_steps) == (25, 2)
    assert config.samples.prompts == ("Who are you?",)
    assert loaded.notes == ("model.llm.torch_dtype = float16: the checkpoint's own dtype is used (model.dtype: auto)",)


def test_a_variable_of_part_1_counts_where_it_is_used(write):
    loaded = load(write(QLORA.replace("lr = 1e-4", "lr = 3e-5").replace("max_length = 1024", "max_length = 512")))
    assert (loaded.config.train.lr, loaded.config.data.max_length) == (3e-5, 512)


def test_overrides_are_laid_over_it(write):
    assert load(write(QLORA), ["train.lr=1e-3"]).config.train.lr == 1e-3


def test_lora_and_full(write):
    lora = load(write(HEAD + TOKENIZER + model(LORA) + DATA + TAIL)).config.method
    assert (lora.kind, lora.quantization) == ("lora", None)
    full = load(write(HEAD + TOKENIZER + model() + DATA + TAIL)).config.method
    assert (full.kind, full.lora) == ("full", None)


def test_pretraining_on_files_and_a_folder(write):
    data = """
train_set = dict(
    type=process_hf_dataset, dataset=dict(type=load_dataset, path='json', data_files=['a.json', 'b.json']),
    tokenizer=tokenizer, max_length=max_length, dataset_map_fn=pretrain_map_fn, template_map_fn=None,
    remove_unused_columns=True, shuffle_before_pack=False, pack_to_max_length=pack_to_max_length)
"""
    config = load(write(HEAD + TOKENIZER + model() + data + TAIL)).config
    assert config.task == "pretrain"
    assert [(source.source, source.format) for source in config.data.train] == [("a.json", "text"), ("b.json", "text")]


def test_joined_data_sets_keep_their_formats(write):
    data = """
def part(): pass
zh = dict(
    type=process_ms_dataset, dataset=dict(type=load_dataset, path='acme/dialogues', name='zh', split='sft'),
    tokenizer=tokenizer, max_length=max_length, dataset_map_fn=openai_map_fn, max_dataset_length=100,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template), pack_to_max_length=True)
oasst = dict(
    type=process_hf_dataset, dataset=dict(type=load_dataset, path='timdettmers/openassistant-guanaco'),
    tokenizer=tokenizer, max_length=2048, dataset_map_fn=oasst1_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template), pack_to_max_length=True)
own = dict(
    type=process_hf_dataset, dataset=dict(type=load_dataset, path='json', data_files=dict(train='own.json')),
    tokenizer=tokenizer, max_length=max_length, dataset_map_fn=my_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template), pack_to_max_length=True)
train_set = dict(type=ConcatDataset, datasets=[zh, oasst, own])
""".replace("def part(): pass", "def my_map_fn(example):\n    return example")
    loaded = load(write(HEAD + TOKENIZER + model(LORA) + data + TAIL))
    zh, oasst, own = loaded.config.data.train
    assert (zh.source, zh.format, zh.hub, zh.subset, zh.split) == (
        "acme/dialogues",
        "messages",
        "modelscope",
        "zh",
        "sft",
    )
    assert zh.max_rows == 100
    assert (oasst.source, oasst.format) == ("timdettmers/openassistant-guanaco", "guanaco")
    assert (own.source, own.format) == ("own.json", "auto")
    assert loaded.config.data.max_length == 2048
    assert any(note.startswith("dataset_map_fn my_map_fn of own.json: not run") for note in loaded.notes)
    assert any(note.startswith("max_length differs") for note in loaded.notes)


def test_the_text_inside_a_pth_names_types_as_text():
    """mmengine writes a config into its checkpoints with every type spelled out."""
    text = (
        "model = dict(llm=dict(pretrained_model_name_or_path='acme/base', type="
        "'transformers.AutoModelForCausalLM.from_pretrained'), lora=dict(lora_alpha=16, r=64, type='peft.LoraConfig'),"
        " type='xtuner.model.SupervisedFinetune')\n"
        "train_dataloader = dict(batch_size=1, dataset=dict(dataset=dict(path='acme/data', type="
        "'datasets.load_dataset'), dataset_map_fn='xtuner.dataset.map_fns.alpaca_map_fn', max_length=2048,"
        " pack_to_max_length=True, type='xtuner.dataset.process_hf_dataset'))\n"
        "optim_wrapper = dict(optimizer=dict(lr=0.0002, type='torch.optim.AdamW'), type='mmengine.optim.AmpOptimWrapper')\n"
    )
    values = imported(text, "iter_500.pth").values
    assert values["method"] == {"kind": "lora", "lora": {"r": 64, "alpha": 16}}
    assert values["data"]["train"] == [{"source": "acme/data", "format": "alpaca"}]
    assert values["train"]["optimizer"] == "adamw"


def test_what_has_no_counterpart_is_listed(write):
    text = QLORA.replace("load_from = None", "load_from = 'old.pth'").replace("optim_type = AdamW", "optim_type = Lion")
    text = text.replace("from torch.optim import AdamW", "from lion import Lion").replace("use_varlen_attn=use_varlen_attn, llm", "max_position_embeddings=8192, llm")  # fmt: skip
    notes = load(write(text.replace("eta_min=0.0", "eta_min=1e-6"))).notes
    assert "load_from = 'old.pth': no counterpart; left out" in notes
    assert "model.max_position_embeddings = 8192: no counterpart; left out" in notes
    assert "optim_wrapper.optimizer.type = Lion: no counterpart; adamw is used" in notes
    assert "param_scheduler: eta_min = 1e-06: the rate falls to 0 here" in notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("type=SupervisedFinetune", "type=LLaVAModel2"), "model.type LLaVAModel2: not built"),
        (("load_in_4bit=True, load_in_8bit=False", "load_in_4bit=False, load_in_8bit=True"), "8-bit bases are not built"),
        (("type=process_hf_dataset", "type=process_intern_repo_dataset"), "data sets of process_intern_repo_dataset"),
        (("path=alpaca_path", "path=None"), "train_dataloader.dataset.dataset.path: the data set's path or id is missing"),
        (("train_dataloader = dict(", "loader = dict("), "no XTuner config"),
        (("lr=lr", "lr=-1"), "train.lr: -1 came; allowed: a number above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(write, change, said):
    text = QLORA.replace("import SupervisedFinetune", "import LLaVAModel2, SupervisedFinetune")
    text = text.replace("import ConcatDataset", "import process_intern_repo_dataset, ConcatDataset").replace(*change)
    with pytest.raises(ConfigError, match=".") as caught:
        load(write(text))
    assert said in str(caught.value)


def test_config_import_writes_yaml_that_loads_the_same(write, tmp_path, capsys):
    name = write(QLORA)
    assert main(["config", "import", name, "ours.yaml"]) == 0
    said = capsys.readouterr()
    assert said.out == "written to ours.yaml\n"
    assert "torch_dtype = float16" in said.err
    assert YAML(typ="safe").load((tmp_path / "ours.yaml").read_text())["method"]["kind"] == "qlora"
    assert load("ours.yaml").config == load(name).config
    assert main(["config", "import", name, "ours.yaml"]) == 1
    assert "ours.yaml exists; choose another name or add --force" in capsys.readouterr().err
    assert main(["config", "import", "ours.yaml", "x.yaml"]) == 2
