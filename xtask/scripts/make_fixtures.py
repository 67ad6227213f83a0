"""Makes tiny checkpoints with what transformers computes for them, in the form that the fixtures' README describes.

    python xtask/scripts/make_fixtures.py crates/moe-checkpoint/tests/fixtures [NAME ...]

Without names, all of the list at the end. Another version of transformers or torch gives other bytes, so afterwards run the
parity tests and `cargo xtask fixtures --write`. Needs torch, transformers and safetensors.

    python xtask/scripts/make_fixtures.py --adapters crates/moe-peft/tests/fixtures/peft [NAME ...]

makes adapters of the checkpoints qwen2_moe and nemotron_h, which needs peft as well, and the adapters made before.
"""

import json
import math
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3ForCausalLM, Qwen3_5MoeForConditionalGeneration

COMMON = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    tie_word_embeddings=False,
)
LATENT = COMMON | dict(
    num_key_value_heads=4, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=8, n_shared_experts=1,
    num_experts_per_tok=3, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8,
)
# The fields of the released configs, which transformers renames on saving.
YARN = dict(type="yarn", factor=4, original_max_position_embeddings=64, beta_fast=32, beta_slow=1)
LONGROPE = dict(
    type="longrope", short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.0, 1.7, 4.0, 9.0], short_mscale=1.1, long_mscale=1.3,
    original_max_position_embeddings=12,
)


def make(model_type, seed, config):
    """A random model whose norms, biases and sinks are away from their neutral start."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **config)
    torch.manual_seed(seed)
    model = (
        Qwen3_5MoeForConditionalGeneration(config)
        if model_type == "qwen3_5_moe"
        else AutoModelForCausalLM.from_config(config)
    ).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dim() == 1 or name.endswith("_bias"):
                value.add_(0.1 * torch.randn(value.shape))
    return model


def edit(directory, changes):
    """Changes keys of config.json; `None` takes a key away."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def expect(model, directory, seed, ids=None):
    """Writes what `model` computes, of random ids if there are none."""
    if ids is None:
        ids = torch.randint(3, model.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(seed))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name)
    # The auxiliary loss of some families is no part of what is expected.
    model.router_aux_loss_coef = 0.0
    hidden = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: hidden.__setitem__(i, (args[0] if args else kwargs["hidden_states"]).detach()),
            with_kwargs=True,
        )
        for i, layer in enumerate(model.model.layers)
    ]
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        shifted = out.logits[:, :-1].reshape(-1, out.logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(shifted, ids[:, 1:].reshape(-1))
    assert torch.allclose(loss, out.loss, atol=1e-6), "the loss has other parts"
    expected = {"input_ids": ids, "logits": out.logits.detach(), "loss": loss}
    expected |= {f"hidden.{i}": value for i, value in hidden.items()}
    expected |= {f"router_logits.{n}": value.detach() for n, value in enumerate(out.router_logits)}
    grads = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads and all(torch.isfinite(value).all() for value in grads.values())
    expected = {name: value.float() if value.is_floating_point() else value for name, value in expected.items()}
    save_file({name: value.contiguous() for name, value in (expected | grads).items()}, directory / "expected.safetensors")
    return ids, out.logits.detach()


def write(directory, model_type, seed, config, *, released=None, computed_by=None, bf16=False, run=True):
    """Saves a model. `released` are changes of its config.json, `computed_by` those of the config that the expected numbers
    are computed with, where that is another one."""
    model = make(model_type, seed, config)
    if bf16:
        model = model.to(torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "seed": seed}
    (directory / "made_with.json").write_text(json.dumps(versions))
    if run:
        edit(directory, (released or {}) | (computed_by or {}))
        kind = DeepseekV3ForCausalLM if model_type == "deepseek_v3" else AutoModelForCausalLM
        loaded, info = kind.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        expect(loaded.eval(), directory, seed)
    edit(directory, released or {})


def write_quantized(directory, model_type, seed, config, quantize, quantization_config):
    """Saves a model with the weights that `quantize` makes of the tensors of a bf16 one. What is expected is what transformers
    computes in f32 with the bf16 weights it dequantizes those to."""
    write(directory, model_type, seed, config, bf16=True, run=False)
    tensors = quantize(load_file(directory / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    plain = AutoConfig.from_pretrained(directory)
    edit(directory, dict(quantization_config=quantization_config))
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_config(plain, dtype=torch.float32, attn_implementation="eager")
    state = loaded.state_dict()
    assert all(value.dtype in (torch.bfloat16, torch.float32) for value in state.values())
    reference.load_state_dict(state)
    expect(reference.eval(), directory, seed)


def add_gradients(directory):
    """Adds the gradients of all routed experts to what is expected of a model that was made without them."""
    expected = load_file(directory / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    ids = expected["input_ids"]
    out = model(input_ids=ids, labels=ids)
    assert (out.logits - expected["logits"]).abs().max() < 1e-5
    out.loss.backward()
    grads = {f"grad.{name}": p.grad for name, p in model.named_parameters() if ".experts." in name}
    save_file({name: value.detach().contiguous() for name, value in (expected | grads).items()}, directory / "expected.safetensors")


def write_indexed(directory, model_type, seed, config, shape, released=None):
    """A model whose indexer chooses among more keys than it may take. Scores of keys are zero where no head of the indexer has
    a positive product, and torch breaks such ties by how its selection happens to swap: the ids are drawn until the last chosen key
    and the first one that is not are the same whichever of equal keys come first, and stay so when the embedding moves a little."""
    write(directory, model_type, seed, config, run=False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    plain = torch.Tensor.topk

    def run(ids, later_first=None):
        def topk(x, k, dim=-1, **options):
            # scores of keys have a row for every query
            if later_first is None or x.dim() != 3 or x.shape[-1] != ids.shape[1]:
                return plain(x, k, dim, **options)
            order = x.flip(-1).argsort(dim=-1, descending=True, stable=True) if later_first else None
            order = x.argsort(dim=-1, descending=True, stable=True) if order is None else x.shape[-1] - 1 - order
            return torch.return_types.topk((x.gather(-1, order[..., :k]), order[..., :k]))

        torch.Tensor.topk = topk
        try:
            with torch.no_grad():
                return model(input_ids=ids, use_cache=False).logits
        finally:
            torch.Tensor.topk = plain

    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.embed_tokens.weight.data
    for draws in range(1, 10000):
        ids = torch.randint(3, model.config.vocab_size, shape, generator=generator)
        logits = run(ids)
        if max((run(ids, later) - logits).abs().max() for later in (False, True)) > 1e-6:
            continue
        kept = embedding.clone()
        embedding.mul_(1 + 1e-6 * torch.randn(embedding.shape, generator=generator))
        moved = (run(ids) - logits).abs().max()
        embedding.copy_(kept)
        if moved < 1e-3:
            break
    else:
        raise ValueError(f"{directory}: ties whatever the ids")
    print(f"{directory.name}: {draws} draws of ids")
    expect(model, directory, seed, ids)
    edit(directory, released or {})


def write_renamed(directory, model_type, seed, config, rename, released):
    """Saves the weights of a model under the names of a release that is no part of transformers. What is expected is what
    `model_type` computes, which is the same formula."""
    made = make(model_type, seed, config)
    # Buffers that no file has, such as rotary frequencies, are those of a model that is loaded.
    model = AutoModelForCausalLM.from_config(made.config, dtype=torch.float32, attn_implementation="eager").eval()
    model.load_state_dict(made.state_dict())
    directory.mkdir(parents=True, exist_ok=True)
    tensors = rename({name: value.detach().clone() for name, value in model.state_dict().items()})
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(released, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(directory)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "seed": seed, "computed_by": model_type}
    (directory / "made_with.json").write_text(json.dumps(versions))
    expect(model, directory, seed)
    # Under the names that the parity test looks for.
    expected = load_file(directory / "expected.safetensors")
    expected = {name.replace(".block_sparse_moe.", ".mlp."): value for name, value in expected.items()}
    save_file(expected, directory / "expected.safetensors")


def bailing(tensors):
    """Names of Ling and Ring with full attention."""
    out, qkv = {}, {}
    for name, value in tensors.items():
        name = name.replace("model.embed_tokens.", "model.word_embeddings.").replace(".block_sparse_moe.", ".mlp.")
        name = name.replace(".mlp.router.layer.", ".mlp.gate.").replace(".mlp.router.weight", ".mlp.gate.weight")
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(value):
                for part, rows in zip(("gate_proj", "up_proj"), both.chunk(2)):
                    out[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = rows
        elif name.endswith(".experts.down_proj"):
            for expert, rows in enumerate(value):
                out[name.replace("down_proj", f"{expert}.down_proj.weight")] = rows
        elif ".shared_mlp.input_linear." in name:
            for part, rows in zip(("gate_proj", "up_proj"), value.chunk(2)):
                out[name.replace(".shared_mlp.input_linear.", f".mlp.shared_experts.{part}.")] = rows
        elif ".shared_mlp.output_linear." in name:
            out[name.replace(".shared_mlp.output_linear.", ".mlp.shared_experts.down_proj.")] = value
        elif any(f".self_attn.{part}_proj." in name for part in "qkv"):
            layer, part = name.split(".self_attn.")[0], name.split(".self_attn.")[1][0]
            qkv.setdefault(layer, {})[part] = value
        else:
            for old, new in [(".o_proj.", ".dense."), (".q_norm.", ".query_layernorm."), (".k_norm.", ".key_layernorm.")]:
                name = name.replace(f".self_attn{old}", f".attention{new}")
            out[name.replace(".e_score_correction_bias", ".expert_bias")] = value
    for layer, parts in qkv.items():
        out[f"{layer}.attention.query_key_value.weight"] = torch.cat([parts[part] for part in "qkv"])
    return out


def mxfp4(tensors):
    """Experts of gpt-oss in blocks of 32 FP4 elements with an exponent each."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    out = {}
    for name, value in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            out[name] = value
            continue
        blocks = value.float().transpose(1, 2).unflatten(-1, (-1, 32))  # [E, rows, blocks, 32]
        exponents = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
        scaled = blocks / torch.exp2(exponents)[..., None]
        nearest = (scaled.abs()[..., None] - levels).abs().argmin(-1) + 8 * (scaled < 0)
        out[f"{name}_blocks"] = (nearest[..., 0::2] + 16 * nearest[..., 1::2]).to(torch.uint8)
        out[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return out


def fp8(tensors, block=16):
    """Projections in E4M3 with a factor per block. transformers 5.23 dequantizes whole blocks only."""
    out = {}
    for name, value in tensors.items():
        out[name] = value
        if "_proj" not in name:
            continue
        rows, cols = (math.ceil(size / block) for size in value.shape)
        padded = torch.zeros(rows * block, cols * block)
        padded[: value.shape[0], : value.shape[1]] = value.float()
        tiles = padded.unflatten(0, (rows, block)).unflatten(2, (cols, block))
        factors = tiles.abs().amax((1, 3)) / 448.0
        scaled = (tiles / factors[:, None, :, None]).flatten(2, 3).flatten(0, 1)[: value.shape[0], : value.shape[1]]
        out[name] = scaled.to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = factors
    return out


def legacy(**scaling):
    """Rotary fields in the dialect of transformers 4, as released configs have them."""
    return dict(rope_parameters=..., rope_scaling=scaling or None, rope_theta=10000.0)


QWEN35 = COMMON | dict(
    head_dim=8, num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, moe_intermediate_size=24, shared_expert_intermediate_size=16, num_experts=4,
    num_experts_per_tok=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5, mrope_section=[1, 1, 0]),
)
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=16, patch_size=4)
# An indexer of as many heads that a key without a positive product is rare.
INDEXED = COMMON | dict(
    vocab_size=53, hidden_size=16, num_key_value_heads=4, intermediate_size=28, moe_intermediate_size=12, n_routed_experts=6,
    n_shared_experts=1, num_experts_per_tok=2, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, v_head_dim=8,
    index_n_heads=16, index_head_dim=12, routed_scaling_factor=2.5,
)
FEW = INDEXED | dict(num_hidden_layers=3, qk_rope_head_dim=4, index_topk=6)
MANY = INDEXED | dict(vocab_size=37, qk_rope_head_dim=8, index_topk=24)
# Ling and Ring with full attention, small: the second version has what `V2` adds.
BAILING = COMMON | dict(vocab_size=53, hidden_size=16, num_experts_per_tok=2)
V2 = dict(
    head_dim=8, moe_intermediate_size=12, first_k_dense_replace=1, n_group=2, topk_group=1, norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
FIXTURES = {
    "parity/tf5/deepseek_v2_yarn": lambda d: write(
        d, "deepseek_v2", 21, LATENT | dict(n_shared_experts=2, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy"),
        released=legacy(**YARN, mscale=0.707, mscale_all_dim=1.2) | dict(qk_head_dim=..., head_dim=...)),
    "parity/tf5/deepseek_v3_yarn": lambda d: write(
        d, "deepseek_v3", 22, LATENT | dict(n_group=4, topk_group=2),
        released=legacy(**YARN, mscale=1.0, mscale_all_dim=1.0) | dict(qk_head_dim=..., head_dim=...)),
    "parity/tf5/deepseek_v3_bf16": lambda d: write(d, "deepseek_v3", 23, LATENT | dict(n_group=4, topk_group=2), bf16=True),
    "parity/tf5/gpt_oss_bf16": lambda d: write(
        d, "gpt_oss", 24, COMMON | dict(head_dim=8, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=8), bf16=True),
    "parity/tf5/deepseek_v3_fp8": lambda d: write_quantized(
        d, "deepseek_v3", 32, LATENT | dict(n_group=4, topk_group=2, q_lora_rank=32, qk_rope_head_dim=16), fp8,
        dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[16, 16])),
    "parity/tf5/gpt_oss_mxfp4": lambda d: write_quantized(
        d, "gpt_oss", 33, COMMON | dict(head_dim=8, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        mxfp4, dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"])),
    "parity/tf5/kimi_k2": lambda d: write(
        d, "deepseek_v3", 25, LATENT | dict(n_group=1, topk_group=1, routed_scaling_factor=2.827),
        released=legacy(**(YARN | dict(beta_fast=1.0)), mscale=1.0, mscale_all_dim=1.0) | dict(
            model_type="kimi_k2", scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, num_nextn_predict_layers=0,
            qk_head_dim=..., head_dim=...),
        computed_by=dict(model_type="deepseek_v3")),
    "parity/tf5/moonlight": lambda d: write(
        d, "deepseek_v3", 26, LATENT | dict(q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1, routed_scaling_factor=2.446),
        released=dict(rope_parameters=..., rope_theta=50000.0, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1,
            qk_head_dim=..., head_dim=...)),
    "parity/tf5/phimoe_longrope": lambda d: write(
        d, "phimoe", 27, COMMON | dict(intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True),
        released=legacy(**LONGROPE),
        computed_by=legacy(**(LONGROPE | dict(short_factor=LONGROPE["long_factor"])))),
    "parity/tf5/qwen3_moe_gelu": lambda d: write(
        d, "qwen3_moe", 28, COMMON | dict(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, hidden_act="gelu")),
    "parity/tf5/mixtral_gelu_tanh": lambda d: write(
        d, "mixtral", 29, COMMON | dict(intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, hidden_act="gelu_pytorch_tanh")),
    "parity/tf5/deepseek_v32_topk": lambda d: write_indexed(
        d, "deepseek_v32", 36, FEW | dict(n_group=2, topk_group=1, first_k_dense_replace=1, mlp_layer_types=["dense", "sparse", "sparse"]),
        (2, 19)),
    "parity/tf5/deepseek_v32_long": lambda d: write_indexed(
        d, "deepseek_v32", 37, MANY | dict(n_group=2, topk_group=1, first_k_dense_replace=1, mlp_layer_types=["dense", "sparse"],
            rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0,
                beta_slow=0.2, mscale=0.7, mscale_all_dim=1.0)), (1, 131)),
    "parity/tf5/glm_moe_dsa_topk": lambda d: write_indexed(
        d, "glm_moe_dsa", 38, FEW | dict(n_group=1, topk_group=1, first_k_dense_replace=1, mlp_layer_types=["dense", "sparse", "sparse"],
            indexer_types=["full", "shared", "full"], rms_norm_eps=1e-5), (2, 19),
        released=dict(indexer_types=..., index_topk_pattern="FSF")),
    "parity/tf5/glm_moe_dsa_long": lambda d: write_indexed(
        d, "glm_moe_dsa", 39, MANY | dict(n_group=1, topk_group=1, first_k_dense_replace=1, mlp_layer_types=["dense", "sparse"],
            indexer_types=["full", "shared"], rms_norm_eps=1e-5), (1, 131)),
    "parity/tf5/gemma4_text_ple": add_gradients,
    "parity/tf5/bailing_moe": lambda d: write_renamed(
        d, "granitemoeshared", 34, BAILING | dict(intermediate_size=12, shared_intermediate_size=24, num_local_experts=6,
            embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0, attention_multiplier=4 ** -0.5), bailing,
        BAILING | dict(model_type="bailing_moe", architectures=["BailingMoeForCausalLM"], head_dim=None, num_experts=6,
            num_shared_experts=2, intermediate_size=28, moe_intermediate_size=12, norm_topk_prob=True, first_k_dense_replace=0,
            rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, use_bias=False, use_qkv_bias=False, norm_head=False,
            norm_softmax=False, multi_gate=False, hidden_act="silu", torch_dtype="float32")),
    "parity/tf5/bailing_moe_v2": lambda d: write_renamed(
        d, "glm4_moe", 35, BAILING | V2 | dict(num_hidden_layers=3, intermediate_size=28, n_routed_experts=6, n_shared_experts=1,
            rms_norm_eps=1e-6, use_qk_norm=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)), bailing,
        BAILING | V2 | dict(num_hidden_layers=3, model_type="bailing_moe_v2", architectures=["BailingMoeV2ForCausalLM"], num_experts=6,
            num_shared_experts=1, intermediate_size=28, rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
            partial_rotary_factor=0.5, use_bias=False, use_qkv_bias=False, use_qk_norm=True, use_rmsnorm=True, hidden_act="silu",
            moe_router_enable_expert_bias=True, moe_shared_expert_intermediate_size=12, score_function="sigmoid",
            scoring_func="sigmoid", topk_method="noaux_tc", router_dtype="fp32", num_nextn_predict_layers=0, torch_dtype="float32")),
    "unrun/qwen3_5_moe_text": lambda d: write(d, "qwen3_5_moe_text", 30, QWEN35, run=False),
    "unrun/qwen3_5_moe": lambda d: write(d, "qwen3_5_moe", 31, dict(text_config=QWEN35, vision_config=VISION), run=False),
}


ADAPTED = Path(__file__).parents[2] / "crates/moe-checkpoint/tests/fixtures/parity/tf5"


def write_adapter(directory, seed, config, base_name="qwen2_moe"):
    """An adapter after five steps of AdamW, and the logits of the model with it and with it merged, where peft can merge it. One that
    began as a part of the weights is also kept as it began (`initial`), and converted to a plain one (`converted`)."""
    import peft

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(ADAPTED / base_name, dtype=torch.float32).eval()
    ids = torch.randint(3, base.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(seed))
    config = peft.LoraConfig(lora_alpha=8, r=4, task_type="CAUSAL_LM", **config)
    model = peft.get_peft_model(base, config)
    model.router_aux_loss_coef = base.router_aux_loss_coef = 0.0
    model.peft_config["default"].base_model_name_or_path = base_name
    residual = isinstance(config.init_lora_weights, str) and config.init_lora_weights in ("pissa", "olora")
    if residual:
        init, config.init_lora_weights = config.init_lora_weights, True
        model.save_pretrained(directory / "initial")
        config.init_lora_weights = init
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    out = {"input_ids": ids, "logits": model(input_ids=ids).logits.detach()}
    model.save_pretrained(directory)
    if residual:
        model.save_pretrained(directory / "converted", path_initial_model_for_weight_conversion=str(directory / "initial"))
    try:
        out["merged_logits"] = model.merge_and_unload()(input_ids=ids).logits.detach()
    except ValueError:
        pass
    for name in [directory / "README.md", directory / "initial/README.md", directory / "converted/README.md"]:
        name.unlink(missing_ok=True)
    save_file({name: value.contiguous() for name, value in out.items()}, directory / "expected.safetensors")
    made = dict(peft=peft.__version__, torch=torch.__version__, transformers=transformers.__version__, seed=seed, base=base_name)
    (directory / "made_with.json").write_text(json.dumps(made, sort_keys=True) + "\n")


ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {
    "lora_head_embeddings": lambda d: write_adapter(d, 41, dict(target_modules=ATTENTION + ["lm_head", "embed_tokens"])),
    "lora_modules_to_save": lambda d: write_adapter(
        d, 42, dict(target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens", "input_layernorm"])),
    "lora_bias": lambda d: write_adapter(d, 43, dict(target_modules=ATTENTION, lora_bias=True)),
    "lora_trained_biases": lambda d: write_adapter(d, 44, dict(target_modules=ATTENTION, bias="all")),
    "lora_token_rows": lambda d: write_adapter(d, 45, dict(target_modules=ATTENTION, trainable_token_indices=[5, 17, 42])),
    "lora_pissa": lambda d: write_adapter(d, 46, dict(target_modules=ATTENTION, init_lora_weights="pissa")),
    "lora_olora": lambda d: write_adapter(d, 47, dict(target_modules=ATTENTION, init_lora_weights="olora")),
    "lora_patterns": lambda d: write_adapter(
        d, 48, dict(target_modules=ATTENTION + ["o_proj"], use_rslora=True, rank_pattern={"layers.1.self_attn.v_proj": 2},
            alpha_pattern={"o_proj": 3})),
    "lora_gateless": lambda d: write_adapter(
        d, 49, dict(target_modules=ATTENTION + ["up_proj", "down_proj"],
            target_parameters=["mixer.experts.up_proj", "mixer.experts.down_proj"]), "nemotron_h"),
}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1] == "--adapters":
        for name in sys.argv[3:] or ADAPTERS:
            ADAPTERS[name](Path(sys.argv[2]) / name)
            print(name)
        sys.exit()
    for name in sys.argv[2:] or FIXTURES:
        FIXTURES[name](Path(sys.argv[1]) / name)
        print(name)
