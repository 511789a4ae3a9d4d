//! The `strftime_now` of chat templates: Python's `strftime` in the C locale, in UTC.
//!
//! Transformers tells the local time; a server tells every client the same, wherever it runs.

use std::time::{SystemTime, UNIX_EPOCH};

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
const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];

/// `now` by `pattern`, with the directives that templates use. Others are an error, not a guess.
pub(super) fn format(now: SystemTime, pattern: &str) -> Result<String, Error> {
    // A clock before 1970 is wrong whatever one prints.
    let seconds = now
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let date = Date::of_day(days);
    let (hour, minute, second) = (
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
    );
    let hour_of_12 = (hour + 11) % 12 + 1;
    let weekday = DAYS[((days + 4) % 7) as usize];
    let month = MONTHS[date.month as usize - 1];

    let mut out = String::new();
    let mut rest = pattern.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = rest.next();
        // glibc's flag for "no padding", which templates made on Linux use.
        let (bare, directive) = match directive {
            Some('-') => (true, rest.next()),
            other => (false, other),
        };
        let padded = |number: u64, width: usize| {
            if bare {
                number.to_string()
            } else {
                format!("{number:0width$}")
            }
        };
        out.push_str(&match directive {
            Some('Y') => date.year.to_string(),
            Some('y') => padded(date.year % 100, 2),
            Some('m') => padded(date.month, 2),
            Some('B') => month.to_owned(),
            Some('b' | 'h') => month[..3].to_owned(),
            Some('d') => padded(date.day, 2),
            Some('e') if bare => date.day.to_string(),
            Some('e') => format!("{:2}", date.day),
            Some('j') => padded(date.day_of_year, 3),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => padded(hour, 2),
            Some('I') => padded(hour_of_12, 2),
            Some('M') => padded(minute, 2),
            Some('S') => padded(second, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{}-{:02}-{:02}", date.year, date.month, date.day),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!(
                        "strftime_now does not know the directive `%{}`",
                        other.map_or(String::new(), String::from)
                    ),
                ));
            }
        });
    }
    Ok(out)
}

struct Date {
    year: u64,
    month: u64,
    day: u64,
    day_of_year: u64,
}

impl Date {
    /// The date of a day since 1970-01-01 (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
    fn of_day(days: u64) -> Date {
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_from_march + 2) / 153;
        let day = day_from_march - (153 * month_from_march + 2) / 5 + 1;
        let month = (month_from_march + 2) % 12 + 1;
        let year = 400 * era + year_of_era + u64::from(month <= 2);
        let leap =
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let before_month =
            [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize - 1];
        Date {
            year,
            month,
            day,
            day_of_year: before_month + day + u64::from(leap && month > 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Expected values are Python's `datetime.fromtimestamp(seconds, timezone.utc).strftime(pattern)`.
    #[test]
    fn dates_are_pythons() {
        const PATTERN: &str = "%Y-%m-%d %H:%M:%S %B %b %A %a %y %j %I %p %e %F %T %%";
        for (seconds, expected) in [
            (
                0,
                "1970-01-01 00:00:00 January Jan Thursday Thu 70 001 12 AM  1 1970-01-01 00:00:00 %",
            ),
            (
                951_868_799,
                "2000-02-29 23:59:59 February Feb Tuesday Tue 00 060 11 PM 29 2000-02-29 23:59:59 %",
            ),
            (
                951_868_800,
                "2000-03-01 00:00:00 March Mar Wednesday Wed 00 061 12 AM  1 2000-03-01 00:00:00 %",
            ),
            (
                1_735_646_400,
                "2024-12-31 12:00:00 December Dec Tuesday Tue 24 366 12 PM 31 2024-12-31 12:00:00 %",
            ),
            (
                4_107_542_400,
                "2100-03-01 00:00:00 March Mar Monday Mon 00 060 12 AM  1 2100-03-01 00:00:00 %",
            ),
        ] {
            let now = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(format(now, PATTERN).unwrap(), expected);
        }
        let now = UNIX_EPOCH + Duration::from_secs(951_868_800);
        assert_eq!(format(now, "%-d/%-m").unwrap(), "1/3");
        assert!(format(now, "%Q").is_err());
        assert!(format(now, "50%").is_err());
    }
}
