"""Loads quantized checkpoints in stock transformers and leaves what they compute.

    cargo build --release -p moe-checkpoint --example quantized_exports
    python xtask/scripts/quantized.py target/release/examples/quantized_exports out/quantized [--golden FILE]

For the bundled model and the MXFP4 fixture, every format that is written loads in transformers (with compressed-tensors where the format is
one of its own) with no weight missing, unexpected or of another shape, dequantized to BF16, and runs in float32. --golden writes `NAME/FORMAT`, the logits
of the last two positions `[2, V]`, and `input_ids [1, 8]`: crates/moe-core/tests/parity/weights.rs compares ours with them. What transformers 5.24 is known to
read wrongly is listed in KNOWN and must still be wrong, so that this list is looked at when it is not. Needs torch, transformers, accelerate, compressed-tensors and
safetensors. Exits with 1 if a check fails.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
IDS = [[5, 17, 40, 33, 3, 41, 21, 28]]
POSITIONS = 2
TINY = ROOT / "examples/assets/tiny-moe"
GPT_OSS = ROOT / "crates/moe-checkpoint/tests/fixtures/quantized/mxfp4-gpt_oss"
INT = {"type": "int", "bits": 4, "group_size": 32}
CASES = {
    "tiny-moe/fp8_blocks": (TINY, {"type": "fp8_blocks", "block": [32, 32]}),
    "tiny-moe/fp8_channels": (TINY, "fp8_channels"),
    "tiny-moe/mxfp4": (TINY, "mxfp4"),
    "tiny-moe/int4": (TINY, INT),
    "tiny-moe/int4_channels": (TINY, INT | {"group_size": None}),
    "tiny-moe/int8": (TINY, INT | {"bits": 8}),
    "gpt_oss/mxfp4": (GPT_OSS, "mxfp4"),
}
# Experts of these are misread by transformers 5.24: the global scale of NVFP4 and zero points of integers are not collected.
KNOWN = {
    "tiny-moe/nvfp4": (TINY, "nvfp4"),
    "tiny-moe/int4_asymmetric": (TINY, INT | {"symmetric": False}),
}


def load(directory):
    config = json.loads((directory / "config.json").read_text())
    options = {}
    method = config["quantization_config"]["quant_method"]
    if method == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    elif method == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    elif method == "mxfp4":
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager", **options
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind]))[:3] for kind in kinds if info.get(kind)}
    return model.float().eval(), wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("quantize")
    parser.add_argument("out", type=Path)
    parser.add_argument("--golden", type=Path)
    arguments = parser.parse_args()
    golden, failed = {"input_ids": torch.tensor(IDS)}, False
    for name, (model, form) in (CASES | KNOWN).items():
        directory = arguments.out / name.replace("/", "-")
        form = form if isinstance(form, str) else json.dumps(form)
        part = [] if name.startswith("gpt_oss") else ["linear"]
        subprocess.run([arguments.quantize, str(model), form, str(directory), *part], check=True, stdout=subprocess.DEVNULL)
        try:
            loaded, wrong = load(directory)
            with torch.no_grad():
                logits = loaded(input_ids=torch.tensor(IDS)).logits[0, -POSITIONS:].contiguous()
            if wrong or not logits.isfinite().all():
                raise ValueError(f"{wrong or 'logits are not finite'}")
        except Exception as error:  # whatever a loader raises is a result here
            known = name in KNOWN
            print(f"{name}: {'known: ' if known else ''}{type(error).__name__}: {str(error)[:200]}")
            failed |= not known
            continue
        print(f"{name}: loads{', experts known to be misread' if name in KNOWN else ''}, logits up to {logits.abs().max():.3f}")
        if name not in KNOWN:
            golden[name] = logits
    if arguments.golden:
        save_file(golden, arguments.golden)
    sys.exit(failed)


if __name__ == "__main__":
    main()
