"""The memory of a merge is below one file of weights, and with its proof below two, however large the model is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.rules.sources import ROOT
from tests.unit.lora.tiny import make_adapter, make_base, quiet

_SHARD = 48_000_000

# The peak is counted from where the merge begins. What libraries take for themselves is not part of it: a merge of a tiny
# model comes first.
_MERGE = """
import json, sys
from pathlib import Path
from megatron_llm.convert.memory import return_freed_memory
from megatron_llm.lora.merge import MergeOptions, merge
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
folder = Path(sys.argv[1])
return_freed_memory()  # as tools/merge_lora.py does
merge(folder / "tiny", [(folder / "tiny_adapter", 1.0)], folder / "tiny_out", MergeOptions(), lambda line: None)
found = {}
for name in ("unproven", "proven"):
    options = MergeOptions(verify=name == "proven", max_shard_bytes=%d)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    report = merge(folder / "base", [(folder / "adapter", 1.0)], folder / name, options, lambda line: None)
    found[name] = {"peak": memory("VmHWM") - before, "changed": len(report["changed"]), "comparison": report["comparison"]}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of 302 MB in files of 48 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192}
    folder = tmp_path_factory.mktemp("memory") / "base"
    with quiet():
        LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder, max_shard_size=_SHARD)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc, which only Linux has")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peak_is_below_two_files(tmp_path: Path, base: Path, kind: str) -> None:
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert weights > 6 * _SHARD, "the model is too small to show anything"
    settings = {"target_modules": "all-linear", "use_dora": kind == "dora"}
    make_adapter(tmp_path / "tiny_adapter", make_base(tmp_path / "tiny", "llama", dtype=torch.bfloat16, width=512), **settings)
    make_adapter(tmp_path / "adapter", base, r=8, **settings)
    (tmp_path / "base").symlink_to(base)
    done = subprocess.run([sys.executable, "-c", _MERGE % _SHARD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    peaks = {name: each["peak"] for name, each in found.items()}
    print(f"{weights / 1e6:.0f} MB of weights, files of {_SHARD / 1e6:.0f} MB, peak {peaks['unproven'] / 1e6:.0f} MB,", end=" ")
    print(f"with the proof {peaks['proven'] / 1e6:.0f} MB")
    assert all(each["changed"] == 56 for each in found.values())
    assert all("layer by layer" in judge for judge in found["proven"]["comparison"]["judges"])
    assert 0 < peaks["unproven"] < _SHARD and 0 < peaks["proven"] < 2 * _SHARD, peaks
