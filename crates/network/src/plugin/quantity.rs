//! Parser of Kubernetes quantities (apimachinery, `resource.Quantity`): a decimal number with a
//! decimal suffix (`k`, `M`, ... and `m`, `u`, `n`), a binary suffix (`Ki`, `Mi`, ...) or an
//! exponent (`e3`).

/// Maximum length of the text, so that the digits fit an `i128`.
const MAX_LENGTH: usize = 38;

/// The value as a whole number, rounded away from zero; saturates at the limits of `i128`. None if
/// it is not a quantity.
pub fn parse(text: &str) -> Option<i128> {
    if text.len() > MAX_LENGTH {
        return None;
    }
    let (sign, rest) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = [whole, fraction].concat();
    // A second dot fails here.
    let mantissa: i128 = digits.parse().ok()?;
    let decimals = i64::try_from(fraction.len()).ok()?;
    let (twos, tens) = scale(suffix)?;
    let mut value = mantissa.saturating_mul(1 << twos);
    let tens = tens.saturating_sub(decimals);
    // With more steps the value would already be saturated or one.
    for _ in 0..tens.unsigned_abs().min(40) {
        value = match tens > 0 {
            true => value.saturating_mul(10),
            false => value / 10 + i128::from(value % 10 != 0),
        };
    }
    Some(sign * value)
}

/// Powers of two and of ten of a suffix.
fn scale(suffix: &str) -> Option<(u32, i64)> {
    Some(match suffix {
        "n" => (0, -9),
        "u" => (0, -6),
        "m" => (0, -3),
        "" => (0, 0),
        "k" => (0, 3),
        "M" => (0, 6),
        "G" => (0, 9),
        "T" => (0, 12),
        "P" => (0, 15),
        "E" => (0, 18),
        "Ki" => (10, 0),
        "Mi" => (20, 0),
        "Gi" => (30, 0),
        "Ti" => (40, 0),
        "Pi" => (50, 0),
        "Ei" => (60, 0),
        _ => (0, suffix.strip_prefix(['e', 'E'])?.parse().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_parsed_as_in_kubernetes() {
        for (text, value) in [
            ("0", 0),
            ("10M", 10_000_000),
            ("+10M", 10_000_000),
            ("-5M", -5_000_000),
            ("1.5G", 1_500_000_000),
            (".5k", 500),
            ("5.", 5),
            ("512Ki", 512 << 10),
            ("1.5Mi", 3 << 19),
            ("1P", 1_000_000_000_000_000),
            ("1E", 1_000_000_000_000_000_000),
            ("1e3", 1000),
            ("1E3", 1000),
            ("12e-1", 2),
            ("1500m", 2),
            ("1n", 1),
            ("0.0001", 1),
            ("7Ei", 7 << 60),
        ] {
            assert_eq!(parse(text), Some(value), "{text}");
        }
        assert_eq!(parse("1e99999999"), Some(i128::MAX));
        assert_eq!(parse("1e-9999999"), Some(1));
    }

    #[test]
    fn other_texts_are_not_quantities() {
        for text in [
            "",
            " 1",
            "1 ",
            "M",
            ".",
            "-",
            "1..2",
            "1.2.3",
            "--1",
            "1K",
            "1ki",
            "1MB",
            "1e",
            "1e1.5",
            "0x10",
            "fast",
            "1٣",
            &"1".repeat(100),
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
