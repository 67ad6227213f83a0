//! The `fine_grained` program, end to end.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use clap::Parser;
use moe_benches::fine_grained::{Arguments, Factors, run};
use moe_checkpoint::{
    Checkpoint, Dtype, ModelDescription, ModelSource, Record, TensorInfo, TensorSpec, WriteOptions, write,
};
use moe_prune::{Export, PRUNE_METHOD, PruneRecord};

fn arguments(more: &[&str], out: &std::path::Path) -> Arguments {
    let out = out.display().to_string();
    let given = ["fine_grained", "--samples", "12", "--eval-rows", "2", "--length", "64", "--out", &out];
    Arguments::try_parse_from(given.iter().chain(more)).unwrap()
}

#[test]
fn the_export_closest_to_the_model_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let more = ["--pieces", "2,4", "--per-token", "0.5,1", "--factors", "0.1,whole", "--controls"];
    let report = run(&arguments(&more, &out)).unwrap();
    // Two plain exports, then two numbers of pieces, two factors and two numbers per token.
    assert_eq!(report.rows.len(), 2 + 8);
    let divergence = |row: usize| report.rows[row].divergence.unwrap_or(f64::INFINITY);
    assert!((0..report.rows.len()).all(|row| divergence(report.best) <= divergence(row)));
    let best = &report.rows[report.best];
    // A tenth of what experts gave is far from the model.
    assert_eq!((best.export, best.factors), (Export::FineGrained, Some(Factors::Whole)));
    assert!(report.rows.iter().all(|row| row.metrics.len() == 2));
    let written = Checkpoint::open(&out).unwrap();
    let pieces = best.pieces.unwrap();
    assert_eq!(written.shape().uniform_width(), Some(96 / pieces));
    assert_eq!(written.config().routing.top_k, best.top_k.unwrap());
    assert!(written.shape().layers.iter().all(|layer| layer.num_experts() == 16 * pieces / 2));
    let applied: PruneRecord = Record::load(&out).unwrap().recipe(PRUNE_METHOD).unwrap().unwrap();
    assert_eq!(applied.export, Export::FineGrained);
    // Nothing is left beside it.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    let text = report.to_string();
    assert!(text.contains("whole") && text.contains("arithmetic_exact"), "{text}");

    let again = run(&arguments(&more, &out)).unwrap_err().to_string();
    assert!(again.contains("exists"), "{again}");
    let other = directory.path().join("other");
    let bad = run(&arguments(&["--per-token", "0"], &other)).unwrap_err().to_string();
    assert!(bad.contains("--per-token"), "{bad}");
    let bad = run(&arguments(&["--pieces", "5"], &other)).unwrap_err().to_string();
    assert!(bad.contains("5 equal pieces"), "{bad}");
}

/// The bundled model with a tensor of multi-token prediction.
struct Predicting(Arc<Checkpoint>);

impl ModelSource for Predicting {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        match tensor.name.starts_with("mtp.") {
            true => Ok(Cow::Owned(vec![0; range.len()])),
            false => self.0.tensor_bytes(&tensor.name, range),
        }
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.0)
    }
}

#[test]
fn further_layers_need_a_choice_before_anything_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let (model, out) = (directory.path().join("model"), directory.path().join("out"));
    let base = Arc::new(Checkpoint::open(moe_cli::TINY_MOE).unwrap());
    let mut description = ModelDescription::of(&base);
    let spec = TensorSpec { name: "mtp.fc.weight".into(), dtype: Dtype::BF16, shape: vec![4, 4] };
    description.tensors.push(spec);
    let predicting = Checkpoint::from_source(description, Arc::new(Predicting(base))).unwrap();
    write(&predicting, &model, &WriteOptions::default()).unwrap();
    let path = model.display().to_string();
    let refused = |more: &[&str]| {
        let model = ["--model", &path, "--calibration", "none.jsonl", "--pieces", "2"];
        run(&arguments(&[&model, more].concat(), &out)).unwrap_err().to_string()
    };
    let text = refused(&[]);
    assert!(text.contains("1 tensors of multi-token prediction") && text.contains("choose whether"), "{text}");
    // With a choice, the next thing that is missing.
    assert!(refused(&["--mtp", "drop"]).contains("none.jsonl"));
    // A number of pieces per token that the ratio does not leave is known beforehand, too.
    let text = refused(&["--mtp", "drop", "--ratio", "0.95"]);
    assert!(text.contains("pieces of a layer, but"), "{text}");
}
