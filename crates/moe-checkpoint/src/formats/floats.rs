//! The small floats of quantized weights: E4M3, E8M0 and E2M1.

/// Value of an E8M0 byte, a power of two: 8 exponent bits with bias 127, all ones is NaN.
pub(crate) fn e8m0(byte: u8) -> f32 {
    match byte {
        u8::MAX => f32::NAN,
        exponent => 2f64.powi(i32::from(exponent) - 127) as f32,
    }
}

/// Value of an E4M3 byte: 4 exponent bits with bias 7, 3 mantissa bits, no infinities, `S.1111.111` is NaN.
pub(crate) fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xF), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * mantissa * 2f32.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

/// Values of the 4-bit floats E2M1.
pub(crate) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Values of the 4-bit codes NF4 (QLoRA, arXiv 2305.14314), as bitsandbytes has them: quantiles of a normal
/// distribution within [-1, 1].
pub(crate) const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The NF4 code nearest to a value, the lower one on a tie.
pub(crate) fn to_nf4(value: f32) -> u8 {
    NF4.windows(2).filter(|pair| value > (pair[0] + pair[1]) / 2.0).count() as u8
}

/// Largest value of E4M3.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// Values of all 256 bytes as E4M3.
pub(crate) fn e4m3_levels() -> Vec<f32> {
    (0..=u8::MAX).map(e4m3).collect()
}

/// Values of the 16 codes of E2M1, repeated over all bytes.
pub(crate) fn e2m1_levels() -> Vec<f32> {
    (0..256).map(|code| E2M1[code % 16]).collect()
}

/// The E4M3 byte nearest to a value, ties to the even mantissa; values beyond the range become the largest one.
pub(crate) fn to_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let size = value.abs().min(E4M3_MAX);
    // Steps are those of the exponent, from 2^-9 below the normal range on.
    let exponent = (size.to_bits() >> 23) as i32 - 127;
    let exponent = exponent.max(-6);
    let steps = (size * 2f32.powi(3 - exponent)).round_ties_even() as i32;
    // 8 steps carry into the next exponent by themselves: the codes of positive values count upwards.
    let code = (exponent + 6) * 8 + steps;
    sign | code.clamp(0, 0x7E) as u8
}

/// The E2M1 code nearest to a value, ties to the even mantissa; values beyond the range become the largest one.
pub(crate) fn to_e2m1(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 8 } else { 0 };
    let size = value.abs();
    // The values halfway between neighbours; a tie goes to the code whose last bit is 0.
    const HALVES: [(f32, bool); 7] =
        [(0.25, false), (0.75, true), (1.25, false), (1.75, true), (2.5, false), (3.5, true), (5.0, false)];
    sign | HALVES.iter().filter(|(half, up)| size > *half || (*up && size == *half)).count() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_the_values_of_its_definition() {
        assert_eq!([0x00, 0x01, 0x08, 0x38, 0x7E, 0xB8].map(e4m3), [0.0, 1.0 / 512.0, 1.0 / 64.0, 1.0, 448.0, -1.0]);
        assert!(e4m3(0x7F).is_nan() && e4m3(0xFF).is_nan() && e4m3(0x80).is_sign_negative());
    }

    #[test]
    fn e8m0_is_a_power_of_two() {
        assert_eq!([0, 126, 127, 130, 254].map(e8m0), [2f32.powi(-127), 0.5, 1.0, 8.0, 2f32.powi(127)]);
        assert!(e8m0(255).is_nan());
    }

    /// Every value goes to its own code, everything between two neighbours to the nearer one and a tie to the even
    /// code.
    fn rounds(codes: &[u8], value: fn(u8) -> f32, nearest: fn(f32) -> u8) {
        for (low, high) in codes.iter().zip(&codes[1..]) {
            let (a, b) = (value(*low), value(*high));
            assert_eq!(nearest(a), *low);
            assert_eq!(nearest(-a), *low | nearest(-0.0));
            let half = (a + b) / 2.0;
            assert_eq!(nearest(half), if low % 2 == 0 { *low } else { *high }, "{half}");
            assert_eq!((nearest(half.next_down()), nearest(half.next_up())), (*low, *high));
        }
        let last = codes[codes.len() - 1];
        assert_eq!([nearest(value(last)), nearest(1e30), nearest(f32::INFINITY)], [last; 3]);
    }

    #[test]
    fn small_floats_round_to_nearest_even() {
        rounds(&(0..0x7F).collect::<Vec<_>>(), e4m3, to_e4m3);
        rounds(&(0..8).collect::<Vec<_>>(), |code| E2M1[usize::from(code)], to_e2m1);
    }
}
