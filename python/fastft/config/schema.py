"""What may stand in a config: every field once, with its default, unit and reason.

The reference page, the editor schema (`fastft config schema`) and the comments that `copy-cfg` writes are generated
from here. Models are frozen and refuse unknown keys; `config.load` turns a refusal into file:line and the nearest key.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypeIs

Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Format = Literal[
    "auto",
    "alpaca",
    "sharegpt",
    "messages",
    "conversation",
    "guanaco",
    "columns",
    "text",
    "preference",
    "judged",
]
Task = Literal["pretrain", "sft", "dpo", "orpo", "reward", "kto"]


class Section(BaseModel):
    """A part of the config; frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(Section):
    """Which weights to start from."""

    name: Name = Field(description="folder on this machine, or the model's id on the hub; `demo` is the embedded model")
    hub: Literal["huggingface", "modelscope"] = Field(
        "huggingface", description="where to look when `name` is no folder; the variable FASTFT_HUB overrides it"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub; null is the hub's default")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="`random` takes config.json and tokenizer from `name` and draws new weights"
    )
    dtype: Dtype = Field(
        "auto",
        description=(
            "dtype of the weights; auto: the checkpoint's own for a frozen base (fp32 on a CPU for qlora), fp32 for full, "
            "with products in bf16 on a GPU"
        ),
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="attention code; auto: flash attention where it is installed and the card has it, else sdpa"
    )
    chat_template: str | None = Field(
        None,
        description="for a tokenizer that has none: a name in configs/chat_templates, or a .jinja file",
    )


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021)."""

    r: Annotated[int, Field(ge=1, le=65536)] = Field(64, description="rank")
    alpha: Annotated[float, Field(gt=0)] = Field(16, description="the update is scaled by alpha/r")
    dropout: Fraction = Field(0.0, description="dropout on the adapter's input")
    targets: Literal["all-linear"] | tuple[Name, ...] = Field(
        "all-linear", description="module names that get an adapter; all-linear: every linear layer but the head"
    )
    modules_to_save: tuple[Name, ...] = Field((), description="modules trained in full beside the adapter")
    rslora: bool = Field(False, description="scale by alpha/sqrt(r) (Kalajdzievski 2023)")
    dora: bool = Field(False, description="learn each output's magnitude apart from its direction (Liu et al. 2024)")
    init: Literal["default", "gaussian", "pissa", "olora", "loftq"] = Field(
        "default",
        description=(
            "what the adapter starts from: nothing (default, gaussian); what matters most of the weights (pissa, olora; "
            "not for qlora); what 4 bits lost (loftq, for qlora). All are saved so that they merge onto the original base"
        ),
    )


class Quantization(Section):
    """How a QLoRA base is held in memory (Dettmers et al. 2023)."""

    type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit code book")
    double_quant: bool = Field(True, description="quantize the block scales too: saves 0.4 bit per weight")
    compute_dtype: Dtype = Field("auto", description="dtype of the products; auto: bf16 where the device has it")


class Method(Section):
    """What is trained."""

    kind: Literal["full", "freeze", "lora", "qlora"] = Field(
        description="all weights, those of the last layers (freeze), adapters, or adapters on a 4-bit base"
    )
    trained_layers: Positive | None = Field(
        None, description="for freeze: how many decoder layers are trained, counted from the last; 2 if left out"
    )
    lora: Lora | None = Field(None, description="for lora and qlora")
    quantization: Quantization | None = Field(None, description="for qlora")

    @model_validator(mode="before")
    @classmethod
    def _fill_blocks(cls, values: object) -> object:
        """Give lora and qlora their default blocks when the config leaves them out."""
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        if filled.get("kind") in ("lora", "qlora") and filled.get("lora") is None:
            filled["lora"] = {}
        if filled.get("kind") == "qlora" and filled.get("quantization") is None:
            filled["quantization"] = {}
        if filled.get("kind") == "freeze" and filled.get("trained_layers") is None:
            filled["trained_layers"] = 2
        return filled

    @model_validator(mode="after")
    def _no_idle_blocks(self) -> Self:
        if not self.has_adapter and self.lora is not None:
            raise ValueError(f"`lora` has no effect with kind: {self.kind}; set method.lora=null, or kind: lora")
        if self.kind != "qlora" and self.quantization is not None:
            raise ValueError(
                f"`quantization` has no effect with kind: {self.kind}; set method.quantization=null, or kind: qlora"
            )
        if self.kind != "freeze" and self.trained_layers is not None:
            raise ValueError(
                f"`trained_layers` has no effect with kind: {self.kind}; set method.trained_layers=null, or kind: freeze"
            )
        if self.lora is not None:
            self._start_fits(self.lora)
        return self

    def _start_fits(self, lora: Lora) -> None:
        if lora.init in {"pissa", "olora"} and self.kind == "qlora":
            raise ValueError(
                f"lora.init: {lora.init} changes the base, which 4 bits would round again; use loftq, or kind: lora"
            )
        if lora.init == "loftq" and self.kind != "qlora":
            raise ValueError(
                f"lora.init: loftq makes up for 4 bits, and kind: {self.kind} has none; use pissa or default"
            )
        if lora.init in {"pissa", "olora", "loftq"} and lora.dora:
            raise ValueError(f"lora.init: {lora.init} and lora.dora do not go together; set one of them back")

    @property
    def has_adapter(self) -> bool:
        """Whether the result is an adapter, and the base stays as it is."""
        return self.kind in {"lora", "qlora"}


class Columns(Section):
    """Text made from a row's columns; `{name}` stands for the column `name`, used by format: columns."""

    system: str | None = Field(None, description="system message, e.g. `{system_prompt}`")
    user: Name = Field(description="what the user says, e.g. `{question}\\n{context}`")
    assistant: Name = Field(
        description="what the model learns to answer, e.g. `{answer}`; for tasks dpo, orpo and reward the better answer"
    )
    rejected: str | None = Field(None, description="the worse answer, e.g. `{bad_answer}`; for dpo, orpo and reward")
    label: str | None = Field(None, description="column that says whether the answer is good (true, false); for kto")


class Source(Section):
    """One data set."""

    source: Name = Field(
        description="file (json, jsonl, parquet, csv, txt; .gz too), folder of these, id on the hub, or demo/NAME"
    )
    format: Format = Field("auto", description="how a row is read; auto looks at the columns and says what it chose")
    columns: Columns | None = Field(None, description="for format: columns")
    hub: Literal["huggingface", "modelscope"] = Field("huggingface", description="where to look for an id")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: Name = Field("train", description="split of a hub data set")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    images: str | None = Field(
        None,
        description=(
            "folder that paths of images in the rows start from, and which they may not leave; null: the folder of the "
            "data file"
        ),
    )
    system: str | None = Field(None, description="system message for dialogues that have none")
    max_rows: Positive | None = Field(None, description="use only so many rows, from the start")
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0,
        description=(
            "times that each sample of this source stands in an epoch: 2 is each twice, 0.5 every other one, "
            "chosen by the seed; of no effect in `eval`"
        ),
    )

    @model_validator(mode="after")
    def _columns_match(self) -> Self:
        if (self.format == "columns") != (self.columns is not None):
            raise ValueError("`columns` and `format: columns` belong together; set both or neither")
        return self


class Check(Section):
    """What makes a data set unfit: `check-dataset` and `train` fail with exit code 1 beyond these limits."""

    min_samples: Positive | None = Field(None, description="fewest samples to learn from")
    max_bad_rows: Fraction | None = Field(
        None, description="largest part of the rows that on_bad_row: skip may leave out, 0 to 1"
    )
    max_truncated: Fraction | None = Field(
        None, description="largest part of the samples cut off at max_length, 0 to 1"
    )
    max_not_learned: Fraction | None = Field(
        None, description="largest part of the samples dropped because no token in them is learned, 0 to 1"
    )
    max_duplicates: Fraction | None = Field(
        None, description="largest part of the samples that repeat an earlier one, 0 to 1"
    )
    max_unanswered: Fraction | None = Field(
        None, description="largest part of the samples with a user's turn that nobody answers, 0 to 1"
    )
    max_eval_in_train: Fraction | None = Field(
        None, description="largest part of the eval samples that also stand in the train data, 0 to 1"
    )
    min_filled: Fraction | None = Field(
        None, description="smallest part of the packed rows' room that holds tokens, 0 to 1"
    )
    min_stops: Fraction | None = Field(
        None,
        description="smallest part of the samples in which the end of a turn is learned; without it answers do not end",
    )


class Data(Section):
    """What is learned from."""

    train: tuple[Source, ...] = Field(min_length=1, description="data sets to learn from, joined")
    eval: tuple[Source, ...] = Field((), description="data sets to measure the loss on")
    eval_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="without `eval`: rows held back from training, chosen by the seed"
    )
    max_length: Annotated[int, Field(ge=8, le=16_777_216)] = Field(
        2048, description="longest sample in tokens; the rest is cut off"
    )
    packing: bool = Field(
        True, description="put several samples into one row of max_length; attention stays within a sample"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip: leave out unreadable rows, counted")
    shuffle: bool = Field(True, description="new order each epoch, by the seed")
    cache: str | None = Field(
        "auto",
        description=(
            "folder where tokenised sources are kept, so that the next run starts at once and a source may be larger "
            "than the memory; auto: the user's cache folder, for sources of 10 MB and more; null: kept nowhere"
        ),
    )
    check: Check = Field(default_factory=Check, description="limits beyond which the data set is refused")


class Learn(Section):
    """Which parts of a vision-language model are trained."""

    llm: Literal["method", "frozen"] = Field(
        "method", description="the language model: as `method` says, or not at all (the projector's own training)"
    )
    projector: Literal["full", "frozen"] = Field(
        "frozen",
        description="what brings image features into the language model; full if left out with `tower`",
    )
    tower: Literal["frozen", "lora", "full"] = Field(
        "frozen",
        description="the vision tower; lora: by `tower_lora`, beside the method's adapters or its whole weights",
    )
    tower_lora: Lora | None = Field(None, description="the tower's adapters, for tower: lora")

    @model_validator(mode="before")
    @classmethod
    def _fill_lora(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("tower") == "lora" and values.get("tower_lora") is None:
            return {**values, "tower_lora": {}}
        return values

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if self.tower != "lora" and self.tower_lora is not None:
            raise ValueError(f"`tower_lora` has no effect with tower: {self.tower}; remove it, or set tower: lora")
        if self.llm == "frozen" and self.projector == "frozen" and self.tower == "frozen":
            raise ValueError("llm, projector and tower are all frozen, so nothing is trained; set one of them")
        return self


class Vision(Section):
    """A run that learns from images too; left out, images are refused and a model reads text only."""

    tower: str | None = Field(
        None,
        description=(
            "vision tower (CLIP), a folder or the model's id on the hub: model.name is a language model, and a LLaVA is "
            "made of both; null: model.name is a vision-language model"
        ),
    )
    projector: str | None = Field(None, description="with `tower`: folder of a projector that was trained before")
    select_layer: int = Field(-2, description="with `tower`: the layer whose features are taken, counted from the end")
    learn: Learn = Field(default_factory=Learn, description="which parts are trained")
    min_pixels: Positive | None = Field(
        None,
        description="images are scaled up to so many pixels at least (processors of Qwen-VL); null: the model's own",
    )
    max_pixels: Positive | None = Field(
        None,
        description=(
            "images are scaled down to so many pixels at most (processors of Qwen-VL), which bounds the tokens that an "
            "image takes; null: the model's own"
        ),
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error", description="skip: leave out rows with an image that is missing or cannot be read, counted"
    )
    max_image_pixels: Positive = Field(
        100_000_000, description="an image with more pixels is refused as a decompression bomb"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_projector(cls, values: object) -> object:
        """A LLaVA made of parts has a projector that knows nothing yet."""
        if not isinstance(values, dict) or not values.get("tower"):
            return values
        learn = values.get("learn") or {}
        if not isinstance(learn, dict) or "projector" in learn:
            return values
        return {**values, "learn": {**learn, "projector": "full"}}

    @model_validator(mode="after")
    def _parts_match(self) -> Self:
        if self.projector is not None and self.tower is None:
            raise ValueError("`projector` is for a LLaVA made of a language model and `tower`; set tower too")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: {self.min_pixels} is more than max_pixels: {self.max_pixels}")
        return self


class Train(Section):
    """How it is learned."""

    epochs: Annotated[float, Field(gt=0)] = Field(3, description="passes over the data")
    max_steps: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = Field(
        None, description="stop after so many optimizer steps; overrides epochs"
    )
    batch_size: Annotated[int, Field(ge=1, le=65536)] = Field(1, description="rows per device and step")
    grad_accumulation: Positive = Field(16, description="steps whose gradients are summed before the optimizer moves")
    lr: Annotated[float, Field(gt=0)] = Field(2e-4, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after the warm-up")
    warmup_ratio: Fraction = Field(0.03, description="part of all steps in which the rate rises from 0")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw", description="8bit: bitsandbytes states, 2 instead of 8 bytes per trained weight"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="AdamW's decay of the two moments")
    lora_plus_ratio: Annotated[float, Field(ge=1)] = Field(
        1.0, description="the adapters' B learns at lr times this (LoRA+, Hayou et al. 2024: 16); 1 is off"
    )
    embedding_lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learning rate of a trained embedding table and head; null is lr"
    )
    layer_lr_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="each layer learns at the rate of the one above it times this, the embedding last; 1 is off"
    )
    neftune_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="noise on the embeddings in training (NEFTune, Jain et al. 2023: 5); null is none"
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="gradients are clipped to it; 0 is off")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="recompute activations in the backward pass; auto: on for CUDA, off for CPU"
    )
    log_steps: Positive = Field(10, description="steps between two lines of metrics.jsonl")
    eval_steps: Positive | None = Field(None, description="steps between two measurements on the eval data")
    sample_steps: Positive | None = Field(None, description="steps between two rounds of sample answers")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="of order, dropout and new weights")


class Preference(Section):
    """How tasks dpo, orpo and kto weigh two answers; reward needs nothing."""

    beta: Annotated[float, Field(gt=0)] = Field(
        0.1,
        description=(
            "dpo, kto: how closely the model is held to where it started, larger is closer; orpo: weight of the odds ratio"
        ),
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="dpo: part of the pairs that are thought to be the wrong way round (cDPO)"
    )
    good_weight: Annotated[float, Field(gt=0)] = Field(1.0, description="kto: weight of an answer called good")
    bad_weight: Annotated[float, Field(gt=0)] = Field(1.0, description="kto: weight of an answer called bad")


class Memory(Section):
    """What lies where on the way through a step; auto is said at the start of the run."""

    checkpoints: Literal["auto", "device", "host"] = Field(
        "auto",
        description=(
            "where the inputs of recomputed layers wait for the backward pass; host: pinned RAM, copied beside the "
            "computation, and layers are then recomputed on every device; auto: device. Exact"
        ),
    )
    embedding: Literal["auto", "device", "host"] = Field(
        "auto",
        description=(
            "where a frozen embedding table lies; host: RAM, and only a batch's rows come to the device; auto: device. Exact"
        ),
    )
    head: Literal["auto", "device", "host", "nf4"] = Field(
        "auto",
        description=(
            "where a frozen head lies; host: pinned RAM, read over PCIe once a step by tiles of the vocabulary, exact; nf4: "
            "on the device in 4 bits, not exact; auto: device"
        ),
    )
    mlp_tile_tokens: Positive | Literal["auto", "whole"] = Field(
        "auto",
        description=(
            "tokens that an MLP computes at once; fewer take less memory, and unpack 4-bit weights more often; auto: whole. "
            "Exact; dropout draws other numbers"
        ),
    )
    lora: Literal["auto", "plain", "fused"] = Field(
        "auto",
        description=(
            "fused: a layer and its adapter as one operation, without copies of inputs and outputs; plain: peft's; auto: "
            "fused on a GPU. Exact up to rounding"
        ),
    )


class Accelerate(Section):
    """What makes a run faster; auto is chosen by the machine and said, with the reason, at the start of the run."""

    liger: bool | Literal["auto"] = Field(
        "auto",
        description="liger's kernels for norm, rotary embedding and MLP; auto: on where they are installed and fit",
    )
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile of each layer; auto: off, since it takes minutes at the start"
    )
    tf32: bool | Literal["auto"] = Field(
        "auto",
        description="fp32 products of a CUDA card in TF32; auto: on from capability 8.0, unless model.dtype is fp32",
    )
    fused_optimizer: bool | Literal["auto"] = Field(
        "auto", description="AdamW as one kernel for all weights; auto: on where torch has it"
    )


class Samples(Section):
    """Prompts answered before, during and after the training, to see what it learns."""

    prompts: tuple[Name, ...] = Field((), description="what is asked (task sft) or continued (task pretrain)")
    images: tuple[Name, ...] = Field((), description="image files that are shown with each prompt, for models that see")
    system: str | None = Field(None, description="system message of the prompts")
    max_new_tokens: Positive = Field(100, description="longest answer")


class Output(Section):
    """What is written, and where."""

    dir: str | None = Field(None, description="run folder; null is work_dirs/NAME; --work-dir overrides it")
    save_steps: Positive | None = Field(500, description="steps between checkpoints; null: only at the end")
    keep: Positive = Field(2, description="newest checkpoints that stay")
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (),
        description="loggers that get the lines of metrics.jsonl too; wandb talks to its server (WANDB_MODE=offline: not)",
    )


class Distributed(Section):
    """How several processes share the work; without either each holds the whole model (DDP)."""

    fsdp: bool = Field(
        False, description="FSDP2: weights, gradients and optimizer states are shared out among the processes (--fsdp)"
    )
    deepspeed: str | None = Field(
        None,
        description=(
            "zero1, zero2, zero3, zero2_offload, zero3_offload (configs/deepspeed), or DeepSpeed's json file (--deepspeed)"
        ),
    )

    @property
    def shares(self) -> bool:
        """Whether the processes share weights or states, instead of each holding all."""
        return self.fsdp or self.deepspeed is not None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.fsdp and self.deepspeed is not None:
            raise ValueError("`fsdp` and `deepspeed` are two ways to share the same weights; set one")
        return self


class Config(Section):
    """A whole run: what `train` needs."""

    name: Name = Field("run", description="what the run is called; a recipe's name, or the file's")
    task: Task = Field(
        "sft",
        description=(
            "sft learns the assistant's answers, pretrain every token of the text; dpo, orpo and kto learn from "
            "answers that somebody compared or judged; reward makes a model that gives an answer a number"
        ),
    )
    model: Model = Field(description="which weights to start from")
    method: Method = Field(description="what is trained")
    data: Data = Field(description="what is learned from")
    vision: Vision | None = Field(None, description="for models that see: what of them is trained, and on what images")
    train: Train = Field(default_factory=Train, description="how it is learned")
    preference: Preference = Field(
        default_factory=Preference, description="how tasks dpo, orpo and kto weigh two answers"
    )
    memory: Memory = Field(default_factory=Memory, description="what lies where on the way through a step")
    accelerate: Accelerate = Field(default_factory=Accelerate, description="what makes a run faster")
    samples: Samples = Field(default_factory=Samples, description="prompts answered along the way")
    output: Output = Field(default_factory=Output, description="what is written, and where")
    distributed: Distributed = Field(default_factory=Distributed, description="how several processes share the work")

    @model_validator(mode="after")
    def _memory_fits(self) -> Self:
        memory = self.memory
        if memory.checkpoints == "host" and self.train.gradient_checkpointing is False:
            raise ValueError(
                "memory.checkpoints: host keeps the inputs of recomputed layers, and train.gradient_checkpointing: false "
                "recomputes none; set one of them to auto"
            )
        if memory.lora == "fused" and self.method.lora is not None and self.method.lora.dora:
            raise ValueError("memory.lora: fused is for plain adapters; with method.lora.dora set it to auto or plain")
        if not self.method.has_adapter:
            for name, value in (("embedding", memory.embedding), ("head", memory.head), ("lora", memory.lora)):
                if value in {"host", "nf4", "fused"}:
                    raise ValueError(
                        f"memory.{name}: {value} is for frozen weights with adapters; kind: {self.method.kind} "
                        f"{'trains them all' if self.method.kind == 'full' else 'has no adapters'}"
                    )
        if self.distributed.shares:
            for name, value in (("embedding", memory.embedding), ("head", memory.head)):
                if value in {"host", "nf4"}:
                    raise ValueError(
                        f"memory.{name}: {value} keeps a whole table in every process, which distributed shares out; "
                        "set one of them"
                    )
        return self

    @model_validator(mode="after")
    def _task_fits(self) -> Self:
        preference = self.preference
        if self.task not in {"dpo", "orpo", "kto"} and preference != Preference():
            raise ValueError(f"`preference` has no effect with task: {self.task}; remove it, or set task: dpo")
        if self.task != "dpo" and preference.label_smoothing:
            raise ValueError("preference.label_smoothing is for task: dpo; set it to 0")
        if self.task != "kto" and (preference.good_weight, preference.bad_weight) != (1.0, 1.0):
            raise ValueError("preference.good_weight and bad_weight are for task: kto; leave them at 1")
        if self.task == "reward" and self.samples.prompts:
            raise ValueError("samples.prompts: a reward model gives numbers and no answers; remove the prompts")
        if self.train.lora_plus_ratio != 1 and not self.method.has_adapter:
            raise ValueError("train.lora_plus_ratio is for adapters; set it to 1, or use kind: lora or qlora")
        return self

    @model_validator(mode="after")
    def _vision_fits(self) -> Self:
        vision, method = self.vision, self.method
        if vision is None:
            for number, source in enumerate((*self.data.train, *self.data.eval)):
                if source.images is not None:
                    raise ValueError(
                        f"source {number + 1} has `images`, which are for vision-language models; set vision"
                    )
            if self.samples.images:
                raise ValueError("samples.images are for vision-language models; set vision")
            return self
        if self.task not in {"sft", "pretrain"}:
            raise ValueError(f"`vision` is for task: sft or pretrain, not {self.task}")
        if method.kind == "freeze":
            raise ValueError("`vision` is for methods full, lora and qlora; vision.learn says which parts are trained")
        if vision.learn.tower_lora is not None:
            if method.lora is None:
                self._tower_lora_stands_alone(vision, vision.learn.tower_lora)
                return self
            ours, theirs = method.lora, vision.learn.tower_lora
            for name in ("dropout", "rslora", "dora", "init"):
                if getattr(ours, name) != getattr(theirs, name):
                    raise ValueError(
                        f"vision.learn.tower_lora.{name} must be that of method.lora: they are one adapter; r, alpha and "
                        "targets may differ"
                    )
            if theirs.modules_to_save:
                raise ValueError("vision.learn.tower_lora.modules_to_save: name them in method.lora.modules_to_save")
        return self

    @staticmethod
    def _tower_lora_stands_alone(vision: Vision, lora: Lora) -> None:
        """Adapters of the tower beside a language model that is trained whole."""
        if vision.tower is None:
            raise ValueError(
                "vision.learn.tower: lora goes with method full only for a LLaVA made of parts (vision.tower): the result of"
                " this model is one folder of whole weights; use lora or qlora, or tower: full"
            )
        if lora.init not in {"default", "gaussian"}:
            raise ValueError(
                f"vision.learn.tower_lora.init: {lora.init} is not built beside method full; use default or gaussian"
            )
        if lora.modules_to_save:
            raise ValueError(
                "vision.learn.tower_lora.modules_to_save is not built beside method full; use tower: full to train it whole"
            )

    @model_validator(mode="after")
    def _sharing_fits(self) -> Self:
        wanted, train = self.distributed, self.train
        if not wanted.fsdp and wanted.deepspeed is None:
            return self
        way = "fsdp" if wanted.fsdp else "deepspeed"
        if self.task not in {"pretrain", "sft"}:
            raise ValueError(
                f"distributed.{way}: not built for task: {self.task}; without it each process holds the whole model"
            )
        if (train.lora_plus_ratio, train.layer_lr_decay, train.embedding_lr) != (1.0, 1.0, None):
            raise ValueError(
                f"distributed.{way}: not built for rates that differ; leave lora_plus_ratio, layer_lr_decay and embedding_lr"
            )
        return self


def leaves(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Dotted keys of all single values of the config (`train.lr`), in the order of the schema; lists are one value."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)), None)
        keys += leaves(inner, f"{prefix}{name}.") if inner is not None else [prefix + name]
    return keys


def _is_section(annotation: object) -> TypeIs[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)
