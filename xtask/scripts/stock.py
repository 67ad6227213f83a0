"""Stock programs that load, run and convert checkpoints, for the scripts beside this one.

What an engine needs is imported where it is needed: the engines have environments of their own. Called as `stock.py convert LLAMA_CPP DIR OUT TYPE`,
it is llama.cpp's converter (LLAMA_CPP is the folder with convert_hf_to_gguf.py and gguf-py).
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/assets/tiny-moe"
# Largest difference of logits (of log-probabilities in vLLM and llama.cpp) that is no more than that of arithmetic: float32 on both sides, but for
# vLLM in BF16, and for llama.cpp's converter, which does not round what it dequantizes to BF16.
TOLERANCE = {"transformers": 1e-4, "llama.cpp": 1e-4, "llama.cpp, dequantized": 0.03, "vllm, float32": 1e-4, "vllm": 0.15}


def run(command):
    """The output of a command; an error is the last line of what it says about it."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        errors = [line for line in lines if "Error" in line or line.startswith("error")]
        raise RuntimeError((errors or lines or [f"exit status {done.returncode}"])[-1][-300:])
    return done.stdout


def ours(moe, directory, ids, scratch):
    """Our logits [S, V] of one text."""
    import torch
    from safetensors.torch import load_file, save_file

    save_file({"input_ids": torch.tensor([ids])}, scratch / "tokens.safetensors")
    run([moe, "trace", "--model", directory, "--tokens", scratch / "tokens.safetensors", "--out", scratch / "trace.safetensors"])
    return load_file(scratch / "trace.safetensors")["logits"][0]


def transformers_model(directory):
    """The model in float32, of dequantized weights if they are quantized. Every tensor must have its place."""
    import torch
    import transformers

    entry = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    options = {}
    if entry.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    elif entry.get("quant_method") == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager", **options
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind]))[:2] for kind in kinds if info.get(kind)}
    if wrong:
        raise ValueError(str(wrong))
    return model.float().eval()


def vllm_model(directory, **options):
    """An engine of vLLM, which cannot be taken down: for a process of its own."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM

    return LLM(model=str(directory), enforce_eager=True, max_num_seqs=2, disable_log_stats=True, **options)


def gguf(llama, directory, out, kind):
    """Converts a checkpoint, in a process of its own: the converter is a program."""
    run([sys.executable, __file__, "convert", llama, directory, out, kind])


def convert(llama, directory, out, kind):
    """The converter takes a BPE tokenizer for the one whose ids for a certain text are the same, of those of released models that it has
    hashes of. One of 2,048 tokens has the ids of none, and of Qwen2-MoE the converter reads no other kind of tokenizer. What it looks for is
    how text is split before BPE: single digits, then as GPT-2 does. llama.cpp calls that `smollm`, for the model it was first met in."""
    sys.path[:0] = [str(llama), str(llama / "gguf-py")]
    from conversion.base import TextModel

    by_hash = TextModel.get_vocab_base_pre

    def name(self, tokenizer):
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            splits = json.loads((directory / "tokenizer.json").read_text())["pre_tokenizer"].get("pretokenizers", [])
            digits, levels = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
            if len(splits) == 2 and digits.items() <= splits[0].items() and levels.items() <= splits[1].items():
                return "smollm"
            raise

    TextModel.get_vocab_base_pre = name
    sys.argv = ["convert_hf_to_gguf.py", str(directory), "--outfile", str(out), "--outtype", kind]
    runpy.run_path(str(llama / "convert_hf_to_gguf.py"), run_name="__main__")


def tensors(directory):
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def same_tensors(llama, directory, file):
    """How many tensors a GGUF file in F32 has. Each must be that of the checkpoint, to the bit, experts one above the other, and none may be
    missing."""
    sys.path[:0] = [str(llama / "gguf-py")]
    import numpy as np
    import torch
    from gguf import GGUFReader, MODEL_ARCH, get_tensor_name_map

    own, reader = tensors(directory), GGUFReader(file)
    layers = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("model.layers."))
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    names = get_tensor_name_map(next(a for a in MODEL_ARCH if a.name.lower().replace("_", "") == arch.replace("_", "")), layers)
    expected = {}
    for name, tensor in own.items():
        parts = name.split(".")
        if "experts" in parts:
            at = parts.index("experts")
            stacked = ".".join(parts[: at + 1] + parts[at + 2 :])
            expected.setdefault(names.get_name(stacked, (".weight",)), {})[int(parts[at + 1])] = tensor
        else:
            expected[names.get_name(name, (".weight", ".bias"))] = tensor
    for tensor in reader.tensors:
        want = expected.pop(tensor.name)
        if isinstance(want, dict):
            want = torch.stack([want[expert] for expert in sorted(want)])
        if tensor.tensor_type.name != "F32" or not np.array_equal(np.asarray(tensor.data).reshape(-1), want.float().numpy().reshape(-1)):
            raise ValueError(f"{tensor.name} is another tensor")
    if expected:
        raise ValueError(f"the GGUF file lacks {sorted(expected)[:3]}")
    return len(reader.tensors)


if __name__ == "__main__":
    if len(sys.argv) != 6 or sys.argv[1] != "convert":
        sys.exit(__doc__)
    convert(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
