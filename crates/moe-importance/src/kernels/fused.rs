//! The host body: a matrix product whose tiles are reduced while they are in registers.
//!
//! A product as a library call would write the gradient and read it back, and that is most of its time when a sequence
//! gives an expert only tens of rows. Here a tile of units × hidden is accumulated over the rows, turned into absolute
//! values or squares, and summed to one vector per unit.

use std::cell::RefCell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::weight_gradient::{Entry, ExpertOperands, HostOperands};

/// Tile heights of both register counts divide this, so that tiles do not straddle parallel pieces.
const UNIT_STEP: usize = 12;
/// Packing the shared side costs as much as this many units' worth of row loads, so pieces are not smaller.
const MIN_UNITS: usize = 48;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

pub(super) fn add_row_sums(
    entry: Entry,
    operands: &ExpertOperands<'_>,
    host: &HostOperands,
    segments: &[(Range<usize>, f64)],
    out: &mut [f64],
) {
    let factors = Factors::new(entry, operands, host);
    // A unit's sum does not depend on which piece it is in: the number of threads never changes results.
    let units = factors.width.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(UNIT_STEP).max(MIN_UNITS);
    out.par_chunks_mut(units).enumerate().for_each(|(piece, out)| {
        SCRATCH.with_borrow_mut(|scratch| {
            for (rows, scale) in segments {
                let (rows, first_unit) = (rows.clone(), piece * units);
                dispatch(Sums { factors: &factors, rows, first_unit, scale: *scale, out: &mut *out, scratch });
            }
        });
    });
}

/// Runs on the widest vectors of this machine.
fn dispatch(sums: Sums<'_>) {
    // `Arch` knows AVX2 only with a feature that nothing else in the build asks for, which would build Burn twice.
    #[cfg(target_arch = "x86_64")]
    if pulp::x86::V4::try_new().is_none()
        && let Some(avx2) = pulp::x86::V3::try_new()
    {
        return Simd::vectorize(avx2, sums);
    }
    Arch::new().dispatch(sums);
}

struct Factors<'a> {
    entry: Entry,
    /// `[n, H]`
    input: &'a [f32],
    /// `[n, 2I]`
    gate_up: &'a [f32],
    /// `[n, I]`
    units: &'a [f32],
    /// `[n, H]`
    upstream: &'a [f32],
    /// `[n]`
    routing_weights: &'a [f32],
    hidden: usize,
    width: usize,
}

impl<'a> Factors<'a> {
    fn new(entry: Entry, operands: &ExpertOperands<'a>, host: &'a HostOperands) -> Self {
        Self {
            entry,
            input: host.input.as_slice(),
            gate_up: host.gate_up.as_slice(),
            units: host.units.as_slice(),
            upstream: host.upstream.as_slice(),
            routing_weights: operands.routing_weights,
            hidden: operands.hidden(),
            width: operands.width(),
        }
    }
}

/// One segment and `out.len()` units from `first_unit` on.
struct Sums<'a> {
    factors: &'a Factors<'a>,
    rows: Range<usize>,
    first_unit: usize,
    scale: f64,
    out: &'a mut [f64],
    scratch: &'a mut Vec<f32>,
}

impl WithSimd for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Two vectors wide: all accumulators, two operands and one broadcast fill 32 or 16 registers.
        match (self.factors.entry, S::REGISTER_COUNT >= 32) {
            (Entry::Magnitude, true) => self.run::<S, 12, 2, false>(simd),
            (Entry::Magnitude, false) => self.run::<S, 6, 2, false>(simd),
            (Entry::Square, true) => self.run::<S, 12, 2, true>(simd),
            (Entry::Square, false) => self.run::<S, 6, 2, true>(simd),
        }
    }
}

impl Sums<'_> {
    /// R units by V vectors per tile.
    #[inline(always)]
    fn run<S: Simd, const R: usize, const V: usize, const SQUARE: bool>(self, simd: S) {
        let Self { factors, rows, first_unit, scale, out, scratch } = self;
        let Factors { input, gate_up, units, upstream, routing_weights, hidden, width, .. } = *factors;
        let (m, lanes, tiles) = (rows.len(), V * S::F32_LANES, out.len().div_ceil(R));
        if m == 0 {
            return;
        }
        let (panel, side) = (m * lanes, tiles * m * R);
        let scratch = aligned(scratch, 2 * panel + 3 * side + tiles * R);
        let (input_panel, scratch) = scratch.split_at_mut(panel);
        let (upstream_panel, scratch) = scratch.split_at_mut(panel);
        let (sides, sums) = scratch.split_at_mut(3 * side);
        for (packed, (from, stride, offset)) in
            sides.chunks_exact_mut(side).zip([(gate_up, 2 * width, 0), (gate_up, 2 * width, width), (units, width, 0)])
        {
            pack_tiles::<R>(from, stride, offset + first_unit, out.len(), &rows, packed);
        }
        sums.fill(0.0);
        let (gate, rest) = sides.split_at(side);
        let (up, units) = rest.split_at(side);
        for first in (0..hidden).step_by(lanes) {
            let columns = first..hidden.min(first + lanes);
            for (i, t) in rows.clone().enumerate() {
                let at = i * lanes..(i + 1) * lanes;
                let row = t * hidden;
                let from = &input[row + columns.start..row + columns.end];
                let (to, tail) = input_panel[at.clone()].split_at_mut(from.len());
                to.copy_from_slice(from);
                tail.fill(0.0);
                let from = &upstream[row + columns.start..row + columns.end];
                let (to, tail) = upstream_panel[at].split_at_mut(from.len());
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from * routing_weights[t]);
                tail.fill(0.0);
            }
            let (input_panel, _) = pulp::as_arrays::<V, _>(S::as_simd_f32s(input_panel).0); // [m][V]
            let (upstream_panel, _) = pulp::as_arrays::<V, _>(S::as_simd_f32s(upstream_panel).0);
            let tiles = sums.chunks_exact_mut(R).zip(gate.chunks_exact(m * R)).zip(up.chunks_exact(m * R));
            for (((sums, gate), up), units) in tiles.zip(units.chunks_exact(m * R)) {
                let mut lanes = [simd.splat_f32s(0.0); R];
                tile::<S, R, V, SQUARE>(simd, gate, input_panel, &mut lanes);
                tile::<S, R, V, SQUARE>(simd, up, input_panel, &mut lanes);
                tile::<S, R, V, SQUARE>(simd, units, upstream_panel, &mut lanes);
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum += simd.reduce_sum_f32s(lanes);
                }
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out += scale * f64::from(*sum);
        }
    }
}

/// `lanes[i] += f(sum_t a[t][i] * b[t])`, lane by lane over the V vectors of each b.
#[inline(always)]
fn tile<S: Simd, const R: usize, const V: usize, const SQUARE: bool>(
    simd: S,
    a: &[f32],
    b: &[[S::f32s; V]],
    lanes: &mut [S::f32s; R],
) {
    let mut gradient = [[simd.splat_f32s(0.0); V]; R];
    let (a, _) = pulp::as_arrays::<R, _>(a);
    for (a, b) in a.iter().zip(b) {
        for i in 0..R {
            let a = simd.splat_f32s(a[i]);
            for v in 0..V {
                gradient[i][v] = simd.mul_add_f32s(a, b[v], gradient[i][v]);
            }
        }
    }
    for (lanes, gradient) in lanes.iter_mut().zip(gradient) {
        for g in gradient {
            *lanes = match SQUARE {
                true => simd.mul_add_f32s(g, g, *lanes),
                false => simd.add_f32s(simd.abs_f32s(g), *lanes),
            };
        }
    }
}

/// Units `first..first + count` of `rows` of a matrix `[n, stride]` as tiles `[count / R][m][R]`, zeros past the end.
#[inline(always)]
fn pack_tiles<const R: usize>(
    from: &[f32],
    stride: usize,
    first: usize,
    count: usize,
    rows: &Range<usize>,
    to: &mut [f32],
) {
    for (tile, to) in to.chunks_exact_mut(rows.len() * R).enumerate() {
        let units = R.min(count - tile * R);
        for (t, to) in rows.clone().zip(to.chunks_exact_mut(R)) {
            let start = t * stride + first + tile * R;
            to[..units].copy_from_slice(&from[start..start + units]);
            to[units..].fill(0.0);
        }
    }
}

/// `len` numbers of reused memory that start at a cache line, so that no vector load crosses one.
fn aligned(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    const LINE: usize = 16;
    if scratch.len() < len + LINE {
        scratch.resize(len + LINE, 0.0);
    }
    let start = scratch.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
    &mut scratch[start..start + len]
}

/// What each vector length of this machine makes of all units at once.
#[cfg(test)]
pub(super) fn with_every_vector_length(
    entry: Entry,
    operands: &ExpertOperands<'_>,
    segments: &[(Range<usize>, f64)],
) -> Vec<Vec<f64>> {
    fn run<S: Simd>(
        simd: Option<S>,
        entry: Entry,
        operands: &ExpertOperands<'_>,
        segments: &[(Range<usize>, f64)],
    ) -> Option<Vec<f64>> {
        let (simd, host) = (simd?, operands.host.as_ref()?);
        let (factors, mut out, mut scratch) =
            (Factors::new(entry, operands, host), vec![0.0; operands.width()], Vec::new());
        for (rows, scale) in segments {
            let (rows, scratch) = (rows.clone(), &mut scratch);
            let sums = Sums { factors: &factors, rows, first_unit: 0, scale: *scale, out: &mut out, scratch };
            Simd::vectorize(simd, sums);
        }
        Some(out)
    }
    let mut all = vec![run(Some(pulp::Scalar), entry, operands, segments)];
    #[cfg(target_arch = "x86_64")]
    all.extend([
        run(pulp::x86::V3::try_new(), entry, operands, segments),
        run(pulp::x86::V4::try_new(), entry, operands, segments),
    ]);
    all.into_iter().flatten().collect()
}
