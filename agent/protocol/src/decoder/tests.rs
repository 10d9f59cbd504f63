use serde_json::{Value, json};

use super::{Decoder, Item, Limits, ParseError};
use crate::encode;

fn items(bytes: &[u8]) -> Vec<Item> {
    items_within(Limits::AGENT, bytes)
}

fn items_within(limits: Limits, bytes: &[u8]) -> Vec<Item> {
    let mut decoder = Decoder::new(limits);
    decoder.feed(bytes);
    std::iter::from_fn(|| decoder.next_item()).collect()
}

fn value(bytes: &[u8]) -> Value {
    match items(bytes).as_slice() {
        [Item::Value(value)] => value.clone(),
        other => panic!("{}: {other:?}", String::from_utf8_lossy(bytes)),
    }
}

fn only_error(bytes: &[u8]) -> ParseError {
    match items(bytes).as_slice() {
        [Item::Error(error)] => error.clone(),
        other => panic!("{}: {other:?}", String::from_utf8_lossy(bytes)),
    }
}

#[test]
fn newlines_are_not_needed_between_messages() {
    assert_eq!(items(b"{}[]{'a':1}"), [json!({}), json!([]), json!({"a": 1})].map(Item::Value));
}

#[test]
fn scalars_end_with_the_byte_after_them() {
    let mut decoder = Decoder::new(Limits::AGENT);
    decoder.feed(b"12");
    assert_eq!(decoder.next_item(), None);
    assert!(!decoder.is_idle());
    decoder.feed(b"3 true");
    assert_eq!(decoder.next_item(), Some(Item::Value(json!(123))));
    assert_eq!(decoder.next_item(), None);
    decoder.feed(b"\n");
    assert_eq!(decoder.next_item(), Some(Item::Value(json!(true))));
    assert_eq!(decoder.next_item(), None);
    assert!(decoder.is_idle());
}

#[test]
fn integers_are_exact_over_the_whole_64_bit_range() {
    let numbers = value(b"[9223372036854775807, -9223372036854775808, 18446744073709551615, -0, 0]");
    assert_eq!(numbers, json!([i64::MAX, i64::MIN, u64::MAX, 0, 0]));
}

#[test]
fn larger_integers_and_fractions_become_doubles() {
    assert_eq!(
        value(b"[18446744073709551616, -9223372036854775809, 1.5, 1e3, 0.1E-1]"),
        json!([18446744073709551616_f64, -9223372036854775809_f64, 1.5, 1000.0, 0.01])
    );
    assert_eq!(only_error(b"[1e400]"), ParseError::NumberOutOfRange);
}

#[test]
fn malformed_numbers_are_one_error_each() {
    for bad in ["01", "-01", "1.", "1.e1", ".5", "+1", "1e", "1e+", "-", "- 1", "1..2", "0x10"] {
        assert_eq!(items(format!("[{bad}]").as_bytes()).len(), 1, "{bad}");
        assert!(matches!(items(format!("[{bad}]").as_bytes())[0], Item::Error(_)), "{bad}");
    }
}

#[test]
fn both_quotes_and_every_escape_are_understood() {
    assert_eq!(value(br#"'a"b\'c'"#), json!("a\"b'c"));
    assert_eq!(value(br#""it's \b\f\n\r\t\/\\\"""#), json!("it's \u{8}\u{c}\n\r\t/\\\""));
    assert_eq!(value(br#""\u00e9\u20AC\ud83d\ude00\u0000""#), json!("é€😀\0"));
}

#[test]
fn nul_may_come_as_modified_utf8() {
    assert_eq!(value(b"'a\xc0\x80b'"), json!("a\0b"));
}

#[test]
fn other_invalid_utf8_is_refused() {
    for bad in
        [&b"'\xc3('"[..], b"'\x80'", b"'\xc0\x81'", b"'\xed\xa0\x80'", b"'\xf5\x80\x80\x80'", b"'\xc3'"]
    {
        assert_eq!(only_error(bad), ParseError::InvalidUtf8);
    }
}

#[test]
fn lone_surrogates_are_refused() {
    for bad in [r"'\ud800'", r"'\ud800x'", r"'\ud800\n'", r"'\ud800\u0041'", r"'\udc00'"] {
        assert!(matches!(only_error(bad.as_bytes()), ParseError::InvalidCharacter(_)), "{bad}");
    }
    assert_eq!(
        only_error(br"'\ud800'").to_string(),
        r"JSON parse error, \ud800 is not a valid Unicode character"
    );
}

#[test]
fn syntax_errors_have_the_texts_of_the_reference() {
    let text = |bytes: &[u8]| only_error(bytes).to_string();
    assert_eq!(text(b"{1:2}"), "JSON parse error, key is not a string in object");
    assert_eq!(text(b"{'a' 'b'}"), "JSON parse error, missing : in object pair");
    assert_eq!(text(b"{'a':1 'b':1}"), "JSON parse error, expected separator in dict");
    assert_eq!(text(b"[1 2]"), "JSON parse error, expected separator in list");
    assert_eq!(text(b"{'a':1,'a':2}"), "JSON parse error, duplicate key");
    assert_eq!(text(b"[nul]"), "JSON parse error, invalid keyword 'nul'");
    assert_eq!(text(b"[1,]"), "JSON parse error, expecting value");
    assert_eq!(text(br"['\q']"), "JSON parse error, invalid escape sequence in string");
    assert_eq!(text(b"[NaN]"), "JSON parse error, stray 'N'");
    assert_eq!(text(b"\x01"), "JSON parse error, stray '\u{1}'");
    assert_eq!(text(b"\xfe"), "JSON parse error, stray '\u{FFFD}'");
}

#[test]
fn a_run_of_garbage_is_one_error() {
    for garbage in [
        "garbage text here\n",
        "}}}",
        "isn't 'quoted } properly\n",
        "{'a':]}",
        "{'a' '}' [ \"]\" ] }",
        "[{'execute':-}]",
        r#"{"a":"x\q}\"}"}"#,
        r#"{"a":"\ud800\"}"}"#,
    ] {
        let mut bytes = garbage.as_bytes().to_vec();
        bytes.extend_from_slice(b"\n{}");
        let found = items(&bytes);
        assert!(matches!(found[..], [Item::Error(_), Item::Value(_)]), "{garbage}: {found:?}");
    }
}

#[test]
fn a_message_may_follow_garbage_on_the_same_line() {
    for garbage in ["Hello World! ", "xyz ", "/*c*/", "\u{feff}", "{'a':@}"] {
        let found = items(format!("{garbage}{{}}").as_bytes());
        assert!(matches!(found[..], [Item::Error(_), Item::Value(_)]), "{garbage}: {found:?}");
    }
}

#[test]
fn what_is_nested_in_a_broken_message_is_never_a_message() {
    let found = items(b"{'a':+1,'b':{'execute':'guest-shutdown'}}");
    assert!(matches!(found[..], [Item::Error(_)]), "{found:?}");
    let limits = Limits { message_bytes: 20, ..Limits::AGENT };
    let found = items_within(limits, b"'a long string with {\"execute\":\"guest-shutdown\"} inside'\n{}");
    assert!(matches!(found[..], [Item::Error(ParseError::TooLong), Item::Value(_)]), "{found:?}");
}

#[test]
fn a_raw_control_byte_in_a_string_ends_the_message() {
    assert_eq!(
        items(b"{'execute':'guest-pi\n{}"),
        [Item::Error(ParseError::Stray('\n')), Item::Value(json!({}))]
    );
}

#[test]
fn the_sentinel_drops_anything_unfinished_without_an_error() {
    for partial in ["", "{", "{'a", "{'a':", "{'a':[tr", "[1", "garb", "{'a':@ 'x", r"'\ud8"] {
        let mut bytes = partial.as_bytes().to_vec();
        bytes.extend_from_slice(b"\xff{}");
        let mut found = items(&bytes);
        found.retain(|item| !matches!(item, Item::Error(_)) || !partial.contains('@'));
        assert_eq!(found, [Item::Sentinel, Item::Value(json!({}))], "{partial}");
    }
}

#[test]
fn every_sentinel_is_reported() {
    assert_eq!(items(b"\xff\xff\n\xff"), [const { Item::Sentinel }; 3]);
}

#[test]
fn nesting_is_accepted_up_to_the_limit_and_refused_once_beyond() {
    let limits = Limits { depth: 64, ..Limits::AGENT };
    let nested = |depth: usize| ["[".repeat(depth), "]".repeat(depth)].concat();
    assert!(matches!(items_within(limits, nested(64).as_bytes())[..], [Item::Value(_)]));
    for depth in [65, 1000, 10_000, 1_000_000] {
        let bytes = nested(depth) + "{}";
        let expected = [Item::Error(ParseError::TooDeep), Item::Value(json!({}))];
        assert_eq!(items_within(limits, bytes.as_bytes()), expected);
    }
}

#[test]
fn the_deepest_value_fits_a_small_stack() {
    let depth = Limits::MAX_DEPTH;
    let text = ["{'a':".repeat(depth), "1".into(), "}".repeat(depth)].concat();
    let small = std::thread::Builder::new().stack_size(1 << 20);
    let thread = small.spawn(move || {
        let limits = Limits { depth: usize::MAX, ..Limits::AGENT };
        let deepest = items_within(limits, text.as_bytes());
        assert!(matches!(&deepest[..], [Item::Value(value)] if encode(value).len() > depth));
        let deeper = ["{'a':".repeat(10_000), "\n".into()].concat();
        assert_eq!(items_within(limits, deeper.as_bytes()), [Item::Error(ParseError::TooDeep)]);
    });
    thread.unwrap().join().unwrap();
}

#[test]
fn a_message_of_exactly_the_limit_is_accepted() {
    let limits = Limits { message_bytes: 10, ..Limits::AGENT };
    assert_eq!(items_within(limits, b"\"12345678\""), [Item::Value(json!("12345678"))]);
    assert_eq!(items_within(limits, b"[ 234567 ]{}").len(), 2);
    let found = items_within(limits, b"\"123456789\"\n[         ]\n[12345678901]\n{}");
    let too_long = || Item::Error(ParseError::TooLong);
    assert_eq!(found, [too_long(), too_long(), too_long(), Item::Value(json!({}))]);
}

#[test]
fn tokens_are_counted() {
    let limits = Limits { tokens: 7, ..Limits::AGENT };
    assert_eq!(items_within(limits, b"[1,2,3]{}").len(), 2);
    let found = items_within(limits, b"[1,2,3,4]\n{}");
    assert_eq!(found, [Item::Error(ParseError::TooManyTokens), Item::Value(json!({}))]);
}

#[test]
fn endless_messages_take_bounded_memory_and_one_error() {
    let limits = Limits::MONITOR;
    for (start, more) in
        [("{'a':'", "aaaaaaaa"), ("[", "1,"), ("[", "      "), ("", "[["), ("", "9999"), ("", "x ")]
    {
        let mut decoder = Decoder::new(limits);
        let mut errors = 0;
        decoder.feed(start.as_bytes());
        let chunk = more.repeat((64 << 10) / more.len());
        for _ in 0..64 {
            decoder.feed(chunk.as_bytes());
            while let Some(item) = decoder.next_item() {
                assert!(matches!(item, Item::Error(_)), "{start}{more}…: {item:?}");
                errors += 1;
            }
            assert!(decoder.unread.capacity() <= 256 << 10);
        }
        assert_eq!(errors, 1, "{start}{more}…");
    }
}

#[test]
fn reset_forgets_partial_message_and_unread_input() {
    let mut decoder = Decoder::new(Limits::AGENT);
    decoder.feed(b"{}{'execute'");
    assert_eq!(decoder.next_item(), Some(Item::Value(json!({}))));
    assert_eq!(decoder.unread_bytes(), 10);
    decoder.reset();
    assert!(decoder.is_idle());
    decoder.feed(b"[]");
    assert_eq!(decoder.next_item(), Some(Item::Value(json!([]))));
}

#[test]
fn idle_means_that_no_message_is_under_way() {
    for (bytes, idle) in [
        (&b""[..], true),
        (b" \n{}", true),
        (b"{} ", true),
        (b"}", true),
        (b"{", false),
        (b"'a", false),
        (b"{'a':@", false),
        (b"{'a':@}", true),
        (b"tru", false),
    ] {
        let mut decoder = Decoder::new(Limits::AGENT);
        decoder.feed(bytes);
        while decoder.next_item().is_some() {}
        assert_eq!(decoder.is_idle(), idle, "{}", String::from_utf8_lossy(bytes));
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): enough randomness for tests, reproducible from its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 6 } else { 8 }) {
            0 => Value::Null,
            1 => json!(self.next().is_multiple_of(2)),
            2 => json!(self.next()),
            3 => json!(self.next().cast_signed()),
            4 => json!(f64::from_bits(self.next())),
            5 => {
                let length = self.below(12);
                let pick = |random: &mut Self| {
                    *['a', '"', '\\', '\n', '\0', 'é', '😀', '\u{7f}', '\''].get(random.below(9)).unwrap()
                };
                json!((0..length).map(|_| pick(self)).collect::<String>())
            }
            6 => (0..self.below(5)).map(|_| self.value(depth - 1)).collect::<Vec<_>>().into(),
            _ => {
                let members = (0..self.below(5)).map(|index| (format!("k{index}"), self.value(depth - 1)));
                Value::Object(members.collect())
            }
        }
    }
}

fn seed() -> u64 {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = std::env::var("SEED").map_or(u64::from(clock.subsec_nanos()), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    seed
}

#[test]
fn random_values_survive_encoding_and_random_splits() {
    let mut random = Random(seed());
    for _ in 0..500 {
        let values: Vec<Value> = (0..4).map(|_| random.value(5)).collect();
        let stream: String = values.iter().map(|value| encode(value) + "\n").collect();
        let mut decoder = Decoder::new(Limits::AGENT);
        let mut found = Vec::new();
        let mut rest = stream.as_bytes();
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(1 + random.below(rest.len()));
            decoder.feed(piece);
            found.extend(std::iter::from_fn(|| decoder.next_item()));
            rest = tail;
        }
        assert_eq!(found, values.into_iter().map(Item::Value).collect::<Vec<_>>());
    }
}

#[test]
fn random_bytes_mean_the_same_however_they_are_split_and_a_newline_resynchronises() {
    let mut random = Random(seed());
    let alphabet = b"{}[]:,\"'\\ \t\n\x01\xfe\xff\xc3\x80019.eE+-truefalsnu";
    for _ in 0..5_000 {
        let length = random.below(40);
        let bytes: Vec<u8> = (0..length).map(|_| alphabet[random.below(alphabet.len())]).collect();
        let whole = items(&bytes);
        let mut decoder = Decoder::new(Limits::AGENT);
        let mut single = Vec::new();
        for byte in &bytes {
            decoder.feed(&[*byte]);
            single.extend(std::iter::from_fn(|| decoder.next_item()));
        }
        assert_eq!(single, whole, "{bytes:?}");
        decoder.feed(b"\xff{'fresh':1}");
        let after: Vec<Item> = std::iter::from_fn(|| decoder.next_item()).collect();
        let expected = [Item::Sentinel, Item::Value(json!({"fresh": 1}))];
        // A scalar still open when the sentinel came is dropped, never completed by it.
        assert_eq!(after, expected, "{bytes:?}");
    }
}
