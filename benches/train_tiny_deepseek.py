"""Trains a small DeepSeek-V3 kind of model (latent attention, sigmoid routing with a bias, groups, a dense first layer, a
shared expert) on the rows of the bundled model, with its tokenizer: another family for `cargo xtask adaptive-study`.

    python benches/train_family.py OUT [STEPS]

Needs torch, transformers and tokenizers. Facts are recalled, so that their test rows are trained on, as those of the
bundled model were; sums are made anew; prose is that of the calibration rows alone.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

TINY = Path(__file__).resolve().parents[1] / "examples/assets/tiny-moe"
LENGTH, BATCH, RATE = 56, 20, 3e-3


def rows(name):
    return [json.loads(line) for line in (TINY / "data" / name).read_text().splitlines() if line.strip()]


def words(name):
    """Names and things of the rows of sums."""
    people, things = set(), set()
    for row in rows(name):
        parts = row["prompt"].split()
        people.add(parts[1])
        things.add(parts[4].rstrip(","))
    return sorted(people), sorted(things)


def main():
    out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    base = json.loads((TINY / "config.json").read_text())
    people, things = words("arithmetic_calibration.jsonl")
    facts = [row["prompt"] + row["completion"] for name in ("facts_calibration.jsonl", "facts_test.jsonl") for row in rows(name)]
    prose = [row["text"] for row in rows("prose_calibration.jsonl")]

    def a_sum():
        a, b = draw.randint(2, 49), draw.randint(2, 49)
        c = draw.randint(2, 9)
        thing = draw.choice(things)
        return (f"Question: {draw.choice(people)} finds {a} {thing}, then {b} more, and loses {c}. How many {thing} remain?\n"
                f"Answer: {a} + {b} = {a + b} ; {a + b} - {c} = {a + b - c} #### {a + b - c}\n")

    config = DeepseekV3Config(
        vocab_size=base["vocab_size"], hidden_size=96, intermediate_size=192, moe_intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=3, n_group=2, topk_group=2, first_k_dense_replace=1, norm_topk_prob=True,
        routed_scaling_factor=1.0, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=24, qk_rope_head_dim=8,
        v_head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=base.get("eos_token_id"),
        bos_token_id=None, pad_token_id=None)
    model = DeepseekV3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.04)
    print(sum(p.numel() for p in model.parameters()), "parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50) * max(0.05, 1 - s / steps))
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for step in range(steps):
        texts = []
        for _ in range(BATCH):
            kind = draw.random()
            text = "".join(a_sum() for _ in range(2)) if kind < 0.4 else \
                "".join(draw.choices(facts, k=8)) if kind < 0.75 else draw.choice(prose)
            ids = tokenizer.encode(text).ids
            first = draw.randint(0, max(0, len(ids) - LENGTH)) if kind >= 0.75 else 0
            texts.append(ids[first:first + LENGTH])
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        labels = torch.full((BATCH, LENGTH), -100)
        for i, row in enumerate(texts):
            ids[i, :len(row)] = torch.tensor(row)
            labels[i, :len(row)] = torch.tensor(row)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step + 1 == steps:
            print(step, round(loss.item(), 3), flush=True)
    assert gates, "no layer has routed experts"
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, out / name)
    shutil.copytree(TINY / "data", out / "data", dirs_exist_ok=True)


main()
