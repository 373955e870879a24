//! Finds a number in a serialisable value that JSON cannot hold.

use std::fmt::{self, Display};

use serde::ser::{self, Serialize, Serializer};

/// The path and value of the first number that is NaN or infinite.
pub(super) fn find<T: Serialize + ?Sized>(value: &T) -> Option<(String, f64)> {
    match value.serialize(Finder) {
        // A value that cannot be serialised fails when it is written.
        Ok(()) | Err(Found { number: None, .. }) => None,
        Err(Found { mut path, number: Some(number) }) => {
            path.reverse();
            let path = path.concat();
            Some((path.trim_start_matches('.').to_owned(), number))
        }
    }
}

/// Visits every number and writes nothing.
#[derive(Clone, Copy)]
struct Finder;

/// Ends the visit: at a number, or if the value cannot be serialised.
#[derive(Debug)]
struct Found {
    /// Steps to the number, the innermost first: `.name` or `[index]`.
    path: Vec<String>,
    number: Option<f64>,
}

impl Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.number)
    }
}

impl std::error::Error for Found {}

impl ser::Error for Found {
    fn custom<T: Display>(_: T) -> Found {
        Found { path: Vec::new(), number: None }
    }
}

/// Visits a part of a value, whose step in the path is `step`.
fn visit<T: Serialize + ?Sized>(value: &T, step: impl FnOnce() -> String) -> Result<(), Found> {
    value.serialize(Finder).map_err(|mut found| {
        found.path.push(step());
        found
    })
}

/// The part of a list or map that is visited next.
struct Parts {
    index: usize,
    key: String,
}

const START: Parts = Parts { index: 0, key: String::new() };

impl Parts {
    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Found> {
        let index = self.index;
        self.index += 1;
        visit(value, || format!("[{index}]"))
    }
}

macro_rules! without_numbers {
    ($($name:ident($type:ty))*) => {
        $(fn $name(self, _: $type) -> Result<(), Found> {
            Ok(())
        })*
    };
}

impl Serializer for Finder {
    type Ok = ();
    type Error = Found;
    type SerializeSeq = Parts;
    type SerializeTuple = Parts;
    type SerializeTupleStruct = Parts;
    type SerializeTupleVariant = Parts;
    type SerializeMap = Parts;
    type SerializeStruct = Parts;
    type SerializeStructVariant = Parts;

    without_numbers! {
        serialize_bool(bool) serialize_char(char) serialize_str(&str) serialize_bytes(&[u8])
        serialize_i8(i8) serialize_i16(i16) serialize_i32(i32) serialize_i64(i64) serialize_i128(i128)
        serialize_u8(u8) serialize_u16(u16) serialize_u32(u32) serialize_u64(u64) serialize_u128(u128)
        serialize_unit_struct(&'static str)
    }

    fn serialize_f32(self, number: f32) -> Result<(), Found> {
        self.serialize_f64(number.into())
    }

    fn serialize_f64(self, number: f64) -> Result<(), Found> {
        if number.is_finite() { Ok(()) } else { Err(Found { path: Vec::new(), number: Some(number) }) }
    }

    fn serialize_none(self) -> Result<(), Found> {
        Ok(())
    }

    fn serialize_unit(self) -> Result<(), Found> {
        Ok(())
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Found> {
        value.serialize(self)
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Result<(), Found> {
        Ok(())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), Found> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), Found> {
        visit(value, || format!(".{variant}"))
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Parts, Found> {
        Ok(START)
    }

    fn serialize_tuple(self, _: usize) -> Result<Parts, Found> {
        Ok(START)
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Parts, Found> {
        Ok(START)
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Parts, Found> {
        Ok(START)
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Parts, Found> {
        Ok(START)
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Parts, Found> {
        Ok(START)
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: usize,
    ) -> Result<Parts, Found> {
        Ok(START)
    }
}

macro_rules! list {
    ($($interface:ident::$method:ident)*) => {
        $(impl ser::$interface for Parts {
            type Ok = ();
            type Error = Found;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Found> {
                self.element(value)
            }

            fn end(self) -> Result<(), Found> {
                Ok(())
            }
        })*
    };
}

list! {
    SerializeSeq::serialize_element SerializeTuple::serialize_element
    SerializeTupleStruct::serialize_field SerializeTupleVariant::serialize_field
}

macro_rules! fields {
    ($($interface:ident)*) => {
        $(impl ser::$interface for Parts {
            type Ok = ();
            type Error = Found;

            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                name: &'static str,
                value: &T,
            ) -> Result<(), Found> {
                visit(value, || format!(".{name}"))
            }

            fn end(self) -> Result<(), Found> {
                Ok(())
            }
        })*
    };
}

fields! { SerializeStruct SerializeStructVariant }

impl ser::SerializeMap for Parts {
    type Ok = ();
    type Error = Found;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Found> {
        self.key = serde_json::to_string(key).unwrap_or_default().trim_matches('"').to_owned();
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Found> {
        visit(value, || format!(".{}", self.key))
    }

    fn end(self) -> Result<(), Found> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Serialize;

    use super::find;

    #[derive(Serialize)]
    enum Kind {
        One(f64),
        Two(f32, f32),
        Named { x: f64 },
        Unit,
    }

    #[derive(Serialize)]
    struct Result {
        name: String,
        estimates: Vec<Option<f64>>,
        by_scorer: BTreeMap<String, f32>,
        kind: Kind,
        #[serde(flatten)]
        more: BTreeMap<String, f64>,
    }

    fn result() -> Result {
        Result {
            name: "a".into(),
            estimates: vec![None, Some(1.0)],
            by_scorer: BTreeMap::from([("lexical".into(), 0.5)]),
            kind: Kind::Unit,
            more: BTreeMap::from([("rate".into(), -1.0)]),
        }
    }

    #[test]
    fn finite_numbers_pass() {
        for kind in [Kind::One(1.0), Kind::Two(0.0, f32::MAX), Kind::Named { x: 2.0 }, Kind::Unit] {
            assert_eq!(find(&Result { kind, ..result() }), None);
        }
        assert_eq!(find(&serde_json::json!({"a": [1, null, "NaN", 0.5]})), None);
    }

    #[test]
    fn the_path_leads_to_the_number() {
        let path = |result: Result| find(&result).expect("it has a number that is not finite").0;
        assert_eq!(path(Result { estimates: vec![None, Some(f64::NAN)], ..result() }), "estimates[1]");
        let by_scorer = BTreeMap::from([("lexical".into(), f32::INFINITY)]);
        assert_eq!(path(Result { by_scorer, ..result() }), "by_scorer.lexical");
        assert_eq!(path(Result { kind: Kind::One(f64::NAN), ..result() }), "kind.One");
        assert_eq!(path(Result { kind: Kind::Two(0.0, f32::NAN), ..result() }), "kind[1]");
        assert_eq!(path(Result { kind: Kind::Named { x: f64::NAN }, ..result() }), "kind.x");
        let more = BTreeMap::from([("rate".into(), f64::NEG_INFINITY)]);
        assert_eq!(find(&Result { more, ..result() }), Some(("rate".into(), f64::NEG_INFINITY)));
        assert_eq!(find(&[[0.0], [f64::INFINITY]]), Some(("[1][0]".into(), f64::INFINITY)));
    }
}
