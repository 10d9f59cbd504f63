//! Sizes as people write them: `512M`, `2G`, `64KiB`, `1048576`.

use serde::{Deserialize, Deserializer};

/// Reads a size in bytes. Suffixes are binary: `K`, `M`, `G`, `T`, each also as `KB`, `KiB`, and in lower case; `B` or
/// none means bytes. `0`–`2^64-1`, no sign, no fraction.
///
/// # Errors
/// A sentence that names the text.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, suffix) = trimmed.split_at(digits);
    let shift = match suffix.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("Size {text:?} is not a number with K, M, G or T, as in 512M")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("Size {text:?} is not a number with K, M, G or T, as in 512M"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("Size {text:?} is more than 2^64 bytes"))
}

/// Writes a size so that [`parse_size`] reads it back: `512M`, `1536K`, `1000`.
pub fn format_size(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    match units.iter().find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift) {
        Some((shift, unit)) => format!("{}{unit}", bytes >> shift),
        None => bytes.to_string(),
    }
}

/// In JSON a size is a number of bytes or such a text.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    match Size::deserialize(from)? {
        Size::Bytes(bytes) => Ok(bytes),
        Size::Text(text) => parse_size(&text).map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary_and_forgiving() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("512B", 512),
            ("64k", 64 << 10),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("512 mb", 512 << 20),
            (" 2G ", 2 << 30),
            ("3T", 3 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_text_in_the_sentence() {
        for text in ["", "M", "-1", "1.5G", "12Q", "0x10", "99999999999999999999", "18446744073709551615K"] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains(&format!("{text:?}")), "{error}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for bytes in [0, 1, 1000, 4096, 1536 << 10, 512 << 20, 3 << 30, 5 << 40, u64::MAX] {
            assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }
        assert_eq!(format_size(512 << 20), "512M");
        assert_eq!(format_size(1536 << 10), "1536K");
    }
}
