//! One ASCII line per message, in QEMU's spacing.

use std::io;

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter};

/// Encodes a message as one line without its terminator.
///
/// `", "` and `": "` separate; everything outside printable ASCII is escaped as `\uXXXX` with
/// upper-case digits, characters beyond the basic plane as surrogate pairs. Infinite doubles and NaN
/// become `null`. A value that cannot be represented at all (a map with keys that are not strings)
/// becomes `null` too: messages are built from types that have no such keys.
///
/// ```
/// assert_eq!(protocol::encode(&serde_json::json!({"return": ["é", 1]})), r#"{"return": ["\u00E9", 1]}"#);
/// ```
pub fn encode(message: &impl Serialize) -> String {
    let mut line = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut line, Spaced);
    if message.serialize(&mut serializer).is_err() {
        return "null".into();
    }
    // The formatter writes ASCII only, so nothing is ever replaced here.
    String::from_utf8(line).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let is_plain = |character: char| character.is_ascii() && character != '\u{7F}';
        let mut rest = fragment;
        while let Some(special) = rest.chars().find(|&character| !is_plain(character)) {
            let at = rest.find(special).unwrap_or(rest.len());
            writer.write_all(&rest.as_bytes()[..at])?;
            for unit in special.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04X}")?;
            }
            rest = &rest[at + special.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        let short: &[u8] = match escape {
            CharEscape::Quote => b"\\\"",
            CharEscape::ReverseSolidus => b"\\\\",
            CharEscape::Solidus => b"/",
            CharEscape::Backspace => b"\\b",
            CharEscape::FormFeed => b"\\f",
            CharEscape::LineFeed => b"\\n",
            CharEscape::CarriageReturn => b"\\r",
            CharEscape::Tab => b"\\t",
            CharEscape::AsciiControl(byte) => return write!(writer, "\\u{byte:04X}"),
        };
        writer.write_all(short)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::encode;

    #[test]
    fn everything_outside_printable_ascii_is_escaped() {
        let text = "é€😀\u{1}\u{7f}/'\"\\\n";
        assert_eq!(encode(&text), r#""\u00E9\u20AC\uD83D\uDE00\u0001\u007F/'\"\\\n""#);
    }

    #[test]
    fn members_and_elements_are_separated_like_qemu_does() {
        assert_eq!(
            encode(&json!({"a": [1, 2, {}], "b": [], "c": null})),
            r#"{"a": [1, 2, {}], "b": [], "c": null}"#
        );
    }

    #[test]
    fn keys_are_escaped_too() {
        assert_eq!(encode(&json!({"ü\"": 1})), r#"{"\u00FC\"": 1}"#);
    }

    #[test]
    fn doubles_that_json_cannot_hold_become_null() {
        assert_eq!(encode(&[f64::INFINITY, f64::NAN, 0.1]), "[null, null, 0.1]");
    }
}
