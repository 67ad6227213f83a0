//! Merges by the ranks of a group: the files of one process for any number of them.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use burn::tensor::Device;
use moe::jobs::Merging;
use moe::progress::Progress;
use moe_checkpoint::ProtectionMask;
use moe_checkpoint::group::{Alone, Group, Threads};
use moe_core::Model;
use moe_core::data::{Sequence, Wave, WaveOptions, waves};
use moe_merge::{OutputForm, Recipe};

fn merging<'a>(
    model: &'a Model,
    waves: &'a [Wave],
    recipe: &'a Recipe,
    protect: &'a ProtectionMask,
    group: &'a dyn Group,
) -> Merging<'a> {
    let (form, mtp, sample, at_once) = (OutputForm::Grouped, None, 16, false);
    Merging { model, waves, recipe, protect, form, mtp, sample, at_once, absorb: &[], group }
}

fn rows() -> Vec<Wave> {
    let sequence = |i: u32| Sequence::new((0..6 + i).map(|t| (t * 31 + i * 7) % 60).collect());
    let sequences: Vec<Sequence> = (0..5).map(sequence).collect();
    waves(&sequences, WaveOptions::Sequences(NonZeroUsize::MIN))
}

#[test]
fn any_number_of_ranks_collects_the_evidence_of_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let model = Model::open(path, &Device::flex(), None).unwrap();
    let rows = rows();
    let (recipe, protect) = (Recipe::named("hc-smoe").unwrap(), ProtectionMask::none());
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let one = merging(&model, &rows, &recipe, &protect, &Alone);
    one.evidence(&at("one"), Progress::hidden()).unwrap();
    let whole = fs::read(at("one").join("evidence.safetensors")).unwrap();
    for ranks in 2..=5 {
        let work = at(&format!("work-{ranks}"));
        Threads::run(ranks, |group| {
            let merging = merging(&model, &rows, &recipe, &protect, group);
            let seconds = merging.collect(&work, &at("merged"), Progress::hidden()).unwrap();
            // once more: the first has it, and nobody runs the model
            let again = merging.collect(&work, &at("merged"), Progress::hidden()).unwrap();
            assert!(seconds > 0.0 && again == 0.0, "{seconds} s, then {again} s");
        });
        assert!(fs::read(work.join("evidence.safetensors")).unwrap() == whole, "{ranks} ranks");
        let left: Vec<_> = fs::read_dir(&work).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "waves go when the evidence is there: {left:?}");
    }
}

#[test]
fn any_number_of_ranks_merges_layer_by_layer_what_one_merges() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let model = Model::open(path, &Device::flex(), None).unwrap();
    let rows = rows();
    let (recipe, protect) = (Recipe::named("ream").unwrap(), ProtectionMask::none());
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let one = merging(&model, &rows, &recipe, &protect, &Alone);
    one.merge(&at("none"), &at("one"), Progress::hidden()).unwrap();
    let run = model.work().tokens;
    let whole = files(&at("one"));
    assert!(whole.len() > 20, "{} files", whole.len());
    // The last has more ranks than there are waves.
    for ranks in 2..=6 {
        let (merged, before) = (at(&format!("merged-{ranks}")), model.work().tokens);
        Threads::run(ranks, |group| {
            let merging = merging(&model, &rows, &recipe, &protect, group);
            let seconds = merging.collect(&at("none"), &merged, Progress::hidden()).unwrap();
            let again = merging.collect(&at("none"), &merged, Progress::hidden()).unwrap();
            assert!(seconds > 0.0 && again == 0.0, "{seconds} s, then {again} s");
            merging.merge(&at("none"), &merged, Progress::hidden()).unwrap();
        });
        assert!(files(&merged) == whole, "{ranks} ranks");
        assert_eq!(model.work().tokens - before, run, "{ranks} ranks run as many tokens as one process");
    }
    // Every rank has to see the directory of the first.
    let apart = Threads::run(2, |group| {
        let merged = at(&format!("apart-{}", group.rank()));
        merging(&model, &rows, &recipe, &protect, group)
            .collect(&at("none"), &merged, Progress::hidden())
            .unwrap_err()
            .to_string()
    });
    assert!(apart.iter().all(|error| error.contains("all processes see")), "{apart:?}");
}

/// What is in a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())).collect()
}
