use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc;

use super::*;
use crate::testing::{Client, Server};

/// A guest with files, a shell that knows the scripts above, and faults to order.
#[derive(Default)]
struct Guest {
    files: BTreeMap<String, Vec<u8>>,
    open: BTreeMap<i64, (String, usize)>,
    directories: Vec<&'static str>,
    special: Vec<&'static str>,
    no_exec: bool,
    /// A write beyond this many bytes fails like a full disk.
    space: Option<usize>,
    /// Files read as this much shorter than they say.
    lost: usize,
    exec_reply: Value,
}

impl Guest {
    fn serve(mut self, client: &mut Client) -> Self {
        while let Some(request) = client.any_request() {
            let arguments = &request["arguments"];
            let command = request["execute"].as_str().unwrap();
            if command == "guest-sync-delimited" {
                client.send_bytes(b"\xff");
                client.send(json!({"return": arguments["id"]}));
                continue;
            }
            client.send(match self.answer(command, arguments) {
                Ok(value) => json!({"return": value}),
                Err(desc) => json!({"error": {"class": "GenericError", "desc": desc}}),
            });
        }
        self
    }

    fn answer(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let handle = arguments["handle"].as_i64().unwrap_or(0);
        let text = |name: &str| arguments[name].as_str().unwrap_or("").to_owned();
        match command {
            "guest-info" => {
                Ok(json!({"supported_commands": [{"name": "guest-exec", "enabled": !self.no_exec}]}))
            }
            "guest-exec" => {
                self.exec_reply = self.run(arguments);
                Ok(json!({"pid": 1}))
            }
            "guest-exec-status" => Ok(self.exec_reply.take()),
            "guest-file-open" => {
                let (path, mode) = (text("path"), text("mode"));
                if mode == "w" {
                    self.files.insert(path.clone(), Vec::new());
                } else if !self.files.contains_key(&path) {
                    return Err(format!("failed to open file '{path}': No such file or directory"));
                }
                self.open.insert(1000, (path, 0));
                Ok(json!(1000))
            }
            "guest-file-close" => self.open.remove(&handle).map(|_| json!({})).ok_or("no handle".into()),
            "guest-file-flush" => Ok(json!({})),
            _ => self.answer_io(command, arguments, handle),
        }
    }

    fn answer_io(&mut self, command: &str, arguments: &Value, handle: i64) -> Result<Value, String> {
        let (path, at) = self.open.get_mut(&handle).ok_or("no handle")?;
        let file = self.files.get_mut(path).ok_or("no file")?;
        match command {
            "guest-file-write" => {
                let bytes = BASE64_STANDARD.decode(arguments["buf-b64"].as_str().unwrap()).unwrap();
                if self.space.is_some_and(|space| file.len() + bytes.len() > space) {
                    return Err("failed to write to file: No space left on device".into());
                }
                // Not all at once: writes may be short.
                let count = bytes.len().min(300 << 10);
                file.extend_from_slice(&bytes[..count]);
                *at += count;
                Ok(json!({"count": count, "eof": false}))
            }
            "guest-file-read" => {
                let end = file.len().saturating_sub(self.lost);
                let count = usize::try_from(arguments["count"].as_u64().unwrap()).unwrap();
                let from = (*at).min(end);
                let to = (from + count).min(end);
                *at = to;
                Ok(
                    json!({"count": to - from, "buf-b64": BASE64_STANDARD.encode(&file[from..to]), "eof": to == end}),
                )
            }
            "guest-file-seek" => {
                match arguments["whence"].as_u64().unwrap() {
                    0 => *at = 0,
                    2 => *at = file.len(),
                    _ => {}
                }
                Ok(json!({"position": at, "eof": false}))
            }
            other => Err(format!("The command {other} has not been found")),
        }
    }

    fn run(&mut self, arguments: &Value) -> Value {
        let args: Vec<_> = arguments["arg"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
        let done =
            |out: &str| json!({"exited": true, "exitcode": 0, "out-data": BASE64_STANDARD.encode(out)});
        match args[..] {
            ["-c", script, "sh", path] if script.contains("-d") => {
                let path = path.trim_end_matches('/');
                let kind = if self.directories.contains(&path) { "directory" } else { "file" };
                done(if self.special.contains(&path) { "special\n" } else { kind })
            }
            ["-c", script, "sh", from, to] if script.contains("mv") => match self.files.remove(from) {
                Some(file) if !to.starts_with("/readonly/") => {
                    self.files.insert(to.to_owned(), file);
                    done("")
                }
                file => {
                    self.files.extend(file.map(|file| (from.to_owned(), file)));
                    json!({"exited": true, "exitcode": 1, "err-data": BASE64_STANDARD.encode("Read-only file system\n")})
                }
            },
            ["-c", script, "sh", path] if script.contains("rm") => {
                self.files.remove(path);
                done("")
            }
            _ => panic!("an unknown script {args:?}"),
        }
    }
}

/// Runs `client` against `guest`; gives its result and the guest afterwards.
fn with<T>(guest: Guest, client: impl FnOnce(&mut GuestSession) -> T) -> (T, Guest) {
    let (sender, receiver) = mpsc::channel();
    let server = Server::start(move |connection| sender.send(guest.serve(connection)).unwrap());
    let mut session = GuestSession::connect(server.path()).unwrap();
    let result = client(&mut session);
    drop(session);
    (result, receiver.recv().unwrap())
}

fn to_guest(guest: Guest, bytes: &[u8], path: &str) -> (Result<u64, CopyError>, Guest) {
    with(guest, |session| copy_to_guest(session, &mut &bytes[..], path, "name", &mut |_| {}))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

#[test]
fn a_file_goes_in_under_a_temporary_name_and_appears_whole() {
    let bytes = Arc::new(pattern((1 << 20) + 17));
    let mut steps = Vec::new();
    let (result, guest) = with(Guest::default(), |session| {
        copy_to_guest(session, &mut bytes.as_slice(), "/tmp/a", "name", &mut |done| steps.push(done))
    });
    assert_eq!(result.unwrap(), bytes.len() as u64);
    assert_eq!(steps, [512 << 10, 1 << 20, bytes.len() as u64]);
    assert_eq!(guest.files, BTreeMap::from([("/tmp/a".to_owned(), bytes.to_vec())]));
    assert!(guest.open.is_empty());
}

#[test]
fn a_directory_takes_the_file_under_its_own_name() {
    for path in ["/data", "/data/"] {
        let guest = Guest { directories: vec!["/data"], ..Guest::default() };
        let (result, guest) = to_guest(guest, b"x", path);
        assert_eq!(result.unwrap(), 1);
        assert_eq!(guest.files.keys().collect::<Vec<_>>(), ["/data/name"]);
    }
    let guest = Guest { directories: vec!["/data", "/data/name"], ..Guest::default() };
    let (result, guest) = to_guest(guest, b"x", "/data");
    assert!(matches!(result, Err(CopyError::Place { .. })));
    assert!(guest.files.is_empty());
}

#[test]
fn a_full_disk_leaves_the_old_file_and_nothing_else() {
    let mut guest = Guest { space: Some(600 << 10), ..Guest::default() };
    guest.files.insert("/a".into(), b"old".to_vec());
    let (result, guest) = to_guest(guest, &pattern(1 << 20), "/a");
    let CopyError::Session(error) = result.unwrap_err() else { panic!("the agent's refusal") };
    assert!(error.refusal().unwrap().desc.contains("No space left"));
    assert_eq!(guest.files, BTreeMap::from([("/a".to_owned(), b"old".to_vec())]));
    assert!(guest.open.is_empty());
}

#[test]
fn a_destination_that_cannot_be_replaced_leaves_nothing_behind() {
    let (result, guest) = to_guest(Guest::default(), b"x", "/readonly/a");
    let error = result.unwrap_err().to_string();
    assert_eq!(error, "Cannot put /readonly/a in place in the guest: Read-only file system");
    assert!(guest.files.is_empty());
}

#[test]
fn a_device_and_a_guest_without_exec_are_written_in_place() {
    let (result, guest) = to_guest(Guest { special: vec!["/dev/x"], ..Guest::default() }, b"x", "/dev/x");
    assert_eq!(result.unwrap(), 1);
    assert_eq!(guest.files.keys().collect::<Vec<_>>(), ["/dev/x"]);
    let (result, guest) = to_guest(Guest { no_exec: true, ..Guest::default() }, b"x", "/b/");
    assert_eq!(result.unwrap(), 1);
    assert_eq!(guest.files.keys().collect::<Vec<_>>(), ["/b/name"]);
}

#[test]
fn a_source_that_fails_is_an_error_and_leaves_nothing() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("bad sector"))
        }
    }
    let (result, guest) =
        with(Guest::default(), |session| copy_to_guest(session, &mut Broken, "/a", "a", &mut |_| {}));
    assert!(matches!(result, Err(CopyError::Read { .. })));
    assert!(guest.files.is_empty() && guest.open.is_empty());
}

#[test]
fn a_file_comes_out_as_it_is() {
    for len in [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
        let mut guest = Guest::default();
        guest.files.insert("/a".into(), pattern(len));
        let (mut sink, mut last) = (Vec::new(), (0, None));
        let (result, guest) = with(guest, |session| {
            copy_from_guest(session, "/a", &mut sink, &mut |done, total| last = (done, total))
        });
        assert_eq!(result.unwrap(), len as u64);
        assert!(sink == pattern(len) && guest.open.is_empty());
        assert_eq!(last, (len as u64, (len > 0).then_some(len as u64)));
    }
}

#[test]
fn a_file_that_shrinks_is_an_error() {
    let mut guest = Guest { lost: 5, ..Guest::default() };
    guest.files.insert("/a".into(), pattern(100));
    let (result, _) = with(guest, |session| copy_from_guest(session, "/a", &mut io::sink(), &mut |_, _| {}));
    assert!(result.unwrap_err().to_string().starts_with("95 of 100 bytes arrived"));
}

#[test]
fn a_missing_file_and_a_full_disk_here_are_told_apart() {
    let (result, _) =
        with(Guest::default(), |session| copy_from_guest(session, "/a", &mut io::sink(), &mut |_, _| {}));
    assert!(matches!(result, Err(CopyError::Session(SessionError::Refused { .. }))));
    let mut guest = Guest::default();
    guest.files.insert("/a".into(), pattern(100));
    let mut full = [0; 10];
    let (result, guest) =
        with(guest, |session| copy_from_guest(session, "/a", &mut &mut full[..], &mut |_, _| {}));
    assert!(matches!(result, Err(CopyError::Write { .. })));
    assert!(guest.open.is_empty());
}
