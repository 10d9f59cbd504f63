//! guest-get-users and guest-set-user-password.

use std::fs::File;
use std::io::{Seek, Write};
use std::process;

use protocol::{Args, Error};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::root::Root;
use super::{child, failed, payload};
use crate::guest::Guest;
use crate::schema::{Command, Run, Type, optional, required};

const USER: Type = Type::Object(&[
    required("user", Type::Str),
    required("login-time", Type::Number),
    optional("domain", Type::Str),
]);

pub(crate) const COMMANDS: &[Command] = &[
    Command::new("guest-get-users", "Who is logged in, and since when", Run::Worker(get_users))
        .returns(Type::Array(&USER)),
    Command::new(
        "guest-set-user-password",
        "Sets a user's password, by chpasswd",
        Run::Worker(set_user_password),
    )
    .takes(&[
        required("username", Type::Str),
        required("password", Type::Base64),
        required("crypted", Type::Bool),
    ]),
];

/// The records of who is logged in (utmp(5)); the second where `/var/run` is not `/run`.
const UTMP: &[&str] = &["/run/utmp", "/var/run/utmp"];

/// glibc's `struct utmp` on x86_64: the size, and where the members used here are.
const RECORD: usize = 384;
const USER_NAME: std::ops::Range<usize> = 44..76;
const SECONDS: usize = 340;
const MICROSECONDS: usize = 344;
/// `ut_type` of somebody who is logged in.
const USER_PROCESS: u16 = 7;
/// Most users who are told of; somebody who can write the records could invent any number.
const USERS: usize = 1024;

fn get_users(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    // Where nobody keeps records, nobody is known to be logged in.
    let root = Root::guest();
    let records = UTMP.iter().find_map(|path| root.read(path).ok()).unwrap_or_default();
    Ok(users(&records))
}

/// Each user once, with the earliest login, in the order of the records.
fn users(records: &[u8]) -> Value {
    let mut users: Vec<(String, f64)> = Vec::new();
    for (name, since) in records.chunks_exact(RECORD).filter_map(login) {
        if let Some((_, first)) = users.iter_mut().find(|(known, _)| *known == name) {
            *first = first.min(since);
        } else if users.len() < USERS {
            users.push((name, since));
        }
    }
    users.into_iter().map(|(name, since)| json!({"user": name, "login-time": since})).collect()
}

/// Who logged in, and when in seconds since 1970.
fn login(record: &[u8]) -> Option<(String, f64)> {
    let number = |at: usize| Some(u32::from_ne_bytes(record.get(at..at + 4)?.try_into().ok()?));
    let kind = u16::from_ne_bytes(record.get(..2)?.try_into().ok()?);
    if kind != USER_PROCESS {
        return None;
    }
    let name = record.get(USER_NAME)?;
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    let name = String::from_utf8_lossy(&name[..end]).into_owned();
    let since = f64::from(number(SECONDS)?) + f64::from(number(MICROSECONDS)?) / 1e6;
    (!name.is_empty()).then_some((name, since))
}

fn set_user_password(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let username = args.string("username")?;
    let password = args.string("password")?;
    let crypted = args.bool("crypted")?;
    args.finish()?;
    let line = password_line(&username, &payload::decode(password)?)?;
    let input = input(&line).map_err(|error| failed("failed to pass the password on", &error))?;
    let mut command = process::Command::new("chpasswd");
    if crypted {
        command.arg("-e");
    }
    child::succeed(command.stdin(input), "set user password")?;
    Ok(json!({}))
}

/// `user:password` and a newline. Either could smuggle another line in, and so another user.
fn password_line(username: &str, password: &[u8]) -> Result<Vec<u8>, Error> {
    if password.iter().any(|byte| b"\n\0".contains(byte)) {
        return Err(Error::generic("forbidden characters in raw password"));
    }
    if username.contains(['\n', ':', '\0']) {
        return Err(Error::generic("forbidden characters in username"));
    }
    Ok([username.as_bytes(), b":", password, b"\n"].concat())
}

/// A file in memory: unlike a pipe it takes any amount, whether or not anybody reads.
fn input(line: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("password", MemfdFlags::CLOEXEC)?);
    file.write_all(line)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u16, user: &[u8], seconds: u32, microseconds: u32) -> Vec<u8> {
        let mut record = vec![0; RECORD];
        record[..2].copy_from_slice(&kind.to_ne_bytes());
        record[44..44 + user.len()].copy_from_slice(user);
        record[SECONDS..SECONDS + 4].copy_from_slice(&seconds.to_ne_bytes());
        record[MICROSECONDS..MICROSECONDS + 4].copy_from_slice(&microseconds.to_ne_bytes());
        record
    }

    #[test]
    fn the_earliest_login_of_each_user_counts() {
        let records = [
            record(2, b"reboot", 1, 0),
            record(7, b"root", 1_700_000_300, 0),
            record(7, b"ann", 1_700_000_200, 250_000),
            record(8, b"gone", 1_700_000_000, 0),
            record(7, b"root", 1_700_000_100, 500_000),
            vec![7; RECORD - 1],
        ]
        .concat();
        let value = users(&records);
        Type::Array(&USER).check(&value).unwrap();
        let expected = json!([
            {"user": "root", "login-time": 1_700_000_100.5},
            {"user": "ann", "login-time": 1_700_000_200.25},
        ]);
        assert_eq!(value, expected);
    }

    #[test]
    fn invented_records_do_no_harm() {
        assert_eq!(users(&[]), json!([]));
        assert_eq!(users(&vec![0xFF; RECORD * 3 + 7]), json!([]));
        assert_eq!(users(&record(7, b"", 1, 1)), json!([]));
        let full = users(&record(7, &[0xFF; 32], u32::MAX, u32::MAX));
        Type::Array(&USER).check(&full).unwrap();
        let many: Vec<u8> = (0..3000).flat_map(|n| record(7, format!("user{n}").as_bytes(), n, 0)).collect();
        assert_eq!(users(&many).as_array().unwrap().len(), USERS);
    }

    #[test]
    fn a_password_sets_that_of_one_user_only() {
        assert_eq!(password_line("root", b"s:e\xFFcret").unwrap(), b"root:s:e\xFFcret\n");
        let desc = |user, password: &[u8]| password_line(user, password).unwrap_err().desc;
        assert_eq!(desc("root", b"a\nann:b"), "forbidden characters in raw password");
        assert_eq!(desc("root", b"a\0b"), "forbidden characters in raw password");
        for user in ["a:b", "a\nb", "a\0"] {
            assert_eq!(desc(user, b"x"), "forbidden characters in username");
        }
    }

    #[test]
    fn a_program_reads_its_input_from_memory() {
        let line = vec![b'x'; 1 << 20];
        let mut read = Vec::new();
        std::io::Read::read_to_end(&mut input(&line).unwrap(), &mut read).unwrap();
        assert!(read == line);
    }
}
