//! Typed access to a command's arguments.

use serde_json::Value;

use crate::{Error, Map};

/// Reads a command's arguments one by one and refuses what is left over.
///
/// ```
/// # use protocol::{Args, Error};
/// # fn handler(arguments: protocol::Map) -> Result<i64, Error> {
/// let mut args = Args::new(arguments);
/// let handle = args.int("handle")?;
/// let count = args.optional_int("count")?.unwrap_or(4096);
/// args.finish()?;
/// # Ok(handle + count) }
/// ```
///
/// Every error is complete and ready to be sent. Integers are those JSON writes as integers: `1.0` is
/// none. `null` is a value of the wrong type, not an absent one.
#[derive(Debug)]
pub struct Args {
    members: Map,
    /// What to put before names in errors: `outer.` for the arguments of a nested object.
    prefix: String,
}

impl Args {
    /// The arguments of a request.
    pub fn new(arguments: Map) -> Self {
        Self { members: arguments, prefix: String::new() }
    }

    /// Refuses arguments that nobody read. Call it before the command acts.
    ///
    /// # Errors
    ///
    /// `Parameter 'x' is unexpected`.
    pub fn finish(self) -> Result<(), Error> {
        match self.members.keys().next() {
            None => Ok(()),
            Some(name) => Err(Error::unexpected_parameter(&self.full_name(name))),
        }
    }

    /// An integer within `i64`.
    pub fn int(&mut self, name: &str) -> Result<i64, Error> {
        self.required(name, Self::optional_int)
    }

    /// An integer within `i64`, if present.
    pub fn optional_int(&mut self, name: &str) -> Result<Option<i64>, Error> {
        self.typed(name, "integer", |value| value.as_i64().ok_or(value))
    }

    /// An integer from 0 to `u64::MAX`.
    pub fn uint(&mut self, name: &str) -> Result<u64, Error> {
        self.required(name, Self::optional_uint)
    }

    /// An integer from 0 to `u64::MAX`, if present.
    pub fn optional_uint(&mut self, name: &str) -> Result<Option<u64>, Error> {
        if self.members.get(name).is_some_and(|value| value.as_i64().is_some_and(i64::is_negative)) {
            return Err(Error::invalid_parameter_value(&self.full_name(name), "a non-negative value"));
        }
        self.typed(name, "integer", |value| value.as_u64().ok_or(value))
    }

    /// A string.
    pub fn string(&mut self, name: &str) -> Result<String, Error> {
        self.required(name, Self::optional_string)
    }

    /// A string, if present.
    pub fn optional_string(&mut self, name: &str) -> Result<Option<String>, Error> {
        self.typed(name, "string", string)
    }

    /// `true` or `false`.
    pub fn bool(&mut self, name: &str) -> Result<bool, Error> {
        self.required(name, Self::optional_bool)
    }

    /// `true` or `false`, if present.
    pub fn optional_bool(&mut self, name: &str) -> Result<Option<bool>, Error> {
        self.typed(name, "boolean", |value| value.as_bool().ok_or(value))
    }

    /// One of the strings in `table`.
    pub fn choice<T: Copy>(&mut self, name: &str, table: &[(&str, T)]) -> Result<T, Error> {
        self.required(name, |args, name| args.optional_choice(name, table))
    }

    /// One of the strings in `table`, if present.
    pub fn optional_choice<T: Copy>(&mut self, name: &str, table: &[(&str, T)]) -> Result<Option<T>, Error> {
        let Some(value) = self.optional_string(name)? else { return Ok(None) };
        match table.iter().find(|(known, _)| *known == value) {
            Some((_, choice)) => Ok(Some(*choice)),
            None => Err(Error::invalid_enum_value(&self.full_name(name), &value)),
        }
    }

    /// An array of anything.
    pub fn array(&mut self, name: &str) -> Result<Vec<Value>, Error> {
        self.required(name, Self::optional_array)
    }

    /// An array of anything, if present.
    pub fn optional_array(&mut self, name: &str) -> Result<Option<Vec<Value>>, Error> {
        self.typed(name, "array", |value| match value {
            Value::Array(values) => Ok(values),
            other => Err(other),
        })
    }

    /// An array of strings.
    pub fn strings(&mut self, name: &str) -> Result<Vec<String>, Error> {
        self.required(name, Self::optional_strings)
    }

    /// An array of strings, if present.
    pub fn optional_strings(&mut self, name: &str) -> Result<Option<Vec<String>>, Error> {
        let Some(values) = self.optional_array(name)? else { return Ok(None) };
        let strings = values.into_iter().enumerate().map(|(index, value)| {
            let element = || self.full_name(&format!("{name}[{index}]"));
            string(value).map_err(|_| Error::invalid_parameter_type(&element(), "string"))
        });
        strings.collect::<Result<_, _>>().map(Some)
    }

    /// An array of nested objects; the [`finish`](Self::finish) of each checks its members.
    pub fn objects(&mut self, name: &str) -> Result<Vec<Self>, Error> {
        let objects = self.array(name)?.into_iter().enumerate().map(|(index, value)| {
            let element = self.full_name(&format!("{name}[{index}]"));
            match value {
                Value::Object(members) => Ok(Self { members, prefix: format!("{element}.") }),
                _ => Err(Error::invalid_parameter_type(&element, "object")),
            }
        });
        objects.collect()
    }

    /// A nested object; its own [`finish`](Self::finish) checks its members.
    pub fn object(&mut self, name: &str) -> Result<Self, Error> {
        self.required(name, Self::optional_object)
    }

    /// A nested object, if present.
    pub fn optional_object(&mut self, name: &str) -> Result<Option<Self>, Error> {
        let members = self.typed(name, "object", |value| match value {
            Value::Object(members) => Ok(members),
            other => Err(other),
        })?;
        let prefix = format!("{}.", self.full_name(name));
        Ok(members.map(|members| Self { members, prefix }))
    }

    /// Any value, if present: for alternates, which the caller tells apart.
    pub fn optional_value(&mut self, name: &str) -> Option<Value> {
        self.members.remove(name)
    }

    /// A parameter's name as errors show it.
    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn required<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&mut Self, &str) -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        read(self, name)?.ok_or_else(|| Error::missing_parameter(&self.full_name(name)))
    }

    fn typed<T>(
        &mut self,
        name: &str,
        expected: &str,
        convert: impl FnOnce(Value) -> Result<T, Value>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.members.remove(name) else { return Ok(None) };
        let converted = convert(value);
        converted.map(Some).map_err(|_| Error::invalid_parameter_type(&self.full_name(name), expected))
    }
}

fn string(value: Value) -> Result<String, Value> {
    match value {
        Value::String(string) => Ok(string),
        other => Err(other),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn args(value: Value) -> Args {
        let Value::Object(members) = value else { panic!("not an object") };
        Args::new(members)
    }

    fn desc<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
        result.unwrap_err().desc
    }

    #[test]
    fn integers_are_exact_and_never_doubles() {
        assert_eq!(args(json!({"id": i64::MAX})).int("id").unwrap(), i64::MAX);
        for value in [json!(u64::MAX), json!(1.0), json!("1"), json!(true), json!(null)] {
            let text = desc(args(json!({"id": value})).int("id"));
            assert_eq!(text, "Invalid parameter type for 'id', expected: integer");
        }
        assert_eq!(desc(args(json!({})).int("id")), "Parameter 'id' is missing");
    }

    #[test]
    fn unsigned_integers_refuse_negative_values_by_name() {
        assert_eq!(args(json!({"speed": u64::MAX})).uint("speed").unwrap(), u64::MAX);
        assert_eq!(
            desc(args(json!({"speed": -1})).uint("speed")),
            "Parameter 'speed' expects a non-negative value"
        );
        assert_eq!(
            desc(args(json!({"speed": "1"})).uint("speed")),
            "Invalid parameter type for 'speed', expected: integer"
        );
    }

    #[test]
    fn what_nobody_read_is_unexpected() {
        let mut args = args(json!({"a": 1, "b": 2}));
        args.int("a").unwrap();
        assert_eq!(desc(args.finish()), "Parameter 'b' is unexpected");
    }

    #[test]
    fn enumerations_name_the_value_they_refuse() {
        let table = [("set", 0), ("cur", 1)];
        assert_eq!(args(json!({"whence": "cur"})).choice("whence", &table).unwrap(), 1);
        assert_eq!(
            desc(args(json!({"whence": "SET"})).choice("whence", &table)),
            "Parameter 'whence' does not accept value 'SET'"
        );
        assert_eq!(args(json!({})).optional_choice("whence", &table).unwrap(), None);
    }

    #[test]
    fn elements_and_nested_members_are_named_by_path() {
        assert_eq!(
            desc(args(json!({"arg": ["a", 1]})).strings("arg")),
            "Invalid parameter type for 'arg[1]', expected: string"
        );
        let mut inner = args(json!({"file": {"x": 1}})).object("file").unwrap();
        assert_eq!(desc(inner.string("driver")), "Parameter 'file.driver' is missing");
        assert_eq!(desc(inner.finish()), "Parameter 'file.x' is unexpected");
        let mut inner = args(json!({"vcpus": [{"id": 1}, {"id": true, "x": 1}]})).objects("vcpus").unwrap();
        assert_eq!(inner[0].int("id").unwrap(), 1);
        assert_eq!(desc(inner[1].int("id")), "Invalid parameter type for 'vcpus[1].id', expected: integer");
        assert_eq!(desc(inner.remove(1).finish()), "Parameter 'vcpus[1].x' is unexpected");
        assert_eq!(
            desc(args(json!({"vcpus": [{}, 1]})).objects("vcpus")),
            "Invalid parameter type for 'vcpus[1]', expected: object"
        );
    }
}
