"""`fastft doctor`: what this machine has, what is missing, what would be used."""

from fastft import console
from fastft.cli.job import Job

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors", "tokenizers")
EXTRAS = {
    "deepspeed": "ZeRO",
    "modelscope": "ModelScope",
    "tensorboard": "TensorBoard logs",
    "wandb": "Weights & Biases logs",
}
# Extras whose package has another name.
PACKAGES = {"modelscope": "modelscope-hub"}
# Columns, and those before what is said of a thing.
WIDTH, INDENT = 80, 19


def doctor() -> Job:
    """Tell what this machine has, lacks, and would use."""

    def run() -> None:
        import textwrap

        for title, rows in (("machine", _machine()), ("libraries", _libraries()), ("training", _training())):
            console.result(f"{title}:")
            for name, text in rows:
                lines = textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False, break_long_words=False) or [""]
                console.result(f"  {name:<16} {lines[0]}")
                for line in lines[1:]:
                    console.result(" " * INDENT + line)

    return Job(run)


def _machine() -> list[tuple[str, str]]:
    import os
    import platform
    import shutil

    import fastft

    info = fastft.build_info()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(".").free
    return [
        ("fastft", str(info["version"])),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cpu", f"{len(os.sched_getaffinity(0))} cores, kernels use {info['level']}"),
        ("memory", f"{memory / 2**30:.1f} GiB"),
        ("disk here", f"{free / 1e9:.1f} GB free"),
    ]


def _libraries() -> list[tuple[str, str]]:
    from importlib import metadata

    rows = []
    for name in LIBRARIES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, f"MISSING: pip install {name}"))
    for name, purpose in EXTRAS.items():
        try:
            rows.append((name, metadata.version(PACKAGES.get(name, name))))
        except metadata.PackageNotFoundError:
            rows.append((name, f"none; for {purpose}: pip install 'fastft[{name}]'"))
    return rows


def _training() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as problem:
        return [("device", f"none: torch cannot be imported ({problem})")]
    from fastft.model import device, speed

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    chosen = [("", part) for part in speed.of_machine().parts()]
    chosen[0] = ("faster by", chosen[0][1])
    if accelerator is None:
        return [
            ("device", f"cpu, {torch.get_num_threads()} threads (torch finds no accelerator)"),
            ("dtype", "fp32 for trained weights, the checkpoint's for frozen ones"),
            *chosen,
        ]
    count = torch.accelerator.device_count()
    rows = [("device", f"{accelerator.type}, {count} found" + (" (ROCm)" if torch.version.hip else ""))]
    if accelerator.type == "cuda":
        for index in range(count):
            card = torch.cuda.get_device_properties(index)
            rows.append((f"card {index}", f"{card.name}, {card.total_memory / 2**30:.1f} GiB"))
    rows.append(("dtype", "bf16" if device.has_bf16(device.choose()) else "fp16 (this device has no bf16)"))
    return [*rows, *chosen]
