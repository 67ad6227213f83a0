"""Loads pruned checkpoints in stock transformers and runs them.

    cargo run --release -p moe-prune --example export_all -- crates/moe-checkpoint/tests/fixtures/parity/tf5 out/roundtrip
    cargo run --release -p moe-prune --example export_all -- crates/moe-checkpoint/tests/fixtures/unrun out/roundtrip
    python xtask/scripts/roundtrip.py out/roundtrip

For every model: each export loads with no weight missing, unexpected or of another shape; a forward pass in float32 and in
bfloat16 gives finite logits; the structurally pruned model computes what the masked one does. Logits are left beside each
export in `expected.safetensors` (`input_ids`, `logits`); the ignored test of `crates/moe-core/tests/parity.rs` compares ours with them. `width` stands for
a model whose own width keeps stock loaders from running it in bfloat16. Needs torch, transformers and safetensors. Exits with 1 if a check fails.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
)

TOLERANCE = 1e-4


def open_model(directory, dtype):
    config = json.loads((directory / "config.json").read_text())
    options = {"dtype": dtype, "output_loading_info": True}
    if config["model_type"] == "kimi_k2":
        # DeepSeek-V3 under another name, for which the released model brings code of its own.
        return DeepseekV3ForCausalLM.from_pretrained(
            directory, config=DeepseekV3Config.from_dict(config | {"model_type": "deepseek_v3"}), **options
        )
    if config["model_type"] == "qwen3_5_moe":
        # All of it, vision included, not only the text model.
        return Qwen3_5MoeForConditionalGeneration.from_pretrained(directory, **options)
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def run(directory, dtype):
    model, info = open_model(directory, dtype)
    model.eval()
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind]))[:3] for kind in kinds if info.get(kind)}
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, 19), generator=generator)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return wrong, ids, logits


def main(root):
    transformers.utils.logging.disable_progress_bar()
    failures = 0
    print(f"{'model':24} {'export':9} {'f32':>8} {'bf16':>8} {'uniform - masked':>17}")
    for model in sorted(Path(root).iterdir()):
        logits = {}
        for export in ("masked", "uniform", "experts"):
            directory = model / export
            problems = []
            # Grouped matrix products need rows of a multiple of 16 bytes, pruned or not.
            config = json.loads((directory / "config.json").read_text())
            config = config.get("text_config", config)
            aligned = config.get("moe_intermediate_size", config.get("intermediate_size")) % 8 == 0
            for dtype in (torch.float32, torch.bfloat16) if aligned else (torch.float32,):
                try:
                    wrong, ids, found = run(directory, dtype)
                except Exception as error:  # whatever a loader raises is a result here
                    problems.append(f"{dtype}: {type(error).__name__}: {str(error)[:300]}")
                    continue
                if wrong or not torch.isfinite(found).all():
                    problems.append(f"{dtype}: {wrong or 'logits that are not finite'}")
                if dtype == torch.float32:
                    logits[export] = found
                    save_file({"input_ids": ids, "logits": found.contiguous()}, directory / "expected.safetensors")
            difference = ""
            if export == "uniform" and "masked" in logits and "uniform" in logits:
                gap = (logits["uniform"] - logits["masked"]).abs().max().item()
                difference = f"{gap:.1e}"
                if gap > TOLERANCE:
                    problems.append(f"uniform and masked differ by {gap}")
            state = lambda dtype: "FAIL" if any(p.startswith(str(dtype)) for p in problems) else "ok"
            half = state(torch.bfloat16) if aligned else "width"
            print(f"{model.name:24} {export:9} {state(torch.float32):>8} {half:>8} {difference:>17}")
            for problem in problems:
                print(f"    {problem}")
            failures += len(problems)
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
