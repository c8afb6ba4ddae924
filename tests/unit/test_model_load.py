"""A base from its folder: dtypes, 4 bit, adapters, tokenizers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from fastft.config import schema
from fastft.errors import CheckpointError, ConfigError
from fastft.model import adapter, device, load, quantization, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return tiny_run.write_model(folder / "bf16", dtype="bfloat16")


def _load(model: Path, **changes: Any) -> load.Loaded:
    return load.load(tiny_run.config(model, Path("unused.jsonl"), **changes))


def _dtypes(loaded: load.Loaded) -> set[str]:
    return {device.short_name(p.dtype) for p in loaded.model.parameters()}


def test_dtypes(model: Path) -> None:
    assert _dtypes(_load(model, kind="full")) == {"float32"}
    assert _dtypes(_load(model, kind="full", model__dtype="bf16")) == {"bfloat16"}
    assert _dtypes(_load(model, kind="lora")) == {"bfloat16", "float32"}
    assert _dtypes(_load(model, kind="qlora")) == {"uint8", "float32"}
    assert _dtypes(_load(model, kind="qlora", model__dtype="bf16")) == {"uint8", "bfloat16", "float32"}
    with pytest.raises(ConfigError, match="fp16 with method full would lose small updates"):
        _load(model, kind="full", model__dtype="fp16")


def test_fp16_becomes_bf16_and_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = _load(tiny_run.write_model(folder / "fp16", dtype="float16"), kind="lora")
    assert _dtypes(loaded) == {"bfloat16", "float32"}
    assert "the checkpoint is fp16; trained in bf16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "wanted", "stored", "weights", "products"),
    [
        ("full", "auto", "bfloat16", "float32", "bfloat16"),
        ("full", "auto", "float16", "float32", "bfloat16"),
        ("full", "bf16", "bfloat16", "bfloat16", None),
        ("full", "fp32", "bfloat16", "float32", None),
        ("lora", "auto", "bfloat16", "bfloat16", "bfloat16"),
        ("lora", "auto", "float16", "bfloat16", "bfloat16"),
        ("lora", "auto", "float32", "float32", None),
        ("lora", "fp16", "bfloat16", "float16", "float16"),
        ("qlora", "auto", "bfloat16", "bfloat16", "bfloat16"),
        ("qlora", "fp32", "bfloat16", "float32", None),
    ],
)
def test_dtypes_on_a_gpu(
    kind: str, wanted: Any, stored: str, weights: str, products: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided without one."""
    import torch

    monkeypatch.setattr(device, "has_bf16", lambda _device: True)
    on = torch.device("cuda")
    chosen = device.weights_dtype(wanted, getattr(torch, stored), kind, on)
    multiplied = device.products_dtype(wanted, chosen, kind, on)
    assert device.short_name(chosen) == weights
    assert (None if multiplied is None else device.short_name(multiplied)) == products


def test_dtypes_on_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(device, "has_bf16", lambda _device: False)
    on = torch.device("cuda")
    for kind, weights in (("full", torch.float32), ("lora", torch.float16), ("qlora", torch.float16)):
        chosen = device.weights_dtype("auto", torch.bfloat16, kind, on)
        assert (chosen, device.products_dtype("auto", chosen, kind, on)) == (weights, torch.float16)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_only_fp32_adapters_are_trained(kind: str, model: Path) -> None:
    loaded = _load(model, kind=kind)
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # layers, linear modules, A and B
    assert all("lora_" in name and device.short_name(p.dtype) == "float32" for name, p in trained.items())
    assert not any("lm_head" in name for name in trained)
    # r (in + out) for q, k, v, o, gate, up, down of both layers.
    expected = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + 3 * (32 + 64))
    assert adapter.count_weights(loaded.model)[0] == expected


def test_a_4bit_weight_counts_as_one(model: Path) -> None:
    plain, packed = _load(model, kind="lora"), _load(model, kind="qlora")
    assert adapter.count_weights(packed.model) == adapter.count_weights(plain.model)


def test_the_record_names_what_was_asked(model: Path) -> None:
    loaded = _load(model, kind="qlora", method__lora={"r": 2, "alpha": 3.5, "rslora": True, "targets": ("q_proj",)})
    config = loaded.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias) == (2, 3.5, True, "none")
    assert set(config.target_modules) == {"q_proj"}
    assert config.base_model_name_or_path == str(model.resolve())
    assert loaded.quantized == quantization.Quantized("nf4", True, 64, "float32", "float32", ("lm_head",))


def test_modules_to_save_are_trained_in_fp32(model: Path) -> None:
    import torch

    loaded = _load(model, method__lora={"r": 2, "modules_to_save": ("lm_head",)})
    trained = {name: p.dtype for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert set(trained.values()) == {torch.float32}
    ids = torch.arange(8).reshape(1, 8)
    loaded.model(input_ids=ids, labels=ids).loss.backward()


def test_unknown_modules_are_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.targets: q_prj is no module of this model; did you mean q_proj\?"):
        _load(model, method__lora={"targets": ("q_prj",)})
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save: zzz is no module"):
        _load(model, method__lora={"modules_to_save": ("zzz",)})


def test_random_weights_follow_the_seed(model: Path) -> None:
    import torch

    one, same, other = (
        _load(model, kind="full", model__init="random", train__seed=seed).model.lm_head.weight for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    with pytest.raises(ConfigError, match="random makes new weights, which a 4-bit method would freeze"):
        _load(model, kind="qlora", model__init="random")


def test_a_4bit_checkpoint_is_used_as_it_is(model: Path, folder: Path) -> None:
    stored = folder / "nf4"
    if not stored.exists():
        plain = _load(model, kind="qlora", method__quantization={"double_quant": False})
        plain.model.unload().save_pretrained(stored)
        plain.tokenizer.save_pretrained(stored)
    loaded = _load(stored, kind="qlora")
    assert loaded.quantized is not None
    assert not loaded.quantized.double_quant  # the checkpoint's, not the schema's default
    with pytest.raises(ConfigError, match="full cannot train a 4-bit checkpoint"):
        _load(stored, kind="full")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized as gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantized as bitsandbytes 8 bit"),
    ],
)
def test_other_quantizations_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model models/a: the checkpoint is {message}"):
        quantization.of_checkpoint({"quantization_config": block}, "models/a")


def test_a_foreign_tokenizer_is_refused(folder: Path) -> None:
    small = tiny_run.write_model(folder / "small", vocab_size=100)
    with pytest.raises(CheckpointError, match="ids up to 299, the model has embeddings for 0 to 99"):
        _load(small)


def test_internlm_is_llama_with_biases(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    source = tiny_run.write_model(folder / "biased", attention_bias=True)
    internlm = folder / "internlm"
    internlm.mkdir()
    for file in source.iterdir():
        (internlm / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    del config["attention_bias"]
    config |= {"model_type": "internlm", "bias": True, "architectures": ["InternLMForCausalLM"]}
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"}}
    (internlm / "config.json").write_text(json.dumps(config))
    weights = _load(internlm, kind="full").model.state_dict()
    stored = load_file(source / "model.safetensors")
    assert any(name.endswith("o_proj.bias") for name in stored)
    assert all(torch.equal(weights[name], value) for name, value in stored.items())


@pytest.mark.parametrize("kind", ["internlm", "internlm3"])
def test_internlm_with_the_tokenizer_of_its_remote_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As the hub serves them: a sentencepiece tokenizer.model and a class that only remote code has."""
    from test_convert_sentencepiece import model_of
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *"abcdef", "ab", "abc"]
    names = {"vocab_size": len(pieces), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    settings = {**names, **heads, **({"attention_bias": True} if kind == "internlm" else {})}
    native = AutoConfig.for_model("llama" if kind == "internlm" else kind, **settings)
    place = folder / f"{kind}_as_published"
    AutoModelForCausalLM.from_config(native).save_pretrained(place)
    config = json.loads((place / "config.json").read_text()) | {"model_type": kind}
    config["auto_map"] = {"AutoModelForCausalLM": f"modeling_{kind}.Remote"}
    (place / "config.json").write_text(json.dumps(config))
    (place / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "InternLM3Tokenizer" if kind == "internlm3" else "InternLMTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization.Remote", None]},
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )
    vocabulary = {"added_tokens": [], "model": {"vocab": {piece: number for number, piece in enumerate(pieces)}}}
    (place / "tokenizer.model").write_bytes(model_of(vocabulary))
    loaded = _load(place, kind="full", model__chat_template="internlm2_chat")
    assert loaded.tokenizer.encode("abcd", add_special_tokens=False) == [pieces.index("abc"), pieces.index("d")]


def test_the_tokenizers_own_template_wins(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tokenizer.load_tokenizer(model, schema.Model(name="m", chat_template="llama3_chat"))
    assert own.chat_template == tiny_run.CHATML
    assert "the tokenizer's own" in capsys.readouterr().err
    bare = folder / "bare"
    tiny_run.write_tokenizer(bare, None)
    given = tokenizer.load_tokenizer(bare, schema.Model(name="m", chat_template="llama3_chat"))
    assert "<|start_header_id|>" in given.chat_template
    given.save_pretrained(folder / "saved")
    assert tokenizer.read(folder / "saved").chat_template == given.chat_template
    with pytest.raises(ConfigError, match="no chat template, so a dialogue has no form"):
        tokenizer.require_chat_template(tokenizer.load_tokenizer(bare, schema.Model(name="m")), schema.Model(name="m"))


def test_no_tokenizer_and_no_config_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        tokenizer.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read.*is this a model folder"):
        load.read_config(tmp_path)


def test_pad_id() -> None:
    from types import SimpleNamespace

    none = {"pad_token_id": None, "unk_token_id": None, "eos_token_id": None}
    assert tokenizer.pad_id(SimpleNamespace(**{**none, "pad_token_id": 7, "eos_token_id": 2})) == 7
    assert tokenizer.pad_id(SimpleNamespace(**{**none, "unk_token_id": 0, "eos_token_id": 2})) == 0
    assert tokenizer.pad_id(SimpleNamespace(**{**none, "eos_token_id": 2})) == 2
    assert tokenizer.pad_id(SimpleNamespace(**none)) == 0


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path) -> None:
    """transformers would draw them at random."""
    from safetensors.torch import load_file, save_file

    short = tiny_run.write_model(folder / "short")
    tensors = load_file(short / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"its files lack 1 weights of a LlamaForCausalLM \(model.layers.1.mlp.up"
    ):
        _load(short)


def test_tensors_without_a_place_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    more = tiny_run.write_model(folder / "more")
    tensors = load_file(more / "model.safetensors")
    tensors["model.layers.2.extra.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, more / "model.safetensors", metadata={"format": "pt"})
    _load(more)
    said = capsys.readouterr().err
    assert "1 tensors in the files are no part of a LlamaForCausalLM and are not read: model.layers.2.extra" in said
    assert "LOAD REPORT" not in said
