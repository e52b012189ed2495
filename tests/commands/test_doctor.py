"""``coderl doctor``: each check finds what is wrong, and the command reports it."""

from __future__ import annotations

import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from coderl.cli import main
from coderl.commands.doctor import accelerator, isolation, machine, services
from coderl.commands.doctor.check import Check
from coderl.commands.doctor.command import checks, line
from coderl.sandbox import Sandbox
from coderl.sandbox.jail import Jail, Primitive
from coderl.types import Execution

GOOD = Check("one", "ok", "is there", data={"tier": "A"})
MISSING = Check("another", "warn", "is not there", "put it there")
BROKEN = Check("a third", "fail", "is broken", "fix it")


def doctor(monkeypatch: pytest.MonkeyPatch, found: list[Check], *args: str) -> int:
    monkeypatch.setattr("coderl.commands.doctor.command.checks", lambda: iter(found))
    return main(["doctor", *args])


def test_the_table_has_a_line_for_each_check_and_a_fix_for_each_that_is_not_ok(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(monkeypatch, [GOOD, MISSING]) == 0
    out, err = capsys.readouterr()
    rows = out.splitlines()
    assert [row.split()[0] for row in rows] == ["ok", "warn", "->"]
    assert len({row.index(part) for row, part in zip(rows, ("is", "is", "->"), strict=True)}) == 1, "aligned"
    assert not err and "\033" not in out
    assert "\033[31mFAIL" in line(BROKEN, colour=True)


def test_a_failed_check_is_exit_code_1_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(monkeypatch, [BROKEN, GOOD]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("ok"), "the rest is checked all the same"
    assert err == "coderl: error: training cannot run safely here, see: a third\n"


@pytest.mark.parametrize(("found", "code"), [([GOOD, MISSING], 0), ([GOOD, BROKEN], 1)])
def test_json_is_one_document_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: list[Check], code: int
) -> None:
    assert doctor(monkeypatch, found, "--json") == code
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is (code == 0) and shown["tier"] == "A"
    assert [check["status"] for check in shown["checks"]] == [check.status for check in found]
    assert shown["checks"][1]["fix"] == found[1].fix
    assert sum(shown["counts"].values()) == 2


def test_a_misspelt_flag_is_exit_code_2_and_help_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--jsno"]) == 2
    assert "did you mean --json?" in capsys.readouterr().err
    assert main(["doctor", "--help"]) == 0
    assert "HF_HUB_OFFLINE" in capsys.readouterr().out


@pytest.mark.slow
def test_all_checks_run_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Real checks. Tokens that are set are found and never shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    found = {check["name"]: check for check in shown["checks"]}
    assert not err and "verysecret" not in out
    assert found["hub"]["data"]["token"] and found["W&B"]["data"]["logged_in"]
    assert shown["tier"] == found["isolation"]["data"]["tier"] == Sandbox(workers=1).tier
    assert found["verdicts"]["status"] == found["NF4 on the CPU"]["status"] == "ok"
    assert found["containment"]["status"] == ("warn" if shown["tier"] == "C" else "ok")
    assert {"bubblewrap", "user namespaces", "seccomp", "landlock", "resource limits"} <= found.keys()
    assert found["versions"]["data"]["torch"] == metadata.version("torch")
    assert not any(tmp_path.iterdir())


def test_the_parent_process_loads_no_torch() -> None:
    code = (
        "import sys; from coderl.commands.doctor import accelerator, command, isolation, machine, services; "
        "sys.exit(bool({'torch', 'lightning', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The machine


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    found = machine.versions()
    assert found.status == "fail" and found.fix == "pip install peft"
    assert "peft missing" in found.detail and found.data["peft"] is None


@pytest.mark.parametrize(("usable", "status"), [(1, "warn"), (2, "ok")])
def test_a_single_core_is_a_warning(monkeypatch: pytest.MonkeyPatch, usable: int, status: str) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("coderl.sandbox.usable.cores", lambda: usable)
    found = machine.cores()
    assert found.status == status and found.detail.startswith(f"{usable} usable of 8")


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coderl.sandbox.usable.memory_limit", lambda: 1 << 30)
    assert machine.memory().status == "warn" and machine.memory().data["usable"] == 1 << 30


@pytest.mark.parametrize(("gib", "status"), [(0.5, "fail"), (10, "warn"), (100, "ok")])
def test_little_free_disk_space_warns_and_very_little_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: float, status: str
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=int(gib * machine.GIB)))
    found = machine.disk(tmp_path / "checkpoints" / "run")
    assert found.status == status and f"{gib:.1f} GiB free" in found.detail
    assert bool(found.fix) == (status != "ok")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_failure() -> None:
    found = machine.disk(Path("/proc/checkpoints"))  # not even root may
    assert found.status == "fail" and "/proc cannot be written" in found.detail


# The sandbox


@pytest.mark.parametrize(
    ("tier", "allowed", "status"), [("A", "", "ok"), ("B", "", "ok"), ("C", "", "fail"), ("C", "1", "warn")]
)
def test_the_weakest_tier_fails_unless_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tier: Any, allowed: str, status: str
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", allowed)
    found = isolation.tier(Jail(tier, "a reason"))
    assert (found.status, found.detail) == (status, f"tier {tier}: a reason")


def test_each_means_of_isolation_is_a_check() -> None:
    jail = Jail("B", "", (Primitive("bubblewrap", False, "not found"), Primitive("seccomp", True, "8 lines")))
    assert [(check.status, check.detail) for check in isolation.primitives(jail)] == [
        ("warn", "not found"),
        ("ok", "8 lines"),
    ]


def test_the_attacks_succeed_outside_the_sandbox() -> None:
    """Otherwise their failure in the sandbox would prove nothing."""
    with isolation.attacks() as programs:
        assert len(programs) == 3
        for program in programs.values():
            source = f"{program.code}\n{program.tests[0]}"
            subprocess.run([sys.executable, "-c", source], check=True, timeout=30)
            wrong = subprocess.run(
                [sys.executable, "-c", source.replace("== '", "== 'x")], capture_output=True
            )
            assert wrong.returncode == 1
        paths = [match[1] for p in programs.values() if (match := re.search(r"open\('(.*)'\)", p.code))]
        assert Path(paths[0]).is_file()
    assert not Path(paths[0]).parent.exists()


def test_the_attacks_succeed_in_the_weakest_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "jail", Jail("C", "made weak for this test"))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    found = {check.name: check for check in isolation.checks()}
    assert found["isolation"].status == found["containment"].status == "fail"
    assert found["containment"].detail == "programs can open sockets, start processes, read files"
    assert found["verdicts"].status == "ok"


STOPPED, DONE, LOST = Execution("error"), Execution("passed", 1, 1), Execution("infra_error")


@pytest.mark.parametrize(
    ("results", "tier", "allowed", "status"),
    [
        ([STOPPED, STOPPED], "A", "", "ok"),
        ([STOPPED, DONE], "A", "1", "fail"),
        ([STOPPED, DONE], "C", "1", "warn"),
        ([STOPPED, DONE], "C", "", "fail"),
        ([STOPPED, LOST], "B", "", "fail"),
    ],
)
def test_containment_fails_or_warns_if_an_attack_succeeded(
    monkeypatch: pytest.MonkeyPatch, results: list[Execution], tier: str, allowed: str, status: str
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", allowed)
    assert isolation.containment(dict(zip("ab", results, strict=True)), tier).status == status


@pytest.mark.parametrize("wrong", [DONE, LOST, Execution("failed", 0, 2)])
def test_a_sandbox_with_wrong_verdicts_fails(wrong: Execution) -> None:
    good = Execution("passed", 2, 2)
    assert isolation.verdicts(good, Execution("failed", 1, 2)).status == "ok"
    assert isolation.verdicts(good, wrong).status == isolation.verdicts(wrong, good).status == "fail"


def test_a_sandbox_that_cannot_run_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(Sandbox, "run", broken)
    (*_, last) = isolation.checks()
    assert last.status == "fail" and "no more processes" in last.detail


# torch, the GPU and bitsandbytes


def scripted(monkeypatch: pytest.MonkeyPatch, source: str, seconds: float = 60.0) -> list[Check]:
    monkeypatch.setattr(accelerator, "SECONDS", seconds)
    first = '{"name": "torch", "status": "ok", "detail": ""}'
    return list(accelerator.checks((sys.executable, "-c", f"print('{first}', flush=True)\n{source}")))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "was killed by SIGILL"),
        ("import sys; sys.exit('libcuda is ill')", "ended with status 1: libcuda is ill"),
        ("import time; time.sleep(60)", "hung for 2 s"),
    ],
)
def test_a_driver_that_crashes_or_hangs_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    torch, gpu = scripted(monkeypatch, source, 2.0 if "sleep" in source else 60.0)
    assert torch.status == "ok"
    assert (gpu.name, gpu.status) == ("GPU", "fail") and said in gpu.detail
    assert scripted(monkeypatch, "") == [Check("torch", "ok", "")]
    (absent,) = accelerator.checks(("/absent/python",))
    assert absent.status == "fail" and "/absent/python" in absent.detail


@pytest.mark.parametrize(
    ("build", "factor", "status", "said"),
    [
        (None, None, "warn", "none: this is torch's CPU build"),
        ("12.8", None, "warn", "none: torch finds no GPU"),
        ("12.8", 1.0, "ok", "Fake 9000, 24 GiB; CUDA 12.8, float16"),
        ("12.8", 2.0, "fail", "cuda:0 multiplies wrongly"),
    ],
)
def test_a_gpu_is_checked_by_a_multiplication(
    build: str | None, factor: float | None, status: str, said: str
) -> None:
    """With a fake torch, whose GPU multiplies by ``factor`` too much; None: there is no GPU."""
    import torch

    cuda = SimpleNamespace(
        is_available=lambda: factor is not None,
        device_count=lambda: 1,
        is_bf16_supported=lambda including_emulation: False,
        get_device_properties=lambda _: SimpleNamespace(name="Fake 9000", total_memory=24 << 30),
    )
    fake = SimpleNamespace(
        cuda=cuda,
        version=SimpleNamespace(cuda=build, hip=None),
        ones=lambda *shape, device: torch.ones(*shape) * (factor or 0.0),
    )
    found = accelerator._gpu(fake)
    assert found.status == status and said in found.detail
    assert found.data["count"] == (factor is not None)


def test_nf4_fails_if_values_or_layers_are_wrong() -> None:
    import bitsandbytes
    import torch

    problem, worst = accelerator.round_trip(bitsandbytes, torch, "cpu")
    assert not problem and 0.05 < worst < accelerator.WORST

    real = bitsandbytes.functional
    for change in (lambda x: x * 1.2, lambda x: x * float("nan"), torch.zeros_like):

        def broken(*args: Any, change: Any = change) -> Any:
            return change(real.dequantize_4bit(*args))

        functional = SimpleNamespace(quantize_4bit=real.quantize_4bit, dequantize_4bit=broken)
        problem, _ = accelerator.round_trip(SimpleNamespace(functional=functional), torch, "cpu")
        assert "more than" in problem

    nn: Any = bitsandbytes.nn

    class Forgetful(nn.Linear4bit):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x) * 1.1

    layers = SimpleNamespace(Linear4bit=Forgetful, Params4bit=nn.Params4bit)
    problem, _ = accelerator.round_trip(SimpleNamespace(functional=real, nn=layers), torch, "cpu")
    assert "something else than its weights say" in problem


def test_a_broken_bitsandbytes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises
    found = {check.name: check for check in accelerator.trials()}
    assert found["torch"].status == "ok"
    assert found["NF4 on the CPU"].status == "fail" and "bitsandbytes fails" in found["NF4 on the CPU"].detail


# The hub and W&B


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers with the status code in the path."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(int(self.path.strip("/")))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_a_server_that_answers_is_reachable(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    assert services.reach(f"{server}/200") == ""
    assert services.reach(f"{server}/429") == "", "it is there, and busy"
    assert "status 503" in services.reach(f"{server}/503")


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        assert services.reach(f"http://127.0.0.1:{port}", 0.3)
        assert time.monotonic() - started < 5
    assert "cannot be reached" in services.reach(f"http://127.0.0.1:{port}")
    assert "cannot be reached" in services.reach("no address")


@pytest.mark.parametrize(("status", "expected"), [(200, "ok"), (404, "warn")])
def test_the_hub_is_asked_unless_offline_mode_is_set(
    server: str, monkeypatch: pytest.MonkeyPatch, status: int, expected: str
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "ENDPOINT", f"{server}/{status}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    found = services.hub()
    assert (found.status, found.data["reachable"]) == (expected, expected == "ok")
    assert "no token" in found.detail and not found.data["token"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert services.hub().data["reachable"] is None


def test_wandb_warns_without_a_login_unless_it_is_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert services.wandb().status == "warn"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password verysecret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert services.wandb() == Check(
        "W&B",
        "ok",
        "logged in to api.wandb.ai",
        data={"logged_in": True, "mode": "online", "host": "api.wandb.ai"},
    )
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert services.wandb().status == "warn"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert services.wandb().status == "ok"


def test_no_two_checks_have_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "checks", lambda: iter(()))
    names = [check.name for check in checks()]
    assert len(names) == len(set(names)) > 8
