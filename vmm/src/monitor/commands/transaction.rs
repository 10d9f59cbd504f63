//! `transaction`.

use protocol::{Args, Error};
use serde_json::Value;

use super::super::schema::{EMPTY, Member, Object, Type, Variants, optional, required};
use super::super::vm::BlockLayer;
use super::backup::{BLOCKDEV_BACKUP, DRIVE_BACKUP, blockdev_backup, drive_backup};
use super::{Call, Command, nothing};
use crate::jobs::transaction::Action;

pub(super) const COMMANDS: &[Command] = &[Command {
    name: "transaction",
    arguments: &TRANSACTION,
    returns: Type::Object(&EMPTY),
    run: transaction,
}];

static TRANSACTION: Object = Object::new(&[
    required("actions", Type::Array(&Type::Object(&ACTION))),
    optional("properties", Type::Object(&PROPERTIES)),
]);
static PROPERTIES: Object =
    Object::new(&[optional("completion-mode", Type::Enum(&["individual", "grouped"]))]);
static ACTION: Object = Object {
    members: &[required("type", Type::Enum(&["abort", "blockdev-backup", "drive-backup"]))],
    variants: Some(Variants {
        tag: "type",
        cases: &[("abort", &ABORT), ("blockdev-backup", &BLOCKDEV), ("drive-backup", &DRIVE)],
    }),
};
static ABORT: Object = Object::new(&[data(&EMPTY)]);
static BLOCKDEV: Object = Object::new(&[data(&BLOCKDEV_BACKUP)]);
static DRIVE: Object = Object::new(&[data(&DRIVE_BACKUP)]);

const fn data(object: &'static Object) -> Member {
    required("data", Type::Object(object))
}

fn transaction(call: &mut Call<'_>) -> Result<Value, Error> {
    let properties = call.args.optional_object("properties")?;
    let mode = properties.map_or(Ok(None), |mut args| args.optional_string("completion-mode"))?;
    let actions = call.args.objects("actions")?.into_iter().map(|mut action| {
        let mut data: Args = action.object("data")?;
        Ok(match action.string("type")?.as_str() {
            "abort" => Action::Abort,
            "blockdev-backup" => Action::Backup(blockdev_backup(&mut data)?),
            _ => Action::Backup(drive_backup(call.fdsets, &mut data)?),
        })
    });
    let actions: Vec<_> = actions.collect::<Result<_, Error>>()?;
    let BlockLayer { jobs, disks } = call.vm.block();
    jobs.transact(disks, &actions, mode.as_deref() == Some("grouped")).map(|()| nothing())
}
