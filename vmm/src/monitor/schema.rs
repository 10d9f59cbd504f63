//! What commands take, give and tell, as data.
//!
//! The command table and the event table are written in these types. Three things derive from them, so
//! that none can lie: the check of arguments before a command runs, `query-commands`, and
//! `query-qmp-schema` with QEMU's SchemaInfo (qapi/introspect.json). Tests hold what commands return and
//! events carry against the same declarations.

use protocol::{Error, Map};
use serde_json::{Value, json};

/// A type of the monitor's wire.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// `true` or `false`.
    Bool,
    /// An integer within `i64`, written as one: `1.0` is none.
    Int,
    /// A string.
    Str,
    /// Anything.
    Any,
    /// A list of one type.
    Array(&'static Type),
    /// One of several strings.
    Enum(&'static [&'static str]),
    /// An object.
    Object(&'static Object),
}

/// An object type.
#[derive(Debug)]
pub struct Object {
    /// Members every value of the type may have.
    pub members: &'static [Member],
    /// Members that depend on the value of another.
    pub variants: Option<Variants>,
}

/// Members that depend on the value of `tag`, an enumeration.
#[derive(Debug)]
pub struct Variants {
    /// Name of the member that decides.
    pub tag: &'static str,
    /// Its value, and the members that come with it.
    pub cases: &'static [(&'static str, &'static Object)],
}

/// A member of an object.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// Whether it may be absent.
    pub optional: bool,
}

impl Object {
    /// An object with these members alone.
    pub const fn new(members: &'static [Member]) -> Self {
        Self { members, variants: None }
    }

    fn case(&self, object: &Map) -> Option<&'static Self> {
        let variants = self.variants.as_ref()?;
        let tag = object.get(variants.tag)?.as_str()?;
        variants.cases.iter().find(|(name, _)| *name == tag).map(|(_, case)| *case)
    }
}

/// A member that must be there.
pub const fn required(name: &'static str, ty: Type) -> Member {
    Member { name, ty, optional: false }
}

/// A member that may be there.
pub const fn optional(name: &'static str, ty: Type) -> Member {
    Member { name, ty, optional: true }
}

/// The object without members: no arguments, no result, no data.
pub static EMPTY: Object = Object::new(&[]);

impl Type {
    /// What errors call it (QEMU `qapi/qobject-input-visitor.c`).
    fn expected(&self) -> &'static str {
        match self {
            Self::Bool => "boolean",
            Self::Int => "integer",
            Self::Str | Self::Enum(_) => "string",
            Self::Any => "value",
            Self::Array(_) => "array",
            Self::Object(_) => "object",
        }
    }
}

/// Checks a request's arguments.
///
/// # Errors
///
/// The first of: a member missing, a member of the wrong type or value, a member that is unknown.
pub fn check_arguments(arguments: &Map, object: &Object) -> Result<(), Error> {
    check_object(arguments, object, "")
}

fn check_object(value: &Map, object: &Object, path: &str) -> Result<(), Error> {
    let full = |name: &str| format!("{path}{name}");
    let case = object.case(value);
    let members = || object.members.iter().chain(case.iter().flat_map(|case| case.members));
    for member in members() {
        match value.get(member.name) {
            Some(found) => check(found, &member.ty, &full(member.name))?,
            None if member.optional => {}
            None => return Err(Error::missing_parameter(&full(member.name))),
        }
    }
    match value.keys().find(|name| members().all(|member| member.name != name.as_str())) {
        Some(unknown) => Err(Error::unexpected_parameter(&full(unknown))),
        None => Ok(()),
    }
}

fn check(value: &Value, ty: &Type, path: &str) -> Result<(), Error> {
    let wrong_type = || Err(Error::invalid_parameter_type(path, ty.expected()));
    match (ty, value) {
        (Type::Any, _) | (Type::Bool, Value::Bool(_)) | (Type::Str, Value::String(_)) => Ok(()),
        (Type::Int, value) if value.is_i64() => Ok(()),
        (Type::Enum(values), Value::String(text)) => {
            let known = values.contains(&text.as_str());
            if known { Ok(()) } else { Err(Error::invalid_enum_value(path, text)) }
        }
        (Type::Array(element), Value::Array(values)) => values
            .iter()
            .enumerate()
            .try_for_each(|(index, value)| check(value, element, &format!("{path}[{index}]"))),
        (Type::Object(object), Value::Object(members)) => check_object(members, object, &format!("{path}.")),
        _ => wrong_type(),
    }
}

/// Collects SchemaInfo for commands, events and every type they reach.
#[derive(Default)]
pub struct Introspection {
    entities: Vec<Value>,
    /// Types met so far: QEMU hides their names behind numbers, as they are no interface.
    objects: Vec<&'static Object>,
    enums: Vec<&'static [&'static str]>,
    arrays: Vec<String>,
    builtins: Vec<&'static str>,
}

impl Introspection {
    /// Adds a command.
    pub fn command(&mut self, name: &str, arguments: &'static Object, returns: &Type) {
        let (arg_type, ret_type) = (self.object(arguments), self.name(returns));
        self.entities
            .push(json!({"name": name, "meta-type": "command", "arg-type": arg_type, "ret-type": ret_type}));
    }

    /// Adds an event.
    pub fn event(&mut self, name: &str, data: &'static Object) {
        let arg_type = self.object(data);
        self.entities.push(json!({"name": name, "meta-type": "event", "arg-type": arg_type}));
    }

    /// All of it: commands and events in the order they were added, types among them.
    pub fn finish(self) -> Value {
        Value::Array(self.entities)
    }

    fn name(&mut self, ty: &Type) -> String {
        match ty {
            Type::Bool => self.builtin("bool", "boolean"),
            Type::Int => self.builtin("int", "int"),
            Type::Str => self.builtin("str", "string"),
            Type::Any => self.builtin("any", "value"),
            Type::Array(element) => self.array(element),
            Type::Enum(values) => self.enumeration(values),
            Type::Object(object) => self.object(object),
        }
    }

    fn builtin(&mut self, name: &'static str, json_type: &str) -> String {
        if !self.builtins.contains(&name) {
            self.builtins.push(name);
            self.entities.push(json!({"name": name, "meta-type": "builtin", "json-type": json_type}));
        }
        name.into()
    }

    fn array(&mut self, element: &Type) -> String {
        let element = self.name(element);
        let name = format!("[{element}]");
        if !self.arrays.contains(&name) {
            self.arrays.push(name.clone());
            self.entities.push(json!({"name": name, "meta-type": "array", "element-type": element}));
        }
        name
    }

    fn enumeration(&mut self, values: &'static [&'static str]) -> String {
        if let Some(index) = self.enums.iter().position(|known| *known == values) {
            return format!("e{index}");
        }
        let name = format!("e{}", self.enums.len());
        self.enums.push(values);
        let members: Vec<_> = values.iter().map(|value| json!({"name": value})).collect();
        self.entities.push(json!({"name": name, "meta-type": "enum", "members": members, "values": values}));
        name
    }

    fn object(&mut self, object: &'static Object) -> String {
        if let Some(index) = self.objects.iter().position(|known| std::ptr::eq(*known, object)) {
            return index.to_string();
        }
        let name = self.objects.len().to_string();
        self.objects.push(object);
        let member = |member: &Member| {
            let mut info = json!({"name": member.name, "type": self.name(&member.ty)});
            if member.optional {
                info["default"] = Value::Null;
            }
            info
        };
        let members: Vec<_> = object.members.iter().map(member).collect();
        let mut info = json!({"name": name, "meta-type": "object", "members": members});
        if let Some(variants) = &object.variants {
            let case =
                |(case, object): &(&str, &'static Object)| json!({"case": case, "type": self.object(object)});
            info["tag"] = variants.tag.into();
            info["variants"] = variants.cases.iter().map(case).collect();
        }
        self.entities.push(info);
        name
    }
}

/// What `query-qmp-schema` returns, itself in the schema.
pub static SCHEMA_INFO: Object = Object {
    members: &[required("name", Type::Str), required("meta-type", Type::Enum(META_TYPES))],
    variants: Some(Variants {
        tag: "meta-type",
        cases: &[
            ("builtin", &SCHEMA_INFO_BUILTIN),
            ("enum", &SCHEMA_INFO_ENUM),
            ("array", &SCHEMA_INFO_ARRAY),
            ("object", &SCHEMA_INFO_OBJECT),
            ("command", &SCHEMA_INFO_COMMAND),
            ("event", &SCHEMA_INFO_EVENT),
        ],
    }),
};
const META_TYPES: &[&str] = &["builtin", "enum", "array", "object", "command", "event"];
static SCHEMA_INFO_BUILTIN: Object = Object::new(&[required(
    "json-type",
    Type::Enum(&["string", "number", "int", "boolean", "null", "object", "array", "value"]),
)]);
static SCHEMA_INFO_ENUM: Object = Object::new(&[
    required("members", Type::Array(&Type::Object(&SCHEMA_INFO_ENUM_MEMBER))),
    required("values", Type::Array(&Type::Str)),
]);
static SCHEMA_INFO_ENUM_MEMBER: Object = Object::new(&[required("name", Type::Str)]);
static SCHEMA_INFO_ARRAY: Object = Object::new(&[required("element-type", Type::Str)]);
static SCHEMA_INFO_OBJECT: Object = Object::new(&[
    required("members", Type::Array(&Type::Object(&SCHEMA_INFO_OBJECT_MEMBER))),
    optional("tag", Type::Str),
    optional("variants", Type::Array(&Type::Object(&SCHEMA_INFO_OBJECT_VARIANT))),
]);
static SCHEMA_INFO_OBJECT_MEMBER: Object =
    Object::new(&[required("name", Type::Str), required("type", Type::Str), optional("default", Type::Any)]);
static SCHEMA_INFO_OBJECT_VARIANT: Object =
    Object::new(&[required("case", Type::Str), required("type", Type::Str)]);
static SCHEMA_INFO_COMMAND: Object =
    Object::new(&[required("arg-type", Type::Str), required("ret-type", Type::Str)]);
static SCHEMA_INFO_EVENT: Object = Object::new(&[required("arg-type", Type::Str)]);

/// Holds a result against its declaration, for tests.
#[cfg(test)]
pub fn conforms(value: &Value, ty: &Type) -> Result<(), Error> {
    check(value, ty, "result")
}

#[cfg(test)]
mod tests {
    use super::*;

    static NESTED: Object = Object::new(&[required("n", Type::Int)]);
    static SAMPLE: Object = Object::new(&[
        required("name", Type::Str),
        optional("mode", Type::Enum(&["a", "b"])),
        optional("flag", Type::Bool),
        optional("list", Type::Array(&Type::Object(&NESTED))),
    ]);

    fn refusal(arguments: Value) -> String {
        let Value::Object(arguments) = arguments else { panic!("not an object") };
        check_arguments(&arguments, &SAMPLE).unwrap_err().desc
    }

    #[test]
    fn arguments_are_refused_in_the_fields_own_words() {
        assert_eq!(refusal(json!({})), "Parameter 'name' is missing");
        assert_eq!(refusal(json!({"name": "x", "y": 1})), "Parameter 'y' is unexpected");
        assert_eq!(refusal(json!({"name": 1})), "Invalid parameter type for 'name', expected: string");
        assert_eq!(refusal(json!({"name": null})), "Invalid parameter type for 'name', expected: string");
        assert_eq!(
            refusal(json!({"name": "", "mode": "zzz"})),
            "Parameter 'mode' does not accept value 'zzz'"
        );
        assert_eq!(
            refusal(json!({"name": "", "list": [{"n": 1}, {"n": 1.0}]})),
            "Invalid parameter type for 'list[1].n', expected: integer"
        );
    }

    #[test]
    fn sound_arguments_pass() {
        let sound = json!({"name": "x", "mode": "b", "flag": true, "list": [{"n": -1}]});
        assert_eq!(check_arguments(sound.as_object().unwrap(), &SAMPLE), Ok(()));
    }

    #[test]
    fn every_type_that_is_named_is_described_exactly_once() {
        let mut introspection = Introspection::default();
        const LIST: Type = Type::Array(&Type::Object(&SCHEMA_INFO));
        introspection.command("one", &SAMPLE, &LIST);
        introspection.command("two", &SAMPLE, &Type::Object(&EMPTY));
        introspection.event("EVENT", &EMPTY);
        let Value::Array(entities) = introspection.finish() else { panic!("not a list") };
        let names: Vec<_> = entities.iter().map(|entity| entity["name"].as_str().unwrap()).collect();
        let mut unique = names.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), names.len());
        for entity in &entities {
            for reference in ["arg-type", "ret-type", "element-type"] {
                if let Some(reference) = entity.get(reference) {
                    assert!(names.contains(&reference.as_str().unwrap()), "{entity}");
                }
            }
            conforms(entity, &Type::Object(&SCHEMA_INFO)).unwrap();
        }
    }
}
