//! The format of the configuration: GLib's key file, as far as the agent needs it.
//!
//! ```text
//!   # comment
//!   [general]
//!   method = virtio-serial
//! ```
//!
//! Lines are key-value pairs of the group above them; space before a line, around the `=` and nowhere else does
//! not count. A backslash and one of `s n t r \` stand for space, newline, tab, carriage return and backslash.
//! What GLib (2.74) refuses is refused here.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// A file that is no key file, or a value that is none of its kind.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeyfileError {
    #[error("Line {0} stands before any group")]
    NoGroup(usize),
    #[error("Line {0} is not a key-value pair, group, or comment")]
    Line(usize),
    #[error("The value of '{0}' is not UTF-8")]
    NotUtf8(String),
    #[error("The value of '{0}' cannot be interpreted")]
    Value(String),
}

/// The only group that counts.
const GROUP: &[u8] = b"general";

/// All pairs of the group `general`, values as they stand in the file. A key may come more than once; the last
/// one is meant.
pub(super) fn pairs(text: &[u8]) -> Result<Vec<(String, &[u8])>, KeyfileError> {
    let mut pairs = Vec::new();
    let mut group = None;
    for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start();
        let wrong = || KeyfileError::Line(index + 1);
        match line {
            [] | [b'#', ..] => {}
            [b'[', rest @ ..] => {
                let name = rest.trim_ascii_end().strip_suffix(b"]").ok_or_else(wrong)?;
                let is_odd = |byte: &u8| matches!(byte, b'[' | b']') || byte.is_ascii_control();
                if name.is_empty() || name.iter().any(is_odd) {
                    return Err(wrong());
                }
                group = Some(name);
            }
            pair => {
                let group = group.ok_or(KeyfileError::NoGroup(index + 1))?;
                let at = pair.iter().position(|&byte| byte == b'=').filter(|&at| at > 0).ok_or_else(wrong)?;
                let key = pair[..at].trim_ascii_end();
                if key.contains(&b'[') != key.ends_with(b"]") {
                    return Err(wrong());
                }
                if group == GROUP {
                    let key = String::from_utf8_lossy(key).into_owned();
                    pairs.push((key, pair[at + 1..].trim_ascii_start()));
                }
            }
        }
    }
    Ok(pairs)
}

/// A value that is a string.
pub(super) fn string(key: &str, value: &[u8]) -> Result<String, KeyfileError> {
    let mut string = String::new();
    let text = str::from_utf8(value).map_err(|_| KeyfileError::NotUtf8(key.to_owned()))?;
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        string.push(match character {
            '\\' => match rest.next() {
                Some('s') => ' ',
                Some('n') => '\n',
                Some('t') => '\t',
                Some('r') => '\r',
                Some('\\') => '\\',
                _ => return Err(KeyfileError::Value(key.to_owned())),
            },
            other => other,
        });
    }
    Ok(string)
}

/// A value that is a truth.
pub(super) fn boolean(key: &str, value: &[u8]) -> Result<bool, KeyfileError> {
    match value.trim_ascii_end() {
        b"true" | b"1" => Ok(true),
        b"false" | b"0" => Ok(false),
        _ => Err(KeyfileError::Value(key.to_owned())),
    }
}

/// Appends a pair whose value reads back as `value`, provided that it is UTF-8.
pub(super) fn write_pair(text: &mut Vec<u8>, key: &str, value: &OsStr) {
    text.extend_from_slice(key.as_bytes());
    text.push(b'=');
    let mut leading = true;
    for &byte in value.as_bytes() {
        match byte {
            b' ' if leading => text.extend_from_slice(b"\\s"),
            b'\t' if leading => text.extend_from_slice(b"\\t"),
            b'\n' => text.extend_from_slice(b"\\n"),
            b'\r' => text.extend_from_slice(b"\\r"),
            b'\\' => text.extend_from_slice(b"\\\\"),
            other => text.push(other),
        }
        leading &= matches!(byte, b' ' | b'\t');
    }
    text.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str, key: &str) -> Option<String> {
        let pairs = pairs(text.as_bytes()).unwrap();
        let (_, value) = pairs.iter().rev().find(|(own, _)| own == key)?;
        Some(string(key, value).unwrap())
    }

    // What GLib 2.74 makes of the same lines was seen with qemu-ga 7.2 and --dump-conf.

    #[test]
    fn space_counts_only_within_and_behind_a_value() {
        assert_eq!(value("\n\n[general]\n\n   path =   1\n", "path").unwrap(), "1");
        assert_eq!(value("[general]\npath=a b  \t\n", "path").unwrap(), "a b  \t");
        assert_eq!(value("[general]  \npath=a", "path").unwrap(), "a");
        assert_eq!(value("[general]\r\npath=a\r\n", "path").unwrap(), "a");
        assert_eq!(
            value("[general]\npath=  \\s a\\tb\\nc\\rd\\\\e é\n", "path").unwrap(),
            "  a\tb\nc\rd\\e é"
        );
    }

    #[test]
    fn the_last_value_in_the_group_counts() {
        assert_eq!(value("[general]\npath=1\npath=2\n", "path").unwrap(), "2");
        assert_eq!(value("[general]\npath=1\n[x]\npath=2\n[general]\npath=3\n", "path").unwrap(), "3");
        assert_eq!(value("[general]\npath=1\n[x]\npath=2\n", "path").unwrap(), "1");
        assert_eq!(value("[General]\npath=1\n", "path"), None);
        assert_eq!(value("[general]\nPath=1\npath[de]=2\n", "path"), None);
    }

    #[test]
    fn comments_begin_with_a_number_sign_and_nothing_else() {
        assert_eq!(value("# a\n[general]\n  # b\n#\u{ff}\n#path=c\n", "path"), None);
        assert_eq!(value("[general]\npath=\"a\" # x\n", "path").unwrap(), "\"a\" # x");
        assert_eq!(value("[general]\n;path=a\n", "path"), None);
    }

    #[test]
    fn what_is_no_key_file_is_refused() {
        let wrong = |text: &[u8]| pairs(text).unwrap_err();
        assert_eq!(wrong(b"\npath=1\n"), KeyfileError::NoGroup(2));
        for line in ["path", "[general", "[general] x", "[]", "[gen]eral]", "=1", "path[x=1", "\u{feff}[a]"] {
            let text = format!("[general]\n{line}\npath=1\n");
            assert_eq!(wrong(text.as_bytes()), KeyfileError::Line(2), "{line}");
        }
        for text in ["a\\qb", "a\\", "a\\;b"] {
            assert_eq!(string("path", text.as_bytes()), Err(KeyfileError::Value("path".into())), "{text}");
        }
        assert_eq!(string("path", b"a\xff"), Err(KeyfileError::NotUtf8("path".into())));
    }

    #[test]
    fn a_truth_is_one_of_four_words() {
        let truth = |text: &str| boolean("x", text.as_bytes()).ok();
        assert_eq!(
            ["true", "true  ", "1", "0", "false"].map(truth).map(Option::unwrap),
            [true, true, true, false, false]
        );
        assert_eq!(["yes", "TRUE", "", "01", "2"].map(truth), [None; 5]);
    }

    #[test]
    fn what_is_written_reads_back() {
        for text in ["", "a", "  a  b ", "\t \ta\tb", "a\nb\rc\\d", "é=#;"] {
            let mut file = b"[general]\n".to_vec();
            write_pair(&mut file, "path", OsStr::new(text));
            let pairs = pairs(&file).unwrap();
            assert_eq!(string("path", pairs[0].1).unwrap(), text, "{:?}", String::from_utf8(file.clone()));
        }
    }
}
