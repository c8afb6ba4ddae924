"""Hostile model folders for training, planning and chat; broken checkpoints to resume from."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from hostile.case import CHAT, PLAN, TRAIN, Case, control
from hostile.pickle_cases import payload_archive
from hostile.place import Place, changed, entry, safetensors
from hostile.weights_cases import FILES

WEIGHTS = "chatty/model.safetensors"
# Says that a refusal came before the folder of the run was made, or in it.
RUN = ("work",)


def _laid(change: Callable[[Place], object]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.chatty()
        place.rows()
        place.config()
        change(place)

    return lay


def _both(name: str, change: Callable[[Place], object], *says: str) -> list[Case]:
    """The same broken model for training and for chat."""
    return [
        Case(f"train_{name}", _laid(change), TRAIN, says, outputs=RUN),
        Case(f"chat_{name}", _laid(change), CHAT, says),
    ]


def _config(**changes: Any) -> Callable[[Place], object]:
    return lambda place: place.edit_json("chatty/config.json", **changes)


def _text(name: str, content: bytes | str) -> Callable[[Place], object]:
    return lambda place: place.write(f"chatty/{name}", content)


def _remote(place: Place, **names: str) -> None:
    """Code in the model's folder that makes the payload when it is imported."""
    code = f"open({place.payload!r}, 'w').write('x')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    place.write("chatty/evil.py", code)
    place.edit_json("chatty/config.json", **({"auto_map": names} if names else {}))


def config_cases() -> list[Case]:
    """config.json of a model that is trained or talked to."""
    numbers = {
        "hidden_huge": {"hidden_size": 2**40},
        "hidden_zero": {"hidden_size": 0},
        "hidden_negative": {"hidden_size": -32},
        "hidden_text": {"hidden_size": "32"},
        "hidden_other": {"hidden_size": 64},
        "layers_huge": {"num_hidden_layers": 10**9},
        "layers_negative": {"num_hidden_layers": -1},
        "layers_more": {"num_hidden_layers": 3},
        "layers_fewer": {"num_hidden_layers": 1},
        "vocabulary_huge": {"vocab_size": 2**40},
        "vocabulary_small": {"vocab_size": 10},
        "heads_zero": {"num_attention_heads": 0},
        "heads_odd": {"num_attention_heads": 5},
        "heads_dict": {"num_attention_heads": {}},
        "positions_huge": {"max_position_embeddings": 2**50},
        "intermediate_fraction": {"intermediate_size": 64.5},
        "eps_nan": {"rms_norm_eps": float("nan")},
        "activation_unknown": {"hidden_act": "os.system"},
        "dtype_unknown": {"dtype": "float7"},
        "dtype_attribute": {"dtype": "load"},
        "dtype_list": {"dtype": ["float32"]},
        "type_unknown": {"model_type": "no_such_model"},
        "type_missing": {"model_type": ...},
        "type_number": {"model_type": 5},
        "type_dict": {"model_type": {}},
        "type_long": {"model_type": "x" * 100_000},
        "architectures_text": {"architectures": 5},
        "rope_broken": {"rope_scaling": "x"},
        "rope_list": {"rope_parameters": [1]},
        "quantization_gptq": {"quantization_config": {"quant_method": "gptq"}},
        "quantization_unknown": {"quantization_config": {"quant_method": "evil"}},
        "quantization_list": {"quantization_config": [1]},
        "quantization_empty": {"quantization_config": {"x": 1}},
        "text_config_text": {"text_config": "x"},
        "eos_text": {"eos_token_id": "x"},
        "pad_far": {"pad_token_id": 10**9},
    }
    cases = []
    for name, changes in numbers.items():
        cases += _both(f"config_{name}", _config(**changes), "chatty")
    texts: dict[str, bytes | str] = {
        "empty": "", "not_json": "{x", "list": "[]", "deep": '{"a":' * 50_000, "utf16": "{}".encode("utf-16"),
        "twice": '{"model_type":"llama","model_type":"llama"}', "huge_number": '{"hidden_size":' + "1" * 10_000 + "}",
        "nuls": b"\0" * 100, "lfs": "version https://git-lfs.github.com/spec/v1\n",
    }  # fmt: skip
    for name, text in texts.items():
        cases += _both(f"config_file_{name}", _text("config.json", text), "chatty", "config.json")
    cases += [
        *_both("config_pipe", lambda p: p.pipe("chatty/config.json"), "chatty"),
        *_both("config_device", lambda p: p.link("chatty/config.json", "/dev/zero"), "chatty"),
        *_both("config_sparse", lambda p: p.sparse("chatty/config.json", 1 << 36, b"{"), "chatty"),
        *_both("config_missing", lambda p: (p / "chatty/config.json").unlink(), "chatty", "config.json"),
        Case("plan_config_layers_huge", _laid(_config(num_hidden_layers=10**9)), PLAN, ("chatty",)),
        Case("plan_config_hidden_huge", _laid(_config(hidden_size=2**40)), PLAN, ("chatty",)),
        Case("plan_config_heads_zero", _laid(_config(num_attention_heads=0)), PLAN, ("chatty",)),
        Case("plan_config_type_dict", _laid(_config(model_type={})), PLAN, ("chatty",)),
        Case("plan_config_deep", _laid(_text("config.json", '{"a":' * 50_000)), PLAN, ("chatty", "config.json")),
        Case("plan_config_pipe", _laid(lambda p: p.pipe("chatty/config.json")), PLAN, ("chatty",)),
        Case("plan_remote_code", _laid(lambda p: (_remote(p, AutoConfig="evil.Config"), _config(model_type="evil")(p))), PLAN,
             ("chatty", "trust_remote_code")),
    ]  # fmt: skip
    return cases


def deepspeed_cases() -> list[Case]:
    """DeepSpeed's settings in a file of the user's."""

    def one(name: str, change: Callable[[Place], object], *says: str) -> Case:
        def lay(place: Place) -> None:
            place.config(distributed__deepspeed="./ds.json")
            change(place)

        return Case(f"deepspeed_{name}", _laid(lay), TRAIN, says, outputs=RUN, many_lines=True)

    def text(content: bytes | str) -> Callable[[Place], object]:
        return lambda place: place.write("ds.json", content)

    return [
        one("deep", text('{"a":' * 50_000), "ds.json", "nested"),
        one("huge_number", text('{"a":' + "9" * 10_000 + "}"), "ds.json"),
        one("list", text("[]"), "ds.json", "object"),
        one("twice", text('{"a":1,"a":2}'), "ds.json", "twice"),
        one("not_utf8", text(b"\xff\xfe"), "ds.json", "UTF-8"),
        one("empty", text(""), "ds.json"),
        one("missing", lambda _: None, "ds.json"),
        one("pipe", lambda p: p.pipe("ds.json"), "ds.json"),
        one("device", lambda p: p.link("ds.json", "/dev/zero"), "ds.json"),
        one("sparse", lambda p: p.sparse("ds.json", 1 << 36, b"{"), "ds.json"),
        one("zero_text", text('{"zero_optimization":"x"}'), "ds.json", "zero_optimization"),
        one("stage_text", text('{"zero_optimization":{"stage":"x"}}'), "ds.json", "stage"),
        one("batch_decided", text('{"train_micro_batch_size_per_gpu":7}'), "ds.json", "train_micro_batch_size_per_gpu"),
    ]


def remote_cases() -> list[Case]:
    """Code that comes with a model does not run unless the config says so."""

    def with_type(place: Place) -> None:
        _remote(place, AutoConfig="evil.Config", AutoModelForCausalLM="evil.Model", AutoTokenizer="evil.Tokenizer")
        _config(model_type="evil")(place)

    def tokenizer_only(place: Place) -> None:
        _remote(place)
        place.edit_json("chatty/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
        (place / "chatty/tokenizer.json").unlink()

    def elsewhere(place: Place) -> None:
        _remote(place, AutoConfig="someone/else--evil.Config")
        _config(model_type="evil")(place)

    def harmless(place: Place) -> None:
        _remote(place, AutoConfig="evil.Config", AutoModelForCausalLM="evil.Model")

    def generate(place: Place) -> None:
        place.write("chatty/custom_generate/generate.py", f"open({place.payload!r}, 'w').write('x')\n")

    return [
        *_both("remote_code", with_type, "chatty", "trust_remote_code"),
        *_both("remote_tokenizer", tokenizer_only, "chatty"),
        *_both("remote_elsewhere", elsewhere, "chatty"),
        control("good_train_known_type_with_code", _laid(harmless), TRAIN, "work"),
        control("good_chat_known_type_with_code", _laid(harmless), CHAT),
        control("good_chat_custom_generate", _laid(generate), CHAT),
    ]


def tokenizer_cases() -> list[Case]:
    """The tokenizer's files."""
    texts: dict[str, bytes | str] = {
        "empty": "", "not_json": "{x", "list": "[]", "object": "{}", "deep": '{"a":' * 50_000, "nuls": b"\0" * 100,
        "no_model": '{"version":"1.0","added_tokens":[]}', "model_null": '{"version":"1.0","model":null}',
        "vocab_negative": '{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
        "vocab_huge_id": '{"version":"1.0","model":{"type":"BPE","vocab":{"a":4294967295},"merges":[]}}',
        "merges_unknown": '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}',
        "type_unknown": '{"version":"1.0","model":{"type":"Evil","vocab":{}}}',
        "explosive_pattern": json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {
            "Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}),
        "broken_pattern": json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Split", "pattern": {
            "Regex": "("}, "behavior": "Isolated", "invert": False}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}),
    }  # fmt: skip
    cases = []
    for name, text in texts.items():
        cases += _both(f"tokenizer_{name}", _text("tokenizer.json", text), "chatty")
    settings: dict[str, bytes | str] = {
        "empty": "", "not_json": "{x", "list": "[]", "deep": '{"a":' * 50_000,
        "class_unknown": '{"tokenizer_class":"Evil"}', "class_number": '{"tokenizer_class":5}',
        "auto_map_list": '{"auto_map":[1]}', "auto_map_number": '{"auto_map":5}',
        "tokens_broken": '{"added_tokens_decoder":{"x":5}}', "eos_number": '{"eos_token":5,"tokenizer_class":"PreTrainedTokenizerFast"}',
        "template_number": '{"chat_template":5,"tokenizer_class":"PreTrainedTokenizerFast"}',
        "template_list": '{"chat_template":[5],"tokenizer_class":"PreTrainedTokenizerFast"}',
        "length_text": '{"model_max_length":"x","tokenizer_class":"PreTrainedTokenizerFast"}',
    }  # fmt: skip
    for name, text in settings.items():
        cases += _both(f"tokenizer_config_{name}", lambda p, text=text: (  # type: ignore[misc]
            p.write("chatty/tokenizer_config.json", text),
            (p / "chatty/chat_template.jinja").unlink(missing_ok=True)), "chatty")  # fmt: skip
    # Without a template a model can be talked to, which is said, and not trained; tokenizer.json does without the class.
    harmless = ("chat_tokenizer_config_class_unknown", "chat_tokenizer_config_auto_map_list")
    cases = [replace(case, says=("no chat template",), code=0) if case.name in harmless else case for case in cases]
    cases += [
        *_both("tokenizer_pipe", lambda p: p.pipe("chatty/tokenizer.json"), "chatty"),
        *_both("tokenizer_device", lambda p: p.link("chatty/tokenizer.json", "/dev/zero"), "chatty"),
        *_both("tokenizer_config_pipe", lambda p: p.pipe("chatty/tokenizer_config.json"), "chatty"),
        *_both("tokenizer_sparse", lambda p: p.sparse("chatty/tokenizer.json", 1 << 36, b"{"), "chatty"),
        *_both("tokenizer_none", lambda p: [f.unlink() for f in (p / "chatty").glob("*token*")], "chatty"),
        *_both("template_pipe", lambda p: p.pipe("chatty/chat_template.jinja"), "chatty"),
        *_both("template_device", lambda p: p.link("chatty/chat_template.jinja", "/dev/zero"), "chatty"),
        *_both("template_not_utf8", _text("chat_template.jinja", b"\xff\xfe{{"), "chatty"),
        *_both("generation_not_json", _text("generation_config.json", "{x"), "chatty"),
        *_both("generation_pipe", lambda p: p.pipe("chatty/generation_config.json"), "chatty"),
        *_both("generation_list", _text("generation_config.json", "[]"), "chatty"),
        *_both("generation_deep", _text("generation_config.json", '{"a":' * 50_000), "chatty"),
        *_both("generation_eos_text", _text("generation_config.json", '{"eos_token_id":"x"}'), "chatty"),
    ]  # fmt: skip
    return cases


def weights_cases() -> list[Case]:
    """The weights of a model that is trained or talked to."""
    cases = []
    for name in ("empty", "cut_in_the_data", "length_huge", "length_100_mb", "not_json", "deep", "overlap", "hole", "lfs_pointer",
                 "html", "pickle", "zip", "tensor_twice", "dtype_unknown", "name_with_newline", "shape_overflows"):  # fmt: skip
        cases += _both(f"weights_{name}", _text("model.safetensors", FILES[name][0]()), "chatty", "model.safetensors")

    def tensor(**changes: Any) -> Callable[[Place], object]:
        return lambda place: changed(place / WEIGHTS, **{k.replace(".", "__"): v for k, v in changes.items()})

    q = "model.layers.0.self_attn.q_proj.weight"
    cases += [
        *_both("weights_missing", lambda p: (p / WEIGHTS).unlink(), "chatty"),
        *_both("weights_pipe", lambda p: p.pipe(WEIGHTS), "chatty"),
        *_both("weights_device", lambda p: p.link(WEIGHTS, "/dev/zero"), "chatty"),
        *_both("weights_loop", lambda p: p.link(WEIGHTS, "model.safetensors"), "chatty"),
        *_both("weights_folder", lambda p: ((p / WEIGHTS).unlink(), (p / WEIGHTS).mkdir()), "chatty"),
        *_both("weights_tensor_missing", tensor(**{q: None}), "chatty", "q_proj"),
        # Not refused, but said: many checkpoints hold tensors that a class has no place for.
        Case("train_weights_tensor_more", _laid(tensor(**{"model.layers.0.surprise.weight": np.zeros((2, 2), np.float32)})),
             TRAIN, ("layers.0.surprise",), 0, outputs=RUN),
        Case("chat_weights_tensor_more", _laid(tensor(**{"model.layers.0.surprise.weight": np.zeros((2, 2), np.float32)})),
             CHAT, ("layers.0.surprise",), 0),
        *_both("weights_wrong_shape", tensor(**{q: np.zeros((7, 7), np.float32)}), "chatty", "q_proj"),
        *_both("weights_integers", tensor(**{q: np.zeros((32, 32), np.int64)}), "chatty", "q_proj"),
        *_both("weights_eight_bits", tensor(**{q: np.zeros((32, 32), np.uint8)}), "chatty", "q_proj", "U8"),
        *_both("weights_nan", tensor(**{q: np.full((32, 32), np.nan, np.float32)}), "nan"),
        *_both("weights_no_tensors", _text("model.safetensors", safetensors("{}")), "chatty"),
        *_both("weights_other_model", _text("model.safetensors", safetensors({"a": entry()}, b"\0" * 4)), "chatty"),
        *_both("weights_index_climbs", lambda p: p.write("chatty/model.safetensors.index.json",
               json.dumps({"weight_map": {q: "../x.safetensors"}})), "chatty"),
        *_both("weights_index_absolute", lambda p: ((p / WEIGHTS).unlink(), p.write("chatty/model.safetensors.index.json",
               json.dumps({"weight_map": {q: "/etc/passwd"}}))), "chatty", "/etc/passwd"),
        *_both("weights_index_and_single", lambda p: p.write("chatty/model.safetensors.index.json",
               json.dumps({"weight_map": {q: "model-00001-of-00001.safetensors"}})), "chatty"),
        *_both("weights_index_broken", lambda p: ((p / WEIGHTS).unlink(), p.write("chatty/model.safetensors.index.json", "{")),
               "chatty"),
        *_both("weights_pickle_payload", lambda p: ((p / WEIGHTS).unlink(), p.write("chatty/pytorch_model.bin",
               payload_archive(p.payload))), "chatty", "pytorch_model.bin"),
        *_both("weights_pickle_old_payload", lambda p: ((p / WEIGHTS).unlink(), p.write("chatty/pytorch_model.bin",
               b"\x80\x02cos\nsystem\nX\x0d\0\0\0touch PAYLOADq\0\x85R.")), "chatty", "pytorch_model.bin"),
        *_both("weights_pickle_text", lambda p: ((p / WEIGHTS).unlink(), p.write("chatty/pytorch_model.bin", "hello")), "chatty"),
        *_both("weights_pickle_index", lambda p: ((p / WEIGHTS).unlink(), p.write("chatty/pytorch_model.bin.index.json",
               json.dumps({"weight_map": {q: "../x.bin"}}))), "chatty"),
        *_both("weights_only_tensorflow", lambda p: ((p / WEIGHTS).unlink(), p.write("chatty/tf_model.h5", b"\x89HDF")), "chatty"),
    ]  # fmt: skip
    adapter = ("chat", "chatty", "--adapter", "run/adapter", "--prompt", "x", "--max-new-tokens", "1")

    def with_run(change: Callable[[Place], object]) -> Callable[[Place], object]:
        return _laid(lambda place: (place.run_folder(), change(place)))

    cases += [
        Case("chat_adapter_config_broken", with_run(lambda p: p.write("run/adapter/adapter_config.json", "{")), adapter,
             ("adapter_config.json",)),
        Case("chat_adapter_config_list", with_run(lambda p: p.write("run/adapter/adapter_config.json", "[]")), adapter,
             ("adapter_config.json",)),
        Case("chat_adapter_config_deep", with_run(lambda p: p.write("run/adapter/adapter_config.json", '{"a":' * 50_000)), adapter,
             ("adapter_config.json",)),
        Case("chat_adapter_config_pipe", with_run(lambda p: p.pipe("run/adapter/adapter_config.json")), adapter,
             ("adapter_config.json",)),
        Case("chat_adapter_type_evil", with_run(lambda p: p.edit_json("run/adapter/adapter_config.json", peft_type="EVIL")), adapter,
             ("adapter",)),
        Case("chat_adapter_r_zero", with_run(lambda p: p.edit_json("run/adapter/adapter_config.json", r=0)), adapter, ("adapter",)),
        Case("chat_adapter_r_huge", with_run(lambda p: p.edit_json("run/adapter/adapter_config.json", r=10**12)), adapter, ("adapter",)),
        Case("chat_adapter_auto_mapping", with_run(lambda p: (_remote(p), p.edit_json("run/adapter/adapter_config.json",
             peft_type=..., auto_mapping={"base_model_class": "Evil", "parent_library": "evil"}))), adapter, ("adapter",)),
        Case("chat_adapter_weights_cut", with_run(lambda p: p.write("run/adapter/adapter_model.safetensors", b"x")), adapter,
             ("adapter_model.safetensors",)),
        Case("chat_adapter_weights_missing", with_run(lambda p: (p / "run/adapter/adapter_model.safetensors").unlink()), adapter,
             ("adapter",)),
        Case("chat_adapter_pickle", with_run(lambda p: ((p / "run/adapter/adapter_model.safetensors").unlink(),
             p.write("run/adapter/adapter_model.bin", payload_archive(p.payload)))), adapter, ("adapter_model.bin",)),
        Case("chat_adapter_weights_pipe", with_run(lambda p: p.pipe("run/adapter/adapter_model.safetensors")), adapter,
             ("adapter_model.safetensors",)),
        Case("chat_adapter_wrong_shape", with_run(lambda p: changed(p / "run/adapter/adapter_model.safetensors",
             base_model__model__model__layers__0__self_attn__q_proj__lora_A__weight=np.zeros((2, 5), np.float32))), adapter,
             ("q_proj",)),
        Case("chat_adapter_tensor_missing", with_run(lambda p: changed(p / "run/adapter/adapter_model.safetensors",
             base_model__model__model__layers__0__self_attn__q_proj__lora_A__weight=None)), adapter, ("q_proj",)),
        Case("chat_adapter_tensor_more", with_run(lambda p: changed(p / "run/adapter/adapter_model.safetensors",
             hello=np.zeros((2, 5), np.float32))), adapter, ("hello",)),
        Case("chat_adapter_base_of_another", with_run(lambda p: p.edit_json("run/adapter/adapter_config.json",
             base_model_name_or_path="/nowhere/at/all")), ("chat", "run/adapter", "--prompt", "x"), ("/nowhere/at/all",)),
        Case("chat_adapter_names_no_base", with_run(lambda p: p.edit_json("run/adapter/adapter_config.json",
             base_model_name_or_path=None)), ("chat", "run/adapter", "--prompt", "x"), ("base",)),
        Case("chat_adapter_names_number", with_run(lambda p: p.edit_json("run/adapter/adapter_config.json",
             base_model_name_or_path=5)), ("chat", "run/adapter", "--prompt", "x"), ("base_model_name_or_path",)),
        Case("chat_model_a_file", lambda p: p.write("chatty", "x"), CHAT, ("chatty", "file")),
        Case("chat_model_empty_folder", lambda p: (p / "chatty").mkdir(), CHAT, ("chatty", "config.json")),
        Case("chat_surrogate", _laid(lambda _: None), ("chat", "chatty", "--prompt", "a\udcffb", "--max-new-tokens", "1"), ("UTF-8",), code=2),
    ]  # fmt: skip
    return cases


RESUME = ("train", "a.yaml", "--work-dir", "run", "--resume", "auto", "train.max_steps=3")
CHECKPOINT = "run/checkpoint-2"
MANIFEST = f"{CHECKPOINT}/fastft_checkpoint.json"
TREE, TENSORS = "state/state.json", "state/tensors.safetensors"


def _resumed(change: Callable[[Place], object]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.chatty()
        place.rows()
        place.config()
        place.run_folder()
        change(place)

    return lay


def _spoiled(place: Place, name: str, content: bytes) -> None:
    """Replace a file and tell the manifest its size, as somebody would who wants it read."""
    path = place / f"{CHECKPOINT}/{name}"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"][name] = len(content)
    for key in ("sha256", "hashes"):
        manifest.pop(key, None)
    (place / MANIFEST).write_text(json.dumps(manifest))


def _spoiled_json(place: Place, name: str, change: Callable[[Any], object]) -> None:
    found = json.loads((place / f"{CHECKPOINT}/{name}").read_text())
    change(found)
    _spoiled(place, name, json.dumps(found).encode())


def _changed_moments(place: Place, change: Callable[[Any], Any]) -> None:
    _changed_tensors(place, TENSORS, "exp_avg", change)


def _changed_weights(place: Place, change: Callable[[Any], Any]) -> None:
    _changed_tensors(place, "adapter_model.safetensors", "", change)


def _changed_tensors(place: Place, name: str, word: str, change: Callable[[Any], Any]) -> None:
    """Change the first tensor with WORD in its name and write the file anew; None takes it away."""
    from safetensors.numpy import load_file, save

    arrays = load_file(place / f"{CHECKPOINT}/{name}")
    first = next(key for key in sorted(arrays) if word in key)
    changed_array = change(arrays.pop(first))
    _spoiled(
        place, name, save(arrays if changed_array is None else {**arrays, first: np.ascontiguousarray(changed_array)})
    )


def resume_cases() -> list[Case]:
    """Checkpoints to go on from."""

    def one(name: str, change: Callable[[Place], object], *says: str, words: tuple[str, ...] = RESUME) -> Case:
        return Case(f"resume_{name}", _resumed(change), words, says, outputs=("run/log.txt", "run/config.yaml", "run/metrics.jsonl",
                    "run/samples.jsonl", "run/report.html", "run/loss.png"))  # fmt: skip

    def text(content: bytes | str) -> Callable[[Place], object]:
        return lambda place: place.write(MANIFEST, content)

    def key(**changes: Any) -> Callable[[Place], object]:
        return lambda place: place.edit_json(MANIFEST, **changes)

    def progress(**changes: Any) -> Callable[[Place], object]:
        return lambda place: _spoiled_json(place, "trainer_state.json", lambda found: found.update(changes))

    def tree(change: Callable[[Any], object]) -> Callable[[Place], object]:
        return lambda place: _spoiled_json(place, TREE, change)

    point = (*RESUME[:5], CHECKPOINT, RESUME[6])
    cases = [
        one("manifest_missing", lambda p: (p / MANIFEST).unlink(), "checkpoint"),
        one("manifest_empty", text(""), "checkpoint"),
        one("manifest_list", text("[]"), "checkpoint"),
        one("manifest_deep", text('{"a":' * 50_000), "checkpoint"),
        one("manifest_nuls", text(b"\0" * 10), "checkpoint"),
        one("manifest_utf16", text("{}".encode("utf-16")), "checkpoint"),
        one("manifest_pipe", lambda p: p.pipe(MANIFEST), "checkpoint"),
        one("manifest_device", lambda p: p.link(MANIFEST, "/dev/zero"), "checkpoint"),
        one("manifest_sparse", lambda p: p.sparse(MANIFEST, 1 << 36, b"{"), "checkpoint"),
        one("manifest_files_list", key(files=[1]), "checkpoint"),
        one("manifest_files_climb", key(files={"../../../etc/passwd": 5}), "checkpoint"),
        one("manifest_files_numbers", key(files={"adapter_config.json": "x"}), "checkpoint"),
        one("manifest_step_text", key(step="x"), "checkpoint"),
        one("manifest_step_huge", key(step=10**30), "checkpoint"),
        one("manifest_step_other", key(step=1), "checkpoint"),
        one("manifest_step_negative", key(step=-5), "checkpoint"),
        one("manifest_config_text", key(config="x"), "checkpoint"),
        one("manifest_config_list", key(config=[1]), "checkpoint"),
        one("manifest_data_text", key(data="x"), "checkpoint"),
        one("manifest_huge_number", text('{"step":' + "9" * 10_000 + "}"), "checkpoint"),
        one("file_missing", lambda p: (p / f"{CHECKPOINT}/adapter_model.safetensors").unlink(), "checkpoint"),
        one("file_cut", lambda p: (p / f"{CHECKPOINT}/adapter_model.safetensors").write_bytes(b"x"), "checkpoint"),
        one("point_is_a_file", lambda p: p.write("x", "x"), "x", words=(*point[:5], "x")),
        one("point_missing", lambda _: None, "nowhere", words=(*point[:5], "nowhere")),
        one("point_is_a_model", lambda _: None, "chatty", words=(*point[:5], "chatty")),
        one("point_empty", lambda p: (p / "d").mkdir(), "d", words=(*point[:5], "d")),
        one("other_seed", lambda _: None, "seed", words=(*RESUME, "train.seed=99")),
        one("other_data", lambda p: p.rows(count=9), "rows"),
    ]  # fmt: skip
    wrong: dict[str, Callable[[Place], bytes]] = {
        "payload": lambda p: payload_archive(p.payload),
        "bare_payload": lambda _: b"\x80\x02cos\nsystem\nX\x0d\0\0\0touch PAYLOADq\0\x85R.",
        "text": lambda _: b"hello",
        "empty": lambda _: b"",
        "list": lambda _: b"[]",
        "deep": lambda _: b'{"a":' * 50_000,
        "zeros": lambda _: b"\0" * 1000,
        "foreign": lambda _: safetensors({"a": entry()}, b"\0" * 4),
    }
    for name, make in wrong.items():
        cases += [
            one(
                f"state_{number}_{name}", lambda p, make=make, number=number: _state(p, number, make(p)), "checkpoint-2"
            )  # type: ignore[misc]
            for number in range(4)
        ]
    cases += [
        one("old_payload", _old_payload, "checkpoint-2"),
        one(
            "pickled_weights",
            lambda p: _spoiled(p, "pytorch_model.bin", payload_archive(p.payload)),
            "checkpoint-2",
            "pickle",
        ),
        one(
            "progress_pipe", lambda p: p.pipe(f"{CHECKPOINT}/trainer_state.json"), "checkpoint-2", "trainer_state.json"
        ),
        one("progress_step", progress(global_step=1), "trainer_state.json", "step"),
        one("progress_interval", progress(logging_steps=0), "trainer_state.json", "logging_steps"),
        one("progress_epoch", progress(epoch="x"), "trainer_state.json", "epoch"),
        one("progress_unknown", progress(callbacks=[]), "trainer_state.json", "callbacks"),
        one("tree_pipe", lambda p: p.pipe(f"{CHECKPOINT}/{TREE}"), "checkpoint-2", TREE),
        one("tree_version", tree(lambda t: t.update(version=99)), TREE, "version"),
        one("tree_unknown_part", tree(lambda t: t.update(x=1)), TREE, "'x'"),
        one("tree_without_processes", tree(lambda t: t.pop("processes")), TREE, "processes"),
        one("tree_two_processes", tree(lambda t: t["processes"].append(t["processes"][0])), "2 processes"),
        one("tree_no_optimizer", tree(lambda t: t.pop("optimizer")), "optimizer"),
        one("tree_no_scheduler", tree(lambda t: t.pop("scheduler")), "schedule"),
        one("tree_scheduler_text", tree(lambda t: t["scheduler"].update(last_epoch="x")), "last_epoch"),
        one("tree_scheduler_later", tree(lambda t: t["scheduler"].update(last_epoch=99)), "last_epoch"),
        one("tree_lr_text", tree(lambda t: t["optimizer"]["param_groups"][0].update(lr="x")), "lr"),
        one("tree_lr_nan", tree(lambda t: t["optimizer"]["param_groups"][0].update(lr={"$float": "nan"})), "lr"),
        one("tree_groups", tree(lambda t: t["optimizer"].update(param_groups=[])), "groups"),
        one("tree_tensor_unknown", tree(lambda t: t["processes"][0].update(cpu={"$tensor": "no"})), TREE, "'no'"),
        one("tree_tensor_number", tree(lambda t: t["processes"][0].update(cpu=5)), "random numbers"),
        one("tree_order", tree(lambda t: t["processes"][0]["cpu"].update(order=[5])), TREE, "order"),
        one(
            "tree_python_short",
            tree(lambda t: t["processes"][0].update(python={"$tuple": [3, 4, None]})),
            "random numbers",
        ),
        one("tree_numpy_text", tree(lambda t: t["processes"][0].update(numpy="x")), "random numbers"),
        one("tree_loss_nan", tree(lambda t: t["processes"][0].update(loss_sum={"$float": "nan"})), "loss"),
        one("tensors_pipe", lambda p: p.pipe(f"{CHECKPOINT}/{TENSORS}"), "checkpoint-2", TENSORS),
        one("tensors_nan", lambda p: _changed_moments(p, lambda a: a * np.nan), "exp_avg", "not finite"),
        one("tensors_shape", lambda p: _changed_moments(p, lambda a: a[:1]), "exp_avg", "shape"),
        one("tensors_dtype", lambda p: _changed_moments(p, lambda a: a.astype(np.int64)), "exp_avg"),
        one("weights_nan", lambda p: _changed_weights(p, lambda a: a * np.nan), "checkpoint-2", "not finite"),
        one("weights_shape", lambda p: _changed_weights(p, lambda a: a[:1]), "checkpoint-2", "fit"),
        one("weights_fewer", lambda p: _changed_weights(p, lambda _: None), "checkpoint-2", "fit"),
        control("good_resume", _resumed(lambda _: None), RESUME, "run"),
        control("good_resume_point", _resumed(lambda _: None), point, "run"),
    ]
    return cases


def _state(place: Place, number: int, content: bytes) -> None:
    """Spoil the number-th file of state in a checkpoint (the same one again where there are fewer)."""
    names = sorted(
        str(path.relative_to(place / CHECKPOINT))
        for path in (place / CHECKPOINT).rglob("*")
        if path.suffix in (".pt", ".pth", ".safetensors", ".json") and path.name not in (
            "fastft_checkpoint.json", "tokenizer.json", "tokenizer_config.json", "fastft_training.json",
            "adapter_config.json")
    )  # fmt: skip
    _spoiled(place, names[number % len(names)], content)


def _old_payload(place: Place) -> None:
    """A checkpoint as older versions wrote it, with a payload in each pickle."""
    for name in (TREE, TENSORS):
        (place / f"{CHECKPOINT}/{name}").unlink()
    place.edit_json(MANIFEST, files={
        name: size for name, size in json.loads((place / MANIFEST).read_text())["files"].items() if name not in (TREE, TENSORS)
    })  # fmt: skip
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"):
        _spoiled(place, name, payload_archive(place.payload))


def cases() -> list[Case]:
    """All of them."""
    return [
        *config_cases(), *deepspeed_cases(), *remote_cases(), *tokenizer_cases(), *weights_cases(), *resume_cases(),
        control("good_train", _laid(lambda _: None), TRAIN, "work"),
        control("good_chat", _laid(lambda _: None), CHAT),
        control("good_plan", _laid(lambda _: None), PLAN),
    ]  # fmt: skip
