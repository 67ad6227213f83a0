use moe_checkpoint::{MoeLayerShape, MoeShape};

use super::*;

fn plan() -> PrunePlan {
    let layers = vec![MoeLayerShape { layer: 3, widths: vec![2, 2, 2] }];
    let mut plan = PrunePlan::keep_all(&MoeShape { gateless: false, hidden_size: 2, top_k: 1, layers }, "model");
    plan.kept[0].experts[0] = vec![1];
    plan.kept[0].experts[2].clear();
    plan.kept[0].removed = vec![2];
    plan.ratio.achieved = 0.5;
    plan
}

fn edits() -> Edits {
    let mut edits = Edits::new();
    edits.set_expert(3, 0, ExpertEdit { down: Some(vec![1.0, -2.5]), down_bias: None });
    edits.set_expert(3, 1, ExpertEdit { down: Some(vec![1.0, 2.0, 3.0, 4.0]), down_bias: Some(vec![0.25, 0.5]) });
    edits.set_router(3, vec![0.5; 6]);
    edits.recipe = serde_json::json!({"type": "by hand"});
    edits
}

#[test]
fn a_file_gives_back_what_was_saved() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("edits.safetensors");
    let (plan, edits) = (plan(), edits());
    edits.save(&path, &plan).unwrap();
    assert_eq!(Edits::load(&path, &plan).unwrap(), edits);
    let file = EditsFile::open(&path, &plan).unwrap();
    assert_eq!((file.digest(), file.recipe()), (edits.digest(), &edits.recipe));
    assert_eq!(file.sizes(3, 1).unwrap(), EditSizes { down: Some(4), down_bias: Some(2) });
    assert_eq!((file.expert(3, 2).unwrap(), file.router(0).unwrap()), (None, None));
    plan.validate_edits(&file).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn the_digest_tells_values_and_places_apart() {
    let mut other = edits();
    assert_eq!(other.digest(), edits().digest());
    other.set_router(3, vec![0.5, 0.5, 0.5, 0.5, 0.5, 0.25]);
    assert_ne!(other.digest(), edits().digest());
    let mut moved = Edits::new();
    moved.set_expert(3, 1, ExpertEdit { down: Some(vec![1.0, -2.5]), down_bias: None });
    let mut original = Edits::new();
    original.set_expert(3, 0, ExpertEdit { down: Some(vec![1.0, -2.5]), down_bias: None });
    assert_ne!(moved.digest(), original.digest());
}

#[test]
fn edits_that_do_not_fit_are_named() {
    let plan = plan();
    let path = std::path::Path::new("/nonexistent/edits.safetensors");
    let message = |change: &dyn Fn(&mut Edits)| {
        let mut edits = edits();
        change(&mut edits);
        edits.save(path, &plan).unwrap_err().to_string()
    };
    let down = |down: Vec<f32>| ExpertEdit { down: Some(down), down_bias: None };
    let text = message(&|e| e.set_expert(3, 0, down(vec![1.0; 4])));
    assert!(text.contains("layer 3, expert 0: down has 4 values, expected [2, 1]"), "{text}");
    let text = message(&|e| e.set_expert(3, 2, down(vec![])));
    assert!(text.contains("the plan removes it"), "{text}");
    let text = message(&|e| e.set_expert(3, 9, down(vec![])));
    assert!(text.contains("no such expert"), "{text}");
    let text = message(&|e| e.set_router(2, vec![]));
    assert!(text.contains("no such MoE layer"), "{text}");
    let text = message(&|e| e.set_router(3, vec![0.0; 4]));
    assert!(text.contains("expected [3, 2]"), "{text}");
    let text = message(&|e| e.set_expert(3, 0, down(vec![1.0, f32::NAN])));
    assert!(text.contains("NaN"), "{text}");
    let text = message(&|e| e.set_expert(3, 1, ExpertEdit { down: None, down_bias: Some(vec![1.0]) }));
    assert!(text.contains("down_bias has 1 values, expected 2"), "{text}");
}

#[test]
fn damaged_files_and_those_of_other_plans_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("edits.safetensors");
    let (plan, mut other) = (self::plan(), self::plan());
    edits().save(&path, &plan).unwrap();
    other.kept[0].experts[0] = vec![0];
    let text = EditsFile::open(&path, &other).unwrap_err().to_string();
    assert!(text.contains("edits.safetensors") && text.contains("of the plan with digest"), "{text}");
    let bytes = std::fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        EditsFile::open(&path, &plan).unwrap_err().to_string()
    };
    let text = refused(&bytes[..bytes.len() - 4]);
    assert!(text.contains("cut off"), "{text}");
    assert!(refused(&bytes[..5]).contains("too short"));
    assert!(refused(&bytes[..40]).contains("header claims"));
    // Names are text in the header; one of the same length leaves everything else where it is.
    let at = bytes.windows(14).position(|window| window == b"layer.3.router").unwrap();
    let mut renamed = bytes.clone();
    renamed[at + 6] = b'4';
    let text = refused(&renamed);
    assert!(text.contains("`layer.4.router` is of no expert or router"), "{text}");
    assert!(EditsFile::open(directory.path().join("absent"), &plan).unwrap_err().to_string().contains("absent"));
}
