"""Adapters that are no LoRA, merged one module at a time: bit for bit what PEFT's merge_and_unload makes of the model."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import BUILDERS

from fastft.convert import merge, peft_kinds, peft_layers, verify
from fastft.convert.folder import read_safetensors
from fastft.convert.matching import NameOptions, parse_key_map
from fastft.convert.plan import PeftModule
from fastft.errors import CheckpointError, FileError, PlanError

torch = pytest.importorskip("torch")

# peft 0.21 asks transformers 5.23 for a name that it will drop in version 6, and gives advice for trainings.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore::UserWarning:peft",
    # It matches AdaLoRA's masks with modules, which they are not named for.
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",
)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]
ALL = {"target_modules": LINEAR}
CASES: dict[str, dict[str, Any]] = {
    "ADALORA": {**ALL, "init_r": 6, "target_r": 3, "total_step": 10},
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"target_modules": SQUARE, "boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "C3A": {"target_modules": SQUARE, "block_size": 8},
    "DEFT": ALL,
    "DEFT qr": {**ALL, "decomposition_method": "qr"},
    "DELORA": {**ALL, "r": 4},
    "FOURIERFT": {**ALL, "n_frequency": 50, "n_frequency_pattern": {"q_proj": 30}},
    "GLORA": {**ALL, "r": 4},
    "GRALORA": {"target_modules": SQUARE, "r": 4, "gralora_k": 2},
    "HIRA": {**ALL, "r": 4, "rank_pattern": {"layers.1.mlp.up_proj": 2}},
    "HRA": {**ALL, "r": 4},
    "HRA orthogonalised": {**ALL, "r": 4, "apply_GS": True},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LOHA": {**ALL, "r": 4, "alpha": 8},
    "LOHA patterns": {**ALL, "r": 4, "alpha": 8, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "LOKR": {**ALL, "r": 4, "alpha": 8},
    "LOKR decomposed": {**ALL, "r": 4, "alpha": 8, "decompose_both": True, "decompose_factor": 2},
    "MISS": {**ALL, "r": 4},
    "MISS bat": {**ALL, "r": 8, "init_weights": "bat"},
    "MISS mini": {**ALL, "r": 4, "mini_r": 4, "init_weights": "mini"},
    "OFT": {**ALL, "oft_block_size": 8},
    "OFT exact": {**ALL, "oft_block_size": 8, "use_cayley_neumann": False},
    "OFT constrained": {**ALL, "oft_block_size": 8, "coft": True},
    "OFT shared": {**ALL, "oft_block_size": 8, "block_share": True},
    "PEANUT": {**ALL, "r": 4},
    "PVERA": {**ALL, "r": 8},
    "RANDLORA": {**ALL, "r": 5},
    "RANDLORA sparse": {**ALL, "r": 4, "sparse": True},
    "ROAD": {**ALL, "group_size": 8},
    "SHIRA": {**ALL, "r": 4},
    "SUPERTUNING": {**ALL, "sparsity": 0.9},
    "VBLORA": {"target_modules": SQUARE, "r": 4, "num_vectors": 16, "vector_length": 8},
    "VBLORA top k": {
        "target_modules": SQUARE, "r": 4, "num_vectors": 16, "vector_length": 8, "save_only_topk_weights": True,
    },
    "VERA": {**ALL, "r": 8},
    "WAVEFT": {**ALL, "n_frequency": 50},
    "LN_TUNING": {},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 90, 5]},
}  # fmt: skip


def llama(*, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn_like(parameter) * 0.1
    return model


def train(model: Any, kind: str, folder: Path, **settings: Any) -> None:
    """Save a random adapter of a kind for a model."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    adapted = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn_like(parameter.data) * 0.05
    adapted.save_pretrained(folder)


def peft_merge(model: Any, adapter: Path, folder: Path) -> dict[str, Any]:
    """Merge into a model with PEFT; gives the tensors as transformers saves them."""
    from peft import PeftModel

    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    return tensors(folder)


def ours(base: Path, adapter: Path, folder: Path, *, match_peft: bool = False, dtype: str = "auto") -> dict[str, Any]:
    merge.execute(merge.plan(base, [(adapter, 1.0)], match_peft=match_peft, dtype=dtype), folder)
    report = verify.verify(folder, base, [(adapter, 1.0)], match_peft=match_peft)
    assert report.good, report.text()
    assert not (folder / "peft").exists()
    return tensors(folder)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    assert set(one) == set(other)
    return {
        name
        for name, tensor in one.items()
        if tensor.dtype != other[name].dtype or not torch.equal(tensor, other[name])
    }


@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit(tmp_path: Path, case: str) -> None:
    """In f32; in bf16 with PEFT's own rounding; and in bf16 with one rounding of PEFT's f32 result."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = llama().bfloat16()
    model.save_pretrained(base)
    train(llama(), case.partition(" ")[0], adapter, **CASES[case])
    wide = peft_merge(llama().bfloat16().float(), adapter, tmp_path / "theirs, f32")
    assert differing(wide, {name: tensor.float() for name, tensor in tensors(base).items()})
    assert differing(ours(base, adapter, tmp_path / "f32", dtype="fp32"), wide) == set()
    once = ours(base, adapter, tmp_path / "bf16")
    assert differing(once, {name: tensor.bfloat16() for name, tensor in wide.items()}) == set()
    mine = ours(base, adapter, tmp_path / "like peft", match_peft=True)
    assert differing(mine, peft_merge(model, adapter, tmp_path / "theirs, bf16")) == set()


# Convolutions of 4x4, 2x2, 7x7 in 8 groups; of 3x3 and 1x1; GPT-2's weights, stored as (in, out).
OTHER_LAYERS: dict[str, dict[str, dict[str, Any]]] = {
    "convnext": {
        "BOFT": {"target_modules": ["downsampling_layer.1"], "boft_block_size": 4},
        "HRA": {"target_modules": ["patch_embeddings", "downsampling_layer.1"], "r": 4},
        "LOHA": {"target_modules": ["patch_embeddings", "downsampling_layer.1", "dwconv", "pwconv1"], "r": 2},
        "LOKR": {"target_modules": ["patch_embeddings", "downsampling_layer.1", "pwconv2"], "r": 2},
        "OFT": {"target_modules": ["downsampling_layer.1"], "oft_block_size": 4},
    },
    "resnet": {
        "IA3": {
            "target_modules": ["shortcut.convolution", "layer.1.convolution"],
            "feedforward_modules": ["layer.1.convolution"],
        },
        "LOHA": {"target_modules": ["convolution"], "r": 2, "use_effective_conv2d": True},
        "LOKR": {"target_modules": ["convolution"], "r": 2, "use_effective_conv2d": True, "decompose_both": True},
    },
    "gpt2": {
        "FOURIERFT": {"target_modules": ["c_attn"], "n_frequency": 30, "fan_in_fan_out": True},
        "IA3": {
            "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"],
            "fan_in_fan_out": True,
        },
        "RANDLORA": {"target_modules": ["c_attn", "c_fc"], "r": 5, "fan_in_fan_out": True},
        "VERA": {"target_modules": ["c_attn", "c_fc"], "r": 5, "fan_in_fan_out": True},
    },
    # Names of the files that are not those of the model, and an embedding.
    "qwen2_vl": {
        "LOKR": {"target_modules": ["q_proj", "qkv"], "r": 2},
        "HIRA": {"target_modules": ["embed_tokens", "v_proj"], "r": 2},
    },
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in OTHER_LAYERS.items() for kind in kinds])
def test_other_layers(tmp_path: Path, name: str, kind: str) -> None:
    torch.manual_seed(7)
    model = BUILDERS[name]().bfloat16()
    model.save_pretrained(tmp_path / "base")
    train(BUILDERS[name](), kind, tmp_path / "adapter", **OTHER_LAYERS[name][kind])
    mine = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "mine", match_peft=True)
    assert differing(mine, peft_merge(model, tmp_path / "adapter", tmp_path / "theirs")) == set()
    assert differing(mine, tensors(tmp_path / "base"))


def test_every_kind_is_tested_and_none_is_in_two_lists() -> None:
    from peft import PeftType

    tested = {case.partition(" ")[0] for case in CASES}
    assert tested == {*peft_kinds.KINDS, *peft_kinds.REPLACING}
    lists = [*peft_kinds.KINDS, *peft_kinds.REPLACING, *peft_kinds.REFUSED, "LORA"]
    assert len(lists) == len(set(lists))
    assert {kind.value for kind in PeftType} <= set(lists)


def test_a_pruned_adalora(tmp_path: Path) -> None:
    """Its rank_pattern says which rows are left in each module."""
    from peft import AdaLoraConfig, get_peft_model

    base = llama().bfloat16()
    base.save_pretrained(tmp_path / "base")
    config = AdaLoraConfig(
        **ALL, init_r=6, target_r=2, total_step=6, tinit=1, tfinal=2, deltaT=1, task_type="CAUSAL_LM"
    )
    model = get_peft_model(llama(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(1, 30).reshape(1, -1)
    for step in range(6):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if ".lora_E." in name:
            parameter.data = parameter.data + (parameter.data != 0) * torch.randn_like(parameter.data)
    model.save_pretrained(tmp_path / "adapter")
    kept = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert 0 < sum(sum(rows) for rows in kept.values()) < 6 * 12
    mine = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "mine", match_peft=True)
    assert differing(mine, peft_merge(base, tmp_path / "adapter", tmp_path / "theirs")) == set()


@pytest.mark.parametrize("tied", [False, True])
def test_biases_and_saved_modules_beside(tmp_path: Path, *, tied: bool) -> None:
    base = llama(tied=tied)
    base.save_pretrained(tmp_path / "base")
    extra = {"bias": "boft_only", "modules_to_save": ["lm_head"], "boft_block_size": 4}
    train(llama(tied=tied), "BOFT", tmp_path / "adapter", target_modules=SQUARE, **extra)
    mine = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "mine")
    theirs = peft_merge(base, tmp_path / "adapter", tmp_path / "theirs")
    assert differing(mine, theirs) == set()
    before = tensors(tmp_path / "base")
    changed = {name for name, tensor in mine.items() if name not in before or not torch.equal(tensor, before[name])}
    assert {"lm_head.weight", "model.layers.1.self_attn.q_proj.bias"} <= changed


def test_a_tied_head_is_untied(tmp_path: Path) -> None:
    """By logits: PEFT's own merge changes the embedding too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    llama(tied=True).save_pretrained(tmp_path / "base")
    train(llama(tied=True), "LOHA", tmp_path / "adapter", target_modules=["q_proj", "lm_head"], r=2)
    ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "mine")
    ids = torch.arange(1, 30).reshape(1, -1)
    with torch.no_grad():
        trained = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        truth = trained(ids).logits
        mine = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")(ids).logits
    # f32 through two layers; an update gone astray shows as > 0.01
    assert (mine - truth).abs().max() < 1e-4 * truth.abs().max()
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.fixture
def loha(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a LoHa of it."""
    llama().save_pretrained(tmp_path / "base")
    train(llama(), "LOHA", tmp_path / "adapter", **CASES["LOHA"])
    return tmp_path / "base", tmp_path / "adapter"


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.hada_w2_a"), ["hada_w2_a is missing", "q_proj"]),
        (lambda t: t.update({f"{Q}.hada_w3": torch.ones(2)}), ["hada_w3 is left over"]),
        (lambda t: t.update({f"{Q}.hada_w1_a": torch.ones(47, 4)}), ["(47, 4)", "(48, 4)", "another model"]),
        (lambda t: t.update({"base_model.model.nowhere.hada_w1_a": torch.ones(4, 4)}), ["not in the base", "nowhere"]),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)], ["lacks the update of 1 modules"]),
        (lambda t: t.update({f"{Q}.hada_w1_a": torch.ones(48, 4, dtype=torch.float64)}), ["F64"]),
    ],
)
def test_tensors_that_do_not_fit_are_refused_while_planning(
    loha: tuple[Path, Path], change: Any, words: list[str]
) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = loha
    file = adapter / "adapter_model.safetensors"
    changed = load_file(file)
    change(changed)
    save_file(changed, file)
    with pytest.raises((CheckpointError, PlanError)) as refusal:
        merge.plan(base, [(adapter, 1.0)])
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "adds inputs or activations"),
        ({"peft_type": "XLORA"}, "differently for each input"),
        ({"peft_type": "UNILORA"}, "merge_and_unload"),
        ({"peft_type": "PSOFT"}, "SVD"),
        ({"peft_type": "BONE"}, "MISS"),
        ({"peft_type": "NOVEL"}, "'NOVEL' is not known"),
        ({"peft_type": "VERA", "save_projection": False}, "save_projection=True"),
        ({"peft_type": "RANDLORA"}, "save_projection=True"),
        ({"peft_type": "PVERA", "save_projection": True, "sample_at_inference": True}, "sample_at_inference"),
        ({"use_something_new": 3}, "'use_something_new' = 3 is not known to PEFT"),
        ({"r": 5}, "hada_w1_a"),
        ({"rank_pattern": 7}, "refuses the LOHA"),
    ],
)
def test_settings_that_are_refused(loha: tuple[Path, Path], changes: dict[str, object], word: str) -> None:
    base, adapter = loha
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((CheckpointError, PlanError), match=word):
        merge.plan(base, [(adapter, 1.0)])


def test_what_is_no_sum_has_no_weight_and_no_company(loha: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = loha
    with pytest.raises(PlanError, match=r"weight of 0.5 has no meaning"):
        merge.plan(base, [(adapter, 0.5)])
    with pytest.raises(PlanError, match="another adapter replaces too"):
        merge.plan(base, [(adapter, 1.0), (adapter, 1.0)])
    train(llama(), "LORA", tmp_path / "lora", target_modules=["q_proj"])
    with pytest.raises(PlanError, match="gets a LOHA and another update"):
        merge.plan(base, [(adapter, 1.0), (tmp_path / "lora", 1.0)])
    train(llama(), "LORA", tmp_path / "elsewhere", target_modules=["gate_proj"], init_lora_weights=False)
    merge.execute(merge.plan(base, [(adapter, 1.0), (tmp_path / "elsewhere", 1.0)]), tmp_path / "both")
    one, both = ours(base, adapter, tmp_path / "one"), tensors(tmp_path / "both")
    assert {name.rpartition("mlp.")[2] for name in differing(one, both)} == {"gate_proj.weight"}


def test_numbers_that_are_none_leave_nothing_behind(loha: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = loha
    file = adapter / "adapter_model.safetensors"
    broken = load_file(file)
    broken[f"{Q}.hada_w1_a"][0, 0] = float("nan")
    save_file(broken, file)
    with pytest.raises(CheckpointError, match=r"q_proj\.hada_w1_a holds infinite or undefined"):
        merge.execute(merge.plan(base, [(adapter, 1.0)]), tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    broken[f"{Q}.hada_w1_a"][0, 0] = 1e9
    save_file(broken, file)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*F16 cannot hold it"):
        merge.execute(merge.plan(base, [(adapter, 1.0)], dtype="fp16"), tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_one_module_at_a_time_and_the_room_for_the_copies(
    loha: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's garbage collector is off: nothing of a module may wait for it."""
    import gc

    base, adapter = loha
    plan = merge.plan(base, [(adapter, 1.0)])
    built: list[Any] = []
    build = peft_layers._container

    def counted(*words: Any) -> Any:
        assert sum(parameter.numel() for model in built for parameter in model.parameters()) == 0
        built.append(build(*words))
        return built[-1]

    monkeypatch.setattr(peft_layers, "_container", counted)
    gc.disable()
    try:
        merge.execute(plan, tmp_path / "merged")
    finally:
        gc.enable()
    assert len(built) == len(plan.changed)
    copies = sum(tensor.nbytes for tensor in plan.tensors if tensor.name in plan.changed)
    usage = type("Usage", (), {"free": plan.num_bytes + copies - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(FileError, match="free"):
        merge.execute(plan, tmp_path / "again")


def test_a_start_that_changes_the_base_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kind of today does; PiSSA stands in for one that will."""
    llama().save_pretrained(tmp_path / "base")
    train(llama(), "LORA", tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights="pissa", r=2)
    monkeypatch.setitem(peft_kinds.KINDS, "LORA", peft_kinds.Kind())
    path = "model.layers.0.self_attn.q_proj"
    of_adapter = read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors")
    own = tuple(
        (name.removeprefix("base_model.model."), source) for name, source in of_adapter.items() if f".{path}." in name
    )
    weight = read_safetensors(tmp_path / "base" / "model.safetensors")[f"{path}.weight"]
    settings = json.dumps({"r": 2, "init_lora_weights": "pissa"})
    module = PeftModule(tmp_path / "adapter", "LORA", path, "Linear", 1, weight, None, own, settings)
    with pytest.raises(PlanError, match="PEFT changes the base itself at the start"):
        peft_layers.merged(module)


def test_the_plan_says_what_is_done(loha: tuple[Path, Path]) -> None:
    base, adapter = loha
    plan = merge.plan(base, [(adapter, 1.0)])
    assert "peft:loha" in plan.as_table()
    assert any("is a LOHA: PEFT 0." in note for note in plan.notes)
    shown = [tensor for file in json.loads(plan.as_json())["files"] for tensor in file["tensors"]]
    changed = [tensor for tensor in shown if tensor["operation"] == "peft:loha"]
    assert len(changed) == len(plan.changed) == 12
    assert changed[0]["module"] + ".weight" == changed[0]["name"]


def test_verify_sees_what_is_wrong(loha: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, adapter = loha
    merged = ours(base, adapter, tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**merged, name: tensors(base)[name]}, tmp_path / "merged" / "model.safetensors")
    report = verify.verify(tmp_path / "merged", base, [(adapter, 1.0)])
    assert {check.name: check.status for check in report.checks if check.status != "equal"} == {name: "base"}


def test_key_map_and_raw_names(loha: tuple[Path, Path], tmp_path: Path) -> None:
    """PEFT's patterns match the names of the file, the base's tensors those that --key-map makes."""
    from safetensors.torch import load_file, save_file

    base, _ = loha
    train(llama(), "LOHA", tmp_path / "other", **CASES["LOHA patterns"])
    expected = ours(base, tmp_path / "other", tmp_path / "expected")
    file = tmp_path / "other" / "adapter_model.safetensors"
    renamed = {
        f"{name.replace('model.model.layers', 'model.decoder.layers')}.default": tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    with pytest.raises(PlanError, match=r"decoder.*not in the base|not in the base(?s:.*)decoder"):
        merge.plan(base, [(tmp_path / "other", 1.0)])
    names = NameOptions(key_map=parse_key_map([r"^decoder\.=model."]))
    merge.execute(merge.plan(base, [(tmp_path / "other", 1.0)], names=names), tmp_path / "mine")
    assert differing(tensors(tmp_path / "mine"), expected) == set()
