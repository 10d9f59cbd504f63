//! guest-network-get-interfaces and guest-network-get-route.

mod interfaces;
mod netlink;
mod routes;

use crate::schema::{Command, Run, Type};

pub(crate) const COMMANDS: &[Command] = &[
    Command::new(
        "guest-network-get-route",
        "The routing tables for IPv4 and IPv6",
        Run::Worker(routes::get_route),
    )
    .returns(Type::Array(&routes::ROUTE)),
    Command::new(
        "guest-network-get-interfaces",
        "Network interfaces with their addresses; counters of those that have any",
        Run::Worker(interfaces::get_interfaces),
    )
    .returns(Type::Array(&interfaces::INTERFACE)),
];
