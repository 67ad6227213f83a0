"""Writes tokens.json: ids, special tokens and decoded text of AutoTokenizer for the ways in which checkpoints declare tokens.

Usage: python make_tokens.py TOKENIZER_JSON, with the bundled tokenizer.json."""
import json, os, shutil, sys, tempfile

import transformers
from transformers import AutoTokenizer
src=sys.argv[1]
T="Hello <|im_end|> world<|im_start|>  <|pad|>x<img> Σ"
def tok(content, **k): return dict({"content":content,"special":True,"normalized":False,"lstrip":False,"rstrip":False,"single_word":False},**k)
CASES={
 "special_map_only":{"special_tokens_map.json":{"eos_token":{"content":"!","lstrip":False},"bos_token":"\""}, "tokenizer_config.json":{}},
 "map_and_config":{"special_tokens_map.json":{"eos_token":{"content":"!","lstrip":False,"normalized":False,"rstrip":False,"single_word":False},"bos_token":"\""}, "tokenizer_config.json":{"eos_token":"<|endoftext|>"}},
 "map_and_config_with_decoder":{"special_tokens_map.json":{"eos_token":"!"}, "tokenizer_config.json":{"eos_token":"<|endoftext|>","added_tokens_decoder":{"0":tok("<|endoftext|>")}}},
 "decoder":{"tokenizer_config.json":{"eos_token":"<|im_end|>","pad_token":"<|endoftext|>","added_tokens_decoder":{"0":tok("<|endoftext|>"),"2048":tok("<|im_end|>"),"2049":tok("<|im_start|>")}}},
 "decoder_wrong_ids":{"tokenizer_config.json":{"added_tokens_decoder":{"2060":tok("<|im_end|>"),"2055":tok("<|im_start|>")}}},
 "decoder_strip":{"tokenizer_config.json":{"added_tokens_decoder":{"2048":tok("<|im_end|>",lstrip=True,rstrip=True),"2049":tok("<|im_start|>",special=False,normalized=True)}}},
 "extra_list":{"tokenizer_config.json":{"extra_special_tokens":["<|im_end|>","<|im_start|>"]}},
 "extra_list_objects":{"tokenizer_config.json":{"extra_special_tokens":[dict(tok("<|im_end|>",lstrip=True),__type="AddedToken"),"<|im_start|>"]}},
 "extra_dict":{"tokenizer_config.json":{"extra_special_tokens":{"image_token":"<img>","boi_token":"<|im_start|>"}}},
 "extra_and_pad":{"tokenizer_config.json":{"extra_special_tokens":["<|im_end|>"],"pad_token":"<|pad|>","bos_token":"<|im_start|>"}},
 "additional":{"tokenizer_config.json":{"additional_special_tokens":["<|im_end|>","<|im_start|>"]}},
 "additional_and_extra":{"tokenizer_config.json":{"additional_special_tokens":["<|im_end|>"],"extra_special_tokens":["<|im_start|>"]}},
 "additional_in_map":{"tokenizer_config.json":{},"special_tokens_map.json":{"additional_special_tokens":["<|im_end|>","<|im_start|>"],"eos_token":"<|im_end|>"}},
 "added_json":{"tokenizer_config.json":{"eos_token":"<|im_end|>"},"added_tokens.json":{"<|im_end|>":2048,"<|im_start|>":2049}},
 "added_json_special":{"tokenizer_config.json":{"eos_token":"<|im_end|>","additional_special_tokens":["<|im_start|>"]},"added_tokens.json":{"<|im_end|>":2048,"<|im_start|>":2049,"<img>":2050}},
 "model_token":{"tokenizer_config.json":{"image_token":"<img>","audio_token":None,"eos_token":"<|endoftext|>"}},
 "existing_word":{"tokenizer_config.json":{"extra_special_tokens":["world"]}},
 "existing_word_decoder":{"tokenizer_config.json":{"added_tokens_decoder":{"752":tok("world")}}},
 "object_token":{"tokenizer_config.json":{"pad_token":{"__type":"AddedToken","content":"<|im_end|>","lstrip":True,"normalized":True,"rstrip":False,"single_word":False}}},
 "add_bos":{"tokenizer_config.json":{"bos_token":"<|endoftext|>","add_bos_token":True,"eos_token":"<|endoftext|>","add_eos_token":True}},
 "split_special":{"tokenizer_config.json":{"split_special_tokens":True,"eos_token":"<|endoftext|>","extra_special_tokens":["<|im_end|>"]}},
}
out=[]
for name,files in CASES.items():
    d=tempfile.mkdtemp(); shutil.copy(src,d)
    for f,c in files.items(): json.dump(c,open(os.path.join(d,f),"w"))
    json.dump({"model_type":"qwen3_moe"},open(os.path.join(d,"config.json"),"w"))
    cfg=files["tokenizer_config.json"]; cfg=dict(cfg,tokenizer_class="TokenizersBackend")
    json.dump(cfg,open(os.path.join(d,"tokenizer_config.json"),"w"))
    files=dict(files,**{"tokenizer_config.json":cfg})
    try:
        t=AutoTokenizer.from_pretrained(d)
        ids=t(T)["input_ids"]; r={"ids":ids,"eos":t.eos_token_id,"bos":t.bos_token_id,"pad":t.pad_token_id,"names":t.special_tokens_map,"decoded":t.decode(ids,skip_special_tokens=True)}
    except Exception as e: r={"error":f"{type(e).__name__}: {e}"[:200]}
    out.append(dict(name=name,files=files,**r))
rows = ",\n".join(json.dumps(case) for case in out)
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokens.json"), "w") as file:
    file.write('{"transformers": %s, "text": %s, "cases": [\n%s\n]}\n' % (json.dumps(transformers.__version__), json.dumps(T), rows))
