//! Evidence of merges that the ranks of a group collect: the file of one process for any number of them.

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

#[test]
fn any_number_of_ranks_collects_the_evidence_of_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/assets/tiny-moe");
    let model = Model::open(path, &Device::flex(), None).unwrap();
    let sequence = |i: u32| Sequence::new((0..6 + i).map(|t| (t * 31 + i * 7) % 60).collect());
    let sequences: Vec<Sequence> = (0..5).map(sequence).collect();
    let rows = waves(&sequences, WaveOptions::Sequences(NonZeroUsize::MIN));
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
    let sequential = Recipe::named("ream").unwrap();
    let all = Threads::run(2, |group| {
        let merging = merging(&model, &rows, &sequential, &protect, group);
        merging.collect(&at("none"), &at("merged"), Progress::hidden()).unwrap_err().to_string()
    });
    assert!(all.iter().all(|error| error.contains("layer by layer")), "{all:?}");
}
