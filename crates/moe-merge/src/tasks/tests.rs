use super::*;
use crate::testing::noise;

const EXPERT: ExpertId = ExpertId { layer: 1, expert: 2 };

fn change(json: &str, tasks: &[&[f32]]) -> Vec<f32> {
    let rule: TaskRuleConfig = serde_json::from_str(json).unwrap();
    rule.validate(tasks.len()).unwrap();
    rule.change(EXPERT, ExpertPart::Gate, tasks.iter().map(|task| task.to_vec()).collect())
}

#[test]
fn arithmetic_adds_scaled_task_vectors() {
    let tasks: [&[f32]; 2] = [&[1.0, 2.0], &[3.0, -4.0]];
    assert_eq!(change(r#"{"type": "task_arithmetic", "scales": [0.5]}"#, &tasks), [2.0, -1.0]);
    assert_eq!(change(r#"{"type": "task_arithmetic", "scales": [1.0, 0.0]}"#, &tasks), [1.0, 2.0]);
    assert!(TaskArithmetic { scales: vec![1.0; 3] }.validate(2).is_err());
    assert!(TaskArithmetic { scales: vec![f64::NAN] }.validate(2).is_err());
}

#[test]
fn ties_trims_elects_and_averages_what_agrees() {
    let tasks: [&[f32]; 3] = [&[1.0, -2.0, 0.1, 5.0], &[3.0, 1.0, -0.2, 0.0], &[-2.0, -4.0, 0.05, 1.0]];
    // Sums 2, -5, -0.05, 6: means of 1 and 3, of -2 and -4, of -0.2, of 5 and 1.
    assert_eq!(change(r#"{"type": "ties", "density": 1.0}"#, &tasks), [2.0, -3.0, -0.2, 3.0]);
    // Half of each: (-2, 5), (3, 1), (-2, -4): sums 1, -5, 0, 5.
    assert_eq!(change(r#"{"type": "ties", "density": 0.5, "scale": 2.0}"#, &tasks), [6.0, -6.0, 0.0, 10.0]);
    assert!(Ties { density: 0.0, scale: 1.0 }.validate(1).is_err());
    // Of equal magnitudes the earlier stays.
    assert_eq!(change(r#"{"type": "ties", "density": 0.5}"#, &[&[1.0, -1.0, 1.0, 1.0]]), [1.0, -1.0, 0.0, 0.0]);
}

#[test]
fn dare_keeps_the_expected_change() {
    let tau = noise(20_000, 3).iter().map(|v| 1.0 + 0.1 * v).collect::<Vec<f32>>();
    let dare = |drop: f64, seed: u64| {
        let json = format!(
            r#"{{"type": "dare", "drop": {drop}, "seed": {seed}, "then": {{"type": "task_arithmetic", "scales": [1.0]}}}}"#
        );
        change(&json, &[&tau])
    };
    let dropped = dare(0.75, 1);
    assert!(dropped.iter().zip(&tau).all(|(d, t)| *d == 0.0 || (d / t - 4.0).abs() < 1e-5));
    let mean = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
    assert!((mean(&dropped) / mean(&tau) - 1.0).abs() < 0.05);
    assert_eq!(dropped, dare(0.75, 1));
    assert_ne!(dropped, dare(0.75, 2));
    assert_eq!(dare(0.0, 1), tau);
    let then = DareThen::Ties(Ties { density: 1.0, scale: 1.0 });
    assert!(Dare { drop: 1.0, seed: 0, then }.validate(1).is_err());
}
