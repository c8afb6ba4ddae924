"""A reward model or classifier out of a language model: its head for words goes, the adapter's head for numbers comes.

PEFT trains such a head (`score`, in `modules_to_save`) on a base that has none: transformers makes a new one beside the
layers of the language model. So the merged folder is the base without its head, with the adapter's, under the class
that the training had.
"""

from collections.abc import Sequence
from dataclasses import replace

from fastft.convert.adapter import Adapter
from fastft.convert.folder import Checkpoint
from fastft.convert.source import FLOATS
from fastft.errors import PlanError

_SCORE = "score.weight"
_HEADS = ("lm_head.weight",)
_LANGUAGE, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


def as_trained(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> Checkpoint:
    """See a language model as the classifier that the adapters were trained on; any other base as it is.

    Raises:
        PlanError: some of the adapters are for a language model, or the class of the classifier is not known.
    """
    heads = [adapter for adapter, _ in adapters if _has_head(adapter)]
    if not heads or _SCORE in base.tensors:
        return base
    if len(heads) != len(adapters):
        raise PlanError(f"{heads[0].folder}: makes a classifier of the model, the other adapters do not; merge one")
    adapter = heads[0]
    classes = base.config.get("architectures")
    name = classes[0] if isinstance(classes, list) and len(classes) == 1 and isinstance(classes[0], str) else ""
    if not name.endswith(_LANGUAGE) or base.config.get("auto_map"):
        raise PlanError(
            f"{adapter.folder}: makes a classifier of the model, and what class that is cannot be told from"
            f" architectures {classes!r} in {base.folder}; only models of transformers' own classes are merged so"
        )
    if base.quantization is not None:
        raise PlanError(f"{base.folder}: a classifier out of a 4-bit base is not built; merge onto the 16-bit base")
    score = adapter.replaced[_SCORE]
    labels = range(score.shape[0])
    config = dict(base.config) | {
        "architectures": [name.removesuffix(_LANGUAGE) + _CLASSIFIER],
        "id2label": {str(label): f"LABEL_{label}" for label in labels},
        "label2id": {f"LABEL_{label}": label for label in labels},
    }
    pad_id = (adapter.training or {}).get("pad_token_id")
    if isinstance(pad_id, int) and not isinstance(pad_id, bool):
        config["pad_token_id"] = pad_id
    tensors = {tensor: source for tensor, source in base.tensors.items() if tensor not in _HEADS}
    return replace(base, config=config, tensors={**tensors, _SCORE: score})


def head_dtype(name: str, base: Checkpoint) -> str | None:
    """The dtype of the base's matrices for a head that the adapter brings; None: the tensor is the base's own."""
    if not is_brought(name, base):
        return None
    return next((source.dtype for source in base.tensors.values() if source.dtype in FLOATS), None)


def is_brought(name: str, base: Checkpoint) -> bool:
    """Tell whether a tensor is the head that the adapter brings and the files of the base do not have."""
    return name == _SCORE and base.tensors[name].file not in {seen.path for seen in base.fingerprints}


def notes(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> list[str]:
    """Say what the merge makes."""
    if not any(_has_head(adapter) for adapter, _ in adapters) or not is_brought(_SCORE, base):
        return []
    found = [f"the result is a {base.config['architectures'][0]} with {base.tensors[_SCORE].shape[0]} output(s)"]
    if not isinstance(base.config.get("pad_token_id"), int):
        found.append(
            "pad_token_id is neither in the base's config.json nor known from the training: one text can be scored at a"
            " time, or set it to the token that pads"
        )
    return found


def _has_head(adapter: Adapter) -> bool:
    return adapter.config.get("task_type") == "SEQ_CLS" and _SCORE in adapter.replaced
