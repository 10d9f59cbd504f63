//! Recorded dialogues of the reference agent, replayed against decoder, envelope and encoder.

#[cfg(test)]
mod tests {
    use protocol::{Args, Decoder, Dialect, Error, Item, Limits, Request, Response, encode};
    use serde_json::{Value, json};

    const RECORDED: &str = include_str!("data/wire.txt");

    /// What one dialogue's replies must be, by line.
    #[derive(Debug, PartialEq)]
    enum Line {
        Reply { marked: bool, value: Value },
        ParseError,
    }

    struct Dialogue {
        request: Vec<u8>,
        replies: Vec<Line>,
    }

    fn unescape(text: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            if byte != b'\\' {
                bytes.push(byte);
                continue;
            }
            bytes.push(match rest.next().expect("an escape is complete") {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'\\' => b'\\',
                b'x' => {
                    let digits = [rest.next().unwrap(), rest.next().unwrap()];
                    u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
                }
                other => panic!("unknown escape {other}"),
            });
        }
        bytes
    }

    fn line(bytes: &[u8]) -> Line {
        let (marked, json) = match bytes {
            [0xFF, json @ ..] => (true, json),
            json => (false, json),
        };
        assert!(json.is_ascii());
        let value: Value = serde_json::from_slice(json).expect("a reply is standard JSON");
        let desc = value.pointer("/error/desc").and_then(Value::as_str);
        match desc.is_some_and(|desc| desc.starts_with("JSON parse error")) {
            true => Line::ParseError,
            false => Line::Reply { marked, value },
        }
    }

    fn dialogues() -> Vec<Dialogue> {
        let mut dialogues: Vec<Dialogue> = Vec::new();
        for text in RECORDED.lines().filter(|line| !line.starts_with('#')) {
            if let Some(request) = text.strip_prefix("> ") {
                dialogues.push(Dialogue { request: unescape(request), replies: Vec::new() });
            } else if let Some(reply) = text.strip_prefix("< ") {
                dialogues.last_mut().unwrap().replies.push(line(&unescape(reply)));
            } else if text == "!" {
                dialogues.last_mut().unwrap().replies.push(Line::ParseError);
            }
        }
        dialogues
    }

    /// The three commands the recordings use, on top of the crate's own checks.
    fn run(execute: &str, args: Args) -> Result<Value, Error> {
        let mut args = args;
        match execute {
            "guest-ping" => args.finish().map(|()| json!({})),
            "guest-sync" | "guest-sync-delimited" => {
                let id = args.int("id")?;
                args.finish()?;
                Ok(json!(id))
            }
            other => Err(Error::command_not_found(other)),
        }
    }

    fn answer(item: Item) -> Option<Vec<u8>> {
        let mut reply = Vec::new();
        let response = match item {
            Item::Sentinel => return None,
            Item::Error(error) => Response::error(error, None),
            Item::Value(value) => match Request::parse(value, Dialect::InBand) {
                Err(refusal) => refusal,
                Ok(request) => {
                    let result = run(&request.execute, Args::new(request.arguments.clone()));
                    if request.execute == "guest-sync-delimited" && result.is_ok() {
                        reply.push(0xFF);
                    }
                    request.respond(result)
                }
            },
        };
        reply.extend_from_slice(response.encode().as_bytes());
        Some(reply)
    }

    fn replay(pieces: &[&[u8]]) -> Vec<Line> {
        let mut decoder = Decoder::new(Limits::AGENT);
        let mut replies = Vec::new();
        for piece in pieces {
            decoder.feed(piece);
            while let Some(item) = decoder.next_item() {
                replies.extend(answer(item).as_deref().map(line));
            }
        }
        replies
    }

    #[test]
    fn recorded_dialogues_are_answered_alike_however_the_bytes_are_split() {
        let dialogues = dialogues();
        assert!(dialogues.len() > 90, "only {} dialogues", dialogues.len());
        for Dialogue { request, replies } in dialogues {
            let shown = String::from_utf8_lossy(&request).into_owned();
            for at in 0..=request.len() {
                let (left, right) = request.split_at(at);
                assert_eq!(replay(&[left, right]), replies, "{shown:?} split at {at}");
            }
            let bytes: Vec<&[u8]> = request.chunks(1).collect();
            assert_eq!(replay(&bytes), replies, "{shown:?} byte by byte");
        }
    }

    #[test]
    fn one_connection_survives_all_dialogues_in_a_row() {
        let dialogues = dialogues();
        let stream: Vec<u8> =
            dialogues.iter().flat_map(|dialogue| [&dialogue.request[..], b"\n"].concat()).collect();
        let expected: Vec<Line> = dialogues.into_iter().flat_map(|dialogue| dialogue.replies).collect();
        assert_eq!(replay(&[&stream]), expected);
    }

    #[test]
    fn pipelined_sync_and_command_are_answered_by_two_adjacent_lines() {
        let mut decoder = Decoder::new(Limits::AGENT);
        decoder.feed(b"{\"execute\":\"guest-sync-delimited\", \"arguments\":{\"id\":77}}\n{\"execute\":\"guest-ping\"}\n");
        let replies: Vec<u8> =
            std::iter::from_fn(|| decoder.next_item()).filter_map(answer).collect::<Vec<_>>().join(&b'\n');
        assert_eq!(replies, b"\xff{\"return\": 77}\n{\"return\": {}}");
    }

    #[test]
    fn a_long_id_comes_back_whole() {
        let id = json!("a".repeat(4 << 20));
        let message = encode(&json!({"execute": "guest-ping", "id": id}));
        let mut decoder = Decoder::new(Limits::AGENT);
        decoder.feed(message.as_bytes());
        let Some(Item::Value(value)) = decoder.next_item() else { panic!("no value") };
        assert_eq!(Request::parse(value, Dialect::InBand).unwrap().id, Some(id));
    }
}
