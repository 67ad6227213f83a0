"""SmolLM2-135M-Instruct as a dense Hugging Face directory, and rows of text to train and measure it on.

    smollm.py dense GGUF OUT           the weights of a GGUF file of architecture `llama` in bf16, tokenizer, chat template
    smollm.py rows OUT ITEMS           OUT/{train,prose_test,cloze_test}.jsonl of the documentation of this Python
    smollm.py skills DIR               DIR/skills/{sums,facts,prose}{,_test}.jsonl: sums and facts as items, and DIR/rows
    smollm.py tiny OUT                 a small random GGUF of the same architecture, to try everything
    smollm.py check-dense GGUF DENSE   logits and token ids against those of transformers, which reads the GGUF itself
    smollm.py check-moe DENSE MOE..    logits of Mixtures of Experts against those of the dense model, in transformers

`dense` and `tiny` need numpy and the package gguf, `rows` and `skills` the standard library alone, the checks torch and transformers.
"""

import ast
import hashlib
import json
import random
import re
import sys
import sysconfig
from pathlib import Path

# What llama.cpp calls the tensors of a layer.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}


def stock_name(name):
    if name in WHOLE:
        return WHOLE[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not found or found[2] not in LAYER:
        sys.exit(f"{name}: no tensor of a `llama` without biases")
    return f"model.layers.{found[1]}.{LAYER[found[2]]}.weight"


def unrotated(matrix, heads):
    """llama.cpp turns neighboring rows of a head together, transformers the two halves."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def bf16(values):
    """Rounded to nearest, ties to even, as bytes."""
    import numpy

    bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, data in tensors.values():
            file.write(data)


def tokenizer(field):
    pre = field("tokenizer.ggml.pre")
    if field("tokenizer.ggml.model") != "gpt2" or pre != "smollm":
        sys.exit(f"tokenizer `{pre}`: expected that of SmolLM, byte-level BPE with single digits")
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dict(id=i, content=token, **flags) for i, token in enumerate(tokens) if kinds[i] == 3],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": field("tokenizer.ggml.merges"),
        },
    }


def dense(gguf_file, out):
    import gguf

    reader = gguf.GGUFReader(gguf_file)

    def field(name, default=None):
        if name not in reader.fields and default is None:
            sys.exit(f"{gguf_file}: no field {name}")
        return reader.fields[name].contents() if name in reader.fields else default

    if field("general.architecture") != "llama":
        sys.exit(f"{gguf_file}: architecture `{field('general.architecture')}`, expected `llama`")
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            values = unrotated(values, heads)
        if tensor.name.endswith("attn_k.weight"):
            values = unrotated(values, kv_heads)
        tensors[stock_name(tensor.name)] = (values.shape, bf16(values))
    hidden, tokens = field("llama.embedding_length"), field("tokenizer.ggml.tokens")
    ids = {name: field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    special = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": field("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field("llama.rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "bfloat16",
        **special,
    }
    out.mkdir(parents=True, exist_ok=True)
    dump = lambda name, value: (out / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    dump("config.json", config)
    dump("generation_config.json", special)
    dump("tokenizer.json", tokenizer(field))
    dump(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[ids["bos"]],
            "eos_token": tokens[ids["eos"]],
            "pad_token": tokens[ids["padding"]],
            "add_prefix_space": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": field("tokenizer.chat_template"),
        },
    )
    name, license = field("general.name", "a model"), field("general.license", "")
    card = f"---\nlicense: {license}\n---\n\n" if license else ""
    (out / "README.md").write_text(f"{card}{name}, from {Path(gguf_file).name}, dequantized to bf16.\n")
    write_safetensors(out / "model.safetensors", tensors)
    print(f"{out}: {config['num_hidden_layers']} layers of {hidden}, {len(tensors)} tensors")


def documents():
    """The language reference as pydoc shows it, and the docstrings of the standard library: (name, text)."""
    from pydoc_data.topics import topics

    yield from ((f"topic {name}", text) for name, text in sorted(topics.items()))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if re.search(r"(^|/)(site-packages|dist-packages|test|tests|idlelib|lib2to3|pydoc_data|turtledemo)/", name):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        of = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, of)]
        text = "\n\n".join(text for text in texts if text and len(text) > 40)
        if text:
            yield f"module {name}", text


def pieces(text, size=900):
    """Paragraphs, joined to pieces of about so many characters."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = re.sub(r"[*=\-~^\"]{4,}\n?", "", paragraph).rstrip()
        if piece and len(piece) + len(paragraph) > size:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece:
        yield piece


def cloze(prose, count, draw):
    """The last word of a passage among four, the others as frequent ones of the same length that it does not have."""
    word = re.compile(r"[a-z]{5,10}")
    common = {}
    for text in prose:
        for found in word.findall(text):
            common[found] = common.get(found, 0) + 1
    by_length = {}
    for found in sorted(common):
        if common[found] >= 3:
            by_length.setdefault(len(found), []).append(found)
    items = []
    for text in prose:
        words = text.split()
        for end in range(30, len(words), 12):
            answer = words[end].strip(".,;:()")
            passage = " ".join(words[max(0, end - 60) : end])
            others = [other for other in by_length.get(len(answer), []) if other != answer and other not in passage]
            if word.fullmatch(answer) and common[answer] >= 3 and passage[-1].isalpha() and len(others) >= 3:
                choices = [answer, *draw.sample(others, 3)]
                draw.shuffle(choices)
                items.append({"prompt": passage, "choices": [f" {c}" for c in choices], "answer": choices.index(answer)})
    draw.shuffle(items)
    return items[:count]


def rows(out, count):
    draw = random.Random(0)
    train, held = [], []
    for name, text in documents():
        part = held if hashlib.sha256(name.encode()).digest()[0] < 26 else train
        part.extend(piece for piece in pieces(text) if len(piece) >= 200)
    draw.shuffle(train)
    draw.shuffle(held)
    items = cloze(held, count, draw)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "train": [{"text": text} for text in train],
        "prose_test": [{"text": text} for text in held],
        "cloze_test": items,
    }
    for name, lines in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{out / name}.jsonl: {len(lines)} rows")
    version = ".".join(map(str, sys.version_info[:3]))
    license = f"Text of the documentation and docstrings of Python {version}, PSF License Agreement (PSF-2.0).\n"
    (out / "LICENSE.txt").write_text(license + "https://docs.python.org/3/license.html\n")


# What is known of countries, and of other things: a prompt with a place for the thing, and the answers by thing.
CAPITALS = """France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, China Beijing, Russia Moscow, Egypt Cairo,
Greece Athens, Portugal Lisbon, Ireland Dublin, Poland Warsaw, Austria Vienna, Hungary Budapest, Norway Oslo, Sweden Stockholm,
Finland Helsinki, Denmark Copenhagen, Belgium Brussels, Turkey Ankara, Iran Tehran, Iraq Baghdad, Cuba Havana, Peru Lima,
Chile Santiago, Canada Ottawa, Kenya Nairobi, Thailand Bangkok, Vietnam Hanoi, Australia Canberra, India Delhi, Syria Damascus,
Lebanon Beirut, Ukraine Kiev, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Croatia Zagreb, Nepal Kathmandu,
Afghanistan Kabul, Pakistan Islamabad, Colombia Bogota, Venezuela Caracas, Indonesia Jakarta, Philippines Manila,
Switzerland Bern, Iceland Reykjavik, Libya Tripoli, Tunisia Tunis, Ethiopia Addis"""
OPPOSITES = """hot cold, big small, up down, left right, day night, black white, fast slow, high low, old young, rich poor, hard soft,
light dark, early late, happy sad, open closed, wet dry, strong weak, true false, first last, win lose, buy sell, love hate,
north south, east west, inside outside, full empty, good bad, long short, male female, war peace"""
KINDS = """dog animal, rose flower, oak tree, salmon fish, eagle bird, hammer tool, piano instrument, apple fruit, carrot vegetable,
iron metal, car vehicle, ant insect, red color, gold metal, cat animal, tulip flower, pine tree, trout fish, sparrow bird,
saw tool, violin instrument, banana fruit, potato vegetable, copper metal, truck vehicle, bee insect, blue color, shirt garment,
chair furniture, Mars planet, Monday day, July month, triangle shape, soccer sport, chess game"""


def skills(directory):
    """Items with four choices, and as many rows with the right one as completion, none of which is in both files."""
    draw = random.Random(0)
    out = directory / "skills"
    out.mkdir(parents=True, exist_ok=True)
    pairs = lambda text: [tuple(pair.split()) for pair in text.replace("\n", " ").split(",")]
    facts = []
    for prompt, text in (
        ("The capital of {} is", CAPITALS),
        ("The opposite of {} is", OPPOSITES),
        ("One word says what kind of thing it is. {}:", KINDS),
    ):
        answers = sorted({answer for _, answer in pairs(text)})
        for thing, answer in pairs(text):
            facts.append((prompt.format(thing), answer, draw.sample([a for a in answers if a != answer], 3)))
    sums = []
    for a in range(1, 13):
        for b in range(1, 13):
            others = [n for n in range(max(2, a + b - 6), a + b + 7) if n != a + b]
            sums.append((f"{a} + {b} =", str(a + b), [str(n) for n in draw.sample(others, 3)]))
    for name, items in (("sums", sums), ("facts", facts)):
        draw.shuffle(items)
        held, train = items[: len(items) // 2], items[len(items) // 2 :]
        lines = [{"prompt": prompt, "completion": f" {answer}\n"} for prompt, answer, _ in train]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = []
        for prompt, answer, others in held:
            choices = [answer, *others]
            draw.shuffle(choices)
            choices_of = {"choices": [f" {choice}" for choice in choices], "answer": choices.index(answer)}
            lines.append({"prompt": prompt, **choices_of})
        (out / f"{name}_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{out / name}: {len(train)} rows, {len(held)} items")
    for source, name in (("train", "prose"), ("prose_test", "prose_test")):
        (out / f"{name}.jsonl").write_text((directory / f"rows/{source}.jsonl").read_text())


def byte_letters():
    """The letters that byte-level tokenizers write bytes as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def tiny(out):
    import gguf
    import numpy

    hidden, width, layers, heads, kv_heads, head = 64, 128, 2, 4, 2, 16
    draw = numpy.random.default_rng(0)
    letters = byte_letters()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(letters[byte] for byte in sorted(letters))]
    merges = ["t h", "th e", "i n"]
    tokens += [merge.replace(" ", "") for merge in merges]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name("Tiny random llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}")
    sizes = {
        "attn_q": (heads * head, hidden),
        "attn_k": (kv_heads * head, hidden),
        "attn_v": (kv_heads * head, hidden),
        "attn_output": (hidden, heads * head),
        "ffn_gate": (width, hidden),
        "ffn_up": (width, hidden),
        "ffn_down": (hidden, width),
    }

    def add(name, shape, kind):
        values = draw.normal(0, 0.2, shape).astype(numpy.float32)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    ones = lambda name: writer.add_tensor(name, (1 + draw.normal(0, 0.1, hidden)).astype(numpy.float32))
    add("token_embd.weight", (len(tokens), hidden), gguf.GGMLQuantizationType.Q8_0)
    ones("output_norm.weight")
    for layer in range(layers):
        ones(f"blk.{layer}.attn_norm.weight")
        ones(f"blk.{layer}.ffn_norm.weight")
        for name, shape in sizes.items():
            add(f"blk.{layer}.{name}.weight", shape, gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{out}: {layers} layers of {hidden}, {len(tokens)} tokens")


TEXT = "In 2024, the statement's expression-list isn't evaluated 3 times:\n    yield from (x for x in range(17))  # naïve"


def logits_of(model, ids):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def loaded(directory, **options):
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            sys.exit(f"{directory}: {key}: {sorted(info[key])}")
    return model


def check_dense(gguf_file, directory):
    import torch
    from transformers import AutoTokenizer

    ours, theirs = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    ids = ours(TEXT)["input_ids"]
    if ids != theirs(TEXT)["input_ids"]:
        sys.exit(f"{directory}: token ids {ids}, expected {theirs(TEXT)['input_ids']}")
    if ours.decode(ids) != TEXT:
        sys.exit(f"{directory}: decodes to {ours.decode(ids)!r}, expected {TEXT!r}")
    talk = [{"role": "user", "content": "Hello"}]
    if ours.apply_chat_template(talk, tokenize=False) != theirs.apply_chat_template(talk, tokenize=False):
        sys.exit(f"{directory}: another chat template")
    theirs = loaded(gguf_file.parent, gguf_file=gguf_file.name)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    difference = (logits_of(loaded(directory), ids) - logits_of(theirs, ids)).abs().max().item()
    print(f"{directory}: {len(ids)} token ids as in the GGUF file, largest difference of logits {difference:.2e}")
    if difference > 1e-4:
        sys.exit(1)


def check_moe(directory, made):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    expected = logits_of(loaded(directory), ids)
    for moe in made:
        model = loaded(moe)
        difference = (logits_of(model, ids) - expected).abs().max().item()
        print(f"{moe}: {type(model).__name__}, largest difference of logits {difference:.2e}, of {expected.abs().max():.1f}")


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:] or ["help"]
    paths = [Path(argument) for argument in arguments]
    if verb == "dense" and len(paths) == 2:
        dense(*paths)
    elif verb == "rows" and len(paths) == 2:
        rows(paths[0], int(arguments[1]))
    elif verb == "skills" and len(paths) == 1:
        skills(*paths)
    elif verb == "tiny" and len(paths) == 1:
        tiny(*paths)
    elif verb == "check-dense" and len(paths) == 2:
        check_dense(*paths)
    elif verb == "check-moe" and len(paths) >= 2:
        check_moe(paths[0], paths[1:])
    else:
        sys.exit(__doc__)
