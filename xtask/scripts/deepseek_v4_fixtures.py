"""Makes the fixture `deepseek_v4_saved`, what is expected of `deepseek_v4`, and an adapter.

    python xtask/scripts/deepseek_v4_fixtures.py crates/moe-checkpoint/tests/fixtures/parity/tf5
    python xtask/scripts/deepseek_v4_fixtures.py --adapter crates/moe-checkpoint/tests/fixtures/parity/tf5/deepseek_v4_saved \
        crates/moe-peft/tests/fixtures/peft/lora_deepseek_v4

Token ids are drawn until no compressed key at the edge of a choice has the score of another: torch takes any of those. Needs
torch, transformers and safetensors, and peft for the adapter.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

SHAPE = dict(
    vocab_size=61, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=1,
    head_dim=12, q_lora_rank=10, num_experts_per_tok=3, n_routed_experts=8, n_shared_experts=1, routed_scaling_factor=2.5,
    max_position_embeddings=256, mlp_layer_types=["hash_moe", "hash_moe", "moe", "moe"],
    layer_types=["sliding_attention", "heavily_compressed_attention"] + 2 * ["compressed_sparse_attention"],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, rope_theta=10000.0,
    compress_rope_theta=160000.0, partial_rotary_factor=1 / 3, hc_mult=3, hc_sinkhorn_iters=7, swiglu_limit=0.8,
    rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1),
    sliding_window=5, o_groups=3, o_lora_rank=6, index_n_heads=8, index_head_dim=8, index_topk=5, num_nextn_predict_layers=0,
    initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
)


def make(directory, seed):
    """A random model whose vectors, biases of places and tables are away from their neutral start."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**SHAPE)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    normal = lambda shape: torch.randn(shape, generator=generator)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1 and "norm" in name:
                value.copy_(1 + 0.2 * normal(value.shape))
            elif value.dim() == 1 and name.endswith("scale"):
                value.copy_(0.7 + 0.3 * torch.rand(value.shape, generator=generator))
            elif value.dim() == 1 or "position_bias" in name:
                value.copy_(0.5 * normal(value.shape))
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.copy_(0.3 * normal(value.shape))
            if name.endswith("tid2eid"):
                experts, top_k = SHAPE["n_routed_experts"], value.shape[1]
                value.copy_(torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in value]))
    model.save_pretrained(directory)
    versions = dict(transformers=transformers.__version__, torch=torch.__version__, seed=seed, save_kwargs={})
    (directory / "made_with.json").write_text(json.dumps(versions | {"model_class": "DeepseekV4ForCausalLM"}, indent=1))


def load(directory):
    options = dict(dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    return DeepseekV4ForCausalLM.from_pretrained(directory, **options).eval()


def untied_ids(model, length):
    """Ids without a tie at the edge of a choice, and how often they were drawn."""
    ties = []

    def look(indexer):
        def hook(_, inputs, scores):
            most = model.config.index_topk
            for token in range(length):
                ready = (token + 1) // indexer.compress_rate
                if ready > most:
                    best = scores[:, token, :ready].sort(descending=True).values
                    ties.append(bool((best[:, most - 1] - best[:, most] < 1e-4).any()))
        return indexer.scorer.register_forward_hook(hook)

    hooks = [look(module) for name, module in model.named_modules() if name.endswith("compressor.indexer")]
    for draw in range(1, 10000):
        ids = torch.randint(3, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1000 + draw))
        ties.clear()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        if not any(ties):
            break
    for hook in hooks:
        hook.remove()
    return ids, draw


def expect(directory, length, layers):
    """Writes what transformers computes, with the gradients of the experts of `layers`."""
    model = load(directory)
    ids, draws = untied_ids(model, length)
    out, hidden, hooks = {}, [], []
    for i, layer in enumerate(model.model.layers):
        def routed(_, inputs, result, i=i):
            for name, value in zip(("router_logits", "topk_weight", "topk_index"), result):
                out[f"{name}.{i}"] = value.detach().clone()
        hooks.append(layer.mlp.gate.register_forward_hook(routed))
        hooks.append(layer.register_forward_hook(lambda _, inputs, result: hidden.append(result.detach().clone())))
    first = lambda _, args, kwargs: hidden.append((args[0] if args else kwargs["hidden_states"]).detach().clone())
    hooks.append(model.model.layers[0].register_forward_pre_hook(first, with_kwargs=True))
    result = model(input_ids=ids, labels=ids, use_cache=False)
    result.loss.backward()
    for hook in hooks:
        hook.remove()
    out |= {"input_ids": ids, "logits": result.logits.detach(), "loss": result.loss.detach()}
    out |= {f"hidden.{i}": value for i, value in enumerate(hidden)}
    for layer in layers:
        experts = model.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            out[f"grad.model.layers.{layer}.mlp.experts.{name}"] = getattr(experts, name).grad
    save_file({name: value.contiguous() for name, value in out.items()}, directory / "expected.safetensors")
    path = directory / "made_with.json"
    made = json.loads(path.read_text())
    made.setdefault("checks", {})["draws_of_ids"] = draws
    made["ids"] = "drawn until no compressed key at the edge of a choice has the score of another: torch takes any of those"
    path.write_text(json.dumps(made, indent=1))


def adapter(base, out, seed=51):
    """An adapter of projections, compressors and experts, the logits with it, and those after five steps of AdamW."""
    import peft

    torch.manual_seed(seed)
    model = load(base)
    ids = load_file(base / "expected.safetensors")["input_ids"]
    ends = ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "compressor.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj")
    modules = [name for name, _ in model.named_modules() if name.endswith(ends) and "indexer" not in name]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", target_modules=modules, target_parameters=parameters)
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = base.name
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in trained.items():
            if "lora_B" in name:
                value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    logits = lambda: model(input_ids=ids, use_cache=False).logits.detach()
    expected, losses = {"input_ids": ids, "logits": logits()}, []
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected |= {"train_losses": torch.stack(losses).double(), "logits_after": logits()}
    save_file({name: value.contiguous() for name, value in expected.items()}, out / "expected.safetensors")
    made = dict(base=base.name, peft=peft.__version__, transformers=transformers.__version__, torch=torch.__version__, seed=seed,
        optimizer="AdamW lr 1e-2 betas .9 .999 eps 1e-8 wd .01, 5 steps on input_ids, adapter parameters only")
    (out / "made_with.json").write_text(json.dumps(made))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--adapter":
        adapter(Path(sys.argv[2]), Path(sys.argv[3]))
        sys.exit()
    root = Path(sys.argv[1])
    make(root / "deepseek_v4_saved", 23)
    expect(root / "deepseek_v4_saved", 43, [0, 3])
    expect(root / "deepseek_v4", 19, [0, 2])
