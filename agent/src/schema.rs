//! How commands are declared: name, arguments, result, and when each may run.
//!
//! Every command family exports its declarations as a `COMMANDS` table; [`crate::dispatch`] strings them
//! together. The dispatcher's checks, `guest-info`, the block and allow lists and the document that
//! `tarn-agent --schema` prints all come from there, so none of them can say something else.
//!
//! ```text
//!   const COMMANDS: &[Command] = &[
//!       Command::new("guest-set-time", "Sets the clock")
//!           .takes(&[optional("time", Type::INT)])
//!           .run(Run::Worker(set_time)),
//!   ];
//! ```

use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::guest::Guest;

/// A JSON value's type, as far as clients may rely on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Type {
    /// An integer.
    Int,
    /// Any number.
    Number,
    /// `true` or `false`.
    Bool,
    /// A string.
    Str,
    /// Base64 of bytes.
    Base64,
    /// One of these strings.
    Enum(&'static [&'static str]),
    /// Elements of one type.
    Array(&'static Type),
    /// Members, no others.
    Object(&'static [Field]),
    /// One of several types; the name is the reference's, which its errors mention.
    Alternate(&'static str, &'static [Type]),
}

/// A member of an object, or an argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Field {
    name: &'static str,
    of: Type,
    optional: bool,
}

impl Field {
    pub(crate) const fn name(&self) -> &'static str {
        self.name
    }
}

/// A member that is always there.
pub(crate) const fn required(name: &'static str, of: Type) -> Field {
    Field { name, of, optional: false }
}

/// A member that may be absent.
pub(crate) const fn optional(name: &'static str, of: Type) -> Field {
    Field { name, of, optional: true }
}

/// A command's code. `Err` is the complete error reply.
#[derive(Clone, Copy)]
pub(crate) enum Run {
    /// On the main loop, at once: it never waits and touches no filesystem. Only these can be asked
    /// for out of band.
    Prompt(fn(&mut Agent, Args) -> Result<Value, Error>),
    /// On the worker, in its turn: it may take as long as it likes.
    Worker(fn(&mut Guest, Args) -> Result<Value, Error>),
}

/// What a command means for a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Nothing.
    None,
    /// It freezes: nobody who hears of its success must leave without a trace.
    Freeze,
    /// It thaws, and so ends a freeze in progress.
    Thaw,
    /// It asks how things are, and so shows that somebody cares.
    FreezeStatus,
}

/// A command, declared once.
#[derive(Clone, Copy)]
pub(crate) struct Command {
    pub(crate) name: &'static str,
    /// One sentence without its full stop.
    pub(crate) about: &'static str,
    pub(crate) arguments: &'static [Field],
    pub(crate) returns: Type,
    pub(crate) run: Run,
    /// Whether it may run while filesystems are frozen: only if it can neither write to a disk nor
    /// wait for somebody who does.
    pub(crate) while_frozen: bool,
    /// Whether it may be asked for by `exec-oob`.
    pub(crate) out_of_band: bool,
    /// Whether success is answered at all.
    pub(crate) success_response: bool,
    /// Whether 0xFF precedes a successful reply.
    pub(crate) marked: bool,
    pub(crate) role: Role,
}

impl Command {
    /// A command without arguments and result.
    pub(crate) const fn new(name: &'static str, about: &'static str, run: Run) -> Self {
        Self {
            name,
            about,
            arguments: &[],
            returns: Type::Object(&[]),
            run,
            while_frozen: false,
            out_of_band: false,
            success_response: true,
            marked: false,
            role: Role::None,
        }
    }

    pub(crate) const fn takes(self, arguments: &'static [Field]) -> Self {
        Self { arguments, ..self }
    }

    pub(crate) const fn returns(self, returns: Type) -> Self {
        Self { returns, ..self }
    }

    pub(crate) const fn while_frozen(self) -> Self {
        Self { while_frozen: true, ..self }
    }

    pub(crate) const fn out_of_band(self) -> Self {
        Self { out_of_band: true, ..self }
    }

    pub(crate) const fn without_success_response(self) -> Self {
        Self { success_response: false, ..self }
    }

    pub(crate) const fn plays(self, role: Role) -> Self {
        Self { role, ..self }
    }

    pub(crate) const fn marked(self) -> Self {
        Self { marked: true, ..self }
    }

    /// The command in the schema document.
    pub(crate) fn document(&self) -> Value {
        let mut document = Map::new();
        document.insert("name".into(), self.name.into());
        document.insert("about".into(), self.about.into());
        document.insert("arguments".into(), members(self.arguments));
        document.insert("returns".into(), self.returns.document());
        for (name, set) in [
            ("allowed-while-frozen", self.while_frozen),
            ("out-of-band", self.out_of_band),
            ("success-response", self.success_response),
        ] {
            document.insert(name.into(), set.into());
        }
        Value::Object(document)
    }
}

impl Type {
    fn document(&self) -> Value {
        match self {
            Self::Int => "integer".into(),
            Self::Number => "number".into(),
            Self::Bool => "boolean".into(),
            Self::Str => "string".into(),
            Self::Base64 => "base64".into(),
            Self::Enum(words) => json!({"enum": words}),
            Self::Array(of) => json!({"array": of.document()}),
            Self::Object(fields) => json!({"object": members(fields)}),
            Self::Alternate(_, types) => {
                json!({"any-of": types.iter().map(Self::document).collect::<Vec<_>>()})
            }
        }
    }

    /// Whether a value is of this type; the path to the first place where it is not.
    #[cfg(test)]
    pub(crate) fn check(&self, value: &Value) -> Result<(), String> {
        let fits = match (self, value) {
            (Self::Int, value) => value.is_i64() || value.is_u64(),
            (Self::Number, value) => value.is_number(),
            (Self::Bool, value) => value.is_boolean(),
            (Self::Str | Self::Base64, value) => value.is_string(),
            (Self::Enum(words), value) => value.as_str().is_some_and(|word| words.contains(&word)),
            (Self::Array(of), Value::Array(values)) => {
                for (index, value) in values.iter().enumerate() {
                    of.check(value).map_err(|path| format!("[{index}]{path}"))?;
                }
                true
            }
            (Self::Object(fields), Value::Object(object)) => return check_members(fields, object),
            (Self::Alternate(_, types), value) => types.iter().any(|of| of.check(value).is_ok()),
            (Self::Array(_) | Self::Object(_), _) => false,
        };
        if fits { Ok(()) } else { Err(format!(": {value} is no {}", self.document())) }
    }
}

#[cfg(test)]
fn check_members(fields: &[Field], object: &Map) -> Result<(), String> {
    for field in fields {
        match object.get(field.name) {
            Some(value) => field.of.check(value).map_err(|path| format!(".{}{path}", field.name))?,
            None if field.optional => {}
            None => return Err(format!(".{} is missing", field.name)),
        }
    }
    let declared = |name: &String| fields.iter().any(|field| field.name == name);
    object.keys().find(|name| !declared(name)).map_or(Ok(()), |name| Err(format!(".{name} is not declared")))
}

fn members(fields: &[Field]) -> Value {
    let document = |field: &Field| {
        let name = if field.optional { format!("*{}", field.name) } else { field.name.to_owned() };
        (name, field.of.document())
    };
    Value::Object(fields.iter().map(document).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERSON: Type = Type::Object(&[
        required("name", Type::Str),
        optional("age", Type::Int),
        optional("keys", Type::Array(&Type::Enum(&["a", "b"]))),
    ]);

    #[test]
    fn a_value_is_checked_to_its_last_member() {
        assert_eq!(PERSON.check(&json!({"name": "x", "age": 3, "keys": ["a", "b"]})), Ok(()));
        let wrong = |value| PERSON.check(&value).unwrap_err();
        assert_eq!(wrong(json!({})), ".name is missing");
        assert_eq!(wrong(json!({"name": "x", "shoe": 1})), ".shoe is not declared");
        assert_eq!(wrong(json!({"name": "x", "age": 1.5})), ".age: 1.5 is no \"integer\"");
        assert_eq!(
            wrong(json!({"name": "x", "keys": ["a", "c"]})),
            ".keys[1]: \"c\" is no {\"enum\":[\"a\",\"b\"]}"
        );
    }

    #[test]
    fn the_document_marks_optional_members() {
        let expected = json!({"object": {
            "name": "string", "*age": "integer", "*keys": {"array": {"enum": ["a", "b"]}},
        }});
        assert_eq!(PERSON.document(), expected);
    }
}
