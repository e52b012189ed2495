"""Checks of torch, the GPU and bitsandbytes, in a child process: a crash there is a failed check."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from coderl.commands.doctor.check import Check
from coderl.errors import named_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

NAMES = ("torch", "GPU", "NF4 on the CPU", "NF4 on the GPU")
SECONDS = 180.0
"""Time limit of the child process. To import torch from a cold disk can take a minute of it."""
WORST = 0.153
"""NF4's largest error, relative to the largest value of a block: half its widest gap, (1 - 0.6962) / 2."""
FIX_BNB = "pip install -U bitsandbytes; on a GPU also check that torch's CUDA version is one it supports"


def checks(command: tuple[str, ...] = (sys.executable, "-m", __name__)) -> Iterator[Check]:
    """Checks of torch, GPU and NF4, made by a child process that runs :func:`main`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        out, err, how = done.stdout, done.stderr, _ending(done.returncode)
    except subprocess.TimeoutExpired as late:
        out, err, how = _text(late.stdout), _text(late.stderr), f"hung for {SECONDS:g} s"
    except OSError as error:
        out, err, how = "", str(error), "could not be started"
    found = [Check(**json.loads(line)) for line in out.splitlines()]
    yield from found
    if how:
        said = [line.strip() for line in err.splitlines() if line.strip()]
        last = f": {said[-1]}" if said else ""
        name = NAMES[min(len(found), len(NAMES) - 1)]
        yield Check(name, "fail", f"the trial {how}{last}"[:300], "reinstall torch and bitsandbytes")


def _ending(code: int) -> str:
    """How a process ended, by its exit status; empty if well. Negative is the number of a signal."""
    if code >= 0:
        return f"ended with status {code}" if code else ""
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _text(captured: str | bytes | None) -> str:
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""


def trials() -> Iterator[Check]:
    """The checks, made in this process."""
    try:
        import torch
    except Exception as error:
        yield Check("torch", "fail", f"cannot be imported: {named_line(error)}", "pip install -U torch")
        return
    yield Check("torch", "ok", f"{torch.__version__} loads")
    gpu = _gpu(torch)
    yield gpu
    yield _nf4(torch, "cpu")
    if gpu.data["count"]:
        yield _nf4(torch, "cuda")


def _gpu(torch: Any) -> Check:
    build = torch.version.cuda or torch.version.hip
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        why = "torch finds no GPU" if build else "this is torch's CPU build"
        fix = "fine for small models; a 7B model needs a GPU with 16 GB" + (
            ", its driver and, in a container, --gpus all" if build else " and a CUDA build of torch"
        )
        return Check("GPU", "warn", f"none: {why}", fix, {"count": 0, "build": build})
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    names = [f"{found.name}, {found.total_memory / (1 << 30):.0f} GiB" for found in properties]
    data = {
        "count": count,
        "build": build,
        "devices": names,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }
    detail = f"{'; '.join(names)}; CUDA {build}, {'bfloat16' if data['bf16'] else 'float16'}"
    try:
        for index in range(count):
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if (ones @ ones).sum().item() != 64.0**3:
                raise RuntimeError(f"cuda:{index} multiplies wrongly")
    except Exception as error:
        fix = "check the driver with nvidia-smi, and that torch's CUDA build fits it"
        return Check("GPU", "fail", f"{detail}: {named_line(error)}", fix, data)
    return Check("GPU", "ok", detail, data=data)


def _nf4(torch: Any, device: str) -> Check:
    name = NAMES[2] if device == "cpu" else NAMES[3]
    try:
        import bitsandbytes

        problem, worst = round_trip(bitsandbytes, torch, device)
    except Exception as error:
        return Check(name, "fail", f"bitsandbytes fails: {named_line(error)}", FIX_BNB)
    detail = f"bitsandbytes {bitsandbytes.__version__}, largest error {worst:.3f} of a block's largest value"
    if problem:
        return Check(name, "fail", f"{detail}: {problem}", FIX_BNB)
    return Check(name, "ok", detail, data={"largest_error": worst})


def round_trip(bitsandbytes: Any, torch: Any, device: str) -> tuple[str, float]:
    """Quantize and dequantize a matrix, then run a 4-bit layer forward and backward.

    Returns:
        What is wrong (empty where nothing is), and the largest error of the dequantized values, relative to
        the largest value of their block.
    """
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    unpacked = bitsandbytes.functional.dequantize_4bit(packed, state)
    worst = float(((unpacked - weight).abs().amax(1) / weight.abs().amax(1)).max())
    if not worst <= WORST:
        return f"more than the {WORST} that NF4 allows", worst
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    inputs = torch.eye(64, device=device, requires_grad=True)
    outputs = layer(inputs)
    outputs.sum().backward()
    if not _near(outputs.T, unpacked) or not _near(inputs.grad[0], unpacked.sum(0)):
        return "a 4-bit layer computes something else than its weights say", worst
    return "", worst


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal within 2 %, since some CPUs compute in bfloat16."""
    return bool((found - expected).norm() <= 0.02 * expected.norm())


def main() -> None:
    """Print each check as a line of JSON, as soon as it is made."""
    # The parent parses stdout, so what libraries print there, native ones too, is sent to stderr. Each line
    # is written at once: after a crash, the parent knows by the lines which check it was in.
    results = os.dup(1)
    os.dup2(2, 1)
    for check in trials():
        os.write(results, (json.dumps(dataclasses.asdict(check)) + "\n").encode())


if __name__ == "__main__":
    main()
