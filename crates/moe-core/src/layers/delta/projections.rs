//! Projections of delta rules, in the forms of files.

use burn::tensor::Tensor;

use super::{
    super::{Linear, sum_of},
    DeltaTape, widths,
};
use crate::{adapters::Wanted, host, kernels::delta::DeltaShape};

/// Projections of the normed input.
#[derive(Clone, Debug)]
pub enum DeltaProjections {
    /// Queries, keys and values; gate; what is written; decay.
    Separate(Box<[Linear; 4]>),
    /// Per key head its query, key, values and gates; per key head what is written and the decays of its value heads.
    Grouped(Box<[Linear; 2]>),
    /// Every one by itself, wide ones perhaps through narrow ones.
    Apart(Box<ApartProjections>),
}

/// Projections of which each is by itself.
#[derive(Clone, Debug)]
pub struct ApartProjections {
    /// Queries, keys `[key_heads * D_k, H]` and values `[value_heads * D_v, H]`.
    pub qkv: [Linear; 3],
    /// Gate on the output `[value_heads * D_v, H]`.
    pub gate: WideProjection,
    /// How much every head writes `[value_heads, H]`.
    pub beta: Linear,
    /// Logits of the decays `[decays, H]`.
    pub decay: WideProjection,
}

/// A projection in one matrix, or through a narrow one.
#[derive(Clone, Debug)]
pub enum WideProjection {
    /// In one.
    Full(Box<Linear>),
    /// Down and up.
    LowRank(Box<[Linear; 2]>),
}

impl WideProjection {
    fn forward(&self, z: &Tensor<2>) -> Tensor<2> {
        match self {
            Self::Full(map) => map.forward(z),
            Self::LowRank(maps) => maps[1].forward(&maps[0].forward(z)),
        }
    }

    fn backward(&self, z: &dyn Fn() -> Tensor<2>, dy: &Tensor<2>, wanted: Wanted) -> Option<Tensor<2>> {
        match self {
            Self::Full(map) => map.backward(z, dy, wanted),
            Self::LowRank(maps) => {
                let [down, up] = &**maps;
                let through = Wanted { input: true, ..wanted };
                let d = up.backward(|| down.forward(&z()), dy, through)?;
                down.backward(z, &d, wanted)
            }
        }
    }
}

impl DeltaProjections {
    pub(super) fn forward(&self, z: &Tensor<2>, shape: &DeltaShape) -> DeltaTape {
        let values = |linear: &Linear| host::into_vec(linear.forward(z));
        match self {
            Self::Separate(maps) => {
                let [qkv, gate, beta, decay] = &**maps;
                DeltaTape { qkv: values(qkv), gate: values(gate), beta: values(beta), decay: values(decay) }
            }
            Self::Apart(maps) => {
                let qkv = maps.qkv.iter().map(|map| map.forward(z)).collect();
                DeltaTape {
                    qkv: host::into_vec(Tensor::cat(qkv, 1)),
                    gate: host::into_vec(maps.gate.forward(z)),
                    beta: values(&maps.beta),
                    decay: host::into_vec(maps.decay.forward(z)),
                }
            }
            Self::Grouped(maps) => {
                let (both, small) = (values(&maps[0]), values(&maps[1]));
                let (columns, small_columns) = (grouped_columns(shape), grouped_small_columns(shape));
                let pick = |x: &[f32], columns: &[usize], width: usize| -> Vec<f32> {
                    x.chunks_exact(width).flat_map(|row| columns.iter().map(move |c| row[*c])).collect()
                };
                let [_, gate, qkv] = widths(shape);
                let heads = shape.value_heads;
                DeltaTape {
                    qkv: pick(&both, &columns[..qkv], qkv + gate),
                    gate: pick(&both, &columns[qkv..], qkv + gate),
                    beta: pick(&small, &small_columns[..heads], 2 * heads),
                    decay: pick(&small, &small_columns[heads..], 2 * heads),
                }
            }
        }
    }

    /// Gradient with respect to `z`, if it is wanted.
    pub(super) fn backward(
        &self,
        z: &dyn Fn() -> Tensor<2>,
        d: &DeltaTape,
        shape: &DeltaShape,
        wanted: Wanted,
        device: &burn::tensor::Device,
    ) -> Option<Tensor<2>> {
        let [_, gate, qkv] = widths(shape);
        let heads = shape.value_heads;
        let tokens = d.beta.len() / heads;
        let tensor = |values: Vec<f32>, columns: usize| host::from_vec(values, [tokens, columns], device);
        match self {
            Self::Separate(maps) => {
                let parts = [(&d.qkv, qkv), (&d.gate, gate), (&d.beta, heads), (&d.decay, heads)];
                let parts = maps.iter().zip(parts);
                sum_of(parts.map(|(map, (d, columns))| map.backward(z, &tensor(d.clone(), columns), wanted)))
            }
            Self::Apart(maps) => {
                let [keys, values, all] = widths(shape);
                let d_qkv = tensor(d.qkv.clone(), all);
                let part = |i: usize| d_qkv.clone().narrow(1, i * keys, if i == 2 { values } else { keys });
                let through_qkv = (0..3).map(|i| maps.qkv[i].backward(z, &part(i), wanted));
                let others = [
                    maps.decay.backward(z, &tensor(d.decay.clone(), shape.decays()), wanted),
                    maps.beta.backward(z, &tensor(d.beta.clone(), heads), wanted),
                    maps.gate.backward(z, &tensor(d.gate.clone(), gate), wanted),
                ];
                sum_of(through_qkv.chain(others))
            }
            Self::Grouped(maps) => {
                let place = |parts: [&[f32]; 2], columns: &[usize]| -> Vec<f32> {
                    let widths = parts.map(|part| part.len() / tokens);
                    let mut out = vec![0.0; tokens * columns.len()];
                    for (t, row) in out.chunks_exact_mut(columns.len()).enumerate() {
                        let first = &parts[0][t * widths[0]..(t + 1) * widths[0]];
                        let second = &parts[1][t * widths[1]..(t + 1) * widths[1]];
                        columns.iter().zip(first.iter().chain(second)).for_each(|(c, d)| row[*c] = *d);
                    }
                    out
                };
                let both = place([&d.qkv, &d.gate], &grouped_columns(shape));
                let small = place([&d.beta, &d.decay], &grouped_small_columns(shape));
                sum_of([
                    maps[0].backward(z, &tensor(both, qkv + gate), wanted),
                    maps[1].backward(z, &tensor(small, 2 * heads), wanted),
                ])
            }
        }
    }
}

/// Columns of queries, keys, values and gates, in this order, in a projection that has them per key head.
fn grouped_columns(shape: &DeltaShape) -> Vec<usize> {
    let (dk, values) = (shape.key_dim, shape.value_heads / shape.key_heads * shape.value_dim);
    let width = 2 * dk + 2 * values;
    let part = |start: usize, len: usize| {
        (0..shape.key_heads).flat_map(move |head| head * width + start..head * width + start + len)
    };
    part(0, dk).chain(part(dk, dk)).chain(part(2 * dk, values)).chain(part(2 * dk + values, values)).collect()
}

/// Columns of what is written and of the decays, in this order, in a projection that has them per key head.
fn grouped_small_columns(shape: &DeltaShape) -> Vec<usize> {
    let each = shape.value_heads / shape.key_heads;
    let part = |start: usize| {
        (0..shape.key_heads).flat_map(move |head| 2 * each * head + start..2 * each * head + start + each)
    };
    part(0).chain(part(each)).collect()
}
