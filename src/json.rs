//! JSON objects in which a key comes once. Readers differ in which of two values they take, so that
//! a file with both would be two files in one.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    marker::PhantomData,
};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, Visitor},
};

/// An object that is refused if it has two values for a key.
pub(crate) struct UniqueKeys<T>(pub BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueKeys<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
            type Value = BTreeMap<String, T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut values = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if values.contains_key(&key) {
                        return Err(twice(&key));
                    }
                    let value = map.next_value()?;
                    values.insert(key, value);
                }
                Ok(values)
            }
        }

        deserializer.deserialize_map(Object(PhantomData)).map(Self)
    }
}

/// For `#[serde(deserialize_with)]`.
pub(crate) fn unique_keys<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    UniqueKeys::deserialize(deserializer).map(|UniqueKeys(map)| map)
}

/// The header of a safetensors file, of which only the uniqueness of tensors and metadata keys is of
/// interest: all else the safetensors crate checks.
pub(crate) struct UniqueHeader;

impl<'de> Deserialize<'de> for UniqueHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Header;

        impl<'de> Visitor<'de> for Header {
            type Value = UniqueHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        map.next_value::<Option<UniqueKeys<IgnoredAny>>>()?;
                    } else {
                        map.next_value::<UniqueKeys<IgnoredAny>>()?;
                    }
                    if let Some(key) = seen.replace(key) {
                        return Err(twice(&key));
                    }
                }
                Ok(UniqueHeader)
            }
        }

        deserializer.deserialize_map(Header)
    }
}

fn twice<E: Error>(key: &str) -> E {
    E::custom(format!("`{key}` comes twice"))
}
