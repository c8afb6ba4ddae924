"""`fastft convert verify`."""

from pathlib import Path
from typing import Literal

from fastft import console
from fastft.cli.convert_merge import is_llava, name_options, with_weight
from fastft.cli.job import Job
from fastft.errors import UsageError


def verify(
    merged: str,
    *,
    base: str | None = None,
    adapter: tuple[str, ...] = (),
    is_clip: bool = False,
    visual_encoder: str | None = None,
    model_class: str | None = None,
    key_map: tuple[str, ...] = (),
    dequantized_base: Literal["auto", "none", "nf4", "fp4"] = "auto",
    double_quant: bool = False,
    match_peft: bool = False,
    base_is_residual: bool = False,
    json: bool = False,
) -> Job:
    """Say tensor by tensor whether a folder is base + adapter.

    Without --adapter: whether it is the base, as it is, in 4 bit or in another dtype.

    Args:
        merged: the folder to check
        base: folder or hub id of the base model
        adapter: folder of an adapter, or DIR:WEIGHT, or of a LLaVA's parts; may be given several times
        is_clip: as it was merged
        visual_encoder: as it was merged
        model_class: as it was merged
        key_map: as it was merged; may be given several times
        dequantized_base: as it was merged
        double_quant: as it was merged
        match_peft: as it was merged
        base_is_residual: as it was merged
        json: print the outcome as JSON
    """
    if base is None:
        raise UsageError("convert verify: --base is needed (and --adapter, for a merge): what was it made from")

    others = {
        "a second --adapter": adapter[1:],
        "--is-clip": is_clip,
        "--model-class": model_class,
        "--key-map": key_map,
        "--match-peft": match_peft,
        "--base-is-residual": base_is_residual,
    }

    def run() -> int:
        from fastft.convert import verify as verifying
        from fastft.convert.merge import four_bit_base
        from fastft.hub import locate

        four_bit = four_bit_base(dequantized_base, double_quant=double_quant)
        if adapter and is_llava(
            Path(adapter[0]), [option for option, given in others.items() if given], visual_encoder
        ):
            from fastft.convert import llava, llava_result

            parts, num_tokens, _ = llava_result.parts(
                llava_result.find(locate.model_called(base), Path(adapter[0]), visual_encoder)
            )
            found = llava.verify(llava.plan_llava(parts, num_tokens=num_tokens, four_bit=four_bit), Path(merged))
            console.result(found.as_json() if json else found.text())
            return 0 if found.good else 1
        report = verifying.verify(
            Path(merged),
            locate.model_called(base),
            [with_weight(text) for text in adapter],
            names=name_options(model_class, key_map, is_clip=is_clip),
            four_bit=four_bit,
            match_peft=match_peft,
            base_is_residual=base_is_residual,
        )
        console.result(report.as_json() if json else report.text())
        return 0 if report.good else 1

    return Job(run)
