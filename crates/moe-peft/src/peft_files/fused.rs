//! The two tensors that hold a low-rank addition to all experts of a layer.

use crate::{Error, Result, lora::LowRank};

/// Additions to all experts of a layer at one parameter `[E, out, in]`, as PEFT stores them.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedExperts {
    /// `[E r, in]`, expert by expert: row `e r + rho`.
    pub a: Vec<f32>,
    /// `[out, r E]`, rank by rank: column `rho E + e`.
    pub b: Vec<f32>,
    /// Rank per expert.
    pub rank: usize,
    /// Number of experts of the layer.
    pub experts: usize,
}

/// Which side of the parameter `A` is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FusedLayout {
    /// `A [E r, in]`, `B [out, r E]`: PEFT 0.19.1 and later, and always of parameters stored `[E, in, out]` before
    /// 0.19.
    Standard,
    /// `A [E r, out]`, `B [in, r E]`: PEFT 0.17 and 0.18, of parameters stored `[E, out, in]`.
    Swapped,
}

impl FusedLayout {
    /// By the width of `A` and the height of `B`. A square parameter fits both: then by the version of PEFT that wrote
    /// it.
    ///
    /// # Errors
    /// [`Error::Input`] for shapes that fit neither, and for a square one of an unknown version or of 0.19.0, which
    /// swapped the wrong case.
    pub fn find(
        what: &str,
        (a_width, b_height): (usize, usize),
        [out, inputs]: [usize; 2],
        transposed: bool,
        version: Option<(u32, u32, u32)>,
    ) -> Result<Self> {
        let (standard, swapped) = ((a_width, b_height) == (inputs, out), (a_width, b_height) == (out, inputs));
        match (standard, swapped) {
            (true, false) => Ok(Self::Standard),
            (false, true) => Ok(Self::Swapped),
            (false, false) => {
                let found = format!("A [.., {a_width}] and B [{b_height}, ..]");
                let expected = format!("A [.., {inputs}] and B [{out}, ..], or from PEFT before 0.19.1 the reverse");
                Err(Error::input(what, found, expected))
            }
            (true, true) => match version {
                Some(version) if version > (0, 19, 0) => Ok(Self::Standard),
                Some(version) if version < (0, 19, 0) => Ok(if transposed { Self::Standard } else { Self::Swapped }),
                version => {
                    let found = match version {
                        Some(_) => "`peft_version` 0.19.0, which wrote both layouts",
                        None => "no `peft_version`",
                    };
                    let expected =
                        format!("a `peft_version` that tells which side A is on: the parameter is {out} x {inputs}");
                    Err(Error::input(what, found, expected))
                }
            },
        }
    }
}

impl FusedExperts {
    /// The addition to one expert, as `A [r, in]` and `B [out, r]`.
    pub fn expert(&self, expert: usize, [out, inputs]: [usize; 2], layout: FusedLayout) -> (Vec<f32>, Vec<f32>) {
        let (rank, experts) = (self.rank, self.experts);
        let (width, height) = match layout {
            FusedLayout::Standard => (inputs, out),
            FusedLayout::Swapped => (out, inputs),
        };
        let rows = &self.a[expert * rank * width..(expert + 1) * rank * width]; // [r, width]
        let column = |row: usize, rho: usize| self.b[row * rank * experts + rho * experts + expert];
        match layout {
            FusedLayout::Standard => {
                let b = (0..height).flat_map(|o| (0..rank).map(move |rho| (o, rho)));
                (rows.to_vec(), b.map(|(o, rho)| column(o, rho)).collect())
            }
            FusedLayout::Swapped => {
                // dW[o, i] = sum_rho A[rho, o] B[i, rho]
                let a = (0..rank).flat_map(|rho| (0..height).map(move |i| (i, rho)));
                let b = (0..width).flat_map(|o| (0..rank).map(move |rho| rows[rho * width + o]));
                (a.map(|(i, rho)| column(i, rho)).collect(), b.collect())
            }
        }
    }

    /// The additions of all experts in the standard layout, and what they count. Missing ones and missing ranks are
    /// zeros. Where experts count differently, their `B` makes up for it.
    pub fn from_experts(experts: &[Option<LowRank>], [out, inputs]: [usize; 2]) -> (Self, f64) {
        let present = || experts.iter().flatten();
        let rank = present().map(|low| low.rank).max().unwrap_or(1);
        let scale = present().map(LowRank::scale).fold(0.0, f64::max);
        let count = experts.len();
        let (mut a, mut b) = (vec![0.0; count * rank * inputs], vec![0.0; out * rank * count]);
        for (expert, low) in experts.iter().enumerate() {
            let Some(low) = low else { continue };
            let start = expert * rank * inputs;
            a[start..start + low.a.len()].copy_from_slice(&low.a);
            let share = low.scale() / scale;
            for o in 0..out {
                for rho in 0..low.rank {
                    let value = low.b[o * low.rank + rho];
                    let value = if share == 1.0 { value } else { (f64::from(value) * share) as f32 };
                    b[o * rank * count + rho * count + expert] = value;
                }
            }
        }
        (Self { a, b, rank, experts: count }, scale)
    }
}

/// One addition to gate and up from two: `A = [A_gate; A_up]`, `B` block-diagonal, of the rank of both. Where they
/// count differently, `B` makes up for it; with rsLoRA the scale is kept by `alpha`.
pub(crate) fn join_gate_up(gate: Option<&LowRank>, up: Option<&LowRank>, width: usize) -> Option<LowRank> {
    let parts: Vec<(&LowRank, usize)> =
        gate.map(|low| (low, 0)).into_iter().chain(up.map(|low| (low, width))).collect();
    let rank: usize = parts.iter().map(|(low, _)| low.rank).sum();
    let scale = parts.iter().map(|(low, _)| low.scale()).fold(0.0, f64::max);
    let rslora = parts.first()?.0.rslora;
    let mut b = vec![0.0; 2 * width * rank];
    let (mut a, mut before) = (Vec::new(), 0);
    for (low, first) in parts {
        a.extend(&low.a);
        let share = low.scale() / scale;
        for row in 0..width {
            for rho in 0..low.rank {
                let value = low.b[row * low.rank + rho];
                let value = if share == 1.0 { value } else { (f64::from(value) * share) as f32 };
                b[(first + row) * rank + before + rho] = value;
            }
        }
        before += low.rank;
    }
    let alpha = scale * if rslora { (rank as f64).sqrt() } else { rank as f64 };
    Some(LowRank { rslora, ..LowRank::new(a, b, rank, alpha) })
}

/// Rows that alternate between gate and up, as gates first and then ups: `B` of experts whose gate and up columns
/// alternate.
pub(crate) fn deinterleave(b: &[f32], rank: usize) -> Vec<f32> {
    let rows = b.len() / rank.max(1);
    (0..rows).step_by(2).chain((1..rows).step_by(2)).flat_map(|row| b[row * rank..(row + 1) * rank].to_vec()).collect()
}

/// The reverse.
pub(crate) fn interleave(b: &[f32], rank: usize) -> Vec<f32> {
    let half = b.len() / rank.max(1) / 2;
    (0..half).flat_map(|row| [row, half + row]).flat_map(|row| b[row * rank..(row + 1) * rank].to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta((a, b): &(Vec<f32>, Vec<f32>), rank: usize, [out, inputs]: [usize; 2]) -> Vec<f32> {
        let entry = |o: usize, i: usize| (0..rank).map(|r| b[o * rank + r] * a[r * inputs + i]).sum();
        (0..out).flat_map(|o| (0..inputs).map(move |i| (o, i))).map(|(o, i)| entry(o, i)).collect()
    }

    #[test]
    fn a_is_expert_major_and_b_rank_major() {
        let fused = FusedExperts {
            a: (1..=12).map(|v| v as f32).collect(),
            b: (1..=8).map(|v| v as f32).collect(),
            rank: 2,
            experts: 2,
        };
        let expert = |e| delta(&fused.expert(e, [2, 3], FusedLayout::Standard), 2, [2, 3]);
        assert_eq!(expert(0), [13.0, 17.0, 21.0, 33.0, 45.0, 57.0]);
        assert_eq!(expert(1), [54.0, 60.0, 66.0, 122.0, 136.0, 150.0]);
        // the same file of a parameter 3 x 2 in the old layout is the transpose
        let swapped = delta(&fused.expert(1, [3, 2], FusedLayout::Swapped), 2, [3, 2]);
        assert_eq!(swapped, [54.0, 122.0, 60.0, 136.0, 66.0, 150.0]);
    }

    #[test]
    fn experts_go_in_and_out_and_unequal_ranks_and_scales_keep_their_product() {
        let dims = [2, 3];
        let low = |rank: usize, alpha: f64| {
            let numbers = |len: usize| (0..len).map(|i| (i % 5) as f32 - 1.5).collect::<Vec<_>>();
            LowRank::new(numbers(rank * 3), numbers(2 * rank), rank, alpha)
        };
        let experts = [Some(low(2, 4.0)), None, Some(low(1, 3.0))];
        let (fused, scale) = FusedExperts::from_experts(&experts, dims);
        assert_eq!((fused.rank, scale, fused.a.len(), fused.b.len()), (2, 3.0, 18, 12));
        for (e, low) in experts.iter().enumerate() {
            let found = delta(&fused.expert(e, dims, FusedLayout::Standard), 2, dims);
            let expected = match low {
                Some(low) => delta(&(low.a.clone(), low.b.clone()), low.rank, dims),
                None => vec![0.0; 6],
            };
            let own = low.as_ref().map_or(1.0, LowRank::scale);
            for (found, expected) in found.iter().zip(expected) {
                assert!((scale * f64::from(*found) - own * f64::from(expected)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn the_side_is_found_by_shape_and_by_version_where_it_is_square() {
        let find = |shape, dims, version| FusedLayout::find("x", shape, dims, false, version);
        assert_eq!(find((3, 2), [2, 3], None).unwrap(), FusedLayout::Standard);
        assert_eq!(find((2, 3), [2, 3], None).unwrap(), FusedLayout::Swapped);
        assert!(find((2, 2), [2, 3], None).unwrap_err().to_string().contains("A [.., 2] and B [2, ..]"));
        assert_eq!(find((4, 4), [4, 4], Some((0, 18, 1))).unwrap(), FusedLayout::Swapped);
        assert_eq!(find((4, 4), [4, 4], Some((0, 21, 2))).unwrap(), FusedLayout::Standard);
        assert!(find((4, 4), [4, 4], Some((0, 19, 0))).unwrap_err().to_string().contains("0.19.0"));
        assert!(find((4, 4), [4, 4], None).unwrap_err().to_string().contains("no `peft_version`"));
        let transposed = FusedLayout::find("x", (4, 4), [4, 4], true, Some((0, 17, 0))).unwrap();
        assert_eq!(transposed, FusedLayout::Standard);
    }

    #[test]
    fn gate_and_up_become_one_of_both_ranks() {
        let gate = LowRank::new(vec![1.0, 2.0], vec![3.0, 4.0], 1, 2.0);
        let up = LowRank::new(vec![5.0, 6.0], vec![7.0, 8.0], 1, 2.0);
        let both = join_gate_up(Some(&gate), Some(&up), 2).unwrap();
        assert_eq!((both.rank, both.alpha, both.scale()), (2, 4.0, 2.0));
        assert_eq!(both.a, [1.0, 2.0, 5.0, 6.0]);
        assert_eq!(both.b, [3.0, 0.0, 4.0, 0.0, 0.0, 7.0, 0.0, 8.0]);
        assert_eq!(interleave(&both.b, 2), [3.0, 0.0, 0.0, 7.0, 4.0, 0.0, 0.0, 8.0]);
        assert_eq!(deinterleave(&interleave(&both.b, 2), 2), both.b);
    }
}
