//! Dates as `strftime` writes them.

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `datetime.strftime` in the C locale for the directives templates use; an unknown one is an error rather than a wrong
/// date.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let year_start = days_before_year(year);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        // glibc's "no padding".
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let number = |value: u64, width: usize| if padded { format!("{value:0width$}") } else { value.to_string() };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month as u64, 2),
            Some('d') => number(day, 2),
            Some('H') => number(second / 3600, 2),
            Some('I') => number((second / 3600 + 11) % 12 + 1, 2),
            Some('M') => number(second / 60 % 60, 2),
            Some('S') => number(second % 60, 2),
            Some('j') => number(days - year_start + 1, 3),
            Some('p') => (if second < 43_200 { "AM" } else { "PM" }).to_owned(),
            Some('B') => MONTHS[month - 1].to_owned(),
            Some('b') => MONTHS[month - 1][..3].to_owned(),
            Some('A') => DAYS[(days % 7) as usize].to_owned(),
            Some('a') => DAYS[(days % 7) as usize][..3].to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60),
            Some('%') => "%".to_owned(),
            other => {
                let found = other.map_or("%".to_owned(), |c| format!("%{c}"));
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now: unsupported directive {found}"),
                ));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Days from 1970-01-01 to January 1 of `year`.
fn days_before_year(year: u64) -> u64 {
    let leap_days = |year: u64| (year - 1) / 4 - (year - 1) / 100 + (year - 1) / 400;
    (year - 1970) * 365 + leap_days(year) - leap_days(1970)
}

/// Year, month from 1 and day of the month of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, usize, u64) {
    // At least the year before the right one: years have at most 366 days.
    let mut year = 1970 + days / 366;
    while days_before_year(year + 1) <= days {
        year += 1;
    }
    let mut rest = days - days_before_year(year);
    let february = if is_leap(year) { 29 } else { 28 };
    for (month, length) in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31].into_iter().enumerate() {
        if rest < length {
            return (year, month + 1, rest + 1);
        }
        rest -= length;
    }
    unreachable!("a day of the year is in one of its months")
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
        assert!(strftime("%Q", 0).unwrap_err().to_string().contains("unsupported directive %Q"));
    }
}
