"""The memory of a merge, without the proof, is below two files of weights, however large the model is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rules.sources import ROOT
from tests.unit.lora.tiny import make_adapter, quiet

_SHARD = 80_000_000  # a merge also holds some 40 MB of buffers, whatever the size of the files

# The peak is counted from where the merge begins: libraries that are loaded by then are not part of it.
_MERGE = """
import json, sys
from pathlib import Path
import torch
import megatron_llm.lora.merge as m
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: int(line.split()[1]) * 1024 for line in lines for key in ("VmHWM", "VmRSS") if line.startswith(key)}
torch.addmm(torch.zeros(64, 64), torch.zeros(64, 4), torch.zeros(4, 64)), torch.linalg.vector_norm(torch.zeros(8).double())
base, adapter, save = sys.argv[1:]
Path("/proc/self/clear_refs").write_text("5")
before = peak()["VmRSS"]
report = m.merge(base, [(adapter, 1.0)], save, m.MergeOptions(verify=False, max_shard_bytes=%d), lambda line: None)
print(json.dumps({"peak": peak()["VmHWM"] - before, "changed": len(report["changed"])}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc, which only Linux has")
@pytest.mark.parametrize("kind", ["bfloat16", "dora"])
def test_peak_is_below_two_files(tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192}
    with quiet():
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "base", max_shard_size=_SHARD)
        weights = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
        del model
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "base", r=8, target_modules="all-linear", use_dora=kind == "dora")
    assert weights > 3 * _SHARD, "the model is too small to show anything"
    command = [sys.executable, "-c", _MERGE % _SHARD, str(tmp_path / "base"), str(adapter), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{weights / 1e6:.0f} MB of weights, files of {_SHARD / 1e6:.0f} MB, peak {found['peak'] / 1e6:.0f} MB")
    assert found["changed"] == 56
    assert 0 < found["peak"] < 2 * _SHARD, f"{found['peak'] / 1e6:.0f} MB"
