"""Tiny dense models with what transformers computes for them, and whether a Mixture of Experts made of one loads in stock
transformers with the logits of the dense model.

    dense.py make OUT            writes OUT/{llama,mistral,qwen2,qwen3}/
    dense.py check DENSE MOE..   compares the logits of each MoE directory with DENSE/expected.safetensors
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "mistral": MistralConfig(**SIZES, sliding_window=8, head_dim=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


def make(out):
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = torch.randint(0, SIZES["vocab_size"], (2, 19))
        with torch.no_grad():
            logits = model(ids).logits
        model.save_pretrained(out / name)
        save_file({"input_ids": ids, "logits": logits}, out / name / "expected.safetensors")


def check(dense, made):
    expected = load_file(dense / "expected.safetensors")
    for directory in made:
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[key]:
                sys.exit(f"{directory}: {key}: {sorted(info[key])}")
        with torch.no_grad():
            logits = model.eval()(expected["input_ids"]).logits
        difference = (logits - expected["logits"]).abs().max().item()
        print(f"{directory}: {type(model).__name__}, largest difference of logits {difference:.2e}")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), sys.argv[3:])
