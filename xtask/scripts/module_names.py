"""What transformers calls the modules of every fixture in memory, which is what adapters of PEFT are called by.

    python xtask/scripts/module_names.py crates/moe-checkpoint/tests/fixtures/parity/tf5 crates/moe-peft/tests/fixtures/modules.json

By fixture: modules with a weight of two dimensions, and those that hold the parameters of all experts of a layer; numbers of
layers and experts are `N`. Models that are no part of transformers are left out. Needs torch, transformers and safetensors.
"""

import json
import re
import sys
from pathlib import Path

import torch
import transformers
from roundtrip import load


def names(directory):
    model, _ = load(directory, torch.float32)
    found = set()
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        if "visual" in name or "vision" in name or "audio" in name:
            continue
        if (last == "weight" and parameter.dim() == 2) or (parameter.dim() == 3 and last == "down_proj"):
            found.add(re.sub(r"\.\d+(?=\.|$)", ".N", module))
    return sorted(found)


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    root, out = map(Path, sys.argv[1:])
    own = ("bailing_moe", "kimi_k2")
    fixtures = sorted(path for path in root.iterdir() if json.loads((path / "config.json").read_text())["model_type"] not in own)
    found = {path.name: names(path) for path in fixtures}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(modules)}" for name, modules in found.items())
    out.write_text("{\n" + lines + "\n}\n")
