//! Dates as `strftime` writes them.

use jiff::Timestamp;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use jiff::tz::TimeZone;
use minijinja::{Error, ErrorKind};

/// Directives that jiff has and Python has not, or means otherwise: microseconds, of which we know none.
const OTHERS: [char; 4] = ['f', 'N', 'Q', 'q'];

/// `datetime.strftime` in the C locale of a time in UTC; a directive that Python does not have is an error rather than
/// a wrong date.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let failed = |reason: String| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {reason}"));
    for directive in format.replace("%%", "").split('%').skip(1) {
        let letter = directive.trim_start_matches(|c: char| c.is_ascii_digit() || "-_^#:.".contains(c)).chars().next();
        if let Some(letter) = letter.filter(|letter| OTHERS.contains(letter)) {
            return Err(failed(format!("unsupported directive %{letter}")));
        }
    }
    let time = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    let time = time.ok_or_else(|| failed(format!("{seconds} seconds after 1970 are no date")))?;
    let config = Config::new().custom(PosixCustom::new());
    let time = BrokenDownTime::from(&time.to_zoned(TimeZone::UTC));
    time.to_string_with_config(&config, format).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_pythons() {
        // datetime.fromtimestamp(s, timezone.utc).strftime(…)
        let format = "%d %b %Y|%A %B %-d|%H:%M:%S|%I %p|%j|%y%m|%a %F %T %%";
        assert_eq!(
            strftime(format, 0).unwrap(),
            "01 Jan 1970|Thursday January 1|00:00:00|12 AM|001|7001|Thu 1970-01-01 00:00:00 %"
        );
        assert_eq!(
            strftime(format, 1_709_208_000).unwrap(),
            "29 Feb 2024|Thursday February 29|12:00:00|12 PM|060|2402|Thu 2024-02-29 12:00:00 %"
        );
        assert_eq!(
            strftime(format, 4_133_980_799).unwrap(),
            "31 Dec 2100|Friday December 31|23:59:59|11 PM|365|0012|Fri 2100-12-31 23:59:59 %"
        );
        let locale = "%c|%x|%X|%D|%e|%k|%l|%r|%R|%s|%u %w|%U %V %W|%G|%C|%Z %z|%h|%^a|%_d";
        assert_eq!(
            strftime(locale, 1_735_722_061).unwrap(),
            "Wed Jan  1 09:01:01 2025|01/01/25|09:01:01|01/01/25| 1| 9| 9|09:01:01 AM|09:01|1735722061|3 3|00 01 00|2025\
             |20|UTC +0000|Jan|WED| 1"
        );
    }

    #[test]
    fn what_is_no_directive_is_refused() {
        for (format, named) in [("%Q", "%Q"), ("a %% %06f", "%f"), ("%E", "`E`"), ("%", "end of format")] {
            let error = strftime(format, 0).unwrap_err().to_string();
            assert!(error.contains("strftime_now: ") && error.contains(named), "{format}: {error}");
        }
        assert_eq!(strftime("%%f 100%%", 0).unwrap(), "%f 100%");
        assert!(strftime("%Y", u64::MAX).is_err());
    }
}
