//! Numbers for people.

pub use moe_checkpoint::human::{count, size};

/// A number of bytes: `2GiB`, `500 MB`, `1.5G` (binary, as `GiB`), `1048576`.
///
/// # Errors
/// A message that says what a size looks like.
///
/// ```
/// assert_eq!(moe::format::parse_size("1.5GiB"), Ok(3 << 29));
/// assert!(moe::format::parse_size("-1").is_err());
/// ```
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("found `{text}`, expected a size above 0 such as 2GiB, 500MB or a number of bytes");
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..digits].parse().map_err(|_| bad())?;
    let unit: f64 = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(bad()),
    };
    let bytes = number * unit;
    if bytes >= 1.0 && bytes < u64::MAX as f64 { Ok(bytes as u64) } else { Err(bad()) }
}

/// A fraction as percents, with a decimal where it needs one: `50%`, `66.7%`.
pub fn percent(fraction: f64) -> String {
    format!("{}%", trimmed(&format!("{:.1}", 100.0 * fraction)))
}

/// A number of about three digits, whatever its size: `0.985`, `23.2`, `4.1e6`.
pub fn short(value: f64) -> String {
    match value.abs() {
        magnitude if !magnitude.is_finite() => value.to_string(),
        magnitude if magnitude >= 1e5 => format!("{value:.1e}"),
        magnitude if magnitude >= 100.0 => format!("{value:.0}"),
        magnitude if magnitude >= 10.0 => format!("{value:.1}"),
        0.0 => "0".into(),
        magnitude if magnitude < 1e-3 => format!("{value:.1e}"),
        magnitude if magnitude < 1.0 => format!("{value:.3}"),
        _ => format!("{value:.2}"),
    }
}

/// [`short`] without zeros that say nothing, for axes: `0.5`, `20`, `1e-6`.
pub fn tick(value: f64) -> String {
    let text = short(value);
    match text.split_once('e') {
        Some((digits, exponent)) => format!("{}e{exponent}", trimmed(digits)),
        None => trimmed(&text).to_string(),
    }
}

/// Without zeros at the end of its decimals.
fn trimmed(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([size(0), size(1023), size(6_603_800)], ["0 B", "1023 B", "6.30 MiB"]);
        assert_eq!([count(0), count(999), count(1000), count(3301504)], ["0", "999", "1,000", "3,301,504"]);
        assert_eq!([percent(0.5), percent(2.0 / 3.0), percent(0.125)], ["50%", "66.7%", "12.5%"]);
        assert_eq!(
            [0.0, 0.985, 23.19, 1234.5, 4.1e6, 2e-7].map(short),
            ["0", "0.985", "23.2", "1234", "4.1e6", "2.0e-7"]
        );
    }
}
