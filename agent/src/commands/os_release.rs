//! `/etc/os-release` (freedesktop.org os-release(5)): shell-like assignments.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;

/// Keys of the file and the result's members they become.
const MEMBERS: &[(&str, &str)] = &[
    ("ID", "id"),
    ("NAME", "name"),
    ("PRETTY_NAME", "pretty-name"),
    ("VERSION", "version"),
    ("VERSION_ID", "version-id"),
    ("VARIANT", "variant"),
    ("VARIANT_ID", "variant-id"),
];

/// Most bytes read of the file.
const LENGTH: u64 = 64 << 10;

/// Members and values; none if there is no such file. `QGA_OS_RELEASE` names another one.
pub(super) fn read() -> Vec<(&'static str, String)> {
    let places: Vec<OsString> = match std::env::var_os("QGA_OS_RELEASE") {
        Some(path) => vec![path],
        None => vec!["/etc/os-release".into(), "/usr/lib/os-release".into()],
    };
    let mut text = Vec::new();
    if let Some(file) = places.iter().find_map(|path| File::open(path).ok()) {
        // A file that cannot be read is as good as none.
        let _ = file.take(LENGTH).read_to_end(&mut text);
    }
    parse(&String::from_utf8_lossy(&text))
}

/// The last assignment of a key counts, as it does for a shell.
fn parse(text: &str) -> Vec<(&'static str, String)> {
    let mut found: Vec<(&'static str, String)> = Vec::new();
    for line in text.lines().map(str::trim) {
        let Some((key, value)) = line.split_once('=') else { continue };
        let Some(&(_, member)) = MEMBERS.iter().find(|(known, _)| *known == key) else { continue };
        found.retain(|(known, _)| *known != member);
        found.push((member, unquote(value)));
    }
    found
}

/// Takes quotes and backslashes away as a shell does; nothing is expanded.
fn unquote(value: &str) -> String {
    let mut plain = String::new();
    let mut quote = None;
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match (character, quote) {
            (c, Some(open)) if c == open => quote = None,
            ('"' | '\'', None) => quote = Some(character),
            ('\\', None) => plain.extend(characters.next()),
            ('\\', Some('"')) => match characters.next() {
                Some(next @ ('"' | '\\' | '$' | '`')) => plain.push(next),
                next => {
                    plain.push('\\');
                    plain.extend(next);
                }
            },
            _ => plain.push(character),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_keys_become_members() {
        let text = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nHOME_URL=x\n";
        assert_eq!(
            parse(text),
            [("pretty-name", "Debian GNU/Linux 12 (bookworm)".into()), ("id", "debian".into())]
        );
    }

    #[test]
    fn quotes_and_escapes_are_taken_away() {
        assert_eq!(unquote(r#""a \"b\" \$c \d""#), r#"a "b" $c \d"#);
        assert_eq!(unquote(r"'a \n'"), r"a \n");
        assert_eq!(unquote(r#"a\ b"c"'d'"#), "a bcd");
        assert_eq!(unquote(r#""open"#), "open");
    }

    #[test]
    fn comments_and_nonsense_are_skipped_and_the_last_assignment_counts() {
        assert_eq!(parse("#ID=a\n\nID\nID=b\nID=c"), [("id", "c".to_owned())]);
    }
}
