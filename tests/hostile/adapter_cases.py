"""Broken and hostile adapters: their settings, their tensors; and weights in 4 bit with wrong companions."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

import tiny_llama
from hostile.case import DEQUANTIZE, MERGE, VERIFY, Case, control
from hostile.place import Place, changed

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TARGETS = [name.rpartition(".")[2] for name in tiny_llama.LINEARS]
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def _settings(**changes: Any) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base()
        place.adapter()
        place.edit_json(f"adapter/{CONFIG}", **changes)

    return lay


def _text(text: bytes | str) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base()
        place.adapter()
        place.write(f"adapter/{CONFIG}", text)

    return lay


def _tensors(**changes: Any) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base()
        place.adapter()
        changed(place / f"adapter/{WEIGHTS}", **{key.replace(".", "__"): value for key, value in changes.items()})

    return lay


def _key(name: str, lay: Callable[[Place], object], *says: str) -> Case:
    return Case(f"adapter_config_{name}", lay, MERGE, says)


def config_cases() -> list[Case]:
    """adapter_config.json."""
    explosive = "(a|aa)+$"
    return [
        _key("empty", _text(""), CONFIG, "JSON"),
        _key("list", _text("[]"), CONFIG, "object"),
        _key("not_json", _text("{r: 4}"), CONFIG, "JSON"),
        _key("no_settings", _text("{}"), CONFIG, "peft_type"),
        _key("twice", _text('{"peft_type":"LORA","r":4,"r":8,"lora_alpha":8}'), CONFIG, "'r'", "twice"),
        _key("deep", _text('{"r":' + "[" * 100_000), CONFIG, "JSON"),
        _key("nul", _text(b"\0"), CONFIG, "JSON"),
        _key("r_zero", _settings(r=0), CONFIG, "r must be"),
        _key("r_negative", _settings(r=-4), CONFIG, "r must be"),
        _key("r_huge", _settings(r=10**12), CONFIG, "r must be"),
        _key("r_beyond_64_bits", _settings(r=10**30), CONFIG, "r must be"),
        _key("r_text", _settings(r="4"), CONFIG, "r must be"),
        _key("r_null", _settings(r=None), CONFIG, "r must be"),
        _key("r_fraction", _settings(r=4.5), CONFIG, "r must be"),
        _key("r_true", _settings(r=True), CONFIG, "r must be"),
        _key("r_list", _settings(r=[4]), CONFIG, "r must be"),
        _key("r_missing", _settings(r=...), CONFIG, "r must be"),
        _key("r_other_than_tensors", _settings(r=8), "adapter", "rank 4"),
        _key("alpha_nan", _text('{"peft_type":"LORA","r":4,"lora_alpha":NaN}'), CONFIG, "lora_alpha"),
        _key("alpha_infinite", _text('{"peft_type":"LORA","r":4,"lora_alpha":Infinity}'), CONFIG, "lora_alpha"),
        _key("alpha_1e400", _text('{"peft_type":"LORA","r":4,"lora_alpha":1e400}'), CONFIG, "lora_alpha"),
        _key("alpha_of_400_digits", _text('{"peft_type":"LORA","r":4,"lora_alpha":1%s}' % ("0" * 400)), CONFIG, "lora_alpha"),
        _key("alpha_zero", _settings(lora_alpha=0), CONFIG, "lora_alpha"),
        _key("alpha_negative", _settings(lora_alpha=-8), CONFIG, "lora_alpha"),
        _key("alpha_text", _settings(lora_alpha="8"), CONFIG, "lora_alpha"),
        _key("alpha_1e300", _settings(lora_alpha=1e300), CONFIG, "lora_alpha"),
        _key("unknown_type", _settings(peft_type="MAGIC"), CONFIG, "MAGIC"),
        _key("type_number", _settings(peft_type=5), CONFIG, "peft_type"),
        _key("type_list", _settings(peft_type=["LORA"]), CONFIG, "peft_type"),
        _key("prompt_tuning", _settings(peft_type="PROMPT_TUNING"), CONFIG, "PROMPT_TUNING"),
        _key("unknown_key", _settings(lora_aplha=8), CONFIG, "lora_aplha", "lora_alpha"),
        _key("unknown_key_with_codes", _settings(**{"\x1b[31mx\n": 1}), CONFIG),
        _key("unknown_key_long", _settings(**{"x" * 100_000: 1}), CONFIG),
        _key("unknown_value_long", _settings(oops="x" * 100_000), CONFIG, "oops"),
        _key("dora_text", _settings(use_dora="yes"), CONFIG, "use_dora"),
        _key("dora_without_magnitudes", _settings(use_dora=True), "magnitude"),
        _key("rslora_number", _settings(use_rslora=3), CONFIG, "use_rslora"),
        _key("bias_unknown", _settings(bias="some"), CONFIG, "bias"),
        _key("fan_in_list", _settings(fan_in_fan_out=[1]), CONFIG, "fan_in_fan_out"),
        _key("pattern_explodes", _settings(rank_pattern={explosive: 4}), CONFIG, explosive),
        _key("pattern_explodes_nested", _settings(rank_pattern={"(((a*)*)*)*b": 4}), CONFIG, "pattern"),
        _key("pattern_explodes_by_length", _settings(rank_pattern={"a?" * 60 + "a" * 60: 4}), CONFIG),
        _key("pattern_explodes_by_dots", _settings(alpha_pattern={".*" * 30 + "x": 4}), CONFIG),
        _key("pattern_many", _settings(rank_pattern={f"x{n}.*y.*z.*w": 4 for n in range(100_000)}), CONFIG),
        _key("pattern_broken", _settings(rank_pattern={"[": 4}), CONFIG, "["),
        _key("pattern_repeats_a_billion", _settings(rank_pattern={"a{1000000000}": 4}), CONFIG),
        _key("pattern_value_zero", _settings(rank_pattern={"q_proj": 0}), CONFIG, "rank_pattern"),
        _key("pattern_value_text", _settings(alpha_pattern={"q_proj": "x"}), CONFIG, "alpha_pattern"),
        _key("pattern_a_list", _settings(rank_pattern=["q_proj"]), CONFIG, "rank_pattern"),
        _key("layer_replication", _settings(layer_replication=[[0, 2]]), CONFIG, "layer_replication"),
        _key("pissa", _settings(init_lora_weights="pissa"), CONFIG, "pissa"),
        _key("pissa_iterations", _settings(init_lora_weights="pissa_niter_4"), CONFIG, "pissa"),
        _key("init_list", _settings(init_lora_weights=["x"]), CONFIG, "init_lora_weights"),
        _key("init_dict", _settings(init_lora_weights={}), CONFIG, "init_lora_weights"),
        _key("target_parameters_text", _settings(target_parameters="x"), CONFIG, "target_parameters"),
        _key("token_indices_text", _settings(trainable_token_indices="x"), "trainable_token_indices"),
        _key("token_indices_negative", _settings(trainable_token_indices=[-1]), "trainable_token_indices"),
        _key("token_indices_without_rows", _settings(trainable_token_indices=[1, 2]), "trainable_token_indices"),
        _key("modules_to_save_missing", _settings(modules_to_save=["lm_head"]), "lm_head"),
        _key("modules_to_save_number", _settings(modules_to_save=5), "modules_to_save"),
        _key("targets_not_in_tensors", _settings(target_modules=[*TARGETS, "lm_head"]), "lm_head"),
        _key("targets_fewer_than_tensors", _settings(target_modules=["q_proj"]), "target_modules"),
        _key("base_name_a_payload", _settings(r=0, base_model_name_or_path="\x1b[2J"), CONFIG, "r must be"),
        _key("missing", lambda p: (p.base(), p.adapter(), (p / f"adapter/{CONFIG}").unlink()), "adapter", CONFIG),
        Case("adapter_missing", lambda p: p.base(), MERGE, ("adapter",)),
        Case("adapter_a_file", lambda p: (p.base(), p.write("adapter", "x")), MERGE, ("adapter", "folder")),
        Case("adapter_empty_folder", lambda p: (p.base(), (p / "adapter").mkdir()), MERGE, ("adapter", CONFIG)),
        Case("adapter_is_a_model", lambda p: (p.base(), p.base("adapter")), MERGE, ("adapter", CONFIG)),
        Case("base_is_an_adapter", lambda p: (p.adapter("base"), p.adapter()), MERGE, ("base",)),
        Case("adapter_record_broken", lambda p: (p.base(), p.adapter(), p.write("adapter/fastft_training.json", "{")),
             MERGE, ("fastft_training.json",)),
        Case("adapter_record_list", lambda p: (p.base(), p.adapter(), p.write("adapter/fastft_training.json", "[]")),
             MERGE, ("fastft_training.json",)),
        Case("adapter_record_base_text", lambda p: (p.base(), p.adapter(), p.write("adapter/fastft_training.json",
             '{"quantization":"nf4"}')), MERGE, ("fastft_training.json",)),
        Case("adapter_record_quantization_wrong", lambda p: (p.base(), p.adapter(), p.write("adapter/fastft_training.json",
             '{"quantization":{"type":"nf5","blocksize":7}}')), MERGE, ("fastft_training.json",)),
        Case("adapter_record_quantization_text", lambda p: (p.base(), p.adapter(), p.write("adapter/fastft_training.json",
             '{"quantization":[1]}')), MERGE, ("fastft_training.json",)),
        Case("adapter_record_pipe", lambda p: (p.base(), p.adapter(), p.pipe("adapter/fastft_training.json")),
             MERGE, ("fastft_training.json",)),
        Case("adapter_pickle_payload", lambda p: (p.base(), p.adapter(), _pickled_adapter(p)), MERGE, ("adapter_model.bin",)),
        Case("adapter_twice", lambda p: (p.base(), p.adapter()), ("convert", "merge", "base", "adapter", "out", "--adapter",
             "nowhere:0.5"), ("nowhere",)),
    ]  # fmt: skip


def _pickled_adapter(place: Place) -> None:
    from hostile.pickle_cases import payload_archive

    (place / f"adapter/{WEIGHTS}").unlink()
    place.write("adapter/adapter_model.bin", payload_archive(place.payload))


def _matrix(rows: int, columns: int, value: float = 0.1, dtype: type = np.float32) -> np.ndarray:
    return np.full((rows, columns), value, dtype)


def tensor_cases() -> list[Case]:
    """What is in the adapter's tensors."""
    a, b = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
    nan = _matrix(4, 24)
    nan[1, 1] = np.nan
    rest = {key: None for key in tiny_llama.adapter_tensors() if key not in (a, b)}
    return [
        Case("lora_nan", _tensors(**{a: nan}), MERGE, ("q_proj", "undefined")),
        Case("lora_infinite", _tensors(**{b: _matrix(24, 4, np.inf)}), MERGE, ("q_proj",)),
        Case("lora_overflows", _tensors(**{a: _matrix(4, 24, 3e38), b: _matrix(24, 4, 3e38)}), MERGE, ("q_proj",)),
        Case("lora_rank_mismatch", _tensors(**{a: _matrix(5, 24)}), MERGE, ("q_proj",)),
        Case("lora_wrong_in", _tensors(**{a: _matrix(4, 23)}), MERGE, ("q_proj",)),
        Case("lora_wrong_out", _tensors(**{b: _matrix(23, 4)}), MERGE, ("q_proj",)),
        Case("lora_rank_zero", _tensors(**{a: _matrix(0, 24), b: _matrix(24, 0)}), MERGE, ("q_proj",)),
        Case("lora_a_without_b", _tensors(**{b: None}), MERGE, ("q_proj", "A")),
        Case("lora_b_without_a", _tensors(**{a: None}), MERGE, ("q_proj", "B")),
        Case("lora_swapped", _tensors(**{a: _matrix(24, 4), b: _matrix(4, 24)}), MERGE, ("q_proj",)),
        Case("lora_vector", _tensors(**{a: np.zeros(96, np.float32)}), MERGE, ("q_proj",)),
        Case("lora_scalar", _tensors(**{a: np.zeros((), np.float32)}), MERGE, ("q_proj",)),
        Case("lora_integers", _tensors(**{a: np.ones((4, 24), np.int64)}), MERGE, ("q_proj", "I64")),
        Case("lora_bytes", _tensors(**{a: np.ones((4, 24), np.uint8)}), MERGE, ("q_proj", "U8")),
        Case("lora_f64", _tensors(**{a: np.ones((4, 24), np.float64)}), MERGE, ("q_proj", "F64")),
        Case("lora_bool", _tensors(**{a: np.ones((4, 24), np.bool_)}), MERGE, ("q_proj", "BOOL")),
        Case("lora_layer_out_of_range", _tensors(**{
            "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": _matrix(4, 24),
            "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": _matrix(24, 4)}), MERGE, ("layers.9",)),
        Case("lora_unknown_tensor", _tensors(**{"hello.world": _matrix(2, 2)}), MERGE, ("hello.world",)),
        Case("lora_optimizer_state", _tensors(**{f"{a}.exp_avg": _matrix(4, 24)}), MERGE, ("exp_avg",)),
        Case("lora_other_kind", _tensors(**{f"{MODULE}.hada_w1_a": _matrix(4, 24)}), MERGE, ("hada_w1_a",)),
        Case("lora_two_adapters", _tensors(**{f"{MODULE}.lora_A.other.weight": _matrix(4, 24)}), MERGE, ("q_proj",)),
        Case("lora_of_a_norm", _tensors(**{
            "base_model.model.model.norm.lora_A.weight": _matrix(4, 24),
            "base_model.model.model.norm.lora_B.weight": _matrix(24, 4)}), MERGE, ("norm",)),
        Case("lora_replaces_with_wrong_shape", _tensors(**{
            "base_model.model.lm_head.modules_to_save.default.weight": _matrix(3, 3)}), MERGE, ("lm_head",)),
        Case("lora_replaces_with_integers", _tensors(**{
            "base_model.model.lm_head.modules_to_save.default.weight": np.zeros((50, 24), np.int64)}), MERGE, ("lm_head",)),
        Case("lora_replaces_with_nan", _tensors(**{
            "base_model.model.lm_head.modules_to_save.default.weight": _matrix(50, 24, np.nan)}), MERGE, ("lm_head",)),
        Case("lora_magnitude_without_dora", _tensors(**{f"{MODULE}.lora_magnitude_vector": np.ones(24, np.float32)}), MERGE,
             ("magnitude",)),
        Case("lora_bias_without_setting", _tensors(**{f"{MODULE}.lora_B.bias": np.ones(24, np.float32)}), MERGE, ("bias",)),
        Case("lora_name_climbs", _tensors(**{"../../etc/passwd": _matrix(2, 2)}), MERGE, ("passwd",)),
        Case("lora_only_half_the_modules", _tensors(**rest), MERGE, ("target_modules", "lacks")),
        Case("verify_other_adapter", lambda p: (p.base(), p.adapter(), p.base("merged")), VERIFY, ("WRONG",), is_result=True),
        Case("verify_merged_missing", lambda p: (p.base(), p.adapter()), VERIFY, ("merged",)),
        Case("verify_other_shape", lambda p: (p.base(), p.adapter(), p.base("merged"), changed(
            p / "merged/model.safetensors", model__norm__weight=np.zeros(3, np.float32))), VERIFY, ("model.norm.weight",), is_result=True),
        Case("verify_tensor_missing", lambda p: (p.base(), p.adapter(), p.base("merged"), changed(
            p / "merged/model.safetensors", model__norm__weight=None)), VERIFY, ("model.norm.weight",), is_result=True),
        control("good_adapter_with_exploding_targets", _settings(target_modules="(a+)+$"), MERGE, "out"),
        control("good_adapter_of_many_families", _settings(target_modules=[*TARGETS, "no_such_proj"]), MERGE, "out"),
        control("good_subset_of_modules", _settings_and_tensors(["q_proj"], rest), MERGE, "out"),
    ]  # fmt: skip


def _settings_and_tensors(targets: list[str], removed: dict[str, None]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        _tensors(**removed)(place)
        place.edit_json(f"adapter/{CONFIG}", target_modules=targets, layers_to_transform=[0])

    return lay


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def _four_bit(**changes: Any) -> Callable[[Place], object]:
    """A good 4-bit folder, made by our own kernel, then broken.

    Names are those of the companions of one weight; `CODES` is the weight and `STATE` its JSON text, of which a dict
    changes keys. None removes.
    """

    def lay(place: Place) -> None:
        from fastft.native import quantize_4bit

        weights = tiny_llama.weights()
        codes, state = quantize_4bit(weights[Q], blocksize=64)
        weights |= {Q: codes, **state.to_tensors(Q)}
        for key, value in changes.items():
            name = {"STATE": STATE, "CODES": Q}.get(key, f"{Q}.{key}")
            if isinstance(value, dict):
                said = json.loads(bytes(weights[STATE])) | value
                text = json.dumps({key: item for key, item in said.items() if item is not ...})
                weights[STATE] = np.frombuffer(text.encode(), np.uint8)
            elif value is None:
                weights.pop(name)
            else:
                weights[name] = value
        place.base(tensors=weights, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        place.adapter()

    return lay


def _bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def four_bit_cases() -> list[Case]:
    """Weights in 4 bit whose companions are wrong."""

    def state(name: str, *says: str, **changes: Any) -> Case:
        return Case(f"state_{name}", _four_bit(STATE=changes), DEQUANTIZE, ("q_proj", *says))

    def raw(name: str, text: bytes, *says: str) -> Case:
        return Case(f"state_{name}", _four_bit(STATE=_bytes(text)), DEQUANTIZE, ("q_proj", *says))

    return [
        state("unknown_type", "quant_type", quant_type="nf5"),
        state("fp4_under_nf4", quant_type="fp4"),
        state("blocksize_zero", "blocksize", blocksize=0),
        state("blocksize_odd", "blocksize", blocksize=48),
        state("blocksize_text", "blocksize", blocksize="64"),
        state("blocksize_huge", "blocksize", blocksize=2**62),
        state("blocksize_true", "blocksize", blocksize=True),
        state("blocksize_other", "scales", blocksize=128),
        state("dtype_unknown", "dtype", dtype="float7"),
        state("dtype_list", "dtype", dtype=[]),
        state("shape_negative", "shape", shape=[-24, -24]),
        state("shape_zero", "shape", shape=[0, 24]),
        state("shape_other", shape=[24, 48]),
        state("shape_huge", shape=[2**40, 2**40]),
        state("shape_text", "shape", shape="24x24"),
        state("shape_empty", "shape", shape=[]),
        state("shape_long", shape=[24] + [1] * 10_000 + [24]),
        state("shape_missing", "shape", shape=...),
        state("offset_nan_text", "nested_offset", nested_offset="nan"),
        state("offset_without_scales", nested_offset=0.5, nested_blocksize=256, nested_dtype="float32"),
        state("nested_blocksize", "nested_blocksize", nested_offset=0.5, nested_blocksize=255, nested_dtype="float32"),
        raw("empty", b"", "JSON"),
        raw("not_json", b"hello", "JSON"),
        raw("list", b"[]", "object"),
        raw("deep", b"[" * 60_000, "JSON"),
        raw("twice", b'{"blocksize":64,"blocksize":32}', "twice"),
        raw("not_utf8", b"\xff\xfe", "UTF-8"),
        raw("nan", b'{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[24,24],"nested_offset":NaN}', "nested_offset"),
        raw("infinite", b'{"quant_type":"nf4","blocksize":64,"dtype":"float32","shape":[24,24],"nested_offset":1e999}',
            "nested_offset"),
        raw("of_megabytes", b" " * 1_000_000, "short text"),
        Case("state_missing", _four_bit(STATE=None), DEQUANTIZE, ("q_proj",)),
        Case("state_a_float", _four_bit(STATE=np.zeros(4, np.float32)), DEQUANTIZE, ("q_proj",)),
        Case("scales_missing", _four_bit(absmax=None), DEQUANTIZE, ("q_proj", "absmax")),
        Case("scales_too_few", _four_bit(absmax=np.ones(3, np.float32)), DEQUANTIZE, ("q_proj", "scales")),
        Case("scales_bytes", _four_bit(absmax=np.ones(9, np.uint8)), DEQUANTIZE, ("q_proj", "scales")),
        Case("scales_nan", _four_bit(absmax=np.full(9, np.nan, np.float32)), DEQUANTIZE, ("q_proj", "finite")),
        Case("scales_infinite", _four_bit(absmax=np.full(9, np.inf, np.float32)), DEQUANTIZE, ("q_proj", "finite")),
        Case("scales_nan_merge", _four_bit(absmax=np.full(9, np.nan, np.float32)), MERGE, ("q_proj",)),
        Case("book_missing", _four_bit(quant_map=None), DEQUANTIZE, ("q_proj", "quant_map")),
        Case("book_foreign", _four_bit(quant_map=np.zeros(16, np.float32)), DEQUANTIZE, ("q_proj", "code book")),
        Case("book_nan", _four_bit(quant_map=np.full(16, np.nan, np.float32)), DEQUANTIZE, ("q_proj", "code book")),
        Case("codes_too_short", _four_bit(CODES=np.zeros((100, 1), np.uint8)), DEQUANTIZE, ("q_proj",)),
        Case("codes_signed", _four_bit(CODES=np.zeros((288, 1), np.int8)), DEQUANTIZE, ("q_proj",)),
        Case("companion_unknown", _four_bit(surprise=np.ones(1, np.float32)), DEQUANTIZE, ("q_proj", "surprise")),
        Case("companion_without_weight", _four_bit(CODES=None), DEQUANTIZE, ("q_proj",)),
        Case("four_bit_without_config", lambda p: (_four_bit()(p), p.edit_json("base/config.json", quantization_config=...)),
             DEQUANTIZE, ("base", "quantization_config")),
        Case("dequantize_plain", lambda p: p.base(), DEQUANTIZE, ("base",)),
        Case("quantize_twice", _four_bit(), ("convert", "quantize", "base", "out"), ("base",)),
        control("good_dequantize", _four_bit(), DEQUANTIZE, "out"),
    ]  # fmt: skip


def cases() -> list[Case]:
    """All of them."""
    return [*config_cases(), *tensor_cases(), *four_bit_cases()]
