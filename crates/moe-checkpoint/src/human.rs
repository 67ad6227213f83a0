//! Numbers and names for people: what all reports, tables, pages and messages show. JSON keeps numbers as they are.

use std::fmt::Debug;

/// Bytes with a binary unit: `6.30 MiB`.
///
/// ```
/// use moe_checkpoint::human::size;
///
/// assert_eq!([size(0), size(1023), size(6_603_800)], ["0 B", "1023 B", "6.30 MiB"]);
/// ```
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (bytes.max(1).ilog2() / 10).min(4);
    match step {
        0 => format!("{bytes} B"),
        _ => format!("{:.2} {}", bytes as f64 / (1u64 << (10 * step)) as f64, UNITS[step as usize]),
    }
}

/// A count with separators: `3,301,504`.
///
/// ```
/// use moe_checkpoint::human::count;
///
/// assert_eq!([count(0), count(999), count(1000), count(3_301_504)], ["0", "999", "1,000", "3,301,504"]);
/// ```
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The name of a variant of an enum as files and options spell names, without its fields: `gate_up`.
///
/// ```
/// use moe_checkpoint::{ExpertLayout, ExpertMatrix, human::variant};
///
/// assert_eq!([variant(&ExpertMatrix::GateUp), variant(&ExpertLayout::PerExpert)], ["gate_up", "per_expert"]);
/// ```
pub fn variant(value: &impl Debug) -> String {
    let name = format!("{value:?}");
    let name = name.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    let mut text = String::with_capacity(name.len() + 4);
    let mut before = '_';
    for letter in name.chars() {
        if letter.is_uppercase() && (before.is_lowercase() || before.is_numeric()) {
            text.push('_');
        }
        text.extend(letter.to_lowercase());
        before = letter;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!([size(0), size(1023), size(1024), size(3 << 29)], ["0 B", "1023 B", "1.00 KiB", "1.50 GiB"]);
        assert_eq!([size(6_575_360), size(5 << 50)], ["6.27 MiB", "5120.00 TiB"]);
    }
}
