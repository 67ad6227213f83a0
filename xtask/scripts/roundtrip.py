"""Loads pruned and merged checkpoints in stock transformers and runs them.

    cargo run --release --example exports -- --out out/roundtrip
    cargo run --release --example exports -- crates/moe-checkpoint/tests/fixtures/unrun --out out/unrun
    python xtask/scripts/roundtrip.py out/roundtrip [--golden FILE]

For every model: each export loads with no weight missing, unexpected or of another shape; a forward pass in float32 and in
bfloat16 gives finite logits; the structurally pruned model computes what the masked one does. Logits are left beside each
export in `expected.safetensors` (`input_ids`, `logits`); the ignored test of `crates/moe-core/tests/parity/exports.rs` compares ours with them. --golden writes `input_ids [1, 8]` and the
float32 logits of the last four positions of every export, as MODEL/EXPORT `[4, V]`: `cargo xtask goldens` calls it so.

`width` stands for a model whose own width keeps stock loaders from running it in bfloat16. Needs torch, transformers and safetensors.
Exits with 1 if a check fails.
"""

import argparse
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
EXPORTS = ("masked", "uniform", "experts", "pieces", "fine_grained", "merged")
# Below the smallest vocabulary of a fixture, and below what stands for images and sounds in it, which transformers does not embed.
GOLDEN_IDS = [[5, 17, 30, 33, 3, 31, 21, 36]]
GOLDEN_POSITIONS = 4


def load(directory, dtype):
    config = json.loads((directory / "config.json").read_text())
    kind, options = AutoModelForCausalLM, {}
    if config["model_type"] == "kimi_k2":
        # DeepSeek-V3 under another name, for which the released model brings code of its own.
        kind, options = DeepseekV3ForCausalLM, {"config": DeepseekV3Config.from_dict(config | {"model_type": "deepseek_v3"})}
    if config["model_type"] == "qwen3_5_moe":
        # All of it, vision included, not only the text model.
        kind = Qwen3_5MoeForConditionalGeneration
    elif config["model_type"] == "mistral4" or ("text_config" in config and hasattr(transformers, config["architectures"][0])):
        # Text models inside others, which no class for text alone loads, and what such a class does not know.
        kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind]))[:3] for kind in kinds if info.get(kind)}
    return model.eval(), wrong


def logits_of(model, ids):
    if model.config.model_type == "llama4":
        # The whole fails without images in transformers 5.24; its text model does not.
        model = model.language_model
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def check(directory, golden, name):
    """Problems, whether its width can run in bfloat16, and float32 logits, if it runs."""
    problems, found = [], None
    config = json.loads((directory / "config.json").read_text())
    config = config.get("text_config", config)
    # Grouped matrix products need rows of a multiple of 16 bytes, pruned or not.
    aligned = config.get("moe_intermediate_size", config.get("intermediate_size")) % 8 == 0
    for dtype in (torch.float32, torch.bfloat16) if aligned else (torch.float32,):
        try:
            model, wrong = load(directory, dtype)
            generator = torch.Generator().manual_seed(7)
            ids = torch.randint(3, model.config.get_text_config().vocab_size, (2, 19), generator=generator)
            logits = logits_of(model, ids)
            if dtype == torch.float32:
                found = logits
                save_file({"input_ids": ids, "logits": found.contiguous()}, directory / "expected.safetensors")
                golden[name] = logits_of(model, torch.tensor(GOLDEN_IDS))[0, -GOLDEN_POSITIONS:].contiguous()
        except Exception as error:  # whatever a loader raises is a result here
            problems.append((dtype, f"{type(error).__name__}: {str(error)[:300]}"))
            continue
        if wrong or not torch.isfinite(logits).all():
            problems.append((dtype, wrong or "logits that are not finite"))
    return problems, aligned, found


def main(root, golden_path):
    transformers.utils.logging.disable_progress_bar()
    failures, golden = 0, {"input_ids": torch.tensor(GOLDEN_IDS)}
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'model':24} {'export':12} {'f32':>5} {'bf16':>6} {'uniform - masked':>17}")
    for model in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        logits = {}
        for export in filter(lambda export: (model / export).exists(), EXPORTS):
            problems, aligned, found = check(model / export, golden, f"{model.name}/{export}")
            if found is not None:
                logits[export] = found
            difference = ""
            if export == "uniform" and "masked" in logits and "uniform" in logits:
                gap = (logits["uniform"] - logits["masked"]).abs().max().item()
                difference = f"{gap:.1e}"
                if gap > TOLERANCE:
                    problems.append((torch.float32, f"uniform and masked differ by {gap}"))
            state = lambda dtype: "FAIL" if any(at == dtype for at, _ in problems) else "ok"
            half = state(torch.bfloat16) if aligned else "width"
            print(f"{model.name:24} {export:12} {state(torch.float32):>5} {half:>6} {difference:>17}")
            for dtype, problem in problems:
                print(f"    {dtype}: {problem}")
            failures += len(problems)
    if golden_path and not failures:
        save_file(golden, golden_path)
        print(f"{golden_path}: {len(golden) - 1} exports, {Path(golden_path).stat().st_size} bytes")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--golden")
    arguments = parser.parse_args()
    sys.exit(main(arguments.root, arguments.golden))
