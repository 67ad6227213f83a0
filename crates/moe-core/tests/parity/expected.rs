//! What transformers computes, as files have it, and how near it is.

use safetensors::SafeTensors;

use crate::observed::Gradients;

const TOLERANCE: f32 = 1e-4;

pub struct Expected<'a>(pub SafeTensors<'a>);

impl Expected<'_> {
    pub fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let view = self.0.tensor(name).ok()?;
        Some(view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    pub fn integers(&self, name: &str) -> Option<(Vec<i64>, Vec<usize>)> {
        let view = self.0.tensor(name).ok()?;
        let values = view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
        Some((values, view.shape().to_vec()))
    }
}

/// Largest difference; fails above [`TOLERANCE`].
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f32]) -> f32 {
    assert_near(what, found, expected, TOLERANCE)
}

/// Largest difference; fails above the tolerance.
#[track_caller]
pub fn assert_near(what: &str, found: &[f32], expected: &[f32], tolerance: f32) -> f32 {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: differs by {worst}");
    assert!(found.iter().all(|x| x.is_finite()), "{what}: not finite");
    worst
}

/// Gradients of an expert's weights under any of the names and layouts that transformers gives them; `None` for a layer
/// that a file has none of.
pub fn expected_gradients(
    expected: &Expected<'_>,
    layer: usize,
    expert: usize,
    width: usize,
    h: usize,
) -> Option<Gradients> {
    let block = |x: Vec<f32>, size: usize| x[expert * size..(expert + 1) * size].to_vec();
    let names = expected.0.names();
    let of_layer = |name: &&&str| name.starts_with("grad.") && name.contains(&format!("layers.{layer}."));
    // JetMoE: fused without a name for the experts; attention has such ones, too
    let jetmoe = |part: &str| expected.floats(&format!("grad.model.layers.{layer}.mlp.{part}_linear.weight"));
    if let (Some(gate_up), Some(down)) = (jetmoe("input"), jetmoe("output")) {
        let (gate_up, down) = (block(gate_up, 2 * width * h), block(down, width * h));
        return Some(Gradients { gate_up, down, ..Default::default() });
    }
    let prefix =
        |name: &&str| -> Option<String> { Some(name[..name.find(".experts.")? + ".experts".len()].to_string()) };
    if let Some(prefix) = names.iter().filter(|name| of_layer(name)).find_map(prefix) {
        let tensor = |name: &str| expected.floats(&format!("{prefix}.{name}"));
        if let (Some(gate_up), Some(down)) = (tensor("gate_up_proj"), tensor("down_proj")) {
            let (gate_up, down) = (block(gate_up, 2 * width * h), block(down, width * h));
            let shape = expected.0.tensor(&format!("{prefix}.gate_up_proj")).unwrap().shape().to_vec();
            if prefix.contains(".feed_forward.") && shape[1..] == [h, 2 * width] {
                // Llama 4: transposed, the columns of gate before those of up
                return Some(Gradients {
                    gate_up: (0..2 * width * h).map(|i| gate_up[i % h * 2 * width + i / h]).collect(),
                    down: (0..h * width).map(|i| down[i % width * h + i / width]).collect(),
                    ..Default::default()
                });
            }
            let Some(gate_up_bias) = tensor("gate_up_proj_bias") else {
                return Some(Gradients { gate_up, down, ..Default::default() });
            };
            // gpt-oss: transposed, gate and up columns alternate
            let column = |row: usize| if row < width { 2 * row } else { 2 * (row - width) + 1 };
            let gate_up_bias = block(gate_up_bias, 2 * width);
            return Some(Gradients {
                gate_up: (0..2 * width * h).map(|i| gate_up[i % h * 2 * width + column(i / h)]).collect(),
                down: (0..h * width).map(|i| down[i % width * h + i / width]).collect(),
                gate_up_bias: (0..2 * width).map(|row| gate_up_bias[column(row)]).collect(),
                down_bias: block(tensor("down_proj_bias").unwrap(), h),
            });
        }
        if let (Some(up), Some(down)) = (tensor("up_proj"), tensor("down_proj")) {
            // without a gate: that of gate and up together, since one matrix is both
            return Some(Gradients {
                gate_up: block(up, width * h),
                down: block(down, width * h),
                ..Default::default()
            });
        }
        for [gate, up, down] in [["gate_proj", "up_proj", "down_proj"], ["w1", "w3", "w2"]] {
            if (0..64).all(|e| tensor(&format!("{e}.{down}.weight")).is_none()) {
                continue;
            }
            // an expert without tokens has no gradient in the per-expert layout
            let part = |p: &str| tensor(&format!("{expert}.{p}.weight")).unwrap_or_else(|| vec![0.0; width * h]);
            let gate_up = [part(gate), part(up)].concat();
            return Some(Gradients { gate_up, down: part(down), ..Default::default() });
        }
    }
    None
}
