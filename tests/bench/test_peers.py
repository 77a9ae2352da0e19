"""The comparison's arithmetic, and that its servers start and end whole."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest

from bench.peers.report import TARGETS, Target, all_targets, medians, ratio
from bench.peers.servers import Setting, running
from relevo import demo

ROUNDS = [
    {"relevo": {"tpot_c1_ms": 30.0}, "vllm": {"tpot_c1_ms": 60.0}},
    {"relevo": {"tpot_c1_ms": 50.0}, "vllm": {"tpot_c1_ms": 62.5}},
    {"relevo": {"tpot_c1_ms": 40.0}},
]


def test_ratio_is_of_medians_of_the_rounds_that_have_both() -> None:
    found = ratio(ROUNDS, "tpot_c1_ms", "relevo", "vllm")
    assert found is not None
    assert found.value == pytest.approx(40 / 61.25)
    assert (found.low, found.high) == (0.5, 0.8)
    assert medians(ROUNDS, "relevo") == {"tpot_c1_ms": 40.0}
    assert ratio(ROUNDS, "tpot_c1_ms", "relevo", "openvino") is None


def test_targets_say_when_they_are_met() -> None:
    assert Target("x", "a", "b", at_most=0.75).is_met(0.75)
    assert not Target("x", "a", "b", at_most=0.75).is_met(0.76)
    assert Target("x", "a", "b", at_least=1.25).is_met(1.3)
    assert not Target("x", "a", "b", at_least=1.25).is_met(1.2)
    assert str(Target("x", "a", "b")) == ""
    promised = [target for target in all_targets(["vllm", "openvino"]) if str(target)]
    assert promised == [target for target in TARGETS if str(target)]


def test_our_servers_run_with_their_roles_and_leave_nothing() -> None:
    setting = Setting(demo.target_path(), "float32", ["--max-model-len", "256", "--kv-cache-memory", "64MiB"])
    with running("relevo-split", setting) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
        assert set(server.roles.values()) == {"kvtransfer", "prefill-0", "decode-0", "router"}
        assert set(server.roles.values()) <= server.cpu_seconds().keys()
        peaks = server.peak_rss_bytes()
        assert all(peaks[role] > 1 << 20 for role in server.roles.values())
        assert 0 < server.seconds_to_ready < 100
        pids = list(server.roles)
    for pid in pids:
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z", f"{pid} goes on"
    assert server.process.returncode == 0
    assert os.getpid() not in pids


def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"relevo ended with exit code 1(.|\n)*no such folder"),
        running("relevo", Setting(tmp_path / "nothing", "float32")),
    ):
        pass
