//! Commands as people type them, for `tarn qmp` and `tarn agent`: a JSON request, or a verb with `key=value` words.

use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;

use anyhow::{Context, anyhow, bail};
use coordinator::{Event, Map, SessionError};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use super::output;

/// A command and its arguments.
#[derive(Debug, PartialEq)]
pub(super) struct Typed {
    pub(super) verb: String,
    pub(super) arguments: Option<Map>,
}

impl Typed {
    /// Reads `{"execute": …}`, or words: `block_resize device=disk0 size=1073741824`. Values that read as JSON are JSON,
    /// others are texts; a dot in a key leads into an object (`file.driver=raw`).
    pub(super) fn parse(words: &[String]) -> anyhow::Result<Self> {
        let [verb, rest @ ..] = words else { bail!("No command is given") };
        if verb.trim_start().starts_with('{') {
            return Self::parse_json(&words.join(" "));
        }
        let mut arguments = Map::new();
        for word in rest {
            let (key, value) = word
                .split_once('=')
                .ok_or_else(|| anyhow!("{word:?} is not key=value (or give the whole command as JSON)"))?;
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
            insert(&mut arguments, key, value)?;
        }
        Ok(Self { verb: verb.clone(), arguments: (!arguments.is_empty()).then_some(arguments) })
    }

    fn parse_json(text: &str) -> anyhow::Result<Self> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Request {
            execute: String,
            arguments: Option<Map>,
            /// Ours ties replies to requests; what the user gave is of no use on a line of its own.
            #[serde(rename = "id")]
            _id: Option<Value>,
        }
        let request: Request = serde_json::from_str(text).context("The command is not a JSON request")?;
        Ok(Self { verb: request.execute, arguments: request.arguments })
    }
}

fn insert(object: &mut Map, key: &str, value: Value) -> anyhow::Result<()> {
    match key.split_once('.') {
        _ if key.is_empty() => bail!("A key is empty"),
        None => {
            object.insert(key.to_owned(), value);
            Ok(())
        }
        Some((outer, inner)) => match object.entry(outer).or_insert_with(|| json!({})) {
            Value::Object(object) => insert(object, inner, value),
            _ => bail!("{outer:?} is given both a value and members"),
        },
    }
}

/// Splits a line at blanks outside of quotes and brackets. Single quotes vanish, all else stays for the JSON reader.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), String::new());
    let (mut depth, mut single, mut double) = (0_usize, false, false);
    for c in line.chars() {
        match c {
            '\'' if !double && depth == 0 => {
                single = !single;
                continue;
            }
            '"' if !single => double = !double,
            '{' | '[' if !single && !double => depth += 1,
            '}' | ']' if !single && !double => depth = depth.saturating_sub(1),
            c if c.is_whitespace() && !single && !double && depth == 0 => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            _ => {}
        }
        word.push(c);
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// A session that lines can be typed to.
pub(super) trait Interlocutor {
    fn execute(&mut self, typed: Typed) -> Result<Value, SessionError>;
    /// An event that has come, if there is one; events are what makes the descriptor readable between commands.
    fn event(&mut self) -> Result<Option<Event>, SessionError>;
    fn fd(&self) -> BorrowedFd<'_>;
}

/// Runs one command: its result on standard output.
pub(super) fn one(session: &mut impl Interlocutor, words: &[String]) -> anyhow::Result<u8> {
    let value = session.execute(Typed::parse(words)?)?;
    output::print_json(&value)?;
    Ok(0)
}

/// Reads commands from standard input, a line each, and prints results and events as they come. Refusals are printed and
/// are no reason to stop.
pub(super) fn converse(session: &mut impl Interlocutor, prompt: &str) -> anyhow::Result<u8> {
    let stdin = io::stdin();
    let prompt = if stdin.is_terminal() { prompt } else { "" };
    let mut pending = Vec::new();
    let mut status = 0;
    output::print(prompt)?;
    loop {
        let mut fds =
            [PollFd::from_borrowed_fd(session.fd(), PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result.context("Cannot wait for input")?,
        };
        let [from_peer, typed] = fds.map(|fd| fd.revents());
        if !from_peer.is_empty() {
            print_events(session)?;
        }
        if typed.is_empty() {
            continue;
        }
        let mut buffer = [0; 4096];
        let count = rustix::io::read(&stdin, &mut buffer).context("Cannot read standard input")?;
        pending.extend_from_slice(&buffer[..count]);
        if count == 0 && !pending.is_empty() {
            pending.push(b'\n');
        }
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            if answer(session, &String::from_utf8_lossy(&line), &mut status)?.is_break() {
                return Ok(status);
            }
            output::print(prompt)?;
        }
        if count == 0 {
            return Ok(status);
        }
    }
}

/// Runs what was typed; `status` becomes that of the command, if it is one. Breaks when there is nobody left to talk to.
fn answer(session: &mut impl Interlocutor, line: &str, status: &mut u8) -> anyhow::Result<ControlFlow<()>> {
    let words = words(line);
    if words.is_empty() {
        return Ok(ControlFlow::Continue(()));
    }
    *status = super::FAILURE;
    let typed = match Typed::parse(&words) {
        Ok(typed) => typed,
        Err(error) => {
            output::complain(&format!("{error:#}"));
            return Ok(ControlFlow::Continue(()));
        }
    };
    let ends = typed.verb == "quit";
    match session.execute(typed) {
        Ok(value) => {
            *status = 0;
            // What the command caused came before its result.
            let events = print_events(session);
            output::print_json(&value)?;
            return if ends { Ok(ControlFlow::Break(())) } else { events.map(ControlFlow::Continue) };
        }
        Err(
            error @ (SessionError::Refused { .. }
            | SessionError::Frozen { .. }
            | SessionError::Timeout { .. }),
        ) => {
            output::complain(&format!("{:#}", anyhow::Error::new(error)));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(ControlFlow::Continue(()))
}

fn print_events(session: &mut impl Interlocutor) -> anyhow::Result<()> {
    while let Some(event) = session.event()? {
        print_event(&event)?;
    }
    Ok(())
}

fn print_event(event: &Event) -> anyhow::Result<()> {
    let mut line = Vec::new();
    write!(line, "{}", event.name)?;
    if !event.data.is_empty() {
        write!(line, " {}", serde_json::to_string(&event.data)?)?;
    }
    line.push(b'\n');
    output::print(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Typed> {
        Typed::parse(&words(line))
    }

    #[test]
    fn words_make_a_command() {
        let typed =
            parse("set a=1 b=text c=true d=\"7\" file.driver=raw file.x.y=[1, 2] e='two words'\n").unwrap();
        assert_eq!(typed.verb, "set");
        let expected = json!({"a": 1, "b": "text", "c": true, "d": "7", "e": "two words",
            "file": {"driver": "raw", "x": {"y": [1, 2]}}});
        assert_eq!(Value::Object(typed.arguments.unwrap()), expected);
        assert_eq!(parse("stop").unwrap(), Typed { verb: "stop".into(), arguments: None });
    }

    #[test]
    fn json_makes_a_command_too() {
        let typed = parse(r#"{"execute": "x", "arguments": {"a": "b c"}, "id": 3}"#).unwrap();
        assert_eq!(typed.verb, "x");
        assert_eq!(typed.arguments.unwrap()["a"], "b c");
        assert!(parse(r#"{"execute": 3}"#).is_err());
        assert!(parse("{").is_err());
    }

    #[test]
    fn lines_that_make_no_sense_are_refused() {
        for line in ["", "stop now", "x =1", "x a=1 a.b=2"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
