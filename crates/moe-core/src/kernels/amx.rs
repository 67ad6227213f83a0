//! Products of f32 activations with bf16 weights on the matrix units (AMX) of recent x86 processors, exact to f32.
//!
//! An f32 number is the sum of three bf16 numbers (8 + 8 + 8 bits of mantissa). Checkpoints store weights as bf16, so
//! `x w = hi w + mid w + lo w` holds exactly, product by product, and three bf16 tile products with f32 accumulation
//! replace one f32 product: the result differs from an f32 matrix product only by the order of summation, at several
//! times its speed. Weights are read from the checkpoint in half the memory, without a conversion. Where activations
//! may be rounded to bf16 one product is enough.
//!
//! Operands are packed into tiles of 1 KiB, 16 rows of 64 bytes, that follow each other in the order in which they are
//! used:
//!
//! | operand | tile row | tile column | order of tiles |
//! |---|---|---|---|
//! | activations `[M, K]` | 16 rows of M | 32 of K | `[M / 16][K / 32][hi, mid, lo]`, or one tile if rounded |
//! | weights `[K, N]` | 16 pairs of K | 16 of N, each a pair | `[N / 16][K / 32]` |
//!
//! Available on Linux where the processor has AMX and the kernel grants its use; `MOE_AMX=0` in the environment turns
//! it off.

use std::{arch::asm, cell::RefCell, sync::OnceLock};

use multiversion::multiversion;
use rayon::prelude::*;

use super::{
    bf16_dot::round_row,
    packed::{DEPTH, Line, PackedWeights, TILE, Target, ZERO},
};

/// Pieces of an f32 number.
const PIECES: usize = 3;

/// Whether this process may use the matrix units.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if std::env::var_os("MOE_AMX").is_some_and(|v| v == "0") {
            return false;
        }
        // cpuid leaf 7: edx bit 22 AMX-BF16, bit 24 AMX-TILE
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        let wanted = (1 << 22) | (1 << 24);
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: asks the kernel for permission to use tile data in this process; touches no memory.
        leaf.edx & wanted == wanted
            && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) } == 0
    })
}

thread_local! {
    /// Packed activations of the calls of one thread: as large as its largest call, kept for the next.
    static ACTIVATIONS: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Packs `x [m, k]`, k > 0, into tiles, each number in `P` pieces. Every line of the tiles is written.
fn pack_activations<'a, const P: usize>(x: &[f32], m: usize, k: usize, buffer: &'a mut Vec<Line>) -> &'a [Line] {
    let per_block = k.div_ceil(DEPTH) * P * TILE;
    let lines = m.div_ceil(TILE) * per_block;
    if buffer.len() < lines {
        buffer.resize(lines, ZERO);
    }
    let tiles = &mut buffer[..lines];
    let split = |x: &[f32], row: usize, tiles: &mut [Line]| match P == PIECES {
        true => split_row(x, row, tiles),
        false => round_row(x, &mut tiles[row..], TILE),
    };
    tiles.par_chunks_mut(per_block).zip(x.par_chunks(TILE * k)).for_each(|(tiles, rows)| {
        for (row, x) in rows.chunks_exact(k).enumerate() {
            split(x, row, tiles);
        }
        for tile in tiles.chunks_exact_mut(TILE) {
            tile[rows.len() / k..].fill(ZERO);
        }
    });
    tiles
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512dq+avx512bw+fma", "x86_64+avx2+fma"))]
fn split_row(x: &[f32], row: usize, tiles: &mut [Line]) {
    const HIGH: u32 = 0xFFFF_0000;
    let (blocks, tail) = x.as_chunks::<DEPTH>();
    let mut padded = [0.0f32; DEPTH];
    padded[..tail.len()].copy_from_slice(tail);
    let last = (!tail.is_empty()).then_some(&padded);
    for (block, tiles) in blocks.iter().chain(last).zip(tiles.chunks_exact_mut(PIECES * TILE)) {
        // Written in place: going through an array on the stack would stall on loads wider than the stores before them.
        let (high_tile, rest) = tiles.split_at_mut(TILE);
        let (middle_tile, low_tile) = rest.split_at_mut(TILE);
        let (high_line, middle_line, low_line) = (&mut high_tile[row].0, &mut middle_tile[row].0, &mut low_tile[row].0);
        for i in 0..DEPTH {
            // Cutting off low bits leaves an exact remainder each time.
            let high = block[i].to_bits() & HIGH;
            let rest = block[i] - f32::from_bits(high);
            let middle = rest.to_bits() & HIGH;
            let low = rest - f32::from_bits(middle);
            high_line[i] = (high >> 16) as u16;
            middle_line[i] = (middle >> 16) as u16;
            low_line[i] = (low.to_bits() >> 16) as u16;
        }
    }
}

/// Output columns of one task.
const TASK_COLUMNS: usize = 256;
/// Bytes of packed activations that a task goes through for every 32 columns: half of a second-level cache.
const ACTIVATION_BYTES: usize = 1 << 20;
/// Tiles of two panels of weights that the first-level cache holds beside the activations that stream through it.
const CACHED_DEPTH: usize = 16;

/// `x w` for `x [m, k]` row-major and `w [k, n]`: `[m, n]` row-major.
///
/// The sum over k goes in the same order for every row, whatever m is.
pub fn multiply(x: &[f32], m: usize, w: &PackedWeights) -> Vec<f32> {
    multiply_in::<PIECES>(x, m, w)
}

/// `bf16(x) w`, in the same order of sums; for processors that round to bf16 ([`bf16_dot`](super::bf16_dot)).
pub fn multiply_rounded(x: &[f32], m: usize, w: &PackedWeights) -> Vec<f32> {
    multiply_in::<1>(x, m, w)
}

/// With activations in `P` pieces.
fn multiply_in<const P: usize>(x: &[f32], m: usize, w: &PackedWeights) -> Vec<f32> {
    assert_eq!(x.len(), m * w.k, "activations [m, k]");
    assert!(available(), "the processor has matrix units");
    if m == 0 || w.n == 0 || w.k == 0 {
        return vec![0.0; m * w.n];
    }
    // Taken out while in use: a nested call on this thread (rayon may steal one) finds an empty buffer, not a borrowed
    // one.
    let mut buffer = ACTIVATIONS.take();
    let out = multiply_packed::<P>(pack_activations::<P>(x, m, w.k, &mut buffer), m, w);
    ACTIVATIONS.set(buffer);
    out
}

fn multiply_packed<const P: usize>(activations: &[Line], m: usize, w: &PackedWeights) -> Vec<f32> {
    let n = w.n;
    let depth = w.k.div_ceil(DEPTH);
    let per_block = depth * P * TILE;
    // an even number of 16-row blocks
    let task_blocks = (ACTIVATION_BYTES / (per_block * 64)).next_multiple_of(2).max(2);
    let row_blocks = m.div_ceil(TILE);
    let tasks: Vec<(usize, usize)> = (0..row_blocks)
        .step_by(task_blocks)
        .flat_map(|row| (0..n).step_by(TASK_COLUMNS).map(move |column| (row, column)))
        .collect();
    // Three pieces use a tile of weights three times, one only once: weights then stay in the first-level cache.
    let step = if P == PIECES { depth } else { CACHED_DEPTH };
    let mut out: Vec<f32> = Vec::with_capacity(m * n);
    let target = Target(out.as_mut_ptr());
    tasks.par_iter().for_each(|&(first_block, first_column)| {
        let target = &target;
        let tiles = Tiles::configure();
        let mut scratch: Scratch = [0.0; 4 * TILE * TILE];
        for column in (first_column..n.min(first_column + TASK_COLUMNS)).step_by(2 * TILE) {
            let columns = (n - column).min(2 * TILE);
            let left = w.panel(column);
            // a missing second half repeats the first; its result is not copied out
            let right = if columns > TILE { w.panel(column + TILE) } else { left };
            for from in (0..depth).step_by(step) {
                let to = depth.min(from + step);
                let (left, right) = (&left[from * TILE..to * TILE], &right[from * TILE..to * TILE]);
                for block in (first_block..row_blocks.min(first_block + task_blocks)).step_by(2) {
                    let row = block * TILE;
                    let rows = (m - row).min(2 * TILE);
                    let tile = |block: usize| &activations[block * per_block..][from * P * TILE..to * P * TILE];
                    let bottom = if rows > TILE { tile(block + 1) } else { tile(block) };
                    let operands = Operands { a: [tile(block), bottom], b: [left, right], depth: to - from };
                    // SAFETY: panels hold `to - from` tiles and row blocks `P` times as many; `out` has room for m x n,
                    // and the block at (row, column) belongs to this task alone.
                    unsafe {
                        let out = target.0.add(row * n + column);
                        tiles.block::<P>([rows, columns], operands, from > 0, out, n, &mut scratch);
                    }
                }
            }
        }
    });
    // SAFETY: the tasks cover all rows and columns, so every element has been written.
    unsafe { out.set_len(m * n) };
    out
}

/// A block of the product.
type Scratch = [f32; 4 * TILE * TILE];

/// Tiles of a block of the product: two row blocks of activations, two panels of weights.
#[derive(Clone, Copy)]
struct Operands<'a> {
    a: [&'a [Line]; 2],
    b: [&'a [Line]; 2],
    /// Tiles of weights in a panel.
    depth: usize,
}

/// The tile registers of this thread, configured as eight tiles of 16 rows of 64 bytes until dropped.
struct Tiles;

#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Fetches lines of the activation tiles of the next step into the first-level cache: they stream from the second
/// level, and a tile load that misses stalls the product behind it.
macro_rules! fetch_ahead {
    ($($offset:literal)*) => {
        concat!($("prefetcht0 [{a0} + ", $offset, "]\nprefetcht0 [{a1} + ", $offset, "]\n"),*)
    };
}

impl Tiles {
    /// Only called where [`available`] has been true, which [`multiply`] asks for.
    fn configure() -> Self {
        let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(TILE as u8);
        // SAFETY: a valid configuration of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Self
    }

    /// A block of up to 32 x 32 of the product, beside what is there already if `add`. `stride` is in elements. One
    /// that is not whole goes through the scratch.
    ///
    /// # Safety
    /// `out` has as many rows and columns, `stride` apart; activations have `P` tiles for every tile of weights, and
    /// those of weights are at least `depth` in each panel.
    unsafe fn block<const P: usize>(
        &self,
        [rows, columns]: [usize; 2],
        x: Operands<'_>,
        add: bool,
        out: *mut f32,
        stride: usize,
        scratch: &mut Scratch,
    ) {
        debug_assert!(x.a.iter().all(|a| a.len() == x.depth * P * TILE) && (P == 1 || !add));
        let scratch = scratch.as_mut_ptr();
        let whole = rows == 2 * TILE && columns == 2 * TILE;
        let (to, width) = if whole { (out, stride) } else { (scratch, 2 * TILE) };
        // SAFETY: as the caller says; the scratch is a whole block.
        unsafe {
            let line = |row: usize| (out.add(row * stride), scratch.add(row * 2 * TILE));
            if !whole && add {
                for (out, scratch) in (0..rows).map(line) {
                    std::ptr::copy_nonoverlapping(out, scratch, columns);
                }
            }
            match (P == PIECES, rows > TILE) {
                (true, true) => self.exact(x, to, width),
                (true, false) => self.exact_half(x, to, width),
                (false, true) => self.rounded(x, add, to, width),
                (false, false) => self.rounded_half(x, add, to, width),
            }
            if !whole {
                for (out, scratch) in (0..rows).map(line) {
                    std::ptr::copy_nonoverlapping(scratch, out, columns);
                }
            }
        }
    }

    /// # Safety
    /// As [`block`](Self::block), with three pieces.
    unsafe fn exact(&self, Operands { a, b, depth }: Operands<'_>, out: *mut f32, stride: usize) {
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{b0} + {line}]",
                "tileloadd tmm7, [{b1} + {line}]",
                "tileloadd tmm4, [{a0} + {line}]",
                "tileloadd tmm5, [{a1} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                fetch_ahead!(3072 3136 3200 3264),
                "tdpbf16ps tmm1, tmm4, tmm7",
                fetch_ahead!(3328 3392 3456 3520),
                "tdpbf16ps tmm2, tmm5, tmm6",
                fetch_ahead!(3584 3648 3712 3776),
                "tdpbf16ps tmm3, tmm5, tmm7",
                fetch_ahead!(3840 3904 3968 4032),
                "tileloadd tmm4, [{a0} + {line} + 1024]",
                "tileloadd tmm5, [{a1} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                fetch_ahead!(4096 4160 4224 4288),
                "tdpbf16ps tmm1, tmm4, tmm7",
                fetch_ahead!(4352 4416 4480 4544),
                "tdpbf16ps tmm2, tmm5, tmm6",
                fetch_ahead!(4608 4672 4736 4800),
                "tdpbf16ps tmm3, tmm5, tmm7",
                fetch_ahead!(4864 4928 4992 5056),
                "tileloadd tmm4, [{a0} + {line} + 2048]",
                "tileloadd tmm5, [{a1} + {line} + 2048]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                fetch_ahead!(5120 5184 5248 5312),
                "tdpbf16ps tmm1, tmm4, tmm7",
                fetch_ahead!(5376 5440 5504 5568),
                "tdpbf16ps tmm2, tmm5, tmm6",
                fetch_ahead!(5632 5696 5760 5824),
                "tdpbf16ps tmm3, tmm5, tmm7",
                fetch_ahead!(5888 5952 6016 6080),
                "add {a0}, 3072",
                "add {a1}, 3072",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {depth}",
                "jnz 2b",
                "tilestored [{out} + {stride}], tmm0",
                "tilestored [{out} + {stride} + 64], tmm1",
                "tilestored [{lower} + {stride}], tmm2",
                "tilestored [{lower} + {stride} + 64], tmm3",
                a0 = inout(reg) a[0].as_ptr() => _,
                a1 = inout(reg) a[1].as_ptr() => _,
                b0 = inout(reg) b[0].as_ptr() => _,
                b1 = inout(reg) b[1].as_ptr() => _,
                depth = inout(reg) depth => _,
                out = in(reg) out,
                lower = in(reg) out.add(TILE * stride),
                stride = in(reg) 4 * stride,
                line = in(reg) 64usize,
                options(nostack),
            );
        }
    }

    /// # Safety
    /// As [`block`](Self::block), with three pieces and 16 rows.
    unsafe fn exact_half(&self, Operands { a, b, depth }: Operands<'_>, out: *mut f32, stride: usize) {
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm6, [{b0} + {line}]",
                "tileloadd tmm7, [{b1} + {line}]",
                "tileloadd tmm4, [{a0} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{a0} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{a0} + {line} + 2048]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a0}, 3072",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {depth}",
                "jnz 2b",
                "tilestored [{out} + {stride}], tmm0",
                "tilestored [{out} + {stride} + 64], tmm1",
                a0 = inout(reg) a[0].as_ptr() => _,
                b0 = inout(reg) b[0].as_ptr() => _,
                b1 = inout(reg) b[1].as_ptr() => _,
                depth = inout(reg) depth => _,
                out = in(reg) out,
                stride = in(reg) 4 * stride,
                line = in(reg) 64usize,
                options(nostack),
            );
        }
    }

    /// # Safety
    /// As [`block`](Self::block), with one piece.
    unsafe fn rounded(&self, Operands { a, b, depth }: Operands<'_>, add: bool, out: *mut f32, stride: usize) {
        unsafe {
            asm!(
                "test {add}, {add}",
                "jnz 3f",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "jmp 2f",
                "3:",
                "tileloadd tmm0, [{out} + {stride}]",
                "tileloadd tmm1, [{out} + {stride} + 64]",
                "tileloadd tmm2, [{lower} + {stride}]",
                "tileloadd tmm3, [{lower} + {stride} + 64]",
                "2:",
                "tileloadd tmm6, [{b0} + {line}]",
                "tileloadd tmm4, [{a0} + {line}]",
                "tileloadd tmm7, [{b1} + {line}]",
                "tileloadd tmm5, [{a1} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                fetch_ahead!(1024 1088 1152 1216),
                "tdpbf16ps tmm1, tmm4, tmm7",
                fetch_ahead!(1280 1344 1408 1472),
                "tdpbf16ps tmm2, tmm5, tmm6",
                fetch_ahead!(1536 1600 1664 1728),
                "tdpbf16ps tmm3, tmm5, tmm7",
                fetch_ahead!(1792 1856 1920 1984),
                "add {a0}, 1024",
                "add {a1}, 1024",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {depth}",
                "jnz 2b",
                "tilestored [{out} + {stride}], tmm0",
                "tilestored [{out} + {stride} + 64], tmm1",
                "tilestored [{lower} + {stride}], tmm2",
                "tilestored [{lower} + {stride} + 64], tmm3",
                a0 = inout(reg) a[0].as_ptr() => _,
                a1 = inout(reg) a[1].as_ptr() => _,
                b0 = inout(reg) b[0].as_ptr() => _,
                b1 = inout(reg) b[1].as_ptr() => _,
                depth = inout(reg) depth => _,
                add = in(reg) usize::from(add),
                out = in(reg) out,
                lower = in(reg) out.add(TILE * stride),
                stride = in(reg) 4 * stride,
                line = in(reg) 64usize,
                options(nostack),
            );
        }
    }

    /// # Safety
    /// As [`block`](Self::block), with one piece and 16 rows.
    unsafe fn rounded_half(&self, Operands { a, b, depth }: Operands<'_>, add: bool, out: *mut f32, stride: usize) {
        unsafe {
            asm!(
                "test {add}, {add}",
                "jnz 3f",
                "tilezero tmm0",
                "tilezero tmm1",
                "jmp 2f",
                "3:",
                "tileloadd tmm0, [{out} + {stride}]",
                "tileloadd tmm1, [{out} + {stride} + 64]",
                "2:",
                "tileloadd tmm6, [{b0} + {line}]",
                "tileloadd tmm4, [{a0} + {line}]",
                "tileloadd tmm7, [{b1} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a0}, 1024",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {depth}",
                "jnz 2b",
                "tilestored [{out} + {stride}], tmm0",
                "tilestored [{out} + {stride} + 64], tmm1",
                a0 = inout(reg) a[0].as_ptr() => _,
                b0 = inout(reg) b[0].as_ptr() => _,
                b1 = inout(reg) b[1].as_ptr() => _,
                depth = inout(reg) depth => _,
                add = in(reg) usize::from(add),
                out = in(reg) out,
                stride = in(reg) 4 * stride,
                line = in(reg) 64usize,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: gives the tile state back; nothing is kept in it.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::bf16_dot;
    use crate::kernels::packed::testing::{check_products, check_rows, nearest, values};

    #[test]
    fn three_pieces_make_up_an_f32_exactly() {
        for x in values(1000, 7).into_iter().chain([0.0, -0.0, 1.0, 3.4e38, 1.1754944e-30, -2.5]) {
            let mut tiles = [ZERO; 48];
            split_row(&[x], 3, &mut tiles);
            let piece = |p: usize| f32::from_bits(u32::from(tiles[p * 16 + 3].0[0]) << 16) as f64;
            assert_eq!(piece(0) + piece(1) + piece(2), x as f64);
        }
    }

    #[test]
    fn products_are_as_accurate_as_f32_in_both_orientations_and_at_every_edge() {
        if available() {
            check_products(multiply, |x| x);
        }
    }

    #[test]
    fn products_of_rounded_activations_are_summed_in_f32_in_both_orientations_and_at_every_edge() {
        if available() && bf16_dot::available() {
            check_products(multiply_rounded, nearest);
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        if available() {
            check_rows(multiply);
            if bf16_dot::available() {
                check_rows(multiply_rounded);
            }
        }
    }
}
