//! Models of unusual sizes, made here: many experts and one, as many per token as there are, tiny widths, thousands of
//! files, and a tensor of 4 GiB.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use moe_checkpoint::Checkpoint;
use serde_json::{Map, Value, json};

use crate::support::{ok, text, words};

/// A Mixtral of random weights.
struct Model {
    experts: usize,
    top_k: usize,
    layers: usize,
    vocabulary: usize,
    /// Files that the tensors are spread over.
    files: usize,
    /// Whether the embedding and the head are holes in the file: zeros that take no room.
    hollow: bool,
}

const HIDDEN: usize = 8;
const WIDTH: usize = 8;
const SMALL: Model = Model { experts: 4, top_k: 2, layers: 2, vocabulary: 64, files: 1, hollow: false };

impl Model {
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![self.vocabulary, HIDDEN])];
        tensors.push(("lm_head.weight".into(), vec![self.vocabulary, HIDDEN]));
        tensors.push(("model.norm.weight".into(), vec![HIDDEN]));
        for layer in 0..self.layers {
            let mut add = |name: String, shape: [usize; 2]| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.into()));
            };
            for part in ["q", "k", "v", "o"] {
                add(format!("self_attn.{part}_proj"), [HIDDEN, HIDDEN]);
            }
            add("block_sparse_moe.gate".into(), [self.experts, HIDDEN]);
            for expert in 0..self.experts {
                for (part, shape) in [("w1", [WIDTH, HIDDEN]), ("w2", [HIDDEN, WIDTH]), ("w3", [WIDTH, HIDDEN])] {
                    add(format!("block_sparse_moe.experts.{expert}.{part}"), shape);
                }
            }
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                tensors.push((format!("model.layers.{layer}.{norm}.weight"), vec![HIDDEN]));
            }
        }
        tensors
    }

    /// Writes it in bf16.
    fn write(&self, dir: &Path) -> PathBuf {
        fs::create_dir_all(dir).unwrap();
        let config = json!({
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": HIDDEN,
            "intermediate_size": WIDTH, "num_local_experts": self.experts, "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers, "vocab_size": self.vocabulary, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": HIDDEN, "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": false,
            "torch_dtype": "bfloat16", "eos_token_id": 0, "bos_token_id": null
        });
        fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let tensors = self.tensors();
        let (mut map, mut state) = (Map::new(), 7u64);
        for file in 0..self.files {
            let name = match self.files {
                1 => "model.safetensors".to_string(),
                files => format!("model-{:05}-of-{files:05}.safetensors", file + 1),
            };
            let own: Vec<_> = tensors.iter().skip(file).step_by(self.files).collect();
            let (mut header, mut end) = (Map::new(), 0);
            for (tensor, shape) in &own {
                let begin = end;
                end += 2 * shape.iter().product::<usize>();
                header.insert(tensor.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}));
                map.insert(tensor.clone(), json!(name));
            }
            let header = Value::Object(header).to_string();
            let mut out = std::io::BufWriter::new(File::create(dir.join(&name)).unwrap());
            out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
            out.write_all(header.as_bytes()).unwrap();
            for (tensor, shape) in own {
                let elements: usize = shape.iter().product();
                if self.hollow && shape[0] == self.vocabulary {
                    out.seek(SeekFrom::Current(2 * elements as i64)).unwrap();
                    continue;
                }
                for _ in 0..elements {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let noise = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
                    let value = if tensor.contains("norm") { 1.0 + 0.1 * noise } else { noise };
                    out.write_all(&((value.to_bits() >> 16) as u16).to_le_bytes()).unwrap();
                }
            }
            let mut out = out.into_inner().unwrap();
            let length = out.stream_position().unwrap();
            out.set_len(length).unwrap();
        }
        if self.files > 1 {
            let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
            fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
        dir.to_path_buf()
    }
}

/// Rows of tokens, for models without a tokenizer.
fn rows(dir: &Path) -> PathBuf {
    let path = dir.join("rows.jsonl");
    let row = |seed: usize| (0..24).map(|i| (i * i * 7 + i * 3 + seed * 11) % 60).collect::<Vec<_>>();
    let lines: String = (0..6).map(|seed| format!("{}\n", json!({"input_ids": row(seed)}))).collect();
    fs::write(&path, lines).unwrap();
    path
}

#[test]
fn many_experts_one_expert_and_as_many_per_token_as_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let data = rows(dir.path());
    for (experts, top_k) in [(512, 8), (512, 512), (1, 1), (3, 3)] {
        let at = |name: &str| dir.path().join(format!("{experts}-{top_k}-{name}"));
        let model = Model { experts, top_k, ..SMALL }.write(&at("model"));
        let with = |line: &str, out: &str| {
            let out = at(out);
            let line = format!("{line} --samples 4 --length 24 --wave-tokens 64");
            let files = ["--model", text(&model), "--data", text(&data), "--out", text(&out)];
            ok(&words(&line, &files));
            out
        };
        with("score --scorer fisher --scorer reap --scorer heapr", "scores");
        let pruned = Checkpoint::open(with("prune --scorer fisher --ratio 0.5 --form ragged", "units")).unwrap();
        assert_eq!(pruned.shape().units(), 2 * experts * WIDTH / 2, "{experts} of {top_k}");
        assert_eq!(pruned.shape().layers[0].num_experts(), experts);
        let whole = Checkpoint::open(&model).unwrap();
        assert_eq!((whole.shape().units(), whole.shape().top_k), (2 * experts * WIDTH, top_k));
        if experts == 1 {
            // Nothing can go whole.
            let kept = Checkpoint::open(with("prune --scorer reap --pruner expert --ratio 0.5", "experts")).unwrap();
            assert_eq!(kept.shape(), whole.shape());
            continue;
        }
        // Whole experts: as many as stay are what a token may have at most.
        let fewer = Checkpoint::open(with("prune --scorer reap --pruner expert --ratio 0.34", "experts")).unwrap();
        let left = fewer.shape().layers[0].num_experts();
        assert_eq!(left, experts - (0.34 * experts as f64) as usize);
        assert_eq!(fewer.config().routing.top_k, top_k.min(left));
        let merged = with("merge --recipe hc-smoe --ratio 0.34 --form stock --sample 64", "merged");
        assert_eq!(Checkpoint::open(merged).unwrap().shape().layers[0].num_experts(), left);
    }
}

#[test]
fn two_thousand_files_are_one_model_and_none_stays_open() {
    let dir = tempfile::tempdir().unwrap();
    let [one, many] =
        [1, 2000].map(|files| Model { experts: 512, files, ..SMALL }.write(&dir.path().join(files.to_string())));
    let spread = Checkpoint::open(&many).unwrap();
    assert_eq!(spread.shape(), Checkpoint::open(&one).unwrap().shape());
    let data = rows(dir.path());
    let out = dir.path().join("out");
    let arguments = ["--model", text(&many), "--data", text(&data), "--out", text(&out)];
    let line = "prune --scorer fisher --ratio 0.5 --form ragged --samples 4 --length 24";
    let arguments = words(line, &arguments);
    #[cfg(unix)]
    {
        let mut command = Command::new("sh");
        let script = "ulimit -n 128; exec \"$0\" \"$@\"";
        command.args(["-c", script, env!("CARGO_BIN_EXE_moe")]).args(&arguments).stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    #[cfg(not(unix))]
    ok(&arguments);
    let pruned = Checkpoint::open(&out).unwrap();
    assert_eq!(pruned.shape().units(), spread.shape().units() / 2);
    for layer in &pruned.shape().layers {
        for expert in (0..512).step_by(101) {
            let (new, old) = (pruned.expert(layer.layer, expert).unwrap(), spread.expert(layer.layer, expert).unwrap());
            // Every row that is left is one of the old ones.
            let row = |row: &[f32]| old.gate.chunks_exact(HIDDEN).any(|other| other == row);
            assert!(new.gate.chunks_exact(HIDDEN).all(row), "layer {}, expert {expert}", layer.layer);
        }
    }
}

#[cfg(unix)]
#[test]
fn a_tensor_of_four_gibibytes_is_read_where_it_ends() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    // 4 GiB each of an embedding and a head, which are holes: the most that a config may ask for.
    let vocabulary = 1 << 28;
    let large = Model { vocabulary, hollow: true, ..SMALL }.write(&dir.path().join("large"));
    let small = Model { hollow: true, ..SMALL }.write(&dir.path().join("small"));
    let file = large.join("model.safetensors");
    assert!(file.metadata().unwrap().len() > 2 * (1 << 32));
    let model = Checkpoint::open(&large).unwrap();
    let name = "model.embed_tokens.weight";
    let bytes = model.info(name).unwrap().bytes;
    assert_eq!(bytes, 1 << 32);
    let other = Checkpoint::open(&small).unwrap();
    for layer in 0..2 {
        for expert in 0..4 {
            assert_eq!(model.expert(layer, expert).unwrap(), other.expert(layer, expert).unwrap());
        }
    }
    // The last value of the embedding, past 4 GiB of its file.
    let written = File::options().read(true).write(true).open(&file).unwrap();
    let mut length = [0; 8];
    written.read_exact_at(&mut length, 0).unwrap();
    let begin = 8 + u64::from_le_bytes(length);
    let at = |tensor: &str| {
        let mut text = vec![0; u64::from_le_bytes(length) as usize];
        written.read_exact_at(&mut text, 8).unwrap();
        let header: Value = serde_json::from_slice(&text).unwrap();
        begin + header[tensor]["data_offsets"][1].as_u64().unwrap()
    };
    written.write_all_at(&[0x80, 0x3f], at(name) - 2).unwrap();
    let last = model.tensor_bytes(name, bytes as usize - 4..bytes as usize).unwrap().to_vec();
    assert_eq!(last, [0, 0, 0x80, 0x3f]);
    ok(&["inspect", text(&large)]);
}

/// Not with the feature, whose program joins the group: `cargo xtask mpi` shows that.
#[cfg(not(feature = "mpi"))]
#[test]
fn a_launcher_of_several_processes_is_an_error_where_they_would_not_know_of_each_other() {
    let launched = |size: &str, alone: bool| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_moe"));
        command.args(["inspect", moe_cli::TINY_MOE]).env("OMPI_COMM_WORLD_RANK", "2");
        command.env("OMPI_COMM_WORLD_SIZE", size);
        if alone {
            command.env("MOE_GROUP", "alone");
        }
        command.output().unwrap()
    };
    let refused = launched("4", false);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && refused.stdout.is_empty(), "{said}");
    assert!(said.contains("Open MPI started this as rank 2 of 4") && said.contains("--features mpi"), "{said}");
    assert!(launched("1", false).status.success() && launched("4", true).status.success());
}
