//! The JSON of a header, read strictly: an object keeps its order and may not name a key twice.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};

/// An object as a list of (key, value) in the order of the text.
pub struct Object<T>(pub Vec<(String, T)>);

/// What stands under a tensor's name.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub dtype: String,
    pub shape: Vec<u64>,
    pub data_offsets: (u64, u64),
}

/// A whole header: the tensors, and the free text pairs under `__metadata__`.
pub struct Document {
    pub metadata: Option<Vec<(String, String)>>,
    pub entries: Vec<(String, Entry)>,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
            type Value = Object<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    refuse_repeat(&mut seen, &key)?;
                    pairs.push((key, map.next_value()?));
                }
                Ok(Object(pairs))
            }
        }

        deserializer.deserialize_map(Pairs(PhantomData))
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;

        impl<'de> Visitor<'de> for Tensors {
            type Value = Document;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut document = Document { metadata: None, entries: Vec::new() };
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    refuse_repeat(&mut seen, &key)?;
                    if key == "__metadata__" {
                        document.metadata = map.next_value::<Option<Object<String>>>()?.map(|object| object.0);
                    } else {
                        let entry = map.next_value_seed(Named(&key))?;
                        document.entries.push((key, entry));
                    }
                }
                Ok(document)
            }
        }

        deserializer.deserialize_map(Tensors)
    }
}

/// Reads an entry and puts the tensor's name into the error.
struct Named<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Named<'_> {
    type Value = Entry;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Entry, D::Error> {
        Entry::deserialize(deserializer).map_err(|error| D::Error::custom(format!("tensor {:?}: {error}", self.0)))
    }
}

fn refuse_repeat<E: Error>(seen: &mut HashSet<String>, key: &str) -> Result<(), E> {
    if seen.insert(key.to_owned()) { Ok(()) } else { Err(E::custom(format!("the key {key:?} stands twice"))) }
}
