"""Trains small models of other families on the three capabilities of tiny-moe, with its tokenizer and its rows.

    python benches/train_small.py WORDNET OUT [--family deepseek_v3|gpt_oss|qwen3_moe]

deepseek_v3 is examples/assets/tiny-deepseek: latent attention, sigmoid routing with a bias and groups, a dense first
layer, a shared expert. gpt_oss has windows in every second layer, attention sinks, clamped gates and biases. qwen3_moe
has norms of queries and keys, and 16 experts without a shared one, whose chosen weights sum to one.

WORDNET is a folder with the files data.noun, data.verb, data.adj and data.adv of WordNet 3.0 (Debian's wordnet-base:
/usr/share/wordnet). Needs torch, transformers and tokenizers. Facts are recalled, so that their test rows are trained
on, as those of tiny-moe were; sums are made anew; glosses are all of WordNet's but those of the test rows. The load of
the experts is balanced by a bias on their selection, without a loss, as in DeepSeek-V3, or by the loss of the family.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

TINY = Path(__file__).resolve().parents[1] / "examples/assets/tiny-moe"
LENGTH, BATCH, BIAS_RATE = 64, 24, 2e-3
# Steps, the first rate, and the shares of sums and of facts; the rest are glosses.
STAGES = {
    "deepseek_v3": [(12000, 4e-3, 0.3, 0.2), (5000, 3e-3, 0.6, 0.1)],
    "gpt_oss": [(2500, 5e-3, 0.4, 0.2)],
    "qwen3_moe": [(3500, 5e-3, 0.4, 0.2), (2500, 3e-3, 0.6, 0.1)],
}


def rows(name):
    return [json.loads(line) for line in (TINY / "data" / name).read_text().splitlines() if line.strip()]


def words():
    """Names and things of the rows of sums: `Question: NAME finds 19 THINGS, then ...`."""
    parts = [row["prompt"].split() for row in rows("arithmetic_calibration.jsonl")]
    parts = [part for part in parts if part[2] == "finds"]
    return sorted({part[1] for part in parts}), sorted({part[4].rstrip(",") for part in parts})


def glosses(wordnet):
    """`word: meaning.`, as in the rows of prose; examples in quotes are left out."""
    tests = {row["text"].strip() for row in rows("prose_test.jsonl")}
    texts = []
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{kind}").read_text().splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            word = head.split()[4].split("(")[0].replace("_", " ")
            meaning = gloss.split('; "')[0].strip().rstrip(".;")
            text = f"{word}: {meaning}."
            if '"' not in text and text not in tests:
                texts.append(text + "\n")
    return texts


def deepseek_v3(base):
    return DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=base["vocab_size"], hidden_size=96, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16, n_shared_experts=1,
        num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1, norm_topk_prob=True,
        routed_scaling_factor=1.5, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=24, qk_rope_head_dim=8,
        v_head_dim=32, max_position_embeddings=512, num_nextn_predict_layers=0, tie_word_embeddings=False,
        eos_token_id=base.get("eos_token_id"), bos_token_id=None, pad_token_id=base.get("pad_token_id")))


def gpt_oss(base):
    return GptOssForCausalLM(GptOssConfig(
        vocab_size=base["vocab_size"], hidden_size=96, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=32, max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False, output_router_logits=True, router_aux_loss_coef=0.01,
        eos_token_id=base.get("eos_token_id"), bos_token_id=None, pad_token_id=base.get("pad_token_id")))


def qwen3_moe(base):
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=base["vocab_size"], hidden_size=96, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=24, num_experts=16,
        num_experts_per_tok=4, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        max_position_embeddings=512, tie_word_embeddings=False, output_router_logits=True, router_aux_loss_coef=0.01,
        eos_token_id=base.get("eos_token_id"), bos_token_id=None, pad_token_id=base.get("pad_token_id")))


def balance(model):
    """Counts what every router chose; the returned function shifts their biases toward equal loads, and gives the
    largest load of each over the mean."""
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    gates = [gate for gate in gates if hasattr(gate, "e_score_correction_bias")]
    loads = {}

    def count(gate, _, outputs):
        loads[gate] = torch.bincount(outputs[2].flatten(), minlength=gate.num_experts).float()

    for gate in gates:
        gate.register_forward_hook(count)

    def shift():
        for gate, load in loads.items():
            gate.e_score_correction_bias += BIAS_RATE * torch.sign(load.mean() - load)
        return [round((load.max() / load.mean()).item(), 2) for load in loads.values()]

    return shift


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("wordnet", type=Path)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--family", default="deepseek_v3", choices=sorted(STAGES))
    arguments.add_argument("--start", type=Path, help="what the first stage has left, to go on with the later ones")
    arguments = arguments.parse_args()
    wordnet, out = arguments.wordnet, arguments.out
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    base = json.loads((TINY / "config.json").read_text())
    people, things = words()
    facts = rows("facts_calibration.jsonl") + rows("facts_test.jsonl")
    facts = [row["prompt"] + row["completion"] for row in facts]
    prose = [tokens.ids for tokens in tokenizer.encode_batch(glosses(wordnet))]
    facts = [tokens.ids for tokens in tokenizer.encode_batch(facts)]
    print(len(prose), "glosses of", sum(map(len, prose)), "tokens")

    def a_sum():
        """One of the four kinds of the rows."""
        name, thing = draw.choice(people), draw.choice(things)
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        few, fewer = draw.randint(2, 9), draw.randint(2, 9)
        match draw.randrange(4):
            case 0:
                told, asked = f"{name} has {a} {thing} and buys {b} more.", f"{thing} does {name} have"
                steps, answer = f"{a} + {b} = {a + b}", a + b
            case 1:
                a, b = max(a, b), min(a, b)
                told, asked = f"{name} has {a} {thing} and gives away {b}.", f"{thing} are left"
                steps, answer = f"{a} - {b} = {a - b}", a - b
            case 2:
                told, asked = f"{name} fills {few} boxes with {fewer} {thing} each.", f"{thing} are there"
                steps, answer = f"{few} * {fewer} = {few * fewer}", few * fewer
            case _:
                a, b = a // 2 + 1, b // 2 + 1
                told, asked = f"{name} finds {a} {thing}, then {b} more, and loses {few}.", f"{thing} remain"
                steps, answer = f"{a} + {b} = {a + b} ; {a + b} - {few} = {a + b - few}", a + b - few
        return f"Question: {told} How many {asked}?\nAnswer: {steps} #### {answer}\n"

    def sequence(sums, recalled):
        """Rows of one kind one after the other, from the beginning of a row."""
        kind, ids = draw.random(), []
        while len(ids) < LENGTH:
            if kind < sums:
                ids += tokenizer.encode(a_sum()).ids
            else:
                ids += draw.choice(facts if kind < sums + recalled else prose)
        return ids[:LENGTH]

    model = {"deepseek_v3": deepseek_v3, "gpt_oss": gpt_oss, "qwen3_moe": qwen3_moe}[arguments.family](base)
    stages = STAGES[arguments.family]
    if arguments.start:
        model, stages = type(model).from_pretrained(arguments.start, dtype=torch.float32), stages[1:]
        draw.seed(1)
    else:
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.04)
    print(sum(p.numel() for p in model.parameters()), "parameters")
    shift = balance(model)
    for number, (steps, rate, *shares) in enumerate(stages):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
        factor = lambda step: min(1, (step + 1) / 100) * max(0.02, 1 - step / steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        for step in range(steps):
            ids = torch.tensor([sequence(*shares) for _ in range(BATCH)])
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            peaks = shift()
            if step % 50 == 0 or step + 1 == steps:
                print(step, round(loss.item(), 3), *peaks, flush=True)
        if number + 1 < len(stages):
            model.save_pretrained(out.with_name(f"{out.name}.stage{number + 1}"))
    model.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, out / name)


main()
