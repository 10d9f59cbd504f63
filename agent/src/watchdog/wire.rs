//! Messages between the agent and its watchdog: one JSON object per packet, with a descriptor beside it
//! where a filesystem is handed over.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::{Value, json};

use crate::freeze::{Cause, Hooks, Label, milliseconds};

/// Longest packet: a path is at most 4096 bytes, each of which JSON may write as six.
const PACKET: usize = 32 << 10;

/// From the agent.
#[derive(Debug, PartialEq)]
pub(crate) enum Order {
    /// Whom this watches: first, and once. The socket where an agent that returns finds it comes along.
    Configure { statedir: String, hooks: Hooks },
    /// A freeze begins, the agent's so-and-so-manieth; `hooks` if there are hooks that will want their thaw.
    Begin { number: u64, hooks: bool },
    /// A hook runs, with this process group; 0 if none does.
    Hook { group: u32 },
    /// Hold this filesystem; its descriptor comes along.
    Hold(Label),
    /// From now on filesystems may be frozen, and the lease runs, with so much left of it; `None` is for ever.
    Arm { lease: Option<Duration>, left: Option<Duration> },
    /// The lease begins anew.
    Renew,
    /// Where an agent that returns finds this: its socket comes along. After Configure, where that could not have it.
    Listen,
    /// Thaw all, now and until the end, if it is the freeze of this number.
    Thaw { number: u64, cause: Cause },
    /// All is thawed, for this reason; the hooks are not through yet.
    Thawed(Cause),
    /// The freeze is over.
    End,
}

/// From the watchdog.
#[derive(Debug, PartialEq)]
pub(crate) enum Tale {
    /// It thawed all, for this reason, and nobody had asked; the freeze of this number.
    Thawed { number: u64, cause: Cause },
    /// To an agent that returned: how things are. The filesystems held follow.
    Handover(Handover),
    /// One of them; its descriptor comes along.
    Held(Label),
    /// That was all.
    Ready,
}

/// What a watchdog knows that its new agent does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Handover {
    /// Of the freeze.
    pub(crate) number: u64,
    /// Filesystems may be frozen, or were.
    pub(crate) armed: bool,
    pub(crate) lease: Option<Duration>,
    pub(crate) left: Option<Duration>,
    /// Hooks still want their thaw.
    pub(crate) hooks: bool,
    pub(crate) thawed: Option<Cause>,
}

/// What came.
#[derive(Debug)]
pub(crate) enum Packet<T> {
    Message(T, Option<OwnedFd>),
    /// Nothing yet.
    Nothing,
    /// The other end is closed.
    End,
}

impl Order {
    fn encode(&self) -> Value {
        match self {
            Self::Configure { statedir, hooks } => {
                json!({"configure": {"statedir": statedir, "hooks": hooks.to_json()}})
            }
            Self::Begin { number, hooks } => json!({"begin": {"number": number, "hooks": hooks}}),
            Self::Hook { group } => json!({"hook": group}),
            Self::Hold(label) => json!({"hold": label.to_json()}),
            Self::Arm { lease, left } => {
                json!({"arm": {"lease": lease.map(milliseconds), "left": left.map(milliseconds)}})
            }
            Self::Renew => json!({"renew": true}),
            Self::Listen => json!({"listen": true}),
            Self::Thaw { number, cause } => json!({"thaw": {"number": number, "cause": cause.name()}}),
            Self::Thawed(cause) => json!({"thawed": cause.name()}),
            Self::End => json!({"end": true}),
        }
    }

    fn decode(message: &Value) -> Option<Self> {
        let (name, value) = message.as_object()?.iter().next()?;
        Some(match name.as_str() {
            "configure" => Self::Configure {
                statedir: value["statedir"].as_str()?.to_owned(),
                hooks: Hooks::from_json(&value["hooks"]),
            },
            "begin" => Self::Begin { number: value["number"].as_u64()?, hooks: value["hooks"].as_bool()? },
            "hook" => Self::Hook { group: u32::try_from(value.as_u64()?).ok()? },
            "hold" => Self::Hold(Label::from_json(value)?),
            "arm" => Self::Arm { lease: duration(&value["lease"]), left: duration(&value["left"]) },
            "renew" => Self::Renew,
            "listen" => Self::Listen,
            "thaw" => Self::Thaw {
                number: value["number"].as_u64()?,
                cause: Cause::by_name(value["cause"].as_str()?)?,
            },
            "thawed" => Self::Thawed(Cause::by_name(value.as_str()?)?),
            "end" => Self::End,
            _ => return None,
        })
    }
}

impl Tale {
    fn encode(&self) -> Value {
        match self {
            Self::Thawed { number, cause } => json!({"thawed": {"number": number, "cause": cause.name()}}),
            Self::Handover(handover) => {
                let Handover { number, armed, lease, left, hooks, thawed } = handover;
                json!({"handover": {
                    "number": number,
                    "armed": armed,
                    "lease": lease.map(milliseconds),
                    "left": left.map(milliseconds),
                    "hooks": hooks,
                    "thawed": thawed.map(Cause::name),
                }})
            }
            Self::Held(label) => json!({"held": label.to_json()}),
            Self::Ready => json!({"ready": true}),
        }
    }

    fn decode(message: &Value) -> Option<Self> {
        let (name, value) = message.as_object()?.iter().next()?;
        Some(match name.as_str() {
            "thawed" => Self::Thawed {
                number: value["number"].as_u64()?,
                cause: Cause::by_name(value["cause"].as_str()?)?,
            },
            "handover" => Self::Handover(Handover {
                number: value["number"].as_u64()?,
                armed: value["armed"].as_bool()?,
                lease: duration(&value["lease"]),
                left: duration(&value["left"]),
                hooks: value["hooks"].as_bool()?,
                thawed: value["thawed"].as_str().and_then(Cause::by_name),
            }),
            "held" => Self::Held(Label::from_json(value)?),
            "ready" => Self::Ready,
            _ => return None,
        })
    }
}

fn duration(value: &Value) -> Option<Duration> {
    value.as_u64().map(Duration::from_millis)
}

/// Sends an order. Never waits: who does not take its orders is of no use.
pub(crate) fn send_order(socket: impl AsFd, order: &Order, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    send(socket, &order.encode(), fd, SendFlags::DONTWAIT)
}

/// Sends a tale.
pub(crate) fn send_tale(socket: impl AsFd, tale: &Tale, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    send(socket, &tale.encode(), fd, SendFlags::empty())
}

/// The next order, if there is one; one that this version does not know is passed over. Never waits.
pub(crate) fn receive_order(socket: impl AsFd) -> io::Result<Packet<Order>> {
    receive(socket, Order::decode)
}

/// The next tale, if there is one. Never waits.
pub(crate) fn receive_tale(socket: impl AsFd) -> io::Result<Packet<Tale>> {
    receive(socket, Tale::decode)
}

fn send(socket: impl AsFd, message: &Value, fd: Option<BorrowedFd<'_>>, flags: SendFlags) -> io::Result<()> {
    let text = message.to_string();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        let sent =
            sendmsg(&socket, &[IoSlice::new(text.as_bytes())], &mut ancillary, flags | SendFlags::NOSIGNAL);
        match sent {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn receive<T>(socket: impl AsFd, decode: impl Fn(&Value) -> Option<T>) -> io::Result<Packet<T>> {
    let mut buffer = vec![0; PACKET];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut buffer)];
        let received =
            match recvmsg(&socket, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT) {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Ok(Packet::Nothing),
                Err(rustix::io::Errno::CONNRESET) => return Ok(Packet::End),
                Err(error) => return Err(error.into()),
            };
        if received == 0 {
            return Ok(Packet::End);
        }
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let message = serde_json::from_slice(&buffer[..received]).ok();
        if let Some(message) = message.as_ref().and_then(&decode) {
            return Ok(Packet::Message(message, fd));
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    fn label() -> Label {
        Label {
            mountpoint: "/a \"b\"\n".into(),
            identity: (0, 25),
            device: (254, 16),
            fstype: "btrfs".into(),
        }
    }

    #[test]
    fn orders_arrive_as_they_were_given() {
        let (agent, watchdog) = pair();
        let orders = || {
            [
                Order::Configure { statedir: "/run".into(), hooks: Hooks::default() },
                Order::Begin { number: 3, hooks: true },
                Order::Hook { group: 77 },
                Order::Hold(label()),
                Order::Arm { lease: Some(Duration::from_millis(1500)), left: Some(Duration::from_millis(7)) },
                Order::Arm { lease: None, left: None },
                Order::Renew,
                Order::Listen,
                Order::Thaw { number: 3, cause: Cause::Failure },
                Order::Thawed(Cause::Command),
                Order::End,
            ]
        };
        for order in orders() {
            send_order(&agent, &order, None).unwrap();
        }
        drop(agent);
        for order in orders() {
            let Packet::Message(received, None) = receive_order(&watchdog).unwrap() else { panic!() };
            assert_eq!(received, order);
        }
        assert!(matches!(receive_order(&watchdog).unwrap(), Packet::End));
    }

    #[test]
    fn tales_and_descriptors_arrive() {
        let (agent, watchdog) = pair();
        let handover = Handover {
            number: 3,
            armed: true,
            lease: Some(Duration::from_secs(2)),
            left: Some(Duration::from_millis(7)),
            hooks: true,
            thawed: Some(Cause::AgentLost),
        };
        for tale in
            [Tale::Thawed { number: 3, cause: Cause::Lease }, Tale::Handover(handover.clone()), Tale::Ready]
        {
            send_tale(&watchdog, &tale, None).unwrap();
            let Packet::Message(received, None) = receive_tale(&agent).unwrap() else { panic!() };
            assert_eq!(received, tale);
        }
        send_tale(&watchdog, &Tale::Held(label()), Some(agent.as_fd())).unwrap();
        let Packet::Message(Tale::Held(received), Some(_)) = receive_tale(&agent).unwrap() else { panic!() };
        assert_eq!(received, label());
    }

    #[test]
    fn what_a_later_version_says_is_passed_over() {
        let (agent, watchdog) = pair();
        assert!(matches!(receive_order(&watchdog).unwrap(), Packet::Nothing));
        for message in [json!({"later": 1}), json!([]), json!({"begin": true}), json!({"thaw": "?"})] {
            send(&agent, &message, None, SendFlags::empty()).unwrap();
        }
        send_order(&agent, &Order::End, None).unwrap();

        let Packet::Message(Order::End, _) = receive_order(&watchdog).unwrap() else { panic!() };
    }
}
