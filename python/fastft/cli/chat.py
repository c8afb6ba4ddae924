"""`fastft chat`: talk to a model, merged or with an adapter."""

from pathlib import Path
from typing import Literal

from fastft.cli.job import Job
from fastft.errors import UsageError


def chat(
    model: str,
    *,
    adapter: str | None = None,
    llava: str | None = None,
    visual_encoder: str | None = None,
    visual_select_layer: int | None = None,
    prompt: str | None = None,
    image: tuple[str, ...] = (),
    system: str | None = None,
    bits: Literal["4"] | None = None,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    max_new_tokens: int = 2048,
    temperature: float = 0.1,
    top_k: int = 40,
    top_p: float = 0.75,
    repetition_penalty: float = 1.0,
    seed: int = 0,
) -> Job:
    """Talk to a model, with or without an adapter.

    On a terminal you talk in turns; otherwise each line of stdin is a question. Images stand before the first question
    of a conversation; on a terminal, IMAGE FILE shows another one with the next question.

    Args:
        model: folder or hub id of a model, or folder of an adapter
        adapter: folder of an adapter to put on the model
        llava: folder of a LLaVA's parts (RUN/llava) that were trained on the model
        visual_encoder: with --llava: folder or hub id of the vision tower, where the parts do not say it
        visual_select_layer: with --llava: layer whose features are taken, where the parts do not say it
        prompt: answer this and end
        image: file to show to a vision-language model; may be given several times
        system: system message
        bits: 4 holds the weights in NF4
        dtype: of the weights
        max_new_tokens: longest answer
        temperature: 0 always takes the likeliest token
        top_k: sample from so many likeliest tokens
        top_p: sample from the likeliest tokens of this total probability
        repetition_penalty: above 1 makes repeated tokens less likely
        seed: of the sampling
    """
    if llava is None and (visual_encoder is not None or visual_select_layer is not None):
        raise UsageError("chat: --visual-encoder and --visual-select-layer belong to --llava")
    if llava is not None and adapter is not None:
        raise UsageError("chat: --llava brings its adapters; leave --adapter out")

    def run() -> int | None:
        from fastft.chat import repl, session

        sampling = session.Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        images = [session.image(path) for path in image]
        for shown in images:
            session.look(shown)  # before gigabytes of weights are read
        held = int(bits) if bits else None
        if llava is None:
            talk = session.load(model, adapter=adapter, bits=held, dtype=dtype)
        else:
            from fastft.chat import llava as together

            talk = together.load(
                model,
                Path(llava),
                visual_encoder=visual_encoder,
                select_layer=visual_select_layer,
                bits=held,
                dtype=dtype,
            )
        return repl.run(talk, sampling, system=system, prompt=prompt, images=images)

    return Job(run)
