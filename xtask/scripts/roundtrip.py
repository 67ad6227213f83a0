"""Loads pruned and merged checkpoints in stock transformers and runs them.

    cargo run --release --example exports -- --out out/roundtrip
    cargo run --release --example exports -- crates/moe-checkpoint/tests/fixtures/unrun --out out/unrun
    python xtask/scripts/roundtrip.py out/roundtrip [--golden FILE] [--adapters FILE]

For every model: each export loads with no weight missing, unexpected or of another shape; a forward pass in float32 and in
bfloat16 gives finite logits; the structurally pruned model computes what the masked one does. Logits are left beside each
export in `expected.safetensors` (`input_ids`, `logits`); the ignored test of `crates/moe-core/tests/parity/exports.rs` compares ours with them. --golden writes `input_ids [1, 8]` and the
float32 logits of the last four positions of every export, as MODEL/EXPORT `[4, V]`: `cargo xtask goldens` calls it so.

Where there are the files of an adapter beside the exports, PEFT loads them on the model itself (of the directory --bases), which
then gives the logits of the model that has the adapter in its weights; of these the golden MODEL/adapter `[1, V]` is the last
position. --adapters writes the hash of the files, or why PEFT does not load them, as JSON.

`width` stands for a model whose own width keeps stock loaders from running it in bfloat16. Needs torch, transformers, peft and safetensors.
Exits with 1 if a check fails.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
)

TOLERANCE = 1e-4
EXPORTS = ("masked", "uniform", "experts", "pieces", "fine_grained", "merged", "lora")
BASES = Path(__file__).parents[2] / "crates/moe-checkpoint/tests/fixtures/parity/tf5"
# Below the smallest vocabulary of a fixture, and below what stands for images and sounds in it, which transformers does not embed.
GOLDEN_IDS = [[5, 17, 30, 33, 3, 31, 21, 36]]
GOLDEN_POSITIONS = 4


def load_bailing(directory, config, dtype):
    """Ling and Ring with full attention are no part of transformers: the model there that is the same formula, with the tensors
    under its names. All of them must have a place."""
    second = config.get("score_function") == "sigmoid"
    shared = dict(config, tie_word_embeddings=False)
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    if second:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
        shared |= dict(n_routed_experts=config["num_experts"], n_shared_experts=config["num_shared_experts"])
        model_type = "glm4_moe"
    else:
        width = config["hidden_size"] // config["num_attention_heads"]
        shared |= dict(head_dim=width, intermediate_size=config["moe_intermediate_size"], num_local_experts=config["num_experts"],
            shared_intermediate_size=config["num_shared_experts"] * config["moe_intermediate_size"], embedding_multiplier=1.0,
            residual_multiplier=1.0, logits_scaling=1.0, attention_multiplier=width ** -0.5)
        model_type = "granitemoeshared"
    for key in ("model_type", "architectures", "rope_theta", "rope_scaling", "torch_dtype", "partial_rotary_factor"):
        shared.pop(key, None)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **shared, rope_parameters=rope), dtype=dtype, attn_implementation="eager"
    )
    tensors = load_file(directory / "model.safetensors")
    own = {}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    for name, value in tensors.items():
        name = name.replace("model.word_embeddings.", "model.embed_tokens.")
        for new, old in [(".o_proj.", ".dense."), (".q_norm.", ".query_layernorm."), (".k_norm.", ".key_layernorm.")]:
            name = name.replace(f".attention{old}", f".self_attn{new}")
        name = name.replace(".gate.expert_bias", ".gate.e_score_correction_bias")
        if ".attention.query_key_value." in name:
            dim = value.shape[0] // (heads + 2 * groups)
            parts = value.split([heads * dim, groups * dim, groups * dim])
            own |= {name.replace(".attention.query_key_value.", f".self_attn.{part}_proj."): rows for part, rows in zip("qkv", parts)}
            continue
        own[name] = value
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.mlp"
        if f"{block}.gate.weight" not in own:
            continue
        expert = lambda e, part: own.pop(f"{block}.experts.{e}.{part}_proj.weight")
        count = config["num_experts"]
        gate_up = torch.stack([torch.cat([expert(e, "gate"), expert(e, "up")]) for e in range(count)])
        down = torch.stack([expert(e, "down") for e in range(count)])
        if second:
            own |= {f"{block}.experts.gate_up_proj": gate_up, f"{block}.experts.down_proj": down}
            continue
        sparse = f"model.layers.{layer}.block_sparse_moe"
        names = {name for name in model.state_dict() if name.startswith(sparse)}
        router = next(name for name in names if "router" in name)
        own |= {f"{sparse}.experts.gate_up_proj": gate_up, f"{sparse}.experts.down_proj": down, router: own.pop(f"{block}.gate.weight")}
        part = lambda which: own.pop(f"{block}.shared_experts.{which}_proj.weight")
        own[f"model.layers.{layer}.shared_mlp.input_linear.weight"] = torch.cat([part("gate"), part("up")])
        own[f"model.layers.{layer}.shared_mlp.output_linear.weight"] = part("down")
    missing = model.load_state_dict({name: value.to(dtype) for name, value in own.items()}, strict=False)
    wrong = {"missing_keys": missing.missing_keys[:3], "unexpected_keys": missing.unexpected_keys[:3]}
    return model.eval(), {kind: names for kind, names in wrong.items() if names}


def load(directory, dtype):
    config = json.loads((directory / "config.json").read_text())
    if config["model_type"].startswith("bailing_moe"):
        return load_bailing(directory, config, dtype)
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
    # With adapters in the weights, a model keeps what it has beside what transformers knows: layers that predict further tokens.
    kinds = [kind for kind in kinds if kind != "unexpected_keys" or directory.name not in ("lora", "folded")]
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
    widths = (config.get(key) for key in ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"))
    aligned = next(width for width in widths if width is not None) % 8 == 0
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


def check_adapter(base, directory, expected):
    """What PEFT makes of an adapter: nothing where it gives what is expected, else why it does not."""
    from peft import PeftModel

    try:
        model, _ = load(base, torch.float32)
        with warnings.catch_warnings():
            # Keys that are missing are a warning.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            model = PeftModel.from_pretrained(model, directory).eval().get_base_model()
        difference = (logits_of(model, torch.tensor(GOLDEN_IDS))[0] - expected).abs().max().item()
    except Exception as error:  # whatever a loader raises is a result here
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None if difference <= TOLERANCE else f"logits differ by {difference:.1e}"


def main(root, golden_path, adapters_path, bases):
    transformers.utils.logging.disable_progress_bar()
    failures, golden, adapters = 0, {"input_ids": torch.tensor(GOLDEN_IDS)}, {}
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
        adapter = model / "adapter"
        if adapter.exists():
            folded, wrong = load(adapter / "folded", torch.float32)
            expected = logits_of(folded, torch.tensor(GOLDEN_IDS))[0]
            golden[f"{model.name}/adapter"] = expected[-1:].contiguous()
            failures += len(wrong)
            refused = check_adapter(bases / model.name, adapter, expected)
            adapters[model.name] = {"refused": refused} if refused else {"digest": (adapter / "digest").read_text()}
            print(f"{model.name:24} {'adapter':12} {refused or 'ok'}")
    if golden_path and not failures:
        save_file(golden, golden_path)
        print(f"{golden_path}: {len(golden) - 1} exports, {Path(golden_path).stat().st_size} bytes")
    if adapters_path and not failures:
        Path(adapters_path).write_text(json.dumps(adapters, indent=1, sort_keys=True) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--golden")
    parser.add_argument("--adapters")
    parser.add_argument("--bases", type=Path, default=BASES)
    arguments = parser.parse_args()
    sys.exit(main(arguments.root, arguments.golden, arguments.adapters, arguments.bases))
