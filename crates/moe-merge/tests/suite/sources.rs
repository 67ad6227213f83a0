//! Merged models as models: run as they are written, stacked, made once.

use crate::common;

use std::borrow::Cow;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::run::{logits, logits_of};
use common::{contents, evidence, narrowed, open, options, parity, plain, plan, written};
use moe_checkpoint::{
    Checkpoint, Dtype, ExpertPart, LayerRole, ModelDescription, ModelSource, ProtectionMask, RawMatrix, Record, Role,
    TensorInfo, TensorSpec, WriteOptions, write,
};
use moe_core::Model;
use moe_core::device::device;
use moe_merge::{
    Amount, CombinationConfig, CompactModel, Compression, DominantOnly, Error, Evidence, Group, GroupingConfig,
    LayerPlan, MergeOptions, MergePlan, MergedWeights, OutputForm, Ranks, Recipe, Retain, RouterConfig, RowScore,
    Scope,
};
use rayon::prelude::*;
use tempfile::tempdir;

const FORMS: [OutputForm; 3] = [OutputForm::Stock, OutputForm::Grouped, OutputForm::StockCopies];

fn run(model: &Arc<Checkpoint>) -> Vec<f32> {
    logits_of(&Model::new(model.clone(), &device("flex").unwrap(), None).unwrap())
}

fn recipes(amount: Amount) -> impl Iterator<Item = Recipe> {
    Recipe::names().map(move |name| Recipe::named(name).unwrap().with_amount(amount))
}

fn given(evidence: &Arc<Evidence>, form: OutputForm, model: &Checkpoint) -> MergeOptions {
    MergeOptions { evidence: Some(evidence.clone()), ..options(form, model) }
}

/// The model is what its directory is: the same tensors, and the same logits bit for bit.
fn assert_written_as_run(model: &Arc<Checkpoint>, out: &Path, what: &str) {
    write(model, out, &WriteOptions::default()).unwrap();
    let reopened = open(out);
    assert!(contents(&reopened) == contents(model), "{what}");
    assert_eq!(reopened.raw_config(), model.raw_config(), "{what}");
    assert_eq!(logits(out), run(model), "{what}");
}

#[test]
fn every_recipe_in_every_form_runs_as_it_is_written_and_is_refused_before_it_is_planned() {
    let directory = tempdir().unwrap();
    // Routed by softmax, biased, scored by sigmoids with a correction bias and groups, in bf16, in FP8, in MXFP4.
    let names = [
        "qwen2_moe",
        "gpt_oss",
        "deepseek_v3",
        "deepseek_v2_group",
        "qwen2_moe_bf16",
        "deepseek_v3_fp8",
        "gpt_oss_mxfp4",
    ];
    let mut models: Vec<_> = names.map(|name| (name, open(parity(&format!("tf5/{name}"))))).into();
    models.push(("two groups", in_two_groups("tf5/deepseek_v3")));
    let mut ran = 0;
    for (name, model) in models {
        let evidence = Arc::new(evidence(&model));
        for recipe in recipes(Amount::Ratio(0.5)) {
            for form in FORMS {
                let what = format!("{name} {} {form}", recipe.name);
                let options = given(&evidence, form, &model);
                let checked = recipe.check(&model, form, options.mtp);
                let made =
                    recipe.plan(&model, &evidence, &ProtectionMask::none()).and_then(|plan| plan.on(&model, &options));
                match (checked, made) {
                    (Ok(()), Ok(merged)) => {
                        assert_written_as_run(merged.model(), &directory.path().join(what.replace(' ', "-")), &what);
                        ran += 1;
                    }
                    // Layers that share a budget, and groups of the router that dominants come from as they like, may
                    // by chance be left alike.
                    (Err(_), Ok(_)) => assert!(
                        form == OutputForm::Stock
                            && (recipe.budget.scope != Scope::Layer
                                || (recipe.router.keeps_rows() && model.config().routing.groups().is_some())),
                        "{what}"
                    ),
                    (Ok(()), Err(error)) => panic!("{what}: only the plan showed that {error}"),
                    (Err(_), Err(_)) => {}
                }
            }
        }
    }
    assert!(ran > 100, "{ran}");
}

#[test]
fn dominants_stay_as_many_in_each_group_of_the_router() {
    for name in ["tf5/deepseek_v3", "tf5/deepseek_v2_group"] {
        let model = in_two_groups(name);
        let groups = model.config().routing.groups().unwrap().count;
        let evidence = Arc::new(evidence(&model));
        let experts = model.shape().layers[0].num_experts();
        for recipe in recipes(Amount::Groups(experts / 2)).filter(|recipe| !recipe.router.keeps_rows()) {
            let plan = recipe.plan(&model, &evidence, &ProtectionMask::none()).unwrap();
            for layer in &plan.layers {
                let mut left = vec![0; groups];
                layer.groups.iter().for_each(|group| left[group.dominant as usize * groups / experts] += 1);
                assert_eq!(left, vec![experts / 2 / groups; groups], "{name} {}", recipe.name);
            }
            let merged = plan.on(&model, &given(&evidence, OutputForm::Stock, &model)).unwrap();
            assert_eq!(merged.model().shape().layers[0].num_experts(), experts / 2);
            assert!(run(merged.model()).iter().all(|v| v.is_finite()));
        }
        // Groups that are too small for the number of experts per token, and what groups cannot share, is said before
        // anything is collected.
        let odd = Recipe::named("dominant-only").unwrap().with_amount(Amount::Groups(groups + 1));
        let mtp = options(OutputForm::Stock, &model).mtp;
        let error = odd.check(&model, OutputForm::Stock, mtp).unwrap_err().to_string();
        assert!(error.contains("groups of experts"), "{error}");
        let error = odd.plan(&model, &evidence, &ProtectionMask::none()).unwrap_err().to_string();
        assert!(error.contains(&format!("a multiple of {groups}")), "{error}");
    }
}

/// A model that counts how often parts of its experts are read.
struct Counting(Arc<Checkpoint>, Arc<AtomicUsize>);

impl Counting {
    fn on(base: &Arc<Checkpoint>) -> (Arc<Checkpoint>, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        (Self::described(base, ModelDescription::of(base), &count), count)
    }

    fn described(base: &Arc<Checkpoint>, description: ModelDescription, count: &Arc<AtomicUsize>) -> Arc<Checkpoint> {
        let source = Arc::new(Self(base.clone(), count.clone()));
        Arc::new(Checkpoint::from_source(description, source).unwrap())
    }
}

/// A model that routes by two groups of experts, both of which are selected.
fn in_two_groups(name: &str) -> Arc<Checkpoint> {
    let base = open(parity(name));
    let mut description = ModelDescription::of(&base);
    description.config["n_group"] = 2.into();
    description.config["topk_group"] = 2.into();
    Counting::described(&base, description, &Arc::default())
}

impl ModelSource for Counting {
    fn bytes(&self, tensor: &TensorInfo, range: Range<usize>) -> moe_checkpoint::Result<Cow<'_, [u8]>> {
        self.0.tensor_bytes(&tensor.name, range)
    }

    fn makes_experts(&self, _layer: usize) -> bool {
        true
    }

    fn expert_part(&self, layer: usize, set: usize, part: ExpertPart) -> moe_checkpoint::Result<Option<RawMatrix<'_>>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.set_part(layer, set, part)
    }

    fn base(&self) -> Option<&Arc<Checkpoint>> {
        Some(&self.0)
    }
}

/// Neighbors in pairs: no expert stays as it was.
fn pairs(model: &Checkpoint) -> MergePlan {
    let mut recipe = plain(0.5);
    recipe.router = RouterConfig::Keep;
    let mut plan = plan(&recipe, model);
    for (layer, shape) in plan.layers.iter_mut().zip(&model.shape().layers) {
        let pair = |e: u32| Group { dominant: 2 * e, members: vec![2 * e, 2 * e + 1], weights: vec![0.5, 0.5] };
        *layer = LayerPlan {
            groups: (0..shape.num_experts() as u32 / 2).map(pair).collect(),
            ..LayerPlan::keep_all(layer.layer, 0)
        };
    }
    plan
}

#[test]
fn a_layer_is_merged_once_however_many_threads_ask() {
    let (model, reads) = Counting::on(&open(parity("tf5/qwen2_moe")));
    let plan = pairs(&model);
    let merged = || plan.on(&model, &MergeOptions::new(OutputForm::StockCopies)).unwrap().model().clone();
    let all: Vec<(usize, usize, ExpertPart)> = model
        .shape()
        .layers
        .iter()
        .flat_map(|layer| (0..layer.num_experts()).map(move |expert| (layer.layer, expert)))
        .flat_map(|(layer, expert)| ExpertPart::ALL.map(|part| (layer, expert, part)))
        .collect();
    let read = |model: &Arc<Checkpoint>, at: &(usize, usize, ExpertPart)| {
        model.expert_part(at.0, at.1, at.2).unwrap().unwrap().bytes.into_owned()
    };
    reads.store(0, Ordering::Relaxed);
    let alone = merged();
    let expected: Vec<Vec<u8>> = all.iter().map(|at| read(&alone, at)).collect();
    let once = reads.swap(0, Ordering::Relaxed);
    assert!(once > 0);
    for _ in 0..5 {
        let shared = merged();
        assert_eq!(reads.load(Ordering::Relaxed), 0, "nothing is read before it is asked for");
        // From more threads than there are processors, all of one pool, which may take up each other's work.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(8).build().unwrap();
        let found: Vec<Vec<u8>> = pool.install(|| all.par_iter().map(|at| read(&shared, at)).collect());
        assert!(found == expected);
        assert_eq!(reads.swap(0, Ordering::Relaxed), once);
        let again: Vec<Vec<u8>> = all.iter().map(|at| read(&shared, at)).collect();
        assert!(again == expected && reads.load(Ordering::Relaxed) == 0);
    }
}

#[test]
fn models_of_experts_of_different_widths_merge_and_narrow_experts_count_as_padded_with_zeros() {
    let directory = tempdir().unwrap();
    for name in ["tf5/qwen2_moe", "tf5/gpt_oss"] {
        let whole = open(parity(name));
        let full = whole.shape().uniform_width().unwrap();
        let model = narrowed(&whole, |layer, expert| [full, full / 2, 0, full - 1][(layer + expert) % 4]);
        assert!(model.ragged());
        let evidence = Arc::new(evidence(&model));
        for recipe in recipes(Amount::Ratio(0.5)) {
            let what = format!("{name} {}", recipe.name);
            recipe.check(&model, OutputForm::Grouped, None).unwrap();
            let plan = recipe.plan(&model, &evidence, &ProtectionMask::none()).unwrap();
            let merged = plan.on(&model, &given(&evidence, OutputForm::Grouped, &model)).unwrap();
            assert!(merged.report().bytes.after < merged.report().bytes.before, "{what}");
            assert_written_as_run(merged.model(), &directory.path().join(what.replace(['/', ' '], "-")), &what);
            for form in [OutputForm::Stock, OutputForm::StockCopies] {
                let error = recipe.check(&model, form, None).unwrap_err();
                assert!(matches!(error, Error::Output { .. }), "{what} {form}: {error}");
                assert!(plan.on(&model, &given(&evidence, form, &model)).is_err(), "{what} {form}");
            }
        }
        // The average of a pair, units in the order they have.
        let mut plan = pairs(&model);
        plan.recipe.alignment = Default::default();
        let merged = plan.on(&model, &MergeOptions::new(OutputForm::Grouped)).unwrap();
        for layer in &plan.layers {
            for group in &layer.groups {
                let [a, b] = [0, 1].map(|at| model.expert(layer.layer, group.members[at] as usize).unwrap());
                let found = merged.model().expert(layer.layer, group.dominant as usize).unwrap();
                let width = a.width.max(b.width);
                assert_eq!(found.width, width, "{name}");
                let unit = |weights: &[f32], own: usize, at: usize| {
                    if at < own { f64::from(weights[at]) } else { 0.0 }
                };
                let hidden = a.hidden;
                for (at, value) in found.gate.iter().enumerate() {
                    let expected = (unit(&a.gate, a.gate.len(), at) + unit(&b.gate, b.gate.len(), at)) / 2.0;
                    assert!((f64::from(*value) - expected).abs() < 1e-6);
                }
                for h in 0..hidden {
                    for column in 0..width {
                        let of = |w: &moe_checkpoint::ExpertWeights| {
                            unit(&w.down[h * w.width..(h + 1) * w.width], w.width, column)
                        };
                        let value = f64::from(found.down[h * width + column]);
                        assert!((value - (of(&a) + of(&b)) / 2.0).abs() < 1e-6);
                    }
                }
            }
        }
        // Nothing merged is nothing changed, and one width in all groups is a stock model again.
        let nothing = common::plan(&plain(0.0), &model);
        let same = nothing.on(&model, &MergeOptions::new(OutputForm::Grouped)).unwrap();
        assert!(contents(same.model()) == contents(&model) && same.model().raw_config() == model.raw_config());
        let even = narrowed(&whole, |_, expert| if expert % 2 == 0 { full } else { full / 2 });
        let mut plan = pairs(&even);
        plan.recipe.router = RouterConfig::Delete;
        let stock = plan.on(&even, &MergeOptions::new(OutputForm::Stock)).unwrap();
        assert!(!stock.model().ragged() && stock.model().shape().uniform_width() == Some(full));
        assert_written_as_run(stock.model(), &directory.path().join(format!("{}-even", name.replace('/', "-"))), name);
    }
}

#[test]
fn merged_experts_are_kept_and_serve_every_form() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe_bf16"));
    let evidence = Arc::new(evidence(&model));
    let recipe = Recipe::named("mergemoe").unwrap().with_amount(Amount::Ratio(0.5));
    let plan = recipe.plan(&model, &evidence, &ProtectionMask::none()).unwrap();
    let kept = directory.path().join("kept");
    plan.compute(&model, Some(&evidence), &kept).unwrap();
    let files = common::files(&kept);
    // A run that was stopped after its first layer goes on to the same files.
    let last = plan.layers.last().unwrap().layer;
    for name in files.keys().filter(|name| name.starts_with(&format!("layer-{last:03}")) || *name == "plan.json") {
        fs::remove_file(kept.join(name)).unwrap();
    }
    assert!(MergedWeights::open(&kept).is_err());
    plan.compute(&model, Some(&evidence), &kept).unwrap();
    assert!(common::files(&kept) == files);
    let weights = MergedWeights::open(&kept).unwrap();
    for form in FORMS {
        // Without the evidence: what it was fitted on is in the experts.
        let options = MergeOptions { merged: Some(weights.clone()), ..MergeOptions::new(form) };
        let merged = weights.plan().on(&model, &options).unwrap();
        let computed = plan.on(&model, &given(&evidence, form, &model)).unwrap();
        assert!(contents(merged.model()) == contents(computed.model()), "{form}");
        assert_eq!(merged.report(), computed.report());
        assert_written_as_run(merged.model(), &directory.path().join(form.name()), form.name());
    }
    let other = recipe.with_amount(Amount::Ratio(0.25)).plan(&model, &evidence, &ProtectionMask::none()).unwrap();
    let options = MergeOptions { merged: Some(weights), ..MergeOptions::new(OutputForm::Grouped) };
    let error = other.on(&model, &options).unwrap_err().to_string();
    assert!(error.contains("another plan") && error.contains("plan.json"), "{error}");
    let error = other.compute(&model, Some(&evidence), &kept).unwrap_err().to_string();
    assert!(error.contains("run.json"), "{error}");
    fs::remove_file(kept.join(files.keys().find(|name| name.ends_with(".safetensors")).unwrap())).unwrap();
    let options = MergeOptions { merged: Some(MergedWeights::open(&kept).unwrap()), ..options };
    let error = plan.on(&model, &options).unwrap_err().to_string();
    assert!(error.contains(".safetensors"), "{error}");
}

#[test]
fn a_merged_model_is_merged_again_and_compressed_without_a_directory_between() {
    let directory = tempdir().unwrap();
    let model = open(parity("tf5/qwen2_moe"));
    let mut recipe = plain(0.25);
    recipe.router = RouterConfig::Delete;
    let once = plan(&recipe, &model).on(&model, &MergeOptions::new(OutputForm::Stock)).unwrap().model().clone();
    let mut dropped = plain(0.5);
    (dropped.grouping, dropped.combination) =
        (GroupingConfig::Retain(Retain {}), CombinationConfig::DominantOnly(DominantOnly {}));
    dropped.router = RouterConfig::Delete;
    let second = plan(&dropped, &once);
    let twice = second.on(&once, &MergeOptions::new(OutputForm::Stock)).unwrap().model().clone();
    assert_written_as_run(&twice, &directory.path().join("twice"), "twice");
    let record = Record::load(directory.path().join("twice")).unwrap();
    assert_eq!(record.steps.iter().map(|step| step.method.as_str()).collect::<Vec<_>>(), ["merge", "merge"]);
    // The plan knows the model that was written, too.
    write(&once, directory.path().join("once"), &WriteOptions::default()).unwrap();
    let from_directory =
        second.on(&open(directory.path().join("once")), &MergeOptions::new(OutputForm::Stock)).unwrap();
    assert!(contents(from_directory.model()) == contents(&twice));

    // Grouped, then compressed; ragged ones with experts without units as well.
    let full = model.shape().uniform_width().unwrap();
    let ragged = narrowed(&model, |layer, expert| [full, full / 2, 0][(layer + expert) % 3]);
    for (what, base) in [("grouped", &model), ("ragged", &ragged)] {
        let base = match what {
            "grouped" => {
                plan(&plain(0.5), base).on(base, &MergeOptions::new(OutputForm::Grouped)).unwrap().model().clone()
            }
            _ => base.clone(),
        };
        let how = Compression { rank: 3, keep_rows: 0.25, rows: RowScore::Magnitude, ranks: Ranks::Same };
        let dir = directory.path().join(format!("{what}-compact"));
        how.compress(&base, &dir, None, false).unwrap();
        let compact = CompactModel::open(&dir).unwrap();
        let exact = compact.on(&base, Some(Dtype::F32)).unwrap().model().clone();
        for layer in &base.shape().layers {
            let moe = base.config().moe(layer.layer).unwrap();
            for expert in 0..layer.num_experts() {
                let expected = compact.expert(layer.layer, moe.stored(expert)).unwrap().dense();
                assert_eq!(exact.expert(layer.layer, expert).unwrap(), expected, "{what}");
            }
        }
        let dense = compact.on(&base, None).unwrap().model().clone();
        assert_written_as_run(&dense, &directory.path().join(format!("{what}-dense")), what);
        let steps = dense.steps().iter().map(|step| step.method.as_str()).collect::<Vec<_>>();
        assert_eq!(steps.last(), Some(&"compress"), "{steps:?}");
        // A file of another shape is refused before any weight is read.
        let sets: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        let file = sets.iter().find(|path| path.to_string_lossy().ends_with("set-0000.safetensors")).unwrap();
        fs::write(file, &fs::read(file).unwrap()[..100]).unwrap();
        let error = CompactModel::open(&dir).unwrap().on(&base, None).unwrap_err().to_string();
        assert!(error.contains("set-0000.safetensors"), "{error}");
    }
}

#[test]
fn what_is_impossible_is_said_before_evidence_is_collected() {
    let model = open(parity("tf5/qwen2_moe"));
    let message =
        |name: &str, form: OutputForm| Recipe::named(name).unwrap().check(&model, form, None).unwrap_err().to_string();
    assert!(message("ream", OutputForm::StockCopies).contains("changes the router"));
    assert!(message("m-smoe", OutputForm::Stock).contains("scope `layer`"));
    let few = Recipe::named("dern").unwrap().with_amount(Amount::Groups(2));
    assert!(few.check(&model, OutputForm::Grouped, None).unwrap_err().to_string().contains("num_experts_per_tok"));
    few.check(&model, OutputForm::Stock, None).unwrap();
    let mut unknown = Recipe::named("dern").unwrap();
    unknown.budget.exclude = vec![99];
    assert!(unknown.check(&model, OutputForm::Grouped, None).unwrap_err().to_string().contains("99"));
    unknown.budget.exclude = vec![model.shape().layers[0].layer];
    assert!(unknown.check(&model, OutputForm::Stock, None).unwrap_err().to_string().contains("one number of experts"));
    unknown.check(&model, OutputForm::Grouped, None).unwrap();
    // Layers that predict further tokens need a choice.
    let mut description = ModelDescription::of(&model);
    description.tensors.push(TensorSpec { name: "mtp.norm.weight".into(), dtype: Dtype::F32, shape: vec![4] });
    let further = Counting::described(&model, description, &Arc::default());
    let recipe = Recipe::named("hc-smoe").unwrap();
    let error = recipe.check(&further, OutputForm::Grouped, None).unwrap_err().to_string();
    assert!(error.contains("multi-token prediction"), "{error}");
    recipe.check(&further, OutputForm::Grouped, Some(moe_checkpoint::Mtp::Keep)).unwrap();
    recipe.check(&further, OutputForm::Grouped, Some(moe_checkpoint::Mtp::Drop)).unwrap();
    let nothing = MergePlan::keep_all(&further, "nothing");
    let error = nothing.on(&further, &MergeOptions::new(OutputForm::Stock)).unwrap_err().to_string();
    assert!(error.contains("choose whether"), "{error}");
    let without = nothing.on(&further, &options(OutputForm::Stock, &further)).unwrap();
    assert!(contents(without.model()) == contents(&model));
    // Experts that share weights.
    let grouped =
        plan(&plain(0.5), &model).on(&model, &MergeOptions::new(OutputForm::Grouped)).unwrap().model().clone();
    let error = recipe.check(&grouped, OutputForm::Grouped, None).unwrap_err().to_string();
    assert!(error.contains("share sets of weights"), "{error}");
    let kept = MergePlan::keep_all(&grouped, "nothing").on(&grouped, &MergeOptions::new(OutputForm::Grouped));
    assert!(kept.unwrap_err().to_string().contains("share sets of weights"));
    // A scratch directory that is not there is not a place for merged experts.
    let options = MergeOptions { scratch: Some("/nowhere/at/all".into()), ..MergeOptions::new(OutputForm::Grouped) };
    let merged = plan(&plain(0.5), &model).on(&model, &options).unwrap();
    let layer = model.shape().layers[0].layer;
    let error = (0..model.shape().layers[0].num_experts()).find_map(|e| merged.model().expert(layer, e).err());
    assert!(error.unwrap().to_string().contains("/nowhere/at/all"));
}

#[test]
fn routers_with_biases_are_mixed_alike_in_a_model_and_in_its_files() {
    let directory = tempdir().unwrap();
    for (name, biased) in [("tf5/gpt_oss", LayerRole::RouterBias), ("tf5/ernie4_5_moe", LayerRole::CorrectionBias)] {
        let model = open(parity(name));
        let mut recipe = plain(0.5);
        recipe.router = RouterConfig::Merge(Default::default());
        let plan = plan(&recipe, &model);
        let merged = plan.on(&model, &options(OutputForm::Stock, &model)).unwrap();
        for layer in &plan.layers {
            let role = Role::Layer(layer.layer, biased);
            let (old, new) = (model.read_f32(role).unwrap(), merged.model().read_f32(role).unwrap());
            assert_eq!((old.len(), new.len()), (layer.index_map(old.len()).len(), layer.groups.len()), "{name}");
            for (group, found) in layer.groups.iter().zip(&new) {
                let members = group.members.iter().zip(group.shares());
                let mean: f64 = members.map(|(e, share)| share * f64::from(old[*e as usize])).sum();
                let count = if biased == LayerRole::RouterBias { (group.members.len() as f64).ln() } else { 0.0 };
                assert!((f64::from(*found) - mean - count).abs() < 1e-5, "{name}: {found} {mean}");
            }
        }
        let out = directory.path().join(name.replace('/', "-"));
        written(&plan, &model, &out, &options(OutputForm::Stock, &model)).unwrap();
        assert_eq!(logits(&out), run(merged.model()), "{name}");
    }
}
