//! Models that methods make: sources over sources, and the one writer.

use crate::common;

use std::borrow::Cow;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use moe_checkpoint::{
    Checkpoint, Error, Existing, ExpertPart, ModelDescription, ModelSource, RECORD_FILE, RawMatrix, Record, Result,
    Step, TensorInfo, WriteOptions, sliced, write,
};
use serde_json::json;

/// Experts of a layer in another order, the rows of the router with them: the same model with other numbers for its
/// experts.
struct Permuted {
    base: Arc<Checkpoint>,
    order: Vec<usize>,
}

impl Permuted {
    fn on(base: &Arc<Checkpoint>, order: &[usize]) -> Arc<Checkpoint> {
        let source = Self { base: base.clone(), order: order.to_vec() };
        Arc::new(Checkpoint::from_source(ModelDescription::of(base), Arc::new(source)).unwrap())
    }
}

impl ModelSource for Permuted {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        if !tensor.name.ends_with("mlp.gate.weight") {
            return self.base.tensor_bytes(&tensor.name, range);
        }
        let rows = self.base.bytes(&tensor.name)?;
        let row = rows.len() / self.order.len();
        let moved = self.order.iter().flat_map(|expert| rows[expert * row..(expert + 1) * row].iter().copied());
        Ok(sliced(Cow::Owned(moved.collect()), range))
    }

    fn makes_experts(&self, _layer: usize) -> bool {
        true
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> Result<Option<RawMatrix<'_>>> {
        self.base.expert_part(layer, self.order[set], part)
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.base)
    }

    fn step(&self) -> Option<Step> {
        Some(Step::new("permute", &self.base, json!(self.order), "experts in another order"))
    }
}

fn open(dir: impl AsRef<Path>) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(dir).unwrap())
}

fn qwen() -> Arc<Checkpoint> {
    open(common::fixture("tf5/qwen2_moe"))
}

fn tensors(model: &Checkpoint) -> Vec<(String, Vec<u8>)> {
    model.tensors().map(|info| (info.name.clone(), model.bytes(&info.name).unwrap().into_owned())).collect()
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn a_model_is_written_as_it_reads_in_every_layout() {
    let dir = tempfile::tempdir().unwrap();
    for fixture in common::fixtures() {
        let base = open(&fixture);
        let name = fixture.display();
        let experts = base.shape().layers[0].num_experts();
        let order: Vec<usize> = (0..experts).rev().collect();
        for model in [base.clone(), base.dequantized().unwrap(), Permuted::on(&base.dequantized().unwrap(), &order)] {
            let out = dir.path().join("out");
            write(&model, &out, &WriteOptions { existing: Existing::Force, ..Default::default() }).unwrap();
            let written = Checkpoint::open(&out).unwrap();
            assert_eq!(tensors(&written), tensors(&model), "{name}");
            assert_eq!(written.raw_config(), model.raw_config(), "{name}");
            let layer = base.shape().layers[0].layer;
            for expert in 0..experts {
                assert_eq!(written.expert(layer, expert).unwrap(), model.expert(layer, expert).unwrap(), "{name}");
            }
        }
    }
}

#[test]
fn sources_stack_and_the_record_tells_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let base = qwen();
    let count = base.shape().layers[0].num_experts();
    let rotated: Vec<usize> = (0..count).map(|expert| (expert + 1) % count).collect();
    let back: Vec<usize> = (0..count).map(|expert| (expert + count - 1) % count).collect();
    let once = Permuted::on(&base, &rotated);
    let twice = Permuted::on(&once, &back);
    assert_eq!(tensors(&twice), tensors(&base));
    assert_ne!(tensors(&once), tensors(&base));
    assert_ne!(twice.fingerprint(), base.fingerprint());

    let out = dir.path().join("twice");
    let measured = [("perplexity".to_string(), "12.5".to_string())];
    write(&twice, &out, &WriteOptions { measured: &measured, ..Default::default() }).unwrap();
    let record = Record::load(&out).unwrap();
    assert_eq!(record.steps.iter().map(|step| step.method.as_str()).collect::<Vec<_>>(), ["permute", "permute"]);
    assert_eq!(record.steps[0].base, base.fingerprint());
    assert_eq!(record.steps[1].base, record.steps[0].digest);
    assert_eq!(record.recipe::<Vec<usize>>("permute").unwrap(), Some(back.clone()));
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("experts in another order") && card.contains("| perplexity | 12.5 |"), "{card}");

    // What was written is the model that was named, and goes on from there.
    let written = Arc::new(Checkpoint::open(&out).unwrap());
    assert!(written.is_model(&twice.fingerprint()) && !written.is_model(&once.fingerprint()));
    let on = dir.path().join("on");
    write(&Permuted::on(&written, &rotated), &on, &WriteOptions::default()).unwrap();
    assert_eq!(Record::load(&on).unwrap().steps.len(), 3);
    // The plain copy of a released model has neither record nor card.
    let copy = dir.path().join("copy");
    write(&base, &copy, &WriteOptions::default()).unwrap();
    assert!(!copy.join(RECORD_FILE).exists());
    assert_eq!(fs::read(copy.join("config.json")).unwrap(), fs::read(base.dir().join("config.json")).unwrap());
}

#[test]
fn an_interrupted_write_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let base = qwen();
    let count = base.shape().layers[0].num_experts();
    let model = Permuted::on(&base, &(0..count).rev().collect::<Vec<_>>());
    let options = WriteOptions { max_shard_bytes: 20_000, ..Default::default() };
    let whole = dir.path().join("whole");
    write(&model, &whole, &options).unwrap();
    for stop in [0.0, 0.3, 0.6, 0.95] {
        let out = dir.path().join(format!("stopped-{stop}"));
        let progress =
            |progress: &moe_checkpoint::Progress<'_>| match progress.done as f64 > stop * progress.total as f64 {
                true => Err("enough".into()),
                false => Ok(()),
            };
        let stopped = write(&model, &out, &WriteOptions { progress: Some(&progress), ..options });
        assert!(matches!(stopped, Err(Error::Interrupted(_))));
        assert!(!out.exists());
        let again = write(&model, &out, &options);
        assert!(matches!(again, Err(Error::OutputUnfinished { .. })), "{again:?}");
        let other = write(&base, &out, &WriteOptions { existing: Existing::Resume, ..options });
        assert!(matches!(other, Err(Error::ResumeMismatch { .. })), "{other:?}");
        write(&model, &out, &WriteOptions { existing: Existing::Resume, ..options }).unwrap();
        assert_eq!(files(&out), files(&whole));
    }
}

#[test]
fn what_cannot_be_written_is_said_before_anything_is() {
    let dir = tempfile::tempdir().unwrap();
    let base = qwen();
    let itself = write(&base, base.dir(), &WriteOptions { existing: Existing::Force, ..Default::default() });
    assert!(matches!(itself, Err(Error::OutputIsInput { .. })), "{itself:?}");
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    assert!(matches!(write(&base, &out, &WriteOptions::default()), Err(Error::OutputExists { .. })));

    let mut description = ModelDescription::of(&base);
    let router = description.tensors.iter_mut().find(|spec| spec.name.ends_with("mlp.gate.weight")).unwrap();
    router.shape[0] += 1;
    let source = Permuted { base: base.clone(), order: vec![] };
    let wrong = Checkpoint::from_source(description, Arc::new(source)).unwrap_err();
    assert!(matches!(wrong, Error::UnexpectedShape { .. }), "{wrong}");
}
